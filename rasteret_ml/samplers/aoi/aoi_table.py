"""AOI tables: geometries with identity, labels, weights and time windows, read from any vector source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
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
from rasteret_ml.geo.regions import Floats, Geometries, Integers, Mask, polygonal_each
from rasteret_ml.geo.times import Times, parse_windows

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AOITable:
    """Geometries to draw chips from, with their attributes. Create one with `AOITable.of`.

    Example:
        >>> fields = AOITable.of("fields.parquet", label="crop", weight="hectares", time=("sown", "harvest"))
        >>> sampler = RandomAOISampler(dataset, 128, 1000, aois=fields, balance=True)
    """

    geometries: Geometries  #: Valid, non-empty shapely geometries `[N]`: polygons, lines or points.
    crs: str  #: CRS text of their coordinates.
    #: Row of each AOI in the source table, from 0. It identifies the AOI, even after others are dropped `[N]`.
    rows: Integers
    #: Class (int64) or value (float64) of each AOI `[N]`; None = no labels.
    labels: Integers | Floats | None
    classes: tuple[Any, ...]  #: Source value of each class, by class number; () if labels are values or missing.
    weights: Floats | None  #: Relative frequency of each AOI, >= 0 `[N]`; None = by area.
    start: Times | None  #: First instant of each AOI's time window, UTC, NaT = open `[N]`; None = no windows.
    stop: Times | None  #: Last instant of each AOI's time window, inclusive, UTC, NaT = open `[N]`; None = no windows.
    table: gpd.GeoDataFrame  #: The unmodified source table, which `rows` index.

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
        """Read a table of AOIs.

        Args:
            source: A GeoDataFrame, a path to GeoParquet, GeoJSON or another vector file, an Arrow or DuckDB stream,
                a list of shapely geometries … (see `geometries_from`). An `AOITable` is returned unchanged.
            crs: CRS of the coordinates if the source does not state it; default longitude/latitude.
            label: Column (or values `[N]`) that becomes each sample's `label`. Text, integers, booleans and
                categories become classes; floats stay values, for regression, unless `classes` is given.
            classes: Values in the order of their class numbers, or a mapping from value to class number. Pass the
                same for training and validation. Default: the sorted distinct values (categories: all of them).
            weight: Column (or values `[N]`) with the relative frequency of each AOI.
            time: Column of instants or of ISO intervals ("2023-05-01/2023-08-31", ".." for an open end), or a pair
                of columns (first, last). Text that names a day, month or year covers all of it; missing = open.
            invalid: What to do with invalid polygons: "repair" (keeps their area), "drop" (logged) or "raise".
                Coordinates that are NaN or infinite cannot be repaired.
            empty: What to do with missing geometries and polygons without area: "raise" or "drop" (logged).

        Raises:
            GeometryError: if the source cannot be read, or has invalid or empty geometries that may not be dropped.
            UsageError: if a column does not exist, a label is missing or in no class, a weight is negative, or a
                window ends before it starts. Messages list the rows.
        """
        if isinstance(source, AOITable):
            options = {"label": label, "classes": classes, "weight": weight, "time": time}
            return _existing(source, crs, [name for name, value in options.items() if value is not None])
        if invalid not in ("repair", "drop", "raise"):
            raise UsageError(f"invalid must be 'repair', 'drop' or 'raise', got {invalid!r}.")
        if empty not in ("raise", "drop"):
            raise UsageError(f"empty must be 'raise' or 'drop', got {empty!r}.")
        if classes is not None and label is None:
            raise UsageError("classes= needs label=, the column whose values it numbers.")
        values, source_crs, table = unpack_geometries(source)
        rows = _usable_rows(values, invalid, empty)
        found = geometries_from(gpd.GeoSeries(list(values[rows]), crs=source_crs), crs)
        geometries, kept = _repair(found.geometries, rows, invalid, empty)
        if table is None:
            table = gpd.GeoDataFrame(geometry=list(values), crs=found.crs)
        rows = rows[kept]
        labels, names = (None, ()) if label is None else _class_labels(table, rows, label, classes)
        start = stop = None
        if time is not None:
            start, stop = time_windows(
                time, lambda name: _select(table, rows, name, "time"), lambda at: f"AOIs {format_rows(rows[at])}"
            )
        arrays = {
            "geometries": geometries[kept],
            "rows": rows,
            "labels": labels,
            "weights": None if weight is None else parse_weights(_select(table, rows, weight, "weight"), rows),
            "start": start,
            "stop": stop,
        }
        return cls(**_read_only(arrays), crs=found.crs, classes=names, table=table)

    def __len__(self) -> int:
        return len(self.geometries)

    def __repr__(self) -> str:
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"AOITable({len(self)} of {len(self.table)} rows, {self.crs}{classes})"

    @property
    def attributes(self) -> gpd.GeoDataFrame:
        """Rows of the source table that are in this one, in its order."""
        return self.table.iloc[self.rows]

    def row(self, aoi: Any) -> pd.Series:
        """Return the source row of an AOI (what a sampler yields, a sample's `aoi`, or a row number).

        Raises:
            UsageError: if the AOI comes from no table, or the table has no such row.
        """
        number = int(getattr(aoi, "row", aoi))
        if not 0 <= number < len(self.table):
            raise UsageError(
                f"row must be between 0 and {len(self.table) - 1}, got {number}: the table has no row for it."
            )
        return self.table.iloc[number]

    def where(self, selection: Any) -> AOITable:
        """Select AOIs; they keep their row numbers, and the table its classes.

        Args:
            selection: A boolean mask `[N]`, or rows of the source table.

        Raises:
            UsageError: if a mask has another length, a row is not in this table, or nothing is selected.
        """
        selected = np.asarray(selection)
        if selected.dtype == bool:
            if selected.shape != (len(self),):
                raise UsageError(f"The mask must have shape ({len(self)},), got {selected.shape}.")
            index = np.flatnonzero(selected)
        else:
            index = self._positions(selected)
        if not len(index):
            raise UsageError("The selection is empty: no AOI is left.")
        arrays = {name: getattr(self, name) for name in ("geometries", "rows", "labels", "weights", "start", "stop")}
        return replace(self, **_read_only({n: None if a is None else a[index] for n, a in arrays.items()}))

    def _positions(self, rows: npt.NDArray[Any]) -> Integers:
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise UsageError(f"where() takes a boolean mask or a list of source rows, got {rows.dtype} {rows.shape}.")
        order = np.argsort(self.rows, kind="stable")
        index: Integers = order[np.searchsorted(self.rows, rows, sorter=order).clip(max=len(self) - 1)]
        missing = self.rows[index] != rows
        if missing.any():
            raise UsageError(f"These rows are not in the table: {format_rows(rows[missing])}.")
        return index

    def column(self, values: Any, argument: str) -> pd.Series:
        """Return a value for each AOI `[N]`: a source column, an array, or a callable's result for `attributes`.

        Raises:
            UsageError: if the column does not exist, or the length differs.
        """
        if callable(values):
            values = values(self.attributes)
        if isinstance(values, str):
            return _select(self.table, self.rows, values, argument)
        series = pd.Series(values).reset_index(drop=True)
        if len(series) != len(self):
            raise UsageError(f"{argument} has {len(series)} values for {len(self)} AOIs.")
        return series


def _read_only(arrays: dict[str, Any]) -> dict[str, Any]:
    for array in arrays.values():
        if array is not None:
            array.setflags(write=False)
    return arrays


def _existing(table: AOITable, crs: Any, options: list[str]) -> AOITable:
    if options:
        raise UsageError(f"This is already an AOITable; pass {', '.join(options)} where it is created.")
    if crs is not None and crs_text(crs) != table.crs:
        raise GeometryError(f"The AOI table is in {table.crs}, but {crs_text(crs)} was given; drop one of them.")
    return table


# Geometries -----------------------------------------------------------------------------------------------


def is_polygon(geometries: Geometries) -> Mask:
    """Return which geometries are Polygons or MultiPolygons `[N]`."""
    return np.isin(shapely.get_type_id(geometries), (3, 6))


def _usable_rows(values: Geometries, invalid: str, empty: str) -> Integers:
    """Rows that have a geometry with finite coordinates."""
    missing = shapely.is_missing(values) | shapely.is_empty(values)
    rows = np.flatnonzero(missing)
    _drop_or_raise(rows, empty == "drop", "have no geometry, or an empty one", "drop them, or pass empty='drop'")
    rows = np.flatnonzero(~missing)
    finite = are_finite(values[rows])
    remedy = "correct them, or pass invalid='drop'"
    _drop_or_raise(rows[~finite], invalid == "drop", "have coordinates that are NaN or infinite", remedy)
    return rows[finite]


def _repair(geometries: Geometries, rows: Integers, invalid: str, empty: str) -> tuple[Geometries, Mask]:
    """Valid geometries `[N]`, and which of them to keep `[N]`."""
    kept = np.ones(len(geometries), bool)
    broken, polygons = ~shapely.is_valid(geometries), is_polygon(geometries)
    if broken.any() and invalid == "repair":
        geometries = geometries.copy()
        geometries[broken & polygons] = polygonal_each(geometries[broken & polygons])
        geometries[broken & ~polygons] = shapely.make_valid(geometries[broken & ~polygons])
        _log.warning("Repaired %d invalid AOIs: %s", broken.sum(), format_rows(rows[broken]))
    elif broken.any():
        problem = f"are not valid ({shapely.is_valid_reason(geometries[np.argmax(broken)])})"
        remedy = "correct them, or pass invalid='repair' or 'drop'"
        _drop_or_raise(rows[broken], invalid == "drop", problem, remedy)
        kept = ~broken
    flat = kept & polygons & ~(shapely.area(geometries) > 0)
    _drop_or_raise(rows[flat], empty == "drop", "are polygons without an area", "drop them, or pass empty='drop'")
    if not (kept & ~flat).any():
        raise GeometryError("None of the AOIs can be used: all are invalid or have no area.")
    return geometries, kept & ~flat


def _drop_or_raise(rows: Integers, drop: bool, problem: str, remedy: str) -> None:
    if not len(rows):
        return
    if not drop:
        raise GeometryError(f"AOIs {format_rows(rows)} {problem}; {remedy}.")
    _log.warning("Dropping %d AOIs that %s: %s", len(rows), problem, format_rows(rows))


# Columns --------------------------------------------------------------------------------------------------


def format_rows(rows: npt.NDArray[Any]) -> str:
    """Format row numbers for a message: the first ten, and the total if there are more."""
    listed = [int(row) for row in rows[:10]]
    return str(listed) if len(rows) <= 10 else f"{listed} ({len(rows)} in all)"


def get_column(table: pd.DataFrame, name: str, argument: str) -> pd.Series:
    """Return a column by its name; raises UsageError if none or several have this name."""
    if name not in table.columns:
        raise UsageError(f"{argument}={name!r}: the table has no such column; it has {list(table.columns)}.")
    column = table[name]
    if isinstance(column, pd.DataFrame):
        raise UsageError(
            f"{argument}={name!r}: the table has {column.shape[1]} columns of this name; rename them first."
        )
    return column


def _select(table: gpd.GeoDataFrame, rows: Integers, values: Any, argument: str) -> pd.Series:
    """A column, or values for all source rows, at `rows` and renumbered from 0."""
    if isinstance(values, str):
        return get_column(table, values, argument).iloc[rows].reset_index(drop=True)
    series = pd.Series(values)
    if len(series) != len(table):
        raise UsageError(f"{argument} has {len(series)} values for a table of {len(table)} rows.")
    return series.iloc[rows].reset_index(drop=True)


def _class_labels(
    table: gpd.GeoDataFrame, rows: Integers, label: Any, classes: Sequence[Any] | Mapping[Any, int] | None
) -> tuple[Integers | Floats, tuple[Any, ...]]:
    """Class numbers (int64) and the value of each class, or values (float64) and ()."""
    column = _select(table, rows, label, "label")
    name = f"table[{label!r}]" if isinstance(label, str) else "pandas.Series(label)"
    if column.isna().any():
        raise UsageError(
            f"AOIs {format_rows(rows[column.isna().to_numpy()])} have no label; fill them in, or drop these rows "
            f"first: table[{name}.notna()]."
        )
    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        if classes is None:
            return column.cat.codes.to_numpy(np.int64, copy=True), tuple(dtype.categories.tolist())
        column = column.astype(object)
    if classes is None and pd.api.types.is_float_dtype(dtype):
        return column.to_numpy(np.float64, copy=True), ()
    if pd.api.types.is_datetime64_any_dtype(dtype):
        raise UsageError(f"label must be a class or a number, not a time, got {dtype}.")
    numbers = number_classes(column, classes)
    if min(numbers.values(), default=0) < 0:
        raise UsageError(f"classes must be numbered from 0, got {numbers}.")
    labels = column.map(numbers)
    unknown = labels.isna().to_numpy()
    if unknown.any():
        values = list(dict.fromkeys(column[unknown].tolist()))[:5]
        raise UsageError(
            f"AOIs {format_rows(rows[unknown])} have labels that are in no class: {values}; add them to classes=, or "
            f"drop these rows first: table[{name}.isin(classes)]."
        )
    first = {number: value for value, number in reversed(numbers.items())}
    return labels.to_numpy(np.int64), tuple(first.get(number) for number in range(max(first, default=-1) + 1))


def number_classes(column: pd.Series, classes: Any, background: Any = None) -> dict[Any, int]:
    """Return the class of each value by `classes`, a list or mapping; default the sorted distinct values.

    These are numbered 0, 1, 2 …, without the number of the `background`. Raises UsageError for values without
    an order, values that are listed twice, and classes that are not integers.
    """
    if isinstance(classes, Mapping):
        for value, number in classes.items():
            if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
                raise UsageError(f"classes must map values to whole numbers, but {value!r} is mapped to {number!r}.")
        return {value: int(number) for value, number in classes.items()}
    if classes is not None:
        if isinstance(classes, str) or len(set(classes)) != len(classes):
            raise UsageError(
                f"classes must be a list of different values, or a mapping of values to classes, got {classes!r}."
            )
        return {value: number for number, value in enumerate(classes)}
    try:
        values = sorted(column.dropna().unique().tolist())
    except TypeError as error:
        raise UsageError(
            f"The labels cannot be sorted ({error}): they are of several types, or of a type without an order; convert "
            "them, or give classes=."
        ) from None
    free = (number for number in range(len(values) + 1) if background is None or number != background)
    return dict(zip(values, free, strict=False))


def parse_weights(column: pd.Series, rows: Integers) -> Floats:
    """Return weights as float64 `[N]`; raises UsageError unless they are numbers >= 0, not all 0."""
    try:
        weights: Floats = column.to_numpy(np.float64, na_value=np.nan, copy=True)
    except (TypeError, ValueError):
        raise UsageError(f"Weights must be numbers, got {column.dtype}.") from None
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        raise UsageError(f"AOIs {format_rows(rows[wrong])} have a weight that is negative, missing or infinite.")
    if not weights.any():
        raise UsageError("All weights are 0: no AOI could be drawn.")
    return weights


def time_windows(
    time: Any, column: Callable[[str], pd.Series], describe_rows: Callable[[Integers], str]
) -> tuple[Times, Times]:
    """Return first and last instants `[N]` as datetime64[ns] in UTC, NaT = open, from one or two columns."""
    names = [time] if isinstance(time, str) else list(time)
    if not isinstance(time, str) and (len(names) != 2 or not all(isinstance(name, str) for name in names)):
        raise UsageError(f"time must be the name of a column, or of two: (start, end), got {time!r}.")
    first, *last = (column(name) for name in names)
    return parse_windows(first, last[0] if last else None, describe_rows)
