"""Resampling from one grid to another, validity taken along.

The plan (which source window a target grid needs) is pure arithmetic; the resampling itself is GDAL's,
through `rasterio.warp.reproject`. Nodata never bleeds: invalid pixels are NaN while a kernel runs, and
GDAL renormalises its weights over the others.
"""

from __future__ import annotations

import threading
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rasterio.enums import Resampling as GdalResampling
from rasterio.warp import reproject

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import transform_points
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.window import Window

__all__ = ["Resampling", "needed_window", "warp"]

Resampling = Literal["nearest", "bilinear", "cubic", "average", "mode"]
"""Kernels by their GDAL names."""

_warning_filters = threading.Lock()
"""rasterio changes the process's warning filters while it warps; two threads doing so would undo each other."""
_KERNEL_RADIUS = {"nearest": 0, "bilinear": 1, "cubic": 2, "average": 1, "mode": 1}


def needed_window(target: Grid, source: Grid, resampling: Resampling) -> Window | None:
    """The pixels that resampling onto `target` can touch, on `source`'s grid but perhaps past its edges.

    None where no part of the target has a place in the source's CRS.

    Edges (21 points each) and an inner lattice of the target are projected onto the source grid; the box
    around them is widened by the kernel, scaled where the target is coarser.
    """
    if resampling not in _KERNEL_RADIUS:
        raise UsageError(f"resampling must be one of {', '.join(_KERNEL_RADIUS)}, not {resampling!r}.")
    if target.crs is None or source.crs is None:
        raise UsageError("Resampling needs a CRS on both grids; this file declares none.")
    steps = np.linspace(0.0, 1.0, 21)
    cols, rows = np.meshgrid(steps * target.width, steps * target.height)
    t = target.transform
    x, y = t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f
    x, y = transform_points(x.ravel(), y.ravel(), target.crs, source.crs)
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        return None
    cols, rows = source.to_pixels(x[good], y[good])
    scale_x = max(1.0, float(np.ptp(cols)) / target.width)
    scale_y = max(1.0, float(np.ptp(rows)) / target.height)
    radius = _KERNEL_RADIUS[resampling]
    pad_col, pad_row = int(np.ceil(radius * scale_x)) + 1, int(np.ceil(radius * scale_y)) + 1
    row, col = int(np.floor(np.min(rows))) - pad_row, int(np.floor(np.min(cols))) - pad_col
    return Window(
        row=row,
        col=col,
        height=max(1, int(np.ceil(np.max(rows))) + pad_row - row),
        width=max(1, int(np.ceil(np.max(cols))) + pad_col - col),
    )


def warp(
    data: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    source: Grid,
    target: Grid,
    resampling: Resampling,
    fill: int | float | complex,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Resample one band.

    Args:
        data: Pixels `[h, w]` on `source`.
        valid: Their validity `[h, w]`; invalid pixels contribute nothing.
        source: Grid of `data`.
        target: Grid of the result.
        resampling: Kernel. `nearest` and `mode` return values that occur in `data`.
        fill: Value of invalid target pixels.

    Returns:
        Pixels `[H, W]` in `data`'s dtype (kernels that average are rounded to the nearest integer for
        integer types, and kept inside the type's range) and their validity `[H, W]`.
    """
    if resampling == "mode" and data.dtype.itemsize > 2:
        return _warp_codes(data, valid, source, target, fill)
    work = data.astype(_working_dtype(data.dtype, resampling))
    work[~valid] = np.nan
    out = _reproject(work, source, target, resampling)
    out_valid = ~np.isnan(out)
    if np.issubdtype(data.dtype, np.integer):
        limits: np.iinfo[Any] = np.iinfo(data.dtype)
        out = np.clip(np.floor(np.nan_to_num(out) + 0.5), limits.min, limits.max)
    result = out.astype(data.dtype)
    result[~out_valid] = fill
    return result, out_valid


def _reproject(work: npt.NDArray[Any], source: Grid, target: Grid, resampling: Resampling) -> npt.NDArray[Any]:
    """GDAL's warp of a float band whose invalid pixels are NaN.

    The kernel's scale is said, not left to GDAL: it would take it from the extents of the arrays, and a pixel
    would then depend on how its chip was cut out of the source.
    """
    out = np.full(target.shape, np.nan, dtype=work.dtype)
    scale_x, scale_y = _source_pixels_per_target(target, source)
    with _warning_filters:
        reproject(
            work,
            out,
            src_transform=source.transform,
            src_crs=source.crs,
            dst_transform=target.transform,
            dst_crs=target.crs,
            resampling=GdalResampling[resampling],
            src_nodata=np.nan,
            dst_nodata=np.nan,
            init_dest_nodata=True,
            XSCALE=repr(1 / _kernel_scale(scale_x)),
            YSCALE=repr(1 / _kernel_scale(scale_y)),
        )
    return out


def _kernel_scale(source_pixels: float) -> float:
    """By how much a kernel is widened: at least 1, and a whole number where it nearly is one (GDAL's own rule)."""
    whole = max(1.0, round(source_pixels))
    return whole if source_pixels < 1 or abs(source_pixels - whole) < 0.05 else source_pixels


def _source_pixels_per_target(target: Grid, source: Grid) -> tuple[float, float]:
    """How many source columns and rows a target pixel spans at the middle of the target (1 where unknown)."""
    cols = np.array([0.5, 1.5, 0.5]) + target.width // 2
    rows = np.array([0.5, 0.5, 1.5]) + target.height // 2
    t = target.transform
    x, y = t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f
    col, row = source.to_pixels(*transform_points(x, y, str(target.crs), str(source.crs)))
    across = float(np.hypot(col[1] - col[0], col[2] - col[0]))
    down = float(np.hypot(row[1] - row[0], row[2] - row[0]))
    return across if np.isfinite(across) and across > 0 else 1.0, down if np.isfinite(down) and down > 0 else 1.0


def _warp_codes(
    data: npt.NDArray[Any], valid: npt.NDArray[np.bool_], source: Grid, target: Grid, fill: int | float | complex
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """The most frequent value, of a type that GDAL's mode would round: small codes stand for the values."""
    values, codes = np.unique(data[valid], return_inverse=True)
    work = np.full(data.shape, np.nan, np.float32)
    work[valid] = codes.ravel()
    out = _reproject(work, source, target, "mode")
    out_valid = ~np.isnan(out)
    result = np.full(target.shape, fill, data.dtype)
    result[out_valid] = values[out[out_valid].astype(np.int64)]
    return result, out_valid


def _working_dtype(dtype: np.dtype[Any], resampling: Resampling) -> np.dtype[Any]:
    """A float type that holds every value of `dtype` exactly, so that NaN can mark the invalid ones."""
    if dtype.kind == "c" or (dtype.kind in "iu" and dtype.itemsize == 8):
        raise UsageError(f"{dtype} cannot be resampled ({resampling}) without losing values; read it on its own grid.")
    return np.dtype(np.float32) if dtype.itemsize <= 2 or dtype == np.float32 else np.dtype(np.float64)
