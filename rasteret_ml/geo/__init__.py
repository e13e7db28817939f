"""Step 2. Plane arithmetic: windows, grids, CRSs, masks, warps, geometries in.

This room knows numpy, shapely, pyproj and the geometry parts of rasterio. It must never know bytes, tiles or
files of pixels, and nothing in it awaits.
"""
