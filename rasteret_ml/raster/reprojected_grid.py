"""The grid that a raster gets in another CRS."""

from __future__ import annotations

import numpy as np
from affine import Affine
from rasterio.warp import calculate_default_transform

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import full_turn, same_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import contiguous, pixel_ratio, to_source

__all__ = ["reprojected_grid"]

_STEPS = np.linspace(0.0, 1.0, 65)
_LEAST, _MOST = 10, 100
"""By how much a grid may have fewer rows or columns, or more pixels, than the raster it is made of."""
_LARGEST = 1_000_000
"""Rows or columns beyond which a grid of our own is a sign of a projection's edge, and GDAL's is taken."""


def reprojected_grid(grid: Grid, crs: str) -> Grid:
    """`grid` reprojected as GDAL would: the whole extent, square pixels of about the same size, north up.

    Where GDAL's answer is of no use it is our own, with pixels of the same area as at the middle of `grid`: for a
    rotated or sheared grid, of which GDAL is told the bounds only, and across the antimeridian, where GDAL's grid
    runs round the world. In a geographic CRS the latter keeps the longitudes in one piece, past +-180.

    Raises:
        UsageError: no part of the grid has a place in `crs`.
    """
    if same_crs(grid.crs, crs):
        return grid
    if not grid.is_axis_aligned:
        return _covering(grid, crs)
    _extent(grid, crs)  # says so where there is no way to this CRS
    try:
        transform, width, height = calculate_default_transform(grid.crs, crs, grid.width, grid.height, *grid.bounds)
    except Exception:  # rasterio lets errors through that are GDAL's own, of no class that it names
        return _sensible(_covering(grid, crs), grid)
    found = Grid(crs=crs, transform=transform, shape=(int(height), int(width)))
    if found.res[0] > 2 * _resolution(grid, found) or _crosses(grid, found):
        own = _covering(grid, crs)
        return _sensible(own if max(own.shape) <= _LARGEST else found, grid)
    return _sensible(found, grid)


def _sensible(found: Grid, grid: Grid) -> Grid:
    lost = min(found.shape) * _LEAST < min(grid.shape)
    if lost or found.height * found.width > _MOST * max(grid.height * grid.width, 10_000):
        raise UsageError(
            f"A raster of {grid.height} x {grid.width} pixels becomes {found.height} x {found.width} in {found.crs}: "
            "it lies across an edge of that projection. Choose another CRS."
        )
    return found


def _resolution(grid: Grid, like: Grid) -> float:
    """The side of a square in `like`'s CRS as large as the middle pixel of `grid`."""
    across, down = pixel_ratio(grid, like)
    return float(np.sqrt(across * like.res[0] * down * like.res[1]))


def _crosses(grid: Grid, found: Grid) -> bool:
    """Whether the longitudes of an outline, followed from the grid's middle, leave -180..180 but do not go round."""
    turn = full_turn(found.crs)
    if turn is None or found.bounds[2] - found.bounds[0] < turn / 2:
        return False
    xmin, _, xmax, _ = _extent(grid, str(found.crs))
    return xmax - xmin < turn * 0.9


def _extent(grid: Grid, crs: str) -> tuple[float, float, float, float]:
    here = Grid(crs=crs, transform=Affine.identity(), shape=(1, 1))
    x, y = to_source(grid, here, *np.meshgrid(_STEPS * grid.width, _STEPS * grid.height))
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        raise UsageError(f"No part of the grid has a place in {crs}.")
    middle = x[len(_STEPS) // 2, len(_STEPS) // 2]
    x = contiguous(x[good], crs, middle if np.isfinite(middle) else x[good][0])
    y = y[good]
    return float(np.min(x)), float(np.min(y)), float(np.max(x)), float(np.max(y))


def _covering(grid: Grid, crs: str) -> Grid:
    xmin, ymin, xmax, ymax = _extent(grid, crs)
    res = _resolution(grid, Grid(crs=crs, transform=Affine.identity(), shape=(1, 1)))
    shape = (max(1, round((ymax - ymin) / res)), max(1, round((xmax - xmin) / res)))
    return Grid(crs=crs, transform=Affine(res, 0, xmin, 0, -res, ymax), shape=shape)
