"""Counters of what reading cost; plain additions, so they cost nothing worth measuring."""

from __future__ import annotations

import threading
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
    chips: int = 0
    """Chips assembled."""
    fetch_seconds: float = 0.0
    """Summed over concurrent requests, so it may exceed the wall time."""
    decode_seconds: float = 0.0
    """Summed over decode threads."""

    def __sub__(self, other: ReadStats) -> ReadStats:
        return ReadStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


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
            counts: dict[str, Any] = dict(self._counts)
        whole = {f.name for f in fields(ReadStats) if f.type == "int"}
        return ReadStats(**{name: int(n) if name in whole else n for name, n in counts.items()})
