"""One loop run for a whole batch, of one dataset or of several combined."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from torch.utils.data import get_worker_info

from rasteret_ml.geo.grid import Grid
from rasteret_ml.runtime.worker_loop import WorkerLoop, current_loop
from rasteret_ml.train.sample import Sample

__all__ = ["BatchReadable", "Reading", "read_batch"]

Reading = Callable[[WorkerLoop], Coroutine[Any, Any, Any]]
"""What a batch needs from the loop, ready to be started on it."""


class BatchReadable(Protocol):
    """A dataset that reads a batch in two halves, so that several can share one run of the loop."""

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading:
        """Plan (in the caller's thread) and give the work for the loop."""

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Turn that work's result into samples (in the caller's thread)."""


def read_batch(dataset: BatchReadable, queries: Sequence[Any], grids: Sequence[Grid]) -> list[Sample]:
    """Run both halves on this process's loop."""
    info = get_worker_info()
    loop = current_loop(workers=info.num_workers if info is not None else 1)
    return dataset.finish(queries, grids, loop.run(dataset.begin(queries, grids)))
