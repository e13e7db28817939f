"""Files that tripped other libraries, and short ways to ask this one for their pixels."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from pixel_oracle import assert_chip, build_one, run, window_by_rasterio

import rasteret_ml as rm

X, Y = 500000.0, 5000000.0
"""Corner of the scenes."""
GRID = Affine(10, 0, X, 0, -10, Y)
TILED: dict[str, Any] = {"tiled": True, "blockxsize": 32, "blockysize": 32}


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Every value of an integer type, or normal floats."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    return rng.normal(0, 1000, shape).astype(dtype)


def photo(count: int) -> np.ndarray:
    """Smooth colours, so that lossy codecs lose little."""
    y, x = np.mgrid[0:70, 0:90]
    bands = [127 + 90 * np.sin(x / (9 + 3 * k)) * np.cos(y / (11 + 2 * k)) for k in range(count)]
    return np.stack(bands).astype(np.uint8)


def gtiff(path: Path, data: np.ndarray, **options: Any) -> str:
    """A GeoTIFF of `data` `[C, H, W]` as GDAL's plain driver writes it."""
    profile = {
        "driver": "GTiff", "count": data.shape[0], "height": data.shape[1], "width": data.shape[2],
        "dtype": data.dtype.name, "crs": "EPSG:32633", "transform": GRID,
    }  # fmt: skip
    with rasterio.open(path, "w", **(profile | options)) as target:
        target.write(data)
    return str(path)


def slices(col: int, row: int, width: int, height: int) -> tuple[slice, slice]:
    """x and y slices of a pixel window of `GRID`."""
    x, y = X + 10 * col, Y - 10 * row
    return slice(x, x + 10 * width), slice(y - 10 * height, y)


def dataset_of(path: str | Path, folder: Path, **options: Any) -> rm.RasteretDataset:
    """A dataset over all bands of one file."""
    collection = rm.build(str(path), folder / "ds.parquet", datetime=None)
    return rm.RasteretDataset(collection, collection.bands, **options)


def assert_equals_rasterio(path: str, folder: Path, pad: int = 9, **options: Any) -> rm.RasterAccessor:
    """The file's pixels and validity, all bands, with a rim outside the image; gives its record."""
    record = build_one(path, folder, **options)
    height, width = record.grid("B1").shape
    window = (-pad, -pad, height + 2 * pad, width + 2 * pad)
    assert_chip(run(record.read_window(window, record.available_bands)), *window_by_rasterio(path, window))
    return record


def entry_of(content: bytes, tag: int) -> int:
    """Where the directory entry of a tag lies in a little-endian classic TIFF."""
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    places = [start + 2 + 12 * i for i in range(count)]
    return next(place for place in places if struct.unpack_from("<H", content, place)[0] == tag)
