"""Resample pixels and their validity from one grid to another.

The kernels follow GDAL's rules (alg/gdalwarpkernel.cpp): weights are normalised over the valid pixels; `bilinear` and
`cubic` have a value if the pixel under the target's centre is valid, `average` if any pixel under the target is; a
cubic that is not scaled becomes bilinear if one of its 16 pixels is invalid. An invalid pixel has no weight, so nodata
never bleeds into its neighbours.

`rasterio.warp.reproject` is not used, because there
- positions are interpolated with an error of up to 0.125 pixels, and kernels are scaled by the extents of the arrays:
  a pixel depends on how its chip was cut;
- `average` ignores how much of a pixel at the rim of its box is covered at the edge of the image, and the result of
  `mode` changes with GDAL's version (here it is the value that covers the largest area).
With exact positions the pixels are the same, as `examples/benchmarks/warp_parity.py` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import LARGEST_BOX, Resampling, pixel_ratio, positions

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_EDGE = 1e-7  # A position this close below a pixel's edge is on it, so that rounding does not choose the pixel.
_MIN_WEIGHT = 1e-6  # Weights with a smaller sum give no value (GDAL's number).
_BLOCK = 1 << 16  # Target pixels processed at once, so that the arrays of a tap stay in the processor's cache.
_COUNTERS = 1 << 22
# Decimals of a covered area; the rest is noise of the positions, which must not decide between equals.
_TIE_DECIMALS = 6
_HALF = 0.5 + 1e-6  # Rounds halves up, including those that noise of the positions has made a little smaller.


def warp(
    data: Array,
    valid: Mask,
    source: Grid,
    target: Grid,
    resampling: Resampling,
    fill: int | float | complex,
    ratio: tuple[float, float] | None = None,
) -> tuple[Array, Mask]:
    """Resample one band `[h, w]`, and return pixels `[H, W]` of the same dtype and their validity `[H, W]`.

    Pixels that are not `valid` contribute nothing, and NaN is never valid; invalid target pixels are `fill`. Longitudes
    of `source` may run past +-180 (see `needed_window`). `nearest` and `mode` return values that occur in `data`, for
    every dtype; means of integers are rounded to the nearest and clipped to the dtype's range. `ratio` is the source
    columns and rows per target pixel, by which kernels are scaled; default `pixel_ratio`. Raise UsageError for a mean
    of 64-bit integers, which float64 cannot hold.
    """
    if resampling not in ("nearest", "mode") and data.dtype.kind in "iu" and data.dtype.itemsize == 8:
        raise UsageError(
            f"{data.dtype} cannot be resampled with {resampling}, float64 does not hold all its values; use `nearest` "
            "or `mode`, or read it on its own grid."
        )
    if data.dtype.kind in "fc":
        valid = valid & ~np.isnan(data)
    result = np.full(target.shape, fill, data.dtype)
    if resampling == "nearest":
        return result, _nearest(data, valid, source, target, result)
    if resampling == "mode":
        return result, _mode(data, valid, source, target, result)
    if resampling == "average":
        values, out_valid = _average(_Pixels(data, valid, 1), _boxes(target, source))
    else:
        kernel, reach = (_bilinear, 1) if resampling == "bilinear" else (_cubic, 2)
        across, down = ratio or pixel_ratio(target, source)
        scale = _kernel_scale(across), _kernel_scale(down)
        at = positions(target, source)
        pixels = _Pixels(data, valid, int(np.ceil(reach * max(scale))) + 1)
        values, out_valid = _convolve(pixels, at.cols.ravel(), at.rows.ravel(), kernel, reach, scale)
    values, out_valid = values.reshape(target.shape), out_valid.reshape(target.shape)
    if data.dtype.kind in "iu":
        limits: np.iinfo[Any] = np.iinfo(data.dtype)
        values = np.clip(np.floor(values + _HALF), limits.min, limits.max)
    else:
        out_valid &= ~np.isnan(values)
    with np.errstate(over="ignore"):
        result[out_valid] = values[out_valid].astype(data.dtype)
    return result, out_valid


def _nearest(data: Array, valid: Mask, source: Grid, target: Grid, out: Array) -> Mask:
    """Write the pixels under the target's centres into `out`; returns which of them are valid."""
    at = positions(target, source)
    height, width = data.shape
    with np.errstate(invalid="ignore"):
        col, row = np.floor(at.cols + _EDGE), np.floor(at.rows + _EDGE)
        found = (col >= 0) & (row >= 0) & (col < width) & (row < height)
    index = np.asarray(row[found] * width + col[found], np.int64)
    known = valid.ravel()[index]
    found[found] = known
    out[found] = data.ravel()[index[known]]
    return np.asarray(found)


