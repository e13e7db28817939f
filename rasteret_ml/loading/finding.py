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

from rasteret_ml.errors import NoOverlapError
from rasteret_ml.geo.crs import LONLAT, crs_text, full_turn, same_crs, transform_geometries, transform_points
from rasteret_ml.geo.grid import ALIGNMENT_TOLERANCE, Grid, round_half_up
from rasteret_ml.geo.window import Window
from rasteret_ml.sampling.aoi import AOI
from rasteret_ml.scenes.dates import TimeSeries, choose_dates
from rasteret_ml.scenes.facts import SceneFacts
from rasteret_ml.scenes.lookup import Lookup

__all__ = ["Finder", "FindingRule"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FindingRule:
    """How a dataset's records are found."""

    order: str | pd.Timestamp
    """Which come first."""
    series: TimeSeries | None
    """How dates are chosen; None = all records of a query are one chip."""
    native: bool
    """Whether only records on the chip's own pixels count."""


class Finder:
    """Search over one index of a dataset; made anew when TorchGeo's splitters assign another."""

    def __init__(self, index: gpd.GeoDataFrame, facts: SceneFacts, rule: FindingRule) -> None:
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
            where = tuple(round(v, 6) for v in grid.bounds)
            span = tuple(round(float(v), 6) for v in self.index.total_bounds)
            raise NoOverlapError(
                f"No record at x, y = {where} ({grid.crs}) between {t.start} and {t.stop}; the dataset spans {span} "
                f"({self._crs})."
            )
        if self._rule.series is None:
            return [rows]
        at = self._positions(rows)
        draw = (query.seed, query.epoch, query.position) if isinstance(query, AOI) else (0, 0, 0)
        groups = choose_dates(self._rule.series, self._facts.times[at], self._facts.clouds[at], draw)
        return [rows[group] for group in groups]

    def seconds(self, dates: Sequence[Integers]) -> tuple[float, ...]:
        """Time of each date: its first instant, POSIX seconds UTC."""
        times = [self._facts.times[self._positions(rows)].astype("datetime64[ns]").astype(np.int64) for rows in dates]
        return tuple(float(np.min(stamps)) / 1e9 for stamps in times)

    def native_grid(self, slices: tuple[slice, slice, slice], crs: str, res: tuple[float, float]) -> Grid:
        """The chip on its best record's own grid: as many pixels as asked for, about the same centre.

        The best record is the first, of those in the query's CRS where there are any, that holds the chip's centre;
        where none does, the first that meets it.

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
        at = self._positions(rows)
        own = np.array([same_crs(text, crs) for text in self._facts.crs_texts])[self._facts.crs_codes[at]]
        at = at[own] if own.any() else at
        middle = (x.start + x.stop) / 2, (y.start + y.stop) / 2
        places = [(self._facts.grid(int(i)), i) for i in at]
        pixels = [(grid, _pixel_of(grid, middle, crs)) for grid, _ in places]
        grid, (col, row) = next(
            (p for p in pixels if 0 <= p[1][0] < p[0].width and 0 <= p[1][1] < p[0].height), pixels[0]
        )
        height = max(1, round_half_up((y.stop - y.start) / (y.step or res[1])))
        width = max(1, round_half_up((x.stop - x.start) / (x.step or res[0])))
        first_row, first_col = round_half_up(row - height / 2), round_half_up(col - width / 2)
        return grid.window(Window(row=first_row, col=first_col, height=height, width=width))

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
