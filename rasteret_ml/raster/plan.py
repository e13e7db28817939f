"""What a read will do, as frozen values made by pure functions; nothing here touches a byte of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.cog.tiles import TileRead, plan_tiles
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.warp import Resampling, needed_window
from rasteret_ml.geo.window import Window

__all__ = ["BandPlan", "BandSource", "ChipPlan", "common_dtype", "fill_value", "plan_chip"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandSource:
    """One band of one record, found and readable."""

    record: str
    """Record id, for messages."""
    band: str
    """Band as it was asked for."""
    href: str
    """Address of its file, unsigned."""
    metadata: CogMetadata
    """Its tile table."""
    sample: int
    """Which sample of a decoded tile: the band's index in a chunky file, 0 in a planar one."""
    nodata: int | float | None
    """The nodata value in force: the caller's, else the file's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandPlan:
    """How one band gets onto the chip's grid."""

    source: BandSource
    """The band."""
    window: Window | None
    """The window read on the band's own grid; None where the chip lies outside the image."""
    tiles: tuple[TileRead, ...]
    """Image tiles of `window`."""
    mask_tiles: tuple[TileRead, ...]
    """Mask tiles of `window`."""
    resampling: Resampling | None
    """The kernel, None where the grids agree and pixels are copied."""
    covers: bool
    """Whether the image holds every pixel that the chip needs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipPlan:
    """Everything needed to read one chip of one record."""

    grid: Grid
    """The chip's grid; its shape is the chip's."""
    bands: tuple[BandPlan, ...]
    """In the order asked for."""
    dtype: np.dtype[Any]
    """Of the chip's data."""


def plan_chip(sources: Sequence[BandSource], grid: Grid, resampling: Resampling | None = None) -> ChipPlan:
    """Plan the read of `grid` from one record's bands.

    A band whose own grid coincides with `grid` (whole pixels apart) is copied; any other is resampled with
    `resampling`, or with bilinear where that is None.

    Raises:
        UsageError: no bands, or bands of different types.
    """
    dtype = common_dtype(sources)
    return ChipPlan(grid=grid, bands=tuple(_plan_band(s, grid, resampling) for s in sources), dtype=dtype)


def _plan_band(source: BandSource, grid: Grid, resampling: Resampling | None) -> BandPlan:
    own, extent = source.metadata.grid, source.metadata.image.extent
    needed = window = own.window_of(grid)
    kernel: Resampling | None = None
    if needed is None:
        kernel = resampling or "bilinear"
        needed = needed_window(grid, own, kernel)
        window = None if needed is None else needed.intersection(extent)
    elif needed.intersection(extent) is None:
        window = None
    mask = source.metadata.mask
    return BandPlan(
        source=source,
        window=window,
        tiles=() if window is None else plan_tiles(source.metadata.image, window),
        mask_tiles=() if window is None or mask is None else plan_tiles(mask, window),
        resampling=kernel,
        covers=needed is not None and needed.intersection(extent) == needed,
    )


def common_dtype(sources: Sequence[BandSource]) -> np.dtype[Any]:
    """The one dtype of all bands.

    Raises:
        UsageError: none, or several (nothing is promoted behind anybody's back).
    """
    if not sources:
        raise UsageError("No bands were asked for.")
    kinds = {source.metadata.dtype for source in sources}
    if len(kinds) > 1:
        listing = ", ".join(f"{s.band}: {s.metadata.dtype}" for s in sources)
        raise UsageError(
            f"Record {sources[0].record}: these bands do not share a type ({listing}); "
            "read them apart, for example as two datasets joined with `&`."
        )
    return kinds.pop()


def fill_value(nodata: int | float | None, dtype: np.dtype[Any]) -> int | float:
    """What stands where there is no pixel: the nodata value where the dtype can hold it, else 0."""
    if nodata is None:
        return 0
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        whole = float(nodata).is_integer() if isinstance(nodata, float) else True
        return int(nodata) if whole and limits.min <= nodata <= limits.max else 0
    return float(nodata)
