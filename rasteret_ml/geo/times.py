"""Parse times as tz-naive UTC; a day, month or year without a time of day is an interval, all of it.

pandas and numpy hold and convert the times. Text is parsed by `datetime.fromisoformat`, because `pandas.Timestamp`
also takes "now", reads "05/01/2023" as a day in May, and makes a day its midnight.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import UsageError

#: Length of an instant in an index: TorchGeo's `time_series_split` takes a microsecond off every interval, and its
#: datasets find nothing at an interval of length 0.
INSTANT = pd.Timedelta(1, unit="us")

Times = npt.NDArray[np.datetime64]
Span = tuple[pd.Timestamp, pd.Timestamp]
Describe = Callable[[npt.NDArray[np.int64]], str]

_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d))?)?|(\d{4})(\d\d)(\d\d)")  # ISO 8601 year, month or day.
_MIN, _MAX = pd.Timestamp.min, pd.Timestamp.max  # looked up once: pandas builds them on each access
_MIN_UTC, _MAX_UTC = _MIN.tz_localize("UTC"), _MAX.tz_localize("UTC")
_MIN_US, _MAX_US = (end.as_unit("us").to_datetime64() for end in (_MIN.ceil("us"), _MAX.floor("us")))
_RANGE = f"{_MIN:%Y-%m-%d} to {_MAX:%Y-%m-%d}, the range of nanosecond times"
_REMEDY = "write times like 2023-05-01, 2023-05-01T10:30:00Z or 2023-05-01/2023-08-31"


def parse_time(value: Any, *, last: bool = False) -> pd.Timestamp | None:
    """Parse one time as tz-naive UTC: ISO 8601 text, or a date, datetime or period of Python, numpy or pandas.

    None, NaT, "" and ".." are open and return None. `last` reads an end: the last instant of a day, month or year
    instead of the first. A far future end ("9999-12-31") becomes the last nanosecond time, a far past start the first.
    Raise UsageError for a number, what is not a time, or a start after (an end before) all nanosecond times.
    """
    try:
        stamp = _span(value)[last]
    except ValueError as error:
        raise UsageError(f"A time must be a date or time, got {value!r}{_reason(error)}; {_REMEDY}.") from None
    if stamp is pd.NaT:
        return None
    clamped = clamp_ns(stamp)
    if clamped != stamp and (stamp > clamped) is not last:
        raise UsageError(f"A time must be within {_RANGE}, got {value!r}; use '..' for an open end.")
    return clamped


def midpoint(value: Any) -> pd.Timestamp | None:
    """Return the middle of what `value` names (noon of a day), None if open; see `parse_time`."""
    first, last = parse_time(value), parse_time(value, last=True)
    if first is None or last is None:
        return None
    return first if first == last else first + (last + INSTANT - first) / 2


def clamp_ns(stamp: Any) -> pd.Timestamp:
    """Convert a timestamp to nanoseconds; one beyond their range becomes the nearest end of it."""
    stamp = stamp if isinstance(stamp, pd.Timestamp) else pd.Timestamp(stamp)
    if stamp.unit == "ns":
        return stamp
    low, high = (_MIN, _MAX) if stamp.tzinfo is None else (_MIN_UTC, _MAX_UTC)
    return min(max(stamp, low), high).as_unit("ns")


def parse_windows(first: pd.Series, last: pd.Series | None, describe_rows: Describe) -> tuple[Times, Times]:
    """Parse columns of starts and ends: first and last instants, both included, datetime64[ns] `[N]`; NaT = open.

    They hold text, dates, datetimes or periods; missing and ".." are open. Without `last`, `first` holds both, and may
    be `pandas.Interval`s or ISO 8601 intervals ("2023-05-01/2023-08-31"). Raise UsageError for values that are not
    times, such as numbers, and windows that end before they start or lie beyond the range of nanoseconds; the message
    names the rows by `describe_rows`, such as "AOIs [2, 5]".
    """
    if last is None:
        start, stop = _parse_column(first, describe_rows, _window)
    else:
        start, stop = _parse_column(first, describe_rows, _span)[0], _parse_column(last, describe_rows, _span)[1]
    start, stop = _to_ns(start, describe_rows, last=False), _to_ns(stop, describe_rows, last=True)
    wrong = np.flatnonzero(start > stop)
    if len(wrong):
        raise UsageError(
            f"The times of {describe_rows(wrong)} end before they start: {start[wrong[0]]} to {stop[wrong[0]]}."
        )
    return start, stop


def _parse_column(column: pd.Series, describe_rows: Describe, parse: Callable[[Any], Span]) -> Sequence[Times]:
    """Starts and ends, in the column's own unit or in microseconds."""
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        kind = (column := column.astype(object).infer_objects()).dtype
    if isinstance(kind, pd.IntervalDtype) and parse is _window:
        return [end.to_numpy() for end in (pd.IntervalIndex(column).left, pd.IntervalIndex(column).right)]
    is_arrow_date = getattr(kind, "type", None) is dt.date  # a datetime to pandas
    if pd.api.types.is_datetime64_any_dtype(kind) and not is_arrow_date:
        return [pd.DatetimeIndex(pd.to_datetime(column, utc=True)).tz_localize(None).to_numpy()] * 2
    cached = functools.lru_cache(maxsize=None, typed=True)(parse)
    spans, errors = [], {}
    for row, value in enumerate(column.astype(object)):
        try:
            spans.append(cached(value))
        except (TypeError, ValueError) as error:  # TypeError: a list, which has no hash
            errors[row] = f"{value!r}{_reason(error)}"
    if errors:
        raise UsageError(
            f"The times of {describe_rows(np.array(list(errors)))} must be ISO 8601 text, dates or datetimes, "
            f"got {list(dict.fromkeys(errors.values()))[:3]}; {_REMEDY}."
        )
    return [pd.DatetimeIndex([span[end] for span in spans], dtype="datetime64[us]").to_numpy() for end in (0, 1)]


