"""How a loader spent its time, and what its workers read: counters in shared memory, written after each batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from itertools import zip_longest
from typing import Any

import torch
from torch.utils.data import get_worker_info

from rasteret_ml.loader.bottleneck import Bottleneck, LoaderSettings, TimeShares, find_bottleneck, time_shares
from rasteret_ml.raster.worker_loop import current_meter
from rasteret_ml.telemetry import ReadStats


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderStats:
    """A pass over a loader so far; or a part of one (`since`), or several together (`+`)."""

    batches: int = 0  #: Batches handed over.
    samples: int = 0  #: Samples in them.
    #: Wall time that the consumer waited for batches, the wait for the first one (workers start) included.
    waiting_seconds: float = 0.0
    consumer_seconds: float = 0.0  #: Wall time of the consumer itself: between batches, and since the last one.
    first_seconds: float = 0.0  #: Wall time that the consumer waited for the first batch.
    first_samples: int = 0  #: Samples in the first batch.
    first_read: ReadStats = ReadStats()  #: What all workers had read when the first batch was handed over.
    first_batches: int = 0  #: Number of batches that are the first of a pass: 0 or 1; more in a sum.
    workers: tuple[ReadStats, ...] = ()  #: What each worker read; without workers, what the main process read.
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


_SUMS = [field.name for field in fields(LoaderStats) if field.name not in ("workers", "settings", "passes")]


class StatsBoard:
    """Times of the consumer, and a row of counters per worker in shared memory; without workers, of this process."""

    def __init__(self, workers: int) -> None:
        rows = torch.zeros((workers, len(fields(ReadStats))), dtype=torch.float64) if workers else None
        self._rows = rows if rows is None else rows.share_memory_()  # type: ignore[no-untyped-call]
        self._stats = LoaderStats(passes=0)
        self.start_pass()

    def __reduce__(self) -> tuple[Any, ...]:
        return StatsBoard, (0 if self._rows is None else len(self._rows),)

    def start_pass(self) -> int:
        """Reset all counts: the consumer begins to wait for the first batch of a pass. Return the pass's number."""
        self._before = self._read()
        self._stats = LoaderStats(passes=self._stats.passes + 1)
        self._wait_began = time.perf_counter()
        self._consuming_since: float | None = None
        return self._stats.passes

    def start_wait(self) -> None:
        """Note that the consumer begins to wait for a batch."""
        self._wait_began = time.perf_counter()
        self._stats = self._consumed(self._wait_began)
        self._consuming_since = None

    def end_wait(self, samples: int) -> None:
        """Note that the consumer has its batch, and its number of samples."""
        now, stats = time.perf_counter(), self._stats
        waited = stats.waiting_seconds + (now - self._wait_began)
        if not stats.batches:
            read = sum(self._pass_reads(), ReadStats())
            stats = replace(stats, first_seconds=waited, first_samples=samples, first_read=read, first_batches=1)
        self._stats = replace(stats, batches=stats.batches + 1, samples=stats.samples + samples, waiting_seconds=waited)
        self._consuming_since = now

    def _consumed(self, now: float) -> LoaderStats:
        """Return the statistics with the consumer's time up to now."""
        if self._consuming_since is None:
            return self._stats
        return replace(self._stats, consumer_seconds=self._stats.consumer_seconds + (now - self._consuming_since))

    def abandon(self, number: int) -> None:
        """Stop counting the consumer's time of pass `number`, whose iterator was dropped."""
        if number == self._stats.passes:
            self._consuming_since = None

    def new_rows(self) -> torch.Tensor | None:
        """Return the rows, by worker, for new workers, which count from 0; None without workers."""
        if self._rows is not None:
            self._rows.zero_()
            self._before = self._read()
        return self._rows

    def snapshot(self) -> LoaderStats:
        """Return the statistics of the pass so far, without what only the loader knows: its options and failures."""
        return replace(self._consumed(time.perf_counter()), workers=self._pass_reads())

    def _pass_reads(self) -> tuple[ReadStats, ...]:
        return tuple(after - before for after, before in zip(self._read(), self._before, strict=True))

    def _read(self) -> list[ReadStats]:
        if self._rows is None:
            return [current_meter().snapshot()]
        return [_from_row(row) for row in self._rows.tolist()]


def _from_row(row: list[float]) -> ReadStats:
    named = zip(fields(ReadStats), row, strict=True)
    counts: dict[str, Any] = {f.name: float(v) if f.type == "float" else int(v) for f, v in named}
    return ReadStats(**counts)


class TimedCollate:
    """A `collate_fn` that times another one, and then copies its worker's counters to shared memory."""

    def __init__(self, collate: Callable[[Any], Any], rows: torch.Tensor | None) -> None:
        self._collate = collate
        self._rows = rows

    def __call__(self, samples: Any) -> Any:
        """Collate."""
        began, meter = time.perf_counter(), current_meter()
        batch = self._collate(samples)
        meter.add(collate_seconds=time.perf_counter() - began)
        worker = get_worker_info()
        if self._rows is not None and worker is not None:
            self._rows[worker.id] = torch.tensor(astuple(meter.snapshot()), dtype=torch.float64)
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
