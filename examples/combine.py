"""`&` and `|` with TorchGeo's own RasterDataset and VectorDataset, on either side.

    python examples/combine.py

Where ours is the left operand, a batch is one read and the result says what is valid. TorchGeo gives float32 pixels and
no validity, so `&` of two images wants ours as float32 as well; `|` takes ours where it is valid, and TorchGeo's else.
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
    """The demo's fields, painted by TorchGeo."""

    filename_glob = "fields.geojson"


def main(argv: Sequence[str] | None = None) -> None:
    """Combine, print what each combination gives, draw some."""
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
    for name, both in combinations.items():
        sampler = rm.RandomAOISampler(both, options.size, 4, seed=2)
        batch = next(iter(rm.DataLoader(both, batch_size=4, sampler=sampler)))
        print(f"{name:<30}{ {key: tuple(batch[key].shape) for key in batch if key.startswith(('image', 'mask'))} }")
        varied = max(range(4), key=lambda i: len(batch.get("mask", batch["image"])[i].unique()))
        samples[name] = {key: value[varied] for key, value in batch.items()}

    x, y = west.bounds[0].stop, (west.bounds[1].start + west.bounds[1].stop) / 2  # the eastern edge of ours
    half = options.size * west.res[0] / 2
    edge = slice(x - half, x + half), slice(y - half, y + half)
    samples |= {"ours alone": west[edge], "filled by `|`": (west | raster)[edge]}
    shares = [samples[name]["mask_valid"].float().mean() for name in ("ours alone", "filled by `|`")]
    print(f"valid at the edge of ours     {shares[0]:.0%} alone, {shares[1]:.0%} with `|`")
    print(f"picture                       {draw(ours, samples, options.out / 'combine.png')}")


def as_float(sample: dict[str, Any]) -> dict[str, Any]:
    """TorchGeo's images are float32; ours are as stored."""
    return sample | {"image": sample["image"].float()}


def draw(ours: rm.RasteretDataset, samples: dict[str, dict[str, Any]], path: Path) -> Path:
    """Images with labels by TorchGeo, pixels by TorchGeo with labels by us, and what `|` fills."""
    figure = Figure(figsize=(16, 4), layout="constrained")
    axes = figure.subplots(1, 6)
    ours.plot(samples["ours & VectorDataset"], axes=axes[:2], classes=CROPS, bands=BANDS[:3])
    other = samples["RasterDataset & our polygons"]
    ours.plot(other, axes=axes[2:4], classes=CROPS, bands=["B08"])
    ours.plot(samples["ours alone"], axes=axes[4], bands=["B08"])
    ours.plot(samples["filled by `|`"], axes=axes[5], bands=["B08"])
    titles = ("ours", "& VectorDataset", "RasterDataset", "& our polygons", "ours alone", "| RasterDataset")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/combine"), help="folder for what is written")
    parser.add_argument("--size", type=int, default=96, help="pixels along a side of a chip")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
