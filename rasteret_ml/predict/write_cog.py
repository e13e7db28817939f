"""Blocks to a Cloud Optimized GeoTIFF, a block in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import rasterio
from rasterio.shutil import copy as gdal_copy
from rasterio.windows import Window as RasterioWindow

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.window import Window
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.output_spec import OutputSpec

__all__ = ["Colour", "Legend", "checked_colours", "write_cog"]

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
Legend = tuple[Sequence[str], Mapping[int, Colour]]
"""Names of the classes, or of the bands of scores, and colours of classes."""

_CACHE = 32 * 1024 * 1024
"""Memory for GDAL's blocks; by default it takes a twentieth of the machine's."""


def write_cog(
    path: str,
    work: Path,
    sheet: MapExtent,
    form: OutputSpec,
    legend: Legend,
    blocks: Iterable[tuple[Window, npt.NDArray[Any]]],
) -> None:
    """Write a map; the file is there whole or not at all. Blocks that do not come are nodata, and take no space.

    Args:
        path: The file.
        work: A folder on the same disk for what is in the making.
        sheet: Where it lies.
        form: What it holds.
        legend: Names and colours.
        blocks: Pixels `[C, H, W]` and where they lie.
    """
    plain, cog = work / "plain.tif", work / "cog.tif"
    names, colours = legend
    scores = form.output == "scores"
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": form.planes if scores else 1, "dtype": form.dtype, "nodata": form.nodata,
        "height": sheet.grid.height, "width": sheet.grid.width, "crs": sheet.grid.crs,
        "transform": sheet.grid.transform,
        "tiled": True, "blockxsize": form.block, "blockysize": form.block, "interleave": "band",
        "sparse_ok": True, "bigtiff": "IF_SAFER",
    }  # fmt: skip
    with rasterio.Env(GDAL_CACHEMAX=_CACHE):
        with rasterio.open(plain, "w", **profile) as file:
            _describe(file, scores, names, colours)  # before the pixels: TIFF cannot turn to a palette afterwards
            for window, pixels in blocks:
                file.write(pixels, window=RasterioWindow(window.col, window.row, window.width, window.height))
        gdal_copy(
            plain, cog, driver="COG", compress="deflate", predictor="yes" if scores else "no", blocksize=form.block,
            overview_resampling="average" if scores else "mode", sparse_ok=True, bigtiff="IF_SAFER",
            num_threads="ALL_CPUS",
        )  # fmt: skip
    plain.unlink()
    with open(cog, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(cog, path)


def _describe(file: Any, scores: bool, names: Sequence[str], colours: Mapping[int, Colour]) -> None:
    if colours:
        file.write_colormap(1, {value: (*colour, 255) for value, colour in colours.items()})
    if not scores:
        file.set_band_description(1, "class")
        if names:
            file.update_tags(classes=", ".join(f"{i}: {name}" for i, name in enumerate(names)))
        return
    for band, name in zip(file.indexes, names, strict=False):
        file.set_band_description(band, name)


def checked_colours(colours: Mapping[Any, Any] | None, output: str) -> dict[int, Colour]:
    """Colours of classes as plain values.

    Raises:
        UsageError: colours of scores, or what is no colour.
    """
    if not colours:
        return {}
    if output != "classes":
        raise UsageError("colours= are of classes; a map of scores has none.")
    found: dict[int, Colour] = {}
    for value, colour in colours.items():
        numbers = tuple(int(v) for v in colour)
        if len(numbers) != 3 or not all(0 <= v <= 255 for v in numbers):
            raise UsageError(f"The colour of class {value} is three numbers 0 to 255, not {colour!r}.")
        found[int(value)] = numbers
    return found
