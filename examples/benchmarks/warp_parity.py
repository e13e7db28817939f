"""Compare resampled pixels with GDAL's, and the time that they take.

    python examples/benchmarks/warp_parity.py [--chips 12] [--size 256] [--seed 0]

For each pair of grids and each kernel, the library resamples random chips: it computes `needed_window`, reads only that
window and calls `warp` (`rasteret_ml.geo.resample`). The chips are compared with one `rasterio.warp.reproject` of the
whole source onto the whole target with exact positions (`tolerance=0`; an older rasterio without that argument uses an
equivalent `WarpedVRT` of tolerance 1e-9). The source is a uint16 image with noise and holes of nodata.

Columns:
    pixels     pixels compared: valid on both sides, and further from the image's edge than a kernel reaches
    equal      share of equal pixels
    max diff   largest difference, in levels of uint16
    > 1 level  pixels that differ by more than one level, except ties: a `nearest` position within 1e-6 pixels of the
               edge between two pixels may take either
    validity   pixels that are valid on one side only, except ties
    ours/gdal  time of the library / time of `reproject` (exact where rasterio can) for the same windows and chips,
               measured in turn

The exit status is 1 if a pixel differs by more than one level (`nearest`: at all) or validity differs.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from affine import Affine
from rasterio.enums import Resampling as GdalResampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject

from rasteret_ml.geo.crs import transform_points
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.geo.resample.positions import Resampling, needed_window, pixel_ratio, positions
from rasteret_ml.geo.resample.warp import warp

KERNELS: tuple[Resampling, ...] = ("nearest", "bilinear", "cubic", "average")
EXACT = {"tolerance": 0.0} if "tolerance" in inspect.signature(reproject).parameters else {}
SIDE = 1400
Array = np.ndarray[Any, Any]


def main() -> int:
    """Print the table; return 1 if a pixel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, default=12, help="chips per row of the table")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of a chip")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = (
        f"{'pixels':>9} {'equal':>9} {'max diff':>8} {'> 1 level':>9} {'validity':>8} {'ours ms':>8} {'ours/gdal':>9}"
    )
    print(f"{'grid':<20} {'kernel':<9} {columns}")
    failed = False
    for name, source, target in cases():
        data = scene(source, args.seed)
        for kernel in KERNELS:
            failed |= row(name, source, target, data, kernel, args)
    print("FAILED: see the columns above" if failed else "all pixels are correct")
    return int(failed)


def cases() -> Iterator[tuple[str, Grid, Grid]]:
    """Yield (name, source grid, target grid) for each group of rows."""
    south = Grid(crs="EPSG:32633", transform=Affine(10, 0, 300000, 0, -10, 5500000), shape=(SIDE, SIDE))
    north = Grid(crs="EPSG:32633", transform=Affine(10, 0, 500000, 0, -10, 8800000), shape=(SIDE, SIDE))
    degrees = Grid(crs="EPSG:4326", transform=Affine(1.4e-4, 0, 12.2, 0, -9e-5, 49.6), shape=(SIDE, SIDE))
    yield "same zone, shifted", south, over(south, "EPSG:32633", 10, 10, shift=(3.3, 6.1))
    yield "same zone, 3x", south, over(south, "EPSG:32633", 30, 30, shift=(3.3, 6.1))
    yield "neighbouring zone", south, over(south, "EPSG:32632", 10, 10)
    yield "to geographic", south, over(south, "EPSG:4326", 1.4e-4, 9e-5)
    yield "from geographic", degrees, over(degrees, "EPSG:32633", 10, 10)
    yield "3857", south, over(south, "EPSG:3857", 15.4, 15.4)
    yield "polar", north, over(north, "EPSG:3413", 10, 10)


def over(source: Grid, crs: str, res_x: float, res_y: float, shift: tuple[float, float] = (0.0, 0.0)) -> Grid:
    """Return a slightly larger grid with the same centre as the source."""
    t, half = source.transform, SIDE / 2
    middle = np.array([t.a * half + t.c]), np.array([t.e * half + t.f])
    x, y = transform_points(*middle, str(source.crs), crs)
    side = round(1.1 * SIDE / max(1, round(res_x / t.a) if crs == source.crs else 1))
    left, top = float(x[0]) - res_x * side / 2 + shift[0], float(y[0]) + res_y * side / 2 + shift[1]
    return Grid(crs=crs, transform=Affine(res_x, 0, left, 0, -res_y, top), shape=(side, side))


