"""Compressed tiles to arrays."""
