"""Which of several records of one place is preferred."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.times import midpoint

__all__ = ["RecordOrder", "checked_order", "preference"]

RecordOrder = str | dt.date
"""newest, oldest, clearest (least cloud, then the newest), nearest (to the middle of the time asked for), or a date:
nearest to it, of a day (month, year) to its middle. Undated records come last; unknown clouds count as clouded."""

_NAMED = ("newest", "oldest", "clearest", "nearest")
_LAST = np.iinfo(np.int64).max

Integers = npt.NDArray[np.int64]


def checked_order(order: RecordOrder) -> str | pd.Timestamp:
    """One of the names, or the date.

    Raises:
        UsageError: neither.
    """
    if isinstance(order, str) and order in _NAMED:
        return order
    try:
        when = midpoint(order) if isinstance(order, (str, dt.date)) else None
    except UsageError:
        when = None
    if when is None:
        raise UsageError(f"order= is one of {', '.join(_NAMED)} or a date, not {order!r}.")
    return when


def preference(
    order: str | pd.Timestamp, times: Integers, clouds: npt.NDArray[Any], ids: npt.NDArray[Any]
) -> Callable[[Integers, int, int], Integers]:
    """A function that sorts positions of records, best first: `sort(positions, start, stop)`.

    Args:
        order: See `checked_order`.
        times: Nanoseconds since 1970 `[N]`, the smallest integer where undated.
        clouds: Percent `[N]`, NaN where unknown.
        ids: Ranks of the ids `[N]`: what settles a tie.
    """
    undated = times == np.iinfo(np.int64).min
    # ~x is -x - 1, without overflow: the newest first.
    newest = np.where(undated, _LAST, ~times)
    keys: tuple[npt.NDArray[Any], ...] = (ids, newest)
    if isinstance(order, pd.Timestamp):
        keys = (ids, newest, np.where(undated, _LAST, abs(times - order.as_unit("ns").value)))
    elif order == "oldest":
        keys = (ids, np.where(undated, _LAST, times))
    elif order == "clearest":
        keys = (ids, newest, np.where(np.isnan(clouds), np.inf, clouds))
    rank = np.empty(len(times), np.int64)
    rank[np.lexsort(keys)] = np.arange(len(times))
    if order != "nearest":
        return lambda found, start, stop: found[np.argsort(rank[found])]

    def nearest(found: Integers, start: int, stop: int) -> Integers:
        middle = start // 2 + stop // 2
        away = np.where(undated[found], _LAST, abs(times[found] // 2 - middle // 2))
        return found[np.lexsort((rank[found], away))]

    return nearest
