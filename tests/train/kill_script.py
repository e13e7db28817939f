"""Run by a test in a process of its own: a training that is killed at a step, and goes on from its last checkpoint.

python kill_script.py <folder> <name> <workers> <batches in an epoch> <step to be killed at, or -1>
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import rasteret_ml as rm

EPOCHS, CHIPS, BATCH, EVERY = 3, 24, 3, 3


class Model(pl.LightningModule):
    """A small network, which remembers every sample that its weights have seen."""

    def __init__(self, killed_at: int) -> None:
        super().__init__()
        self.killed_at = killed_at
        self.seen: list[list[int]] = []
        self.net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 3))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """A loss of these pixels; or the end."""
        if self.global_step == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += batch["draw"].tolist()
        return (self.net(rm.normalize(batch, [500.0], [300.0])["image"]) - 1).square().mean()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was seen goes with the weights."""
        checkpoint["seen"] = list(self.seen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """And comes back with them."""
        self.seen = list(checkpoint["seen"])

    def configure_optimizers(self) -> Any:
        """One with a state of its own."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main() -> None:
    """Train to the end, or to the step."""
    warnings.simplefilter("ignore")
    folder, name = Path(sys.argv[1]), sys.argv[2]
    workers, batches, killed_at = (int(value) for value in sys.argv[3:])
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    dataset = rm.RasteretDataset(str(folder / "images.parquet"), ["B1"])
    sampler = rm.RandomAOISampler(dataset, 16, CHIPS, seed=9, locality=rm.Locality(blocks=4, tiles=1))
    loader = rm.DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=workers)
    model = Model(killed_at)
    saving = ModelCheckpoint(folder / name, save_last=True, every_n_train_steps=EVERY, save_top_k=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        limit_train_batches=batches,
        callbacks=[saving, rm.ExactResume()],
        logger=False,
        deterministic=True,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / name / "last.ckpt"
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)
    weights = [value.tolist() for value in model.state_dict().values()]
    (folder / f"{name}.json").write_text(json.dumps({"seen": model.seen, "weights": weights}))


if __name__ == "__main__":
    main()
