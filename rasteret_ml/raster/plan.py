"""What a read will do, as frozen values made by pure functions; nothing here touches a byte of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from rasteret_ml.cog.metadata import CogMetadata, Level
from rasteret_ml.cog.tile_table import TileRead, TileTable, plan_tiles
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import needed_window, steady_ratio
from rasteret_ml.geo.resample.warp import Resampling
from rasteret_ml.geo.window import Window
from rasteret_ml.raster.source import BandSource

__all__ = ["BandPlan", "ChipPlan", "choose_level", "common_dtype", "fill_value", "plan_chip"]

_PALETTE = 3
_MAX_CHIP_PIXELS = 2**32
_SLACK = 1.01
"""An overview's pixels are the extent over a rounded-up count, so seldom exactly twice those of the level below."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandPlan:
    """How one band gets onto the chip's grid."""

    source: BandSource
    """The band."""
    level: Level
    """The resolution that is read."""
    window: Window | None
    """The window read on the level's grid; None where the chip lies outside the image."""
    parts: tuple[Window, ...]
    """`window` as the image knows it: itself, and moved by a whole turn where it goes on at the other edge of a raster
    round the globe."""
    tiles: tuple[TileRead, ...]
    """Image tiles of `window`."""
    mask_tiles: tuple[TileRead, ...]
    """Mask tiles of `window`."""
    resampling: Resampling | None
    """The kernel, None where the grids agree and pixels are copied."""
    ratio: tuple[float, float]
    """Columns and rows of the level to one of the chip's pixels; the same for all chips of a scene."""
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


def plan_chip(
    sources: Sequence[BandSource],
    grid: Grid,
    resampling: Resampling | None = None,
    *,
    overviews: bool = True,
    wrap: bool = True,
    categories: bool = False,
    level: int | None = None,
) -> ChipPlan:
    """Plan the read of `grid` from one record's bands.

    A band whose own grid, or that of one of its overviews, coincides with `grid` (whole pixels apart) is copied; any
    other is resampled with `resampling` (None: nearest where values are codes, as colour tables and bits are, else
    bilinear) from the coarsest overview that is not coarser than `grid` (`overviews=False`: from full resolution).

    Args:
        sources: The bands.
        grid: The chip's grid.
        resampling: Kernel where grids differ.
        overviews: Whether overviews may be read.
        wrap: Whether a chip that crosses the edge of a raster round the globe goes on at the other edge.
        categories: Values are classes: only overviews that are known to hold values of the image are used (GDAL
            averages unless told otherwise).
        level: Asks for an overview by its number: bands that have it on `grid` are copied from it, whatever made it.

    Raises:
        UsageError: no bands, bands of different types, an unknown kernel, or a chip too large to hold.
    """
    dtype = common_dtype(sources)
    if resampling is not None and resampling not in get_args(Resampling):
        raise UsageError(f"resampling must be one of {', '.join(get_args(Resampling))}, not {resampling!r}.")
    if grid.height * grid.width * len(sources) > _MAX_CHIP_PIXELS:
        raise UsageError(
            f"Record {sources[0].record}: a chip of {len(sources)} bands x {grid.height} x {grid.width} pixels is too "
            "large to hold; ask for a smaller area, or keep to the raster (boundless=False)."
        )
    wish = _Wish(resampling, overviews, wrap, categories, level)
    copies: dict[Grid, _Place] = {}
    bands = tuple(_plan_band(source, grid, wish, copies) for source in sources)
    return ChipPlan(grid=grid, bands=bands, dtype=dtype)


def _holds_codes(source: BandSource) -> bool:
    image = source.metadata.image
    return image.photometric == _PALETTE or image.bits == 1


