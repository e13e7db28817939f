"""Colours of classes and of table columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba, to_rgba_array
from matplotlib.dates import date2num

from rasteret_ml.errors import UsageError

#: A name ("forestgreen"), a hex code ("#228b22"), or red, green, blue (and alpha) in 0..1 or 0..255.
Colour = str | Sequence[float]
ColourTable = Mapping[int, Colour] | Sequence[Colour]  #: Colours by class number; a sequence starts at class 0.
RGBA = tuple[float, float, float, float]

#: Paul Tol's "muted" scheme (SRON/EPS/TN/09-002, issue 3.2, figure 5), distinct with any kind of colour vision.
NAMED_PALETTE = {
    "indigo": "#332288", "sand": "#DDCC77", "green": "#117733", "rose": "#CC6677", "cyan": "#88CCEE",
    "wine": "#882255", "teal": "#44AA99", "olive": "#999933", "purple": "#AA4499",
}  # fmt: skip
NO_VALUE = (0.62, 0.62, 0.62, 1.0)  #: Colour of rows without a value.

_BASE = to_rgba_array(list(NAMED_PALETTE.values()))
# For each pass through the palette: the share of a grey that is mixed in, and that grey (0 black, 1 white).
_SHADES = ((0.0, 0.0), (0.5, 1.0), (0.4, 0.0))
_MAX_TEXTS = 20
_MAX_CATEGORIES = 8
# What pandas finds in a column, by how it is coloured.
_TEXTS = ("string", "boolean", "empty")
_DATES = ("datetime64", "datetime", "date")
_NUMBERS = ("integer", "floating", "mixed-integer-float")


def palette_colour(number: int) -> RGBA:
    """Return the colour (r, g, b, a in 0..1) of a class number.

    The nine colours of the palette, then the same lightened, then darkened; class 27 looks like class 0.
    """
    turn, place = divmod(int(number), len(_BASE))
    share, grey = _SHADES[turn % len(_SHADES)]
    r, g, b = (float(v) * (1 - share) + grey * share for v in _BASE[place, :3])
    return r, g, b, 1.0


def class_colours(classes: Iterable[int], colours: ColourTable | None = None) -> dict[int, RGBA]:
    """Return the colour (r, g, b, a in 0..1) of each class: its entry in `colours`, else that of the palette.

    If any tuple of whole numbers in the table exceeds 1, as in a file's colour table, all such tuples count 0..255.
    UsageError: an entry is not a colour; the message names its class.
    """
    table = _by_number(colours, "colours")
    in_bytes = any(_is_whole(colour) and max(colour) > 1 for colour in table.values())
    return {int(c): _rgba(int(c), table[c], in_bytes) if c in table else palette_colour(c) for c in classes}


def class_names(classes: Iterable[int], names: Mapping[int, str] | Sequence[str] | None = None) -> dict[int, str]:
    """Return the name of each class: its entry in `names`, else "class 7"."""
    table = _by_number(names, "classes")
    return {int(c): str(table.get(int(c), f"class {int(c)}")) for c in classes}


def _by_number(table: Any, argument: str) -> dict[int, Any]:
    if table is None:
        return {}
    if isinstance(table, Mapping):
        return {int(number): value for number, value in table.items()}
    if isinstance(table, str) or not isinstance(table, Sequence):
        raise UsageError(f"{argument} must be a mapping by class number or a list from class 0 on, got {table!r}.")
    return dict(enumerate(table))


def _is_whole(colour: Any) -> bool:
    is_tuple = isinstance(colour, (Sequence, np.ndarray)) and not isinstance(colour, str) and len(colour) in (3, 4)
    return is_tuple and all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in colour)


def _rgba(number: int, colour: Any, in_bytes: bool) -> RGBA:
    try:
        return to_rgba([v / 255 for v in colour] if in_bytes and _is_whole(colour) else colour)  # type: ignore[no-any-return]
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"The colour of class {number} must be a name, a hex code, or red, green, blue in 0..1 or 0..255, "
            f"got {colour!r} ({error})."
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnScale:
    """The colours of a column's values, and what its legend or colour bar shows."""

    colours: npt.NDArray[np.float64]  #: RGBA of each row `[N, 4]`, `NO_VALUE` where there is none.
    legend: Mapping[str, RGBA]  #: Colour by legend text; with a bar, only that of missing values.
    bar: ScalarMappable | None = None  #: What the colour bar shows; None = categories.
    dates: bool = False  #: Whether the bar's numbers are days since 1970, matplotlib's dates.


