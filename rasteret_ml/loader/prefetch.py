"""Reading batches before they are asked for.

The order is known, so each batch's indices bring those of batches that the same worker will be asked for later. They
are read while the last batch is handed over and the model trains. A hint that is wrong costs bytes, never a wrong
sample: what was read ahead is used only for the very queries, grids and index that it was read for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rasteret_ml.datasets.protocol import BatchReadable, process_loop
from rasteret_ml.geo.grid import Grid
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.loader.failures import Faults, hand_over
from rasteret_ml.loader.recovery import FailureRecovery
from rasteret_ml.raster.worker_loop import WorkerLoop
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.blank import blank_sample, ignored_by_key
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.sample import Sample

__all__ = ["BatchIndices", "Hints", "end_lookahead", "read_batch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What a batch's indices say of later ones."""

    loader: str
    """Which loader asks."""
    epoch: int
    """Which of its passes."""
    number: int
    """Which batch of the pass."""
    ahead: tuple[tuple[int, list[Any]], ...]
    """Later batches for the same worker that it was not told of yet: number and indices of each, ascending."""
    limit: int
    """Bytes of batches that a process may read ahead."""
    errors: ErrorPolicy | None = None
    """What is done about samples that cannot be read; None = they raise."""


class BatchIndices(list[Any]):
    """A batch's indices, for a dataset that can look ahead; a plain list to any other."""

    hints: Hints

    def __init__(self, indices: Sequence[Any], hints: Hints) -> None:
        super().__init__(indices)
        self.hints = hints

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchIndices, (list(self), self.hints)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Started:
    """A batch that is being read, and what it was asked as."""

    queries: list[Any]
    grids: list[Grid]
    index: Any
    size: int
    reading: Future[Any]
    faults: Faults | None

    def serves(self, dataset: BatchReadable, queries: list[Any], grids: list[Grid]) -> bool:
        return self.index is dataset.index and self.grids == grids and self.queries == queries


class _Lookahead:
    """The batches of one loader that are being read in this process."""

    def __init__(self, dataset: BatchReadable, loop: WorkerLoop) -> None:
        self.dataset = dataset
        self.loop = loop
        self.epoch = -1
        self._told: dict[int, list[Any]] = {}
        self._started: dict[int, _Started] = {}

    def take(self, batch: BatchIndices) -> tuple[list[Sample], Faults | None]:
        """The samples of a batch, and what failed where that is noted; the batches that follow are started."""
        began = time.perf_counter()
        hints, queries = batch.hints, list(batch)
        self._hear(hints)
        grids = [self.dataset.chip_grid(query) for query in queries]
        started = self._started.pop(hints.number, None)
        if started is not None and started.serves(self.dataset, queries, grids):
            reading, faults = started.reading, started.faults
            self.loop.meter.add(batches_prefetched=1, batches_late=not reading.done())
        else:
            if started is not None:
                started.reading.cancel()
            faults = _notes(hints)
            reading = self.loop.start(self.dataset.begin(queries, grids, faults))
        self._start_told(hints)
        return _finish(self.dataset, queries, grids, reading, self.loop, began), faults

    def _hear(self, hints: Hints) -> None:
        if hints.epoch != self.epoch:
            self.close()
            self.epoch = hints.epoch
        for number in [n for n in self._started if n < hints.number]:
            self._started.pop(number).reading.cancel()
        self._told.update(hints.ahead)
        for number in [n for n in self._told if n <= hints.number]:
            del self._told[number]

    def _start_told(self, hints: Hints) -> None:
        """Start what fits in memory; one in any case, or large batches would never be read ahead."""
        held = sum(started.size for started in self._started.values())
        for number in sorted(self._told):
            queries = self._told[number]
            try:
                grids = [self.dataset.chip_grid(query) for query in queries]
                size = self.dataset.batch_bytes(grids)
                if self._started and held + size > hints.limit:
                    self.loop.meter.add(batches_deferred=1)
                    return
                faults = _notes(hints)
                reading = self.loop.start(self.dataset.begin(queries, grids, faults))
            except Exception:  # a hint is no request: what is wrong with it is raised when it is asked for
                del self._told[number]
                continue
            del self._told[number]
            held += size
            self._started[number] = _Started(
                queries=queries, grids=grids, index=self.dataset.index, size=size, reading=reading, faults=faults
            )

    def close(self) -> None:
        """Cancel what was started."""
        for started in self._started.values():
            started.reading.cancel()
        self._started.clear()
        self._told.clear()


