"""Decoded pixels to chips: buffers before, validity and resampling after (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.warp import warp
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.plan import BandPlan, ChipPlan, fill_value
from rasteret_ml.raster.validity import valid_pixels

__all__ = ["BandBuffers", "allocate", "finish"]

_LERC = 34887


@dataclass(slots=True, kw_only=True, eq=False)
class BandBuffers:
    """Where the tiles of one band of one chip land, on the band's own grid."""

    data: npt.NDArray[Any]
    """Pixels `[h, w]` of the plan's window, the fill value before anything lands."""
    unread: npt.NDArray[np.bool_]
    """Pixels `[h, w]` of stored tiles that have not landed (a failed tile stays so)."""
    codec_invalid: npt.NDArray[np.bool_] | None = None
    """Pixels that the codec itself marks invalid (LERC)."""
    mask: npt.NDArray[np.bool_] | None = None
    """What the file's mask or alpha says, where it has one; what is sparse in it is invalid."""


def allocate(plan: ChipPlan) -> list[BandBuffers]:
    """Buffers for every band; bands that need no resampling share one `[C, H, W]` array."""
    chip = np.empty((len(plan.bands), *plan.grid.shape), plan.dtype)
    buffers = []
    for channel, band in zip(chip, plan.bands, strict=True):
        channel[:] = fill_value(band.source.nodata, plan.dtype)
        buffers.append(_allocate_band(plan, band, channel))
    return buffers


def _allocate_band(plan: ChipPlan, band: BandPlan, channel: npt.NDArray[Any]) -> BandBuffers:
    if band.window is None:
        return BandBuffers(data=channel, unread=np.zeros(plan.grid.shape, bool))
    data = channel
    if band.resampling is not None:
        data = np.full(band.window.shape, fill_value(band.source.nodata, plan.dtype), plan.dtype)
    unread = np.zeros(band.window.shape, bool)
    empty = fill_value(band.source.metadata.nodata, plan.dtype)  # of a sparse tile, whatever the caller's nodata is
    for read in band.tiles:
        if read.range is not None:
            unread[read.target.slices] = True
        else:
            data[read.target.slices] = empty
    has_mask = band.level.mask is not None and band.source.heeds_mask
    return BandBuffers(
        data=data,
        unread=unread,
        codec_invalid=np.zeros(band.window.shape, bool) if band.level.image.compression == _LERC else None,
        mask=np.zeros(band.window.shape, bool) if has_mask else None,
    )


def finish(plan: ChipPlan, buffers: Sequence[BandBuffers]) -> Chip:
    """The chip: validity worked out, resampled bands put on the chip's grid."""
    shape = plan.grid.shape
    channels, valids = [], []
    covered = np.zeros(shape, bool)
    for band, held in zip(plan.bands, buffers, strict=True):
        data, valid, inside = _finish_band(plan, band, held)
        channels.append(data)
        valids.append(valid)
        covered |= inside
    base = channels[0].base if len({id(c.base) for c in channels}) == 1 else None
    whole = base is not None and base.shape == (len(channels), *shape)
    return Chip(
        data=base if whole else np.stack(channels),
        valid=np.stack(valids),
        inside=np.ones(shape, bool),
        grid=plan.grid,
        bands=tuple(band.source.band for band in plan.bands),
        nodata=tuple(band.source.nodata for band in plan.bands),
        covered=covered,
    )


def _finish_band(
    plan: ChipPlan, band: BandPlan, held: BandBuffers
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    shape, source = plan.grid.shape, band.source
    if band.window is None:
        nothing = np.zeros(shape, bool)
        return held.data, nothing, nothing
    inside = _in_image(band)
    nodata = source.nodata if held.mask is None or source.nodata_given else None
    valid = inside & ~held.unread & valid_pixels(held.data, held.mask, nodata)
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
