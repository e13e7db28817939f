"""What a column's values look like: categories in the palette, dates and numbers along a colour map."""

from __future__ import annotations

import datetime as dt
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.colours import palette_colour

__all__ = ["ColumnScale", "column_scale"]

_NONE = (0.62, 0.62, 0.62, 1.0)
_MOST_KINDS = 20
_FEW = 8
_KINDS = {"M": "dates", "i": "numbers", "u": "numbers", "f": "numbers"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnScale:
    """A colour for each row, and what explains them."""

    colours: npt.NDArray[np.float64]
    """`[N, 4]`, grey where there is no value."""
    keys: Mapping[str, tuple[float, ...]]
    """Colour by legend text; empty where a bar explains them, but for missing values."""
    bar: ScalarMappable | None = None
    """Of the colour bar; None = categories."""
    dates: bool = False
    """Whether the bar's numbers are days since 1970."""


def column_scale(columns: Sequence[npt.NDArray[Any]], name: str) -> ColumnScale:
    """One scale for one or more columns `[N]`, `[M]`, laid end to end.

    They hold texts, truth values, dates (naive ones are UTC) or numbers; None, NaN, NaT and NA are no value. At most
    8 different days or whole numbers become categories, more of them a bar.

    Raises:
        UsageError: more than 20 different texts, values of another kind, or columns of several kinds.
    """
    uniform = [_uniform(column, name) for column in columns]
    kinds = {_KINDS.get(column.dtype.kind, "texts") for column in uniform}
    if len(kinds) > 1:
        raise UsageError(f"Column {name!r} holds {' here and '.join(sorted(kinds))} there; make them of one kind.")
    values = np.concatenate(uniform)
    if kinds == {"dates"}:
        return _of_dates(values)
    if values.dtype.kind in "iu" and len(np.unique(values)) <= _FEW:  # folds, zones, EPSG codes
        return _of_texts(values.astype(str).astype(object), name)
    if kinds == {"numbers"}:
        return _of_numbers(values.astype(np.float64), dates=False)
    return _of_texts(values, name)


def _uniform(column: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """A column of objects as float64, datetime64 or texts with None."""
    if column.dtype.kind != "O":
        return column.astype(str).astype(object) if column.dtype.kind in "bU" else column
    missing = np.array([_is_missing(v) for v in column], bool)
    some = [v for v, absent in zip(column, missing, strict=True) if not absent]
    if some and all(isinstance(v, numbers.Real) and not isinstance(v, (bool, np.bool_)) for v in some):
        return np.array([np.nan if absent else float(v) for v, absent in zip(column, missing, strict=True)])
    if some and all(isinstance(v, dt.date) for v in some):
        moments = [None if absent else _utc(v) for v, absent in zip(column, missing, strict=True)]
        return np.array(moments, "datetime64[us]")
    if not all(isinstance(v, (str, bool, np.bool_)) for v in some):
        found = sorted({type(v).__name__ for v in some})
        raise UsageError(f"Column {name!r} holds {', '.join(found)}; colour by texts, truth values, dates or numbers.")
    texts = np.empty(len(column), object)
    texts[:] = [None if absent else str(v) for v, absent in zip(column, missing, strict=True)]
    return texts


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # pandas' NA will not be compared, arrays not be one truth
        return not isinstance(value, np.ndarray)


def _utc(moment: dt.date) -> dt.date:
    aware = isinstance(moment, dt.datetime) and moment.tzinfo is not None
    return moment.astimezone(dt.UTC).replace(tzinfo=None) if aware else moment  # type: ignore[attr-defined]


def _of_texts(texts: npt.NDArray[Any], name: str) -> ColumnScale:
    missing = np.array([text is None for text in texts], bool)
    kinds, places = np.unique(texts[~missing].astype(str), return_inverse=True)
    if len(kinds) > _MOST_KINDS:
        raise UsageError(
            f"Column {name!r} has {len(kinds):,} different texts; colour by one that has at most {_MOST_KINDS}, by a "
            "date or by a number."
        )
    return _of_groups(missing, [str(kind) for kind in kinds], places, [palette_colour(i) for i in range(len(kinds))])


def _of_groups(
    missing: npt.NDArray[np.bool_], kinds: list[str], places: npt.NDArray[Any], palette: list[tuple[float, ...]]
) -> ColumnScale:
    colours = np.tile(np.array(_NONE), (len(missing), 1))
    if len(kinds):
        colours[~missing] = np.array(palette)[places]
    counts = np.bincount(places, minlength=len(kinds))
    keys = {f"{kind} ({n:,})": colour for kind, n, colour in zip(kinds, counts, palette, strict=True)}
    return ColumnScale(colours=colours, keys=keys | _missing_key(missing))


def _of_dates(values: npt.NDArray[Any]) -> ColumnScale:
    missing = np.isnat(values)
    days = values.astype("datetime64[D]")
    kinds, places = np.unique(days[~missing], return_inverse=True)
    if len(kinds) <= _FEW:
        palette = [tuple(c) for c in colormaps["viridis"](np.linspace(0, 1, max(len(kinds), 1)))][: len(kinds)]
        return _of_groups(missing, [str(kind) for kind in kinds], places, palette)
    exact = values.astype("datetime64[s]").astype(np.int64) / 86400
    return _of_numbers(np.where(missing, np.nan, exact), dates=True)


def _of_numbers(values: npt.NDArray[np.float64], *, dates: bool) -> ColumnScale:
    missing = ~np.isfinite(values)
    some = values[~missing]
    low, high = (float(np.min(some)), float(np.max(some))) if len(some) else (0.0, 1.0)
    bar = ScalarMappable(Normalize(low, high if high > low else low + 1), "viridis")
    colours = np.asarray(bar.to_rgba(np.where(missing, low, values)), np.float64).reshape(-1, 4)
    colours[missing] = _NONE
    return ColumnScale(colours=colours, keys=_missing_key(missing), bar=bar, dates=dates)


def _missing_key(missing: npt.NDArray[np.bool_]) -> dict[str, tuple[float, ...]]:
    return {f"none ({int(missing.sum()):,})": _NONE} if missing.any() else {}
