"""Columns of an AOI table as arrays: classes or values, weights, time windows. Rows that are wrong are named."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import UsageError

__all__ = ["checked_weights", "class_labels", "column_of", "named_rows", "time_windows", "weight_column"]

Rows = npt.NDArray[np.int64]
Times = npt.NDArray[np.datetime64]

_SPAN_OF = {4: pd.DateOffset(years=1), 7: pd.DateOffset(months=1), 10: pd.DateOffset(days=1)}
"""What text of so many characters (2023, 2023-05, 2023-05-01) lasts."""


def named_rows(rows: npt.NDArray[Any]) -> str:
    """Rows for a message: the first ten, and how many there are."""
    listed = [int(row) for row in rows[:10]]
    return str(listed) if len(rows) <= 10 else f"{listed} ({len(rows)} in all)"


def class_labels(
    table: gpd.GeoDataFrame, rows: Rows, label: Any, classes: Sequence[Any] | Mapping[Any, int] | None
) -> tuple[npt.NDArray[np.int64] | npt.NDArray[np.float64], tuple[Any, ...]]:
    """Class numbers (int64) with the values of the classes, or values (float64) with ()."""
    column = column_of(table, rows, label, "label")
    if column.isna().any():
        raise UsageError(
            f"AOIs {named_rows(rows[column.isna().to_numpy()])} have no label; drop them with where(), or fill them in."
        )
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        if classes is None:
            return column.cat.codes.to_numpy(np.int64, copy=True), tuple(kind.categories.tolist())
        column = column.astype(object)
    if classes is None and pd.api.types.is_float_dtype(kind):
        return column.to_numpy(np.float64, copy=True), ()
    if pd.api.types.is_datetime64_any_dtype(kind):
        raise UsageError("A label is a class or a number, not a time.")
    numbers, names = _numbering(column, classes)
    found = column.map(numbers)
    unknown = found.isna().to_numpy()
    if unknown.any():
        values = list(dict.fromkeys(column[unknown].tolist()))[:5]
        raise UsageError(
            f"AOIs {named_rows(rows[unknown])} have labels that are in no class: {values}; add them to classes=, or "
            "drop them with where()."
        )
    return found.to_numpy(np.int64), names


def _numbering(column: pd.Series, classes: Any) -> tuple[dict[Any, int], tuple[Any, ...]]:
    if classes is None:
        try:
            classes = sorted(column.unique().tolist())
        except TypeError as error:
            raise UsageError(f"The labels cannot be sorted ({error}); give classes=, in their order.") from None
    if not isinstance(classes, Mapping):
        names = tuple(classes)
        if len(set(names)) < len(names):
            raise UsageError("classes lists a value twice; map values to numbers to join classes.")
        return {value: number for number, value in enumerate(names)}, names
    for value, number in classes.items():
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise UsageError(f"classes maps values to class numbers from 0; {value!r} is mapped to {number!r}.")
    first: dict[int, Any] = {}
    for value, number in classes.items():
        first.setdefault(int(number), value)
    return dict(classes), tuple(first.get(number) for number in range(max(first, default=-1) + 1))


def weight_column(table: gpd.GeoDataFrame, rows: Rows, weight: Any) -> npt.NDArray[np.float64]:
    """Weights `[N]` of the rows kept."""
    return checked_weights(column_of(table, rows, weight, "weight"), rows)


def checked_weights(column: pd.Series, rows: Rows) -> npt.NDArray[np.float64]:
    """Weights as float64 `[N]`.

    Raises:
        UsageError: one that is no number, negative, missing or infinite; or all are 0.
    """
    try:
        weights: npt.NDArray[np.float64] = column.to_numpy(np.float64, na_value=np.nan, copy=True)
    except (TypeError, ValueError):
        raise UsageError(f"Weights are numbers, not {column.dtype}.") from None
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        raise UsageError(f"AOIs {named_rows(rows[wrong])} have a weight that is negative, missing or infinite.")
    if not weights.any():
        raise UsageError("All weights are 0: nothing could be drawn.")
    return weights


def time_windows(table: gpd.GeoDataFrame, rows: Rows, time: str | tuple[str, str]) -> tuple[Times, Times]:
    """First and last instants `[N]` as datetime64[ns] in UTC, NaT = open."""
    if isinstance(time, str):
        column = column_of(table, rows, time, "time")
        if isinstance(column.dtype, pd.IntervalDtype):
            first, last = pd.Series(pd.IntervalIndex(column).left), pd.Series(pd.IntervalIndex(column).right)
        elif _is_text(column):
            parts = _text(column).str.partition("/")
            first, last = parts[0], parts[2].where(parts[1] == "/", parts[0])
        else:
            first = last = column
    else:
        first, last = (column_of(table, rows, name, "time") for name in time)
    start, stop = _instants(first, rows, last=False), _instants(last, rows, last=True)
    backwards = start > stop
    if backwards.any():
        raise UsageError(f"The time windows of AOIs {named_rows(rows[backwards])} end before they start.")
    return start, stop


def _instants(column: pd.Series, rows: Rows, *, last: bool) -> Times:
    """Instants; of text that names a day, month or year, its first or its last one."""
    if pd.api.types.is_numeric_dtype(column.dtype) and column.notna().any():
        raise UsageError(
            f"A time column holds times or ISO text, not {column.dtype}, which could be years or seconds; make "
            "times of it, for example with pandas.to_datetime(table[name], format='%Y')."
        )
    if not _is_text(column):
        try:
            stamps = pd.to_datetime(column, utc=True)
        except (TypeError, ValueError) as error:
            raise UsageError(f"A time column holds times or ISO text, not {column.dtype} ({error}).") from None
        return _nanoseconds(stamps)
    text = _text(column)
    stamps = pd.to_datetime(text.where(text != "", None), format="ISO8601", utc=True, errors="coerce")
    wrong = (stamps.isna() & (text != "")).to_numpy()
    if wrong.any():
        raise UsageError(
            f"The times of AOIs {named_rows(rows[wrong])} are no ISO 8601 times: {text[wrong].tolist()[:3]}; write "
            "them like 2023-05-01, 2023-05-01T10:30:00Z or 2023-05-01/2023-08-31."
        )
    if last:
        length = text.str.len().to_numpy()
        for characters, span in _SPAN_OF.items():
            whole = length == characters
            stamps = stamps.where(~whole, stamps + span - pd.Timedelta(1, "us"))
    return _nanoseconds(stamps)


def _nanoseconds(stamps: pd.Series) -> Times:
    naive = pd.DatetimeIndex(stamps).tz_convert("UTC").tz_localize(None)
    return np.array(naive.as_unit("ns"), dtype="datetime64[ns]")


def _is_text(column: pd.Series) -> bool:
    if isinstance(column.dtype, pd.StringDtype):
        return True
    return bool(column.dtype == object and column.map(_is_written).any())


def _is_written(value: Any) -> bool:
    """Text, or a date without a time of day, which is taken as its text."""
    return isinstance(value, str) or (isinstance(value, datetime.date) and not isinstance(value, datetime.datetime))


def _text(column: pd.Series) -> pd.Series:
    """ISO text, "" where nothing is said."""
    text = column.astype(object).where(column.notna(), "").astype(str).str.strip()
    return text.where(text != "..", "")


def column_of(table: gpd.GeoDataFrame, rows: Rows, values: Any, what: str) -> pd.Series:
    """A column, or values for every row of the source, of the rows kept, numbered from 0.

    Raises:
        UsageError: no such column, or another number of values.
    """
    if isinstance(values, str):
        if values not in table.columns:
            raise UsageError(f"{what}={values!r}: the table has no such column; it has {list(table.columns)}.")
        return table[values].iloc[rows].reset_index(drop=True)
    series = pd.Series(values)
    if len(series) != len(table):
        raise UsageError(f"{what} has {len(series)} values for a table of {len(table)} rows.")
    return series.iloc[rows].reset_index(drop=True)
