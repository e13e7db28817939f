"""Where scenes lie: the outlines of their grids, cut to their footprints; all of them at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.geo.crs import LONLAT, transform_geometries, transform_points

__all__ = ["cut_to_footprints", "follows_the_edge", "grid_outlines"]

_POLYGON = 3
_SLACK = 0.25
"""By how much of a pixel a cut outline may be simplified: it would else be as long as its densified footprint."""


def grid_outlines(transforms: npt.NDArray[np.float64], shapes: npt.NDArray[np.int32]) -> npt.NDArray[np.object_]:
    """Outlines of grids in their own CRS, exact also for rotated ones.

    Args:
        transforms: a, b, c, d, e, f of each `[N, 6]`.
        shapes: (height, width) of each `[N, 2]`.
    """
    a, b, c, d, e, f = transforms.T
    height, width = shapes.T.astype(np.float64)
    x = np.stack([c, a * width + c, a * width + b * height + c, b * height + c], axis=1)
    y = np.stack([f, d * width + f, d * width + e * height + f, e * height + f], axis=1)
    straight = (b == 0) & (d == 0)
    out = np.empty(len(transforms), dtype=object)
    out[straight] = shapely.box(
        x[straight].min(axis=1), y[straight].min(axis=1), x[straight].max(axis=1), y[straight].max(axis=1)
    )
    out[~straight] = shapely.polygons(np.stack([x[~straight], y[~straight]], axis=2))
    return out


def cut_to_footprints(
    extents: npt.NDArray[np.object_], footprints: npt.NDArray[np.object_], crs: str, pixel: float
) -> npt.NDArray[np.object_]:
    """Extents in `crs` cut to footprints in longitude/latitude (none of them missing or empty).

    A footprint that follows the extent's edge within `pixel` is that edge, rounded: cutting by it would open
    hairline gaps between neighbours. One that misses the extent is wrong and cuts nothing.
    """
    prints = _valid(transform_geometries(footprints, LONLAT, crs))
    cut = shapely.intersection(extents, prints)
    lost = shapely.area(extents) - shapely.area(cut)
    whole = (lost <= 0) | (shapely.area(cut) == 0)
    # What lies within a pixel of an outline is no larger than this: most need no closer look.
    band = 1.01 * (pixel * shapely.length(prints) + np.pi * pixel**2)
    unsure = np.flatnonzero(~whole & (lost <= band))
    whole[unsure] = shapely.covers(shapely.buffer(prints[unsure], pixel), extents[unsure])
    cut[~whole] = shapely.simplify(cut[~whole], pixel * _SLACK)
    return np.where(whole, extents, cut)


def _valid(geometries: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    wrong = ~shapely.is_valid(geometries)
    geometries[wrong] = shapely.make_valid(geometries[wrong])
    return geometries


def follows_the_edge(
    footprints: npt.NDArray[np.object_],
    transforms: npt.NDArray[np.float64],
    shapes: npt.NDArray[np.int32],
    crs: str,
) -> npt.NDArray[np.bool_]:
    """Which footprints name the corners of their raster, and no point that is not on its edge, within a pixel `[N]`.

    Their straight lines in longitude and latitude are meant for the raster's edges, from which they bend away by up
    to hundreds of metres; so only their points are looked at, as columns and rows of the raster's own grid.
    """
    plain = (shapely.get_type_id(footprints) == _POLYGON) & (shapely.get_num_interior_rings(footprints) == 0)
    outlines = footprints.copy()
    outlines[~plain] = None
    xy, owner = shapely.get_coordinates(outlines, return_index=True)
    count = len(footprints)
    x, y = transform_points(xy[:, 0], xy[:, 1], LONLAT, crs)
    a, b, c, d, e, f = transforms[owner].T
    with np.errstate(all="ignore"):
        u, v = (e * (x - c) - b * (y - f)) / (a * e - b * d), (a * (y - f) - d * (x - c)) / (a * e - b * d)
        height, width = shapes[owner].T.astype(np.float64)
        on_side = (np.minimum(abs(u), abs(u - width)) <= 1) & (v >= -1) & (v <= height + 1)
        on_side |= (np.minimum(abs(v), abs(v - height)) <= 1) & (u >= -1) & (u <= width + 1)
        follows: npt.NDArray[np.bool_] = plain & (np.bincount(owner, ~on_side, count) == 0)
        for right, bottom in ((0, 0), (1, 0), (1, 1), (0, 1)):
            at_corner = (abs(u - right * width) <= 1) & (abs(v - bottom * height) <= 1)
            follows &= np.bincount(owner, at_corner, count) > 0
        # A dent from edge to edge has all its points on them: the area tells.
        cross = np.append(u[:-1] * v[1:] - u[1:] * v[:-1], 0.0)
        cross[:-1][owner[:-1] != owner[1:]] = 0.0
        enclosed = abs(np.bincount(owner, np.nan_to_num(cross), count)) / 2
        sides = shapes.astype(np.float64)
        follows &= abs(enclosed - sides.prod(axis=1)) <= 2 * sides.sum(axis=1)
    return follows
