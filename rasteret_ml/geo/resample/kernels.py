"""Resampling kernels in numpy: each takes a source, its validity and positions, and gathers tap by tap.

The rules are GDAL's (alg/gdalwarpkernel.cpp), so that pixels equal those of `rasterio.warp.reproject` without
its approximations: weights are renormalised over the valid pixels; `bilinear` and `cubic` have an answer where
the pixel under the target's centre is valid, `average` where any pixel under the target is; a cubic that is not
scaled becomes bilinear where one of its 16 pixels is missing. Two things are better here: the rim of an image
counts by what is covered of it in `average`, and `mode` is the value that covers the largest area (GDAL's
changes with its version). Complex numbers need no special care, and no lock is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Boxes", "Pixels", "average", "bilinear", "convolve", "cubic", "mode", "nearest"]

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

_EDGE = 1e-7
"""A position so close below a pixel's edge counts as on it: rounding must not choose the pixel."""
_LEAST_WEIGHT = 1e-6
"""Weights that sum to less are no answer (GDAL's number)."""
_BLOCK = 1 << 16
"""Target pixels worked on at once, so that the arrays of a tap stay in the processor's cache."""
_COUNTERS = 1 << 22
_TIES = 6
"""Decimals of a covered area; the rest is noise of the positions, which must not decide between equals."""


class Pixels:
    """A source band within a rim of invalid zeros, so that taps just past its edges need no care."""

    def __init__(self, data: Array, valid: Mask, rim: int) -> None:
        """Copy `data` and `valid`, both `[h, w]`; invalid pixels become zeros."""
        self.height: int = data.shape[0]
        self.width: int = data.shape[1]
        self.rim = rim
        self._stride: int = self.width + 2 * rim
        shape = (self.height + 2 * rim, self._stride)
        inner = slice(rim, rim + self.height), slice(rim, rim + self.width)
        values, known = np.zeros(shape, data.dtype), np.zeros(shape, bool)
        np.copyto(values[inner], data, where=valid)
        known[inner] = valid
        self.values: Array = values.ravel()
        self.known: Mask = known.ravel()
        self.finite = values.dtype.kind not in "fc" or bool(np.isfinite(values).all())

    def inside(self, cols: Floats, rows: Floats) -> Mask:
        """Which positions lie on the source."""
        across = (cols >= -_EDGE) & (cols < self.width - _EDGE)
        return np.asarray(across & (rows >= -_EDGE) & (rows < self.height - _EDGE))

    def index(self, col: Array, row: Array) -> npt.NDArray[np.int64]:
        """Flat indices of whole-numbered positions that lie inside the rim."""
        at = (row + self.rim) * self._stride + (col + self.rim)
        return np.asarray(at, np.int64)

    def shift(self, cols: int, rows: int) -> int:
        """How far apart in the flat arrays two pixels are."""
        return rows * self._stride + cols


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """What each target pixel covers on the source, as fractional positions `[P]`; stops are not before starts."""

    col: Floats
    """First column."""
    col_stop: Floats
    """End of the columns."""
    row: Floats
    """First row."""
    row_stop: Floats
    """End of the rows."""


def nearest(data: Array, valid: Mask, cols: Floats, rows: Floats, out: Array) -> Mask:
    """Write the pixels under the positions `[H, W]` into `out`; returns which of them are valid."""
    height, width = data.shape
    with np.errstate(invalid="ignore"):
        col, row = np.floor(cols + _EDGE), np.floor(rows + _EDGE)
        found = (col >= 0) & (row >= 0) & (col < width) & (row < height)
    at = np.asarray(row[found] * width + col[found], np.int64)
    known = valid.ravel()[at]
    found[found] = known
    out[found] = data.ravel()[at[known]]
    return np.asarray(found)


def convolve(
    pixels: Pixels,
    cols: Floats,
    rows: Floats,
    kernel: Callable[[Floats], Floats],
    reach: int,
    scale: tuple[float, float],
) -> tuple[Array, Mask]:
    """Weighted means around positions `[P]`, and which of them have an answer.

    `kernel` maps distances, in pixels over `scale` (columns, rows), to weights, and is zero from `reach` on.
    """
    out = np.zeros(len(cols), np.result_type(pixels.values.dtype, np.float64))
    answered = np.zeros(len(cols), bool)
    for start in range(0, len(cols), _BLOCK):
        part = slice(start, start + _BLOCK)
        inside = np.flatnonzero(pixels.inside(cols[part], rows[part]))
        values, good = _convolve(pixels, cols[part][inside], rows[part][inside], kernel, reach, scale)
        out[part][inside], answered[part][inside] = values, good
    return out, answered


