"""Where training time goes: logged, and said in one sentence."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from rasteret_ml.loader.bottleneck import Bottleneck, TimeShares, time_shares
from rasteret_ml.loader.loader import DataLoader
from rasteret_ml.loader.stats import LoaderStats, StatsBoard, samples_in

__all__ = ["LoaderMonitor"]


class LoaderMonitor(pl.Callback):
    """Logs how fast samples come and what the model waits for, to each of the trainer's loggers.

    Each time what happened since the last time, validation and the wait for an epoch's first batch left out:

    | metric | meaning |
    | --- | --- |
    | `data/samples_per_second` | training samples a second, waiting included |
    | `data/wait_share` | share of the time that the model waits for data |
    | `data/model_share`, and `network`, `decode`, `collate` and `other` likewise | the `TimeShares`, which sum to 1 |
    | `data/megabytes_per_second` | million bytes received a second |
    | `data/requests`, `data/retries` | range requests answered, and attempts beyond the first |
    | `data/cache_hits` | tiles taken from the cache of decoded tiles |
    | `data/failures` | samples that could not be read, where the loader's error policy let training go on |

    At the end of an epoch whose limit is another than that of the last one, it says so in one sentence
    (`LoaderStats.bottleneck`). Of a loader that is not a `rasteret_ml.DataLoader`, or of several in one trainer, the
    first two are known. Under DDP each rank watches its own loader, and loggers write what rank zero saw. Times are
    the host's: where a step only queues work for a GPU, the wait for that work counts where the host comes to it.

    Args:
        every_n_steps: Training batches between two logs; None = the trainer's `log_every_n_steps`.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._steps, self._axis = 0, 0
        self._board = StatsBoard(0)
        self._loader: DataLoader | None = None
        self._since: LoaderStats | None = None
        self._window: LoaderStats | None = None
        self._epoch: LoaderStats | None = None
        self._whole: LoaderStats | None = None
        self._failures = 0
        self._said: str | None = None

    # What was measured --------------------------------------------------------------------------------------

    @property
    def stats(self) -> LoaderStats | None:
        """Training so far, up to the last log or end of an epoch; None before."""
        return self._whole

    @property
    def patches_per_second(self) -> float:
        """Training samples a second, waiting included."""
        return float("nan") if self._whole is None else self._whole.samples_per_second

    @property
    def wait_share(self) -> float:
        """Waiting for data over waiting and working."""
        return float("nan") if self._whole is None else self._whole.wait_share

    @property
    def bottleneck(self) -> Bottleneck | None:
        """What limited the speed; None before the first log."""
        return None if self._whole is None else self._whole.bottleneck

    # Lightning's hooks --------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Find the loader: it may be another one than in the last epoch."""
        loader = trainer.train_dataloader
        self._loader = loader if isinstance(loader, DataLoader) else None
        self._since, self._window, self._epoch = None, None, None
        self._failures = 0
        self._board.begin()
        self._board.asked()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Data is here."""
        if self._loader is None:
            self._board.handed(samples_in(batch))
        if self._since is None:
            self._since = self._now()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """The step is done."""
        self._steps += 1
        self._axis = trainer.fit_loop.epoch_loop._batches_that_stepped  # where Lightning puts this step's own metrics
        if self._steps % (self.every_n_steps or trainer.log_every_n_steps or 50) == 0:
            self._log(trainer)
        if self._loader is None:
            self._board.asked()

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """What validation reads, and its time, are not training's."""
        self._close()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Training goes on."""
        if self._window is not None:
            self._board.asked()
            self._since = self._now()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Log what is left, and say what the limit is where that is news."""
        self._log(trainer)
        self._since, epoch = None, self._epoch
        if epoch is None or epoch.bottleneck.kind in (self._said, "unknown"):
            return
        self._said = epoch.bottleneck.kind
        rank_zero_info(f"{epoch.samples_per_second:.3g} samples a second. {epoch.bottleneck}")

    # Windows ------------------------------------------------------------------------------------------------

    def _now(self) -> LoaderStats:
        return self._board.snapshot() if self._loader is None else self._loader.stats()

    def _close(self) -> None:
        """Put what has happened up to now into the window."""
        if self._since is not None:
            part = self._now().since(self._since)
            self._window = part if self._window is None else self._window + part
            self._since = None

    def _log(self, trainer: Any) -> None:
        self._close()
        now, window = self._now(), self._window
        self._since = now
        if window is None or not window.batches:
            return
        self._window = None
        self._epoch = window if self._epoch is None else self._epoch + window
        self._whole = window if self._whole is None else self._whole + window
        metrics = {"samples_per_second": window.samples_per_second, "wait_share": window.wait_share}
        if self._loader is not None:
            metrics |= {"failures": now.failures - self._failures} | _readers(window, now)
            self._failures = now.failures  # counted from the first batch on, which is before the first window
        named = {f"data/{name}": float(value) for name, value in metrics.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=self._axis)


def _readers(window: LoaderStats, whole: LoaderStats) -> dict[str, float]:
    """What the readers did in a window of a pass."""
    read = window.total
    # What is handed over may have been read before, all of it: then the wait is dealt out as in the pass so far.
    shares = time_shares(window.wait_share, read if read.batches_read else whole.total)
    return {f"{part.name}_share": getattr(shares, part.name) for part in fields(TimeShares)} | {
        "megabytes_per_second": window.megabytes_per_second,
        "requests": read.requests,
        "retries": read.retries,
        "cache_hits": read.cache_hits,
    }
