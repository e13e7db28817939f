"""Counters of what reading cost; plain additions, so they cost nothing worth measuring.

Seconds that are summed over requests or threads say what work there was; they do not say what was waited for. For
that the meter also keeps account of wall time: in how much of it somebody waited for a batch, and what went on then.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal

__all__ = ["Doing", "Meter", "ReadStats"]

Doing = Literal["wait", "fetch", "decode", "assemble"]
"""What a meter keeps wall time of: a batch is waited for, a request is in flight, a thread decodes, one assembles."""


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
    batches_read: int = 0
    """Batches that were asked for."""
    batches_ahead: int = 0
    """Batches that were being read before they were asked for."""
    batches_late: int = 0
    """Of these, the ones that were not whole yet when they were asked for."""
    batches_held: int = 0
    """Times that a batch was not begun ahead because those begun fill `lookahead_bytes`."""
    chips: int = 0
    """Chips assembled."""
    fetch_seconds: float = 0.0
    """Summed over concurrent requests, so it may exceed the wall time; of HTTP alone."""
    body_seconds: float = 0.0
    """Of `fetch_seconds`, from the first byte of an answer to its last: bandwidth. The rest is latency and pauses."""
    fetching_seconds: float = 0.0
    """Wall time with at least one request in flight."""
    decode_seconds: float = 0.0
    """Summed over decode threads."""
    assemble_seconds: float = 0.0
    """Validity and resampling, summed over threads."""
    plan_seconds: float = 0.0
    """Wall time in which the thread that is asked for batches planned: these, and those that it begins ahead."""
    blocked_seconds: float = 0.0
    """Wall time in which it waited for a batch to be read."""
    blocked_network_seconds: float = 0.0
    """Of `blocked_seconds`, where requests were in flight and threads that decode had nothing to do."""
    blocked_decode_seconds: float = 0.0
    """Of `blocked_seconds`, where threads decoded."""
    blocked_assemble_seconds: float = 0.0
    """Of `blocked_seconds`, where chips were put together. In the rest nothing of all this went on."""
    finish_seconds: float = 0.0
    """Wall time in which it made samples of what was read, `transforms` included."""
    collate_seconds: float = 0.0
    """Wall time of `collate_fn`."""

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
    """Thread-safe counters; `snapshot()` gives a frozen `ReadStats`.

    Args:
        threads: That decode and assemble.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._doing: dict[Doing, int] = {"wait": 0, "fetch": 0, "decode": 0, "assemble": 0}
        self._since = 0.0

    def add(self, **counts: float) -> None:
        """Add to the named counters (the fields of `ReadStats`)."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def doing(self, what: Doing) -> _Span:
        """A context: as long as it lasts, that is going on once more."""
        return _Span(self, what)

    def change(self, what: Doing, by: int) -> None:
        """One more, or one less, of what is going on; see `doing`."""
        with self._lock:
            self._settle()
            self._doing[what] += by

    def snapshot(self) -> ReadStats:
        """The counters as they stand."""
        with self._lock:
            self._settle()
            counts = dict(self._counts)
        if unknown := set(counts) - {f.name for f in fields(ReadStats)}:
            raise TypeError(f"There are no counters {sorted(unknown)}.")
        return ReadStats.from_row(counts.get(f.name, 0) for f in fields(ReadStats))

    def _settle(self) -> None:
        """Book the time since the last change.

        Where requests are in flight and only some threads decode, it is theirs by their share of all threads: what
        keeps the others from working is the network.
        """
        now, counts, doing = time.perf_counter(), self._counts, self._doing
        passed, self._since = now - self._since, now
        if doing["fetch"]:
            counts["fetching_seconds"] += passed
        if not doing["wait"]:
            return
        counts["blocked_seconds"] += passed
        busy = doing["decode"] + doing["assemble"]
        threads = 1.0
        if doing["fetch"]:
            threads = min(1.0, busy / self.threads)
            counts["blocked_network_seconds"] += passed * (1.0 - threads)
        if busy:
            counts["blocked_decode_seconds"] += passed * threads * doing["decode"] / busy
            counts["blocked_assemble_seconds"] += passed * threads * doing["assemble"] / busy


class _Span:
    """What `Meter.doing` gives; a class, since a generator costs three times as much."""

    __slots__ = ("_meter", "_what")

    def __init__(self, meter: Meter, what: Doing) -> None:
        self._meter, self._what = meter, what

    def __enter__(self) -> None:
        self._meter.change(self._what, 1)

    def __exit__(self, *_: object) -> None:
        self._meter.change(self._what, -1)
