"""A cloudy season: a fixed number of dates, the clear pixels of each date, and composites of all dates.

    python examples/time_series.py                              the demo: six dates on two adjacent tiles
    python examples/time_series.py --data 'items/*/*.json'      STAC items with B02, B03, B04, B08 and SCL

Records of the same day form one date, so adjacent tiles of a pass are mosaicked. T is always `--length`: if there are
fewer dates, the rest is padding, where `time_valid` is False.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np
from demo_scenes import BANDS
from demo_sets import make_season
from matplotlib.figure import Figure

import rasteret_ml as rm


def main(argv: Sequence[str] | None = None) -> None:
    """Read one location as a series and as three kinds of image, and draw them."""
    options = arguments(argv)
    items = make_season(options.out / "demo") if options.data is None else sorted(glob(options.data))
    collection = rm.build([str(item) for item in items], options.out / "season.parquet", bands=[*BANDS, "SCL"])

    dataset = partial(rm.RasteretDataset, collection, BANDS, quality="sentinel-2-scl")

    series = dataset(series=rm.TimeSeries(length=options.length, choose="even"))
    query = centre(series, options.size)
    sample = series[query]
    print(f"image                {tuple(sample['image'].shape)}   [T, C, H, W]")
    for time, real, valid, clear in zip(
        sample["time"], sample["time_valid"], sample["mask_valid"], sample["mask_clear"], strict=True
    ):
        date = np.datetime64(int(time), "s").astype("datetime64[D]") if real else "padding   "
        print(f"  {date}         {valid.float().mean():4.0%} valid, {clear.float().mean():4.0%} clear")

    images = {
        "newest pixel": dataset(mosaic={"order": "newest"}),
        "clear pixels first": dataset(mosaic={"clear_first": True}),
        "median of clear pixels": dataset(composite="median"),
    }
    samples = {name: image[query] for name, image in images.items()}
    for name, image in samples.items():
        print(f"{name:<23}{image['mask_clear'].float().mean():4.0%} clear")
    print(f"picture              {draw(series, sample, samples, options.out / 'time_series.png')}")


def centre(dataset: rm.RasteretDataset, size: int) -> tuple[slice, slice]:
    """Return a query for the chip at the centre of the dataset, which spans both tiles of the demo."""
    xmin, ymin, xmax, ymax = dataset.index.total_bounds
    x, y, half = (xmin + xmax) / 2, (ymin + ymax) / 2, size * dataset.res[0] / 2
    return slice(x - half, x + half), slice(y - half, y + half)


def draw(series: rm.RasteretDataset, sample: dict, images: dict[str, dict], path: Path) -> Path:
    """Draw the dates in a row and the images below."""
    dates = len(sample["image"])
    figure = Figure(figsize=(2.3 * dates, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    above.suptitle("Fixed number of dates; dotted where not clear")
    series.plot(sample, axes=above.subplots(1, dates))
    below.suptitle("Images of all dates")
    for ax, (name, image) in zip(below.subplots(1, len(images)), images.items(), strict=True):
        series.plot(image, axes=ax, title=f"{name}: {image['mask_clear'].float().mean():.0%} clear")
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/time_series"), help="output folder")
    parser.add_argument("--data", help="glob pattern of STAC items (JSON); default: the demo")
    parser.add_argument("--size", type=int, default=160, help="chip size in pixels")
    parser.add_argument("--length", type=int, default=7, help="number of dates, T")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
