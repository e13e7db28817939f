"""Times as people write them, as tz-naive UTC: a day, month or year without a time of day is all of it."""

from __future__ import annotations

import calendar
import datetime as dt
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import UsageError

__all__ = ["INSTANT", "instant", "middle", "nearest_ns", "windows_of"]

INSTANT = pd.Timedelta(1, unit="us")
"""How long an instant lasts in an index: TorchGeo's `time_series_split` takes a microsecond off every interval, and its
datasets find nothing at an interval without a length."""

Times = npt.NDArray[np.datetime64]
Named = Callable[[npt.NDArray[np.int64]], str]
"""What rows are called in a message: "AOIs [2, 5]"."""

_WHOLE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?|(\d{4})(\d\d)(\d\d)")
"""ISO 8601 of a year, month or day."""
_OPEN = ("", "..")
_LOW, _HIGH = (end.as_unit("us").to_datetime64() for end in (pd.Timestamp.min.ceil("us"), pd.Timestamp.max))
_ENDS = pd.Timestamp.min, pd.Timestamp.max  # asked for once: each time, pandas reads them as if for the first time
_ENDS_UTC = tuple(end.tz_localize("UTC") for end in _ENDS)
_SPAN = f"{pd.Timestamp.min:%Y-%m-%d} to {pd.Timestamp.max:%Y-%m-%d}"
_HOW = "write times like 2023-05-01, 2023-05-01T10:30:00Z or 2023-05-01/2023-08-31"


def instant(value: Any, *, last: bool = False) -> pd.Timestamp | None:
    """One time, tz-naive UTC; of a day, month or year its first instant or its `last`; None = open.

    ISO text, dates and datetimes of any library, also with a zone. None, NaT, "" and ".." are open. Far past and
    far future ("9999-12-31" as an end) become the nearest that nanoseconds reach.

    Raises:
        UsageError: no time, a number, or a start (an end) beyond what nanoseconds reach.
    """
    named = repr(value)
    try:
        if isinstance(value, pd.Timestamp):
            stamp = value if value.tzinfo is None else value.tz_convert("UTC").tz_localize(None)
        else:
            span = _span(value)
            stamp = None if span is None else pd.Timestamp(span[last])
    except ValueError as error:
        raise UsageError(f"Not a date or time: {named}{_because(error)}; {_HOW}.") from None
    if stamp is None or stamp is pd.NaT:
        return None
    near = nearest_ns(stamp)
    if near != stamp and (stamp > near) is not last:
        raise UsageError(
            f"{named} lies beyond {_SPAN}, which is what times of nanoseconds reach; leave it open ('..')."
        )
    return near


def middle(value: Any) -> pd.Timestamp | None:
    """The middle of what is named: noon of a day; see `instant`."""
    first, final = instant(value), instant(value, last=True)
    if first is None or final is None:
        return None
    return first if first == final else first + (final + INSTANT - first) / 2


def nearest_ns(stamp: Any) -> pd.Timestamp:
    """As nanoseconds: the nearest there is."""
    found = stamp if isinstance(stamp, pd.Timestamp) else pd.Timestamp(stamp)
    if found.unit == "ns":
        return found
    low, high = _ENDS if found.tzinfo is None else _ENDS_UTC
    return min(max(found, low), high).as_unit("ns")


def windows_of(first: pd.Series, last: pd.Series | None, named: Named) -> tuple[Times, Times]:
    """First and last instants `[N]` as datetime64[ns], both included, in UTC; NaT = open.

    Args:
        first: Times, days, months or years as text or dates, periods; missing or ".." is open. Without `last` also
            intervals, or ISO text of them ("2023-05-01/2023-08-31").
        last: The same of the ends; None = `first` says both.
        named: What rows are called in a message.

    Raises:
        UsageError: numbers, what is no time, windows that end before they start, or lie beyond what nanoseconds
            reach; the rows are named.
    """
    if last is None:
        first, last = _both_ends(_plain(first))
    start, stop = _instants(_plain(first), named, last=False), _instants(_plain(last), named, last=True)
    backwards = np.flatnonzero(start > stop)
    if len(backwards):
        raise UsageError(
            f"The times of {named(backwards)} end before they start: {start[backwards[0]]} to {stop[backwards[0]]}."
        )
    return start, stop


def _plain(column: pd.Series) -> pd.Series:
    """Of categories their values, numbered from 0."""
    column = column.reset_index(drop=True)
    return column.astype(object).infer_objects() if isinstance(column.dtype, pd.CategoricalDtype) else column


