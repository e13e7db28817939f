"""A tile plan covers its window exactly once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.cog.tile_table import TileTable, plan_tiles
from rasteret_ml.geo.grid import Window
from rasteret_ml.ranges import ByteRange


def _table(width: int, height: int, tile_width: int, tile_height: int, *, striped: bool = False) -> TileTable:
    count = -(-width // tile_width) * -(-height // tile_height)
    return TileTable(
        width=width, height=height, tile_width=tile_width, tile_height=tile_height, dtype=np.dtype(np.uint16),
        tile_offsets=np.arange(1, count + 1) * 1000, tile_byte_counts=np.arange(1, count + 1) + 7, striped=striped,
    )  # fmt: skip


SIZE = st.integers(1, 40)
TABLES = st.builds(_table, SIZE, SIZE, st.integers(1, 17), st.integers(1, 17))
STRIPS = st.tuples(SIZE, SIZE, st.integers(1, 40)).map(
    lambda v: _table(v[0], v[1], v[0], min(v[2], v[1]), striped=True)
)
WINDOWS = st.builds(Window, row=st.integers(-30, 50), col=st.integers(-30, 50), height=SIZE, width=SIZE)


@examples(150)
@given(table=st.one_of(TABLES, STRIPS), window=WINDOWS)
def test_every_pixel_exactly_once(table: TileTable, window: Window) -> None:
    """Copying each tile's part gives numpy's slice of the image; pixels outside it are not touched."""
    image = np.arange(table.height * table.width).reshape(table.height, table.width)
    padded = np.full((table.tiles_down * table.tile_height, table.tiles_across * table.tile_width), -9)
    padded[: table.height, : table.width] = image
    found, times = np.full(window.shape, -1), np.zeros(window.shape, int)
    for read in plan_tiles(table, window):
        row, col = divmod(read.index, table.tiles_across)
        top, left = row * table.tile_height, col * table.tile_width
        tile = padded[top : top + read.stored_rows, left : left + table.tile_width]
        assert read.source.row_stop <= read.stored_rows
        assert read.source.col_stop <= table.tile_width
        found[read.target.slices] = tile[read.source.slices]
        times[read.target.slices] += 1
    expected = np.full(window.shape, -1)
    inside = window.intersection(table.extent)
    if inside is not None:
        expected[inside.relative_to(window).slices] = image[inside.slices]
    assert np.array_equal(found, expected)
    assert np.array_equal(times, expected >= 0)


@examples(60)
@given(table=TABLES, window=WINDOWS)
def test_no_tile_is_read_for_nothing(table: TileTable, window: Window) -> None:
    """Row-major, each tile once and with its own bytes, and only tiles that overlap the window."""
    reads = plan_tiles(table, window)
    indices = [read.index for read in reads]
    assert indices == sorted(set(indices))
    for read in reads:
        assert read.range == ByteRange(1000 * (read.index + 1), read.index + 8)
    needed = {
        (r // table.tile_height) * table.tiles_across + c // table.tile_width
        for r in range(max(0, window.row), min(table.height, window.row_stop))
        for c in range(max(0, window.col), min(table.width, window.col_stop))
    }
    assert set(indices) == needed


@examples(50)
@given(table=STRIPS)
def test_strips_store_only_the_rows_of_the_image(table: TileTable) -> None:
    """The last strip is short; tiles are always full."""
    rows = [read.stored_rows for read in plan_tiles(table, table.extent)]
    assert sum(rows) == table.height
    assert set(rows[:-1]) <= {table.tile_height}


def test_sparse_tiles_have_no_range() -> None:
    """If offset or count is zero, nothing is stored and nothing is fetched, but the position is known."""
    table = _table(20, 10, 10, 10)
    table.tile_offsets[1] = table.tile_byte_counts[1] = 0
    stored, sparse = plan_tiles(table, table.extent)
    assert stored.range == ByteRange(1000, 8)
    assert sparse.range is None
    assert sparse.target == Window(row=0, col=10, height=10, width=10)


@pytest.mark.parametrize("row", [-5, 10])
def test_a_window_beside_the_image_needs_nothing(row: int) -> None:
    """A window that only touches the image needs no tiles."""
    assert plan_tiles(_table(20, 10, 8, 8), Window(row=row, col=0, height=5, width=5)) == ()
