"""Five ways to sample chips: uniform, weighted, class-balanced, mostly valid pixels, and a grid.

    python examples/sampling.py                                                the demo: a scene with holes
    python examples/sampling.py --data scene.tif --labels cover.tif --aois areas.gpkg --weight priority

The picture shows the location of the chips and the shares of the classes in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import shapely
from demo_scenes import BANDS, CLASSES
from demo_sets import make_gappy
from figures import colour
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

import rasteret_ml as rm


def main(argv: Sequence[str] | None = None) -> None:
    """Sample chips in five ways and compare their contents."""
    options = arguments(argv)
    if options.data is None:  # the demo
        options.data, options.labels = (str(path) for path in make_gappy(options.out / "demo"))
        options.bands = BANDS
    scenes = rm.build(options.data, options.out / "scene.parquet", bands=options.bands)
    cover = rm.build(options.labels, options.out / "cover.parquet", bands=["cover"], datetime=None)
    labels = rm.RasteretDataset(cover, ["cover"], is_image=False)
    both = rm.RasteretDataset(scenes, scenes.bands) & labels
    size, length = options.size, options.length

    areas = quarters(both) if options.aois is None else gpd.read_file(options.aois)
    cells = rm.label_cells(labels, size)  # classes in each cell of a grid, in one pass over the labels
    samplers = {
        "uniform": rm.RandomAOISampler(both, size, length),
        "weighted": rm.RandomAOISampler(both, size, length, aois=areas, weight=options.weight),
        "balanced": rm.RandomAOISampler(both, size, length, aois=cells, weight=rm.balanced_weights(cells)),
        "90 % valid": rm.RandomAOISampler(both, size, length, min_valid={"min_valid": 0.9, "max_redraws": 7}),
        "grid": rm.GridAOISampler(both, size),
    }
    results = {name: read_chips(both, sampler) for name, sampler in samplers.items()}
    print(f"{'':<12} chips   valid   {'   '.join(f'{name:>9}' for name in CLASSES)}")
    for name, (squares, valid, shares) in results.items():
        print(f"{name:<12} {len(squares):>5}   {valid:>5.0%}   {'   '.join(f'{share:>9.1%}' for share in shares)}")
    lowest = min(results["90 % valid"][0], key=lambda square: square[1])[1]
    print(f"least valid chip     {lowest:.0%} of '90 % valid'")
    print(f"picture              {draw(both, results, options.out / 'sampling.png')}")


def quarters(dataset: Any) -> gpd.GeoDataFrame:
    """Return four areas with a column `priority`."""
    xmin, ymin, xmax, ymax = dataset.index.total_bounds
    x, y = (xmin + xmax) / 2, (ymin + ymax) / 2
    boxes = [shapely.box(xmin, y, x, ymax), shapely.box(x, y, xmax, ymax)]
    boxes += [shapely.box(xmin, ymin, x, y), shapely.box(x, ymin, xmax, y)]
    return gpd.GeoDataFrame({"priority": [1.0, 6.0, 2.0, 1.0]}, geometry=boxes, crs=dataset.crs)


def read_chips(both: Any, sampler: Any) -> tuple[list[tuple[shapely.Polygon, float]], float, np.ndarray]:
    """Return each chip's square and valid share, the mean valid share, and the share of each class."""
    squares, counts = [], np.zeros(len(CLASSES))
    for batch in rm.DataLoader(both, batch_size=16, sampler=sampler):
        valid = batch["mask_valid"][:, 0]
        x0, x1, _, y0, y1 = batch["bounds"][:, :5].T.numpy()
        squares += zip(shapely.box(x0, y0, x1, y1), valid.float().mean((1, 2)).tolist(), strict=True)
        counts += np.bincount(batch["mask"][valid].numpy(), minlength=len(CLASSES) + 1)[1:]
    return squares, float(np.mean([share for _, share in squares])), counts / counts.sum()


def draw(both: Any, results: dict[str, Any], path: Path) -> Path:
    """Draw the chips on the labels (white: not valid), and below them the shares of the classes."""
    xmin, ymin, xmax, ymax = both.index.total_bounds
    scene = both[xmin:xmax, ymin:ymax]
    mask = np.where(scene["mask_valid"][0], scene["mask"], np.nan)
    colours = [tuple(v / 255 for v in colour(i)) for i in range(len(CLASSES))]
    figure = Figure(figsize=(3.1 * len(results), 5.4), layout="constrained")
    axes = figure.subplots(2, len(results), height_ratios=(2, 1), sharey="row")
    for (above, below), (name, (squares, valid, shares)) in zip(axes.T, results.items(), strict=True):
        above.imshow(mask, cmap=ListedColormap(colours), alpha=0.45, extent=(xmin, xmax, ymin, ymax))
        for square, _ in squares:
            above.plot(*square.exterior.xy, color="black", linewidth=0.5, alpha=0.6)
        above.set(
            title=f"{name}: {len(squares)} chips, {valid:.0%} valid",
            xticks=[],
            yticks=[],
            xlim=(xmin, xmax),
            ylim=(ymin, ymax),
        )
        below.bar(CLASSES, 100 * shares, color=colours)
        below.tick_params(labelsize=8)
        below.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("% of labelled pixels")
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/sampling"), help="output folder")
    parser.add_argument("--data", help="GeoTIFFs, one file per scene, as a folder or glob; default the demo")
    parser.add_argument("--bands", nargs="+", help="names of their bands; default B1, B2, …")
    parser.add_argument("--labels", help="GeoTIFF of classes 1 to 4")
    parser.add_argument("--aois", help="table of areas with weights; default the four quarters")
    parser.add_argument("--weight", default="priority", help="column of weights")
    parser.add_argument("--size", type=int, default=48, help="pixels along a side of a chip")
    parser.add_argument("--length", type=int, default=96, help="number of random chips")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
