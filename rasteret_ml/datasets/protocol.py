"""One loop run for a whole batch, of one dataset or of several combined."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from torch.utils.data import get_worker_info

from rasteret_ml.geo.grid import Grid
from rasteret_ml.loader.failures import Faults
from rasteret_ml.raster.worker_loop import WorkerLoop, current_loop
from rasteret_ml.samples.sample import Sample

__all__ = ["BatchReadable", "Reading", "process_loop"]

Reading = Callable[[WorkerLoop], Coroutine[Any, Any, Any]]
"""What a batch needs from the loop, ready to be started on it."""


class BatchReadable(Protocol):
    """A dataset that reads a batch in two halves, so that several can share one run of the loop."""

    index: Any
    """TorchGeo's index; another one means other samples."""

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""

    def batch_bytes(self, grids: Sequence[Grid]) -> int:
        """Memory that a batch takes while it is read, about."""

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid], faults: Faults | None = None) -> Reading:
        """Plan (in the caller's thread) and give the work for the loop.

        With `faults`, data that cannot be read are noted there, up to the end of `finish`, instead of raised.
        """

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Turn that work's result into samples (in the caller's thread)."""


def process_loop() -> WorkerLoop:
    """This process's loop; among a loader's workers the cores are shared out."""
    info = get_worker_info()
    return current_loop(workers=info.num_workers if info is not None else 1)
