"""Polygons with a class or value, a span of time and a place in the order of painting: one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.geometries import GeometryArray
from rasteret_ml.geo.regions import polygonal_each
from rasteret_ml.geo.times import INSTANT, parse_windows
from rasteret_ml.samplers.aoi.aoi_table import format_rows, get_column

__all__ = ["LabelValues", "label_values", "polygon_table"]

_NUMBER = (int, float, np.integer, np.floating)

Classes = Sequence[Any] | Mapping[Any, int] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelValues:
    """What each polygon is painted with."""

    values: npt.NDArray[Any]
    """int64 class or float32 value of each `[N]`; `nothing` where it has none."""
    classes: dict[Any, int]
    """Value in the table to class; empty for continuous labels."""
    background: float | int | None
    """What is outside all polygons; None = nothing is known there."""
    nothing: float | int
    """Where no label is known: `ignore_index`, or NaN."""


def label_values(
    found: GeometryArray, label: str | None, classes: Classes, continuous: bool, background: Any, ignore_index: int
) -> LabelValues:
    """The class or value of each polygon.

    Raises:
        UsageError: no such column, values that are no classes (or no numbers), classes that none of them has, or a
            background that is also the class of something else.
    """
    if continuous:
        if classes is not None or label is None:
            raise UsageError("continuous=True takes its values from label=, a column of numbers, and no classes=.")
        values = _numbers(found, label)
        if background is not None and (isinstance(background, bool) or not isinstance(background, _NUMBER)):
            raise UsageError(f"background={background!r}: of continuous labels it is a number.")
        outside = None if background is None else float(background)
        return LabelValues(values=values, classes={}, background=outside, nothing=float("nan"))
    if label is None:
        if classes is not None:
            raise UsageError("classes= are those of label=, a column; without one every polygon is class 1.")
        numbers = {"polygon": 1}
        column = pd.Series(["polygon"] * len(found))
    else:
        column = _class_column(found, label)
        numbers = _class_numbers(column, classes, background, label)
    outside_class = _background_class(background, numbers, classes)
    if ignore_index in {*numbers.values(), outside_class}:
        raise UsageError(f"ignore_index={ignore_index} is also a class; choose another number for one of them.")
    drawn = column.map(numbers)
    if drawn.isna().all():
        raise UsageError(
            f"No polygon has any of the classes {list(numbers)[:10]}; the column {label!r} holds "
            f"{_some(column) or 'nothing'} ({column.dtype})."
        )
    values = drawn.fillna(ignore_index).to_numpy(np.int64)
    return LabelValues(values=values, classes=numbers, background=outside_class, nothing=ignore_index)


def polygon_table(found: GeometryArray, order: str | None, time: Any) -> gpd.GeoDataFrame:
    """The polygons, valid, in their own CRS, with `rank`; their index is the time that each is for.

    The rank is the place in the order of painting; the last one is on top.

    Raises:
        UsageError: no such column, or one with missing values (of an order) or with times that cannot be.
    """
    shapes = polygonal_each(shapely.force_2d(found.geometries))
    lost = shapely.is_empty(shapes) | ~np.isfinite(shapely.bounds(shapes)).all(axis=1)
    if lost.any():
        raise UsageError(f"Polygon {int(np.argmax(lost))} encloses no area; drop it, or mend it first.")
    rank = np.empty(len(shapes), np.int64)
    rank[np.argsort(_height(found, shapes, order), kind="stable")] = np.arange(len(shapes))
    times = _times(found, time)
    return gpd.GeoDataFrame({"rank": rank}, geometry=shapes, crs=found.crs, index=times)


def _column(found: GeometryArray, name: str, what: str) -> pd.Series:
    table = found.table
    if table is None:
        raise UsageError(
            f"{what}={name!r} is a column, and these polygons come without any; give a GeoDataFrame, an Arrow table, "
            "or a GeoParquet or GeoJSON file."
        )
    if name not in table.columns or name == table.geometry.name:
        have = ", ".join(str(c) for c in table.columns if c != table.geometry.name)
        raise UsageError(f"{what}={name!r} is no column of the polygons; they have: {have or 'none'}.")
    return get_column(table, name, what).reset_index(drop=True)


def _some(column: pd.Series) -> str:
    return ", ".join(dict.fromkeys(repr(value) for value in column.dropna().head(1000).tolist()[:10]))


def _numbers(found: GeometryArray, label: str) -> npt.NDArray[np.float32]:
    column = _column(found, label, "label")
    if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        raise UsageError(f"The column {label!r} holds {_some(column)} ({column.dtype}); continuous labels are numbers.")
    values = np.asarray(column.to_numpy(np.float64, na_value=np.nan))
    beyond = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
    if len(beyond):
        raise UsageError(f"Polygons {format_rows(beyond)} have a {label!r} that float32 does not hold; correct them.")
    return values.astype(np.float32)


def _class_column(found: GeometryArray, label: str) -> pd.Series:
    """The column as text, whole numbers or truth values, its missing values missing."""
    column = _column(found, label, "label")
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object).infer_objects()  # not the categories' type: it may not know missing values
    if pd.api.types.is_float_dtype(column.dtype):
        known = column.dropna()
        if not (np.isfinite(known) & (known == known.round())).all():
            raise UsageError(f"The column {label!r} holds {_some(column)}; say continuous=True, or give whole numbers.")
        column = column.astype("Int64")  # whole numbers with gaps are read as floats
    return column


def _class_numbers(column: pd.Series, classes: Classes, background: Any, label: str) -> dict[Any, int]:
    if isinstance(classes, Mapping):
        for key, value in classes.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise UsageError(f"classes maps values to class numbers; {key!r} is mapped to {value!r}.")
        return {key: int(value) for key, value in classes.items()}
    if classes is not None:
        if isinstance(classes, str) or len(set(classes)) != len(classes):
            raise UsageError(
                f"classes is a list of different values, or a mapping of values to classes, not {classes!r}."
            )
        return {value: i for i, value in enumerate(classes)}
    try:
        values = sorted(column.dropna().unique().tolist())
    except TypeError:
        raise UsageError(
            f"The column {label!r} holds {_some(column)}, of several types or of one without an order; make them "
            "one first, or give classes=."
        ) from None
    free = (i for i in range(len(values) + 1) if background is None or i != background)
    return dict(zip(values, free, strict=False))


def _background_class(background: Any, numbers: Mapping[Any, int], classes: Classes) -> int | None:
    if background is None:
        return None
    if not isinstance(background, (int, np.integer)) or isinstance(background, bool):
        if background not in numbers:
            raise UsageError(
                f"background={background!r} is a class number, or one of the classes {list(numbers)[:10]}."
            )
        return numbers[background]
    taken = [value for value, number in numbers.items() if number == background]
    if taken and not isinstance(classes, Mapping):
        raise UsageError(
            f"background={background} is also the class of {taken[0]!r}. If that is meant, say "
            f"background={taken[0]!r}; else number the classes with a mapping."
        )
    return int(background)


def _height(found: GeometryArray, shapes: npt.NDArray[np.object_], order: str | None) -> npt.NDArray[Any]:
    """What polygons are sorted by: of two that overlap the higher one is on top."""
    if order is None:
        return np.zeros(len(shapes))
    if order == "area":
        return -np.asarray(shapely.area(shapes))
    column = _column(found, order, "order")
    missing = column.isna().to_numpy()
    if missing.any():
        raise UsageError(f"order={order!r}: polygon {int(np.argmax(missing))} has no value, so it has no place in it.")
    codes, _ = pd.factorize(column, sort=True)
    return np.asarray(codes)


def _times(found: GeometryArray, time: Any) -> pd.IntervalIndex:
    """Closed intervals, tz-naive UTC; what is missing is open to that side."""
    start: npt.NDArray[np.datetime64]
    stop: npt.NDArray[np.datetime64]
    if time is None:
        start, stop = (np.full(len(found), np.datetime64("NaT", "ns")) for _ in range(2))
    else:
        names = [time] if isinstance(time, str) else list(time)
        if not isinstance(time, str) and (len(names) != 2 or not all(isinstance(name, str) for name in names)):
            raise UsageError(f"time is the name of a column of times, or of two: (start, end); not {time!r}.")
        first, *last = (_column(found, name, "time") for name in names)
        start, stop = parse_windows(first, last[0] if last else None, lambda at: f"polygons {format_rows(at)}")
    start[np.isnat(start)] = pd.Timestamp.min.to_datetime64()
    stop[np.isnat(stop)] = pd.Timestamp.max.to_datetime64()
    stop[start == stop] += INSTANT.to_timedelta64()
    return pd.IntervalIndex.from_arrays(pd.DatetimeIndex(start), pd.DatetimeIndex(stop), closed="both", name="datetime")
