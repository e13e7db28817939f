"""Small COGs, written by GDAL."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.io import MemoryFile
from rasterio.shutil import copy as gdal_copy


def make_cog(
    path: str | os.PathLike[str],
    data: npt.NDArray[Any],
    *,
    transform: Affine | None = None,
    crs: Any = "EPSG:32633",
    nodata: int | float | None = None,
    mask: npt.NDArray[np.bool_] | None = None,
    descriptions: tuple[str, ...] = (),
    blocksize: int = 256,
    compress: str = "deflate",
    predictor: str = "standard",
    overviews: str = "auto",
    **creation: Any,
) -> str:
    """Write an array as a Cloud Optimized GeoTIFF, with GDAL.

    Args:
        path: Where to write; missing folders are created.
        data: Pixels `[C, H, W]` or `[H, W]`.
        transform: Default 10 m pixels with the upper-left corner at (500000, 5000000).
        crs: Anything that rasterio accepts.
        nodata: Declared nodata value.
        mask: Validity `[H, W]`, True = valid, written as an internal mask.
        descriptions: Band names.
        blocksize: Tile width and height.
        compress: GDAL's COG compression, such as none, deflate, lzw, zstd, lerc, jpeg, webp …
        predictor: "no", "standard" (2 for integers, 3 for floats).
        overviews: "auto" or "none".
        creation: Further COG creation options.

    Returns:
        The path.
    """
    pixels = data[None] if data.ndim == 2 else data
    profile = {
        "driver": "GTiff",
        "count": pixels.shape[0],
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "dtype": pixels.dtype.name,
        "crs": crs,
        "transform": Affine(10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0) if transform is None else transform,
        "nodata": nodata,
    }
    options = {"blocksize": blocksize, "compress": compress, "overviews": overviews.upper()} | creation
    if compress.lower() in ("deflate", "lzw", "zstd"):
        options["predictor"] = predictor
    os.makedirs(os.path.dirname(os.path.abspath(os.fspath(path))), exist_ok=True)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), MemoryFile() as memory:
        with memory.open(**profile) as dataset:
            dataset.write(pixels)
            for i, name in enumerate(descriptions, start=1):
                dataset.set_band_description(i, name)
            if mask is not None:
                dataset.write_mask(mask)
        with memory.open() as dataset:
            gdal_copy(dataset, os.fspath(path), driver="COG", **options)
    return os.fspath(path)
