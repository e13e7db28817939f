"""TIFF headers from byte ranges: directories, tile layout, georeferencing and GDAL's tags."""
