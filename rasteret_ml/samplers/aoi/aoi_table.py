"""AOI tables: geometries with identity, labels, weights and times, from whatever table people have."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.geo.geometries import are_finite, geometries_from, unpack_geometries
from rasteret_ml.geo.regions import polygonal_each
from rasteret_ml.samplers.aoi.aoi_columns import class_labels, column_of, named_rows, time_windows, weight_column

__all__ = ["AOITable"]

Geometries = npt.NDArray[np.object_]
Rows = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AOITable:
    """Geometries to take chips from, and what is known of each. Make one with `AOITable.of`."""

    geometries: Geometries
    """Valid shapely geometries `[N]`, none empty; points and lines as well as polygons."""
    crs: str
    """CRS text of their coordinates."""
    rows: Rows
    """Row of each in the source table, from 0: its identity, which dropping others does not change `[N]`."""
    labels: npt.NDArray[np.int64] | npt.NDArray[np.float64] | None
    """Class of each (int64) or value (float64) `[N]`; None = no labels."""
    classes: tuple[Any, ...]
    """Value in the source of each class, by its number; () where labels are values, or there are none."""
    weights: npt.NDArray[np.float64] | None
    """How often each is drawn, in proportion, not negative `[N]`; None = by area."""
    start: npt.NDArray[np.datetime64] | None
    """First instant of each one's time window, UTC, NaT = open `[N]`; None = no windows."""
    stop: npt.NDArray[np.datetime64] | None
    """Last instant of each one's time window, inclusive, UTC, NaT = open `[N]`; None = no windows."""
    table: gpd.GeoDataFrame
    """The whole source table, as it came; `rows` point into it."""

    @classmethod
    def of(
        cls,
        source: Any,
        *,
        crs: Any = None,
        label: str | Sequence[Any] | None = None,
        classes: Sequence[Any] | Mapping[Any, int] | None = None,
        weight: str | Sequence[float] | None = None,
        time: str | tuple[str, str] | None = None,
        invalid: Literal["repair", "drop", "raise"] = "repair",
        empty: Literal["raise", "drop"] = "raise",
    ) -> AOITable:
        """Read a table.

        Args:
            source: A GeoDataFrame, a path to GeoParquet, GeoJSON or another vector file, an Arrow or DuckDB stream,
                a list of shapely geometries … (see `geometries_from`). An `AOITable` is returned as it is.
            crs: CRS of the coordinates where the source does not say it; default longitude/latitude.
            label: Column (or values `[N]`) that becomes each sample's `label`. Text, whole numbers, booleans and
                categories become classes; floats stay values, for regression, unless `classes` is given.
            classes: The values in the order of their class numbers, or a mapping from value to class number. Give
                the same for training and validation. Default the sorted distinct values (categories: all of them).
            weight: Column (or values `[N]`) of how often each AOI is drawn, in proportion.
            time: Column of instants or of ISO intervals ("2023-05-01/2023-08-31", ".." for an open end), or a pair
                of columns (first, last). Text that names a day, month or year means all of it; missing = open.
            invalid: Polygons that are not valid: "repair" (their area is kept), "drop" (logged) or "raise". What has
                coordinates that are no numbers cannot be repaired.
            empty: Missing geometries, and polygons of no area: "raise" or "drop" (logged).

        Raises:
            GeometryError: nothing readable, or invalid or empty geometries that were not to be dropped; rows are named.
            UsageError: a column that is not there, a label that is missing or in no class, a negative weight, a
                window that ends before it starts; rows are named.
        """
        if isinstance(source, AOITable):
            given = {"label": label, "classes": classes, "weight": weight, "time": time}
            return _unchanged(source, crs, [name for name, value in given.items() if value is not None])
        if invalid not in ("repair", "drop", "raise") or empty not in ("raise", "drop"):
            raise UsageError(
                f"invalid is 'repair', 'drop' or 'raise', empty 'raise' or 'drop'; not {invalid!r}, {empty!r}."
            )
        if classes is not None and label is None:
            raise UsageError("classes= says how a label is numbered; give label= as well.")
        values, own_crs, table = unpack_geometries(source)
        rows = _with_numbers(values, _with_geometry(values, empty), invalid)
        found = geometries_from(gpd.GeoSeries(list(values[rows]), crs=own_crs), crs)
        shapes, kept = _valid(found.geometries, rows, invalid, empty)
        if table is None:
            table = gpd.GeoDataFrame(geometry=list(values), crs=found.crs)
        rows = rows[kept]
        labels, names = (None, ()) if label is None else class_labels(table, rows, label, classes)
        start, stop = (None, None) if time is None else time_windows(table, rows, time)
        weights = None if weight is None else weight_column(table, rows, weight)
        for array in (shapes := shapes[kept], rows, labels, weights, start, stop):
            if array is not None:
                array.setflags(write=False)
        return cls(
            geometries=shapes,
            crs=found.crs,
            rows=rows,
            labels=labels,
            classes=names,
            weights=weights,
            start=start,
            stop=stop,
            table=table,
        )

    def __len__(self) -> int:
        return len(self.geometries)

    def __repr__(self) -> str:
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"AOITable({len(self)} of {len(self.table)} rows, {self.crs}{classes})"

    @property
    def attributes(self) -> gpd.GeoDataFrame:
        """The source table's rows that are in this one, in its order."""
        return self.table.iloc[self.rows]

    def row(self, aoi: Any) -> pd.Series:
        """The attributes of an AOI (what a sampler yields, a sample's `aoi`, or a row number) in the source table.

        Raises:
            UsageError: the AOI is from no table, or the table has no such row.
        """
        number = int(getattr(aoi, "row", aoi))
        if not 0 <= number < len(self.table):
            raise UsageError(f"There is no row {number} in a table of {len(self.table)}.")
        return self.table.iloc[number]

    def where(self, chosen: Any) -> AOITable:
        """Some of the AOIs; they keep their rows, and the table its classes.

        Args:
            chosen: A boolean mask `[N]`, or rows of the source table.

        Raises:
            UsageError: a mask of another length, a row that is not in this table, or nothing chosen.
        """
        wanted = np.asarray(chosen)
        if wanted.dtype == bool:
            if wanted.shape != (len(self),):
                raise UsageError(f"A mask of {wanted.shape} does not fit a table of {len(self)} AOIs.")
            at = np.flatnonzero(wanted)
        else:
            at = self._positions(wanted)
        if not len(at):
            raise UsageError("No AOI is chosen.")
        names = ("geometries", "rows", "labels", "weights", "start", "stop")
        parts: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[at] for name in names
        }
        for part in parts.values():
            if part is not None:
                part.setflags(write=False)
        return replace(self, **parts)

    def _positions(self, wanted: npt.NDArray[Any]) -> Rows:
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise UsageError("where() takes a boolean mask, or a list of rows of the source table.")
        order = np.argsort(self.rows, kind="stable")
        at: Rows = order[np.searchsorted(self.rows, wanted, sorter=order).clip(max=len(self) - 1)]
        absent = self.rows[at] != wanted
        if absent.any():
            raise UsageError(f"These rows are not in the table: {named_rows(wanted[absent])}.")
        return at

    def column(self, values: Any, what: str) -> pd.Series:
        """Values of each AOI `[N]`: a column of the source, an array, or what a callable makes of `attributes`.

        Raises:
            UsageError: no such column, or another length.
        """
        if callable(values):
            values = values(self.attributes)
        if isinstance(values, str):
            return column_of(self.table, self.rows, values, what)
        series = pd.Series(values).reset_index(drop=True)
        if len(series) != len(self):
            raise UsageError(f"{what} has {len(series)} values for {len(self)} AOIs.")
        return series


