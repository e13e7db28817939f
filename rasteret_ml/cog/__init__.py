"""TIFF without I/O: headers, tile tables and codecs. Nothing here reads a byte or awaits."""
