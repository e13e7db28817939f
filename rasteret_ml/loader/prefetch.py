"""Read batches before they are requested.

The order of batches is known, so the indices of each batch bring those of the batches that the same worker will be
asked for later; they are read while the last batch is collated and the model trains. A wrong hint costs bytes, never a
wrong sample: a prefetched batch is used only for exactly the queries, and the version of the dataset, it was read for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from rasteret_ml.datasets.batches import (
    BatchRequest,
    ReadableDataset,
    SampleBatch,
    finish_batch,
    is_readable,
    process_loop,
    read_batch,
)
from rasteret_ml.loader.failures import ErrorPolicy, SampleError
from rasteret_ml.loader.recovery import FailureRecovery
from rasteret_ml.raster.read import ReadResult
from rasteret_ml.raster.worker_loop import WorkerLoop
from rasteret_ml.samples.collate import blank_padding
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.sample import Sample

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What a batch's indices say about later batches."""

    epoch: int  #: Number of the loader's pass.
    number: int  #: Number of the batch in the pass.
    #: Later batches of the same worker that no hint named before: number and indices of each, ascending.
    ahead: tuple[tuple[int, list[Any]], ...]


class BatchIndices(list[Any]):
    """A batch's indices with hints; a plain list to any other dataset."""

    hints: Hints
    #: Reads the batch, for a wrapping dataset that hands it on to one of this library.
    reader: PrefetchingDataset | None = None

    def __init__(self, indices: Sequence[Any], hints: Hints) -> None:
        super().__init__(indices)
        self.hints = hints

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchIndices, (list(self), self.hints)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Planned:
    """A planned batch, and the version of the dataset that planned it."""

    batch: BatchRequest
    version: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Prefetched(_Planned):
    """A batch that is being read."""

    reading: Future[list[ReadResult]]

    def serves(self, dataset: ReadableDataset, queries: list[Any]) -> bool:
        version = dataset.version
        same = len(version) == len(self.version) and all(a is b for a, b in zip(version, self.version, strict=True))
        return same and self.batch.queries == queries


