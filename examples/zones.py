"""Scenes in two UTM zones: each chip on its scene's grid, or all chips on one grid, with matching labels.

    python examples/zones.py                                            the demo: the boundary of zones 32 and 33
    python examples/zones.py --data 'scenes/*.tif' --labels labels.tif --crs EPSG:32633

`grid="native"` resamples no image: a batch holds chips of both zones, and `epsg` states the zone of each. The labels
are one raster in zone 33; `images & labels` reprojects them to the grid of each chip.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from demo_scenes import BANDS, CLASSES, SPECTRA
from demo_sets import make_zones
from figures import colour
from matplotlib.figure import Figure

import rasteret_ml as rm


def main(argv: Sequence[str] | None = None) -> None:
    """Read a batch from both zones and a chip across their boundary, and draw them."""
    options = arguments(argv)
    demo = options.data is None
    if demo:
        (options.data, options.labels), options.bands = make_zones(options.out / "demo"), BANDS
    scenes = rm.build(options.data, options.out / "scenes.parquet", bands=options.bands)
    cover = rm.build(options.labels, options.out / "cover.parquet", bands=["cover"], datetime=None)
    classes = rm.RasteretDataset(cover, ["cover"], is_image=False)
    print(f"CRSs                 {', '.join(scenes.crs)}")

    # Each chip on the pixels of its scene, without resampling.
    native = rm.RasteretDataset(scenes, scenes.bands, grid="native") & classes
    sampler = rm.RandomAOISampler(native, options.size, options.length, seed=3)
    batches = list(rm.DataLoader(native, batch_size=8, sampler=sampler))
    epsg = torch.cat([batch["epsg"] for batch in batches])
    print(f"first batch          image {tuple(batches[0]['image'].shape)}, epsg {batches[0]['epsg'].tolist()}")

    # One grid for all chips: they may lie across the boundary of the zones.
    common = rm.RasteretDataset(scenes, scenes.bands, crs=options.crs, res=10) & classes
    xmin, ymin, xmax, ymax = common.index.total_bounds
    x, y, half = (xmin + xmax) / 2, (ymin + ymax) / 2, 150 * 10
    across = common[x - half : x + half, y - half : y + half]
    print(f"across the edge      image {tuple(across['image'].shape)} in {options.crs}")

    if demo:  # its pixels reveal their class: labels that are off by a pixel would not match
        for code in epsg.unique().tolist():
            shares = [agreement(batch, batch["epsg"] == code) for batch in batches if (batch["epsg"] == code).any()]
            print(f"labels fit pixels    {np.mean(shares):.3f} in EPSG:{code}, native")
        batch = {key: value[None] for key, value in across.items() if key in ("image", "mask", "mask_valid")}
        print(f"labels fit pixels    {agreement(batch, torch.tensor([True])):.3f} across the edge, {options.crs}")
    print(f"picture              {draw(native, batches[0], across, options.crs, options.out / 'zones.png')}")


def agreement(batch: dict[str, torch.Tensor], selection: torch.Tensor) -> float:
    """Return the share of valid pixels whose label is the class with the nearest spectrum."""
    image, mask = batch["image"][selection].double(), batch["mask"][selection]
    valid = batch["mask_valid"][selection, 0]
    spectra = torch.from_numpy(SPECTRA).double()
    ratio = (image[:, None] / spectra[..., None, None]).log()
    guess = ratio.var(2).argmin(1) + 1  # illumination scales all bands alike
    return (guess == mask)[valid].double().mean().item()


def draw(native: rm.RasteretDataset, batch: dict[str, torch.Tensor], across: dict, crs: str, path: Path) -> Path:
    """Draw two chips of each zone with their labels, and the chip across the boundary."""
    style = {"classes": dict(enumerate(CLASSES, 1)), "colours": {i + 1: colour(i) for i in range(len(CLASSES))}}
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, 8)
    codes = batch["epsg"]
    shown = [int(i) for code in codes.unique() for i in torch.nonzero(codes == code)[:2]]
    for column, i in enumerate(shown):
        above, below = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        native.plot({key: value[i] for key, value in batch.items()}, axes=[above, below], legend=False, **style)
        above.set_title(f"EPSG:{codes[i]}")
        below.set_title("")
    large = [figure.add_subplot(grid[:, 4:6]), figure.add_subplot(grid[:, 6:])]
    native.plot(across, axes=large, **style, title=f"one grid, {crs}")
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/zones"), help="output folder")
    parser.add_argument("--data", help="GeoTIFFs, one file per scene, as a folder or glob; default the demo")
    parser.add_argument("--bands", nargs="+", help="names of their bands; default B1, B2, …")
    parser.add_argument("--labels", help="GeoTIFF of classes, in any CRS")
    parser.add_argument("--crs", default="EPSG:32633", help="CRS of the common grid")
    parser.add_argument("--size", type=int, default=96, help="pixels along a side of a chip")
    parser.add_argument("--length", type=int, default=32, help="number of chips")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
