"""Assemble chips from decoded tiles: allocate buffers, compute validity, resample; without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.grid import Window
from rasteret_ml.geo.resample.warp import warp
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.plan import BandPlan, ChipPlan, fill_value

_LERC = 34887
_NEAR = 2 * float(np.finfo(np.float32).eps)


def valid_pixels(
    data: npt.NDArray[Any], file_valid: npt.NDArray[np.bool_] | None, nodata: int | float | None
) -> npt.NDArray[np.bool_]:
    """Return the validity of stored values `[H, W]`.

    `file_valid` is the file's mask or alpha (True = valid), None where it has none; without `nodata` it decides alone.
    """
    valid = np.ones(data.shape, bool) if file_valid is None else file_valid.copy()
    if nodata is not None:
        valid &= ~equals_nodata(data, nodata)
    if data.dtype.kind in "fc":
        valid &= ~np.isnan(data)
    return valid


def equals_nodata(data: npt.NDArray[Any], nodata: int | float) -> npt.NDArray[np.bool_]:
    """Return where `data` equals `nodata`.

    Integers are compared exactly. Floats are compared as in GDAL's nodata mask (`ARE_REAL_EQUAL` in
    gdal_priv_templates.hpp): equal, or closer than 2 * FLT_EPSILON * |a + b|, also for doubles. Of complex numbers the
    real part is compared.
    """
    if data.dtype.kind in "iu":
        equal: npt.NDArray[np.bool_] = data == nodata
        return equal
    values = data.real if data.dtype.kind == "c" else data
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    with np.errstate(over="ignore", invalid="ignore"):
        value = values.dtype.type(nodata)
        equal = values == value
        if value == 0 or not np.isfinite(value):
            return equal
        # Few pixels are close but not equal: apply the exact rule to those alone. Where a + b overflows, every value
        # of the same sign is close.
        limits = np.finfo(values.dtype)
        overflows = abs(value) >= limits.max * limits.eps / 4
        if overflows:
            near = (values * np.sign(value) > 0) & ~equal
        else:
            near = (abs(values - value) <= abs(value) * values.dtype.type(3 * _NEAR)) & ~equal
        if near.any():
            close = values[near]
            limit = np.float32(_NEAR / 2) * abs(close + value) * values.dtype.type(2)
            equal[near] = abs(close - value) < limit
    return equal


@dataclass(slots=True, kw_only=True, eq=False)
class BandBuffers:
    """Arrays that the tiles of one band of a chip are copied to, on the band's grid."""

    data: npt.NDArray[Any]  #: Pixels `[H, W]` of the plan's window; the fill value where no tile is copied.
    #: Pixels `[H, W]` of stored tiles not copied yet (stays True for failed tiles); None = not tracked.
    unread: npt.NDArray[np.bool_] | None = None
    #: Pixels that the codec marks invalid (LERC); None for other codecs.
    codec_invalid: npt.NDArray[np.bool_] | None = None
    #: The file's mask or alpha (True = valid), False in sparse tiles; None = the file has none.
    mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipBuffers:
    """Arrays that the tiles of one chip are copied to."""

    #: Pixels of the chip `[C, H, W]`; bands that are not resampled are copied to its channels directly.
    data: npt.NDArray[Any]
    bands: tuple[BandBuffers, ...]  #: One per band.


def allocate(plan: ChipPlan, data: npt.NDArray[Any] | None = None, *, track_unread: bool = False) -> ChipBuffers:
    """Allocate buffers for a plan; `data` is an array `[C, H, W]` for the chip's pixels, None = a new one.

    `track_unread`: whether to track which pixels were copied, because tiles may fail.
    """
    chip = np.empty((len(plan.bands), *plan.grid.shape), plan.dtype) if data is None else data
    pairs = zip(plan.bands, chip, strict=True)
    return ChipBuffers(data=chip, bands=tuple(_allocate_band(plan, *pair, track_unread) for pair in pairs))


def _allocate_band(plan: ChipPlan, band: BandPlan, channel: npt.NDArray[Any], track_unread: bool) -> BandBuffers:
    fill = fill_value(band.source.nodata, plan.dtype)
    if band.window is None:
        channel[:] = fill
        return BandBuffers(data=channel)
    data = channel if band.resampling is None else np.empty(band.window.shape, plan.dtype)
    unread = np.zeros(band.window.shape, bool) if track_unread else None
    if track_unread or not band.covers:
        data[:] = fill  # otherwise tiles fill every pixel
    sparse = fill_value(band.source.metadata.nodata, plan.dtype)  # the file's nodata, even if the caller overrides it
    for read in band.tiles:
        if read.range is None:
            data[read.target.slices] = sparse
        elif unread is not None:
            unread[read.target.slices] = True
    has_mask = band.level.mask is not None and band.source.uses_mask
    return BandBuffers(
        data=data,
        unread=unread,
        codec_invalid=np.zeros(band.window.shape, bool) if band.level.image.compression == _LERC else None,
        mask=np.zeros(band.window.shape, bool) if has_mask else None,
    )


def finish_chip(plan: ChipPlan, buffers: ChipBuffers, *, lost: bool = False) -> Chip:
    """Compute validity, resample bands on other grids, and return the chip; `lost`: fill values, no valid pixel."""
    valid = np.zeros(buffers.data.shape, bool)
    covered = np.zeros(plan.grid.shape, bool)
    for i, (band, buffer) in enumerate(zip(plan.bands, buffers.bands, strict=True)):
        if lost:
            buffers.data[i] = fill_value(band.source.nodata, plan.dtype)
        else:
            valid[i], inside = _finish_band(plan, band, buffer, buffers.data[i])
            if inside is None:
                covered[:] = True
            else:
                covered |= inside
    return Chip(
        data=buffers.data,
        valid=valid,
        inside=np.ones(plan.grid.shape, bool),
        grid=plan.grid,
        bands=tuple(band.source.band for band in plan.bands),
        nodata=tuple(band.source.nodata for band in plan.bands),
        covered=covered,
    )


def _finish_band(
    plan: ChipPlan, band: BandPlan, buffer: BandBuffers, channel: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.bool_] | bool, npt.NDArray[np.bool_] | None]:
    """Resample a band to its channel of the chip if need be; return its valid pixels, and those in the image.

    None = all of them; an array of True would double the time that a chip takes here.
    """
    source = band.source
    if band.window is None:
        return False, np.zeros(plan.grid.shape, bool)
    inside = None if band.covers else _in_image(band, band.window)
    nodata = source.nodata if buffer.mask is None or source.nodata_given else None
    valid = valid_pixels(buffer.data, buffer.mask, nodata)
    if inside is not None:
        valid &= inside
    if buffer.unread is not None:
        valid &= ~buffer.unread
    fill = fill_value(source.nodata, plan.dtype)
    if buffer.codec_invalid is not None and buffer.codec_invalid.any():
        is_nan = source.nodata is None and plan.dtype.kind == "f"
        buffer.data[buffer.codec_invalid] = float("nan") if is_nan else fill
        valid &= ~buffer.codec_invalid
    if band.resampling is None:
        return valid, inside
    grid = band.level.grid.window(band.window)
    channel[:], valid = warp(buffer.data, valid, grid, plan.grid, band.resampling, fill, band.ratio)
    return valid, valid


def _in_image(band: BandPlan, window: Window) -> npt.NDArray[np.bool_]:
    inside = np.zeros(window.shape, bool)
    for part in band.parts:
        overlap = part.intersection(band.level.image.extent)
        if overlap is not None:
            inside[overlap.relative_to(part).slices] = True
    return inside
