"""Compute the grid of a raster in another CRS.

GDAL's `calculate_default_transform` does this for most rasters. It reads only the bounds of rotated and sheared grids,
and spans the whole globe for rasters that cross the antimeridian; those grids are computed here.
"""

from __future__ import annotations

import numpy as np
from affine import Affine
from rasterio.warp import calculate_default_transform

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import full_turn, same_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import contiguous, pixel_ratio, to_source

_STEPS = np.linspace(0.0, 1.0, 65)
#: Largest plausible decrease of rows and columns, and increase of pixels; more means the edge of a projection.
_MAX_SHRINK, _MAX_GROWTH = 10, 100
_MAX_SIDE = 1_000_000  # Rows or columns beyond which GDAL's grid is preferred to our own.


def reprojected_grid(grid: Grid, crs: str) -> Grid:
    """Return `grid` reprojected: north up, the whole extent, square pixels of about the same size.

    Equals GDAL's default grid, except for rotated or sheared grids and across the antimeridian: there, pixels have the
    area of the middle pixel of `grid`, and longitudes of a geographic CRS continue past +-180. UsageError if no part of
    the grid can be transformed to `crs`, or if the grid crosses an edge of the projection.
    """
    if same_crs(grid.crs, crs):
        return grid
    if not grid.is_axis_aligned:
        return _square_grid(grid, crs)
    _extent(grid, crs)  # raises if the grid cannot be transformed
    try:
        transform, width, height = calculate_default_transform(grid.crs, crs, grid.width, grid.height, *grid.bounds)
    except Exception:  # rasterio passes on GDAL's own errors, which have no common public class
        return _check_size(_square_grid(grid, crs), grid)
    result = Grid(crs=crs, transform=transform, shape=(int(height), int(width)))
    if result.res[0] > 2 * _resolution(grid, result) or _crosses_antimeridian(grid, result):
        own = _square_grid(grid, crs)
        result = own if max(own.shape) <= _MAX_SIDE else result
    return _check_size(result, grid)


def _check_size(result: Grid, grid: Grid) -> Grid:
    shrunk = min(result.shape) * _MAX_SHRINK < min(grid.shape)
    if shrunk or result.height * result.width > _MAX_GROWTH * max(grid.height * grid.width, 10_000):
        raise UsageError(
            f"A raster of {grid.height} x {grid.width} pixels becomes {result.height} x {result.width} in "
            f"{result.crs}: it crosses an edge of that projection. Choose another CRS."
        )
    return result


def _resolution(grid: Grid, like: Grid) -> float:
    """Return the side of a square pixel in the CRS of `like` that has the area of the middle pixel of `grid`."""
    across, down = pixel_ratio(grid, like)
    return float(np.sqrt(across * like.res[0] * down * like.res[1]))


def _crosses_antimeridian(grid: Grid, result: Grid) -> bool:
    """Return whether the outline of `grid` crosses the antimeridian without spanning the globe."""
    turn = full_turn(result.crs)
    if turn is None or result.bounds[2] - result.bounds[0] < turn / 2:
        return False
    xmin, _, xmax, _ = _extent(grid, str(result.crs))
    return xmax - xmin < turn * 0.9


def _extent(grid: Grid, crs: str) -> tuple[float, float, float, float]:
    """Return (xmin, ymin, xmax, ymax) in `crs`, with longitudes contiguous around the middle of the grid."""
    unit = Grid(crs=crs, transform=Affine.identity(), shape=(1, 1))
    x, y = to_source(grid, unit, *np.meshgrid(_STEPS * grid.width, _STEPS * grid.height))
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        raise UsageError(f"No part of the grid can be transformed to {crs}; choose another CRS.")
    middle = x[len(_STEPS) // 2, len(_STEPS) // 2]
    x = contiguous(x[finite], crs, middle if np.isfinite(middle) else x[finite][0])
    y = y[finite]
    return float(np.min(x)), float(np.min(y)), float(np.max(x)), float(np.max(y))


def _square_grid(grid: Grid, crs: str) -> Grid:
    xmin, ymin, xmax, ymax = _extent(grid, crs)
    res = _resolution(grid, Grid(crs=crs, transform=Affine.identity(), shape=(1, 1)))
    shape = (max(1, round((ymax - ymin) / res)), max(1, round((xmax - xmin) / res)))
    return Grid(crs=crs, transform=Affine(res, 0, xmin, 0, -res, ymax), shape=shape)
