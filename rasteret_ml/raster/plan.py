"""Plan which tiles of which overview a chip needs: frozen values from pure functions, without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from rasteret_ml.cog.metadata import CogMetadata, Level
from rasteret_ml.cog.tile_table import TileRead, TileTable, plan_tiles
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.geo.resample.positions import Resampling, needed_window, steady_ratio
from rasteret_ml.raster.source import BandSource

_PALETTE = 3
_MAX_CHIP_VALUES = 2**32
# Overview sizes are rounded up, so overview pixels are rarely exactly twice as large as those of the level below.
_TOLERANCE = 1.01


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandPlan:
    """How to read one band of a chip."""

    source: BandSource  #: The band.
    level: Level  #: The resolution to read.
    window: Window | None  #: Window to read on the level's grid; None if the chip lies outside the image.
    #: `window` in image coordinates: itself, and shifted by 360 degrees where it wraps around a global raster.
    parts: tuple[Window, ...]
    tiles: tuple[TileRead, ...]  #: Image tiles that intersect `window`.
    mask_tiles: tuple[TileRead, ...]  #: Mask tiles that intersect `window`.
    resampling: Resampling | None  #: Resampling kernel; None if the grids are aligned and pixels are copied.
    ratio: tuple[float, float]  #: Level pixels per chip pixel (across, down); constant for all chips of a scene.
    covers: bool  #: Whether the image holds every pixel that the chip needs.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipPlan:
    """How to read one chip of one record."""

    grid: Grid  #: Grid of the chip; its shape is the chip's.
    bands: tuple[BandPlan, ...]  #: Bands, in channel order.
    dtype: np.dtype[Any]  #: Data type of the chip.


#: Where a chip lies on a level: `window`, `parts` and `covers` of its `BandPlan`.
_Placement = tuple[Window | None, tuple[Window, ...], bool]


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
    """Plan the read of `grid` from the bands of one record.

    A band is copied if its grid, or the grid of one of its overviews, is aligned with `grid` (offset by whole pixels).
    Otherwise it is resampled from the coarsest overview that is not coarser than `grid`.

    Args:
        sources: Bands to read.
        grid: Grid of the chip.
        resampling: Kernel for bands on other grids. None = nearest for colour tables and 1-bit images, else bilinear.
        overviews: Whether overviews may be read; if not, bands are resampled from full resolution.
        wrap: Whether a chip that crosses the edge of a global raster continues at the opposite edge.
        categories: Whether values are classes. Overviews are then used only if they are known not to be averaged
            (GDAL's default is to average).
        level: Number of an overview; bands that have it on `grid` are copied from it, however it was made.

    Raises:
        UsageError: no bands, bands of different types, an unknown kernel, or a chip that is too large.
    """
    dtype = _common_dtype(sources)
    if resampling is not None and resampling not in get_args(Resampling):
        raise UsageError(f"resampling must be one of {', '.join(get_args(Resampling))}, got {resampling!r}.")
    if grid.height * grid.width * len(sources) > _MAX_CHIP_VALUES:
        raise UsageError(
            f"Record {sources[0].record}: a chip must hold at most 2**32 values, got {len(sources)} bands x "
            f"{grid.height} x {grid.width} pixels; read a smaller area, or stay inside the raster (boundless=False)."
        )
    bands = []
    aligned: dict[Grid, _Placement] = {}  # shared by all bands on a grid
    for source in sources:
        metadata = source.metadata
        placement, chosen = aligned.get(metadata.grid), metadata.full
        kernel, ratio = None, (1.0, 1.0)
        if placement is None or level:
            is_coded = metadata.image.photometric == _PALETTE or metadata.image.bits == 1
            discrete = categories or resampling == "mode" or (resampling is None and is_coded)
            method: Resampling = resampling or ("nearest" if discrete else "bilinear")
            chosen, needed = _aligned_level(metadata, grid, level, wrap)
            if needed is None and overviews:
                chosen = _choose_level(metadata, grid, method, discrete)
                needed = chosen.grid.window_of(grid, wrap=wrap)
            if needed is None:
                kernel, ratio = method, steady_ratio(grid, chosen.grid)
                needed = needed_window(grid, chosen.grid, method)
            placement = _placement(needed, chosen.grid, wrap, copied=kernel is None)
            if kernel is None and chosen.number == 0:
                aligned[chosen.grid] = placement
        window, parts, covers = placement
        mask = chosen.mask if source.uses_mask else None
        band = BandPlan(
            source=source,
            level=chosen,
            window=window,
            parts=parts,
            tiles=_tiles(chosen.image, parts),
            mask_tiles=() if mask is None else _tiles(mask, parts),
            resampling=kernel,
            ratio=ratio,
            covers=covers,
        )
        bands.append(band)
    return ChipPlan(grid=grid, bands=tuple(bands), dtype=dtype)


def _tiles(table: TileTable, parts: tuple[Window, ...]) -> tuple[TileRead, ...]:
    return tuple(read for part in parts for read in plan_tiles(table, part))


def _aligned_level(metadata: CogMetadata, grid: Grid, number: int | None, wrap: bool) -> tuple[Level, Window | None]:
    """Return overview `number` and its window that equals `grid`, else the full resolution and its window or None."""
    for level in metadata.levels if number else ():
        window = level.grid.window_of(grid, wrap=wrap)
        if level.number == number and window is not None:
            return level, window
    return metadata.full, metadata.full.grid.window_of(grid, wrap=wrap)


def _choose_level(metadata: CogMetadata, grid: Grid, resampling: Resampling, categories: bool) -> Level:
    """Return the coarsest level whose pixels are at most 1 % larger than those of `grid`.

    Overviews that are known to be averaged are not used with kernels that copy values; for categories, neither are
    overviews of unknown resampling.
    """
    allowed = ("nearest", "mode") if categories else ("nearest", "mode", None)
    copies = categories or resampling in ("nearest", "mode")
    if not metadata.overviews or (copies and metadata.overview_resampling not in allowed):
        return metadata.full
    across, down = steady_ratio(grid, metadata.grid)
    best = metadata.full
    for level in metadata.levels[1:]:
        fine = metadata.width <= across * _TOLERANCE * level.image.width
        fine &= metadata.height <= down * _TOLERANCE * level.image.height
        smaller = level.image.width * level.image.height < best.image.width * best.image.height
        best = level if fine and smaller else best
    return best


def _placement(needed: Window | None, grid: Grid, wrap: bool, *, copied: bool) -> _Placement:
    if needed is None:
        return None, (), False
    turn = grid.turn if wrap else None
    extent = Window(row=0, col=0, height=grid.height, width=grid.width)
    covers = _is_covered(needed, extent, turn)
    parts = _wrapped_parts(needed, extent, turn)
    window: Window | None = needed if parts else None
    if parts and not copied:  # only what lies in the image, but all columns of what wraps around
        window = needed.intersection(extent if parts == (needed,) else replace(needed, row=0, height=extent.height))
        parts = () if window is None else _wrapped_parts(window, extent, turn)
    return window, parts, covers


def _wrapped_parts(window: Window, extent: Window, turn: int | None) -> tuple[Window, ...]:
    """Return the window and its copies shifted by `turn` columns (360 degrees) that intersect the image."""
    shifts = (0,) if turn is None else (0, turn, -turn)
    shifted = (replace(window, col=window.col + shift) for shift in shifts)
    return tuple(part for part in shifted if part.intersection(extent) is not None)


def _is_covered(needed: Window, extent: Window, turn: int | None) -> bool:
    if turn and extent.width >= turn and needed.col >= extent.col - turn and needed.col_stop <= extent.col_stop + turn:
        needed = replace(needed, col=extent.col, width=extent.width)
    return needed.intersection(extent) == needed


def _common_dtype(sources: Sequence[BandSource]) -> np.dtype[Any]:
    """Return the data type that all bands share; types are never promoted."""
    if not sources:
        raise UsageError("bands must name at least one band, got none.")
    dtypes: set[np.dtype[Any]] = {source.metadata.dtype for source in sources}
    if len(dtypes) > 1:
        listing = ", ".join(f"{s.band}: {s.metadata.dtype}" for s in sources)
        raise UsageError(
            f"Record {sources[0].record}: bands must share one data type, got {listing}; read them separately, for "
            "example as two datasets joined with `&`."
        )
    return dtypes.pop()


def fill_value(nodata: int | float | None, dtype: np.dtype[Any]) -> int | float:
    """Return the value of missing pixels: nodata if `dtype` can represent it, else 0."""
    if nodata is None:
        return 0
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        is_integer = float(nodata).is_integer() if isinstance(nodata, float) else True
        return int(nodata) if is_integer and limits.min <= nodata <= limits.max else 0
    if dtype.kind == "c":
        return float(nodata)
    with np.errstate(over="ignore"):
        return float(dtype.type(nodata))
