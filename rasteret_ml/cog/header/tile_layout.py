"""From a directory's tags to a tile table: how an image is cut into tiles and how samples are stored (TIFF 6.0)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rasteret_ml.cog.header.ifd import Directory
from rasteret_ml.cog.tile_table import BT601_COEFFICIENTS, TileTable
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError
from rasteret_ml.ranges import ByteRange

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_COUNTS, _PLANAR, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 322, 323, 324, 325, 338, 339
_JPEG_TABLES, _IMAGE_DEPTH, _TILE_DEPTH = 347, 32997, 32998
_COEFFICIENTS, _SUBSAMPLING, _REFERENCE_BLACK_WHITE = 529, 530, 532
_SMALL_TAGS = (
    _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _ROWS_PER_STRIP, _PLANAR, _PREDICTOR,
    _TILE_WIDTH, _TILE_HEIGHT, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _JPEG_TABLES, _IMAGE_DEPTH, _TILE_DEPTH, _SUBSAMPLING,
    _COEFFICIENTS, _REFERENCE_BLACK_WHITE,
)  # fmt: skip
# Name and dtype by bits of each value of SampleFormat.
_SAMPLE_FORMATS = {
    1: ("unsigned", {n: "u1" if n <= 8 else "u2" if n <= 16 else "u4" for n in range(1, 33)} | {64: "u8"}),
    2: ("signed", {8: "i1", 16: "i2", 32: "i4", 64: "i8"}),
    3: ("float", {16: "f2", 24: "f4", 32: "f4", 64: "f8"}),
    5: ("complex integer", {32: "c8", 64: "c16"}),  # the smallest complex type that holds both integers exactly
    6: ("complex", {64: "c8", 128: "c16"}),
}
_MAX_TILES = 4 * 1024 * 1024
_MAX_SIDE = 2**31 - 1
_YCBCR, _JPEGS = 6, (6, 7)
_NO_CHROMA = ((1, 1), BT601_COEFFICIENTS)  # Subsampling and coefficients of pixels that need no conversion.
_SPLIT_ABOVE = 1024 * 1024  # Uncompressed strips of more bytes than this are split into strips of at most `_SPLIT_TO`.
_SPLIT_TO = 256 * 1024


def missing_ranges(page: Directory) -> list[ByteRange]:
    """Return what must be fetched before `read_tile_table` can read this page.

    Raise UnsupportedTiffError or CorruptTiffError if the sizes that the page claims are refused (before its arrays are
    fetched, so a false claim costs no memory), NeedBytes if a size is not stored in the directory itself.
    """
    offsets, counts, tiles = _tile_arrays(page)
    return page.missing(_SMALL_TAGS) + page.missing((offsets, counts), tiles)


def read_tile_table(page: Directory, *, block_leaders: bool = False) -> TileTable:
    """Return the tile table of a page, all planes; huge uncompressed strips are split into smaller ones.

    Raise UnsupportedTiffError for a sample type, a volume or a number of tiles that is not supported, CorruptTiffError
    for sizes or arrays that contradict each other.
    """
    width, height, tile_width, tile_height = _sizes(page)
    samples, planar = _planes(page)
    dtype, bits = _sample_type(page)
    compression, photometric = page.integer(_COMPRESSION, 1), page.integer(_PHOTOMETRIC, -1)
    subsampling, coefficients = _chroma(page) if photometric == _YCBCR and compression not in _JPEGS else _NO_CHROMA
    offsets_tag, counts_tag, tiles = _tile_arrays(page)
    table = TileTable(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        dtype=dtype,
        tile_offsets=page.integers(offsets_tag, tiles),
        tile_byte_counts=page.integers(counts_tag, tiles),
        compression=compression,
        predictor=page.integer(_PREDICTOR, 1),
        samples_per_pixel=samples,
        planar_configuration=planar,
        photometric=None if photometric < 0 else photometric,
        extra_samples=tuple(page.integers(_EXTRA_SAMPLES).tolist()) if _EXTRA_SAMPLES in page else (),
        bits_per_sample=0 if bits == dtype.itemsize * 8 else bits,
        big_endian=page.big_endian,
        fill_order=page.integer(_FILL_ORDER, 1),
        striped=_TILE_WIDTH not in page,
        jpeg_tables=page.data(_JPEG_TABLES),
        ycbcr_subsampling=subsampling,
        ycbcr_coefficients=coefficients,
        block_leaders=block_leaders,
    )
    plain = compression == 1 and photometric != _YCBCR
    if plain:
        table = _fill_byte_counts(table)
    signed = page.is_signed(offsets_tag) or page.is_signed(counts_tag)
    if signed and ((table.tile_offsets < 0).any() or (table.tile_byte_counts < 0).any()):
        raise CorruptTiffError("a tile has a negative offset or byte count")
    return _split_strips(table) if plain else table


def _chroma(page: Directory) -> tuple[tuple[int, int], tuple[float, float, float]]:
    """Subsampling and coefficients of YCbCr pixels outside JPEG (TIFF 6.0, section 21)."""
    black_white = page.numbers(_REFERENCE_BLACK_WHITE, 6)
    if len(black_white) and tuple(black_white) != (0, 255, 128, 255, 128, 255):
        raise UnsupportedTiffError(f"YCbCr pixels with ReferenceBlackWhite {black_white.tolist()} are not supported")
    subsampling = page.integers(_SUBSAMPLING, 2)
    across, down = (int(v) for v in subsampling) if len(subsampling) == 2 else (2, 2)
    red, green, blue = page.numbers(_COEFFICIENTS, 3) if page.count(_COEFFICIENTS) >= 3 else BT601_COEFFICIENTS
    if not (green > 0 and np.isfinite([red, green, blue]).all()):
        raise CorruptTiffError(f"YCbCr coefficients must be finite and green > 0, got {red}, {green}, {blue}")
    return (across, down), (float(red), float(green), float(blue))


def _sizes(page: Directory) -> tuple[int, int, int, int]:
    """Width and height of the image, and of its tiles."""
    if max(page.integer(_IMAGE_DEPTH, 1), page.integer(_TILE_DEPTH, 1)) > 1:
        raise UnsupportedTiffError("an image with depth (SGI ImageDepth, a volume) is not supported")
    width, height = page.integer(_WIDTH, 0), page.integer(_HEIGHT, 0)
    if not (0 < width <= _MAX_SIDE and 0 < height <= _MAX_SIDE):
        raise CorruptTiffError(f"the image is {width} x {height} pixels, each side must be 1 to {_MAX_SIDE}")
    if _TILE_WIDTH in page:
        tile_width, tile_height = page.integer(_TILE_WIDTH, 0), page.integer(_TILE_HEIGHT, 0)
    else:
        tile_width, tile_height = width, min(page.integer(_ROWS_PER_STRIP, height) or height, height)
    if not (0 < tile_width <= _MAX_SIDE and 0 < tile_height <= _MAX_SIDE):
        raise CorruptTiffError(f"the tiles are {tile_width} x {tile_height} pixels, each side must be 1 to {_MAX_SIDE}")
    return width, height, tile_width, tile_height


def _planes(page: Directory) -> tuple[int, int]:
    """Samples per pixel and planar configuration."""
    samples = page.integer(_SAMPLES, 1)
    if not 0 < samples <= 65535:
        raise CorruptTiffError(f"the image has {samples} samples per pixel, 1 to 65535 expected")
    planar = page.integer(_PLANAR, 1) if samples > 1 else 1
    if planar not in (1, 2):
        raise CorruptTiffError(f"planar configuration {planar}, 1 or 2 expected")
    return samples, planar


def _tile_arrays(page: Directory) -> tuple[int, int, int]:
    """The tags of the tile offsets and byte counts, and the number of tiles that the sizes imply."""
    width, height, tile_width, tile_height = _sizes(page)
    samples, planar = _planes(page)
    tiles = -(-width // tile_width) * -(-height // tile_height) * (samples if planar == 2 else 1)
    if tiles > _MAX_TILES:
        raise UnsupportedTiffError(f"{tiles} tiles (limit {_MAX_TILES}) are not supported")
    tiled = page.count(_TILE_OFFSETS) > 0  # some writers keep tiles under the strip tags
    offsets, counts = (_TILE_OFFSETS, _TILE_COUNTS) if tiled else (_STRIP_OFFSETS, _STRIP_COUNTS)
    plain = page.integer(_COMPRESSION, 1) == 1
    if page.count(offsets) < tiles or (page.count(counts) < tiles and not plain):
        raise CorruptTiffError(
            f"{tiles} tiles are expected, but the header lists {page.count(offsets)} offsets "
            f"and {page.count(counts)} byte counts"
        )
    return offsets, counts, tiles


def _fill_byte_counts(table: TileTable) -> TileTable:
    """Compute missing byte counts of an uncompressed image; as libtiff, correct a lone strip's count if too small."""
    offsets, counts = table.tile_offsets, table.tile_byte_counts
    rows = np.full(table.tiles_down, table.tile_height)
    rows[-1] = table.stored_rows(table.tiles_down - 1)
    planes = len(offsets) // (table.tiles_down * table.tiles_across)
    sizes = np.tile(np.repeat(rows * table.row_bytes, table.tiles_across), planes)
    too_small = len(offsets) == len(counts) == 1 and offsets[0] > 0 and counts[0] < sizes[0]
    return replace(table, tile_byte_counts=sizes) if len(counts) != len(offsets) or too_small else table


