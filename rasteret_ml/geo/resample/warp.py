"""Resampling from one grid to another, validity taken along.

Two halves: which source window a target grid needs, and the resampling of it. Both work with exact positions
(`geo.locate`), so that a pixel does not depend on how its chip was cut; `rasterio.warp.reproject` interpolates
positions with an error of up to 0.125 pixels. The kernels (`geo.kernels`) follow GDAL's rules, and nodata never
bleeds: an invalid pixel has no weight.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from affine import Affine

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import full_turn, transform_points
from rasteret_ml.geo.grid import Grid, full_turns
from rasteret_ml.geo.resample.kernels import Boxes, Pixels, average, bilinear, convolve, cubic, mode, nearest
from rasteret_ml.geo.resample.positions import contiguous, positions, to_source, turn_columns
from rasteret_ml.geo.window import Window

__all__ = ["Resampling", "needed_window", "pixel_ratio", "steady_ratio", "warp"]

Resampling = Literal["nearest", "bilinear", "cubic", "average", "mode"]
"""Kernels by their GDAL names."""

Floats = npt.NDArray[np.float64]

_KERNEL_RADIUS = {"nearest": 0, "bilinear": 1, "cubic": 2, "average": 1, "mode": 1}
_LATTICE = 21
_HALF = 0.5 + 1e-6
"""Rounds halves up, also those that noise of the positions has made a little less."""
_STEADY = 1.1
_LARGEST_BOX = 8.0
"""A target pixel that covers so many times more than the middle one lies across a seam."""


def needed_window(target: Grid, source: Grid, resampling: Resampling) -> Window | None:
    """The pixels that resampling onto `target` can touch, on `source`'s grid but perhaps past its edges.

    A lattice of 21 x 21 points of the target is projected onto the source grid; the box around them is widened
    by the kernel, scaled where the target is coarser, and by what may bow out between the points.

    On a geographic source the window is one piece also where the target crosses the antimeridian: longitudes
    are taken from the middle of the target on, then moved by whole turns to where the source has most of them.
    The window then reaches past the source's left or right edge, where a raster of all longitudes goes on at its
    other side (`Grid.turn` columns away). A target that holds a pole needs all columns.

    Returns:
        The window, or None where no part of the target has a place in the source's CRS.

    Raises:
        UsageError: an unknown kernel, or a grid without a CRS.
    """
    if resampling not in _KERNEL_RADIUS:
        raise UsageError(f"resampling must be one of {', '.join(_KERNEL_RADIUS)}, not {resampling!r}.")
    if target.crs is None or source.crs is None:
        raise UsageError("Resampling needs a CRS on both grids; this file declares none.")
    steps = np.linspace(0.0, 1.0, _LATTICE)
    x, y = to_source(target, source, *np.meshgrid(steps * target.width, steps * target.height))
    good = np.isfinite(x) & np.isfinite(y)
    if not good.any():
        return None
    middle = x[_LATTICE // 2, _LATTICE // 2]
    x = contiguous(x, source.crs, middle if np.isfinite(middle) else x[good][0])
    cols, rows = source.to_pixels(np.where(good, x, np.nan), np.where(good, y, np.nan))
    ratio = pixel_ratio(target, source)
    rims = [int(np.ceil(_KERNEL_RADIUS[resampling] * max(1.0, scale))) + 1 for scale in ratio]
    left, right = float(np.nanmin(cols)), float(np.nanmax(cols))
    top, bottom = float(np.nanmin(rows)), float(np.nanmax(rows))
    turn, poles = turn_columns(source), _poles_within(target, source)
    pad_row, pad_col = (
        rim + min(_bow(at), max(source.shape)) for rim, at in zip(rims[::-1], (rows, cols), strict=True)
    )
    if poles or (turn is not None and right - left >= turn - 1):
        left, right, pad_col = 0.0, float(source.width), _rim_of_a_turn(resampling, rims[0], turn or 0.0)
        top, bottom = min([top, *poles]), max([bottom, *poles])
    elif turn is not None:
        shift = turn * full_turns(left, right, source.width, turn)
        left, right = left + shift, right + shift
    row, col = int(np.floor(top)) - pad_row, int(np.floor(left)) - pad_col
    return Window(
        row=row,
        col=col,
        height=max(1, int(np.ceil(bottom)) + pad_row - row),
        width=max(1, int(np.ceil(right)) + pad_col - col),
    )


def _rim_of_a_turn(resampling: Resampling, rim: int, turn: float) -> int:
    """Columns on either side of a window of all longitudes: the box of a pixel beside a pole is wide."""
    if resampling not in ("average", "mode"):
        return rim
    return max(rim, min(int(np.ceil(_LARGEST_BOX * rim)), int(np.ceil(turn / 2))))


def _bow(positions: Floats) -> int:
    """How far, at most, a smooth curve leaves the lattice between its points (an eighth of its second difference)."""
    bends = np.concatenate([np.diff(positions, 2, axis=axis).ravel() for axis in (0, 1)])
    bends = np.abs(bends[np.isfinite(bends)])
    return max(0, int(np.ceil(bends.max(initial=0.0) / 4 - 1e-3)))


def _poles_within(target: Grid, source: Grid) -> list[float]:
    """The rows of `source` at which the poles lie that a target in a projected CRS holds."""
    quarter = (full_turn(source.crs) or 0.0) / 4
    if not quarter or full_turn(target.crs):
        return []
    lat = np.array([-quarter, quarter])
    col, row = target.to_pixels(*transform_points(np.zeros(2), lat, str(source.crs), str(target.crs)))
    with np.errstate(invalid="ignore"):
        held = (col >= -1) & (row >= -1) & (col <= target.width + 1) & (row <= target.height + 1)
    return [float(row) for row in source.to_pixels(np.zeros(2), lat)[1][held]]


def warp(
    data: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    source: Grid,
    target: Grid,
    resampling: Resampling,
    fill: int | float | complex,
    ratio: tuple[float, float] | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Resample one band.

    Args:
        data: Pixels `[h, w]` on `source`.
        valid: Their validity `[h, w]`; invalid pixels contribute nothing, and NaN is never valid.
        source: Grid of `data`; its longitudes may run past +-180 (see `needed_window`).
        target: Grid of the result.
        resampling: Kernel. `nearest` and `mode` return values that occur in `data`, for every type.
        fill: Value of invalid target pixels.
        ratio: Source columns and rows to a target pixel, by which kernels are widened; None = `pixel_ratio`.

    Returns:
        Pixels `[H, W]` in `data`'s dtype (kernels that average are rounded to the nearest integer for
        integer types, and kept inside the type's range) and their validity `[H, W]`.

    Raises:
        UsageError: an average of 64-bit integers, which no float holds.
    """
    if resampling not in ("nearest", "mode") and data.dtype.kind in "iu" and data.dtype.itemsize == 8:
        raise UsageError(
            f"{data.dtype} cannot be resampled with {resampling}: no float holds all its values; "
            "use `nearest` or `mode`, or read it on its own grid."
        )
    if data.dtype.kind in "fc":
        valid = valid & ~np.isnan(data)
    result = np.full(target.shape, fill, data.dtype)
    if resampling == "nearest":
        at = positions(target, source)
        return result, nearest(data, valid, at.cols, at.rows, result)
    if resampling == "mode":
        return result, _mode(data, valid, source, target, result)
    values, out_valid = _averaged(data, valid, source, target, resampling, ratio)
    if data.dtype.kind in "iu":
        limits: np.iinfo[Any] = np.iinfo(data.dtype)
        values = np.clip(np.floor(values + _HALF), limits.min, limits.max)
    else:
        out_valid &= ~np.isnan(values)
    with np.errstate(over="ignore"):
        result[out_valid] = values[out_valid].astype(data.dtype)
    return result, out_valid