_open: dict[str, _Lookahead] = {}
"""By loader; of this process."""


def read_batch(dataset: BatchReadable, batch: Sequence[Any]) -> list[Sample]:
    """The samples of a batch on this process's loop, read ahead where the batches before told of it.

    What cannot be read raises, unless the batch's hints bring another policy.
    """
    loop = process_loop()
    if isinstance(batch, BatchIndices):
        samples, faults = _take(dataset, batch, loop)
    else:
        samples, faults = _read(dataset, batch, loop), None
    if isinstance(batch, BatchIndices) and batch.hints.errors is not None and faults is not None:
        samples = _mended(dataset, batch, batch.hints, batch.hints.errors, samples, faults, loop)
    else:
        enough = resample_low_valid(batch, samples, lambda _, spares: _read(dataset, spares, loop))
        samples = [sample for sample in enough if sample is not None]
    return _blank_where_asked(dataset, batch, samples)


def _mended(
    dataset: BatchReadable,
    batch: Sequence[Any],
    hints: Hints,
    policy: ErrorPolicy,
    samples: list[Sample],
    faults: Faults,
    loop: WorkerLoop,
) -> list[Sample]:
    """The samples, also where some could not be read; which ones goes with the batch to the loader."""
    mending = FailureRecovery(
        policy, batch, lambda queries, again: _read(dataset, queries, loop, again), ignored_by_key(dataset)
    )
    whole = mending.mended(samples, faults)
    hand_over(hints.loader, (hints.epoch, hints.number), mending.failures(hints.number))
    return whole


def _blank_where_asked(dataset: BatchReadable, batch: Sequence[Any], samples: list[Sample]) -> list[Sample]:
    """What is there to even out ranks alone counts for nothing."""
    blank = [isinstance(query, AOI) and query.blank for query in batch]
    if not any(blank):
        return samples
    ignored = ignored_by_key(dataset)
    return [blank_sample(sample, ignored) if b else sample for sample, b in zip(samples, blank, strict=True)]


def _read(dataset: BatchReadable, batch: Sequence[Any], loop: WorkerLoop, faults: Faults | None = None) -> list[Sample]:
    began = time.perf_counter()
    grids = [dataset.chip_grid(query) for query in batch]
    return _finish(dataset, batch, grids, loop.start(dataset.begin(batch, grids, faults)), loop, began)


def _finish(
    dataset: BatchReadable,
    queries: Sequence[Any],
    grids: list[Grid],
    reading: Future[Any],
    loop: WorkerLoop,
    began: float,
) -> list[Sample]:
    """The samples of what is being read; what has passed since `began` was planning."""
    planned = time.perf_counter()
    with loop.meter.track("wait"):
        raw = loop.wait(reading)
    read = time.perf_counter()
    samples = dataset.finish(queries, grids, raw)
    loop.meter.add(batches_read=1, plan_seconds=planned - began, sample_seconds=time.perf_counter() - read)
    return samples


def _take(dataset: BatchReadable, batch: BatchIndices, loop: WorkerLoop) -> tuple[list[Sample], Faults | None]:
    held = _open.get(batch.hints.loader)
    if held is None or held.dataset is not dataset or held.loop is not loop:
        held = _open[batch.hints.loader] = _Lookahead(dataset, loop)
    return held.take(batch)


def _notes(hints: Hints) -> Faults | None:
    """Where faults of a batch are noted; None = they raise."""
    return None if hints.errors is None else Faults()


def end_lookahead(loader: str, epoch: int) -> None:
    """Cancel what this process reads ahead for a pass of a loader, where that has not begun another one."""
    held = _open.get(loader)
    if held is not None and held.epoch == epoch:
        held.close()
        del _open[loader]


if hasattr(os, "register_at_fork"):  # a child's loop is its own
    os.register_at_fork(after_in_child=_open.clear)
