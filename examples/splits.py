"""Splits that do not leak: blocks with a buffer, records by place, a check, and statistics of the training area.

    python examples/splits.py                              the demo
    python examples/splits.py --data 'scenes/*.tif' --side 5000 --buffer 500

`check_splits` compares what the samplers can read, and raises an error if two splits could read the same pixel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from demo_scenes import BANDS, make_scenes
from matplotlib.figure import Figure

import rasteret_ml as rm
from rasteret_ml.errors import SplitLeakError

SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


def main(argv: Sequence[str] | None = None) -> None:
    """Split the area and the records, check the splits, compute statistics, draw."""
    options = arguments(argv)
    if options.data is None:  # the demo
        make_scenes(options.out / "demo")
        options.data, options.bands = str(options.out / "demo" / "T33_*.tif"), BANDS
    scenes = rm.build(options.data, options.out / "scenes.parquet", bands=options.bands)
    images = rm.RasteretDataset(scenes, scenes.bands)

    # A common mistake: random chips for each split from the same scenes.
    random = {name: rm.RandomAOISampler(images, 64, 100, seed=seed) for seed, name in enumerate(SHARES)}
    try:
        rm.check_splits(random)
    except SplitLeakError as error:
        print(f"random chips         refused: {str(error).split(';')[0].split(', for example')[0]}")

    # Blocks at least `buffer` apart, with chips inside their split.
    blocks = rm.split_blocks(images, options.side, SHARES, buffer=options.buffer, seed=options.seed)
    blocks.to_file(options.out / "blocks.geojson")
    samplers = {
        name: rm.RandomAOISampler(images, 64, 100, aois=rows, placement="inside", outside="drop")
        for name, rows in blocks.groupby("split")
    }
    rm.check_splits(samplers, buffer=options.buffer)
    areas = blocks.dissolve("split").area
    shares = ", ".join(f"{name} {areas[name] / areas.sum():.0%}" for name in SHARES)
    print(f"blocks               pass, {options.buffer:g} apart: {shares}")

    # By "scene", records whose footprints overlap stay together. The column `split` is stored with them.
    by_scene = rm.split_records(scenes, {"train": 0.5, "val": 0.25, "test": 0.25}, by=options.by, seed=options.seed)
    stored = by_scene.write(options.out / "scenes_split.parquet")
    print(f"records              {', '.join(f'{len(stored.subset(split=name))} {name}' for name in SHARES)}")

    # Statistics come from the training area only; the datamodule reads this file.
    statistics = rm.dataset_statistics(images, aois=blocks[blocks["split"] == "train"], size=128)
    print(f"statistics           {statistics.save(options.out / 'statistics.yaml')}")
    for name, band in statistics.bands.items():
        print(f"  {name:<18} mean {band.mean:7.1f}, standard deviation {band.std:6.1f}, {band.count:,} pixels")

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    stored.plot(color="split", ax=left)
    left.set_title(f"records, by {options.by}")
    scenes.plot(aois=blocks, color="split", ax=right)
    right.set_title(f"blocks of {options.side:g}, {options.buffer:g} apart")
    figure.savefig(options.out / "splits.png", dpi=100)
    print(f"picture              {options.out / 'splits.png'}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/splits"), help="output folder")
    parser.add_argument("--data", help="GeoTIFFs, one file per scene, as a folder or glob; default the demo")
    parser.add_argument("--bands", nargs="+", help="names of their bands; default B1, B2, …")
    parser.add_argument("--side", type=float, default=2048, help="side of a block in CRS units")
    parser.add_argument("--buffer", type=float, default=200, help="distance between splits in CRS units")
    parser.add_argument("--by", default="scene", help="what records are split by: scene, time or a column such as id")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
