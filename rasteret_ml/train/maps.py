"""Predictions of chips to one georeferenced map."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from affine import Affine
from rasterio.io import MemoryFile
from rasterio.shutil import copy as gdal_copy

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.window import Window
from rasteret_ml.sampling.places import coverage_of

__all__ = ["ClassMap", "map_grid"]

Colour = tuple[int, int, int]


def map_grid(dataset: Any) -> Grid:
    """The part of a dataset's grid that holds all it covers."""
    grid: Grid = dataset.grid
    return grid.window(grid.window_around(coverage_of(dataset).bounds))


class ClassMap:
    """A class map filled chip by chip; where chips overlap, the one that has the pixel nearer its middle wins.

    Memory is three bytes a pixel.
    """

    def __init__(self, grid: Grid, nodata: int = 255) -> None:
        """An empty map on `grid`; `nodata` is its value where nothing was predicted."""
        self.grid = grid
        self.nodata = nodata
        self.classes: npt.NDArray[np.uint8] = np.full(grid.shape, nodata, np.uint8)
        """The map `[H, W]`."""
        self._depth = np.zeros(grid.shape, np.uint16)

    def add(self, classes: torch.Tensor, transforms: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """Put a batch of predictions on the map.

        Args:
            classes: `[B, H, W]`, 0 to 254.
            transforms: `[B, 9]`, the batch's `transform`.
            valid: `[B, 1, H, W]`; pixels that are not stay nodata.
        """
        values = classes.detach().cpu().numpy().astype(np.uint8)
        depth = _depth(*values.shape[-2:])
        for i, (chip, transform) in enumerate(zip(values, transforms.cpu().tolist(), strict=True)):
            own = Grid(crs=self.grid.crs, transform=Affine(*transform[:6]), shape=chip.shape)
            window = self.grid.window_of(own)
            if window is None:
                raise UsageError("A chip does not lie on the map's grid; make the map with map_grid(dataset).")
            part = window.intersection(Window(row=0, col=0, height=self.grid.height, width=self.grid.width))
            if part is None:
                continue
            here, there = part.slices, part.relative_to(window).slices
            better = depth[there] > self._depth[here]
            if valid is not None:
                better &= valid[i].all(0).cpu().numpy()[there]
            self.classes[here][better] = chip[there][better]
            self._depth[here][better] = depth[there][better]

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        colours: Mapping[int, Colour] | None = None,
        names: Sequence[str] = (),
    ) -> str:
        """Write the map as a COG with a colour table; returns its path."""
        profile = {
            "driver": "GTiff",
            "count": 1,
            "dtype": "uint8",
            "height": self.grid.height,
            "width": self.grid.width,
            "crs": self.grid.crs,
            "transform": self.grid.transform,
            "nodata": self.nodata,
        }
        with MemoryFile() as memory:
            with memory.open(**profile) as dataset:
                if colours is not None:  # before the pixels: TIFF cannot turn to a palette afterwards
                    dataset.write_colormap(1, {k: (*v, 255) for k, v in colours.items()})
                dataset.write(self.classes, 1)
                if names:
                    dataset.update_tags(classes=", ".join(f"{i}: {name}" for i, name in enumerate(names)))
            with memory.open() as dataset:
                gdal_copy(
                    dataset, os.fspath(path), driver="COG", compress="deflate", blocksize=256, resampling="nearest"
                )
        return os.fspath(path)


def _depth(height: int, width: int) -> npt.NDArray[np.uint16]:
    """How far each pixel is from its chip's edge, at least 1."""
    rows = np.minimum(np.arange(height), np.arange(height)[::-1])
    cols = np.minimum(np.arange(width), np.arange(width)[::-1])
    return (np.minimum(rows[:, None], cols[None, :]) + 1).astype(np.uint16)
