"""From a Hydra configuration to data, a task and a trainer: what train.py, eval.py and predict.py share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from demo_scenes import CLASSES, served
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from rasteret_ml import RasteretDataModule


@contextmanager
def opened(config: DictConfig) -> Iterator[RasteretDataModule]:
    """The configured data, seeds set; the demo's scenes are served meanwhile."""
    quiet_lightning()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    Path(config.paths.output_dir).mkdir(parents=True, exist_ok=True)
    if config.data.images != "demo":
        yield instantiate(config.data)
        return
    with served(Path(config.paths.demo_dir).expanduser()) as (images, label):
        config.data.images = images
        config.data.labels = label if config.data.labels == "demo" else config.data.labels
        yield instantiate(config.data)


def new_task(config: DictConfig, data: RasteretDataModule) -> pl.LightningModule:
    """The configured model, with the data's bands and classes."""
    task: pl.LightningModule = instantiate(config.model, in_channels=len(data.bands), num_classes=data.num_classes)
    return task


def trained_task(config: DictConfig) -> pl.LightningModule:
    """The model of the checkpoint, as it was made and trained."""
    task: pl.LightningModule = get_class(config.model._target_).load_from_checkpoint(config.ckpt_path)
    return task


def new_trainer(config: DictConfig, *own: pl.Callback) -> pl.Trainer:
    """The configured trainer, with its callbacks and loggers, and those of a script."""
    callbacks = [*each(config.callbacks), *own]
    trainer: pl.Trainer = instantiate(config.trainer, callbacks=callbacks, logger=each(config.logger))
    return trainer


def each(group: DictConfig | None) -> list[Any]:
    """The members of a group, such as callbacks, made."""
    return [instantiate(member) for member in (group or {}).values() if isinstance(member, Mapping)]


def class_names(config: DictConfig, data: RasteretDataModule) -> list[str]:
    """What the classes are called: the demo's have names."""
    if "T33_00_20230815_B02.tif" in str(config.data.images):
        return list(CLASSES)
    return [f"class {value}" for value in data.class_values]


def quiet_lightning() -> None:
    """Hints that do not apply to small runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*logging interval.*",
        ".*sampler has shuffling.*",
        "Be aware that when using `ckpt_path`, callbacks.*",
        "The dirpath has changed from.*",  # a run has a folder of its own
        "Total length of `list` across ranks is zero.*",  # nothing is held out
    ):
        warnings.filterwarnings("ignore", message=message)
