"""Which tiles a window needs, and where their pixels land (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rasteret_ml.cog.tile_table import TileTable
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
    layout = table.height, table.width, table.tile_height, table.tile_width
    runs = _runs(layout, window.row, window.col, window.height, window.width)
    leader, reads = _LEADER if table.block_leaders else 0, []
    for begin, places in runs:
        end, stored_rows = begin + len(places), table.stored_rows(begin // table.tiles_across)
        offsets, counts = table.tile_offsets[begin:end].tolist(), table.tile_byte_counts[begin:end].tolist()
        for index, place, offset, count in zip(range(begin, end), places, offsets, counts, strict=True):
            source, target, image_rows, image_cols = place
            reads.append(
                TileRead(
                    index=index,
                    range=ByteRange(offset - leader, leader + count) if count > 0 and offset > leader else None,
                    leader=leader,
                    source=source,
                    target=target,
                    stored_rows=stored_rows,
                    image_rows=image_rows,
                    image_cols=image_cols,
                )
            )
    return tuple(reads)


_Layout = tuple[int, int, int, int]
"""Rows and columns of the image and of a tile."""
_Place = tuple[Window, Window, int, int]
"""Of a tile: `source`, `target`, `image_rows` and `image_cols` of its read."""


@lru_cache(maxsize=64)  # the bands of a chip, and its mask, ask the same one after the other
def _runs(layout: _Layout, row: int, col: int, height: int, width: int) -> tuple[tuple[int, tuple[_Place, ...]], ...]:
    """For each row of tiles under a window: the first one's index, and where the pixels of each are."""
    # Plain integers all the way: a batch plans thousands of tiles.
    rows, cols, tile_h, tile_w = layout
    top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, rows), min(col + width, cols)
    if top >= bottom or left >= right:
        return ()
    across, runs = -(-cols // tile_w), []
    first, last = left // tile_w, (right - 1) // tile_w
    for tile_row in range(top // tile_h, (bottom - 1) // tile_h + 1):
        y = tile_row * tile_h
        image_rows, begin = min(tile_h, rows - y), max(top, y)
        tall, places = min(bottom, y + tile_h) - begin, []
        for x in range(first * tile_w, (last + 1) * tile_w, tile_w):
            start = max(left, x)
            wide = min(right, x + tile_w) - start
            source = Window(row=begin - y, col=start - x, height=tall, width=wide)
            target = Window(row=begin - row, col=start - col, height=tall, width=wide)
            places.append((source, target, image_rows, min(tile_w, cols - x)))
        runs.append((tile_row * across + first, tuple(places)))
    return tuple(runs)
