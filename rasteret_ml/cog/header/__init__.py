"""TIFF headers: directories, GeoTIFF and GDAL tags, tile layout."""