def _to_ns(stamps: Times, describe_rows: Describe, *, last: bool) -> Times:
    """Nanoseconds; an end in the far future and a start in the far past are open."""
    if np.datetime_data(stamps.dtype)[0] == "ns":
        return stamps
    stamps = stamps.astype("datetime64[us]")
    early, late = stamps < _MIN_US, stamps > _MAX_US
    wrong = np.flatnonzero(early if last else late)
    if len(wrong):
        raise UsageError(
            f"The times of {describe_rows(wrong)} must be within {_RANGE}, got {stamps[wrong[0]]}; "
            "leave an open end missing, or '..'."
        )
    return np.where(early | late, np.datetime64("NaT", "us"), stamps).astype("datetime64[ns]")


def _window(value: Any) -> Span:
    """`_span`, also of an interval."""
    if isinstance(value, pd.Interval):
        return _span(value.left)[0], _span(value.right)[1]
    if isinstance(value, str) and value.count("/") == 1:
        first, last = value.split("/")
        return _span(first)[0], _span(last)[1]
    return _span(value)


def _span(value: Any) -> Span:
    """First and last instant of what `value` names, both NaT if it is open.

    Raise ValueError if it is not a time; the message is empty or says why.
    """
    if isinstance(value, str):
        text = value.strip()
        date = _DATE.fullmatch(text)
        if date is not None:
            value = np.datetime64("-".join(filter(None, date.groups())))
        elif "W" in text:
            raise ValueError("ISO weeks are not supported")
        else:
            value = None if text in ("", "..") else dt.datetime.fromisoformat(text)
    if isinstance(value, dt.datetime):
        stamp = pd.Timestamp(value)
        return (stamp if stamp.tzinfo is None else stamp.tz_convert(None),) * 2
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return pd.NaT, pd.NaT
    if isinstance(value, pd.Period):
        return value.start_time, value.end_time.floor("us")
    if isinstance(value, dt.date):
        value = np.datetime64(value, "D")
    if isinstance(value, np.datetime64):
        if not 1 <= value.astype("datetime64[Y]").astype(int) + 1970 <= 9999:
            raise ValueError("not in the years 1 to 9999")
        unit: Any = np.datetime_data(value.dtype)[0]
        stop = value.astype("datetime64[us]")
        if unit in ("Y", "M", "D"):  # the last microsecond of the day, month or year
            stop = (value + np.timedelta64(1, unit)).astype("datetime64[us]") - np.timedelta64(1, "us")
        return pd.Timestamp(value.astype("datetime64[us]")), pd.Timestamp(stop)
    if isinstance(value, (int, float, np.number)):
        raise ValueError("a number could be years or seconds; convert it, as by pandas.to_datetime(years, format='%Y')")
    raise ValueError


def _reason(error: Exception) -> str:
    return f" ({error})" if str(error) else ""
