"""A directory's tags to a tile table: how an image is cut into tiles and how samples are stored (TIFF 6.0)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rasteret_ml.cog.header.ifd import Directory
from rasteret_ml.cog.tile_table import BT601_COEFFICIENTS, TileTable
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError
from rasteret_ml.ranges import ByteRange

__all__ = ["read_table", "unknown_bytes"]

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_COUNTS, _EXTRA, _FORMAT = 322, 323, 324, 325, 338, 339
_JPEG_TABLES, _IMAGE_DEPTH, _TILE_DEPTH = 347, 32997, 32998
_COEFFICIENTS, _SUBSAMPLING, _REFERENCE_BLACK_WHITE = 529, 530, 532
_SMALL = (
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _ROWS_PER_STRIP, _PLANAR, _PREDICTOR,
    _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _FORMAT, _JPEG_TABLES, _IMAGE_DEPTH, _TILE_DEPTH, _SUBSAMPLING, _COEFFICIENTS,
    _REFERENCE_BLACK_WHITE,
)  # fmt: skip
_MAX_TILES = 4 * 1024 * 1024
_MAX_SIDE = 2**31 - 1
_YCBCR, _JPEGS = 6, (6, 7)
_NO_CHROMA = ((1, 1), BT601_COEFFICIENTS)
"""Subsampling and coefficients where there is nothing to convert."""
_DIVIDE_ABOVE = 1024 * 1024
_DIVIDE_TO = 256 * 1024


def unknown_bytes(page: Directory) -> list[ByteRange]:
    """What must be fetched before `read_table` can read this page.

    Raises:
        UnsupportedTiffError, CorruptTiffError: the sizes that the page claims; checked before its arrays are asked
            for, so that no claim costs memory.
        NeedBytes: a size that is not stored in the directory itself.
    """
    offsets, counts, expected = _arrays(page)
    return page.missing(_SMALL) + page.missing((offsets, counts), expected)


def read_table(page: Directory, *, block_leaders: bool = False) -> TileTable:
    """The tile table of a page, all planes; huge uncompressed strips are divided into smaller ones.

    Raises:
        UnsupportedTiffError: sample types, depth or a number of tiles that is not handled.
        CorruptTiffError: sizes or arrays that contradict each other.
    """
    width, height, tile_width, tile_height = _sizes(page)
    samples, planar = _planes(page)
    dtype, bits = _sample_type(page)
    compression, photometric = page.number(_COMPRESSION, 1), page.number(_PHOTOMETRIC, -1)
    subsampling, coefficients = _chroma(page) if photometric == _YCBCR and compression not in _JPEGS else _NO_CHROMA
    code, counts_code, expected = _arrays(page)
    offsets, counts = page.integers(code, expected), page.integers(counts_code, expected)
    table = TileTable(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        dtype=dtype,
        tile_offsets=offsets,
        tile_byte_counts=counts,
        compression=compression,
        predictor=page.number(_PREDICTOR, 1),
        samples_per_pixel=samples,
        planar_configuration=planar,
        photometric=None if photometric < 0 else photometric,
        extra_samples=tuple(page.integers(_EXTRA).tolist()) if _EXTRA in page else (),
        bits_per_sample=0 if bits == dtype.itemsize * 8 else bits,
        big_endian=page.big_endian,
        fill_order=page.number(_FILL_ORDER, 1),
        striped=_TILE_WIDTH not in page,
        jpeg_tables=page.data(_JPEG_TABLES),
        ycbcr_subsampling=subsampling,
        ycbcr_coefficients=coefficients,
        block_leaders=block_leaders,
    )
    plain = compression == 1 and photometric != _YCBCR
    if plain:
        table = _with_known_counts(table, expected)
    signed = page.is_signed(code) or page.is_signed(counts_code)
    if signed and ((table.tile_offsets < 0).any() or (table.tile_byte_counts < 0).any()):
        raise CorruptTiffError("a tile has a negative offset or byte count")
    return _divided(table) if plain else table


def _chroma(page: Directory) -> tuple[tuple[int, int], tuple[float, float, float]]:
    """Subsampling and coefficients of YCbCr pixels outside JPEG (TIFF 6.0, section 21)."""
    black_white = page.numbers(_REFERENCE_BLACK_WHITE, 6)
    if len(black_white) and tuple(black_white) != (0, 255, 128, 255, 128, 255):
        raise UnsupportedTiffError(f"YCbCr pixels with the reference black and white {black_white.tolist()}")
    subsampling = page.integers(_SUBSAMPLING, 2)
    across, down = (int(v) for v in subsampling) if len(subsampling) == 2 else (2, 2)
    red, green, blue = page.numbers(_COEFFICIENTS, 3) if page.count(_COEFFICIENTS) >= 3 else BT601_COEFFICIENTS
    if not (green > 0 and np.isfinite([red, green, blue]).all()):
        raise CorruptTiffError(f"YCbCr coefficients {red}, {green}, {blue}")
    return (across, down), (float(red), float(green), float(blue))


def _sizes(page: Directory) -> tuple[int, int, int, int]:
    if max(page.number(_IMAGE_DEPTH, 1), page.number(_TILE_DEPTH, 1)) > 1:
        raise UnsupportedTiffError("an image with depth (SGI ImageDepth, a volume)")
    width, height = page.number(_WIDTH, 0), page.number(_HEIGHT, 0)
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise CorruptTiffError(f"the image is {width} x {height} pixels")
    if _TILE_WIDTH in page:
        tile_width, tile_height = page.number(_TILE_WIDTH, 0), page.number(_TILE_HEIGHT, 0)
    else:
        tile_width, tile_height = width, min(page.number(_ROWS_PER_STRIP, height) or height, height)
    if not (0 < tile_width <= _MAX_SIDE and 0 < tile_height <= _MAX_SIDE):
        raise CorruptTiffError(f"the tiles are {tile_width} x {tile_height} pixels")
    return width, height, tile_width, tile_height


def _planes(page: Directory) -> tuple[int, int]:
    samples = page.number(_SAMPLES, 1)
    if not 0 < samples <= 65535:
        raise CorruptTiffError(f"the image has {samples} samples a pixel")
    planar = page.number(_PLANAR, 1) if samples > 1 else 1
    if planar not in (1, 2):
        raise CorruptTiffError(f"planar configuration {planar}")
    return samples, planar


def _arrays(page: Directory) -> tuple[int, int, int]:
    """The tags of the tile offsets and byte counts, and how many tiles there must be."""
    width, height, tile_width, tile_height = _sizes(page)
    samples, planar = _planes(page)
    expected = -(-width // tile_width) * -(-height // tile_height) * (samples if planar == 2 else 1)
    if expected > _MAX_TILES:
        raise UnsupportedTiffError(f"{expected} tiles (limit {_MAX_TILES})")
    tiled = page.count(_TILES) > 0  # some writers keep tiles under the strip tags
    offsets, counts = (_TILES, _TILE_COUNTS) if tiled else (_STRIPS, _STRIP_COUNTS)
    plain = page.number(_COMPRESSION, 1) == 1
    if page.count(offsets) < expected or (page.count(counts) < expected and not plain):
        raise CorruptTiffError(
            f"{expected} tiles are expected, but the header lists {page.count(offsets)} offsets "
            f"and {page.count(counts)} byte counts"
        )
    return offsets, counts, expected


def _with_known_counts(table: TileTable, expected: int) -> TileTable:
    """An uncompressed image whose byte counts follow from its sizes: missing ones are no loss."""
    offsets, counts = table.tile_offsets, table.tile_byte_counts
    rows = np.full(table.tiles_down, table.tile_height)
    rows[-1] = table.stored_rows(table.tiles_down - 1)
    planes = expected // (table.tiles_down * table.tiles_across)
    sizes = np.tile(np.repeat(rows * table.row_bytes, table.tiles_across), planes)
    if len(counts) != expected:
        return replace(table, tile_byte_counts=sizes)
    if expected == 1 and offsets[0] > 0 and counts[0] < sizes[0]:  # nor, as for libtiff, a wrong one of a lone strip
        return replace(table, tile_byte_counts=sizes)
    return table


def _divided(table: TileTable) -> TileTable:
    """Uncompressed strips of many rows as several of few rows each, so that a window reads only its own rows."""
    large = table.row_bytes * table.tile_height > _DIVIDE_ABOVE
    if not table.striped or not large:
        return table
    most = max(1, _DIVIDE_TO // table.row_bytes)
    rows = most if table.tiles_down == 1 else next(r for r in range(most, 0, -1) if table.tile_height % r == 0)
    row = np.arange(-(-table.height // rows)) * rows
    strip, inside = np.divmod(row, table.tile_height)
    offsets = table.tile_offsets.reshape(-1, table.tiles_down)[:, strip]
    held = table.tile_byte_counts.reshape(-1, table.tiles_down)[:, strip]
    stored = (offsets > 0) & (held > 0)
    whole = np.minimum(table.tile_height, table.height - strip * table.tile_height) * table.row_bytes
    if (stored & (held < whole)).any():
        return table  # a strip that is cut short stays one, and fails as one
    size = np.minimum(rows, table.height - row) * table.row_bytes
    return replace(
        table,
        tile_height=rows,
        tile_offsets=np.where(stored, offsets + inside * table.row_bytes, 0).ravel(),
        tile_byte_counts=np.where(stored, size, 0).ravel(),
    )


def _sample_type(page: Directory) -> tuple[np.dtype[Any], int]:
    """The dtype that samples are returned in, and how many bits each takes in the file."""
    bits, formats = page.distinct(_BITS, 1), page.distinct(_FORMAT, 1)
    if len(bits) > 1 or len(formats - {4}) > 1:
        raise UnsupportedTiffError(f"bands of different types (bits {sorted(bits)}, formats {sorted(formats)})")
    width, kind = bits.pop(), (formats - {4} or {1}).pop()
    if width in (8, 16, 32, 64) and kind in (1, 2):
        return np.dtype(f"{'u' if kind == 1 else 'i'}{width // 8}"), width
    if width in (16, 32, 64) and kind == 3:
        return np.dtype(f"f{width // 8}"), width
    if width == 24 and kind == 3:
        return np.dtype(np.float32), width
    if width in (64, 128) and kind == 6:
        return np.dtype(f"c{width // 8}"), width
    if width in (32, 64) and kind == 5:  # pairs of integers: the smallest complex type that holds them exactly
        return np.dtype(f"c{width // 4}"), width
    if kind == 1 and 1 <= width < 32:
        return np.dtype(np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32), width
    names = {1: "unsigned", 2: "signed", 3: "float", 5: "complex integer", 6: "complex"}
    raise UnsupportedTiffError(f"{width}-bit {names.get(kind, f'format {kind}')} samples")
