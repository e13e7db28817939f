"""Predictions to a map, and a picture of it beside the images and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import rasterio
import shapely
from figures import colour, save_picture

from rasteret_ml import ClassMap, RasteretDataModule
from rasteret_ml.train.maps import map_grid

LARGEST = 4096  # pixels along a side of what is still drawn


class MapWriter(pl.Callback):
    """Writes what `trainer.predict` predicts as a Cloud Optimized GeoTIFF of classes."""

    def __init__(self, path: Path | str, *, names: list[str], colours: dict[int, tuple[int, int, int]]) -> None:
        self.path, self._names, self._colours = str(path), names, colours
        self.paths: list[str] = []
        """The maps that were written."""

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        """Begin the map."""
        trainer.predict_loop.return_predictions = False
        self._map = ClassMap(map_grid(trainer.datamodule.images))

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put the batch on it."""
        self._map.add(outputs.argmax(1), batch["transform"], batch["mask_valid"])

    def on_predict_end(self, trainer: Any, module: Any) -> None:
        """Write it."""
        self.paths = [self._map.write(self.path, colours=self._colours, names=self._names)]


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
