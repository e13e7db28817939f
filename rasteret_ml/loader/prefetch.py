"""Read batches before they are asked for.

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

from rasteret_ml.datasets.batches import finish_batch, get_samples, process_loop, read_batch
from rasteret_ml.datasets.protocol import BatchRequest, ReadableDataset, SampleBatch
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.loader.recovery import FailureRecovery
from rasteret_ml.raster.read import OnError, ReadResult
from rasteret_ml.raster.worker_loop import WorkerLoop
from rasteret_ml.samples.blank import blank_padding
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.sample import Sample

__all__ = ["BatchIndices", "Hints", "PrefetchingDataset"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What a batch's indices say about later batches."""

    epoch: int
    """Number of the loader's pass."""
    number: int
    """Number of the batch in the pass."""
    ahead: tuple[tuple[int, list[Any]], ...]
    """Later batches of the same worker that it was not told before: number and indices of each, ascending."""


class BatchIndices(list[Any]):
    """A batch's indices with hints; a plain list to any other dataset."""

    hints: Hints

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

    The loader makes one for each set of workers; it travels to them empty.

    Args:
        dataset: What is read.
        max_bytes: Bytes of batches that this process may read ahead; one batch in any case.
        errors: What is done about samples that cannot be read; None = they raise.
    """

    def __init__(self, dataset: ReadableDataset, max_bytes: int, errors: ErrorPolicy | None) -> None:
        self.dataset = dataset
        self._max_bytes = max_bytes
        self._errors = errors
        self._on_error: OnError = "raise" if errors is None else "drop"
        self._forget()

    def _forget(self) -> None:
        self._loop: WorkerLoop | None = None
        self._epoch = -1
        self._ahead: dict[int, list[Any]] = {}
        self._planned: dict[int, _Planned] = {}
        self._prefetched: dict[int, _Prefetched] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "max_bytes": self._max_bytes, "errors": self._errors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, query: Any) -> Sample:
        """Read one sample, for loaders without batches."""
        return get_samples(self.dataset, [query])[0]

    def __getitems__(self, queries: Sequence[Any]) -> list[Sample]:
        """Return the samples of a batch, prefetched where the batches before announced it."""
        if not isinstance(queries, BatchIndices):
            return get_samples(self.dataset, queries)
        found = self._take(list(queries), queries.hints)
        ignored = self.dataset.ignored_classes
        if self._errors is None:
            read = resample_low_valid(
                queries, found.samples, lambda _, spares: read_batch(self.dataset, spares).samples
            )
            return blank_padding(queries, [sample for sample in read if sample is not None], ignored)
        recovery = FailureRecovery(
            self._errors, queries, lambda again: read_batch(self.dataset, again, "drop"), ignored
        )
        samples = recovery.recover(found, queries.hints.number)
        samples[:] = blank_padding(queries, samples, ignored)
        return samples

    def _take(self, queries: list[Any], hints: Hints) -> SampleBatch:
        """Read a batch, or wait for it where it was prefetched, and start the batches that follow."""
        began, loop = time.perf_counter(), process_loop()
        self._update(hints, loop)
        prefetched = self._prefetched.pop(hints.number, None)
        if prefetched is not None and prefetched.serves(self.dataset, queries):
            loop.meter.add(batches_ahead=1, batches_late=not prefetched.reading.done())
        else:
            if prefetched is not None:
                prefetched.reading.cancel()
            prefetched = self._start(self._plan(queries), loop)
        self._start_ahead(loop)
        return finish_batch(self.dataset, prefetched.batch, prefetched.reading, loop, began)

    def _plan(self, queries: list[Any]) -> _Planned:
        version = self.dataset.version
        return _Planned(batch=self.dataset.requests(queries), version=version)

    def _start(self, planned: _Planned, loop: WorkerLoop) -> _Prefetched:
        reading = loop.start(loop.read(planned.batch.reads, self._on_error))
        return _Prefetched(batch=planned.batch, version=planned.version, reading=reading)

    def _update(self, hints: Hints, loop: WorkerLoop) -> None:
        """Drop what belongs to another pass, another loop or an earlier batch, and take new hints."""
        if loop is not self._loop:  # closed, which cancelled its reads, or another process's
            self._forget()
        elif hints.epoch != self._epoch:
            self.close()
        self._epoch, self._loop = hints.epoch, loop
        for number in [n for n in self._prefetched if n < hints.number]:
            self._prefetched.pop(number).reading.cancel()
        self._ahead.update(hints.ahead)
        for number in [n for n in self._ahead if n <= hints.number]:
            del self._ahead[number]
            self._planned.pop(number, None)

    def _start_ahead(self, loop: WorkerLoop) -> None:
        """Start the batches that fit in memory; one in any case, or large batches would never be prefetched."""
        size = sum(prefetched.batch.nbytes for prefetched in self._prefetched.values())
        for number in sorted(self._ahead):
            try:
                planned = self._planned.get(number) or self._plan(self._ahead[number])
                if self._prefetched and size + planned.batch.nbytes > self._max_bytes:
                    self._planned[number] = planned
                    loop.meter.add(batches_held=1)
                    return
                self._prefetched[number] = self._start(planned, loop)
                size += planned.batch.nbytes
            except Exception:  # a hint is not a request: its errors are raised when the batch is asked for
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
