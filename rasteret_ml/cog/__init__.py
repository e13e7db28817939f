"""TIFF without I/O: nothing here reads a file or awaits.

`header.parse` turns fetched bytes into a `CogHeader`, `metadata` and `tile_table` hold the tile tables of one band and
plan which tiles a window needs, `codecs.decode` turns a compressed tile into pixels.
"""
