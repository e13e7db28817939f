"""How a loader spent its time, and what its workers read: counters in shared memory, written after each batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

from rasteret_ml.loader.bottleneck import Bottleneck, LoaderSettings, TimeShares, find_bottleneck, time_shares
from rasteret_ml.raster.worker_loop import current_meter, relax_gc
from rasteret_ml.telemetry import ReadStats

_COUNTERS = len(fields(ReadStats))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderStats:
    """A pass over a loader so far; or a part of one (`since`), or several together (`+`)."""

    batches: int  #: Batches handed over.
    samples: int = 0  #: Samples in them.
    #: Wall time that the consumer waited for batches, the wait for the first one (workers start) included.
    waiting_seconds: float
    consumer_seconds: float  #: Wall time of the consumer itself: between batches, and since the last one.
    first_seconds: float  #: Wall time that the consumer waited for the first batch.
    first_samples: int = 0  #: Samples in the first batch.
    first_read: ReadStats = ReadStats()  #: What all workers had read when the first batch was handed over.
    first_batches: int = 0  #: Number of batches that are the first of a pass: 0 or 1; more in a sum.
    workers: tuple[ReadStats, ...]  #: What each worker read; without workers, what the main process read.
    settings: LoaderSettings = LoaderSettings()  #: The loader's options.
    failures: int = 0  #: Samples that could not be read as requested, where the loader's `errors` lets the pass go on.
    passes: int = 1  #: Number of passes over the loader, this one included.

    @property
    def total(self) -> ReadStats:
        """What all workers read."""
        return sum(self.workers, ReadStats())

    @property
    def seconds(self) -> float:
        """Wall time since the first batch, to which all rates and shares refer; the time to start does not count."""
        return max(0.0, self.waiting_seconds - self.first_seconds) + self.consumer_seconds

    @property
    def wait_share(self) -> float:
        """Share of `seconds` that the consumer waited; NaN before the second batch."""
        waited = max(0.0, self.waiting_seconds - self.first_seconds)
        return waited / self.seconds if self.batches > self.first_batches and self.seconds else float("nan")

    @property
    def samples_per_second(self) -> float:
        """Samples per second; NaN before the second batch."""
        samples = self.samples - self.first_samples
        return samples / self.seconds if samples and self.seconds else float("nan")

    @property
    def megabytes_per_second(self) -> float:
        """Megabytes (10**6) received per second; NaN before the second batch."""
        received = (self.total - self.first_read).bytes_fetched
        return received / 1e6 / self.seconds if self.seconds else float("nan")

    @property
    def shares(self) -> TimeShares:
        """Shares of the time: the model's own, and what it waited for."""
        return time_shares(self.wait_share, self.total - self.first_read)

    @property
    def bottleneck(self) -> Bottleneck:
        """What limits the speed, and which option to change; as text, one sentence."""
        return find_bottleneck(self.wait_share, self.total - self.first_read, self.settings)

    def since(self, before: LoaderStats) -> LoaderStats:
        """Return what came after `before`; if that is of another pass, all of this one."""
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
    """Times of the consumer, and a row of counters per worker in shared memory.

    Args:
        workers: Processes that write rows; 0 = this process reads by itself.
    """

    def __init__(self, workers: int) -> None:
        rows = torch.zeros((workers, _COUNTERS), dtype=torch.float64) if workers else None
        self._rows = rows if rows is None else rows.share_memory_()  # type: ignore[no-untyped-call]
        self._passes = 0
        self.start_pass()

    def __getstate__(self) -> dict[str, Any]:
        return {"_workers": 0 if self._rows is None else len(self._rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_workers"])  # type: ignore[misc]

    def start_pass(self) -> None:
        """Start a pass: reset all counts."""
        self._before = self._read()
        self._passes += 1
        self._batches, self._waited, self._consumed = 0, 0.0, 0.0
        self._samples, self._first_samples = 0, 0
        self._first, self._first_read = 0.0, ReadStats()
        self._wait_began = 0.0
        self._consuming_since: float | None = None

    def start_wait(self) -> None:
        """Note that the consumer begins to wait for a batch."""
        self._wait_began = time.perf_counter()
        if self._consuming_since is not None:
            self._consumed += self._wait_began - self._consuming_since
            self._consuming_since = None

    def end_wait(self, samples: int) -> None:
        """Note that the consumer has its batch, and its number of samples."""
        now = time.perf_counter()
        self._waited += now - self._wait_began
        self._samples += samples
        if not self._batches:
            self._first, self._first_samples = self._waited, samples
            self._first_read = sum(self._pass_reads(), ReadStats())
        self._batches += 1
        self._consuming_since = now

    def abandon(self, passes: int) -> None:
        """Note that nobody takes batches of a pass any more: time from now on is not its consumer's."""
        if passes == self._passes:
            self._consuming_since = None

    @property
    def passes(self) -> int:
        """Number of passes started."""
        return self._passes

    def worker_init(self, init: Callable[[int], Any] | None) -> Any:
        """Return a `worker_init_fn` that lets a worker write its row and run Python's cyclic GC less often.

        Args:
            init: The loader's own, which it calls.
        """
        if self._rows is None:
            return init
        self._rows.zero_()  # new workers count from 0
        self._before = self._read()
        return partial(_init_worker, self._rows, init)

    def snapshot(self, settings: LoaderSettings | None = None, failures: int = 0) -> LoaderStats:
        """Return the statistics of the pass so far.

        Args:
            settings: The loader's options.
            failures: Samples that could not be read.
        """
        consuming = 0.0 if self._consuming_since is None else time.perf_counter() - self._consuming_since
        return LoaderStats(
            batches=self._batches,
            samples=self._samples,
            waiting_seconds=self._waited,
            consumer_seconds=self._consumed + consuming,
            first_seconds=self._first,
            first_samples=self._first_samples,
            first_read=self._first_read,
            first_batches=min(1, self._batches),
            workers=self._pass_reads(),
            settings=settings or LoaderSettings(),
            failures=failures,
            passes=self._passes,
        )

    def _pass_reads(self) -> tuple[ReadStats, ...]:
        return tuple(after - before for after, before in zip(self._read(), self._before, strict=True))

    def _read(self) -> list[ReadStats]:
        if self._rows is None:
            return [current_meter().snapshot()]
        return [ReadStats.from_row(row) for row in self._rows.tolist()]


_row: torch.Tensor | None = None  # The counters of this process, if it is a worker.


def _init_worker(rows: torch.Tensor, init: Callable[[int], Any] | None, worker: int) -> None:
    global _row
    _row = rows[worker]
    relax_gc()
    if init is not None:
        init(worker)


class TimedCollate:
    """A `collate_fn` that measures another one, and then writes a worker's counters for its loader.

    Args:
        collate: The function that collates.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        """Collate."""
        began, meter = time.perf_counter(), current_meter()
        batch = self._collate(samples)
        meter.add(collate_seconds=time.perf_counter() - began)
        if _row is not None:
            _row[:] = torch.tensor(meter.snapshot().as_row(), dtype=torch.float64)
        return batch


def samples_in(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its image, or else of its first tensor; 0 without any."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, Mapping):
        parts = [batch["image"]] if "image" in batch else list(batch.values())
    else:
        parts = list(batch) if isinstance(batch, Sequence) and not isinstance(batch, str) else []
    return next((count for part in parts if (count := samples_in(part))), 0)
