"""Where a dataset's bytes come from, and within which bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rasteret_ml.errors import UsageError
from rasteret_ml.fetch.limits import FetchLimits
from rasteret_ml.fetch.open import SignHook, SigningReader
from rasteret_ml.fetch.reader import as_reader
from rasteret_ml.raster.execute import Engine
from rasteret_ml.runtime.worker_loop import WorkerLoop

__all__ = ["Origin"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Origin:
    """What a process reads a dataset with; holds nothing that must not travel to a worker.

    Raises:
        UsageError: a bound below its least.
    """

    sign: SignHook | None
    """Called with each href just before it is read."""
    backend: Any
    """Something else to read from; None = the library's own reader."""
    limits: FetchLimits
    """Timeouts, retries and connections."""
    max_concurrent: int
    """Range requests in flight."""
    cache_bytes: int
    """Decoded tiles kept."""

    def __post_init__(self) -> None:
        """Check."""
        if self.max_concurrent < 1 or self.cache_bytes < 0:
            given = f"{self.max_concurrent}, {self.cache_bytes}"
            raise UsageError(f"max_concurrent is at least 1 and cache_bytes 0, not {given}.")

    def engine(self, loop: WorkerLoop) -> Engine:
        """This process's engine."""
        own = self.backend is None
        reader = loop.reader(self.limits) if own else as_reader(self.backend)
        return Engine(
            reader=reader if self.sign is None else SigningReader(reader, self.sign),
            pool=loop.pool,
            stop_early=True,
            slots=loop.slots(self.max_concurrent),
            tiles=loop.tiles(self.cache_bytes, reader if own else self.backend),
            meter=loop.meter,
        )
