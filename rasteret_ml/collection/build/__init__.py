"""Build Collections from files, tables and STAC items."""
