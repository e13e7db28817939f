"""How fast patches come, and how long the model waits for them."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl

__all__ = ["Throughput"]


class Throughput(pl.Callback):
    """Measures training: patches a second and the share of time spent waiting for data.

    `wait_share` is the time between the end of one training step and the start of the next, over all the time
    from the first batch on. The first step of each epoch is left out, because it includes starting workers and
    validating.
    """

    def __init__(self) -> None:
        self.patches = 0
        self.waited = 0.0
        self.worked = 0.0
        self._ended: float | None = None
        self._began = 0.0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """A new epoch: its first wait does not count."""
        self._ended = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Data is here."""
        self._began = time.perf_counter()
        if self._ended is not None:
            self.waited += self._began - self._ended

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """The step is done."""
        now = time.perf_counter()
        if self._ended is not None:
            self.worked += now - self._began
            self.patches += len(batch["image"])
        self._ended = now

    @property
    def patches_per_second(self) -> float:
        """Training patches a second, waiting included."""
        total = self.waited + self.worked
        return self.patches / total if total else float("nan")

    @property
    def wait_share(self) -> float:
        """Waiting for data over waiting and working."""
        total = self.waited + self.worked
        return self.waited / total if total else float("nan")
