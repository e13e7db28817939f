"""Combine the shards of all ranks and write each map as a Cloud Optimized GeoTIFF, one block in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import rasterio
from rasterio.shutil import copy as gdal_copy
from rasterio.windows import Window as RasterioWindow

from rasteret_ml.errors import UsageError
from rasteret_ml.predict.blend import OutputSpec
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.rank_shard import SavedShard, saved_shards

Colour = tuple[int, int, int]  #: Red, green and blue, 0 to 255.
#: Names of classes, or of the bands of scores, and colours of classes.
Legend = tuple[Sequence[str], Mapping[int, Colour]]

_GDAL_CACHE_BYTES = 32 * 1024 * 1024  # GDAL's default is a twentieth of the machine's memory.


def write_maps(folder: Path, extents: Sequence[MapExtent], paths: Sequence[str], legend: Legend) -> None:
    """Write the maps from the shards saved in `folder`; each file appears as a whole or not at all.

    Blocks without a prediction are nodata and take no space. Raises UsageError for shards of different specs.
    """
    shards = saved_shards(folder)
    specs = {repr(shard.spec): shard.spec for shard in shards}
    if len(specs) != 1:
        raise UsageError(f"All ranks must predict the same, got {'; '.join(specs)}; delete {folder} and predict again.")
    (spec,) = specs.values()
    for extent, path in zip(extents, paths, strict=True):
        _write_geotiff(folder / "plain.tif", extent, spec, legend, shards)
        _write_cog(folder / "plain.tif", folder / "cog.tif", spec)
        os.replace(folder / "cog.tif", path)


def _block_pixels(number: int, shards: Sequence[SavedShard], spec: OutputSpec) -> npt.NDArray[Any] | None:
    """Return the pixels `[C, H, W]` of a block; None if it has no prediction."""
    combined = None
    for shard in shards:
        pixels = shard.rendered(number)
        if pixels is not None:
            return pixels
        block = shard.block(number)
        if block is None:
            continue
        if combined is None:
            combined = block
        else:
            spec.merging.combine(combined, block)
    return None if combined is None else spec.render(combined)


def _write_geotiff(
    path: Path, extent: MapExtent, spec: OutputSpec, legend: Legend, shards: Sequence[SavedShard]
) -> None:
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": spec.rendered_layout[0][0][0], "dtype": spec.dtype, "nodata": spec.nodata,
        "height": extent.grid.height, "width": extent.grid.width, "crs": extent.grid.crs,
        "transform": extent.grid.transform,
        "tiled": True, "blockxsize": spec.block, "blockysize": spec.block, "interleave": "band",
        "sparse_ok": True, "bigtiff": "IF_SAFER",
    }  # fmt: skip
    names, colours = legend
    with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_BYTES), rasterio.open(path, "w", **profile) as file:
        # Before the pixels: TIFF cannot get a colour table afterwards.
        if colours:
            file.write_colormap(1, {value: (*colour, 255) for value, colour in colours.items()})
        if spec.output == "classes":
            file.set_band_description(1, "class")
            if names:
                file.update_tags(classes=", ".join(f"{i}: {name}" for i, name in enumerate(names)))
        else:
            for band, name in zip(file.indexes, names, strict=False):
                file.set_band_description(band, name)
        for number in range(extent.first_block, extent.first_block + extent.block_count):
            pixels = _block_pixels(number, shards, spec)
            if pixels is not None:
                window = extent.block_window(number)
                place = RasterioWindow(window.col, window.row, window.width, window.height)
                file.write(pixels[:, : window.height, : window.width], window=place)


def _write_cog(plain: Path, cog: Path, spec: OutputSpec) -> None:
    scores = spec.output == "scores"
    with rasterio.Env(GDAL_CACHEMAX=_GDAL_CACHE_BYTES):
        gdal_copy(
            plain, cog, driver="COG", compress="deflate", predictor="yes" if scores else "no", blocksize=spec.block,
            overview_resampling="average" if scores else "mode", sparse_ok=True, bigtiff="IF_SAFER",
            num_threads="ALL_CPUS",
        )  # fmt: skip
    plain.unlink()
    with open(cog, "rb+") as file:
        os.fsync(file.fileno())


def checked_colours(colours: Mapping[Any, Any] | None, output: str) -> dict[int, Colour]:
    """Return the colours of classes as plain values; a map of scores has none."""
    if not colours:
        return {}
    if output != "classes":
        raise UsageError("colours= must not be given with output='scores': a map of scores has no colours.")
    checked: dict[int, Any] = {int(value): tuple(int(v) for v in colour) for value, colour in colours.items()}
    for value, colour in checked.items():
        if len(colour) != 3 or not all(0 <= v <= 255 for v in colour):
            raise UsageError(f"The colour of class {value} must be three numbers from 0 to 255, got {colour}.")
    return checked