def _unchanged(table: AOITable, crs: Any, given: list[str]) -> AOITable:
    if given:
        raise UsageError(f"This is an AOITable already; say {', '.join(given)} where it is made.")
    if crs is not None and crs_text(crs) != table.crs:
        raise GeometryError(f"The AOI table is in {table.crs}, but {crs_text(crs)} was given; drop one of them.")
    return table


def _with_geometry(values: Geometries, empty: str) -> Rows:
    """Rows that have a geometry."""
    bare = shapely.is_missing(values) | shapely.is_empty(values)
    if bare.any():
        rows = named_rows(np.flatnonzero(bare))
        if empty == "raise":
            raise GeometryError(f"AOIs {rows} have no geometry, or an empty one; drop them, or say empty='drop'.")
        _log.warning("%d AOIs have no geometry and are dropped: %s", bare.sum(), rows)
    return np.flatnonzero(~bare)


def _with_numbers(values: Geometries, rows: Rows, invalid: str) -> Rows:
    """Those of the rows whose coordinates are finite."""
    finite = are_finite(values[rows])
    if not finite.all():
        named = named_rows(rows[~finite])
        if invalid != "drop":
            raise GeometryError(
                f"AOIs {named} have coordinates that are NaN or infinite; mend them, or say invalid='drop'."
            )
        _log.warning("%d AOIs have coordinates that are no numbers and are dropped: %s", (~finite).sum(), named)
    return rows[finite]


def _valid(shapes: Geometries, rows: Rows, invalid: str, empty: str) -> tuple[Geometries, npt.NDArray[np.bool_]]:
    """Geometries made valid, and which of them are kept."""
    kept = np.ones(len(shapes), bool)
    wrong = ~shapely.is_valid(shapes)
    areal = np.isin(shapely.get_type_id(shapes), (3, 6))
    if wrong.any():
        named = named_rows(rows[wrong])
        if invalid == "raise":
            first = shapely.is_valid_reason(shapes[np.argmax(wrong)])
            raise GeometryError(f"AOIs {named} are not valid ({first}); mend them, or say invalid='repair' or 'drop'.")
        if invalid == "drop":
            kept &= ~wrong
            _log.warning("%d AOIs are not valid and are dropped: %s", wrong.sum(), named)
        else:
            shapes = shapes.copy()
            shapes[wrong & areal] = polygonal_each(shapes[wrong & areal])
            shapes[wrong & ~areal] = shapely.make_valid(shapes[wrong & ~areal])
            _log.warning("%d AOIs were not valid and are repaired: %s", wrong.sum(), named)
    flat = kept & areal & ~(shapely.area(shapes) > 0)
    if flat.any():
        named = named_rows(rows[flat])
        if empty == "raise":
            raise GeometryError(f"AOIs {named} are polygons without an area; drop them, or say empty='drop'.")
        _log.warning("%d AOIs have no area and are dropped: %s", flat.sum(), named)
    if not (kept & ~flat).any():
        raise GeometryError("None of the AOIs is left: all are invalid or have no area.")
    return shapes, kept & ~flat
