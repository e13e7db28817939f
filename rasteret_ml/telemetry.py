"""Counters of what reading cost; plain additions, so they cost nothing worth measuring."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Meter", "ReadStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStats:
    """A snapshot of one process's counters."""

    requests: int = 0
    """Range requests that were answered."""
    retries: int = 0
    """Attempts beyond the first."""
    bytes_fetched: int = 0
    """Body bytes received."""
    bytes_used: int = 0
    """Compressed tile bytes that were decoded; the rest of `bytes_fetched` is merge waste or headers."""
    tiles_decoded: int = 0
    """Tiles that went through a codec."""
    tiles_shared: int = 0
    """Tiles taken from a batch that was reading them at that moment: neither fetched nor decoded again."""
    cache_hits: int = 0
    """Tiles taken from the cache of decoded tiles."""
    batches_ahead: int = 0
    """Batches that were being read before they were asked for."""
    chips: int = 0
    """Chips assembled."""
    fetch_seconds: float = 0.0
    """Summed over concurrent requests, so it may exceed the wall time."""
    decode_seconds: float = 0.0
    """Summed over decode threads."""
    assemble_seconds: float = 0.0
    """Validity, resampling and the making of samples, summed over threads."""

    @property
    def merge_waste(self) -> int:
        """Bytes received and thrown away, because they lay between tiles of one request."""
        return self.bytes_fetched - self.bytes_used

    def __sub__(self, other: ReadStats) -> ReadStats:
        return ReadStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def as_row(self) -> list[float]:
        """The counters in the order of the fields, to be put in an array; `from_row` reads them."""
        return [float(getattr(self, f.name)) for f in fields(self)]

    @classmethod
    def from_row(cls, row: Iterable[float]) -> ReadStats:
        """The inverse of `as_row`."""
        named = zip(fields(cls), row, strict=True)
        counts: dict[str, Any] = {f.name: float(v) if f.type == "float" else int(v) for f, v in named}
        return cls(**counts)


class Meter:
    """Thread-safe counters; `snapshot()` gives a frozen `ReadStats`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, float] = {}

    def add(self, **counts: float) -> None:
        """Add to the named counters (the fields of `ReadStats`)."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] = self._counts.get(name, 0) + count

    def snapshot(self) -> ReadStats:
        """The counters as they stand."""
        with self._lock:
            counts = dict(self._counts)
        if unknown := set(counts) - {f.name for f in fields(ReadStats)}:
            raise TypeError(f"There are no counters {sorted(unknown)}.")
        return ReadStats.from_row(counts.get(f.name, 0) for f in fields(ReadStats))