def _both_ends(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    if isinstance(column.dtype, pd.IntervalDtype):
        return pd.Series(pd.IntervalIndex(column).left), pd.Series(pd.IntervalIndex(column).right)
    if not _is_mixed(column):
        return column, column
    ends = [_ends_of(value) for value in column.astype(object)]
    first, last = (pd.Series([pair[k] for pair in ends], dtype=object) for k in (0, 1))
    return first, last


def _ends_of(value: Any) -> tuple[Any, Any]:
    if isinstance(value, pd.Interval):
        return value.left, value.right
    if isinstance(value, str) and value.count("/") == 1:
        first, last = value.split("/")
        return first, last
    return value, value


def _is_mixed(column: pd.Series) -> bool:
    """Text and objects, of which each is looked at."""
    kind = column.dtype
    if getattr(kind, "type", None) is dt.date:  # Arrow's dates, which pandas counts among datetimes
        return True
    return not (pd.api.types.is_datetime64_any_dtype(kind) or pd.api.types.is_any_real_numeric_dtype(kind))


def _instants(column: pd.Series, named: Named, *, last: bool) -> Times:
    if _is_mixed(column):
        stamps = _each(column, named, last=last)
    elif pd.api.types.is_datetime64_any_dtype(column.dtype):
        zoned = pd.DatetimeIndex(pd.to_datetime(column, utc=True))
        stamps = np.asarray(zoned.tz_localize(None).to_numpy())
    else:
        if column.notna().any():
            raise UsageError(
                f"The times of {named(np.flatnonzero(column.notna()))} are numbers ({column.dtype}), which could be "
                "years or seconds; make times of them, for example with pandas.to_datetime(table[name], format='%Y')."
            )
        return np.full(len(column), np.datetime64("NaT", "ns"))
    if np.datetime_data(stamps.dtype)[0] == "ns":
        return stamps.astype("datetime64[ns]")
    return _within_reach(stamps.astype("datetime64[us]"), named, last=last)


def _each(column: pd.Series, named: Named, *, last: bool) -> Times:
    """Values one by one, equal ones once."""
    known: dict[Any, dt.datetime | None] = {}
    wrong: dict[int, str] = {}
    found: list[dt.datetime | None] = []
    for row, value in enumerate(column.astype(object)):
        key = (type(value), value)
        try:
            if key not in known:
                span = _span(value)
                known[key] = None if span is None else span[last]
            found.append(known[key])
        except (TypeError, ValueError) as error:  # TypeError: a list, which has no hash
            wrong[row] = f"{value!r}{_because(error)}"
            found.append(None)
    if wrong:
        texts = list(dict.fromkeys(wrong.values()))[:3]
        raise UsageError(f"The times of {named(np.array(list(wrong)))} are no ISO 8601 times: {texts}; {_HOW}.")
    return np.asarray(pd.DatetimeIndex(found, dtype="datetime64[us]"))  # numpy takes twenty times as long


def _within_reach(stamps: Times, named: Named, *, last: bool) -> Times:
    """As nanoseconds: an end in the far future, and a start in the far past, are open."""
    early, late = stamps < _LOW, stamps > _HIGH
    lost = np.flatnonzero(early if last else late)
    if len(lost):
        raise UsageError(
            f"The times of {named(lost)} lie beyond {_SPAN}, which is what times of nanoseconds reach: "
            f"{stamps[lost[0]]}; leave them open (missing, or '..'), or correct them."
        )
    return np.where(early | late, np.datetime64("NaT", "us"), stamps).astype("datetime64[ns]")


def _span(value: Any) -> tuple[dt.datetime, dt.datetime] | None:
    """First and last instant (to the microsecond) of what a value names; None = open.

    Raises:
        ValueError: it is no time; says why where that is not plain.
    """
    if isinstance(value, str):
        text = value.strip()
        if text in _OPEN:
            return None
        whole = _WHOLE.fullmatch(text)
        if whole is None:
            if "W" in text:
                raise ValueError("weeks are not read")
            stamp = _naive(dt.datetime.fromisoformat(text))
            return stamp, stamp
        return _whole(*(int(part) for part in whole.groups() if part))
    if value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, np.datetime64):
        return None if np.isnat(value) else _span_of_numpy(value)
    if isinstance(value, pd.Period):
        return value.start_time.to_pydatetime(warn=False), value.end_time.to_pydatetime(warn=False)
    if isinstance(value, dt.datetime):
        stamp = _naive(value.to_pydatetime(warn=False) if isinstance(value, pd.Timestamp) else value)
        return stamp, stamp
    if isinstance(value, dt.date):
        return _whole(value.year, value.month, value.day)
    raise ValueError("a number could be years or seconds" if isinstance(value, (int, float, np.number)) else "")


def _span_of_numpy(value: np.datetime64) -> tuple[dt.datetime, dt.datetime] | None:
    if np.datetime_data(value.dtype)[0] in ("Y", "M", "D"):
        return _span(str(value))
    stamp = value.astype("datetime64[us]").item()
    if not isinstance(stamp, dt.datetime):
        raise ValueError("not in the years 1 to 9999")
    return stamp, stamp


def _whole(year: int, month: int | None = None, day: int | None = None) -> tuple[dt.datetime, dt.datetime]:
    first = dt.datetime(year, month or 1, day or 1)
    final_month = month or 12
    final = dt.date(year, final_month, day or calendar.monthrange(year, final_month)[1])
    return first, dt.datetime.combine(final, dt.time.max)


def _naive(stamp: dt.datetime) -> dt.datetime:
    try:
        return stamp if stamp.tzinfo is None else stamp.astimezone(dt.UTC).replace(tzinfo=None)
    except OverflowError:  # the last hours of the year 9999, in another zone
        return stamp.replace(tzinfo=None)


def _because(error: Exception) -> str:
    return f" ({error})" if str(error) else ""
