"""Batches: what datasets promise to whoever reads them, and how one is planned, read and assembled.

A dataset shows two pure halves, chip requests for queries and samples from chips; combinations of datasets and the
loader compose these.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from torch.utils.data import get_worker_info

from rasteret_ml.errors import RasteretError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.execute import TileError
from rasteret_ml.raster.read import OnError, ReadResult
from rasteret_ml.raster.worker_loop import Reads, WorkerLoop, current_loop
from rasteret_ml.samples.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchRequest:
    """Everything that a batch needs to read; datasets subclass it with what their `samples` needs to know."""

    queries: Sequence[Any]  #: The queries.
    grids: Sequence[Grid]  #: The grid of each query's chip.
    reads: Reads = ()  #: Chip requests, and how they are read.
    nbytes: int = 0  #: Memory that the batch takes while it is read, roughly.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleBatch:
    """The samples of a batch, and which of them could not be read."""

    samples: list[Sample]  #: One per query; those with errors have the right keys and shapes, but no meaning.
    #: Why samples could not be read, by position; empty unless the read allowed errors.
    errors: dict[int, list[TileError | RasteretError]] = field(default_factory=dict)


class ReadableDataset(Protocol):
    """A dataset whose batches can be planned, read and assembled apart, by a loader or a combination of datasets."""

    index: Any  #: TorchGeo's index.

    @property
    def version(self) -> tuple[Any, ...]:
        """Objects that are replaced, never changed, when the pixels of a query change; compared by identity."""

    @property
    def ignored_classes(self) -> Mapping[str, int]:
        """Class of label pixels that do not count, by key of the labels."""

    def chip_grid(self, query: Any) -> Grid:
        """Return the grid of a query's chip."""

    def requests(self, queries: Sequence[Any], grids: Sequence[Grid] | None = None) -> BatchRequest:
        """Plan the read of slices or AOIs, on grids in any CRS (None = the dataset's own); requests no pixels.

        Raises NoOverlapError if a query matches nothing, UsageError if it is not a query.
        """

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Turn the chips of what `requests` returned, one result for each of its `reads`, into samples."""


def is_readable(dataset: Any) -> TypeGuard[ReadableDataset]:
    """Return whether a dataset is a `ReadableDataset`; a stock TorchGeo dataset is not."""
    return hasattr(dataset, "requests") and hasattr(dataset, "samples")


def process_loop() -> WorkerLoop:
    """Return this process's worker loop; the workers of a loader share the machine's cores."""
    info = get_worker_info()
    return current_loop(workers=info.num_workers if info is not None else 1)


def read_batch(dataset: ReadableDataset, queries: Sequence[Any], on_error: OnError = "raise") -> SampleBatch:
    """Read queries exactly as they are, together."""
    began, loop = time.perf_counter(), process_loop()
    batch = dataset.requests(queries)
    return finish_batch(dataset, batch, loop.start(loop.read(batch.reads, on_error)), loop, began)


def finish_batch(
    dataset: ReadableDataset, batch: BatchRequest, reading: Future[list[ReadResult]], loop: WorkerLoop, began: float
) -> SampleBatch:
    """Wait for a batch that is being read on this process's loop and assemble its samples.

    `began` is `time.perf_counter()` when planning began.
    """
    planned = time.perf_counter()
    with loop.meter.track("wait"):
        results = loop.wait(reading)
    read = time.perf_counter()
    samples = dataset.samples(batch, results)
    loop.meter.add(batches_read=1, plan_seconds=planned - began, sample_seconds=time.perf_counter() - read)
    return samples