def column_scale(columns: Sequence[npt.NDArray[Any]], name: str) -> ColumnScale:
    """Put one or more columns `[N]`, `[M]` on one scale; its rows are theirs, end to end.

    Texts and truth values are categories, as are up to 8 different days or whole numbers without gaps. Other dates
    (UTC unless they say otherwise) and numbers follow a colour map. None, NaN, NaT, NA and infinities are no value.
    UsageError: more than 20 different texts, values of another kind, or of several kinds.
    """
    values = pd.concat([pd.Series(column, dtype=object) for column in columns], ignore_index=True)
    present = values.dropna()
    kind = pd.api.types.infer_dtype(present)
    if kind not in _TEXTS + _DATES + _NUMBERS:
        types = " and ".join(sorted({type(value).__name__ for value in present}))
        raise UsageError(
            f"Column {name!r} must hold texts, truth values, dates or numbers, of one kind, to color by, got {types}."
        )
    if kind in _DATES:
        times = pd.to_datetime(present, utc=True)
        days = times.dt.strftime("%Y-%m-%d")
        if days.nunique() <= _MAX_CATEGORIES:
            return _categories(len(values), days, colormaps["viridis"](np.linspace(0, 1, days.nunique())))
        return _continuous(len(values), times.index, date2num(times), dates=True)
    whole = kind == "integer" and len(present) == len(values)
    if kind in _NUMBERS and not (whole and present.nunique() <= _MAX_CATEGORIES):
        return _continuous(len(values), present.index, present.to_numpy(np.float64))
    labels = present.infer_objects() if whole else present.map(str)
    count = labels.nunique()
    if count > _MAX_TEXTS:
        raise UsageError(
            f"Column {name!r} has {count:,} different texts; color by one that has at most {_MAX_TEXTS}, by a date or "
            "by a number."
        )
    return _categories(len(values), labels, np.array([palette_colour(i) for i in range(count)]).reshape(-1, 4))


def _categories(rows: int, labels: pd.Series, palette: npt.NDArray[np.float64]) -> ColumnScale:
    codes, kinds = pd.factorize(labels, sort=True)
    counted = zip(kinds, np.bincount(codes, minlength=len(kinds)), palette, strict=True)
    legend = {f"{kind} ({count:,})": to_rgba(colour) for kind, count, colour in counted}
    return _with_missing(rows, labels.index, palette[codes], legend)


def _continuous(rows: int, index: pd.Index, values: npt.NDArray[np.float64], *, dates: bool = False) -> ColumnScale:
    index, values = index[np.isfinite(values)], values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    bar = ScalarMappable(Normalize(low, high if high > low else low + 1), "viridis")
    return _with_missing(rows, index, bar.to_rgba(values), {}, bar=bar, dates=dates)


def _with_missing(
    rows: int, index: pd.Index, colours: npt.NDArray[np.float64], legend: dict[str, RGBA], **bar: Any
) -> ColumnScale:
    """Return the scale of `rows` rows, of which those at `index` have these colours and the others no value."""
    filled = np.tile(np.array(NO_VALUE), (rows, 1))
    filled[index] = colours
    missing = rows - len(index)
    return ColumnScale(colours=filled, legend=legend | ({f"none ({missing:,})": NO_VALUE} if missing else {}), **bar)
