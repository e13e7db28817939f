"""Where a loader's time and bytes went, by worker: counters in shared memory, written after each batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from rasteret_ml.loader.bottleneck import Bottleneck, LoaderKnobs, TimeShares, find_bottleneck, time_shares
from rasteret_ml.raster.worker_loop import current_meter, relax_gc
from rasteret_ml.telemetry import ReadStats

__all__ = ["LoaderStats", "StatsBoard", "TimedCollate", "samples_in"]

_COUNTERS = len(fields(ReadStats))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderStats:
    """One pass over a loader, as far as it has come; or a part of one, or several together (`since` and `+`)."""

    batches: int
    """Batches handed over."""
    samples: int = 0
    """Samples in them."""
    waiting_seconds: float
    """Wall time that the consumer waited for batches, the first one's wait (workers start) included."""
    consumer_seconds: float
    """Wall time between batches, until now: the consumer's own."""
    first_seconds: float
    """The wait for the first batch alone."""
    first_samples: int = 0
    """Samples in the first batch."""
    first_read: ReadStats = ReadStats()
    """What all workers had read when the first batch was handed over."""
    first_batches: int = 0
    """1 where the first batch of a pass is among these; more in a sum."""
    workers: tuple[ReadStats, ...]
    """What each worker read; of the main process alone where there are none."""
    knobs: LoaderKnobs = LoaderKnobs()
    """How the loader was set."""
    failures: int = 0
    """Samples that could not be read as they were asked for, where the loader's `errors` lets the pass go on."""
    passes: int = 1
    """Passes begun over the loader, this one included."""

    @property
    def total(self) -> ReadStats:
        """What all workers read."""
        return sum(self.workers, ReadStats())

    @property
    def seconds(self) -> float:
        """Wall time from the first batch on, which all rates and shares are of: starting is no matter of speed."""
        return max(0.0, self.waiting_seconds - self.first_seconds) + self.consumer_seconds

    @property
    def wait_share(self) -> float:
        """Waiting over waiting and consuming, from the second batch on; NaN before."""
        waited = max(0.0, self.waiting_seconds - self.first_seconds)
        return waited / self.seconds if self.batches > self.first_batches and self.seconds else float("nan")

    @property
    def samples_per_second(self) -> float:
        """Samples handed over a second; NaN before the second batch."""
        samples = self.samples - self.first_samples
        return samples / self.seconds if samples and self.seconds else float("nan")

    @property
    def megabytes_per_second(self) -> float:
        """Million bytes received a second; NaN before the second batch."""
        received = (self.total - self.first_read).bytes_fetched
        return received / 1e6 / self.seconds if self.seconds else float("nan")

    @property
    def shares(self) -> TimeShares:
        """Where the time went: to the model, or to what it waited for."""
        return time_shares(self.wait_share, self.total - self.first_read)

    @property
    def bottleneck(self) -> Bottleneck:
        """What limits the speed, and which knob to turn; its text is one sentence."""
        return find_bottleneck(self.wait_share, self.total - self.first_read, self.knobs)

    def since(self, before: LoaderStats) -> LoaderStats:
        """What came after `before`; all of it, where that is of another pass."""
        if before.passes != self.passes:
            return self
        return replace(
            self,
            workers=tuple(a - b for a, b in zip(self.workers, before.workers, strict=True)),
            **{name: getattr(self, name) - getattr(before, name) for name in _SUMS},
        )

    def __add__(self, other: LoaderStats) -> LoaderStats:
        pairs = zip_longest(self.workers, other.workers, fillvalue=ReadStats())
        sums = {name: getattr(self, name) + getattr(other, name) for name in _SUMS}
        return replace(other, workers=tuple(a + b for a, b in pairs), **sums)


_SUMS = (
    "batches", "samples", "waiting_seconds", "consumer_seconds", "first_seconds", "first_samples", "first_read",
    "first_batches", "failures",
)  # fmt: skip


