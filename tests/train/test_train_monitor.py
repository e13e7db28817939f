"""What the callback logs, counted by others; staged bottlenecks are in `tests/e2e/test_bottleneck_stages.py`."""

from __future__ import annotations

import csv
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.utils.data
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger

import rasteret_ml as rm
from rasteret_ml.loader.stats import LoaderStats
from rasteret_ml.testing import InjectedError, RangeServer, make_cog

SHARES = ("model", "network", "decode", "collate", "other")
NAMES = {
    *(f"data/{name}_share" for name in ("wait", *SHARES)),
    *(f"data/{name}" for name in ("samples_per_second", "megabytes_per_second")),
    *(f"data/{name}" for name in ("requests", "retries", "cache_hits", "failures")),
}


class Recorder(DummyLogger):
    """Keeps what is logged under `data/`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        found = {name: value for name, value in metrics.items() if name.startswith("data/")}
        if found:
            assert step is not None
            self.seen.append((step, found))


class Model(pl.LightningModule):
    """One weight; validates."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        return self.weight * image.float().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", batch["image"].float().mean(), batch_size=len(batch["image"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-9)


def _trainer(folder: Path, callback: Any, logger: Any, **options: Any) -> pl.Trainer:
    usual = {
        "accelerator": "cpu", "max_epochs": 2, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "default_root_dir": folder, "log_every_n_steps": 2,
    }  # fmt: skip
    return pl.Trainer(callbacks=[callback], logger=logger, **(usual | options))


@pytest.fixture
def datasets(server: RangeServer, tmp_path: Path) -> list[rm.RasteretDataset]:
    """Two files behind a server, `train` and `val`."""
    rng = np.random.default_rng(2)
    made = []
    for name in ("train", "val"):
        make_cog(tmp_path / f"{name}.tif", rng.integers(0, 65535, (1, 512, 512), np.uint16), blocksize=64)
        collection = rm.build(f"{server.url}/{name}.tif", tmp_path / f"{name}.parquet", datetime=None)
        made.append(rm.RasteretDataset(collection, ["B1"]))
    return made


@pytest.mark.parametrize("workers", [0, 2])
def test_it_logs_what_training_read_and_nothing_of_validation(
    datasets: list[rm.RasteretDataset], tmp_path: Path, workers: int
) -> None:
    """Requests as `explain` counts them, of all batches but the first of each epoch; validation is in between."""
    train, val = datasets
    queries = list(rm.RandomAOISampler(train, 96, 28, seed=1))
    loaders = [
        rm.DataLoader(train, 4, sampler=queries, num_workers=workers, lookahead=0),
        rm.DataLoader(val, 4, sampler=rm.GridAOISampler(val, 128), lookahead=0),
    ]
    recorder, monitor = Recorder(), rm.LoaderMonitor()
    files = CSVLogger(tmp_path / "logs")
    trainer = _trainer(tmp_path, monitor, [recorder, files], val_check_interval=3)
    trainer.fit(Model(), *loaders)
    assert [step for step, _ in recorder.seen] == [1, 3, 5, 6, 9, 11, 13]
    assert all(set(metrics) == NAMES for _, metrics in recorder.seen)
    for _, metrics in recorder.seen:
        assert sum(metrics[f"data/{name}_share"] for name in SHARES) == pytest.approx(1)
        assert metrics["data/model_share"] == pytest.approx(1 - metrics["data/wait_share"])
        assert metrics["data/samples_per_second"] > 0
    stats = monitor.stats
    assert (stats.batches, stats.samples) == (2 * 6, 2 * 24)
    assert stats.first_batches == stats.first_samples == 0
    logged = sum(metrics["data/requests"] for _, metrics in recorder.seen)
    assert logged == stats.total.requests
    each = [train.explain(queries[i : i + 4]).requests for i in range(0, 28, 4)]
    if workers:  # they read on while the first batch is handed over
        assert 0 < logged <= 2 * sum(each)
    else:
        assert logged == 2 * sum(each[1:])
    assert monitor.patches_per_second == pytest.approx(stats.samples_per_second)
    assert 0 < monitor.wait_share < 1
    with open(Path(files.log_dir) / "metrics.csv", newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["data/requests"]]
    assert [float(row["data/requests"]) for row in rows] == [m["data/requests"] for _, m in recorder.seen]


def test_a_loader_of_another_kind_gives_speed_and_wait(tmp_path: Path) -> None:
    """torch's own; and every_n_steps= has its say."""
    numbers = torch.utils.data.TensorDataset(torch.arange(40.0))
    recorder, monitor = Recorder(), rm.LoaderMonitor(every_n_steps=3)
    _trainer(tmp_path, monitor, recorder, max_epochs=1).fit(Model(), torch.utils.data.DataLoader(numbers, 4))
    assert [(step, set(metrics)) for step, metrics in recorder.seen] == [
        (step, {"data/samples_per_second", "data/wait_share"}) for step in (2, 5, 8, 9)
    ]
    assert (monitor.stats.batches, monitor.stats.samples) == (9, 36)
    assert 0 < monitor.wait_share < 1
    assert monitor.bottleneck.kind in ("unknown", "model")


def test_before_training_and_with_one_step_an_epoch_nothing_is_known(tmp_path: Path) -> None:
    """No figure is invented, nothing fails."""
    recorder, monitor = Recorder(), rm.LoaderMonitor()
    assert monitor.bottleneck.kind == "unknown"
    assert monitor.stats == LoaderStats()
    assert math.isnan(monitor.patches_per_second)
    assert math.isnan(monitor.wait_share)
    numbers = torch.utils.data.TensorDataset(torch.arange(4.0))
    _trainer(tmp_path, monitor, recorder, log_every_n_steps=1).fit(Model(), torch.utils.data.DataLoader(numbers, 4))
    assert recorder.seen == []
    assert monitor.stats == LoaderStats()


def test_the_sentence_is_said_once_and_failures_are_counted(
    server: RangeServer, datasets: list[rm.RasteretDataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the end of an epoch; a second epoch with the same limit says nothing. Failures as the loader reports them."""
    reports: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            assert loader.stats().failures == loader.failures.failed
            reports.append(loader.failures.failed)

    def slow(samples: Any) -> Any:
        assert sum(range(3_000_000)) > 0
        return rm.collate(samples)

    train = datasets[0]
    server.errors["train.tif"] = InjectedError(kind="status", status=404, times=3)
    errors = {"action": "fill", "retries": 0, "budget": None}
    sampler = rm.RandomAOISampler(train, 64, 24, seed=1)
    loader = rm.DataLoader(train, 4, sampler=sampler, collate_fn=slow, errors=errors)  # type: ignore[arg-type]
    recorder, monitor = Recorder(), rm.LoaderMonitor()
    trainer = _trainer(tmp_path, monitor, recorder)
    trainer.callbacks.append(Count())
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer.fit(Model(), loader)
    said = [record.message for record in caplog.records if "The model waits" in record.message]
    assert len(said) == 1
    assert "mostly for collating" in said[0]
    logged = [metrics["data/failures"] for _, metrics in recorder.seen]
    assert reports[0] > 0
    assert [sum(logged[:3]), sum(logged[3:])] == reports
