"""A callback that logs how training time is spent, and reports the bottleneck."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from rasteret_ml.loader.bottleneck import Bottleneck, TimeShares, time_shares
from rasteret_ml.loader.loader import DataLoader
from rasteret_ml.loader.stats import LoaderStats, StatsBoard, samples_in


class LoaderMonitor(pl.Callback):
    """Logs the speed of loading, and what the model waits for, to each of the trainer's loggers.

        pl.Trainer(callbacks=[rm.LoaderMonitor()])

    Each log covers the time since the last one, without validation and the wait for an epoch's first batch:

    | metric | meaning |
    | --- | --- |
    | `data/samples_per_second` | training samples per second, waiting included |
    | `data/wait_share` | share of the time that the model waits for data |
    | `data/model_share`, also `network`, `decode`, `collate`, `other` | the `TimeShares`, which sum to 1 |
    | `data/megabytes_per_second` | million bytes received per second |
    | `data/requests`, `data/retries` | range requests answered, and attempts beyond the first |
    | `data/cache_hits` | tiles taken from the cache of decoded tiles |
    | `data/failures` | samples that could not be read and that the loader's error policy tolerated |

    At the end of an epoch the bottleneck (`LoaderStats.bottleneck`) is reported in one sentence, if it has changed.
    Only the first two metrics are known for loaders other than `rasteret_ml.DataLoader`, or for several loaders in one
    trainer. Under DDP each rank watches its own loader, and loggers write the values of rank zero. Times are the
    host's: where a step only queues work for a GPU, the wait for that work counts where the host waits for it.

    Args:
        every_n_steps: Training batches between two logs; None = the trainer's `log_every_n_steps`.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._steps, self._log_step = 0, 0
        self._board = StatsBoard(0)
        self._loader: DataLoader | None = None
        self._since: LoaderStats | None = None
        self._window = LoaderStats()
        self._epoch = LoaderStats()
        self.stats = LoaderStats()  #: All of the training up to the last log.
        self._failures = 0
        self._reported: str | None = None

    @property
    def patches_per_second(self) -> float:
        """Training samples per second, waiting included."""
        return self.stats.samples_per_second

    @property
    def wait_share(self) -> float:
        """Share of the time that the model waits for data."""
        return self.stats.wait_share

    @property
    def bottleneck(self) -> Bottleneck:
        """What limits the speed; "unknown" before the first log."""
        return self.stats.bottleneck

    # Lightning's hooks --------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """Find the loader, which may change between epochs."""
        loader = trainer.train_dataloader
        self._loader = loader if isinstance(loader, DataLoader) else None
        self._since, self._window, self._epoch = None, LoaderStats(), LoaderStats()
        self._failures = 0
        self._board.start_pass()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        """Note that a batch has arrived."""
        if self._loader is None:
            self._board.end_wait(samples_in(batch))
        if self._since is None:
            self._since = self._now()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Count the step, and log if it is time."""
        self._steps += 1
        self._log_step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step that Lightning logs metrics at
        if self._steps % (self.every_n_steps or trainer.log_every_n_steps or 50) == 0:
            self._log(trainer)
        if self._loader is None:
            self._board.start_wait()

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Pause measuring during validation."""
        self._close_window()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Resume measuring."""
        self._board.start_wait()
        self._since = self._now()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Log the rest, and report the bottleneck if it has changed."""
        self._log(trainer)
        self._since, bottleneck = None, self._epoch.bottleneck
        if bottleneck.kind not in (self._reported, "unknown"):
            self._reported = bottleneck.kind
            rank_zero_info(f"{self._epoch.samples_per_second:.3g} samples per second. {bottleneck}")

    def _now(self) -> LoaderStats:
        return self._board.snapshot() if self._loader is None else self._loader.stats()

    def _close_window(self) -> None:
        """Add the time up to now to the window."""
        if self._since is not None:
            self._window += self._now().since(self._since)
            self._since = None

    def _log(self, trainer: Any) -> None:
        self._close_window()
        now, window = self._now(), self._window
        self._since = now
        if not window.batches:
            return
        self._window = LoaderStats()
        self._epoch += window
        self.stats += window
        metrics = {"samples_per_second": window.samples_per_second, "wait_share": window.wait_share}
        if self._loader is not None:
            metrics |= {"failures": now.failures - self._failures} | _reading_metrics(window, now)
            self._failures = now.failures  # of the epoch, also before the first window
        named = {f"data/{name}": float(value) for name, value in metrics.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=self._log_step)


def _reading_metrics(window: LoaderStats, epoch: LoaderStats) -> dict[str, float]:
    """Compute the metrics of reading in a window of an epoch."""
    read = window.total
    # All batches of a window may have been read before it began; the wait is then split as in the epoch so far.
    shares = time_shares(window.wait_share, read if read.batches_read else epoch.total)
    return {f"{share.name}_share": getattr(shares, share.name) for share in fields(TimeShares)} | {
        "megabytes_per_second": window.megabytes_per_second,
        "requests": read.requests,
        "retries": read.retries,
        "cache_hits": read.cache_hits,
    }
