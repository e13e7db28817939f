"""Train, validate and draw a map with a plain PyTorch loop. This file needs no other: copy it into your project.

    python examples/plain_loop.py --images 'scenes/T33_*.tif' --labels scenes/land_cover.tif --bands B02 B03 B04 B08

With the same values it sees the same batches as `RasteretDataModule`, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torchgeo.models import FCN
from torchmetrics.classification import MulticlassConfusionMatrix

import rasteret_ml as rm


@dataclass
class Data:
    """Loaders, and the function that normalises their batches."""

    train: rm.DataLoader
    val: rm.DataLoader
    everywhere: rm.DataLoader
    normalize: Callable[[dict[str, Any]], dict[str, Any]]


def load_data(options: argparse.Namespace) -> Data:
    """Index the files, hold the top of the area out for validation, and measure mean and std on the rest."""
    images = rm.build(options.images, options.collections + "/images.parquet", bands=options.bands)
    labels = rm.build(options.labels, options.collections + "/labels.parquet", datetime=None)
    bands = options.bands or images.bands
    dataset = rm.RasteretDataset(images, bands)
    train_area, val_area = rm.spatial_split(dataset, side="top", fraction=0.3)
    statistics = rm.dataset_statistics(dataset, aois=train_area, size=options.size, seed=options.seed)
    remap = {value: number for number, value in enumerate(options.classes)}
    classes = rm.RasteretDataset(labels, labels.bands, is_image=False, crs=dataset.crs, labels={"remap": remap})

    train_set = dataset & classes
    val_set = rm.RasteretDataset(images, bands, sample={"mask_aoi": True}) & classes
    size, load = options.size, functools.partial(rm.DataLoader, num_workers=options.workers)
    random = rm.RandomAOISampler(train_set, size, options.length, train_area, placement="inside", seed=options.seed)
    grid = rm.GridAOISampler(val_set, size, aois=val_area)
    overlapping = rm.GridAOISampler(dataset, size, size - size // 4)
    return Data(
        train=load(train_set, options.batch_size, sampler=random),
        val=load(val_set, options.batch_size, sampler=grid),
        everywhere=load(dataset, options.batch_size, sampler=overlapping),
        normalize=functools.partial(rm.normalize, mean=statistics.mean, std=statistics.std),
    )


def build_model(name: str, bands: int, classes: int) -> torch.nn.Module:
    """Build a network from `[B, C, H, W]` to scores `[B, K, H, W]`."""
    if name == "fcn":
        return FCN(in_channels=bands, classes=classes, num_filters=16)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=bands, classes=classes)


def train(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """Train, validate and write the map; return the model and the confusion matrix `[classes, classes]`."""
    data = load_data(options)
    torch.manual_seed(options.seed)
    first = data.train.dataset[next(iter(data.train.sampler))]
    model = build_model(options.model, first["image"].shape[0], len(options.classes))
    criterion = torch.nn.CrossEntropyLoss(ignore_index=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=1e-2)
    steps = max(2, options.epochs * len(data.train))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options.lr, total_steps=steps)
    for epoch in range(options.epochs):
        for stored in data.train:  # each pass is another epoch of the sampler
            batch = rm.random_flip_rot90(data.normalize(stored), options.seed)
            optimizer.zero_grad()
            loss = criterion(model(batch["image"]), batch["mask"])
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}  waited {100 * data.train.stats().wait_share:.0f} %")
    confusion = validate(model, map(data.normalize, data.val), len(options.classes))
    if options.map:
        rm.predict_map(model, data.everywhere, options.map, normalize=data.normalize)
    for loader in (data.train, data.val, data.everywhere):
        loader.close()
    return model, confusion


@torch.no_grad()
def validate(model: torch.nn.Module, batches: Iterable[dict[str, Any]], classes: int) -> torch.Tensor:
    """Count pixels by label (rows) and prediction (columns) over the held-out area."""
    model.eval()
    metric = MulticlassConfusionMatrix(classes, ignore_index=-100)
    for batch in batches:
        metric.update(model(batch["image"]), batch["mask"])
    return metric.compute()


def print_iou(confusion: torch.Tensor, names: Sequence[str]) -> None:
    """Print the intersection over union of each class, and the mean over those that occur."""
    hits = confusion.diagonal()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)  # NaN for a class that does not occur
    print(f"validation mIoU      {iou.nanmean():.3f}")
    for name, value in zip(names, iou, strict=True):
        print(f"  {name:<18} {value:.3f}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="path, glob or URL of GeoTIFFs")
    parser.add_argument("--labels", required=True, help="path, glob or URL of a raster of classes")
    parser.add_argument("--bands", nargs="+", help="default all; for files of one band each, words in their names")
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 2, 3, 4], help="stored label values")
    parser.add_argument("--collections", default="outputs/plain_loop", help="folder of the index")
    parser.add_argument("--map", help="path of a map of everything; default none")
    parser.add_argument("--model", choices=("unet", "fcn"), default="unet")
    parser.add_argument("--size", type=int, default=128, help="chip size in pixels")
    parser.add_argument("--length", type=int, default=640, help="chips in an epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    """Run."""
    options = parse()
    _, confusion = train(options)
    print_iou(confusion, [f"class {value}" for value in options.classes])


if __name__ == "__main__":
    main()
