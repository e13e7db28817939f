"""Regions that points are drawn from: erosion by a box, and uniform points in polygons."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry.base import BaseGeometry

__all__ = ["TriangleRegion", "erode_by_box", "polygonal"]


def polygonal(geometry: BaseGeometry) -> BaseGeometry:
    """The valid, polygonal part of a geometry (a bow tie becomes its two triangles; slivers of line vanish)."""
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry)
    parts = [p for p in shapely.get_parts(geometry) if p.geom_type in ("Polygon", "MultiPolygon") and p.area > 0]
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    return shapely.union_all(parts) if parts else shapely.Polygon()


def erode_by_box(region: BaseGeometry, width: float, height: float) -> BaseGeometry:
    """The centres at which a `width` x `height` box lies wholly inside `region`; empty where it fits nowhere.

    The exact Minkowski erosion: a box at c leaves the region just where c lies in the box swept along the
    region's boundary, and a box swept along a segment is the convex hull of the boxes at its two ends.
    """
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2)
    hulls = []
    for ring in shapely.get_rings(shapely.get_parts(region)):
        points = shapely.get_coordinates(ring)
        ends = np.concatenate([points[:-1, None] + corners, points[1:, None] + corners], axis=1)
        hulls.append(shapely.convex_hull(shapely.multipoints(ends)))
    if not hulls:
        return shapely.Polygon()
    return polygonal(shapely.difference(region, shapely.union_all(np.concatenate(hulls))))


class TriangleRegion:
    """Polygons cut into triangles, so that uniform numbers become uniform points without rejection."""

    def __init__(self, regions: npt.NDArray[np.object_], weights: npt.NDArray[np.float64] | None = None) -> None:
        """Cut `regions`; each is drawn in proportion to its weight (default: its area), uniformly inside.

        A region without triangles (a sliver thinner than floating point) is represented by one of its points.
        """
        corners, areas, owner = [], [], []
        for i, region in enumerate(regions):
            pieces = shapely.get_parts(shapely.constrained_delaunay_triangles(region))
            if len(pieces):
                xy = shapely.get_coordinates(pieces).reshape(len(pieces), 4, 2)[:, :3]
                size = shapely.area(pieces)
            else:
                point = shapely.get_coordinates(region.representative_point())
                xy, size = np.repeat(point[None], 3, axis=1), np.array([1.0])
            share = size if weights is None else size / size.sum() * weights[i]
            corners.append(xy)
            areas.append(share)
            owner.append(np.full(len(xy), i))
        self._corners: npt.NDArray[np.float64] = np.concatenate(corners)
        self._owner: npt.NDArray[np.int64] = np.concatenate(owner)
        cumulative = np.cumsum(np.concatenate(areas))
        self._cumulative: npt.NDArray[np.float64] = cumulative / cumulative[-1]

    def points(self, uniforms: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Points `[N, 2]` (x, y) and the region each lies in `[N]`, from uniform numbers `[N, 3]` in [0, 1)."""
        which = np.searchsorted(self._cumulative, uniforms[:, 0], side="right").clip(max=len(self._owner) - 1)
        u, v = uniforms[:, 1], uniforms[:, 2]
        # Folding the unit square's upper triangle onto the lower one keeps the density uniform.
        over = u + v > 1
        u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
        a, b, c = (self._corners[which, k] for k in range(3))
        return a + u[:, None] * (b - a) + v[:, None] * (c - a), self._owner[which]
