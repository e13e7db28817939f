"""From a query to the records that its chip is read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.datasets.index.dates import TimeSeries, choose_dates, fits_series
from rasteret_ml.datasets.index.scene_table import SceneTable, pixel_sizes
from rasteret_ml.datasets.index.search import SceneSearch
from rasteret_ml.errors import NoOverlapError
from rasteret_ml.geo.crs import LONLAT, crs_text, full_turn, same_crs, transform_geometries, transform_points
from rasteret_ml.geo.grid import ALIGNMENT_TOLERANCE, Grid, round_half_up
from rasteret_ml.geo.window import Window
from rasteret_ml.samplers.aoi.aoi import AOI

__all__ = ["QuerySpec", "RecordQuery"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuerySpec:
    """How a dataset finds and sorts its records."""

    order: str | pd.Timestamp
    """Which records come first, see `RecordOrder`."""
    series: TimeSeries | None
    """How dates are chosen; None = all records of a query fill one chip."""
    native: bool
    """Whether only records whose pixels coincide with the chip's are used."""


class RecordQuery:
    """Search over one index of a dataset; replaced when another index is assigned."""

    def __init__(self, index: gpd.GeoDataFrame, scenes: SceneTable, rule: QuerySpec) -> None:
        self.index = index
        self._crs = crs_text(index.crs)
        self._scenes = scenes
        self._rule = rule
        self._search = SceneSearch(index, scenes, full_turn(self._crs), rule.order)

    def rows(self, grid: Grid, t: slice) -> Integers:
        """Return the rows of the Collection that overlap a chip in space and time, best first."""
        rows = self._search.rows(_outline(grid, self._crs), t)
        return rows[self._on_lattice(rows, grid)] if self._rule.native else rows

    def dates(self, grid: Grid, query: Any, t: slice) -> list[Integers]:
        """Return the rows of each date, ascending; without a series, one list of all rows.

        Raises:
            NoOverlapError: no record, or fewer dates than required.
        """
        rows = self.rows(grid, t)
        if not len(rows):
            raise NoOverlapError(self._no_record_message(grid, t))
        if self._rule.series is None:
            return [rows]
        at = self._positions(rows)
        draw = (query.seed, query.epoch, query.position) if isinstance(query, AOI) else (0, 0, 0)
        groups = choose_dates(self._rule.series, self._scenes.times[at], self._scenes.clouds[at], draw)
        return [rows[group] for group in groups]

    def _no_record_message(self, grid: Grid, t: slice) -> str:
        where = tuple(round(v, 6) for v in grid.bounds)
        if not len(self.index):
            return f"No record at x, y = {where} ({grid.crs}): the dataset's index is empty."
        if self._rule.native and len(self._search.rows(_outline(grid, self._crs), t)):
            return (
                f"The records at x, y = {where} ({grid.crs}) have other pixels than this chip, and grid='native' "
                "does not resample; use grid='common' for this dataset, or put it on the left."
            )
        span = tuple(round(float(v), 6) for v in self.index.total_bounds)
        return (
            f"No record at x, y = {where} ({grid.crs}) between {t.start} and {t.stop}; the dataset spans {span} "
            f"({self._crs})."
        )

    def seconds(self, dates: Sequence[Integers]) -> tuple[float, ...]:
        """Return the first instant of each date, POSIX seconds UTC."""
        times = [self._scenes.times[self._positions(rows)].astype("datetime64[ns]").astype(np.int64) for rows in dates]
        return tuple(float(np.min(stamps)) / 1e9 for stamps in times)

    def native_grid(self, slices: tuple[slice, slice, slice], crs: str, res: tuple[float, float]) -> Grid:
        """Return the chip's grid on the best record's own pixels: the requested size, centred at the nearest pixel.

        The best record is the first that holds the chip's centre, of those with the query's CRS and pixel size if there
        are any; if none holds it, the first that intersects the chip. A chip that would miss its record by rounding is
        moved onto its edge.

        Args:
            slices: (x, y, t) in `crs`.
            crs: CRS of the query.
            res: Pixel size, for slices without one.

        Raises:
            NoOverlapError: no record at this place and time.
        """
        x, y, t = slices
        rows = self._search.rows(_moved(shapely.box(x.start, y.start, x.stop, y.stop), crs, self._crs), t)
        if not len(rows):
            raise NoOverlapError(f"No record at x = {x.start} to {x.stop}, y = {y.start} to {y.stop} ({crs}).")
        at = self._similar(self._positions(rows), crs, (x.step, y.step))
        middle = (x.start + x.stop) / 2, (y.start + y.stop) / 2
        places = [(self._scenes.grid(int(i)), i) for i in at]
        pixels = [(grid, _pixel_of(grid, middle, crs)) for grid, _ in places]
        grid, (col, row) = next(
            (p for p in pixels if 0 <= p[1][0] < p[0].width and 0 <= p[1][1] < p[0].height), pixels[0]
        )
        height = max(1, round_half_up((y.stop - y.start) / (y.step or res[1])))
        width = max(1, round_half_up((x.stop - x.start) / (x.step or res[0])))
        first_row = min(max(round_half_up(row - height / 2), 1 - height), grid.height - 1)
        first_col = round_half_up(col - width / 2)
        if grid.turn is None:
            first_col = min(max(first_col, 1 - width), grid.width - 1)
        return grid.window(Window(row=first_row, col=first_col, height=height, width=width))

    def _similar(self, at: Integers, crs: str, steps: tuple[float | None, float | None]) -> Integers:
        """Return the records that qualify for the series, narrowed to a CRS and a pixel size if any have them."""
        scenes, series = self._scenes, self._rule.series
        fits = np.ones(len(at), bool) if series is None else fits_series(series, scenes.times[at], scenes.clouds[at])
        own = np.array([same_crs(text, crs) for text in scenes.crs_texts])[scenes.crs_codes[at]]
        sizes = pixel_sizes(scenes.transforms[at])
        near = np.ones(len(at), bool)
        for i, step in enumerate(steps):
            if step is not None:
                near &= abs(sizes[:, i] - step) <= 1e-6 * step
        for chosen in (fits & own & near, fits & own, fits, own & near, own):
            if chosen.any():
                return at[chosen]
        return at

    def _positions(self, rows: Integers) -> Integers:
        return np.searchsorted(self._scenes.rows, rows)

    def _on_lattice(self, rows: Integers, grid: Grid) -> npt.NDArray[np.bool_]:
        """Return which records' pixels coincide with a chip's (`Grid.window_of`, vectorized)."""
        at, scenes = self._positions(rows), self._scenes
        same = np.array([same_crs(text, grid.crs) for text in scenes.crs_texts])[scenes.crs_codes[at]]
        a, b, c, d, e, f = (float(v) for v in tuple(grid.transform)[:6])
        own, det = scenes.transforms[at], a * e - b * d
        dx, dy = own[:, 2] - c, own[:, 5] - f
        steps = np.stack([(e * dx - b * dy) / det, (a * dy - d * dx) / det], axis=1)
        reach = max(grid.shape)
        drift = np.abs(own[:, [0, 1, 3, 4]] - (a, b, d, e)).max(axis=1) * reach / min(grid.res)
        off = np.abs(steps - np.rint(steps)).max(axis=1)
        return np.asarray(same & (np.maximum(off, drift) <= ALIGNMENT_TOLERANCE))


def _outline(grid: Grid, crs: str) -> shapely.Polygon:
    return grid.footprint if same_crs(grid.crs, crs) else _moved(grid.footprint, str(grid.crs), crs)


def _moved(shape: shapely.Geometry, source: str, target: str) -> Any:
    if same_crs(source, target):
        return shape
    return transform_geometries(np.array([shape], dtype=object), source, target)[0]


def _pixel_of(grid: Grid, point: tuple[float, float], crs: str) -> tuple[float, float]:
    """Return the column and row of a point."""
    x, y = np.array([point[0]]), np.array([point[1]])
    if not same_crs(crs, grid.crs):
        x, y = transform_points(x, y, crs, str(grid.crs or LONLAT))
    col, row = grid.to_pixels(x, y)
    return float(col[0]), float(row[0])
