"""AOIs and tables of AOIs."""