def scene(grid: Grid, seed: int) -> Array:
    """Make hills and noise with holes of nodata (0): single pixels and discs."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[: grid.height, : grid.width]
    data = 8000 + 3000 * np.sin(col / 40) * np.cos(row / 55) + rng.normal(0, 800, grid.shape)
    data[rng.random(grid.shape) < 0.01] = 0
    for y, x, radius in zip(*rng.integers(0, SIDE, (2, 60)), rng.integers(3, 40, 60), strict=True):
        data[(row - y) ** 2 + (col - x) ** 2 < radius**2] = 0
    return np.clip(np.round(data), 0, 65535).astype(np.uint16)


def row(name: str, source: Grid, target: Grid, data: Array, kernel: Resampling, args: argparse.Namespace) -> bool:
    """Print one row; return whether a criterion failed."""
    rng = np.random.default_rng(args.seed)
    reference = exact(data, source, target, kernel)
    where = positions(target, source)
    tie = ties(where.cols) | ties(where.rows)
    inner = interior(where.cols, where.rows, source, kernel, pixel_ratio(target, source))
    size = min(args.size, *target.shape)
    seconds, worst = np.zeros(2), 0
    counts = {"pixels": 0, "equal": 0, "over": 0, "validity": 0}
    for _ in range(args.chips):
        top, left = (int(rng.integers(0, length - size + 1)) for length in target.shape)
        box = Window(row=top, col=left, height=size, width=size)
        pixels, valid, chip_seconds = chip(data, source, target.window(box), kernel)
        seconds += chip_seconds
        expected = reference[box.slices]
        expected_valid, tied = expected != 0, tie[box.slices]
        both = valid & expected_valid & inner[box.slices]
        difference = np.abs(pixels.astype(np.int64) - expected)[both]
        counts["pixels"] += int(both.sum())
        counts["equal"] += int((difference == 0).sum())
        counts["over"] += int(((difference > 1) & ~tied[both]).sum())
        counts["validity"] += int(((valid != expected_valid) & ~tied).sum())
        worst = max(worst, int(difference[~tied[both]].max(initial=0)))
    share = counts["equal"] / max(1, counts["pixels"])
    figures = f"{counts['pixels']:>9} {share:>9.5%} {worst:>8} {counts['over']:>9} {counts['validity']:>8}"
    print(f"{name:<20} {kernel:<9} {figures} {seconds[0] / args.chips * 1e3:>8.1f} {seconds[0] / seconds[1]:>9.2f}")
    return counts["over"] > 0 or counts["validity"] > 0 or (kernel == "nearest" and worst > 0)


def chip(data: Array, source: Grid, target: Grid, kernel: Resampling) -> tuple[Array, Array, Array]:
    """Return the library's chip, its validity, and the seconds that the library and GDAL take."""
    start = time.perf_counter()
    window = needed_window(target, source, kernel)
    extent = Window(row=0, col=0, height=source.height, width=source.width)
    window = None if window is None else window.intersection(extent)
    if window is None:
        return np.zeros(target.shape, data.dtype), np.zeros(target.shape, bool), np.zeros(2)
    pixels, grid = data[window.slices], source.window(window)
    resampled, valid = warp(pixels, pixels != 0, grid, target, kernel, 0)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    through_gdal(np.ascontiguousarray(pixels), grid, target, kernel)
    return resampled, valid, np.array([ours, time.perf_counter() - start])


def scales(source: Grid, target: Grid) -> dict[str, str]:
    """Return GDAL's kernel widths, from the grids instead of the extents of arrays; about 1 is 1, as in the library."""
    ratios = (max(1.0, r) for r in pixel_ratio(target, source))
    rounded = (round(r) if abs(r - round(r)) < 0.05 else r for r in ratios)
    return {key: repr(1 / r) for key, r in zip(("XSCALE", "YSCALE"), rounded, strict=True)}


def through_gdal(data: Array, source: Grid, target: Grid, kernel: Resampling) -> Array:
    """Resample with `reproject`, with exact positions where rasterio can."""
    out = np.zeros(target.shape, data.dtype)
    reproject(
        data,
        out,
        src_transform=source.transform,
        src_crs=source.crs,
        dst_transform=target.transform,
        dst_crs=target.crs,
        src_nodata=0,
        dst_nodata=0,
        resampling=GdalResampling[kernel],
        **scales(source, target),
        **EXACT,
    )
    return out


def exact(data: Array, source: Grid, target: Grid, kernel: Resampling) -> Array:
    """Resample the whole target with GDAL and exact positions."""
    if EXACT:
        return through_gdal(data, source, target, kernel)
    height, width = source.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": data.dtype, "nodata": 0}
    with MemoryFile() as memory:
        with memory.open(**profile, crs=source.crs, transform=source.transform) as file:
            file.write(data, 1)
        options = {"crs": target.crs, "transform": target.transform, "height": target.height, "width": target.width}
        options |= {"resampling": GdalResampling[kernel], "tolerance": 1e-9, **scales(source, target)}
        with memory.open() as file, WarpedVRT(file, **options) as warped:
            return np.asarray(warped.read(1))


def interior(cols: Array, rows: Array, source: Grid, kernel: str, ratio: tuple[float, float]) -> Array:
    """Return which positions are further from the image's edge than a kernel reaches."""
    reach = {"nearest": 0, "bilinear": 1, "cubic": 2, "average": 1}[kernel]
    x, y = (reach * max(1.0, r) for r in ratio)
    return (cols >= x) & (cols <= source.width - x) & (rows >= y) & (rows <= source.height - y)


def ties(where: Array) -> Array:
    """Return which positions are within a millionth of a pixel of an edge between pixels."""
    return np.abs(where - np.round(where)) < 1e-6


if __name__ == "__main__":
    sys.exit(main())
