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
    # Plain integers all the way: a batch plans thousands of tiles.
    tile_h, tile_w, across = table.tile_height, table.tile_width, table.tiles_across
    top, left = max(window.row, 0), max(window.col, 0)
    bottom, right = min(window.row_stop, table.height), min(window.col_stop, table.width)
    if top >= bottom or left >= right:
        return ()
    leader = _LEADER if table.block_leaders else 0
    reads = []
    for tile_row in range(top // tile_h, (bottom - 1) // tile_h + 1):
        y = tile_row * tile_h
        row, stored_rows, image_rows = max(top, y), table.stored_rows(tile_row), min(tile_h, table.height - y)
        height = min(bottom, y + tile_h) - row
        first, last = left // tile_w, (right - 1) // tile_w
        begin, end = tile_row * across + first, tile_row * across + last + 1
        offsets, counts = table.tile_offsets[begin:end].tolist(), table.tile_byte_counts[begin:end].tolist()
        for tile_col, offset, count in zip(range(first, last + 1), offsets, counts, strict=True):
            x = tile_col * tile_w
            col = max(left, x)
            width = min(right, x + tile_w) - col
            reads.append(
                TileRead(
                    index=tile_row * across + tile_col,
                    range=ByteRange(offset - leader, leader + count) if count > 0 and offset > leader else None,
                    leader=leader,
                    source=Window(row=row - y, col=col - x, height=height, width=width),
                    target=Window(row=row - window.row, col=col - window.col, height=height, width=width),
                    stored_rows=stored_rows,
                    image_rows=image_rows,
                    image_cols=min(tile_w, table.width - x),
                )
            )
    return tuple(reads)