def _split_strips(table: TileTable) -> TileTable:
    """Split large uncompressed strips into strips of few rows, so that a window reads only its own rows."""
    if not table.striped or table.row_bytes * table.tile_height <= _SPLIT_ABOVE:
        return table
    rows = max(1, _SPLIT_TO // table.row_bytes)
    if table.tiles_down > 1:  # strips must be split evenly
        rows = next(r for r in range(rows, 0, -1) if table.tile_height % r == 0)
    first_row = np.arange(-(-table.height // rows)) * rows
    strip, row_in_strip = np.divmod(first_row, table.tile_height)
    offsets = table.tile_offsets.reshape(-1, table.tiles_down)[:, strip]
    counts = table.tile_byte_counts.reshape(-1, table.tiles_down)[:, strip]
    stored = (offsets > 0) & (counts > 0)
    full_counts = np.minimum(table.tile_height, table.height - strip * table.tile_height) * table.row_bytes
    if (stored & (counts < full_counts)).any():
        return table  # a truncated strip is kept whole, so that reading it fails
    new_counts = np.minimum(rows, table.height - first_row) * table.row_bytes
    return replace(
        table,
        tile_height=rows,
        tile_offsets=np.where(stored, offsets + row_in_strip * table.row_bytes, 0).ravel(),
        tile_byte_counts=np.where(stored, new_counts, 0).ravel(),
    )


def _sample_type(page: Directory) -> tuple[np.dtype[Any], int]:
    """The dtype in which samples are returned, and the bits of a sample in the file."""
    bits, formats = page.distinct(_BITS, 1), page.distinct(_SAMPLE_FORMAT, 1)
    if len(bits) > 1 or len(formats - {4}) > 1:  # 4 = undefined
        types = f"bits {sorted(bits)}, formats {sorted(formats)}"
        raise UnsupportedTiffError(f"bands of different types ({types}) are not supported")
    width, kind = bits.pop(), (formats - {4} or {1}).pop()
    name, dtypes = _SAMPLE_FORMATS.get(kind, (f"format {kind}", {}))
    if width not in dtypes:
        raise UnsupportedTiffError(f"{width}-bit {name} samples are not supported")
    return np.dtype(dtypes[width]), width
