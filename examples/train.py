"""Train a segmentation model on GeoTIFFs that are read by range requests.

    python examples/train.py                     the demo: makes scenes, serves them on loopback, trains
    python examples/train.py data=files data.images='scenes/*.tif' data.labels=labels.tif

Every setting lives in configs/ (Hydra): `data.batch_size=8`, `trainer.max_epochs=20`, `experiment=landcover` ...
"""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import numpy as np
import rasterio
import shapely
import torch
from demo_scenes import CLASSES, served
from figures import colour, save_picture
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rasteret_ml import Grid, GridAOISampler, RasteretDataModule, predict_map
from rasteret_ml.train.metrics import class_iou, confusion_matrix, majority_baseline, mean_iou
from rasteret_ml.train.throughput import Throughput

log = logging.getLogger("train")


def run(config: DictConfig) -> dict[str, Any]:
    """Build, train, validate, draw the map; returns what was measured and written."""
    began = time.perf_counter()
    quiet_lightning()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    out = Path(config.paths.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        names: list[str] | None = None
        if config.data.images == "demo":
            images, label = stack.enter_context(served(Path(config.paths.demo_dir).expanduser()))
            config.data.images, config.data.labels = images, label
            names = list(CLASSES)
        data: RasteretDataModule = instantiate(config.data)
        data.prepare_data()
        data.setup()
        log.info("%s", data.collection)
        if data.collection.report is not None:
            log.info("%s", data.collection.report)
        task = instantiate(config.model, in_channels=len(data.bands), num_classes=data.num_classes)
        speed = Throughput()
        trainer: pl.Trainer = instantiate(config.trainer, callbacks=[speed], default_root_dir=str(out))
        trainer.fit(task, datamodule=data)
        trainer.save_checkpoint(out / "model.ckpt")
        names = names or [f"class {value}" for value in data.class_values]
        result = finish(task, data, out, names)
    result |= {
        "patches_per_second": speed.patches_per_second,
        "wait_share": speed.wait_share,
        "seconds": time.perf_counter() - began,
    }
    report(result, names)
    return result


def finish(task: Any, data: RasteretDataModule, out: Path, names: list[str]) -> dict[str, Any]:
    """Score the held-out area, write the map and the picture."""
    task.eval()
    confusion = sum(
        confusion_matrix(ready["mask"].cpu(), predict(task, ready["image"]).cpu(), data.num_classes)
        for ready in (data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader())
    )
    written = out / "prediction.tif"
    grid, classes = draw_map(task, data, written, names)
    image = np.zeros((len(data.bands), *grid.shape), data.images.dtype)
    valid = np.zeros(grid.shape, bool)
    for batch in data.predict_dataloader():
        paste(image, grid, batch["image"], batch["transform"])
        paste(valid[None], grid, batch["mask_valid"], batch["transform"])
    labels = np.full(grid.shape, -1, np.int64)
    for aoi in GridAOISampler(data.train_set, 512):
        sample = data.train_set[aoi]
        paste(labels[None], grid, sample["mask"][None, None], sample["transform"][None])
    title = f"mIoU {mean_iou(confusion):.3f} on the held-out area (majority class {majority_baseline(confusion):.3f})"
    xmin, ymin, xmax, ymax = grid.bounds
    rings = shapely.get_rings(shapely.get_parts(np.asarray(data.val_area.geometry, dtype=object)))
    picture = out / "prediction.png"
    rgb = rgb_channels(data.bands)
    save_picture(picture, image[rgb], valid, labels, classes, names, (xmin, xmax, ymin, ymax), rings, title)
    return {
        "miou": mean_iou(confusion),
        "baseline": majority_baseline(confusion),
        "class_iou": class_iou(confusion).tolist(),
        "map": str(written),
        "picture": str(picture),
    }


def draw_map(task: Any, data: RasteretDataModule, path: Path, names: list[str]) -> tuple[Grid, np.ndarray]:
    """Predict everything to a file; gives its grid and classes."""
    colours = {i: colour(i) for i in range(len(names))}
    (written,) = predict_map(task, data, path, names=names, colours=colours)
    with rasterio.open(written) as file:
        return Grid(crs=file.crs.to_string(), transform=file.transform, shape=file.shape), file.read(1)


@torch.no_grad()
def predict(task: Any, image: torch.Tensor) -> torch.Tensor:
    """Classes `[B, H, W]`."""
    return task(image.to(task.device)).argmax(1)


def paste(canvas: np.ndarray, grid: Any, chips: torch.Tensor, transforms: torch.Tensor) -> None:
    """Put chips `[B, C, H, W]` where they lie on a canvas `[C, H, W]`."""
    for chip, t in zip(chips.numpy(), transforms.tolist(), strict=True):
        col, row = round((t[2] - grid.transform.c) / t[0]), round((t[5] - grid.transform.f) / t[4])
        top, left = max(row, 0), max(col, 0)
        part = chip[:, top - row :, left - col :][:, : canvas.shape[1] - top, : canvas.shape[2] - left]
        canvas[:, top : top + part.shape[1], left : left + part.shape[2]] = part


def rgb_channels(bands: tuple[str, ...]) -> list[int]:
    """Red, green and blue where the band names tell, else the third, second and first band."""
    for wanted in (("B04", "B03", "B02"), ("red", "green", "blue"), ("R", "G", "B")):
        if set(wanted) <= set(bands):
            return [bands.index(name) for name in wanted]
    return [2, 1, 0] if len(bands) >= 3 else [0, 0, 0]


def report(result: dict[str, Any], names: list[str]) -> None:
    """What a person wants to know."""
    print()
    print(f"patches per second   {result['patches_per_second']:.1f}")
    print(f"wait share           {100 * result['wait_share']:.1f} % of training time spent waiting for data")
    print(f"validation mIoU      {result['miou']:.3f}   (always the majority class: {result['baseline']:.3f})")
    for name, value in zip(names, result["class_iou"], strict=False):
        print(f"  {name:<18} {value:.3f}")
    print(f"map                  {result['map']}")
    print(f"picture              {result['picture']}")
    print(f"whole run            {result['seconds']:.0f} s")


def quiet_lightning() -> None:
    """Hints that do not apply to a small demo."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*logging interval.*", ".*sampler has shuffling.*"):
        warnings.filterwarnings("ignore", message=message)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Entry point."""
    log.debug("%s", OmegaConf.to_yaml(config))
    run(config)


if __name__ == "__main__":
    main()
