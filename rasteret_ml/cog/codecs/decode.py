"""Compressed tile to pixels (imagecodecs), in native byte order.

Memory and time are bounded by the tile's size in the header, whatever a stream claims of itself. Values are those
that libtiff and GDAL give: no colour is converted except YCbCr to RGB; inks (CMYK) stay inks, as in tifffile.
"""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.byte_codecs import BYTE_CODECS, applied_predictor, decode_samples
from rasteret_ml.cog.codecs.image_codecs import IMAGE_CODECS, decode_image
from rasteret_ml.cog.codecs.ycbcr import chroma_subsampling
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError
from rasteret_ml.geo.window import Window

__all__ = ["MAX_TILE_BYTES", "check_supported", "decode_tile"]

MAX_TILE_BYTES = 128 * 1024 * 1024
"""Largest decoded tile or strip that is read; anything above is refused with its size."""

_NONE, _JPEG = 1, 7
_YCBCR = 6
_COLOUR_SPACES = {8: "CIELab", 9: "ICCLab", 10: "ITULab", 32844: "LogL", 32845: "LogLuv"}
_SUBSAMPLINGS = {(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (4, 4)}
_IMAGE_TYPES = {
    "JPEG": ("u1", "u2"),
    "WebP": ("u1",),
    "JPEG XL": ("u1", "u2", "f2", "f4"),
    "JPEG 2000": ("u1", "i1", "u2", "i2", "u4", "i4"),
    "LERC": ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"),
}
_OWN_WIDTH = {"JPEG", "JPEG 2000"}
"""Codecs that unpack samples of any width themselves (12-bit JPEG)."""
_WORKING_BYTES = {33005: 4, 34712: 4, 50002: 4, 52546: 4}
"""Bytes a sample that a decoder takes inside, where that is more than the sample's own."""
_REFUSED = {
    2: "CCITT RLE", 3: "CCITT Group 3", 4: "CCITT Group 4", 6: "old-style JPEG", 9: "JBIG, ITU-T T.85",
    10: "JBIG, ITU-T T.43", 262: "Kodak 262", 22610: "JPEG XR (Hamamatsu)", 32766: "NeXT", 32767: "Sony ARW",
    32769: "packed raw", 32770: "Samsung SRW", 32771: "uncompressed, word-aligned", 32772: "Samsung SRW2",
    32809: "ThunderScan", 32867: "Kodak KDC", 32895: "IT8 CT with padding", 32896: "IT8 line work",
    32897: "IT8 monochrome picture", 32898: "IT8 binary line art", 32908: "Pixar film", 32909: "PixarLog",
    32947: "Kodak DCS", 33003: "JPEG 2000 YCbCr (Aperio)", 33004: "JPEG 2000 (lossy)", 33007: "JPEG (alternative)",
    34661: "JBIG", 34676: "SGI log", 34677: "SGI log, 24 bits", 34713: "Nikon NEF", 34715: "JBIG2",
    34718: "MDI binary", 34719: "MDI progressive", 34720: "MDI vector", 34892: "lossy JPEG (DNG)",
    34926: "ZSTD, withdrawn code", 34927: "WebP, withdrawn code", 34933: "PNG", 34934: "JPEG XR", 48124: "Jetraw",
    50013: "Pixtiff", 65000: "Kodak DCR or EER", 65001: "EER, 7 bits", 65002: "EER, variable", 65535: "Pentax PEF",
}  # fmt: skip


def check_supported(table: TileTable) -> None:
    """Refuse, by name, an image whose tiles cannot be decoded here.

    Raises:
        UnsupportedTiffError: codec, predictor, photometric interpretation, sample type, or the size of a tile
            where any is stored at all.
    """
    _check_size(table)
    code = table.compression
    if code != _NONE and code not in BYTE_CODECS and code not in IMAGE_CODECS:
        raise UnsupportedTiffError(f"compression {code} ({_REFUSED.get(code, 'unknown')})")
    if table.photometric in _COLOUR_SPACES:
        raise UnsupportedTiffError(f"{_COLOUR_SPACES[table.photometric]} pixels")
    if table.photometric == _YCBCR:
        _check_ycbcr(table)
    if code in IMAGE_CODECS:
        _check_image(table, IMAGE_CODECS[code][0])
    else:
        _check_samples(table)


def _check_size(table: TileTable) -> None:
    item = max(table.dtype.itemsize, _WORKING_BYTES.get(table.compression, 1))
    size = table.tile_height * table.tile_width * table.samples_per_tile * item
    if size > MAX_TILE_BYTES and (table.tile_byte_counts > 0).any():
        kind = "strip" if table.striped else "tile"
        raise UnsupportedTiffError(
            f"one {kind} of {table.tile_width} x {table.tile_height} pixels decodes to {size / 2**20:.0f} MiB "
            f"(limit {MAX_TILE_BYTES // 2**20}); rewrite the file as a COG: gdal_translate -of COG in.tif out.tif"
        )


def _check_ycbcr(table: TileTable) -> None:
    if table.compression == _JPEG:
        if table.planar_configuration == 1 and table.samples_per_pixel != 3:
            raise UnsupportedTiffError(f"YCbCr pixels of {table.samples_per_pixel} samples")
        return
    if table.compression in IMAGE_CODECS:
        raise UnsupportedTiffError(f"YCbCr pixels in {IMAGE_CODECS[table.compression][0]}")
    if table.planar_configuration != 1:
        raise UnsupportedTiffError("YCbCr pixels in separate planes")
    if table.samples_per_pixel != 3 or table.dtype != np.uint8 or table.bits != 8:
        raise UnsupportedTiffError(f"YCbCr pixels of {table.samples_per_pixel} samples of {table.bits} bits")
    subsampling = chroma_subsampling(table)
    if subsampling not in _SUBSAMPLINGS:
        raise UnsupportedTiffError(f"YCbCr pixels subsampled by {subsampling[0]} x {subsampling[1]}")
    if subsampling != (1, 1) and applied_predictor(table) != 1:
        raise UnsupportedTiffError("a predictor on subsampled YCbCr pixels")


def _check_image(table: TileTable, name: str) -> None:
    packed = table.bits_per_sample and name not in _OWN_WIDTH
    if packed or table.dtype not in [np.dtype(t) for t in _IMAGE_TYPES[name]]:
        raise UnsupportedTiffError(f"{table.bits}-bit {table.dtype} samples in {name}")
    if name != "LERC" and table.big_endian and table.dtype.itemsize > 1:  # libtiff swaps them, tifffile does not
        raise UnsupportedTiffError(f"big-endian {table.bits}-bit samples in {name}")
    if name == "WebP" and table.samples_per_tile not in (3, 4):
        raise UnsupportedTiffError(f"{table.samples_per_tile} samples a pixel in WebP")
    if table.fill_order == 2 and name.startswith(("JPEG XL", "JPEG 2000")):
        raise UnsupportedTiffError(f"{name} with reversed bits")


def _check_samples(table: TileTable) -> None:
    predictor, kind, bits = applied_predictor(table), table.dtype.kind, table.bits
    packed = bool(table.bits_per_sample) and kind not in "c"
    if kind == "f" and packed and bits != 24:
        raise UnsupportedTiffError(f"{bits}-bit floats")
    if kind == "u" and bits == 24 and table.big_endian:  # GDAL and tifffile read them in opposite orders
        raise UnsupportedTiffError("big-endian 24-bit samples")
    if predictor not in (1, 2, 3):
        raise UnsupportedTiffError(f"predictor {predictor}")
    if predictor == 3 and kind != "f":
        raise UnsupportedTiffError(f"the floating point predictor on {table.dtype}")
    if predictor == 2 and (packed or bits > 64):
        raise UnsupportedTiffError(f"predictor 2 on {bits}-bit samples")


def decode_tile(
    data: bytes | memoryview,
    table: TileTable,
    rows: int,
    needed_rows: int | None = None,
    needed_cols: int | None = None,
    wanted: Window | None = None,
    stop_early: bool = False,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Decode one tile.

    Some writers store only the part of an edge tile that lies in the image: what is missing of the rest is zero.

    Args:
        data: Its compressed bytes.
        table: The image it belongs to, one that `check_supported` lets pass.
        rows: Rows that it stores by the book (`TileTable.stored_rows`).
        needed_rows: Rows that lie in the image; `rows` by default.
        needed_cols: Columns that lie in the image; the tile's width by default.
        wanted: The part of the tile that the caller will look at, all by default; what the rest holds is then not said.
        stop_early: Whether a deflate stream may be left after those rows; what is wrong behind them, and its
            checksum, then go unnoticed.

    Returns:
        Pixels `[rows, tile_width, samples]` in `table.dtype`, and the codec's own validity of the same shape
        where it has one (LERC). The pixels live in this thread's scratch, or are a read-only view of `data`: copy
        what is wanted before the next call.

    Raises:
        CorruptTiffError: the bytes cannot be decoded, or hold less than the part needed, or more than a full tile
            (uncompressed data may).
        UnsupportedTiffError: a codec or a size that `check_supported` refuses.
    """
    code = table.compression
    in_image = rows if needed_rows is None else min(needed_rows, rows)
    cols_in_image = table.tile_width if needed_cols is None else min(needed_cols, table.tile_width)
    if code != _NONE and code not in BYTE_CODECS and code not in IMAGE_CODECS:
        raise UnsupportedTiffError(f"compression {code} ({_REFUSED.get(code, 'unknown')})")
    _check_size(table)
    try:
        if table.fill_order == 2 and code != _JPEG:  # libtiff reverses the bits of all streams but JPEG
            data = imagecodecs.bitorder_decode(bytes(data))
        if code in IMAGE_CODECS:
            return decode_image(memoryview(data), table, rows, (in_image, cols_in_image))
        part = wanted or Window(row=0, col=0, height=rows, width=table.tile_width)
        return decode_samples(data, table, rows, in_image, part, stop_early), None
    except CorruptTiffError:
        raise
    except Exception as error:  # every imagecodecs codec has an error class of its own
        name = IMAGE_CODECS[code][0] if code in IMAGE_CODECS else "the tile"
        raise CorruptTiffError(
            f"{name} of {len(data)} bytes cannot be decoded to {rows} x {table.tile_width} x {table.samples_per_tile} "
            f"{table.dtype}: {type(error).__name__}: {error}"
        ) from error
