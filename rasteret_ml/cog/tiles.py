"""Which tiles a window needs, and where their pixels land (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from rasteret_ml.cog.table import TileTable
from rasteret_ml.geo.window import Window
from rasteret_ml.ranges import ByteRange

__all__ = ["TileRead", "plan_tiles"]

_LEADER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRead:
    """One tile's part in a window."""

    index: int
    """Position in the tile table, row-major."""
    range: ByteRange | None
    """What is fetched of it: its bytes, with the block leader before them where the file has those. None where the
    tile is sparse (nothing stored: nodata, or 0)."""
    leader: int
    """Bytes of `range` before the tile's own: 4, or 0."""
    source: Window
    """The pixels wanted, counted from the tile's first row and column."""
    target: Window
    """Where they land, counted from the window's first row and column."""
    stored_rows: int
    """Rows that the tile stores: `tile_height`, but for a last strip."""
    image_rows: int
    """Rows of the tile that lie in the image."""
    image_cols: int
    """Columns of the tile that lie in the image."""


def plan_tiles(table: TileTable, window: Window) -> tuple[TileRead, ...]:
    """The tiles that hold `window`'s pixels, row-major.

    Every pixel of the window that lies in the image is covered exactly once; a window outside it needs none.
    """
    inside = window.intersection(table.extent)
    if inside is None:
        return ()
    reads = []
    tile_h, tile_w = table.tile_height, table.tile_width
    leader = _LEADER if table.block_leaders else 0
    for tile_row in range(inside.row // tile_h, (inside.row_stop - 1) // tile_h + 1):
        for tile_col in range(inside.col // tile_w, (inside.col_stop - 1) // tile_w + 1):
            tile = Window(row=tile_row * tile_h, col=tile_col * tile_w, height=tile_h, width=tile_w)
            wanted = tile.intersection(inside)
            assert wanted is not None
            index = tile_row * table.tiles_across + tile_col
            offset, count = int(table.tile_offsets[index]), int(table.tile_byte_counts[index])
            reads.append(
                TileRead(
                    index=index,
                    range=ByteRange(offset - leader, leader + count) if count > 0 and offset > leader else None,
                    leader=leader,
                    source=wanted.relative_to(tile),
                    target=wanted.relative_to(window),
                    stored_rows=table.stored_rows(tile_row),
                    image_rows=min(tile_h, table.height - tile.row),
                    image_cols=min(tile_w, table.width - tile.col),
                )
            )
    return tuple(reads)
