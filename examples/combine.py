"""Combine datasets with TorchGeo's RasterDataset and VectorDataset by `&` and `|`, on either side.

    python examples/combine.py

With this library's dataset on the left, a batch is read in one call and the result has validity masks. TorchGeo yields
float32 pixels without validity, so convert this library's images to float32 before `&` with TorchGeo's; `|` takes this
library's pixels where they are valid and TorchGeo's elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from demo_scenes import BANDS
from demo_sets import make_fields
from matplotlib.figure import Figure
from torchgeo.datasets import RasterDataset, VectorDataset

import rasteret_ml as rm

CROPS = {0: "no field", 1: "water", 2: "forest", 3: "cropland", 4: "bare soil"}


class Scenes(RasterDataset):
    """The demo's near infrared, read by TorchGeo."""

    filename_glob = "T33_*_B08.tif"
    filename_regex = r"T33_\d+_(?P<date>\d{8})_B08"


class Fields(VectorDataset):
    """The demo's fields, rasterized by TorchGeo."""

    filename_glob = "fields.geojson"


def main(argv: Sequence[str] | None = None) -> None:
    """Read a batch from each combination, print its shapes and draw some."""
    options = arguments(argv)
    demo = options.out / "demo"
    make_fields(demo)
    scenes = rm.build(str(demo / "T33_*.tif"), options.out / "scenes.parquet", bands=BANDS)

    ours = rm.RasteretDataset(scenes, BANDS[:3], transforms=as_float)
    west = rm.RasteretDataset(scenes.where(pc.field("id") == "T33_00_20230815"), ["B08"], transforms=as_float)
    polygons = rm.PolygonDataset(demo / "fields.geojson", "crop", classes={name: n for n, name in CROPS.items() if n})
    raster = Scenes(str(demo))
    vector = Fields(str(demo), res=raster.res, label_name="number")

    combinations = {
        "ours & RasterDataset": ours & raster,
        "RasterDataset & ours": raster & ours,
        "ours & VectorDataset": ours & vector,
        "VectorDataset & ours": vector & ours,
        "RasterDataset & our polygons": raster & polygons,
        "ours | RasterDataset": west | raster,
        "RasterDataset | ours": raster | west,
    }
    samples = {}
    for name, dataset in combinations.items():
        sampler = rm.RandomAOISampler(dataset, options.size, 4, seed=2)
        batch = next(iter(rm.DataLoader(dataset, batch_size=4, sampler=sampler)))
        print(f"{name:<30}{ {key: tuple(batch[key].shape) for key in batch if key.startswith(('image', 'mask'))} }")
        pixels = batch.get("mask", batch["image"])
        best = max(range(4), key=lambda i: len(pixels[i].unique()))  # the sample with the most different values
        samples[name] = {key: value[best] for key, value in batch.items()}

    x, y = west.bounds[0].stop, (west.bounds[1].start + west.bounds[1].stop) / 2  # the eastern edge of `west`
    half = options.size * west.res[0] / 2
    edge = slice(x - half, x + half), slice(y - half, y + half)
    samples |= {"ours alone": west[edge], "filled by `|`": (west | raster)[edge]}
    shares = [samples[name]["mask_valid"].float().mean() for name in ("ours alone", "filled by `|`")]
    print(f"valid at the edge of ours     {shares[0]:.0%} alone, {shares[1]:.0%} with `|`")
    print(f"picture                       {draw(ours, samples, options.out / 'combine.png')}")


def as_float(sample: dict[str, Any]) -> dict[str, Any]:
    """Convert the image from its stored type to float32, as TorchGeo does."""
    return sample | {"image": sample["image"].float()}


def draw(ours: rm.RasteretDataset, samples: dict[str, dict[str, Any]], path: Path) -> Path:
    """Draw images with TorchGeo's labels, TorchGeo's images with labels of this library, and what `|` fills."""
    figure = Figure(figsize=(16, 4), layout="constrained")
    axes = figure.subplots(1, 6)
    ours.plot(samples["ours & VectorDataset"], axes=axes[:2], classes=CROPS, bands=BANDS[:3])
    ours.plot(samples["RasterDataset & our polygons"], axes=axes[2:4], classes=CROPS, bands=["B08"])
    ours.plot(samples["ours alone"], axes=axes[4], bands=["B08"])
    ours.plot(samples["filled by `|`"], axes=axes[5], bands=["B08"])
    titles = ("ours", "& VectorDataset", "RasterDataset", "& our polygons", "ours alone", "| RasterDataset")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/combine"), help="output folder")
    parser.add_argument("--size", type=int, default=96, help="chip size in pixels")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
