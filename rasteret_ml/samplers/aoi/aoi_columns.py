"""Columns of an AOI table as arrays: classes or values, weights, time windows. Rows that are wrong are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.times import parse_windows

__all__ = ["checked_weights", "class_labels", "column_of", "named_rows", "one_column", "time_windows", "weight_column"]

Rows = npt.NDArray[np.int64]
Times = npt.NDArray[np.datetime64]


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
            f"AOIs {named_rows(rows[column.isna().to_numpy()])} have no label; fill them in, or leave these rows out "
            f"before: table[{_condition(label, 'notna()')}]."
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
            f"leave these rows out before: table[{_condition(label, 'isin(classes)')}]."
        )
    return found.to_numpy(np.int64), names


def _condition(label: Any, test: str) -> str:
    """Python that says which rows of a table have a label."""
    return f"table[{label!r}].{test}" if isinstance(label, str) else f"pandas.Series(label).{test}"


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
    """First and last instants `[N]` as datetime64[ns] in UTC, NaT = open; see `parse_windows`."""
    names = [time] if isinstance(time, str) else list(time)
    if not isinstance(time, str) and len(names) != 2:
        raise UsageError(f"time= is a column, or two: (first, last); not {time!r}.")
    first, *last = (column_of(table, rows, name, "time") for name in names)
    return parse_windows(first, last[0] if last else None, lambda at: f"AOIs {named_rows(rows[at])}")


def one_column(table: pd.DataFrame, name: str, what: str) -> pd.Series:
    """The column of a name.

    Raises:
        UsageError: several have it.
    """
    found = table[name]
    if isinstance(found, pd.DataFrame):
        raise UsageError(f"{what}={name!r}: the table has {found.shape[1]} columns of this name; rename them first.")
    return found


def column_of(table: gpd.GeoDataFrame, rows: Rows, values: Any, what: str) -> pd.Series:
    """A column, or values for every row of the source, of the rows kept, numbered from 0.

    Raises:
        UsageError: no such column, or another number of values.
    """
    if isinstance(values, str):
        if values not in table.columns:
            raise UsageError(f"{what}={values!r}: the table has no such column; it has {list(table.columns)}.")
        return one_column(table, values, what).iloc[rows].reset_index(drop=True)
    series = pd.Series(values)
    if len(series) != len(table):
        raise UsageError(f"{what} has {len(series)} values for a table of {len(table)} rows.")
    return series.iloc[rows].reset_index(drop=True)
