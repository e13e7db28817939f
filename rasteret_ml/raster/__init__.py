"""A record becomes pixels: plan the tiles, read them, and assemble chips."""
