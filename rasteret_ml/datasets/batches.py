"""How every dataset reads a batch: plan, read on this process's loop, assemble samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from torch.utils.data import get_worker_info

from rasteret_ml.datasets.protocol import BatchRequest, ReadableDataset, SampleBatch
from rasteret_ml.raster.read import OnError, ReadResult
from rasteret_ml.raster.worker_loop import WorkerLoop, current_loop
from rasteret_ml.samples.collate import blank_padding
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.sample import Sample

__all__ = ["finish_batch", "get_samples", "process_loop", "read_batch"]


def process_loop() -> WorkerLoop:
    """Return this process's worker loop; the workers of a loader share the machine's cores."""
    info = get_worker_info()
    return current_loop(workers=info.num_workers if info is not None else 1)


def get_samples(dataset: ReadableDataset, queries: Sequence[Any]) -> list[Sample]:
    """Read a sample per query, all together; `__getitems__` of every dataset.

    Samples below their AOI's `min_valid` are read again from its spare places, and padding samples are blanked. Queries
    that come from a `DataLoader` by way of a wrapping dataset bring its reader, which prefetches.

    Raises:
        NoOverlapError: (an IndexError) a query that matches nothing.
        ReadError: a tile could not be read.
    """
    reader = getattr(queries, "reader", None)
    if reader is not None:
        found: list[Sample] = reader.read(dataset, queries)
        return found
    samples = read_batch(dataset, queries).samples
    kept = resample_low_valid(queries, samples, lambda _, spares: read_batch(dataset, spares).samples)
    return blank_padding(queries, [sample for sample in kept if sample is not None], dataset.ignored_classes)


def read_batch(dataset: ReadableDataset, queries: Sequence[Any], on_error: OnError = "raise") -> SampleBatch:
    """Read queries exactly as they are, together."""
    began, loop = time.perf_counter(), process_loop()
    batch = dataset.requests(queries)
    return finish_batch(dataset, batch, loop.start(loop.read(batch.reads, on_error)), loop, began)


def finish_batch(
    dataset: ReadableDataset,
    batch: BatchRequest,
    reading: Future[list[ReadResult]],
    loop: WorkerLoop,
    began: float,
) -> SampleBatch:
    """Wait for a batch that is being read and assemble its samples.

    Args:
        dataset: Whose batch it is.
        batch: What is being read.
        reading: The read, started on `loop`.
        loop: This process's loop.
        began: `time.perf_counter()` when planning began.
    """
    planned = time.perf_counter()
    with loop.meter.track("wait"):
        results = loop.wait(reading)
    read = time.perf_counter()
    samples = dataset.samples(batch, results)
    loop.meter.add(batches_read=1, plan_seconds=planned - began, sample_seconds=time.perf_counter() - read)
    return samples
