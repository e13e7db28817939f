"""Training without Lightning or Hydra: datasets, samplers, loaders, and a loop of one's own.

    python examples/plain_loop.py --images 'scenes/T33_*.tif' --labels scenes/land_cover.tif --bands B02 B03 B04 B08

With the same values it sees the same batches as the datamodule does, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
from scoring import print_scores
from torchgeo.models import FCN

import rasteret_ml as rm
from rasteret_ml.train.losses import confusion_matrix


def loaders(options: argparse.Namespace) -> tuple[rm.DataLoader, rm.DataLoader, rm.DataLoader, Any]:
    """Loaders to train, to validate and to predict with, and what brings their batches to the model."""
    images = rm.build(options.images, options.collections + "/images.parquet", bands=options.bands)
    labels = rm.build(options.labels, options.collections + "/labels.parquet", datetime=None)
    bands = options.bands or images.bands
    dataset = rm.RasteretDataset(images, bands)
    train, held_out = rm.spatial_split(dataset, side="top", fraction=0.3)
    statistics = rm.dataset_statistics(dataset, aois=train, size=options.size, seed=options.seed)
    remap = {value: number for number, value in enumerate(options.classes)}
    classes = rm.RasteretDataset(labels, labels.bands, is_image=False, crs=dataset.crs, labels={"remap": remap})

    training = dataset & classes
    sampler = rm.RandomAOISampler(training, options.size, options.length, train, placement="inside", seed=options.seed)
    validation = rm.RasteretDataset(images, bands, sample={"mask_aoi": True}) & classes
    grid = rm.GridAOISampler(validation, options.size, aois=held_out)
    everywhere = rm.GridAOISampler(dataset, options.size, options.size - options.size // 4)
    return (
        rm.DataLoader(training, options.batch_size, sampler=sampler, num_workers=options.workers),
        rm.DataLoader(validation, options.batch_size, sampler=grid, num_workers=options.workers),
        rm.DataLoader(dataset, options.batch_size, sampler=everywhere, num_workers=options.workers),
        functools.partial(rm.normalize, mean=statistics.mean, std=statistics.std),
    )


def new_model(name: str, bands: int, classes: int) -> torch.nn.Module:
    """A network from `[B, C, H, W]` to scores `[B, K, H, W]`."""
    if name == "fcn":
        return FCN(in_channels=bands, classes=classes, num_filters=16)
    return smp.Unet("resnet18", encoder_weights=None, in_channels=bands, classes=classes)


def train(options: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """Train and validate; returns the model and the counts `[classes, classes]` of labels and predictions."""
    training, validation, everywhere, ready = loaders(options)
    torch.manual_seed(options.seed)
    first = training.dataset[next(iter(training.sampler))]
    model = new_model(options.model, first["image"].shape[0], len(options.classes))
    criterion = torch.nn.CrossEntropyLoss(ignore_index=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=1e-2)
    steps = max(2, options.epochs * len(training))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=options.lr, total_steps=steps)
    for epoch in range(options.epochs):
        for stored in training:  # another epoch of the sampler each time
            batch = rm.random_flip_rot90(ready(stored), options.seed)
            optimizer.zero_grad()
            loss = criterion(model(batch["image"]), batch["mask"])
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}  loss {loss.item():.3f}  waited {100 * training.stats().wait_share:.0f} %")
    confusion = validate(model, map(ready, validation), len(options.classes))
    if options.map:
        rm.predict_map(model, everywhere, options.map, normalize=ready)
    for loader in (training, validation, everywhere):
        loader.close()
    return model, confusion


@torch.no_grad()
def validate(model: torch.nn.Module, batches: Any, classes: int) -> Any:
    """Counts of labels and predictions over the held-out area."""
    model.eval()
    return sum(confusion_matrix(batch["mask"], model(batch["image"]).argmax(1), classes) for batch in batches)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A plain PyTorch loop over GeoTIFFs.")
    parser.add_argument("--images", required=True, help="path, glob or URL of GeoTIFFs")
    parser.add_argument("--labels", required=True, help="the same for a raster of classes")
    parser.add_argument("--bands", nargs="+", help="default all; for files of one band each, words in their names")
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 2, 3, 4], help="stored label values")
    parser.add_argument("--collections", default="outputs/plain_loop", help="where the index is written")
    parser.add_argument("--map", help="where to write a map of everything; default nowhere")
    parser.add_argument("--model", choices=("unet", "fcn"), default="unet")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--length", type=int, default=640, help="chips in an epoch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    _, confusion = train(options)
    print_scores(confusion, [f"class {value}" for value in options.classes])


if __name__ == "__main__":
    main()
