"""Compressed tile to pixels in native byte order: checks what is supported, then calls the codec.

Memory and time are bounded by the tile size in the TIFF header, whatever a stream declares. Pixels are those of libtiff
and GDAL; the only colour conversion is YCbCr to RGB (CMYK stays CMYK, as in tifffile).

Why not tifffile's decoder: it ignores the validity mask of LERC tiles (21 % of the pixels of a test file became 0) and
cannot decode only the rows that a chip needs.
"""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.byte_codecs import BYTE_CODECS
from rasteret_ml.cog.codecs.image_codecs import IMAGE_CODECS, decode_image
from rasteret_ml.cog.codecs.unpack import applied_predictor, chroma_subsampling, decode_samples
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError
from rasteret_ml.geo.grid import Window

#: Largest decoded tile or strip that is read; a larger one is refused with its size.
MAX_TILE_BYTES = 128 * 1024 * 1024

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
_ANY_WIDTH = {"JPEG", "JPEG 2000"}  # Codecs that unpack samples of any width themselves (such as 12-bit JPEG).
# Bytes per sample in the working memory of a decoder, if more than the sample's own.
_WORKING_BYTES = {33005: 4, 34712: 4, 50002: 4, 52546: 4}
_UNSUPPORTED = {
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
    """Raise UnsupportedTiffError for a codec, predictor, photometric interpretation, sample type or size of tiles.

    An image without stored tiles may have tiles of any size.
    """
    _check_codec_and_size(table)
    code = table.compression
    if table.photometric in _COLOUR_SPACES:
        raise UnsupportedTiffError(f"{_COLOUR_SPACES[table.photometric]} pixels are not supported")
    if table.photometric == _YCBCR:
        _check_ycbcr(table)
    if code in IMAGE_CODECS:
        _check_image(table, IMAGE_CODECS[code][0])
    else:
        _check_samples(table)


def _check_codec_and_size(table: TileTable) -> None:
    code = table.compression
    item = max(table.dtype.itemsize, _WORKING_BYTES.get(code, 1))
    size = table.tile_height * table.tile_width * table.samples_per_tile * item
    if size > MAX_TILE_BYTES and (table.tile_byte_counts > 0).any():
        kind = "strip" if table.striped else "tile"
        raise UnsupportedTiffError(
            f"one {kind} of {table.tile_width} x {table.tile_height} pixels decodes to {size / 2**20:.0f} MiB "
            f"(limit {MAX_TILE_BYTES // 2**20}); rewrite the file as a COG: gdal_translate -of COG in.tif out.tif"
        )
    if code != _NONE and code not in BYTE_CODECS and code not in IMAGE_CODECS:
        raise UnsupportedTiffError(f"compression {code} ({_UNSUPPORTED.get(code, 'unknown')}) is not supported")


def _check_ycbcr(table: TileTable) -> None:
    if table.compression == _JPEG:
        if table.planar_configuration == 1 and table.samples_per_pixel != 3:
            raise UnsupportedTiffError(f"YCbCr pixels of {table.samples_per_pixel} samples are not supported")
        return
    if table.compression in IMAGE_CODECS:
        raise UnsupportedTiffError(f"YCbCr pixels in {IMAGE_CODECS[table.compression][0]} are not supported")
    if table.planar_configuration != 1:
        raise UnsupportedTiffError("YCbCr pixels in separate planes are not supported")
    if table.samples_per_pixel != 3 or table.dtype != np.uint8 or table.bits != 8:
        raise UnsupportedTiffError(
            f"YCbCr pixels of {table.samples_per_pixel} samples of {table.bits} bits are not supported"
        )
    subsampling = chroma_subsampling(table)
    if subsampling not in _SUBSAMPLINGS:
        raise UnsupportedTiffError(f"YCbCr pixels subsampled by {subsampling[0]} x {subsampling[1]} are not supported")
    if subsampling != (1, 1) and applied_predictor(table) != 1:
        raise UnsupportedTiffError("a predictor on subsampled YCbCr pixels is not supported")


def _check_image(table: TileTable, name: str) -> None:
    packed = table.bits_per_sample and name not in _ANY_WIDTH
    if packed or table.dtype not in [np.dtype(t) for t in _IMAGE_TYPES[name]]:
        raise UnsupportedTiffError(f"{table.bits}-bit {table.dtype} samples in {name} are not supported")
    if name != "LERC" and table.big_endian and table.dtype.itemsize > 1:  # libtiff and tifffile disagree on them
        raise UnsupportedTiffError(f"big-endian {table.bits}-bit samples in {name} are not supported")
    if name == "WebP" and table.samples_per_tile not in (3, 4):
        raise UnsupportedTiffError(f"{table.samples_per_tile} samples per pixel in WebP are not supported")
    if table.fill_order == 2 and name.startswith(("JPEG XL", "JPEG 2000")):
        raise UnsupportedTiffError(f"{name} with reversed bits is not supported")


def _check_samples(table: TileTable) -> None:
    predictor, kind, bits = applied_predictor(table), table.dtype.kind, table.bits
    packed = bool(table.bits_per_sample) and kind not in "c"
    if kind == "f" and packed and bits != 24:
        raise UnsupportedTiffError(f"{bits}-bit floats are not supported")
    if kind == "u" and bits == 24 and table.big_endian:  # GDAL and tifffile disagree on them
        raise UnsupportedTiffError("big-endian 24-bit samples are not supported")
    if predictor not in (1, 2, 3):
        raise UnsupportedTiffError(f"predictor {predictor} is not supported")
    if predictor == 3 and kind != "f":
        raise UnsupportedTiffError(f"the floating point predictor on {table.dtype} is not supported")
    if predictor == 2 and (packed or bits > 64):
        raise UnsupportedTiffError(f"predictor 2 on {bits}-bit samples is not supported")


def decode_tile(
    data: bytes | memoryview,
    table: TileTable,
    stored_rows: int,
    image_rows: int | None = None,
    image_cols: int | None = None,
    window: Window | None = None,
    stop_early: bool = False,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Decode one tile to `[stored_rows, tile_width, samples]`, and the codec's own validity mask (LERC) or None.

    The mask has the same shape, True = valid. Both may be in this thread's scratch memory or a read-only view of
    `data`: copy what you need before the next call. `image_rows` and `image_cols` of the tile lie in the image, all by
    default: some writers store only these, and pixels missing outside them are zero. Pixels outside `window` are
    undefined. `stop_early` ends a deflate stream after the window's last row; damage after it, and a wrong checksum,
    then go unnoticed.

    Raise CorruptTiffError if the bytes cannot be decoded, hold less than the part in the image, or (if compressed) more
    than a full tile; UnsupportedTiffError for a codec or a size that `check_supported` refuses.
    """
    code = table.compression
    image_rows = stored_rows if image_rows is None else min(image_rows, stored_rows)
    image_cols = table.tile_width if image_cols is None else min(image_cols, table.tile_width)
    _check_codec_and_size(table)
    try:
        if table.fill_order == 2 and code != _JPEG:  # libtiff reverses the bits of all streams but JPEG
            data = imagecodecs.bitorder_decode(bytes(data))
        if code in IMAGE_CODECS:
            return decode_image(memoryview(data), table, stored_rows, (image_rows, image_cols))
        window = window or Window(row=0, col=0, height=stored_rows, width=table.tile_width)
        pixels = decode_samples(
            data, table, rows=stored_rows, image_rows=image_rows, window=window, stop_early=stop_early
        )
        return pixels, None
    except CorruptTiffError:
        raise
    except Exception as error:  # each imagecodecs codec has its own error class
        name = IMAGE_CODECS[code][0] if code in IMAGE_CODECS else "the tile"
        shape = f"{stored_rows} x {table.tile_width} x {table.samples_per_tile} {table.dtype}"
        raise CorruptTiffError(
            f"{name} of {len(data)} bytes cannot be decoded to {shape}: {type(error).__name__}: {error}"
        ) from error
