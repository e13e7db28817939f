"""Decoded pixels to chips: buffers before, validity and resampling after (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.resample.warp import warp
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.plan import BandPlan, ChipPlan, fill_value

__all__ = ["BandBuffers", "ChipBuffers", "allocate", "empty_chip", "equals_nodata", "finish_chip", "valid_pixels"]

_NEAR = 2 * float(np.finfo(np.float32).eps)


def valid_pixels(
    data: npt.NDArray[Any],
    masked: npt.NDArray[np.bool_] | None,
    nodata: int | float | None,
) -> npt.NDArray[np.bool_]:
    """Validity of pixels `[h, w]`.

    Args:
        data: Stored values.
        masked: What the file's mask or alpha says (True = valid), None where it says nothing.
        nodata: The value that stands for no data, None where the mask decides alone.
    """
    valid = np.ones(data.shape, bool) if masked is None else masked.copy()
    if nodata is not None:
        valid &= ~equals_nodata(data, nodata)
    if data.dtype.kind in "fc":
        valid &= ~np.isnan(data)
    return valid


def equals_nodata(data: npt.NDArray[Any], nodata: int | float) -> npt.NDArray[np.bool_]:
    """Where `data` is `nodata`.

    Integers are compared exactly. Floats as GDAL's nodata mask does (`ARE_REAL_EQUAL` in gdal_priv_templates.hpp):
    equal, or closer than 2 * FLT_EPSILON * |a + b|, also for doubles; of complex numbers the real part.
    """
    if data.dtype.kind in "iu":
        same: npt.NDArray[np.bool_] = data == nodata
        return same
    values = data.real if data.dtype.kind == "c" else data
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.dtype.type(nodata)
        same = values == wanted
        if wanted == 0 or not np.isfinite(wanted):
            return same
        # Few pixels are near without being equal: the exact rule is worked out for those alone. Where a + b
        # overflows, everything of the same sign is near.
        limits = np.finfo(values.dtype)
        huge = abs(wanted) >= limits.max * limits.eps / 4  # the sum with a large value of the same sign overflows
        reach = np.inf if huge else abs(wanted) * values.dtype.type(3 * _NEAR)
        near = (values * np.sign(wanted) > 0) & ~same if huge else (abs(values - wanted) <= reach) & ~same
        if near.any():
            close = values[near]
            limit = np.float32(_NEAR / 2) * abs(close + wanted) * values.dtype.type(2)
            same[near] = abs(close - wanted) < limit
    return same


_LERC = 34887


@dataclass(slots=True, kw_only=True, eq=False)
class BandBuffers:
    """Where the tiles of one band of one chip land, on the band's own grid."""

    data: npt.NDArray[Any]
    """Pixels `[h, w]` of the plan's window, the fill value where nothing will land."""
    unread: npt.NDArray[np.bool_] | None = None
    """Pixels `[h, w]` of stored tiles that have not landed (a failed tile stays so); None where none may fail."""
    codec_invalid: npt.NDArray[np.bool_] | None = None
    """Pixels that the codec itself marks invalid (LERC)."""
    mask: npt.NDArray[np.bool_] | None = None
    """What the file's mask or alpha says, where it has one; what is sparse in it is invalid."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipBuffers:
    """Where the tiles of one chip land."""

    data: npt.NDArray[Any]
    """The chip's pixels `[C, H, W]`; bands that need no resampling land in its channels."""
    bands: tuple[BandBuffers, ...]
    """Per band."""


def allocate(plan: ChipPlan, data: npt.NDArray[Any] | None = None, *, track_unread: bool = False) -> ChipBuffers:
    """Buffers for a plan.

    Args:
        plan: What will be read.
        data: An array `[C, H, W]` that the chip's pixels go to; None = a new one.
        track_unread: Whether tiles may fail, so that it has to be noted which have landed.
    """
    chip = np.empty((len(plan.bands), *plan.grid.shape), plan.dtype) if data is None else data
    bands = tuple(
        _allocate_band(plan, band, channel, track_unread) for channel, band in zip(chip, plan.bands, strict=True)
    )
    return ChipBuffers(data=chip, bands=bands)


