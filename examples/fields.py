"""Classify fields: train a CNN on a table of polygons with crop classes, the `label` of each sample.

    python examples/fields.py                                  the demo
    python examples/fields.py --data 'scenes/*.tif' --aois fields.gpkg --label crop

Fields are split by block, so that neighbours stay together, with a buffer that keeps the chips of the two splits apart.
The network pools over `mask_aoi`: it sees the field without its surroundings.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import geopandas as gpd
import torch
from demo_scenes import BANDS
from demo_sets import make_fields
from figures import stretch
from matplotlib.figure import Figure
from torch import nn

import rasteret_ml as rm


class FieldClassifier(nn.Module):
    """Convolutions, the mean over the field's pixels, and a linear layer."""

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(bands, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(32, classes)

    def forward(self, image: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        """Return scores `[B, K]` for chips `[B, C, H, W]`; `inside` `[B, 1, H, W]` is 1 on the field."""
        features = self.features(image * inside) * inside
        return self.head(features.sum((2, 3)) / inside.sum((2, 3)).clamp(min=1))


def main(argv: Sequence[str] | None = None) -> None:
    """Split, train, validate, draw."""
    options = arguments(argv)
    torch.manual_seed(options.seed)
    if options.data is None:  # the demo
        options.aois, options.label = make_fields(options.out / "demo"), "crop"
        options.data, options.bands = str(options.out / "demo" / "T33_*.tif"), BANDS
    collection = rm.build(options.data, options.out / "images.parquet", bands=options.bands)
    images = rm.RasteretDataset(collection, collection.bands, sample={"mask_aoi": True})

    # Chips are centred on fields and may extend past them: the buffer keeps those of the two splits apart.
    fields, chip = gpd.read_file(options.aois).to_crs(images.crs), options.size * images.res[0]
    shares = {"train": 0.7, "val": 0.3}
    fields = rm.split_aois(fields, shares, by="block", side=12 * chip, buffer=chip, stratify=options.label)
    table = rm.AOITable.of(fields, label=options.label)
    train, val = (table.where((table.attributes["split"] == name).to_numpy()) for name in shares)
    train_sampler = rm.PerAOISampler(images, options.size, train, shuffle=True, seed=options.seed)
    val_sampler = rm.PerAOISampler(images, options.size, val)
    rm.check_splits({"train": train_sampler, "val": val_sampler})  # raises an error if they could share a pixel
    print(f"fields               {len(train)} to train on, {len(val)} to validate, {len(table.classes)} classes")

    statistics = rm.dataset_statistics(images, aois=train, size=options.size, seed=options.seed)
    mean, std = (torch.tensor(values)[:, None, None] for values in (statistics.mean, statistics.std))
    model = FieldClassifier(len(images.bands), len(table.classes))

    def scores(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model((batch["image"].float() - mean) / std, (batch["mask_aoi"] & batch["mask_valid"]).float())

    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loader = rm.DataLoader(images, batch_size=32, sampler=train_sampler)
    for _ in range(options.epochs):
        for batch in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores(batch), batch["label"]).backward()
            optimizer.step()

    results = []
    with torch.no_grad():
        for batch in rm.DataLoader(images, batch_size=64, sampler=val_sampler):
            results.append((scores(batch).argmax(1), batch["label"]))
    predicted, truth = (torch.cat(part) for part in zip(*results, strict=True))
    accuracy, majority = (predicted == truth).float().mean(), truth.bincount().max() / len(truth)
    print(f"validation accuracy  {accuracy:.3f}   (always the majority class: {majority:.3f})")
    print(f"picture              {draw(images, val, predicted, truth, 2 * options.size, options.out / 'fields.png')}")


def draw(
    images: rm.RasteretDataset, val: rm.AOITable, predicted: torch.Tensor, truth: torch.Tensor, size: int, path: Path
) -> Path:
    """Draw validation fields, wrong ones first, with their surroundings, predicted and true class."""
    sampler = rm.PerAOISampler(images, size, val)  # in the order of `predicted`
    wrong_first = (predicted == truth).int().argsort(stable=True)
    shown = wrong_first[torch.linspace(0, len(val) - 1, 12).long()].tolist()
    batch = rm.collate(images.__getitems__([sampler.at(position) for position in shown]))
    bands = batch["image"][:, [2, 1, 0]].transpose(0, 1).flatten(1, 2)  # blue, green and red come first here
    chips = stretch(bands.numpy(), batch["mask_valid"].flatten(0, 2).numpy()).reshape(12, size, size, 3)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for ax, chip, inside, position in zip(figure.subplots(2, 6).flat, chips, batch["mask_aoi"], shown, strict=True):
        ax.imshow(chip**0.7)  # forest and water are dark
        ax.contour(inside[0], levels=[0.5], colors="yellow", linewidths=1.2)
        guess, true = (val.classes[int(number)] for number in (predicted[position], truth[position]))
        ax.set_title(f"{guess}" if guess == true else f"{guess}, not {true}", fontsize=10)
        ax.title.set_color("black" if guess == true else "crimson")
        ax.set_axis_off()
    figure.suptitle(f"Predicted crop of held-out fields ({(predicted == truth).float().mean():.0%} correct)")
    figure.savefig(path, dpi=110)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/fields"), help="output folder")
    parser.add_argument("--data", help="GeoTIFFs, one file per scene, as a folder or glob; default the demo")
    parser.add_argument("--bands", nargs="+", help="names of their bands; default B1, B2, …")
    parser.add_argument("--aois", help="table of polygons")
    parser.add_argument("--label", help="column of classes")
    parser.add_argument("--size", type=int, default=24, help="pixels along a side of a chip")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
