"""A season with clouds: a fixed number of dates, what is clear on each, and composites of them all.

    python examples/time_series.py                              the demo: six dates on two adjacent tiles
    python examples/time_series.py --data 'items/*/*.json'      STAC items with B02, B03, B04, B08 and SCL

Records of one day are one date, so that adjacent tiles of a pass are mosaicked. T is always what was asked for: where
there are fewer dates, the rest is padding and `time_valid` says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
from demo_scenes import BANDS
from demo_sets import make_season
from matplotlib.figure import Figure

import rasteret_ml as rm


def main(argv: Sequence[str] | None = None) -> None:
    """Read one place as a series and as three kinds of image, and draw them."""
    options = arguments(argv)
    items = make_season(options.out / "demo") if options.data is None else sorted(glob(options.data))
    collection = rm.build([str(item) for item in items], options.out / "season.parquet", bands=[*BANDS, "SCL"])

    def dataset(**how: object) -> rm.RasteretDataset:
        return rm.RasteretDataset(collection, BANDS, quality="sentinel-2-scl", **how)

    series = dataset(series=rm.TimeSeries(length=options.length, choose="even"))
    place = middle(series, options.size)
    sample = series[place]
    print(f"image                {tuple(sample['image'].shape)}   [T, C, H, W]")
    for time, held, valid, clear in zip(
        sample["time"], sample["time_valid"], sample["mask_valid"], sample["mask_clear"], strict=True
    ):
        date = np.datetime64(int(time), "s").astype("datetime64[D]") if held else "padding   "
        print(f"  {date}         {valid.float().mean():4.0%} valid, {clear.float().mean():4.0%} clear")

    images = {
        "newest pixel": dataset(mosaic={"order": "newest"}),
        "clear pixels first": dataset(mosaic={"clear_first": True}),
        "median of clear pixels": dataset(composite="median"),
    }
    found = {name: each[place] for name, each in images.items()}
    for name, one in found.items():
        print(f"{name:<23}{one['mask_clear'].float().mean():4.0%} clear")
    print(f"picture              {draw(series, sample, found, options.out / 'time_series.png')}")


def middle(dataset: rm.RasteretDataset, size: int) -> tuple[slice, slice]:
    """A chip in the middle of everything, over the edge between the tiles."""
    xmin, ymin, xmax, ymax = dataset.index.total_bounds
    x, y, half = (xmin + xmax) / 2, (ymin + ymax) / 2, size * dataset.res[0] / 2
    return slice(x - half, x + half), slice(y - half, y + half)


def draw(series: rm.RasteretDataset, sample: dict, images: dict[str, dict], path: Path) -> Path:
    """The strip of dates, and below it the images."""
    dates = len(sample["image"])
    figure = Figure(figsize=(2.3 * dates, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    above.suptitle("Dates, T fixed: dotted where not clear")
    series.plot(sample, axes=above.subplots(1, dates))
    below.suptitle("One image of them")
    for ax, (name, one) in zip(below.subplots(1, len(images)), images.items(), strict=True):
        series.plot(one, axes=ax, title=f"{name}: {one['mask_clear'].float().mean():.0%} clear")
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/time_series"), help="folder for what is written")
    parser.add_argument("--data", help="glob of STAC item JSONs; default the demo")
    parser.add_argument("--size", type=int, default=160, help="pixels along a side of the chip")
    parser.add_argument("--length", type=int, default=7, help="dates, T")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
