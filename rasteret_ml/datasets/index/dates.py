"""Dates of a time series: records to dates, and dates to a fixed number of them (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.geo.times import Times
from rasteret_ml.samplers.ranks import epoch_random

#: Which dates are kept if there are more than `length`: the last, the first, evenly spread ones (first and last
#: included), the least cloudy, or random ones (by seed, epoch and position).
DateChoice = Literal["latest", "earliest", "even", "clearest", "random"]

_STREAM = 7  # Separates the random numbers of dates from those of places.


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSeries:
    """Samples `[T, C, H, W]` of all dates at a place, in ascending order.

    Raises:
        UsageError: a length below 1, invalid months, or an unknown choice or group.

    Example:
        >>> summer = TimeSeries(length=12, choose="even", months=(6, 7, 8), max_cloud=60)
        >>> images = RasteretDataset("scenes.parquet", ["B04", "B08"], series=summer)  # doctest: +SKIP
    """

    #: T of every sample; if there are fewer dates, the end is padding, False in `time_valid`. None = all dates; a batch
    #: is padded to its longest sample.
    length: int | None = None
    choose: DateChoice = "latest"  #: Which dates are kept if there are more.
    #: What counts as one date: "day" = all records of a UTC day, mosaicked; "instant" = records of one instant; or a
    #: duration such as "6h": records no further than that from the one before.
    group: str = "day"
    months: tuple[int, ...] = ()  #: Only dates in these months (1 to 12); none = all.
    #: Only records with at most this cloud cover in percent; unknown cover does not qualify.
    max_cloud: float | None = None
    min_dates: int = 1  #: Required dates: fewer raise NoOverlapError.

    def __post_init__(self) -> None:
        """Check, and convert lists from YAML."""
        object.__setattr__(self, "months", tuple(int(m) for m in self.months))
        if self.length is not None and self.length < 1:
            raise UsageError(f"length must be >= 1, got {self.length}.")
        if not 1 <= self.min_dates <= (self.length or self.min_dates):
            raise UsageError(f"min_dates must be from 1 to length = {self.length}, got {self.min_dates}.")
        if any(not 1 <= m <= 12 for m in self.months):
            raise UsageError(f"months must be from 1 to 12, got {self.months}.")
        if self.choose not in get_args(DateChoice):
            raise UsageError(f"choose must be one of {', '.join(get_args(DateChoice))}, got {self.choose!r}.")
        self.gap()

    @classmethod
    def of(cls, series: TimeSeries | int | Mapping[str, Any] | None) -> TimeSeries | None:
        """Return a series from itself, its length, or a mapping of its fields (as in YAML); None stays None."""
        if series is None or isinstance(series, TimeSeries):
            return series
        if isinstance(series, Mapping):
            try:
                return cls(**{str(key): value for key, value in series.items()})
            except TypeError as error:
                raise UsageError(f"series= {dict(series)}: {error}.") from None
        if isinstance(series, bool) or not isinstance(series, (int, np.integer)):
            raise UsageError(f"series must be a TimeSeries, its length or a mapping of its fields, got {series!r}.")
        return cls(length=int(series))

    def gap(self) -> int | None:
        """Return the largest gap between records of one date in nanoseconds; None = UTC days."""
        if self.group == "day":
            return None
        if self.group == "instant":
            return 0
        try:
            gap = pd.Timedelta(self.group)
        except ValueError:
            gap = pd.NaT
        if gap is pd.NaT or gap < pd.Timedelta(0):
            raise UsageError(f"group must be 'day', 'instant' or a duration such as '6h', got {self.group!r}.")
        return int(gap.as_unit("ns").value)


def fits_series(series: TimeSeries, times: Times, clouds: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which records `[N]` qualify for the series by month and cloud cover."""
    kept = np.ones(len(times), bool)
    if series.months:
        month = times.astype("datetime64[M]").astype(np.int64) % 12 + 1
        kept &= np.isin(month, series.months)
    if series.max_cloud is not None:
        with np.errstate(invalid="ignore"):
            kept &= clouds <= series.max_cloud
    return kept


def choose_dates(
    series: TimeSeries, times: Times, clouds: npt.NDArray[Any], draw: tuple[int, int, int] = (0, 0, 0)
) -> list[npt.NDArray[np.int64]]:
    """Return the dates of a sample, ascending: for each, the positions of its records, in the given order.

    Records `[N]` are all dated; cloud cover is in percent `[N]`, NaN = unknown. `draw` is (seed, epoch, position), for
    random dates. Raises NoOverlapError if there are fewer than `series.min_dates` dates.
    """
    stamps = times.astype("datetime64[ns]").astype(np.int64)
    used = np.flatnonzero(fits_series(series, times, clouds))
    dates = _grouped(stamps[used], series.gap())
    groups = [used[dates == date] for date in range(int(np.max(dates, initial=-1)) + 1)]
    if len(groups) < series.min_dates:
        raise NoOverlapError(
            f"{len(stamps)} records here give {len(groups)} dates, but min_dates={series.min_dates} are required; use "
            "a longer time, more months or cloud, or a smaller min_dates=."
        )
    if series.length is None or len(groups) <= series.length:
        return groups
    return [groups[i] for i in sorted(_chosen(series, groups, clouds, draw))]


def _grouped(stamps: npt.NDArray[np.int64], gap: int | None) -> npt.NDArray[np.int64]:
    """Return the number of each record's date, from 0, ascending in time."""
    if gap is None:
        days = np.floor_divide(stamps, 86_400_000_000_000)
        numbers: npt.NDArray[np.int64] = np.unique(days, return_inverse=True)[1].reshape(-1)
        return numbers
    order = np.argsort(stamps, kind="stable")
    new = np.diff(stamps[order], prepend=stamps[order][:1]) > gap
    dates = np.empty(len(stamps), np.int64)
    dates[order] = np.cumsum(new)
    return dates


def _chosen(
    series: TimeSeries, groups: Sequence[npt.NDArray[np.int64]], clouds: npt.NDArray[Any], draw: tuple[int, int, int]
) -> list[int]:
    count, length = len(groups), int(series.length or 0)
    if series.choose == "latest":
        return list(range(count - length, count))
    if series.choose == "earliest":
        return list(range(length))
    if series.choose == "even":
        return [round(v) for v in np.linspace(count - 1 if length == 1 else 0, count - 1, length).tolist()]
    if series.choose == "random":
        seed, epoch, position = draw
        numbers = epoch_random(seed ^ (_STREAM << 32) ^ position, epoch).random(count)
        return [int(i) for i in np.argsort(numbers, kind="stable")[:length]]
    shares = [_cloud(clouds[group]) for group in groups]
    latest_first = sorted(range(count), key=lambda i: (shares[i], -i))
    return latest_first[:length]


def _cloud(clouds: npt.NDArray[Any]) -> float:
    known = clouds[~np.isnan(clouds)]
    return float(known.mean()) if len(known) else np.inf
