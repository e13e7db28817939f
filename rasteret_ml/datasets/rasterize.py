"""Polygons to pixels: which of very many lie at a chip, and which is on top."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from rasterio.features import rasterize

from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.crs import crs_text, full_turn, same_crs, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.regions import polygonal_each
from rasteret_ml.geo.times import clamp_ns

__all__ = ["PlacedShapes", "PolygonLookup", "moved_polygons", "paint"]

Shapes = npt.NDArray[np.object_]
Positions = npt.NDArray[np.int64]

_MANY_POINTS = 5000
"""Vertices from which a polygon is cut to the surroundings of a chip before it is painted."""


def paint(shapes: Shapes, grid: Grid, *, all_touched: bool = False) -> npt.NDArray[np.int32]:
    """Which polygon is on top at each pixel, int32 `[H, W]`: its place in `shapes` plus one, 0 = none.

    Later ones cover earlier ones; the rule for the edge is that of `rasterio.features.rasterize`, whose burn this
    is. `shapes` are in the grid's CRS.
    """
    if not len(shapes):
        return np.zeros(grid.shape, np.int32)
    burnt: npt.NDArray[np.int32] = rasterize(
        ((shape, i + 1) for i, shape in enumerate(shapes)),
        out_shape=grid.shape,
        transform=grid.transform,
        fill=0,
        all_touched=all_touched,
        dtype=np.int32,
    )
    return burnt


def moved_polygons(shapes: Shapes, source: str, target: str) -> Shapes:
    """Very many polygons in another CRS, for an index: valid, edges densified less than where they are painted."""
    if same_crs(source, target):
        return shapes
    return polygonal_each(transform_geometries(shapes, source, target, segments=8))


class PlacedShapes:
    """Polygons with times, to be looked up by the place and time of a chip.

    Args:
        shapes: Valid polygons `[N]`.
        crs: Their CRS text.
        times: Closed intervals `[N]`, tz-naive.
    """

    def __init__(self, shapes: Shapes, crs: str, times: pd.IntervalIndex) -> None:
        self.shapes, self.crs = shapes, crs
        self._left = times.left.to_numpy().astype("datetime64[ns]").astype(np.int64)
        self._right = times.right.to_numpy().astype("datetime64[ns]").astype(np.int64)
        self._tree = shapely.STRtree(shapes)

    def near(self, grid: Grid, t: slice) -> tuple[Positions, Shapes]:
        """Positions, ascending, of what meets the chip in place and time, and those polygons in the chip's CRS.

        Raises:
            GeometryError: a polygon that has no image in the chip's CRS.
        """
        start, stop = clamp_ns(t.start).value, clamp_ns(t.stop).value
        found = self._candidates(grid)
        found = found[(self._left[found] <= stop) & (self._right[found] >= start)]
        if not len(found):
            return found, self.shapes[:0]
        crs = str(grid.crs)
        shapes = transform_geometries(self.shapes[found], self.crs, crs, near=grid.bounds)
        if not same_crs(self.crs, crs):
            shapes = polygonal_each(shapes)
        bounds = shapely.bounds(shapes)
        lost = np.isinf(bounds).any(axis=1)
        if lost.any():
            raise GeometryError(
                f"Polygon {int(found[np.argmax(lost)])} has no image in {crs}; cut it to your area first."
            )
        xmin, ymin, xmax, ymax = grid.bounds
        here = (bounds[:, 0] < xmax) & (bounds[:, 2] > xmin) & (bounds[:, 1] < ymax) & (bounds[:, 3] > ymin)
        outline = grid.footprint
        shapely.prepare(outline)
        here[here] = shapely.intersects(outline, shapes[here])
        return found[here], _without_far_points(shapes[here], grid)

    def _candidates(self, grid: Grid) -> Positions:
        """What may meet the chip."""
        outline = transform_geometries(np.array([grid.footprint], dtype=object), str(grid.crs), self.crs)
        bounds = shapely.bounds(shapely.get_parts(outline))
        bounds = bounds[np.isfinite(bounds).all(axis=1)]
        if not same_crs(self.crs, grid.crs):  # straight edges of one CRS are curves in another
            margin = 0.05 * (bounds[:, 2:] - bounds[:, :2])
            bounds = np.column_stack([bounds[:, :2] - margin, bounds[:, 2:] + margin])
        boxes = repeat_turns(list(shapely.box(*bounds.T)), full_turn(self.crs))
        if not boxes:
            return np.empty(0, np.int64)
        return np.unique(self._tree.query(np.array(boxes, dtype=object))[1])


class PolygonLookup:
    """The polygons of one index of a dataset; made anew when TorchGeo's splitters assign another.

    Args:
        index: Where labels are known, in the dataset's CRS.
        table: The polygons in their own (see `polygon_table`).
        bounded: The index is an extent around polygons; else its rows are polygons, named by its column `polygon`.
        whole: It is as it was made, row for row the table.
    """

    def __init__(self, index: gpd.GeoDataFrame, table: gpd.GeoDataFrame, *, bounded: bool, whole: bool) -> None:
        self.index = index
        own, crs = crs_text(table.crs), crs_text(index.crs)
        shapes, times = np.asarray(table.geometry, dtype=object), table.index
        self.rows: Positions = np.arange(len(table))
        """Row of the table of each of `polygons`."""
        self.rank: Positions = table["rank"].to_numpy()
        """Place of each row of the table in the order of painting."""
        self.known: PlacedShapes | None = None
        """The extent; None = the polygons themselves."""
        if bounded:
            self.known = PlacedShapes(np.asarray(index.geometry, dtype=object), crs, index.index)
        elif not whole:
            if "polygon" not in index.columns:
                raise UsageError("The dataset's index lost its 'polygon' column; keep it when assigning a new index.")
            self.rows = index["polygon"].to_numpy().astype(np.int64)
            shapes, times = _as_cut(shapes[self.rows], own, index, crs), index.index
        self.polygons = PlacedShapes(shapes, own, times)


def _as_cut(shapes: Shapes, own: str, index: gpd.GeoDataFrame, crs: str) -> Shapes:
    """The polygons as an index has them, in their own CRS: whole ones as they were, to the last digit."""
    given = np.asarray(index.geometry, dtype=object)
    if same_crs(own, crs):
        return polygonal_each(given)
    cut = ~shapely.equals_exact(given, moved_polygons(shapes, own, crs))
    out = shapes.copy()
    out[cut] = polygonal_each(transform_geometries(given[cut], crs, own))
    return out


def _without_far_points(shapes: Shapes, grid: Grid) -> Shapes:
    """Polygons of very many points (a coastline) cut to where the chip is: painting reads every point."""
    large = shapely.get_num_coordinates(shapes) > _MANY_POINTS
    if not large.any():
        return shapes
    xmin, ymin, xmax, ymax = grid.bounds
    width, height = xmax - xmin, ymax - ymin
    around = shapely.box(xmin - width, ymin - height, xmax + width, ymax + height)
    cut = shapes.copy()
    cut[large] = polygonal_each(shapely.intersection(shapely.make_valid(shapes[large]), around))
    return cut
