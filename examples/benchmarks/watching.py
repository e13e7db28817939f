"""The cost of monitoring: training with and without the meters and the callback that logs them."""

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

NO_METERS, METERS, MONITOR = "no meters", "meters", "meters and LoaderMonitor, every 10 steps"


def watching(bench: Bench) -> list[Section]:
    """Measure with local files, 0 workers and a model of one weight, so that nothing hides the cost."""
    count = int(bench.args.batches)
    section = Section(
        "Monitoring",
        f"Milliseconds per batch, median (minimum to maximum) of {bench.rounds} rounds: {count} training batches of "
        f"{bench.batch} chips with Lightning, from disk with a warm page cache, 0 workers, a model of one weight, "
        "a CSV logger.",
        ["monitoring", "CPU", "wall", "CPU / no meters", "wall / no meters"],
    )
    rows = [Row(label=label, reader="ours", options={"lookahead": True}) for label in (NO_METERS, METERS, MONITOR)]
    chips = (int(bench.args.warm) + count) * bench.batch
    work = as_json(replace(bench.work(None, chips), epoch=chips))
    walls: dict[str, list[float]] = {row.label: [] for row in rows}

    def measure(row: Row) -> float:
        task = {"work": work, "options": row.options, "monitoring": row.label, "warm": int(bench.args.warm)}
        cpu, wall = trial.run("watching:train", task, env=row.env)
        walls[row.label].append(1000 * wall)
        return 1000 * float(cpu)

    cpus = bench.paired(rows, measure)
    for row in rows:
        ratios = [middle(found[row.label]) / middle(found[NO_METERS]) for found in (cpus, walls)]
        section.rows.append([row.label, spread(cpus[row.label]), spread(walls[row.label]), *map(number, ratios)])
    section.target(
        "CPU with LoaderMonitor / without meters", middle(cpus[MONITOR]) / middle(cpus[NO_METERS]), 1.02, maximum=True
    )
    parts = trial.run("watching:parts", {"work": work, "options": rows[0].options})
    total_us = parts["changes"] * parts["change_us"] + parts["log_us"] / 10
    section.notes.append(
        "minimum of many repeats: {changes:.0f} changes of the meter per batch, {change_us:.2g} µs each; one log per "
        "10 batches, {log_us:.3g} µs".format(**parts)
    )
    section.target("sum of these, % of a batch's CPU time", total_us / 10 / middle(cpus[NO_METERS]), 1, maximum=True)
    return [section]


class Clock(pl.Callback):
    """Measures CPU and wall time of the steps after the first `warm` ones."""

    def __init__(self, warm: int) -> None:
        self.warm, self.steps, self.start, self.seconds = warm, 0, (0.0, 0.0), (0.0, 0.0)

    def on_train_batch_end(self, *_: Any) -> None:
        """Update the times."""
        self.steps += 1
        now = time.process_time(), time.perf_counter()
        if self.steps == self.warm:
            self.start = now
        self.seconds = now[0] - self.start[0], now[1] - self.start[1]


class Weight(pl.LightningModule):
    """The smallest possible model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Use one pixel of each chip."""
        loss = self.weight * batch["image"][:, 0, 0, 0].float().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer that hardly changes the weight."""
        return torch.optim.SGD(self.parameters(), 1e-9)


def train(work: dict[str, Any], options: dict[str, Any], monitoring: str, warm: int) -> tuple[float, float]:
    """Trial: return CPU and wall seconds per batch."""
    if monitoring == NO_METERS:
        _remove_meters()
    warnings.filterwarnings("ignore")
    clock, loader = Clock(warm), ours_loader(Work(**work), options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=CSVLogger(folder),
            log_every_n_steps=10,
            callbacks=[*([rm.LoaderMonitor()] if monitoring == MONITOR else []), clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Weight(), loader)
    cpu, wall = clock.seconds
    return cpu / (clock.steps - warm), wall / (clock.steps - warm)


def parts(work: dict[str, Any], options: dict[str, Any]) -> dict[str, float]:
    """Trial: return the number of meter changes per batch, and the microseconds of a change and of a log."""
    from rasteret_ml.telemetry import Meter

    loader, change, batches = ours_loader(Work(**work), options), Meter.change, 0
    calls: list[str] = []

    def counted(self: Meter, activity: Any, by: int) -> None:
        calls.append(activity)
        change(self, activity, by)

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

    costs = {"change_us": min(timeit.repeat(change_twice, number=1000, repeat=50)) / 2000}
    costs["log_us"] = min(timeit.repeat(log, number=20, repeat=50)) / 20
    return {"changes": len(calls) / batches} | {name: 1e6 * seconds for name, seconds in costs.items()}


def _remove_meters() -> None:
    """Disable the meters of wall time and of collating."""
    import rasteret_ml.loader.loader as loader
    from rasteret_ml.telemetry import Meter

    Meter.track = lambda self, activity: nullcontext()  # type: ignore[method-assign,assignment,return-value]
    loader.TimedCollate = lambda collate, rows: collate  # type: ignore[misc,assignment]
