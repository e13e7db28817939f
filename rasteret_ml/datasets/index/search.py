"""From a query to the records that its chip is read from: search in space and time over an index."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.datasets.index.dates import TimeSeries, choose_dates, fits_series
from rasteret_ml.datasets.index.scene_table import SceneTable, pixel_sizes
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.crs import crs_text, full_turn, same_crs, transform_geometries, transform_points
from rasteret_ml.geo.grid import ALIGNMENT_TOLERANCE, Grid, Window, round_half_up
from rasteret_ml.geo.regions import boxes_of
from rasteret_ml.geo.times import clamp_ns, midpoint
from rasteret_ml.samplers.aoi.aoi import AOI

#: "newest", "oldest", "clearest" (least cloud, then newest), "nearest" (to the middle of the query's time), or a date:
#: nearest to it, or to the middle of a day, month or year. Undated records come last; unknown cloud cover counts as
#: cloudy.
RecordOrder = str | dt.date

_NAMED = ("newest", "oldest", "clearest", "nearest")
_LAST = np.iinfo(np.int64).max
_NOT_A_TIME = np.iinfo(np.int64).min

Integers = npt.NDArray[np.int64]


def parse_order(order: RecordOrder) -> str | pd.Timestamp:
    """Return a named order, or the timestamp of a date; UsageError for anything else."""
    if isinstance(order, str) and order in _NAMED:
        return order
    try:
        date = midpoint(order) if isinstance(order, (str, dt.date)) else None
    except UsageError:
        date = None
    if date is None:
        raise UsageError(f"order must be one of {', '.join(_NAMED)} or a date, got {order!r}.")
    return date


def preference(
    order: str | pd.Timestamp, times: Integers, clouds: npt.NDArray[Any], ids: npt.NDArray[Any]
) -> Callable[[Integers, int, int], Integers]:
    """Return a function that sorts positions of records, best first: `sort(positions, start, stop)`.

    Times are nanoseconds since 1970 `[N]`, the smallest integer where undated; cloud cover is in percent `[N]`, NaN
    where unknown; ranks of the ids `[N]` break ties.
    """
    undated = times == _NOT_A_TIME
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
        distance = np.where(undated[found], _LAST, abs(times[found] // 2 - middle // 2))
        return found[np.lexsort((rank[found], distance))]

    return nearest


def interval_ns(times: pd.IntervalIndex) -> tuple[Integers, Integers]:
    """Return the starts and ends of intervals in nanoseconds since 1970, both `[N]`."""
    left, right = (ends.to_numpy().astype("datetime64[ns]").astype(np.int64) for ends in (times.left, times.right))
    return left, right


class SceneSearch:
    """Spatio-temporal search over one index, with `rid` = row of the Collection.

    `turn` is a full turn of longitude in the units of the index's CRS, None where that is projected.
    """

    def __init__(
        self, index: gpd.GeoDataFrame, scenes: SceneTable, turn: float | None, order: str | pd.Timestamp = "newest"
    ) -> None:
        if "rid" not in index.columns:
            raise UsageError("The dataset's index lost its 'rid' column; keep it when assigning a new index.")
        self.index = index
        self._rid = index["rid"].to_numpy().astype(np.int64)
        self._left, self._right = interval_ns(index.index)
        self._shapes = np.asarray(index.geometry, dtype=object)
        self._bounds, self._is_box = boxes_of(self._shapes)
        self._tree = shapely.STRtree(self._shapes)
        self._turn = turn
        undated = self._left == pd.Timestamp.min.value
        times = np.where(undated, _NOT_A_TIME, self._left)
        positions = np.searchsorted(scenes.rows, self._rid).clip(max=len(scenes) - 1)
        ids = np.where(scenes.rows[positions] == self._rid, scenes.id_ranks[positions], 0)
        clouds = scenes.clouds[positions] if order == "clearest" else np.zeros(len(ids))
        self._sorted = preference(order, times, clouds, ids)

    def rows(self, footprint: shapely.Polygon, t: slice) -> Integers:
        """Return the rows that share an area with a chip and overlap a time (both ends included), best first."""
        start, stop = clamp_ns(t.start).value, clamp_ns(t.stop).value
        hits = [self._overlapping(copy, start, stop) for copy in repeat_turns([footprint], self._turn)]
        found = hits[0] if len(hits) == 1 else np.unique(np.concatenate(hits))
        found = self._sorted(found, start, stop)
        rows: Integers = self._rid[found][:: int(t.step or 1)]
        return rows if len(rows) < 2 else pd.unique(rows)

    def _overlapping(self, footprint: shapely.Polygon, start: int, stop: int) -> Integers:
        """Return the positions of records that share an area with a footprint and overlap a time."""
        near: Integers = self._tree.query(footprint)
        near = near[(self._left[near] <= stop) & (self._right[near] >= start)]
        xmin, ymin, xmax, ymax = footprint.bounds
        b = self._bounds[near]
        near = near[(b[:, 0] < xmax) & (b[:, 2] > xmin) & (b[:, 1] < ymax) & (b[:, 3] > ymin)]
        box = shapely.normalize(shapely.box(xmin, ymin, xmax, ymax))
        is_box = xmin < xmax and ymin < ymax and shapely.normalize(footprint) == box
        certain = self._is_box[near] & is_box  # bounds describe two boxes fully
        if certain.all():
            return near
        unsure = near[~certain]
        overlaps = shapely.area(shapely.intersection(self._shapes[unsure], footprint)) > 0
        return np.concatenate([near[certain], unsure[overlaps]])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuerySpec:
    """How a dataset finds and sorts its records."""

    order: str | pd.Timestamp  #: Which records come first, see `RecordOrder`.
    series: TimeSeries | None  #: How dates are chosen; None = all records of a query fill one chip.
    native: bool  #: Whether only records are used whose pixels coincide with the chip's.


class RecordQuery:
    """The records of chips, their dates and native grids, for one index of a dataset; see `SceneSearch`."""

    def __init__(self, index: gpd.GeoDataFrame, scenes: SceneTable, spec: QuerySpec) -> None:
        self.index = index
        self._crs = crs_text(index.crs)
        self._scenes = scenes
        self._spec = spec
        self._search = SceneSearch(index, scenes, full_turn(self._crs), spec.order)

    def rows(self, grid: Grid, t: slice) -> Integers:
        """Return the rows of the Collection that overlap a chip in space and time, best first."""
        rows = self._search.rows(_reproject(grid.footprint, str(grid.crs), self._crs), t)
        return rows[self._aligned(rows, grid)] if self._spec.native else rows

    def dates(self, grid: Grid, query: Any, t: slice) -> list[Integers]:
        """Return the rows of each date, ascending; without a series, one list of all rows.

        Raises NoOverlapError if there is no record, or fewer dates than required.
        """
        rows = self.rows(grid, t)
        if not len(rows):
            raise NoOverlapError(self._no_record_message(grid, t))
        if self._spec.series is None:
            return [rows]
        positions = self._positions(rows)
        draw = (query.seed, query.epoch, query.position) if isinstance(query, AOI) else (0, 0, 0)
        groups = choose_dates(self._spec.series, self._scenes.times[positions], self._scenes.clouds[positions], draw)
        return [rows[group] for group in groups]

    def _no_record_message(self, grid: Grid, t: slice) -> str:
        place = f"x, y = {tuple(round(v, 6) for v in grid.bounds)} ({grid.crs})"
        if not len(self.index):
            return f"No record at {place}: the dataset's index is empty."
        if self._spec.native and len(self._search.rows(_reproject(grid.footprint, str(grid.crs), self._crs), t)):
            return (
                f"The records at {place} have other pixels than this chip, and grid='native' "
                "does not resample; use grid='common' for this dataset, or put it on the left."
            )
        span = tuple(round(float(v), 6) for v in self.index.total_bounds)
        return f"No record at {place} between {t.start} and {t.stop}; the dataset spans {span} ({self._crs})."

    def seconds(self, dates: Sequence[Integers]) -> tuple[float, ...]:
        """Return the first instant of each date, POSIX seconds UTC."""
        times = [self._scenes.times[self._positions(rows)].astype("datetime64[ns]").astype(np.int64) for rows in dates]
        return tuple(float(np.min(stamps)) / 1e9 for stamps in times)

    def native_grid(self, slices: tuple[slice, slice, slice], crs: str, res: tuple[float, float]) -> Grid:
        """Return the chip's grid on the best record's own pixels: the requested size, centred at the nearest pixel.

        The best record is the first that holds the chip's centre, of those with the query's CRS and pixel size if there
        are any; if none holds it, the first that intersects the chip. A chip that would miss its record by rounding is
        moved onto its edge. `res` is for slices (x, y, t) without a pixel size. Raises NoOverlapError if
        there is no record.
        """
        x, y, t = slices
        rows = self._search.rows(_reproject(shapely.box(x.start, y.start, x.stop, y.stop), crs, self._crs), t)
        if not len(rows):
            raise NoOverlapError(f"No record at x = {x.start} to {x.stop}, y = {y.start} to {y.stop} ({crs}).")
        grid, col, row = self._best_grid(
            self._similar(self._positions(rows), crs, (x.step, y.step)),
            ((x.start + x.stop) / 2, (y.start + y.stop) / 2),
            crs,
        )
        height = max(1, round_half_up((y.stop - y.start) / (y.step or res[1])))
        width = max(1, round_half_up((x.stop - x.start) / (x.step or res[0])))
        first_row = min(max(round_half_up(row - height / 2), 1 - height), grid.height - 1)
        first_col = round_half_up(col - width / 2)
        if grid.turn is None:
            first_col = min(max(first_col, 1 - width), grid.width - 1)
        return grid.window(Window(row=first_row, col=first_col, height=height, width=width))

    def _best_grid(self, positions: Integers, centre: tuple[float, float], crs: str) -> tuple[Grid, float, float]:
        """Return the grid of the first record that holds a point, else of the first, and the point's column and row."""
        first: tuple[Grid, float, float] | None = None
        for position in positions:
            grid = self._scenes.grid(int(position))
            x, y = transform_points(np.array([centre[0]]), np.array([centre[1]]), crs, str(grid.crs))
            col, row = (float(values[0]) for values in grid.to_pixels(x, y))
            if 0 <= col < grid.width and 0 <= row < grid.height:
                return grid, col, row
            first = first or (grid, col, row)
        assert first is not None
        return first

    def _similar(self, positions: Integers, crs: str, steps: tuple[float | None, float | None]) -> Integers:
        """Return the records that qualify for the series, narrowed to a CRS and a pixel size if any have them."""
        scenes, series = self._scenes, self._spec.series
        times, clouds = scenes.times[positions], scenes.clouds[positions]
        fits = np.ones(len(positions), bool) if series is None else fits_series(series, times, clouds)
        own = self._in_crs(positions, crs)
        wanted = np.array(steps, np.float64)  # NaN = any
        near = ~(abs(pixel_sizes(scenes.transforms[positions]) - wanted) > 1e-6 * wanted).any(axis=1)
        for kept in (fits & own & near, fits & own, fits, own & near, own):
            if kept.any():
                return positions[kept]
        return positions

    def _in_crs(self, positions: Integers, crs: Any) -> npt.NDArray[np.bool_]:
        return np.array([same_crs(text, crs) for text in self._scenes.crs_texts])[self._scenes.crs_codes[positions]]

    def _positions(self, rows: Integers) -> Integers:
        return np.searchsorted(self._scenes.rows, rows)

    def _aligned(self, rows: Integers, grid: Grid) -> npt.NDArray[np.bool_]:
        """Return which records' pixels coincide with a chip's (`Grid.window_of`, vectorized)."""
        positions = self._positions(rows)
        a, b, c, d, e, f = (float(v) for v in tuple(grid.transform)[:6])
        transforms, det = self._scenes.transforms[positions], a * e - b * d
        dx, dy = transforms[:, 2] - c, transforms[:, 5] - f
        steps = np.stack([(e * dx - b * dy) / det, (a * dy - d * dx) / det], axis=1)
        drift = np.abs(transforms[:, [0, 1, 3, 4]] - (a, b, d, e)).max(axis=1) * max(grid.shape) / min(grid.res)
        off = np.abs(steps - np.rint(steps)).max(axis=1)
        return np.asarray(self._in_crs(positions, grid.crs) & (np.maximum(off, drift) <= ALIGNMENT_TOLERANCE))


def _reproject(shape: shapely.Geometry, source: str, target: str) -> Any:
    if same_crs(source, target):
        return shape
    return transform_geometries(np.array([shape], dtype=object), source, target)[0]