class PrefetchingDataset:
    """A dataset as torch's fetcher sees it in the process that reads: it prefetches, and recovers failed samples.

    The loader makes one for each set of workers; it is pickled to them without any prefetch state. A dataset that is
    not of this library is read as it is. This process may read ahead `max_bytes` of batches, and one batch in any case.
    Without a policy, samples that cannot be read raise.
    """

    def __init__(self, dataset: Any, max_bytes: int, policy: ErrorPolicy | None) -> None:
        self.dataset = dataset
        self._max_bytes = max_bytes
        self._policy = policy
        self._errors: list[SampleError] = []
        self._forget()

    def _forget(self) -> None:
        self._source: tuple[ReadableDataset, WorkerLoop] | None = None
        self._epoch = -1
        self._ahead: dict[int, list[Any]] = {}
        self._planned: dict[int, _Planned] = {}
        self._prefetched: dict[int, _Prefetched] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return PrefetchingDataset, (self.dataset, self._max_bytes, self._policy)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, query: Any) -> Any:
        """Read one sample, for loaders without batches."""
        return self.dataset[query]

    def __getitems__(self, queries: Sequence[Any]) -> list[Any]:
        """Return the samples of a batch."""
        self._errors.clear()
        if isinstance(queries, BatchIndices):
            if is_readable(self.dataset) and not _overrides_getitems(self.dataset):
                return self.read(self.dataset, queries)
            queries.reader = self
        batched = getattr(self.dataset, "__getitems__", None)
        return [self.dataset[query] for query in queries] if batched is None else list(batched(queries))

    def take_errors(self) -> tuple[SampleError, ...]:
        """Return the errors of the last batch, once."""
        errors = tuple(self._errors)
        self._errors.clear()
        return errors

    def read(self, dataset: ReadableDataset, queries: BatchIndices) -> list[Sample]:
        """Read a batch of `dataset`, prefetched where the batches before announced it."""
        found = self._take(dataset, list(queries), queries.hints)
        ignored = dataset.ignored_classes
        if self._policy is None:
            read = resample_low_valid(queries, found.samples, lambda _, spares: read_batch(dataset, spares).samples)
            samples = [sample for sample in read if sample is not None]
        else:
            recovery = FailureRecovery(self._policy, queries, lambda again: read_batch(dataset, again, "drop"), ignored)
            samples, errors = recovery.recover(found, queries.hints.number)
            self._errors += errors
        return blank_padding(queries, samples, ignored)

    def _take(self, dataset: ReadableDataset, queries: list[Any], hints: Hints) -> SampleBatch:
        """Read a batch, or wait for it where it was prefetched, and start the batches that follow."""
        began, loop = time.perf_counter(), process_loop()
        self._update(hints, dataset, loop)
        prefetched = self._prefetched.pop(hints.number, None)
        if prefetched is not None and prefetched.serves(dataset, queries):
            loop.meter.add(batches_prefetched=1, batches_late=not prefetched.reading.done())
        else:
            if prefetched is not None:
                prefetched.reading.cancel()
            prefetched = self._start(self._plan(dataset, queries), loop)
        self._start_ahead(dataset, loop)
        return finish_batch(dataset, prefetched.batch, prefetched.reading, loop, began)

    def _plan(self, dataset: ReadableDataset, queries: list[Any]) -> _Planned:
        version = dataset.version
        return _Planned(batch=dataset.requests(queries), version=version)

    def _start(self, planned: _Planned, loop: WorkerLoop) -> _Prefetched:
        reading = loop.start(loop.read(planned.batch.reads, "raise" if self._policy is None else "drop"))
        return _Prefetched(batch=planned.batch, version=planned.version, reading=reading)

    def _update(self, hints: Hints, dataset: ReadableDataset, loop: WorkerLoop) -> None:
        """Drop what belongs to another pass, another loop or an earlier batch, and take new hints."""
        if self._source is not None and loop is not self._source[1]:
            self._forget()  # of a closed loop, which cancelled its reads, or of another process
        elif hints.epoch != self._epoch or (self._source is not None and dataset is not self._source[0]):
            self.close()
        self._epoch, self._source = hints.epoch, (dataset, loop)
        for number in [n for n in self._prefetched if n < hints.number]:
            self._prefetched.pop(number).reading.cancel()
        self._ahead.update(hints.ahead)
        for number in [n for n in self._ahead if n <= hints.number]:
            del self._ahead[number]
            self._planned.pop(number, None)

    def _start_ahead(self, dataset: ReadableDataset, loop: WorkerLoop) -> None:
        """Start the batches that fit in memory; one in any case, or large batches would never be prefetched."""
        size = sum(prefetched.batch.nbytes for prefetched in self._prefetched.values())
        for number in sorted(self._ahead):
            try:
                planned = self._planned.get(number) or self._plan(dataset, self._ahead[number])
                if self._prefetched and size + planned.batch.nbytes > self._max_bytes:
                    self._planned[number] = planned
                    loop.meter.add(batches_deferred=1)
                    return
                self._prefetched[number] = self._start(planned, loop)
                size += planned.batch.nbytes
            except Exception:  # the errors are raised when the batch itself is requested
                _log.debug("batch %d was not prefetched", number, exc_info=True)
            del self._ahead[number]
            self._planned.pop(number, None)

    def close(self, epoch: int | None = None) -> None:
        """Cancel the prefetched batches; with `epoch`, only if they belong to that pass."""
        if epoch is not None and epoch != self._epoch:
            return
        for prefetched in self._prefetched.values():
            prefetched.reading.cancel()
        self._forget()


def _overrides_getitems(dataset: Any) -> bool:
    """Return whether a user's subclass has a `__getitems__` of its own, which then reads by way of `queries.reader`."""
    return not type(dataset).__getitems__.__module__.startswith("rasteret_ml.")