class StatsBoard:
    """A row of counters per worker, read by the process that made them.

    Args:
        workers: Processes that write; 0 = this one reads by itself.
    """

    def __init__(self, workers: int) -> None:
        rows = torch.zeros((workers, _COUNTERS), dtype=torch.float64) if workers else None
        self._rows = rows if rows is None else rows.share_memory_()  # type: ignore[no-untyped-call]
        self._passes = 0
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        return {"_workers": 0 if self._rows is None else len(self._rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_workers"])  # type: ignore[misc]

    def begin(self) -> None:
        """A new pass: everything counts from here."""
        self._before = self._read()
        self._passes += 1
        self._batches, self._waited, self._consumed = 0, 0.0, 0.0
        self._samples, self._first_samples = 0, 0
        self._first, self._first_read = 0.0, ReadStats()
        self._asked = 0.0
        self._handed: float | None = None

    def asked(self) -> None:
        """The consumer begins to wait for a batch."""
        self._asked = time.perf_counter()
        if self._handed is not None:
            self._consumed += self._asked - self._handed
            self._handed = None

    def handed(self, samples: int) -> None:
        """It has its batch, of so many samples."""
        now = time.perf_counter()
        self._waited += now - self._asked
        self._samples += samples
        if not self._batches:
            self._first, self._first_samples = self._waited, samples
            self._first_read = sum(self._of_this_pass(), ReadStats())
        self._batches += 1
        self._handed = now

    def left(self, passes: int) -> None:
        """Nobody takes batches of that pass any more: what happens from now on is not its consumer's."""
        if passes == self._passes:
            self._handed = None

    @property
    def passes(self) -> int:
        """Passes begun."""
        return self._passes

    def reporting(self, also: Callable[[int], Any] | None) -> Any:
        """A `worker_init_fn` that makes a worker write here, and search for cycles rarely; it calls `also`."""
        if self._rows is None:
            return also
        self._rows.zero_()  # new workers count from nothing
        self._before = self._read()
        return partial(_start_worker, self._rows, also)

    def snapshot(self, knobs: LoaderKnobs | None = None, failures: int = 0) -> LoaderStats:
        """The pass as it stands, of a loader that is set like this, and with so many failures."""
        consuming = 0.0 if self._handed is None else time.perf_counter() - self._handed
        return LoaderStats(
            batches=self._batches,
            samples=self._samples,
            waiting_seconds=self._waited,
            consumer_seconds=self._consumed + consuming,
            first_seconds=self._first,
            first_samples=self._first_samples,
            first_read=self._first_read,
            first_batches=min(1, self._batches),
            workers=self._of_this_pass(),
            knobs=knobs or LoaderKnobs(),
            failures=failures,
            passes=self._passes,
        )

    def _of_this_pass(self) -> tuple[ReadStats, ...]:
        return tuple(after - before for after, before in zip(self._read(), self._before, strict=True))

    def _read(self) -> list[ReadStats]:
        if self._rows is None:
            return [current_meter().snapshot()]
        return [ReadStats.from_row(row) for row in self._rows.tolist()]


_row: torch.Tensor | None = None
"""Of this process, where it is a worker."""


def _start_worker(rows: torch.Tensor, also: Callable[[int], Any] | None, worker: int) -> None:
    global _row
    _row = rows[worker]
    relax_gc()
    if also is not None:
        also(worker)


class TimedCollate:
    """A `collate_fn` that is timed, and after which a worker's counters are written where its loader looks.

    Args:
        collate: The one that does the work.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        """The batch."""
        began, meter = time.perf_counter(), current_meter()
        batch = self._collate(samples)
        meter.add(collate_seconds=time.perf_counter() - began)
        if _row is not None:
            _row[:] = torch.tensor(meter.snapshot().as_row(), dtype=torch.float64)
        return batch


def samples_in(batch: Any) -> int:
    """Samples of a batch, by the first axis of its image or else of its first tensor; 0 where there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, Mapping):
        parts = [batch["image"]] if "image" in batch else list(batch.values())
    else:
        parts = list(batch) if isinstance(batch, Sequence) and not isinstance(batch, str) else []
    return next((count for part in parts if (count := samples_in(part))), 0)