def _averaged(
    data: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    source: Grid,
    target: Grid,
    resampling: Resampling,
    ratio: tuple[float, float] | None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Means as float64 or complex128 `[H, W]`, and where there are any."""
    if resampling == "average":
        values, out_valid = average(Pixels(data, valid, 1), _boxes(target, source))
    else:
        kernel, reach = (bilinear, 1) if resampling == "bilinear" else (cubic, 2)
        across, down = ratio or pixel_ratio(target, source)
        # From the grids, not from the extents of the arrays as in GDAL, where a pixel depends on how its chip was cut.
        scale = _kernel_scale(across), _kernel_scale(down)
        at = positions(target, source)
        pixels = Pixels(data, valid, int(np.ceil(reach * max(scale))) + 1)
        values, out_valid = convolve(pixels, at.cols.ravel(), at.rows.ravel(), kernel, reach, scale)
    return values.reshape(target.shape), out_valid.reshape(target.shape)


def _mode(
    data: npt.NDArray[Any], valid: npt.NDArray[np.bool_], source: Grid, target: Grid, out: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Write the most frequent values into `out`; small codes stand for them meanwhile."""
    values, codes = np.unique(data[valid], return_inverse=True)
    if not len(values):
        return np.zeros(target.shape, bool)
    coded = np.zeros(data.shape, np.int64)
    coded[valid] = codes.ravel()
    winners, found = mode(Pixels(coded, valid, 1), len(values), _boxes(target, source))
    out_valid = found.reshape(target.shape)
    out[out_valid] = values[winners[found]]
    return out_valid


def _boxes(target: Grid, source: Grid) -> Boxes:
    """The source boxes between the upper-left and the lower-right corner of each target pixel (GDAL's rule)."""
    at = positions(target, source, corners=True)
    (col, row), (col_stop, row_stop) = ((at.cols[part], at.rows[part]) for part in (np.s_[:-1, :-1], np.s_[1:, 1:]))
    lost = ~(np.isfinite(col) & np.isfinite(col_stop))
    turn = turn_columns(source)
    with np.errstate(invalid="ignore"):
        if turn is not None:
            col_stop = col_stop - turn * np.round((col_stop - col) / turn)
        # A pixel across a seam of the projection, or a pole, would cover half the world.
        limits = [_LARGEST_BOX * max(1.0, ratio) for ratio in pixel_ratio(target, source)]
        lost |= (np.abs(col_stop - col) > limits[0]) | (np.abs(row_stop - row) > limits[1])
    edges = (np.where(lost, -np.inf, edge).ravel() for edge in (col, col_stop, row, row_stop))
    left, right, top, bottom = edges
    return Boxes(
        col=np.minimum(left, right),
        col_stop=np.maximum(left, right),
        row=np.minimum(top, bottom),
        row_stop=np.maximum(top, bottom),
    )


def _kernel_scale(source_pixels: float) -> float:
    """By how much a kernel is widened: at least 1, and a whole number where it nearly is one (GDAL's own rule)."""
    whole = max(1.0, round(source_pixels))
    return whole if source_pixels < 1 or abs(source_pixels - whole) < 0.05 else source_pixels


def pixel_ratio(target: Grid, source: Grid) -> tuple[float, float]:
    """How many source columns and rows a target pixel spans at the middle of the target (1.0 where unknown).

    Where the middle has no place in the source's CRS, the median over a 5 x 5 lattice of the target counts.
    """
    middle = np.array([target.width // 2]), np.array([target.height // 2])
    ratio = _ratios(target, source, *middle)
    if ratio is None:
        lattice = np.meshgrid(np.linspace(0, target.width - 1, 5), np.linspace(0, target.height - 1, 5))
        ratio = _ratios(target, source, lattice[0].ravel(), lattice[1].ravel())
    return ratio or (1.0, 1.0)


def steady_ratio(target: Grid, source: Grid) -> tuple[float, float]:
    """As `pixel_ratio`, but at the middle of the source where the ratio hardly changes over the source (by 10 %).

    Of a scene, all chips then share one overview and one kernel; a raster of the globe has to differ with latitude.
    """
    t = target.transform
    found = _ratio_over(source, str(target.crs), (t.a, t.b, t.d, t.e))
    return pixel_ratio(target, source) if found is None else found


@functools.lru_cache(maxsize=4096)
def _ratio_over(source: Grid, crs: str, step: tuple[float, float, float, float]) -> tuple[float, float] | None:
    places = np.array([0.02, 0.5, 0.98])
    cols, rows = (at.ravel() for at in np.meshgrid(places * source.width, places * source.height))
    a, b, d, e = step
    target = Grid(crs=crs, transform=Affine(a, b, 0.0, d, e, 0.0), shape=(1, 1))
    with np.errstate(invalid="ignore"):
        at = target.to_pixels(*to_source(source, target, cols, rows))
        spans = np.stack(_spans(target, source, *at))
    if not (np.isfinite(spans).all() and (spans.max(axis=1) < _STEADY * spans.min(axis=1)).all()):
        return None
    return float(spans[0, 4]), float(spans[1, 4])


def _ratios(target: Grid, source: Grid, col: npt.NDArray[Any], row: npt.NDArray[Any]) -> tuple[float, float] | None:
    """The median spans of the target pixels at (col, row), None where none is finite."""
    across, down = _spans(target, source, col + 0.5, row + 0.5)
    good = np.isfinite(across) & np.isfinite(down) & (across > 0) & (down > 0)
    if not good.any():
        return None
    return float(np.median(across[good])), float(np.median(down[good]))


def _spans(target: Grid, source: Grid, col: Floats, row: Floats) -> tuple[Floats, Floats]:
    """How many source pixels the target pixels from (col, row) on span along columns and rows."""
    cols, rows = col + np.array([[0.0], [1.0], [0.0]]), row + np.array([[0.0], [0.0], [1.0]])
    t = target.transform
    x, y = transform_points(
        t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f, str(target.crs), str(source.crs)
    )
    with np.errstate(invalid="ignore"):
        dx, dy = x[1:] - x[0], y[1:] - y[0]
        turn = full_turn(source.crs)
        if turn is not None:
            dx -= turn * np.round(dx / turn)
        i = ~source.transform
        across = np.hypot(*(i.a * dx + i.b * dy))
        down = np.hypot(*(i.d * dx + i.e * dy))
    return across, down