def _allocate_band(plan: ChipPlan, band: BandPlan, channel: npt.NDArray[Any], track_unread: bool) -> BandBuffers:
    fill = fill_value(band.source.nodata, plan.dtype)
    if band.window is None:
        channel[:] = fill
        return BandBuffers(data=channel)
    data = channel if band.resampling is None else np.empty(band.window.shape, plan.dtype)
    unread = np.zeros(band.window.shape, bool) if track_unread else None
    if track_unread or not band.covers:
        data[:] = fill  # else every pixel gets a value from its tile
    empty = fill_value(band.source.metadata.nodata, plan.dtype)  # of a sparse tile, whatever the caller's nodata is
    for read in band.tiles:
        if read.range is None:
            data[read.target.slices] = empty
        elif unread is not None:
            unread[read.target.slices] = True
    has_mask = band.level.mask is not None and band.source.uses_mask
    return BandBuffers(
        data=data,
        unread=unread,
        codec_invalid=np.zeros(band.window.shape, bool) if band.level.image.compression == _LERC else None,
        mask=np.zeros(band.window.shape, bool) if has_mask else None,
    )


def finish_chip(plan: ChipPlan, buffers: ChipBuffers) -> Chip:
    """Compute validity, resample bands that lie on other grids, and return the chip."""
    shape = plan.grid.shape
    valid = np.empty(buffers.data.shape, bool)
    covered = np.zeros(shape, bool)
    for i, (band, held) in enumerate(zip(plan.bands, buffers.bands, strict=True)):
        data, valid[i], inside = _finish_band(plan, band, held)
        if inside is None:
            covered[:] = True
        else:
            covered |= inside
        if band.resampling is not None:
            buffers.data[i] = data
    return _chip(plan, buffers, valid, covered)


def empty_chip(plan: ChipPlan, buffers: ChipBuffers) -> Chip:
    """Return a chip of fill values, none of them valid."""
    for band, channel in zip(plan.bands, buffers.data, strict=True):
        channel[:] = fill_value(band.source.nodata, plan.dtype)
    return _chip(plan, buffers, np.zeros(buffers.data.shape, bool), np.zeros(plan.grid.shape, bool))


def _chip(plan: ChipPlan, buffers: ChipBuffers, valid: npt.NDArray[np.bool_], covered: npt.NDArray[np.bool_]) -> Chip:
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
    plan: ChipPlan, band: BandPlan, held: BandBuffers
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
    """Return pixels, their validity, and which of them lie in the image (None: all)."""
    shape, source = plan.grid.shape, band.source
    if band.window is None:
        nothing = np.zeros(shape, bool)
        return held.data, nothing, nothing
    inside = None if band.covers else _in_image(band)
    nodata = source.nodata if held.mask is None or source.nodata_given else None
    valid = valid_pixels(held.data, held.mask, nodata)
    if inside is not None:
        valid &= inside
    if held.unread is not None:
        valid &= ~held.unread
    if held.codec_invalid is not None and held.codec_invalid.any():
        held.data[held.codec_invalid] = _lerc_fill(source.nodata, plan.dtype)
        valid &= ~held.codec_invalid
    if band.resampling is None:
        return held.data, valid, inside
    own = band.level.grid
    fill = fill_value(source.nodata, plan.dtype)
    data, valid = warp(held.data, valid, own.window(band.window), plan.grid, band.resampling, fill, band.ratio)
    return data, valid, valid


def _lerc_fill(nodata: int | float | None, dtype: np.dtype[Any]) -> int | float:
    return float("nan") if nodata is None and dtype.kind == "f" else fill_value(nodata, dtype)


def _in_image(band: BandPlan) -> npt.NDArray[np.bool_]:
    assert band.window is not None
    inside = np.zeros(band.window.shape, bool)
    for turned in band.parts:
        part = turned.intersection(band.level.image.extent)
        if part is not None:
            inside[part.relative_to(turned).slices] = True
    return inside
