"""Labels from a raster and from polygons, as two masks of one sample.

    python examples/labels.py                                                        the demo
    python examples/labels.py --data 'scenes/*.tif' --labels cover.tif --aois fields.gpkg --label crop

`remap` maps stored values to classes; other values become `ignore_index`, which the loss ignores. Polygons are
rasterized onto the pixels of each chip, from any CRS.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import geopandas as gpd
import torch
from demo_scenes import BANDS
from demo_sets import make_fields
from matplotlib.figure import Figure

import rasteret_ml as rm

REMAP = {1: 0, 2: 1, 3: 2}  # 4, bare soil, becomes ignore_index
COVER = ("water", "forest", "cropland")
COLOURS = ("royalblue", "forestgreen", "gold")


def main(argv: Sequence[str] | None = None) -> None:
    """Combine images, a label raster and polygons, compare the two masks, and draw them."""
    options = arguments(argv)
    if options.data is None:  # the demo
        demo = options.out / "demo"
        options.aois, options.label, options.bands = make_fields(demo), "crop", BANDS
        options.data, options.labels = str(demo / "T33_*.tif"), demo / "land_cover.tif"
    scenes = rm.build(options.data, options.out / "scenes.parquet", bands=options.bands)
    cover = rm.build(str(options.labels), options.out / "cover.parquet", bands=["cover"], datetime=None)

    images = rm.RasteretDataset(scenes, scenes.bands)
    raster = rm.RasteretDataset(cover, ["cover"], is_image=False, labels={"remap": REMAP})
    fields = gpd.read_file(options.aois)  # the extent also covers what lies between fields
    polygons = rm.PolygonDataset(
        fields, options.label, rasterize={"order": "area"}, extent=tuple(fields.total_bounds), key="mask_fields"
    )
    both = images & raster & polygons
    print(f"classes of polygons  {polygons.classes}")

    sampler = rm.RandomAOISampler(both, options.size, options.length, seed=1)
    batch = next(iter(rm.DataLoader(both, batch_size=options.length, sampler=sampler)))
    for key in ("image", "mask", "mask_fields", "mask_valid"):
        print(f"{key:<21}{str(batch[key].dtype).removeprefix('torch.'):<8} {tuple(batch[key].shape)}")
    ignored = {key: (batch[key] == raster.ignore_index).float().mean() for key in ("mask", "mask_fields")}
    print(f"without a class      {ignored['mask']:.1%} of the raster's, {ignored['mask_fields']:.1%} of the polygons'")

    # Where both masks have one of the raster's classes, they should agree.
    numbers = torch.tensor([COVER.index(name) if name in COVER else -1 for name in polygons.classes])
    known = batch["mask_fields"] >= 0
    painted = torch.where(known, numbers[batch["mask_fields"].clamp(min=0)], -1)
    compared = (painted >= 0) & (batch["mask"] >= 0)
    print(
        f"heads agree          {(painted == batch['mask'])[compared].double().mean():.4f} of {compared.sum():,} pixels"
    )
    varied = max(range(options.length), key=lambda i: len(batch["mask"][i].unique()))
    sample = {key: value[varied] for key, value in batch.items()}
    print(f"picture              {draw(both, sample, list(polygons.classes), options.out / 'labels.png')}")


def draw(both: rm.RasteretDataset, sample: dict, names: list[str], path: Path) -> Path:
    """Draw the image, raster labels and polygon labels side by side."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    axes = figure.subplots(1, 3)
    both.plot(sample, axes=axes[:2], classes=COVER, colours=COLOURS)
    fields = {"mask": sample["mask_fields"], "transform": sample["transform"]}  # drawn as the mask
    colours = [COLOURS[COVER.index(name)] if name in COVER else "sienna" for name in names]
    both.plot(fields, axes=axes[2], classes=names, colours=colours)
    for ax, title in zip(
        axes, ("image", "raster, remapped (white: ignored)", "polygons, rasterized (white: none)"), strict=True
    ):
        ax.set_title(title)
    figure.savefig(path, dpi=100)
    return path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/labels"), help="output folder")
    parser.add_argument("--data", help="GeoTIFFs, one file per scene, as a folder or glob; default the demo")
    parser.add_argument("--bands", nargs="+", help="names of their bands; default B1, B2, …")
    parser.add_argument("--labels", help="GeoTIFF of classes")
    parser.add_argument("--aois", help="table of polygons")
    parser.add_argument("--label", help="column of classes")
    parser.add_argument("--size", type=int, default=384, help="pixels along a side of a chip")
    parser.add_argument("--length", type=int, default=8, help="number of chips")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
