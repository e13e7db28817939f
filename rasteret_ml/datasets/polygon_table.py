"""A table of polygons: their classes or values, their times, and which covers which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.datasets.index.scene_index import index_times
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.geometries import GeometryArray
from rasteret_ml.geo.regions import polygonal_each
from rasteret_ml.samplers.aoi.aoi_table import format_rows, get_column, number_classes, time_windows

_NUMBER = (int, float, np.integer, np.floating)

Classes = Sequence[Any] | Mapping[Any, int] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelValues:
    """The labels of polygons."""

    values: npt.NDArray[Any]  #: int64 class or float32 value of each polygon `[N]`; `unknown` where it has none.
    classes: dict[Any, int]  #: Value in the table to class; empty for continuous labels.
    background: float | int | None  #: Class or value outside all polygons; None = unknown.
    unknown: float | int  #: Label of unknown pixels: `ignore_index`, or NaN.


def label_values(
    polygons: GeometryArray, label: str | None, classes: Classes, continuous: bool, background: Any, ignore_index: int
) -> LabelValues:
    """Return the class or value of each polygon, from a column of the table; arguments as for `PolygonDataset`.

    A UsageError is an unknown column, values that are no classes (or no numbers), classes that no polygon has, or a
    background or `ignore_index` that is also a class of polygons.
    """
    if continuous:
        if classes is not None or label is None:
            raise UsageError("continuous=True needs label=, a column of numbers, and no classes=.")
        if background is not None and (isinstance(background, bool) or not isinstance(background, _NUMBER)):
            raise UsageError(f"background must be a number for continuous labels, got {background!r}.")
        value = None if background is None else float(background)
        return LabelValues(values=_numbers(polygons, label), classes={}, background=value, unknown=float("nan"))
    if label is None:
        if classes is not None:
            raise UsageError("classes= needs label=, the column that holds them; without it every polygon is class 1.")
        numbers, column = {"polygon": 1}, pd.Series(["polygon"] * len(polygons))
    else:
        column = _class_column(polygons, label)
        numbers = number_classes(column, classes, background)
    outside = _background_class(background, numbers, classes)
    if ignore_index in {*numbers.values(), outside}:
        raise UsageError(f"ignore_index={ignore_index} is also a class; choose another number for either.")
    values = column.map(numbers)
    if values.isna().all():
        raise UsageError(
            f"No polygon has any of the classes {list(numbers)[:10]}; the column {label!r} holds "
            f"{_examples(column) or 'nothing'} ({column.dtype})."
        )
    return LabelValues(
        values=values.fillna(ignore_index).to_numpy(np.int64), classes=numbers, background=outside, unknown=ignore_index
    )


def polygon_table(polygons: GeometryArray, order: str | None, time: Any) -> gpd.GeoDataFrame:
    """Return valid polygons in their own CRS, indexed by the time at which each holds, with a column `rank`.

    Polygons of a higher rank cover those of a lower one. Raises UsageError if a polygon has no area.
    """
    shapes = polygonal_each(shapely.force_2d(polygons.geometries))
    empty = shapely.is_empty(shapes) | ~np.isfinite(shapely.bounds(shapes)).all(axis=1)
    if empty.any():
        raise UsageError(f"Polygon {int(np.argmax(empty))} encloses no area; drop it, or repair it first.")
    rank = np.empty(len(shapes), np.int64)
    rank[np.argsort(_sort_keys(polygons, shapes, order), kind="stable")] = np.arange(len(shapes))
    times = _times(polygons, time)
    return gpd.GeoDataFrame({"rank": rank}, geometry=shapes, crs=polygons.crs, index=times)


def _column(polygons: GeometryArray, name: str, argument: str) -> pd.Series:
    if polygons.table is None:
        raise UsageError(
            f"{argument}={name!r} is a column, and these polygons have none; give a GeoDataFrame, an Arrow table, or a "
            "GeoParquet or GeoJSON file."
        )
    return get_column(polygons.table, name, argument).reset_index(drop=True)


def _examples(column: pd.Series) -> str:
    return ", ".join(dict.fromkeys(repr(value) for value in column.dropna().head(1000).tolist()[:10]))


def _numbers(polygons: GeometryArray, label: str) -> npt.NDArray[np.float32]:
    column = _column(polygons, label, "label")
    if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        raise UsageError(f"continuous=True needs a column of numbers; {label!r} holds {_examples(column)}.")
    values = np.asarray(column.to_numpy(np.float64, na_value=np.nan))
    too_large = np.flatnonzero(np.abs(values) > np.finfo(np.float32).max)
    if len(too_large):
        raise UsageError(f"Polygons {format_rows(too_large)} have a {label!r} beyond the range of float32; correct it.")
    return values.astype(np.float32)


def _class_column(polygons: GeometryArray, label: str) -> pd.Series:
    """Return the column as text, integers or booleans; missing values stay missing."""
    column = _column(polygons, label, "label")
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object).infer_objects()  # the categories' own type may have no missing values
    if pd.api.types.is_float_dtype(column.dtype):
        known = column.dropna()
        if not (np.isfinite(known) & (known == known.round())).all():
            raise UsageError(
                f"Classes must be text or whole numbers, but the column {label!r} holds {_examples(column)}; round "
                "them, or use continuous=True."
            )
        column = column.astype("Int64")  # integers with missing values are read as floats
    return column


def _background_class(background: Any, numbers: Mapping[Any, int], classes: Classes) -> int | None:
    if background is None:
        return None
    if not isinstance(background, (int, np.integer)) or isinstance(background, bool):
        if background not in numbers:
            raise UsageError(
                f"background must be a class number or one of {list(numbers)[:10]}, got background={background!r}."
            )
        return numbers[background]
    taken = [value for value, number in numbers.items() if number == background]
    if taken and not isinstance(classes, Mapping):
        raise UsageError(
            f"background={background} is also the class of {taken[0]!r}. If that is intended, use "
            f"background={taken[0]!r}; if not, number the classes with a mapping."
        )
    return int(background)


def _sort_keys(polygons: GeometryArray, shapes: npt.NDArray[np.object_], order: str | None) -> npt.NDArray[Any]:
    """Return a key per polygon; those with a larger key cover others."""
    if order is None:
        return np.zeros(len(shapes))
    if order == "area":
        return -np.asarray(shapely.area(shapes))
    column = _column(polygons, order, "order")
    missing = column.isna().to_numpy()
    if missing.any():
        raise UsageError(f"order={order!r}: polygon {int(np.argmax(missing))} has no value; fill it, or drop the row.")
    codes, _ = pd.factorize(column, sort=True)
    return np.asarray(codes)


def _times(polygons: GeometryArray, time: Any) -> pd.IntervalIndex:
    """Return closed intervals, tz-naive UTC; missing ends are open."""
    if time is None:
        unknown = np.full(len(polygons), np.datetime64("NaT", "ns"))
        return index_times(unknown, unknown)
    start, stop = time_windows(
        time, lambda name: _column(polygons, name, "time"), lambda rows: f"polygons {format_rows(rows)}"
    )
    return index_times(start, stop)
