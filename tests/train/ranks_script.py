"""Run by tests in a process of its own: Lightning, or bare loaders, on several ranks that talk over gloo.

python ranks_script.py <task> <folder> [argument ...]
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
import torch.multiprocessing

import rasteret_ml as rm

SIZE, LENGTH, BATCH = 16, 22, 4


def dataset(folder: Path) -> Any:
    """Images and labels that the test has written."""
    images = rm.RasteretDataset(str(folder / "images.parquet"), ["B1"])
    labels = rm.RasteretDataset(str(folder / "labels.parquet"), ["B1"], is_image=False)
    return images & labels


class Recorder(pl.LightningModule):
    """A model of one weight that writes down what it sees."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder = folder

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """A loss that depends on every pixel."""
        self.seen("train", batch)
        return (self.weight - batch["image"].float().mean()) ** 2

    def validation_step(self, batch: Any, index: int) -> None:
        """Labels that count."""
        self.seen("val", batch)

    def seen(self, stage: str, batch: Any) -> None:
        """A line a batch: draws and pixels with a label, of this rank."""
        counted = (batch["mask"] >= 0).flatten(1).sum(1).tolist()
        line = {"epoch": self.current_epoch, "draws": batch["draw"].tolist(), "counted": counted}
        with (self.folder / f"{stage}_{self.global_rank}.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")

    def configure_optimizers(self) -> Any:
        """Plain descent."""
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(folder: Path, ranks: str, use_distributed_sampler: str, loader: str = "ours", errors: str = "") -> None:
    """Two epochs of training with validation."""
    data = dataset(folder)
    kind = rm.DataLoader if loader == "ours" else torch.utils.data.DataLoader
    options: dict[str, Any] = {"batch_size": BATCH, "collate_fn": rm.collate}
    if errors:
        budget = {} if errors == "raise" else {"budget": None}
        options |= {"errors": {"action": errors, **budget}, "num_workers": 1}
    train = kind(data, sampler=rm.RandomAOISampler(data, SIZE, LENGTH, seed=7), **options)
    val = kind(data, sampler=rm.GridAOISampler(data, 50), **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(ranks),
        strategy="ddp_fork",
        max_epochs=2,
        use_distributed_sampler=use_distributed_sampler == "True",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Recorder(folder), train, val)


def deal(folder: Path, ranks: str, steps: str, state: str) -> None:
    """Some steps of a loader on each of several gloo ranks, from a state or the beginning; writes the next state."""
    torch.multiprocessing.start_processes(
        _deal_rank, (int(ranks), folder, int(steps), state), nprocs=int(ranks), start_method="fork"
    )


def _deal_rank(rank: int, ranks: int, folder: Path, steps: int, state: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    store = torch.distributed.FileStore(str(folder / f"store_{ranks}"), ranks)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks, store=store)
    data = dataset(folder)
    sampler = rm.RandomAOISampler(data, SIZE, LENGTH, seed=7)
    loader = rm.DataLoader(data, batch_size=BATCH // ranks, sampler=sampler, num_workers=ranks % 3)
    if state:
        loader.load_state_dict(json.loads(state))
    passing = iter(loader)
    draws = [next(passing)["draw"].tolist() for _ in range(steps)]
    found = {"draws": draws, "state": loader.state_dict(), "length": len(loader)}
    (folder / f"dealt_{ranks}_{rank}.json").write_text(json.dumps(found))
    del passing, loader
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """The task named."""
    warnings.simplefilter("ignore")
    task, folder, *arguments = sys.argv[1:]
    {"fit": fit, "deal": deal}[task](Path(folder), *arguments)


if __name__ == "__main__":
    main()
