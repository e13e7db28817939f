"""What is kept of a band's pixels while they stream past: exact where that takes little room, else a fair sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Accumulator", "BandStatistics", "accumulator_for"]

_BINS = 64
_SAMPLE = 1 << 17
"""Pixels kept of a band whose values are too many to count: the rank of a percentile is then off by 0.14 % (one
standard deviation) at most."""
_COUNTED_BYTES = 2
"""Integers of at most this size are counted value by value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStatistics:
    """Statistics of one band over valid, finite pixels, in the units that were asked for (by default as stored)."""

    mean: float
    """Mean."""
    std: float
    """Standard deviation (population)."""
    min: float
    """Least value."""
    max: float
    """Greatest value."""
    count: int
    """Pixels."""
    percentiles: dict[float, float]
    """Value of each percentile asked for, as `numpy.percentile` has it."""
    histogram: tuple[int, ...]
    """Pixels in equal bins from `min` to `max`, the last one closed, as `numpy.histogram` has them."""
    sampled: int
    """Pixels that percentiles and histogram are of: `count` where they are exact, else the size of a random sample."""


class Accumulator(Protocol):
    """One band's pixels, chip by chip."""

    def add(self, values: npt.NDArray[Any], keys: npt.NDArray[np.float64]) -> None:
        """Take in values `[N]` that count, each with a random number in [0, 1)."""

    def result(self, percentiles: tuple[float, ...]) -> BandStatistics | None:
        """The statistics; None where there was no pixel."""


def accumulator_for(dtype: np.dtype[Any]) -> Accumulator:
    """The exact tally for integers of up to 16 bits, the streaming one for all else."""
    exact = dtype.kind in "iub" and dtype.itemsize <= _COUNTED_BYTES
    return _Counted(dtype) if exact else _Streamed()


class _Counted:
    """How often each value of a small integer type occurs; everything follows from that, exactly."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        self._low = int(limits[0])
        self._counts = np.zeros(int(limits[1]) - self._low + 1, np.int64)

    def add(self, values: npt.NDArray[Any], keys: npt.NDArray[np.float64]) -> None:
        """Count them."""
        self._counts += np.bincount(values.astype(np.int64) - self._low, minlength=len(self._counts))

    def result(self, percentiles: tuple[float, ...]) -> BandStatistics | None:
        """Statistics of all pixels."""
        here = np.flatnonzero(self._counts)
        if not len(here):
            return None
        counts, values = self._counts[here], (here + self._low).astype(np.float64)
        total = int(counts.sum())
        mean = float((values * counts).sum() / total)
        variance = float((np.square(values - mean) * counts).sum() / total)
        ends = np.cumsum(counts)
        edges = np.histogram_bin_edges([], _BINS, (values[0], values[-1]))
        return BandStatistics(
            mean=mean,
            std=variance**0.5,
            min=float(values[0]),
            max=float(values[-1]),
            count=total,
            percentiles={q: _percentile(values, ends, q) for q in percentiles},
            histogram=tuple(np.histogram(values, edges, weights=counts)[0].astype(np.int64).tolist()),
            sampled=total,
        )


def _percentile(values: npt.NDArray[np.float64], ends: npt.NDArray[np.int64], q: float) -> float:
    """Linear between the two nearest ranks, as numpy's default, from values and how many are up to each."""
    place = q / 100 * (int(ends[-1]) - 1)
    low = int(place)
    at = np.searchsorted(ends, [low, min(low + 1, int(ends[-1]) - 1)], side="right")
    a, b = values[at].tolist()
    t = place - low
    return float(b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t)


class _Streamed:
    """Mean and variance merged chip by chip, extremes, and the pixels with the smallest keys: a uniform sample.

    The merge is that of Chan, Golub & LeVeque (1979) in float64, which loses nothing to a large offset.
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._min, self._max = np.inf, -np.inf
        self._keys = np.zeros(0)
        self._sample = np.zeros(0)

    def add(self, values: npt.NDArray[Any], keys: npt.NDArray[np.float64]) -> None:
        """Merge them; what is not finite does not count."""
        numbers = values.astype(np.float64)
        finite = np.isfinite(numbers)
        numbers, keys = numbers[finite], keys[finite]
        if not len(numbers):
            return
        count, mean = len(numbers), float(numbers.mean())
        squares = float(np.square(numbers - mean).sum())
        total, step = self._count + count, mean - self._mean
        self._squares += squares + step * step * self._count * count / total
        self._mean += step * count / total
        self._count = total
        self._min, self._max = min(self._min, float(np.min(numbers))), max(self._max, float(np.max(numbers)))
        self._keep(numbers, keys)

    def _keep(self, values: npt.NDArray[np.float64], keys: npt.NDArray[np.float64]) -> None:
        if len(self._keys) == _SAMPLE:
            chosen = keys < np.max(self._keys)
            values, keys = values[chosen], keys[chosen]
        self._keys = np.concatenate([self._keys, keys])
        self._sample = np.concatenate([self._sample, values])
        if len(self._keys) > _SAMPLE:
            smallest = np.argpartition(self._keys, _SAMPLE)[:_SAMPLE]
            self._keys, self._sample = self._keys[smallest], self._sample[smallest]

    def result(self, percentiles: tuple[float, ...]) -> BandStatistics | None:
        """Statistics; percentiles and histogram of the sample."""
        if not self._count:
            return None
        found = np.percentile(self._sample, list(percentiles)).tolist() if percentiles else []
        try:
            bins = np.histogram(self._sample, _BINS, (self._min, self._max))[0]
        except ValueError:  # a range that doubles cannot divide: one bin says all that there is to say
            bins = np.bincount(np.zeros(len(self._sample), np.int64), minlength=_BINS)
        return BandStatistics(
            mean=min(max(self._mean, self._min), self._max),
            std=0.0 if self._min == self._max else (self._squares / self._count) ** 0.5,  # not what rounding leaves
            min=self._min,
            max=self._max,
            count=self._count,
            percentiles=dict(zip(percentiles, found, strict=True)),
            histogram=tuple(bins.tolist()),
            sampled=len(self._sample),
        )
