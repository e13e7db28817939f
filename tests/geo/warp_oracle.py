"""GDAL's warp with exact positions, and a slow majority, to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
from rasterio.enums import Resampling as GdalResampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT

from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import positions

Array = np.ndarray[Any, Any]


def exact_warp(
    data: Array, source: Grid, target: Grid, kernel: str, nodata: float, scale: tuple[float, float]
) -> Array:
    """`rasterio.warp.reproject` without its approximation, in every version of rasterio (a tolerance of 0 crashes).

    `scale`: source columns and rows per target pixel, which GDAL would take from the extents of the arrays.
    """
    height, width = source.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": data.dtype, "nodata": nodata}
    with MemoryFile() as memory:
        with memory.open(**profile, crs=source.crs, transform=source.transform) as file:
            file.write(data, 1)
        with (
            memory.open() as file,
            WarpedVRT(
                file,
                crs=target.crs,
                transform=target.transform,
                height=target.height,
                width=target.width,
                resampling=GdalResampling[kernel],
                tolerance=1e-9,
                XSCALE=repr(1 / scale[0]),
                YSCALE=repr(1 / scale[1]),
            ) as warped,
        ):
            return np.asarray(warped.read(1))


def majority(data: Array, valid: Array, source: Grid, target: Grid) -> tuple[Array, Array, Array]:
    """Per target pixel, one by one: the value with the largest covered area, that area, and the runner-up's."""
    at = positions(target, source, corners=True)
    best, most, second = np.full(target.shape, np.nan), np.zeros(target.shape), np.zeros(target.shape)
    for r in range(target.height):
        for c in range(target.width):
            (y0, y1), (x0, x1) = (sorted((p[r, c], p[r + 1, c + 1])) for p in (at.rows, at.cols))
            votes: dict[float, float] = {}
            for j in range(max(0, int(np.floor(y0))), min(source.height, int(np.ceil(y1)))):
                for i in range(max(0, int(np.floor(x0))), min(source.width, int(np.ceil(x1)))):
                    if valid[j, i]:
                        area = (min(x1, i + 1) - max(x0, i)) * (min(y1, j + 1) - max(y0, j))
                        votes[data[j, i]] = votes.get(data[j, i], 0.0) + area
            ranked = sorted(votes.items(), key=lambda vote: -vote[1])
            if ranked:
                best[r, c], most[r, c] = ranked[0]
                second[r, c] = ranked[1][1] if len(ranked) > 1 else 0.0
    return best, most, second
