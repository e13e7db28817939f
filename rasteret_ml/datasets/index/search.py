"""Which records a chip needs: search in space and time over an index."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.datasets.index.scene_table import SceneTable
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.times import clamp_ns, midpoint

__all__ = ["IndexBounds", "RecordOrder", "SceneSearch", "checked_order", "preference"]

RecordOrder = str | dt.date
"""newest, oldest, clearest (least cloud, then newest), nearest (to the middle of the query's time), or a date: nearest
to it, or to the middle of a day, month or year. Undated records come last; unknown cloud cover counts as cloudy."""

_NAMED = ("newest", "oldest", "clearest", "nearest")
_LAST = np.iinfo(np.int64).max

Integers = npt.NDArray[np.int64]


def checked_order(order: RecordOrder) -> str | pd.Timestamp:
    """Return a named order, or the timestamp of a date.

    Raises:
        UsageError: neither a known name nor a date.
    """
    if isinstance(order, str) and order in _NAMED:
        return order
    try:
        when = midpoint(order) if isinstance(order, (str, dt.date)) else None
    except UsageError:
        when = None
    if when is None:
        raise UsageError(f"order must be one of {', '.join(_NAMED)} or a date, got {order!r}.")
    return when


def preference(
    order: str | pd.Timestamp, times: Integers, clouds: npt.NDArray[Any], ids: npt.NDArray[Any]
) -> Callable[[Integers, int, int], Integers]:
    """Return a function that sorts positions of records, best first: `sort(positions, start, stop)`.

    Args:
        order: See `checked_order`.
        times: Nanoseconds since 1970 `[N]`, the smallest integer where undated.
        clouds: Percent `[N]`, NaN where unknown.
        ids: Ranks of the ids `[N]`, which break ties.
    """
    undated = times == np.iinfo(np.int64).min
    # ~x is -x - 1, without overflow: the newest first.
    newest = np.where(undated, _LAST, ~times)
    keys: tuple[npt.NDArray[Any], ...] = (ids, newest)
    if isinstance(order, pd.Timestamp):
        keys = (ids, newest, np.where(undated, _LAST, abs(times - order.as_unit("ns").value)))
    elif order == "oldest":
        keys = (ids, np.where(undated, _LAST, times))
    elif order == "clearest":
        keys = (ids, newest, np.where(np.isnan(clouds), np.inf, clouds))
    rank = np.empty(len(times), np.int64)
    rank[np.lexsort(keys)] = np.arange(len(times))
    if order != "nearest":
        return lambda found, start, stop: found[np.argsort(rank[found])]

    def nearest(found: Integers, start: int, stop: int) -> Integers:
        middle = start // 2 + stop // 2
        away = np.where(undated[found], _LAST, abs(times[found] // 2 - middle // 2))
        return found[np.lexsort((rank[found], away))]

    return nearest


_POLYGON = 3


class IndexBounds:
    """The bounds of an index, computed once: TorchGeo's own `bounds` reads every row for every query."""

    def __init__(self, index: gpd.GeoDataFrame) -> None:
        self.index = index
        self._xmin, self._ymin, self._xmax, self._ymax = index.total_bounds
        self._first, self._last = index.index.left.min(), index.index.right.max()

    def slices(self, res: tuple[float, float]) -> tuple[slice, slice, slice]:
        """Return TorchGeo's `bounds` for pixels of size `res` (x, y)."""
        x, y = slice(self._xmin, self._xmax, res[0]), slice(self._ymin, self._ymax, res[1])
        return x, y, slice(self._first, self._last, 1)


class SceneSearch:
    """Spatio-temporal search over one index.

    Args:
        index: The index, with `rid` = row of the Collection.
        scenes: The records, for their ids and cloud cover.
        turn: A full turn of longitude in the units of the index's CRS, None where it is projected.
        order: Which records come first, see `RecordOrder`.
    """

    def __init__(
        self, index: gpd.GeoDataFrame, scenes: SceneTable, turn: float | None, order: str | pd.Timestamp = "newest"
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
        place = np.searchsorted(scenes.rows, self._rid).clip(max=len(scenes) - 1)
        ids = np.where(scenes.rows[place] == self._rid, scenes.id_ranks[place], 0)
        clouds = scenes.clouds[place] if order == "clearest" else np.zeros(len(ids))
        self._sorted = preference(order, times, clouds, ids)

    def rows(self, footprint: shapely.Polygon, t: slice) -> npt.NDArray[np.int64]:
        """Return the rows that share an area with a chip and overlap a time (both ends included), best first."""
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
        """Return the positions of records that share an area with `place` and overlap a time."""
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
    """Return which geometries are axis-aligned rectangles, which their bounds describe fully."""
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
    """Return whether one polygon is an axis-aligned rectangle; ten times as fast as `_are_boxes` for one."""
    if len(shape.interiors):
        return False
    corners: list[list[float]] = shapely.get_coordinates(shape).tolist()
    along_x = [a[1] == b[1] and a[0] != b[0] for a, b in pairwise(corners)]
    along_y = [a[0] == b[0] and a[1] != b[1] for a, b in pairwise(corners)]
    turns, others = [True, False] * 2, [False, True] * 2
    return (along_x == turns and along_y == others) or (along_y == turns and along_x == others)
