"""What it costs to know where the time goes: training with and without the meters and the callback that logs them."""

from __future__ import annotations

import tempfile
import time
import timeit
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import trial
from bench import Bench
from lightning.pytorch.loggers import CSVLogger
from readers import Row, Work, as_json, ours_loader
from report import Section, middle, number, spread

import rasteret_ml as rm

NOTHING, METERS, MONITOR = "nothing", "meters of waiting", "and LoaderMonitor, every 10 steps"


def watching(bench: Bench) -> list[Section]:
    """Local files, warm, 0 workers, a model of one weight: nothing is there to hide a cost behind."""
    count = int(bench.args.batches)
    section = Section(
        "Watching",
        f"{count} training batches of {bench.batch} chips through Lightning, from disk, page cache warm, 0 workers, a "
        "model of one weight, a CSV logger. Milliseconds a batch, median (smallest to largest) of "
        f"{bench.rounds} rounds.",
        ["what watches", "CPU", "wall", "CPU / nothing", "wall / nothing"],
    )
    rows = [Row(label=label, reader="ours", options={"lookahead": True}) for label in (NOTHING, METERS, MONITOR)]
    chips = (int(bench.args.warm) + count) * bench.batch
    work = as_json(replace(bench.work(None, chips), epoch=chips))
    walls: dict[str, list[float]] = {row.label: [] for row in rows}

    def measure(row: Row) -> float:
        task = {"work": work, "options": row.options, "watched": row.label, "warm": int(bench.args.warm)}
        cpu, wall = trial.run("watching:train", task, env=row.env)
        walls[row.label].append(1000 * wall)
        return 1000 * float(cpu)

    cpus = bench.paired(rows, measure)
    for row in rows:
        ratios = [middle(found[row.label]) / middle(found[NOTHING]) for found in (cpus, walls)]
        section.rows.append([row.label, spread(cpus[row.label]), spread(walls[row.label]), *map(number, ratios)])
    section.target("CPU with everything / with nothing", middle(cpus[MONITOR]) / middle(cpus[NOTHING]), 1.02, most=True)
    parts = trial.run("watching:parts", {"work": work, "options": rows[0].options})
    whole = parts["changes"] * parts["change_us"] + parts["log_us"] / 10
    section.notes.append(
        "one by one, at their least of many: {changes:.0f} changes of what goes on a batch, {change_us:.2g} µs each; "
        "a log, of which there is one in 10 batches, {log_us:.3g} µs".format(**parts)
    )
    section.target("their sum, % of a batch's CPU", whole / 10 / middle(cpus[NOTHING]), 1, most=True)
    return [section]


class Clock(pl.Callback):
    """CPU and wall time of the steps after the first ones."""

    def __init__(self, warm: int) -> None:
        self.warm, self.steps, self.began, self.took = warm, 0, (0.0, 0.0), (0.0, 0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        """Count."""
        self.steps += 1
        now = time.process_time(), time.perf_counter()
        if self.steps == self.warm:
            self.began = now
        self.took = now[0] - self.began[0], now[1] - self.began[1]


class Weight(pl.LightningModule):
    """The least model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Looks at one pixel a chip."""
        loss = self.weight * batch["image"][:, 0, 0, 0].float().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Something."""
        return torch.optim.SGD(self.parameters(), 1e-9)


def train(work: dict[str, Any], options: dict[str, Any], watched: str, warm: int) -> tuple[float, float]:
    """Trial: CPU and wall seconds a batch."""
    if watched == NOTHING:
        _without_meters()
    warnings.filterwarnings("ignore")
    clock, loader = Clock(warm), ours_loader(Work(**work), options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            callbacks=[*([rm.LoaderMonitor()] if watched == MONITOR else []), clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Weight(), loader)
    return clock.took[0] / (clock.steps - warm), clock.took[1] / (clock.steps - warm)


def parts(work: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Trial: how often a batch tells the meter that something begins or ends, and what that and a log cost."""
    from rasteret_ml.telemetry import Meter

    loader, change, batches = ours_loader(Work(**work), options), Meter.change, 0
    calls: list[str] = []

    def counted(self: Meter, what: Any, by: int) -> None:
        calls.append(what)
        change(self, what, by)

    Meter.change = counted  # type: ignore[method-assign]
    for batches, _ in enumerate(loader, 1):  # noqa: B007
        pass
    Meter.change = change  # type: ignore[method-assign]
    meter, before = Meter(2), loader.stats()

    def change_twice() -> None:
        with meter.track("fetch"):
            pass

    def log() -> None:
        window = loader.stats().since(before)
        _ = window + window + window, window.shares, window.samples_per_second, window.wait_share

    least = {"change_us": min(timeit.repeat(change_twice, number=1000, repeat=50)) / 2000}
    least["log_us"] = min(timeit.repeat(log, number=20, repeat=50)) / 20
    return {"changes": len(calls) / batches} | {name: 1e6 * seconds for name, seconds in least.items()}


def _without_meters() -> None:
    """Take out what watching added: wall time of what goes on, and of collating."""
    import rasteret_ml.loader.loader as loader
    from rasteret_ml.telemetry import Meter

    Meter.track = lambda self, what: nullcontext()  # type: ignore[method-assign,assignment,return-value]
    loader.TimedCollate = lambda collate: collate  # type: ignore[misc,assignment]
