"""From a query to the records that its chip is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.datasets.index.dates import TimeSeries, choose_dates, fitting
from rasteret_ml.datasets.index.scene_table import SceneTable, pixel_sizes
from rasteret_ml.datasets.index.search import Lookup
from rasteret_ml.errors import NoOverlapError
from rasteret_ml.geo.crs import LONLAT, crs_text, full_turn, same_crs, transform_geometries, transform_points
from rasteret_ml.geo.grid import ALIGNMENT_TOLERANCE, Grid, round_half_up
from rasteret_ml.geo.window import Window
from rasteret_ml.samplers.aoi.aoi import AOI

__all__ = ["QuerySpec", "RecordQuery"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuerySpec:
    """How a dataset's records are found."""

    order: str | pd.Timestamp
    """Which come first."""
    series: TimeSeries | None
    """How dates are chosen; None = all records of a query are one chip."""
    native: bool
    """Whether only records on the chip's own pixels count."""


class RecordQuery:
    """Search over one index of a dataset; made anew when TorchGeo's splitters assign another."""

    def __init__(self, index: gpd.GeoDataFrame, facts: SceneTable, rule: QuerySpec) -> None:
        self.index = index
        self._crs = crs_text(index.crs)
        self._facts = facts
        self._rule = rule
        self._lookup = Lookup(index, facts, full_turn(self._crs), rule.order)

    def rows(self, grid: Grid, t: slice) -> Integers:
        """Rows of the Collection that overlap a chip in space (with an area) and the times, best first."""
        rows = self._lookup.rows(_outline(grid, self._crs), t)
        return rows[self._on_lattice(rows, grid)] if self._rule.native else rows

    def dates(self, grid: Grid, query: Any, t: slice) -> list[Integers]:
        """The same, a list a date in ascending order; one list where there are no dates to tell apart.

        Raises:
            NoOverlapError: no record, or fewer dates than there must be.
        """
        rows = self.rows(grid, t)
        if not len(rows):
            raise NoOverlapError(self._nothing_at(grid, t))
        if self._rule.series is None:
            return [rows]
        at = self._positions(rows)
        draw = (query.seed, query.epoch, query.position) if isinstance(query, AOI) else (0, 0, 0)
        groups = choose_dates(self._rule.series, self._facts.times[at], self._facts.clouds[at], draw)
        return [rows[group] for group in groups]

    def _nothing_at(self, grid: Grid, t: slice) -> str:
        where = tuple(round(v, 6) for v in grid.bounds)
        if not len(self.index):
            return f"No record at x, y = {where} ({grid.crs}): the dataset's index is empty."
        if self._rule.native and len(self._lookup.rows(_outline(grid, self._crs), t)):
            return (
                f"The records at x, y = {where} ({grid.crs}) lie on other pixels than this chip, and grid='native' "
                "resamples nothing; give this dataset a common grid, or put it on the left."
            )
        span = tuple(round(float(v), 6) for v in self.index.total_bounds)
        return (
            f"No record at x, y = {where} ({grid.crs}) between {t.start} and {t.stop}; the dataset spans {span} "
            f"({self._crs})."
        )

    def seconds(self, dates: Sequence[Integers]) -> tuple[float, ...]:
        """Time of each date: its first instant, POSIX seconds UTC."""
        times = [self._facts.times[self._positions(rows)].astype("datetime64[ns]").astype(np.int64) for rows in dates]
        return tuple(float(np.min(stamps)) / 1e9 for stamps in times)

    def native_grid(self, slices: tuple[slice, slice, slice], crs: str, res: tuple[float, float]) -> Grid:
        """The chip on its best record's own grid: as many pixels as asked for, about the same centre.

        The best record is the first, of those with the query's CRS and pixel size where there are any, that holds the
        chip's centre; where none does, the first that meets it. A chip that would miss its record by a rounding is
        moved onto its edge.

        Args:
            slices: (x, y, t) in `crs`.
            crs: CRS of the query.
            res: Pixel size of slices that do not say it.

        Raises:
            NoOverlapError: no record there.
        """
        x, y, t = slices
        rows = self._lookup.rows(_moved(shapely.box(x.start, y.start, x.stop, y.stop), crs, self._crs), t)
        if not len(rows):
            raise NoOverlapError(f"No record at x = {x.start} to {x.stop}, y = {y.start} to {y.stop} ({crs}).")
        at = self._alike(self._positions(rows), crs, (x.step, y.step))
        middle = (x.start + x.stop) / 2, (y.start + y.stop) / 2
        places = [(self._facts.grid(int(i)), i) for i in at]
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

    def _alike(self, at: Integers, crs: str, steps: tuple[float | None, float | None]) -> Integers:
        """The records that fit the series, narrowed to those of a CRS and a pixel size where any are."""
        facts, series = self._facts, self._rule.series
        fits = np.ones(len(at), bool) if series is None else fitting(series, facts.times[at], facts.clouds[at])
        own = np.array([same_crs(text, crs) for text in facts.crs_texts])[facts.crs_codes[at]]
        sizes = pixel_sizes(facts.transforms[at])
        near = np.ones(len(at), bool)
        for i, step in enumerate(steps):
            if step is not None:
                near &= abs(sizes[:, i] - step) <= 1e-6 * step
        for chosen in (fits & own & near, fits & own, fits, own & near, own):
            if chosen.any():
                return at[chosen]
        return at

    def _positions(self, rows: Integers) -> Integers:
        return np.searchsorted(self._facts.rows, rows)

    def _on_lattice(self, rows: Integers, grid: Grid) -> npt.NDArray[np.bool_]:
        """Which records' pixels coincide with a chip's (`Grid.window_of`, for many)."""
        at, facts = self._positions(rows), self._facts
        same = np.array([same_crs(text, grid.crs) for text in facts.crs_texts])[facts.crs_codes[at]]
        a, b, c, d, e, f = (float(v) for v in tuple(grid.transform)[:6])
        own, det = facts.transforms[at], a * e - b * d
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
    """Column and row of a point."""
    x, y = np.array([point[0]]), np.array([point[1]])
    if not same_crs(crs, grid.crs):
        x, y = transform_points(x, y, crs, str(grid.crs or LONLAT))
    col, row = grid.to_pixels(x, y)
    return float(col[0]), float(row[0])
