"""What train.py, eval.py and predict.py share: data, task and trainer from a Hydra configuration, scores and maps."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import rasterio
import shapely
from demo_scenes import CLASSES, served
from figures import colour, save_picture
from hydra.core.config_store import ConfigStore
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torchmetrics.classification import MulticlassConfusionMatrix

from rasteret_ml import MapWriter, RasteretDataModule
from rasteret_ml.train.data_handles import DatasetOptions
from rasteret_ml.train.datamodule_config import (
    LoadingConfig,
    NormalizationConfig,
    SamplingConfig,
    SplitConfig,
    builtin_fields,
)

MAX_PICTURE = 4096  # pixels along a side of the largest map to draw


def datamodule_defaults() -> dict[str, Any]:
    """Return every argument of `RasteretDataModule` with its default, so that Hydra knows their names."""
    parameters = inspect.signature(RasteretDataModule).parameters.values()
    arguments = {p.name: p.default for p in parameters if p.default is not p.empty}
    groups = {
        "dataset": DatasetOptions.defaults(),
        "split": builtin_fields(SplitConfig()),
        "sampling": builtin_fields(SamplingConfig()),
        "loading": builtin_fields(LoadingConfig()),
        "normalization": builtin_fields(NormalizationConfig()),
    }
    return {"_target_": "rasteret_ml.RasteretDataModule", "_convert_": "all"} | arguments | groups


ConfigStore.instance().store(group="data", name="datamodule", node=datamodule_defaults())


@contextmanager
def open_data(config: DictConfig) -> Iterator[RasteretDataModule]:
    """Seed everything and build the configured data; the demo's scenes are served meanwhile."""
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


def build_task(config: DictConfig, data: RasteretDataModule) -> pl.LightningModule:
    """Build the configured model, with the data's bands and classes."""
    return instantiate(config.model, in_channels=len(data.bands), num_classes=data.num_classes)


def load_task(config: DictConfig) -> pl.LightningModule:
    """Load the model of the checkpoint, with the arguments that it was trained with."""
    return get_class(config.model._target_).load_from_checkpoint(config.ckpt_path)


def build_trainer(config: DictConfig, *callbacks: pl.Callback) -> pl.Trainer:
    """Build the configured trainer, with the configured callbacks and loggers and some more callbacks."""
    configured = instantiate_all(config.callbacks)
    return instantiate(config.trainer, callbacks=[*configured, *callbacks], logger=instantiate_all(config.logger))


def instantiate_all(group: DictConfig | None) -> list[Any]:
    """Instantiate the members of a configuration group, such as callbacks."""
    return [instantiate(member) for member in (group or {}).values() if isinstance(member, Mapping)]


def quiet_lightning() -> None:
    """Silence advice that does not apply to small runs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*logging interval.*",
        ".*sampler has shuffling.*",
        "Be aware that when using `ckpt_path`, callbacks.*",
        "The dirpath has changed from.*",  # each run has its own folder
        "Total length of `list` across ranks is zero.*",  # nothing is held out
    ):
        warnings.filterwarnings("ignore", message=message)


def class_names(config: DictConfig, data: RasteretDataModule) -> list[str]:
    """Return the names of the classes; those of the demo are known."""
    if "T33_00_20230815_B02.tif" in str(config.data.images):
        return list(CLASSES)
    return [f"class {value}" for value in data.class_values]


# Scores ---------------------------------------------------------------------------------------------------------


class ClassScores(pl.Callback):
    """Counts labels against predictions in `trainer.validate` and `trainer.test`, over all processes."""

    def __init__(self) -> None:
        self.confusion: npt.NDArray[np.int64] | None = None
        """Pixels `[classes, classes]`, rows = labels, columns = predictions; None before the end."""
        self._metric: MulticlassConfusionMatrix | None = None

    def _start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._metric = None

    def _count(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int, loader: int = 0) -> None:
        if trainer.state.fn == "fit":
            return
        scores = module(batch["image"])
        if self._metric is None:
            ignored = module.hparams["ignore_index"]
            self._metric = MulticlassConfusionMatrix(scores.shape[1], ignore_index=ignored).to(scores.device)
        self._metric.update(scores, batch["mask"])

    def _end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._metric is not None:
            self.confusion = self._metric.compute().cpu().numpy()

    on_validation_start = on_test_start = _start
    on_validation_batch_end = on_test_batch_end = _count
    on_validation_end = on_test_end = _end


def class_iou(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Compute the intersection over union of each class; NaN for a class that does not occur."""
    hits = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.where(union, hits / np.maximum(union, 1), np.nan)


def mean_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Compute the mean IoU of the classes that occur."""
    return float(np.nanmean(class_iou(confusion)))


def majority_iou(confusion: npt.NDArray[np.int64]) -> float:
    """Compute the mean IoU of a model that always predicts the most frequent class."""
    labels = confusion.sum(1)
    return float(labels.max() / labels.sum() / np.count_nonzero(labels))


def print_scores(confusion: npt.NDArray[np.int64], names: list[str], stage: str = "validation") -> None:
    """Print the mean IoU, that of the majority class, and the IoU of each class."""
    print(f"{stage} mIoU".ljust(20), f"{mean_iou(confusion):.3f}   ", end="")
    print(f"(always the majority class: {majority_iou(confusion):.3f})")
    for name, value in zip(names, class_iou(confusion), strict=False):
        print(f"  {name:<18} {value:.3f}")


# Maps -----------------------------------------------------------------------------------------------------------


def build_map_writer(path: Path | str, names: list[str]) -> MapWriter:
    """Build a callback that writes a map with a colour for each class."""
    return MapWriter(path, names=names, colours={i: colour(i) for i in range(len(names))})


def draw_map(data: RasteretDataModule, written: str, path: Path, names: list[str], title: str) -> str | None:
    """Draw images, labels and a map side by side; return the picture's path, or None if the map is too large."""
    with rasterio.open(written) as file:
        if max(file.shape) > MAX_PICTURE:
            return None
        classes, (west, south, east, north) = file.read(1), file.bounds
    sample = data.train_set[west:east, south:north]
    held_out = [] if data.val_area is None else shapely.get_parts(np.asarray(data.val_area.geometry, dtype=object))
    save_picture(
        path,
        sample["image"].numpy()[rgb_channels(data.bands)],
        sample["mask_valid"].numpy()[0],
        sample["mask"].numpy(),
        classes,
        names,
        (west, east, south, north),
        shapely.get_rings(held_out),
        title,
    )
    return str(path)


def rgb_channels(bands: tuple[str, ...]) -> list[int]:
    """Find red, green and blue by the names of the bands, else choose the third, second and first band."""
    for rgb in (("B04", "B03", "B02"), ("red", "green", "blue"), ("R", "G", "B")):
        if set(rgb) <= set(bands):
            return [bands.index(name) for name in rgb]
    return [2, 1, 0] if len(bands) >= 3 else [0, 0, 0]
