"""Predictions to a map, and a picture of it beside the images and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import shapely
from figures import colour, save_picture

from rasteret_ml import MapWriter, RasteretDataModule

LARGEST = 4096  # pixels along a side of what is still drawn


def map_writer(path: Path | str, names: list[str]) -> MapWriter:
    """One with a colour for each class."""
    return MapWriter(path, names=names, colours={i: colour(i) for i in range(len(names))})


def draw(data: RasteretDataModule, written: str, path: Path, names: list[str], title: str) -> str | None:
    """A picture of images, labels and map; None of what is too large for one."""
    with rasterio.open(written) as file:
        if max(file.shape) > LARGEST:
            return None
        classes, (west, south, east, north) = file.read(1), file.bounds
    sample = data.train_set[west:east, south:north]
    held_out = [] if data.val_area is None else shapely.get_parts(np.asarray(data.val_area.geometry, dtype=object))
    save_picture(
        path,
        sample["image"].numpy()[rgb_channels(data.bands)],
        sample["mask_valid"].numpy()[0],
        sample["mask"].numpy(),
        classes,
        names,
        (west, east, south, north),
        shapely.get_rings(held_out),
        title,
    )
    return str(path)


def rgb_channels(bands: tuple[str, ...]) -> list[int]:
    """Red, green and blue where the band names tell, else the third, second and first band."""
    for wanted in (("B04", "B03", "B02"), ("red", "green", "blue"), ("R", "G", "B")):
        if set(wanted) <= set(bands):
            return [bands.index(name) for name in wanted]
    return [2, 1, 0] if len(bands) >= 3 else [0, 0, 0]
