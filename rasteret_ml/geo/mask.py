"""Geometries to boolean masks; True = inside."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely
from rasterio.features import geometry_mask
from shapely.geometry.base import BaseGeometry

from rasteret_ml.geo.grid import Grid

__all__ = ["inside_mask"]


def inside_mask(geometry: BaseGeometry, grid: Grid, *, all_touched: bool = False) -> npt.NDArray[np.bool_]:
    """Which pixels of `grid` lie in `geometry` (given in the grid's CRS), bool `[H, W]`.

    A pixel is inside when its centre is, or, with `all_touched`, when the geometry touches it: the rule of
    `rasterio.features.geometry_mask`, whose burn this is.
    """
    if geometry.is_empty or not shapely.box(*grid.bounds).intersects(shapely.box(*geometry.bounds)):
        return np.zeros(grid.shape, dtype=bool)
    inside = geometry_mask(
        [geometry], out_shape=grid.shape, transform=grid.transform, all_touched=all_touched, invert=True
    )
    return np.asarray(inside, dtype=bool)
