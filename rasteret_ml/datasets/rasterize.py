"""Polygons to pixels: which polygons lie at a chip, and which is on top at each pixel."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from rasterio.features import rasterize

from rasteret_ml.datasets.index.search import interval_ns
from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.crs import crs_text, full_turn, same_crs, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.regions import Geometries, Integers, polygonal_each
from rasteret_ml.geo.times import clamp_ns

_MANY_VERTICES = 5000  # Larger polygons are cut to the surroundings of a chip before they are rasterized.


def rasterize_positions(shapes: Geometries, grid: Grid, *, all_touched: bool = False) -> npt.NDArray[np.int32]:
    """Return which polygon (in the grid's CRS) is on top at each pixel, int32 `[H, W]`: its position + 1, 0 = none.

    Later polygons cover earlier ones. Pixels are inside by the rule of `rasterio.features.rasterize`: where their
    centre is inside, with `all_touched` where the polygon touches them.
    """
    if not len(shapes):
        return np.zeros(grid.shape, np.int32)
    numbered = ((shape, i + 1) for i, shape in enumerate(shapes))
    options = {"out_shape": grid.shape, "transform": grid.transform, "all_touched": all_touched, "dtype": np.int32}
    return np.asarray(rasterize(numbered, **options))


def reproject_polygons(shapes: Geometries, source: str, target: str) -> Geometries:
    """Return polygons in another CRS, valid, for an index: edges are densified less than for rasterizing."""
    if same_crs(source, target):
        return shapes
    return polygonal_each(transform_geometries(shapes, source, target, segments=8))


class PolygonSearch:
    """Valid polygons `[N]` with closed tz-naive intervals `[N]`, searched by the place and time of a chip."""

    def __init__(self, shapes: Geometries, crs: str, times: pd.IntervalIndex) -> None:
        self.shapes, self.crs = shapes, crs
        self._left, self._right = interval_ns(times)
        self._tree = shapely.STRtree(shapes)

    def at(self, grid: Grid, t: slice) -> tuple[Integers, Geometries]:
        """Return the positions, ascending, of polygons that overlap a chip and a time, and these in the chip's CRS.

        Raises GeometryError if a polygon cannot be projected to that CRS.
        """
        start, stop = clamp_ns(t.start).value, clamp_ns(t.stop).value
        near = self._near(grid)
        near = near[(self._left[near] <= stop) & (self._right[near] >= start)]
        if not len(near):
            return near, self.shapes[:0]
        crs = str(grid.crs)
        shapes = transform_geometries(self.shapes[near], self.crs, crs, near=grid.bounds)
        if not same_crs(self.crs, crs):
            shapes = polygonal_each(shapes)
        bounds = shapely.bounds(shapes)
        unprojected = np.isinf(bounds).any(axis=1)
        if unprojected.any():
            raise GeometryError(
                f"Polygon {int(near[np.argmax(unprojected)])} cannot be projected to {crs}; cut it to your area first."
            )
        xmin, ymin, xmax, ymax = grid.bounds
        overlaps = (bounds[:, 0] < xmax) & (bounds[:, 2] > xmin) & (bounds[:, 1] < ymax) & (bounds[:, 3] > ymin)
        footprint = grid.footprint
        shapely.prepare(footprint)
        overlaps[overlaps] = shapely.intersects(footprint, shapes[overlaps])
        return near[overlaps], _without_far_vertices(shapes[overlaps], grid)

    def _near(self, grid: Grid) -> Integers:
        """Return the positions of polygons whose bounds may overlap a chip."""
        footprint = transform_geometries(np.array([grid.footprint], dtype=object), str(grid.crs), self.crs)
        bounds = shapely.bounds(shapely.get_parts(footprint))
        bounds = bounds[np.isfinite(bounds).all(axis=1)]
        if not same_crs(self.crs, grid.crs):  # straight edges of one CRS are curves in another
            margin = 0.05 * (bounds[:, 2:] - bounds[:, :2])
            bounds = np.column_stack([bounds[:, :2] - margin, bounds[:, 2:] + margin])
        boxes = repeat_turns(list(shapely.box(*bounds.T)), full_turn(self.crs))
        return np.unique(self._tree.query(np.array(boxes, dtype=object))[1])


class PolygonLookup:
    """The polygons of a dataset (see `polygon_table`), as far as one of its indexes holds them, in the dataset's CRS.

    The rows of the index are an extent (`has_extent`), or polygons, which its column `polygon` names; an `unchanged`
    index has all rows of the table in their order. Another index needs another lookup.
    """

    def __init__(self, index: gpd.GeoDataFrame, table: gpd.GeoDataFrame, *, has_extent: bool, unchanged: bool) -> None:
        self.index = index
        own_crs, crs = crs_text(table.crs), crs_text(index.crs)
        shapes, times = np.asarray(table.geometry, dtype=object), table.index
        self.rows: Integers = np.arange(len(table))  #: Row of the table of each of `polygons`.
        #: Drawing rank of each row of the table; higher ones cover lower ones.
        self.rank: Integers = table["rank"].to_numpy()
        self.extent: PolygonSearch | None = None  #: Where labels are known; None = inside the polygons.
        if has_extent:
            self.extent = PolygonSearch(np.asarray(index.geometry, dtype=object), crs, index.index)
        elif not unchanged:
            if "polygon" not in index.columns:
                raise UsageError("The dataset's index lost its 'polygon' column; keep it when assigning a new index.")
            self.rows = index["polygon"].to_numpy().astype(np.int64)
            shapes, times = _cut_as_in(index, shapes[self.rows], own_crs, crs), index.index
        self.polygons = PolygonSearch(shapes, own_crs, times)


def _cut_as_in(index: gpd.GeoDataFrame, shapes: Geometries, own_crs: str, crs: str) -> Geometries:
    """Return polygons in their own CRS, cut where the index cut them; others keep their exact coordinates."""
    indexed = np.asarray(index.geometry, dtype=object)
    if same_crs(own_crs, crs):
        return polygonal_each(indexed)
    cut = ~shapely.equals_exact(indexed, reproject_polygons(shapes, own_crs, crs))
    out = shapes.copy()
    out[cut] = polygonal_each(transform_geometries(indexed[cut], crs, own_crs))
    return out


def _without_far_vertices(shapes: Geometries, grid: Grid) -> Geometries:
    """Return polygons, large ones (a coastline) cut to the surroundings of a chip: rasterizing reads every vertex."""
    large = shapely.get_num_coordinates(shapes) > _MANY_VERTICES
    if not large.any():
        return shapes
    xmin, ymin, xmax, ymax = grid.bounds
    width, height = xmax - xmin, ymax - ymin
    surroundings = shapely.box(xmin - width, ymin - height, xmax + width, ymax + height)
    cut = shapes.copy()
    cut[large] = polygonal_each(shapely.intersection(shapely.make_valid(shapes[large]), surroundings))
    return cut