def _mode(data: Array, valid: Mask, source: Grid, target: Grid, out: Array) -> Mask:
    """Write the values that cover most of each pixel into `out`; returns which pixels are valid."""
    values, codes = np.unique(data[valid], return_inverse=True)
    if not len(values):
        return np.zeros(target.shape, bool)
    coded = np.zeros(data.shape, np.int64)
    coded[valid] = codes.ravel()
    winners, found = _largest_area(_Pixels(coded, valid, 1), len(values), _boxes(target, source))
    out_valid = found.reshape(target.shape)
    out[out_valid] = values[winners[found]]
    return out_valid


def _kernel_scale(ratio: float) -> float:
    """By how much a kernel is widened: at least 1, and a whole number if it nearly is one (GDAL's rule)."""
    whole = max(1.0, round(ratio))
    return whole if ratio < 1 or abs(ratio - whole) < 0.05 else ratio


class _Pixels:
    """A source band with a rim of invalid zeros, so that taps just past its edges need no check."""

    def __init__(self, data: Array, valid: Mask, rim: int) -> None:
        self.height: int = data.shape[0]
        self.width: int = data.shape[1]
        self.rim = rim
        self.stride: int = self.width + 2 * rim  #: Distance of two rows in the flat arrays.
        shape = (self.height + 2 * rim, self.stride)
        inner = slice(rim, rim + self.height), slice(rim, rim + self.width)
        values, known = np.zeros(shape, data.dtype), np.zeros(shape, bool)
        np.copyto(values[inner], data, where=valid)
        known[inner] = valid
        self.values: Array = values.ravel()
        self.known: Mask = known.ravel()
        self._is_finite = values.dtype.kind not in "fc" or bool(np.isfinite(values).all())

    def index(self, col: Array, row: Array) -> Indices:
        """Flat indices of whole-numbered positions that lie inside the rim."""
        return np.asarray((row + self.rim) * self.stride + (col + self.rim), np.int64)

    def weighted(self, at: Indices, weight: Floats) -> Array:
        """Weighted values; an infinite value without weight is 0."""
        if self._is_finite:
            return np.asarray(weight * self.values[at])
        with np.errstate(invalid="ignore"):
            return np.where(weight == 0, 0, weight * self.values[at])


Kernel = Callable[[Floats], Floats]  #: From distances in source pixels, divided by the kernel's scale, to weights.


def _bilinear(distance: Floats) -> Floats:
    return np.maximum(0.0, 1.0 - np.abs(distance))


def _cubic(distance: Floats) -> Floats:
    """Keys' cubic convolution with a = -0.5 (Catmull-Rom), as in GDAL."""
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _convolve(
    pixels: _Pixels, cols: Floats, rows: Floats, kernel: Kernel, reach: int, scale: tuple[float, float]
) -> tuple[Array, Mask]:
    """Weighted means around positions `[P]`, and which of them have a value.

    The kernel is zero from `reach` on; `scale` is of (columns, rows).
    """
    out = np.zeros(len(cols), np.result_type(pixels.values.dtype, np.float64))
    out_valid = np.zeros(len(cols), bool)
    for part in _slices(len(cols), _BLOCK):
        col, row = cols[part], rows[part]
        across = (col >= -_EDGE) & (col < pixels.width - _EDGE)
        inside = np.flatnonzero(across & (row >= -_EDGE) & (row < pixels.height - _EDGE))
        values, good = _convolve_block(pixels, col[inside], row[inside], kernel, reach, scale)
        out[part][inside], out_valid[part][inside] = values, good
    return out, out_valid


def _convolve_block(
    pixels: _Pixels, cols: Floats, rows: Floats, kernel: Kernel, reach: int, scale: tuple[float, float]
) -> tuple[Array, Mask]:
    under = pixels.index(
        np.clip(np.floor(cols + _EDGE), 0, pixels.width - 1), np.clip(np.floor(rows + _EDGE), 0, pixels.height - 1)
    )
    first_col, first_row = np.floor(cols - 0.5), np.floor(rows - 0.5)
    base = pixels.index(first_col, first_row)
    taps_x = _axis_taps(cols - 0.5 - first_col, kernel, reach, scale[0])
    taps_y = _axis_taps(rows - 0.5 - first_row, kernel, reach, scale[1])
    total = np.zeros(len(cols), np.result_type(pixels.values.dtype, np.float64))
    weight, missing = np.zeros(len(cols)), np.zeros(len(cols), bool)
    for y, weight_y in taps_y:
        for x, weight_x in taps_x:
            at = base + (y * pixels.stride + x)
            known = pixels.known[at]
            w = weight_y * weight_x * known
            total += pixels.weighted(at, w)
            weight += w
            missing |= ~known
    good = pixels.known[under] & (weight > _MIN_WEIGHT)
    values = total / np.where(good, weight, 1.0)
    if kernel is _cubic and scale == (1.0, 1.0) and missing.any():
        values[missing], good[missing] = _convolve_block(pixels, cols[missing], rows[missing], _bilinear, 1, scale)
    return values, good


