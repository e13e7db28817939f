"""Counters of what reading costs: additions under a lock, too cheap to notice.

Seconds summed over requests or threads measure work, not waiting. Therefore a meter also accounts for wall time: how
long a batch was waited for, and what went on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any, Literal

#: What a meter measures the wall time of: waiting for a batch, a request in flight, a thread decoding or assembling.
Activity = Literal["wait", "fetch", "decode", "assemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStats:
    """A snapshot of one process's counters."""

    requests: int = 0  #: Range requests that were answered.
    retries: int = 0  #: Attempts after the first.
    bytes_fetched: int = 0  #: Body bytes received.
    bytes_used: int = 0  #: Compressed bytes of decoded tiles; the rest of `bytes_fetched` is merge waste or headers.
    tiles_decoded: int = 0  #: Tiles decoded by a codec.
    #: Tiles taken from another batch that was reading them at the time: neither fetched nor decoded again.
    tiles_shared: int = 0
    cache_hits: int = 0  #: Tiles taken from the cache of decoded tiles.
    batches_read: int = 0  #: Batches requested.
    batches_prefetched: int = 0  #: Batches whose read had started before they were requested.
    batches_late: int = 0  #: Prefetched batches that were incomplete when they were requested.
    batches_deferred: int = 0  #: Times that no batch was prefetched because those in progress filled `lookahead_bytes`.
    chips: int = 0  #: Chips assembled.
    fetch_seconds: float = 0.0  #: Summed over concurrent HTTP requests, so it may exceed the wall time.
    #: Part of `fetch_seconds` from the first byte of a response to its last: bandwidth. The rest is latency.
    body_seconds: float = 0.0
    fetching_seconds: float = 0.0  #: Wall time with at least one request in flight.
    decode_seconds: float = 0.0  #: Summed over decoding threads.
    assemble_seconds: float = 0.0  #: Validity and resampling, summed over threads.
    #: Wall time that the requesting thread spent on planning batches, prefetched ones included.
    plan_seconds: float = 0.0
    blocked_seconds: float = 0.0  #: Wall time that this thread waited for a batch to be read.
    #: Part of `blocked_seconds` with requests in flight and decoding threads idle.
    blocked_network_seconds: float = 0.0
    blocked_decode_seconds: float = 0.0  #: Part of `blocked_seconds` with threads decoding.
    #: Part of `blocked_seconds` with threads assembling chips. In the remainder none of these went on.
    blocked_assemble_seconds: float = 0.0
    sample_seconds: float = 0.0  #: Wall time for making samples of chips, `transforms` included.
    collate_seconds: float = 0.0  #: Wall time of `collate_fn`.

    @property
    def merge_waste(self) -> int:
        """Bytes received and discarded, because they lay between the tiles of a merged request."""
        return self.bytes_fetched - self.bytes_used

    def __sub__(self, other: ReadStats) -> ReadStats:
        return ReadStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def __add__(self, other: ReadStats) -> ReadStats:
        return ReadStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class Meter:
    """Thread-safe counters; `snapshot()` returns a frozen `ReadStats`. `threads` is the size of the decode pool."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._counts: defaultdict[str, Any] = defaultdict(int)
        self._active: dict[Activity, int] = {"wait": 0, "fetch": 0, "decode": 0, "assemble": 0}
        self._since = 0.0

    def add(self, **counts: float) -> None:
        """Add to the named counters (the fields of `ReadStats`)."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def track(self, activity: Activity) -> _Tracked:
        """Return a context manager that counts an activity as going on inside its block."""
        return _Tracked(self, activity)

    def change(self, activity: Activity, by: int) -> None:
        """Change how often an activity goes on at present; see `track`."""
        with self._lock:
            self._account()
            self._active[activity] += by

    def snapshot(self) -> ReadStats:
        """Return the counters up to now; raises TypeError if `add` got a name that is not a field of `ReadStats`."""
        with self._lock:
            self._account()
            return ReadStats(**self._counts)

    def _account(self) -> None:
        """Account for the time since the last change.

        With requests in flight and only some threads busy, the time is theirs by their share of all threads: it is the
        network that keeps the others idle.
        """
        now, counts, active = time.perf_counter(), self._counts, self._active
        passed, self._since = now - self._since, now
        if active["fetch"]:
            counts["fetching_seconds"] += passed
        if not active["wait"]:
            return
        counts["blocked_seconds"] += passed
        busy = active["decode"] + active["assemble"]
        share = 1.0
        if active["fetch"]:
            share = min(1.0, busy / self.threads)
            counts["blocked_network_seconds"] += passed * (1.0 - share)
        if busy:
            counts["blocked_decode_seconds"] += passed * share * active["decode"] / busy
            counts["blocked_assemble_seconds"] += passed * share * active["assemble"] / busy


class _Tracked:
    """The context manager of `Meter.track`; a class, since a generator costs three times as much."""

    __slots__ = ("_activity", "_meter")

    def __init__(self, meter: Meter, activity: Activity) -> None:
        self._meter, self._activity = meter, activity

    def __enter__(self) -> None:
        self._meter.change(self._activity, 1)

    def __exit__(self, *_: object) -> None:
        self._meter.change(self._activity, -1)