def _convolve(
    pixels: Pixels,
    cols: Floats,
    rows: Floats,
    kernel: Callable[[Floats], Floats],
    reach: int,
    scale: tuple[float, float],
) -> tuple[Array, Mask]:
    under = pixels.index(
        np.clip(np.floor(cols + _EDGE), 0, pixels.width - 1), np.clip(np.floor(rows + _EDGE), 0, pixels.height - 1)
    )
    first_col, first_row = np.floor(cols - 0.5), np.floor(rows - 0.5)
    base = pixels.index(first_col, first_row)
    taps_x = _line(cols - 0.5 - first_col, kernel, reach, scale[0])
    taps_y = _line(rows - 0.5 - first_row, kernel, reach, scale[1])
    total = np.zeros(len(cols), np.result_type(pixels.values.dtype, np.float64))
    weight, missing = np.zeros(len(cols)), np.zeros(len(cols), bool)
    for y, weight_y in taps_y:
        for x, weight_x in taps_x:
            at = base + pixels.shift(x, y)
            known = pixels.known[at]
            w = weight_y * weight_x * known
            total += w * pixels.values[at] if pixels.finite else np.where(w == 0, 0, _product(w, pixels.values[at]))
            weight += w
            missing |= ~known
    good = pixels.known[under] & (weight > _LEAST_WEIGHT)
    values = total / np.where(good, weight, 1.0)
    if kernel is cubic and scale == (1.0, 1.0) and missing.any():
        values[missing], good[missing] = _convolve(pixels, cols[missing], rows[missing], bilinear, 1, scale)
    return values, good


def _product(weight: Floats, values: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(weight * values)


def _line(fraction: Floats, kernel: Callable[[Floats], Floats], reach: int, scale: float) -> list[tuple[int, Floats]]:
    """The taps along one axis: (distance from the first pixel, weights `[P]`)."""
    last = int(np.ceil(reach * scale))
    return [(i, kernel((i - fraction) / scale)) for i in range(1 - last, last + 1)]


def bilinear(distance: Floats) -> Floats:
    """The triangle."""
    return np.maximum(0.0, 1.0 - np.abs(distance))


def cubic(distance: Floats) -> Floats:
    """Keys' cubic convolution with a = -0.5 (Catmull-Rom), GDAL's."""
    d = np.abs(distance)
    near = (1.5 * d - 2.5) * d * d + 1.0
    far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def average(pixels: Pixels, boxes: Boxes) -> tuple[Array, Mask]:
    """Means over boxes, by covered area, and which boxes hold a valid pixel."""
    out = np.zeros(len(boxes.col), np.result_type(pixels.values.dtype, np.float64))
    answered = np.zeros(len(boxes.col), bool)
    for part in _parts(len(boxes.col), _BLOCK):
        total, weight = np.zeros(part.stop - part.start, out.dtype), np.zeros(part.stop - part.start)
        for at, w in _box_taps(pixels, boxes, part):
            total += w * pixels.values[at] if pixels.finite else np.where(w == 0, 0, _product(w, pixels.values[at]))
            weight += w
        answered[part] = weight > _LEAST_WEIGHT
        out[part] = total / np.where(answered[part], weight, 1.0)
    return out, answered


def mode(pixels: Pixels, codes: int, boxes: Boxes) -> tuple[npt.NDArray[np.int64], Mask]:
    """The code that covers most of each box (of equals the smallest), and which boxes hold a valid pixel.

    The values of `pixels` are codes from 0 to `codes` - 1.
    """
    winners, answered = np.zeros(len(boxes.col), np.int64), np.zeros(len(boxes.col), bool)
    for part in _parts(len(boxes.col), max(1, min(_BLOCK, _COUNTERS // codes))):
        taps = list(_box_taps(pixels, boxes, part))
        size = part.stop - part.start
        if codes <= 4 + len(taps) ** 2:
            share = np.zeros(codes * size)
            column = np.arange(size)
            for at, w in taps:
                share[pixels.values[at] * size + column] += w
            shares = np.round(share.reshape(codes, size), _TIES)
            winners[part], answered[part] = shares.argmax(axis=0), shares.max(axis=0) > _LEAST_WEIGHT
            continue
        most = np.full(size, _LEAST_WEIGHT)
        found = [pixels.values[at] for at, _ in taps]
        for code in found:
            votes = np.zeros(size)
            for other, (_, w) in zip(found, taps, strict=True):
                votes += w * (other == code)
            votes = np.round(votes, _TIES)
            better = (votes > most) | ((votes == most) & (code < winners[part]))
            most = np.where(better, votes, most)
            winners[part] = np.where(better, code, winners[part])
        answered[part] = most > _LEAST_WEIGHT
    return winners, answered


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _box_taps(pixels: Pixels, boxes: Boxes, part: slice) -> Iterator[tuple[npt.NDArray[np.int64], Floats]]:
    """Each pixel under each of the boxes: where it is, and its covered share (0 where it is invalid)."""
    lines = []
    for start, stop, length in (
        (boxes.row[part], boxes.row_stop[part], pixels.height),
        (boxes.col[part], boxes.col_stop[part], pixels.width),
    ):
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
