"""The grid that a raster gets in another CRS."""

from __future__ import annotations

from rasterio.warp import calculate_default_transform

from rasteret_ml.geo.crs import same_crs
from rasteret_ml.geo.grid import Grid

__all__ = ["warped_grid"]


def warped_grid(grid: Grid, crs: str) -> Grid:
    """`grid` reprojected as GDAL would: the whole extent, square pixels of about the same size, north up."""
    if same_crs(grid.crs, crs):
        return grid
    transform, width, height = calculate_default_transform(grid.crs, crs, grid.width, grid.height, *grid.bounds)
    return Grid(crs=crs, transform=transform, shape=(int(height), int(width)))
