"""Where a loader's time and bytes went, by worker: counters in shared memory, written after each batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from rasteret_ml.runtime.worker_loop import current_meter
from rasteret_ml.telemetry import ReadStats

__all__ = ["LoaderStats", "StatsBoard", "report_stats"]

_COUNTERS = len(fields(ReadStats))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderStats:
    """One pass over a loader, as far as it has come."""

    batches: int
    """Batches handed over."""
    waiting_seconds: float
    """Wall time that the consumer waited for batches, the first one's wait (workers start) included."""
    first_seconds: float
    """The wait for the first batch alone."""
    consumer_seconds: float
    """Wall time between batches: the consumer's own."""
    workers: tuple[ReadStats, ...]
    """What each worker read; of the main process alone where there are none."""

    @property
    def total(self) -> ReadStats:
        """What all workers read."""
        return sum(self.workers, ReadStats())

    @property
    def wait_share(self) -> float:
        """Waiting over waiting and consuming, from the second batch on; NaN before."""
        waited = self.waiting_seconds - self.first_seconds
        whole = waited + self.consumer_seconds
        return waited / whole if whole else float("nan")


class StatsBoard:
    """A row of counters per worker, read by the process that made them.

    Args:
        workers: Processes that write; 0 = this one reads by itself.
    """

    def __init__(self, workers: int) -> None:
        rows = torch.zeros((workers, _COUNTERS), dtype=torch.float64) if workers else None
        self._rows = rows if rows is None else rows.share_memory_()  # type: ignore[no-untyped-call]
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        return {"_workers": 0 if self._rows is None else len(self._rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_workers"])  # type: ignore[misc]

    def begin(self) -> None:
        """A new pass: everything counts from here."""
        self._before = self._read()
        self._batches, self._waited, self._first, self._consumed = 0, 0.0, 0.0, 0.0
        self._asked = 0.0
        self._handed: float | None = None

    def asked(self) -> None:
        """The consumer begins to wait for a batch."""
        self._asked = time.perf_counter()
        if self._handed is not None:
            self._consumed += self._asked - self._handed
            self._handed = None

    def handed(self) -> None:
        """It has its batch."""
        self._handed = time.perf_counter()
        self._waited += self._handed - self._asked
        if not self._batches:
            self._first = self._waited
        self._batches += 1

    def reporting(self, also: Callable[[int], Any] | None) -> Any:
        """A `worker_init_fn` that makes a worker write here; it calls `also`."""
        if self._rows is None:
            return also
        self._rows.zero_()  # new workers count from nothing
        return partial(_start_reporting, self._rows, also)

    def snapshot(self) -> LoaderStats:
        """The pass as it stands."""
        now = self._read()
        return LoaderStats(
            batches=self._batches,
            waiting_seconds=self._waited,
            first_seconds=self._first,
            consumer_seconds=self._consumed,
            workers=tuple(after - before for after, before in zip(now, self._before, strict=True)),
        )

    def _read(self) -> list[ReadStats]:
        if self._rows is None:
            return [current_meter().snapshot()]
        return [ReadStats.from_row(row) for row in self._rows.tolist()]


_row: torch.Tensor | None = None
"""Of this process, where it is a worker."""


def _start_reporting(rows: torch.Tensor, also: Callable[[int], Any] | None, worker: int) -> None:
    global _row
    _row = rows[worker]
    if also is not None:
        also(worker)


def report_stats(stats: Callable[[], ReadStats]) -> None:
    """Write what this process has read where its loader looks; nothing where nobody does."""
    if _row is not None:
        _row[:] = torch.tensor(stats().as_row(), dtype=torch.float64)