@dataclass(frozen=True, slots=True)
class _Wish:
    """How a chip is asked for, see `plan_chip`."""

    resampling: Resampling | None
    overviews: bool
    wrap: bool
    categories: bool
    level: int | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chip lies on a level, see the fields of `BandPlan`."""

    window: Window | None
    parts: tuple[Window, ...]
    covers: bool


def _plan_band(source: BandSource, grid: Grid, wish: _Wish, copies: dict[Grid, _Place]) -> BandPlan:
    level, place, applied = source.metadata.full, copies.get(source.metadata.grid), None
    ratio = (1.0, 1.0)
    if place is None or wish.level:
        level, needed, resampling = _level_on(source, grid, wish)
        if needed is None:
            applied, ratio = resampling, steady_ratio(grid, level.grid)
            place = _place(needed_window(grid, level.grid, resampling), level.grid, wish, copied=False)
        else:
            place = _place(needed, level.grid, wish, copied=True)
            if level.number == 0:  # bands on one grid share the answer
                copies[level.grid] = place
    mask = level.mask if source.uses_mask else None
    return BandPlan(
        source=source,
        level=level,
        window=place.window,
        parts=place.parts,
        tiles=_tiles(level.image, place.parts),
        mask_tiles=() if mask is None else _tiles(mask, place.parts),
        resampling=applied,
        ratio=ratio,
        covers=place.covers,
    )


def _place(needed: Window | None, grid: Grid, wish: _Wish, *, copied: bool) -> _Place:
    if needed is None:
        return _Place(None, (), False)
    turn = grid.turn if wish.wrap else None
    extent = Window(row=0, col=0, height=grid.height, width=grid.width)
    window = _clipped(needed, extent, turn, copied=copied)
    parts = () if window is None else _turned(window, extent, turn)
    return _Place(window, parts, _covers(needed, extent, turn))


def _tiles(table: TileTable, parts: tuple[Window, ...]) -> tuple[TileRead, ...]:
    return tuple(read for part in parts for read in plan_tiles(table, part))


def _level_on(source: BandSource, grid: Grid, wish: _Wish) -> tuple[Level, Window | None, Resampling]:
    """The level to read, and the window of it that is copied (None: it has to be resampled, with that kernel)."""
    codes = wish.categories or wish.resampling == "mode" or (wish.resampling is None and _holds_codes(source))
    resampling: Resampling = wish.resampling or ("nearest" if codes else "bilinear")
    for asked in source.metadata.levels if wish.level else ():
        window = asked.grid.window_of(grid, wrap=wish.wrap)
        if asked.number == wish.level and window is not None:
            return asked, window, resampling
    level = source.metadata.full
    needed = level.grid.window_of(grid, wrap=wish.wrap)
    if needed is None and wish.overviews:
        level = choose_level(source.metadata, grid, resampling, categories=codes)
        needed = level.grid.window_of(grid, wrap=wish.wrap)
    return level, needed, resampling


def choose_level(metadata: CogMetadata, grid: Grid, resampling: Resampling, *, categories: bool = False) -> Level:
    """The coarsest level whose pixels are not larger than those of `grid` (by more than 1 %, see `_SLACK`).

    Kernels that copy values take no overview that is known to be averaged; categories none that may be.
    """
    kept = ("nearest", "mode") if categories else ("nearest", "mode", None)
    copies = categories or resampling in ("nearest", "mode")
    if not metadata.overviews or (copies and metadata.overview_resampling not in kept):
        return metadata.full
    across, down = steady_ratio(grid, metadata.grid)
    best = metadata.full
    for level in metadata.levels[1:]:
        fine = metadata.width <= across * _SLACK * level.image.width
        fine &= metadata.height <= down * _SLACK * level.image.height
        smaller = level.image.width * level.image.height < best.image.width * best.image.height
        best = level if fine and smaller else best
    return best


def _clipped(needed: Window, extent: Window, turn: int | None, *, copied: bool) -> Window | None:
    """The part of `needed` worth reading: for a copy all of it, else what lies in the image."""
    parts = _turned(needed, extent, turn)
    if not parts:
        return None
    if copied:
        return needed
    if parts == (needed,):
        return needed.intersection(extent)
    rows = replace(needed, row=extent.row, height=extent.height)
    return needed.intersection(rows)


def _turned(window: Window, extent: Window, turn: int | None) -> tuple[Window, ...]:
    if turn is None:
        return (window,) if window.intersection(extent) is not None else ()
    moved = (replace(window, col=window.col + shift) for shift in (0, turn, -turn))
    return tuple(part for part in moved if part.intersection(extent) is not None)


def _covers(needed: Window, extent: Window, turn: int | None) -> bool:
    around = turn is not None and extent.width >= turn
    if turn and around and needed.col >= extent.col - turn and needed.col_stop <= extent.col_stop + turn:
        needed = replace(needed, col=extent.col, width=extent.width)
    return needed.intersection(extent) == needed


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
    if dtype.kind == "c":
        return float(nodata)
    with np.errstate(over="ignore"):
        return float(dtype.type(nodata))