def _axis_taps(fraction: Floats, kernel: Kernel, reach: int, scale: float) -> list[tuple[int, Floats]]:
    """The taps along one axis: (distance from the first pixel, weights `[P]`)."""
    last = int(np.ceil(reach * scale))
    return [(i, kernel((i - fraction) / scale)) for i in range(1 - last, last + 1)]


def _boxes(target: Grid, source: Grid) -> Floats:
    """The source boxes between the upper-left and the lower-right corner of each target pixel (GDAL's rule).

    As fractional positions `[2, 2, P]` of (rows, columns) and (start, stop); stops are not before starts.
    """
    at = positions(target, source, corners=True)
    (col, row), (col_stop, row_stop) = ((at.cols[part], at.rows[part]) for part in (np.s_[:-1, :-1], np.s_[1:, 1:]))
    lost = ~(np.isfinite(col) & np.isfinite(col_stop))
    turn = source.turn_columns
    with np.errstate(invalid="ignore"):
        if turn is not None:
            col_stop = col_stop - turn * np.round((col_stop - col) / turn)
        # A pixel across a seam of the projection, or a pole, would cover half the world.
        limits = [LARGEST_BOX * max(1.0, ratio) for ratio in pixel_ratio(target, source)]
        lost |= (np.abs(col_stop - col) > limits[0]) | (np.abs(row_stop - row) > limits[1])
    edges = np.where(lost, -np.inf, [[row, row_stop], [col, col_stop]]).reshape(2, 2, -1)
    return np.stack([edges.min(axis=1), edges.max(axis=1)], axis=1)


def _average(pixels: _Pixels, boxes: Floats) -> tuple[Array, Mask]:
    """Means over boxes by covered area, and which boxes hold a valid pixel."""
    count = boxes.shape[-1]
    out, out_valid = np.zeros(count, np.result_type(pixels.values.dtype, np.float64)), np.zeros(count, bool)
    for part in _slices(count, _BLOCK):
        total, weight = np.zeros(part.stop - part.start, out.dtype), np.zeros(part.stop - part.start)
        for at, w in _box_taps(pixels, boxes, part):
            total += pixels.weighted(at, w)
            weight += w
        out_valid[part] = weight > _MIN_WEIGHT
        out[part] = total / np.where(out_valid[part], weight, 1.0)
    return out, out_valid


def _largest_area(pixels: _Pixels, codes: int, boxes: Floats) -> tuple[Indices, Mask]:
    """The code that covers most of each box (of equals the smallest), and which boxes hold a valid pixel.

    The values of `pixels` are codes from 0 to `codes` - 1.
    """
    count = boxes.shape[-1]
    winners, out_valid = np.zeros(count, np.int64), np.zeros(count, bool)
    for part in _slices(count, max(1, min(_BLOCK, _COUNTERS // codes))):
        taps = list(_box_taps(pixels, boxes, part))
        size = part.stop - part.start
        if codes <= 4 + len(taps) ** 2:
            areas = np.zeros(codes * size)
            column = np.arange(size)
            for at, w in taps:
                areas[pixels.values[at] * size + column] += w
            rounded = np.round(areas.reshape(codes, size), _TIE_DECIMALS)
            winners[part], out_valid[part] = rounded.argmax(axis=0), rounded.max(axis=0) > _MIN_WEIGHT
            continue
        largest = np.full(size, _MIN_WEIGHT)
        found = [pixels.values[at] for at, _ in taps]
        for code in found:
            area = np.zeros(size)
            for other, (_, w) in zip(found, taps, strict=True):
                area += w * (other == code)
            area = np.round(area, _TIE_DECIMALS)
            better = (area > largest) | ((area == largest) & (code < winners[part]))
            largest = np.where(better, area, largest)
            winners[part] = np.where(better, code, winners[part])
        out_valid[part] = largest > _MIN_WEIGHT
    return winners, out_valid


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _box_taps(pixels: _Pixels, boxes: Floats, part: slice) -> Iterator[tuple[Indices, Floats]]:
    """Each pixel under each of the boxes: its index, and its covered share (0 if it is invalid)."""
    lines = []
    for (start, stop), length in zip(boxes[:, :, part], (pixels.height, pixels.width), strict=True):
        beside = (stop <= _EDGE) | (start >= length - _EDGE)
        start, stop = np.clip(start, 0, length), np.clip(stop, 0, length)
        first = np.minimum(np.floor(start + _EDGE), length - 1)
        count = np.ceil(stop - _EDGE) - first
        line = []
        for i in range(int(count.max(initial=1))):
            share = np.clip(np.minimum(stop, first + i + 1) - np.maximum(start, first + i), 0, 1)
            # A box within one pixel is that pixel, however little of it is covered.
            weight = np.where(count > 1, share, float(i == 0))
            line.append((np.minimum(first + i, length), np.where(beside, 0.0, weight)))
        lines.append(line)
    for row, weight_y in lines[0]:
        for col, weight_x in lines[1]:
            at = pixels.index(col, row)
            yield at, weight_y * weight_x * pixels.known[at]
