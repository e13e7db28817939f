"""Which records a chip needs: search in space and time over an index."""

from __future__ import annotations

from itertools import pairwise

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.datasets.index.order import preference
from rasteret_ml.datasets.index.scene_table import SceneTable
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.times import clamp_ns

__all__ = ["Lookup", "Span"]

_POLYGON = 3


class Span:
    """What an index covers, worked out once: TorchGeo's own `bounds` looks at every row for every query."""

    def __init__(self, index: gpd.GeoDataFrame) -> None:
        self.index = index
        self._xmin, self._ymin, self._xmax, self._ymax = index.total_bounds
        self._first, self._last = index.index.left.min(), index.index.right.max()

    def slices(self, res: tuple[float, float]) -> tuple[slice, slice, slice]:
        """TorchGeo's `bounds` for pixels of `res` (x, y)."""
        x, y = slice(self._xmin, self._xmax, res[0]), slice(self._ymin, self._ymax, res[1])
        return x, y, slice(self._first, self._last, 1)


class Lookup:
    """Search over one index; made anew when TorchGeo's splitters assign another.

    Args:
        index: The index, with `rid` = row of the Collection.
        facts: The records, for the order of their ids.
        turn: A full turn of longitude in the units of the index's CRS, None where it is projected.
        order: Which records come first, see `RecordOrder`.
    """

    def __init__(
        self, index: gpd.GeoDataFrame, facts: SceneTable, turn: float | None, order: str | pd.Timestamp = "newest"
    ) -> None:
        if "rid" not in index.columns:
            raise UsageError("The dataset's index lost its 'rid' column; keep it when assigning a new index.")
        self.index = index
        self._rid = index["rid"].to_numpy().astype(np.int64)
        self._left = index.index.left.to_numpy().astype("datetime64[ns]").astype(np.int64)
        self._right = index.index.right.to_numpy().astype("datetime64[ns]").astype(np.int64)
        self._shapes = np.asarray(index.geometry, dtype=object)
        self._bounds = shapely.bounds(self._shapes)
        self._is_box = _are_boxes(self._shapes)
        self._tree = shapely.STRtree(self._shapes)
        self._turn = turn
        undated = self._left == pd.Timestamp.min.value
        times = np.where(undated, np.iinfo(np.int64).min, self._left)
        place = np.searchsorted(facts.rows, self._rid).clip(max=len(facts) - 1)
        ids = np.where(facts.rows[place] == self._rid, facts.id_ranks[place], 0)
        clouds = facts.clouds[place] if order == "clearest" else np.zeros(len(ids))
        self._sorted = preference(order, times, clouds, ids)

    def rows(self, footprint: shapely.Polygon, t: slice) -> npt.NDArray[np.int64]:
        """Rows that share an area with the chip and overlap the times (both ends included), best first."""
        start, stop = clamp_ns(t.start).value, clamp_ns(t.stop).value
        places = repeat_turns([footprint], self._turn)
        hits = [self._overlapping(place, start, stop) for place in places]
        found = hits[0] if len(hits) == 1 else np.unique(np.concatenate(hits))
        found = self._sorted(found, start, stop)
        rows: npt.NDArray[np.int64] = self._rid[found][:: int(t.step or 1)]
        if len(rows) < 2:
            return rows
        _, first = np.unique(rows, return_index=True)
        return rows[np.sort(first)]

    def _overlapping(self, place: shapely.Polygon, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions of what shares an area with `place`, in time."""
        near: npt.NDArray[np.int64] = self._tree.query(place)
        near = near[(self._left[near] <= stop) & (self._right[near] >= start)]
        xmin, ymin, xmax, ymax = place.bounds
        b = self._bounds[near]
        near = near[(b[:, 0] < xmax) & (b[:, 2] > xmin) & (b[:, 1] < ymax) & (b[:, 3] > ymin)]
        certain = self._is_box[near] & _is_box(place)
        if certain.all():
            return near
        unsure = near[~certain]
        meets = shapely.area(shapely.intersection(self._shapes[unsure], place)) > 0
        return np.concatenate([near[certain], unsure[meets]])


def _are_boxes(shapes: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    """Which geometries are rectangles along the axes, so that their bounds say all."""
    found = (shapely.get_type_id(shapes) == _POLYGON) & (shapely.get_num_coordinates(shapes) == 5)
    found &= shapely.get_num_interior_rings(shapes) == 0
    corners = shapely.get_coordinates(shapes[found]).reshape(-1, 5, 2)
    low, high = corners.min(axis=1, keepdims=True), corners.max(axis=1, keepdims=True)
    at_corners = ((corners == low) | (corners == high)).all(axis=(1, 2))
    # Each step along one axis only: not a bow tie, nor a triangle.
    found[found] = at_corners & ((corners[:, 1:] != corners[:, :-1]).sum(axis=2) == 1).all(axis=1)
    boxes: npt.NDArray[np.bool_] = found
    return boxes


def _is_box(shape: shapely.Polygon) -> bool:
    """The same of one polygon, ten times as fast: four sides, in turn along x and along y."""
    if len(shape.interiors):
        return False
    corners: list[list[float]] = shapely.get_coordinates(shape).tolist()
    along_x = [a[1] == b[1] and a[0] != b[0] for a, b in pairwise(corners)]
    along_y = [a[0] == b[0] and a[1] != b[1] for a, b in pairwise(corners)]
    turns, others = [True, False] * 2, [False, True] * 2
    return (along_x == turns and along_y == others) or (along_y == turns and along_x == others)
