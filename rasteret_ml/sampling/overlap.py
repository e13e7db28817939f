"""How much of a chip lies in its polygon."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely

__all__ = ["largest_shares", "shares"]

Geometries = npt.NDArray[np.object_]
Floats = npt.NDArray[np.float64]


def shares(polygons: Geometries, corners: Floats, sizes: Floats) -> Floats:
    """Share, 0 to 1, of each chip that lies in its own polygon `[N]`.

    Args:
        polygons: Valid polygons `[N]`; those that come often are best prepared.
        corners: Upper left corners (x, y) `[N, 2]`.
        sizes: Width and height, in the same units `[N, 2]`.
    """
    (x, y), (width, height) = corners.T, sizes.T
    boxes = shapely.box(x, y - height, x + width, y)
    found: Floats = shapely.covers(polygons, boxes).astype(np.float64)
    partly = (found == 0) & shapely.intersects(polygons, boxes)
    met = shapely.area(shapely.intersection(polygons[partly], boxes[partly]))
    found[partly] = met / (width[partly] * height[partly])
    return found


def largest_shares(polygons: Geometries, sizes: Floats) -> Floats:
    """A share that no chip of its size `[N, 2]` exceeds in each polygon `[N]`: by its area, and by its bounding box."""
    bounds = shapely.bounds(polygons)
    box = np.minimum(bounds[:, 2:] - bounds[:, :2], sizes).prod(axis=1)
    found: Floats = np.minimum(shapely.area(polygons), box) / sizes.prod(axis=1)
    return found
