"""The sentence is right in staged runs: a slow server, an expensive codec, a slow collate, a slow model.

Each stage is made ten times slower than the other parts, so that a busy machine does not change who is the slowest;
nothing is asserted of times.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.testing import RangeServer, make_cog

STAGES = ("network", "decode", "collate", "model")
BATCHES, BATCH = 9, 4


class Stage:
    """Files on a server that may be slow."""

    def __init__(self, server: RangeServer, cheap: rm.Collection, dear: rm.Collection) -> None:
        self.server, self.cheap, self.dear = server, cheap, dear

    def loader(self, kind: str, workers: int) -> rm.DataLoader:
        """A loader in which that is slow; the model is its consumer's affair."""
        self.server.latency = 0.15 if kind == "network" else 0.0
        collection = self.dear if kind == "decode" else self.cheap
        dataset = rm.RasteretDataset(collection, ["B1"], reading={"max_concurrent": 4 if kind == "network" else 50})
        sampler = rm.RandomAOISampler(dataset, 64, BATCHES * BATCH, seed=0)
        options: dict[str, Any] = {"collate_fn": slow_collate} if kind == "collate" else {}
        if kind == "decode":
            options["lookahead"] = 1  # there are four tiles: batches read together would share the decoding of them
        return rm.DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers, **options)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One scene in small deflate tiles, and in large LZMA tiles that take 80 ms each."""
    folder = tmp_path_factory.mktemp("stages")
    pixels = np.random.default_rng(0).integers(0, 2**12, (1, 1024, 1024), np.uint16)
    make_cog(folder / "cheap.tif", pixels, blocksize=128, overviews="none")
    make_cog(folder / "dear.tif", pixels, blocksize=512, overviews="none", compress="lzma")
    with RangeServer(folder) as server:
        cheap, dear = (
            rm.build(f"{server.url}/{name}.tif", folder / f"{name}.parquet", datetime=None)
            for name in ("cheap", "dear")
        )
        yield Stage(server, cheap, dear)


def slow_collate(samples: Any) -> Any:
    """Work for the thread that makes batches: so many additions, of which none gives way to other threads."""
    assert sum(range(8_000_000)) > 0
    return rm.collate(samples)


def slow_step() -> None:
    """Stands for a model on a GPU: the host waits for it, its cores are free. Nobody ever sets the event."""
    assert not threading.Event().wait(0.3)


KNOBS = {"network": "max_concurrent= (now 4)", "decode": "cache_bytes= of the dataset", "collate": "collate_fn="}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", STAGES)
def test_the_sentence_names_what_was_made_slow(stage: Stage, kind: str, workers: int) -> None:
    """And a knob that helps."""
    loader = stage.loader(kind, workers)
    for _ in loader:
        if kind == "model":
            slow_step()
    stats = loader.stats()
    found = stats.bottleneck
    assert found.kind == kind, f"{found}\n{stats.shares}\n{stats.total}"
    assert KNOBS.get(kind, "only a faster training step") in str(found)
    cores = len(os.sched_getaffinity(0))
    if kind == "collate" and workers < cores:
        assert f"num_workers= (now {workers}, with {cores} core" in str(found)
    assert stats.samples == BATCHES * BATCH
    assert stats.shares.model == pytest.approx(1 - stats.wait_share)


class Model(pl.LightningModule):
    """One weight."""

    def __init__(self, slow: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.slow = slow

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.slow:
            slow_step()
        return self.weight * batch["image"].float().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-9)


@pytest.mark.parametrize(("kind", "workers"), [("network", 0), ("collate", 2), ("model", 2)])
@pytest.mark.slow
def test_through_lightning_the_monitor_names_it(stage: Stage, tmp_path: Path, kind: str, workers: int) -> None:
    """Two epochs, workers kept; the first steps of an epoch among them."""
    monitor = rm.LoaderMonitor()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, callbacks=[monitor], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(Model(slow=kind == "model"), stage.loader(kind, workers))
    assert monitor.bottleneck.kind == kind, f"{monitor.bottleneck}\n{monitor.stats.shares}\n{monitor.stats.total}"
    assert monitor.stats.batches == 2 * (BATCHES - 1)
