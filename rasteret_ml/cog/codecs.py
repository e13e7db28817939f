"""Compressed tile to pixels (imagecodecs), in native byte order.

Decoders are given scratch of the exact decoded size, one a thread: pages that are touched already make two
threads scale 1.87-fold instead of 1.47-fold. A size that is not the expected one is an error, because LZW and
PackBits come short without a word.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.metadata import TileTable
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError

__all__ = ["MAX_TILE_BYTES", "check_supported", "decode_tile"]

MAX_TILE_BYTES = 128 * 1024 * 1024
"""Largest decoded tile or strip that is read; anything above is refused with its size."""

_JPEG, _LERC, _WEBP = 7, 34887, 50001
_YCBCR = 6
_COLOUR_SPACES = {5: "CMYK", 8: "CIELab", 9: "ICCLab", 10: "ITULab"}
_DEFLATE = (8, 32946)
_BYTE_CODECS: dict[int, tuple[str, Callable[..., Any]]] = {
    8: ("deflate", imagecodecs.deflate_decode),
    32946: ("deflate", imagecodecs.deflate_decode),
    5: ("LZW", imagecodecs.lzw_decode),
    32773: ("PackBits", imagecodecs.packbits_decode),
    34925: ("LZMA", imagecodecs.lzma_decode),
    50000: ("ZSTD", imagecodecs.zstd_decode),
}
_REFUSED = {
    2: "CCITT RLE", 3: "CCITT Group 3", 4: "CCITT Group 4", 6: "old-style JPEG", 34712: "JPEG 2000",
    33003: "JPEG 2000 (Aperio)", 33005: "JPEG 2000 (Aperio)", 34661: "JBIG", 32771: "uncompressed, word-aligned",
    32809: "ThunderScan", 34676: "SGI log", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
_scratch = threading.local()


def check_supported(table: TileTable) -> None:
    """Refuse, by name, an image whose tiles cannot be decoded here.

    Raises:
        UnsupportedTiffError: codec, predictor, photometric interpretation or tile size.
    """
    size = table.tile_height * table.tile_width * table.samples_per_tile * table.dtype.itemsize
    if size > MAX_TILE_BYTES:
        kind = "strip" if table.striped else "tile"
        raise UnsupportedTiffError(
            f"one {kind} of {table.tile_width} x {table.tile_height} pixels decodes to {size / 2**20:.0f} MiB "
            f"(limit {MAX_TILE_BYTES // 2**20}); rewrite the file as a COG: gdal_translate -of COG in.tif out.tif"
        )
    code = table.compression
    if code not in (1, _JPEG, _LERC, _WEBP) and code not in _BYTE_CODECS:
        raise UnsupportedTiffError(f"compression {code} ({_REFUSED.get(code, 'unknown')})")
    if table.photometric in _COLOUR_SPACES:
        raise UnsupportedTiffError(f"{_COLOUR_SPACES[table.photometric]} pixels")
    if table.photometric == _YCBCR and code not in (_JPEG, _WEBP):
        raise UnsupportedTiffError("YCbCr pixels outside JPEG")
    if code in (_JPEG, _WEBP) and table.dtype != np.uint8:
        raise UnsupportedTiffError(f"{table.bits}-bit samples in JPEG or WebP")
    if code in (1, *_BYTE_CODECS):
        if table.predictor not in (1, 2, 3):
            raise UnsupportedTiffError(f"predictor {table.predictor}")
        if table.predictor != 1 and table.bits_per_sample:
            raise UnsupportedTiffError(f"predictor {table.predictor} on {table.bits}-bit samples")
        if table.predictor == 3 and table.dtype.kind != "f":
            raise UnsupportedTiffError(f"the floating point predictor on {table.dtype}")
        if table.predictor == 2 and table.dtype.kind == "c":
            raise UnsupportedTiffError("a predictor on complex samples")
    if table.bits_per_sample and table.big_endian and table.bits > 8 and table.bits not in (16, 32):
        raise UnsupportedTiffError(f"big-endian {table.bits}-bit samples")


def decode_tile(
    data: bytes | memoryview, table: TileTable, rows: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    """Decode one tile.

    Args:
        data: Its compressed bytes.
        table: The image it belongs to.
        rows: Rows that it stores (`TileTable.stored_rows`).

    Returns:
        Pixels `[rows, tile_width, samples]` in `table.dtype`, and the codec's own validity of the same shape
        where it has one (LERC). The pixels live in this thread's scratch: copy what
        is wanted before the next call.

    Raises:
        CorruptTiffError: the bytes cannot be decoded, or not to the expected size.
    """
    try:
        if table.fill_order == 2 and table.compression not in (_JPEG, _LERC, _WEBP):
            data = imagecodecs.bitorder_decode(bytes(data))
        if table.compression == _JPEG:
            return _decode_jpeg(data, table, rows), None
        if table.compression == _WEBP:
            return _decode_webp(data, table, rows), None
        if table.compression == _LERC:
            return _decode_lerc(data, table, rows)
        return _decode_samples(data, table, rows), None
    except CorruptTiffError:
        raise
    except Exception as error:  # every imagecodecs codec has an error class of its own
        raise CorruptTiffError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _scratch_bytes(size: int, slot: str) -> npt.NDArray[np.uint8]:
    held: npt.NDArray[np.uint8] | None = getattr(_scratch, slot, None)
    if held is None or held.size < size:
        held = np.empty(size, np.uint8)
        setattr(_scratch, slot, held)
    return held[:size]


def _decode_samples(data: bytes | memoryview, table: TileTable, rows: int) -> npt.NDArray[Any]:
    samples, width = table.samples_per_tile, table.tile_width
    row_bytes = -(-width * samples * table.bits // 8)
    raw = _decompress(data, table, rows * row_bytes)
    if table.bits_per_sample:
        return _unpack_bits(raw, table, rows)
    pixels = raw.view(table.dtype).reshape(rows, width, samples)
    if table.predictor == 3:
        return _undo_float_predictor(raw, table, rows)
    if table.big_endian != (sys.byteorder == "big") and table.dtype.itemsize > 1:
        pixels = pixels.byteswap(inplace=True)
    if table.predictor == 2:
        deltas = pixels.view(f"u{table.dtype.itemsize}")
        imagecodecs.delta_decode(deltas, axis=-2, out=deltas)
    return pixels


def _decompress(data: bytes | memoryview, table: TileTable, size: int) -> npt.NDArray[np.uint8]:
    """Exactly `size` decoded bytes, in scratch."""
    if table.compression == 1:
        if len(data) < size:
            raise CorruptTiffError(f"holds {len(data)} bytes, {size} expected")
        out = _scratch_bytes(size, "raw")
        out[:] = np.frombuffer(data, np.uint8, count=size)
        return out
    name, decode = _BYTE_CODECS[table.compression]
    out = _scratch_bytes(size, "raw")
    try:
        got = decode(data, out=out)
    except (imagecodecs.DeflateError, imagecodecs.ZstdError, imagecodecs.PackbitsError) as error:
        return _decompress_slack(data, table, size, error)
    if len(got) != size:
        raise CorruptTiffError(f"{name} gave {len(got)} bytes, {size} expected")
    return out


def _decompress_slack(data: bytes | memoryview, table: TileTable, size: int, error: Exception) -> npt.NDArray[np.uint8]:
    # Some writers pad the last strip to full height: accept up to a whole one.
    name, decode = _BYTE_CODECS[table.compression]
    full = -(-table.tile_width * table.samples_per_tile * table.bits // 8) * table.tile_height
    out = _scratch_bytes(max(full, size), "slack")
    try:
        got = decode(data, out=out) if full > size else b""
    except Exception:
        got = b""
    if len(got) < size:
        raise CorruptTiffError(f"{name} cannot be decoded to {size} bytes: {error}") from error
    return out[:size]


def _undo_float_predictor(raw: npt.NDArray[np.uint8], table: TileTable, rows: int) -> npt.NDArray[Any]:
    """TIFF Technical Note 3: byte planes, most significant first in any byte order, then differences.

    Differences are undone on bytes (`delta_decode`, 2.7 GB/s) and planes put back by strided copies: four times
    `imagecodecs.floatpred_decode`, bit for bit the same.
    """
    samples, width, item = table.samples_per_tile, table.tile_width, table.dtype.itemsize
    differences = raw.reshape(rows, item * width, samples)
    imagecodecs.delta_decode(differences, axis=-2, out=differences)
    planes = raw.reshape(rows, item, width * samples)
    out = _scratch_bytes(raw.size, "float").view(table.dtype)
    by_byte = out.view(np.uint8).reshape(rows, width * samples, item)
    for k in range(item):
        by_byte[:, :, k] = planes[:, item - 1 - k if sys.byteorder == "little" else k, :]
    return out.reshape(rows, width, samples)


def _unpack_bits(raw: npt.NDArray[np.uint8], table: TileTable, rows: int) -> npt.NDArray[Any]:
    """Samples of 1 to 31 bits, most significant bit first, each row padded to a byte."""
    run = table.tile_width * table.samples_per_tile
    if table.bits == 1:
        values = np.unpackbits(raw.reshape(rows, -1), axis=1)[:, :run]
    else:
        values = imagecodecs.packints_decode(raw.tobytes(), table.dtype, table.bits, runlen=run)
        if values.size < rows * run:
            raise CorruptTiffError(f"unpacks to {values.size} samples, {rows * run} expected")
        values = values[: rows * run]
    return values.astype(table.dtype, copy=False).reshape(rows, table.tile_width, table.samples_per_tile)


def _decode_jpeg(data: bytes | memoryview, table: TileTable, rows: int) -> npt.NDArray[Any]:
    # Three samples that are not YCbCr are stored as they are; libjpeg would take them for YCbCr unless told.
    colour = ("YCBCR" if table.photometric == _YCBCR else "RGB") if table.samples_per_tile == 3 else None
    pixels = imagecodecs.jpeg8_decode(
        data, tables=table.jpeg_tables, colorspace=colour, outcolorspace="RGB" if colour else None
    )
    return _checked(pixels, table, rows, "JPEG")


def _decode_webp(data: bytes | memoryview, table: TileTable, rows: int) -> npt.NDArray[Any]:
    # An opaque alpha band is dropped by the encoder; asking for it brings it back.
    pixels = imagecodecs.webp_decode(data, hasalpha=table.samples_per_tile == 4)
    return _checked(pixels, table, rows, "WebP")


def _decode_lerc(
    data: bytes | memoryview, table: TileTable, rows: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]:
    if bytes(data[:2]) == b"\x78\x9c" or bytes(data[:1]) == b"\x78":  # LERC inside deflate
        data = imagecodecs.zlib_decode(data)
    elif bytes(data[:4]) == b"\x28\xb5\x2f\xfd":  # LERC inside ZSTD
        data = imagecodecs.zstd_decode(data)
    pixels, mask = imagecodecs.lerc_decode(data, masks=True)
    pixels = _checked(pixels, table, rows, "LERC")
    valid = None
    if mask is not None:
        per_sample = np.asarray(mask, dtype=bool)
        per_sample = np.moveaxis(per_sample, 0, -1) if per_sample.ndim == 3 else per_sample[:, :, None]
        valid = np.broadcast_to(per_sample[:rows, : table.tile_width], pixels.shape)
    return pixels, valid


def _checked(pixels: npt.NDArray[Any], table: TileTable, rows: int, name: str) -> npt.NDArray[Any]:
    samples, width = table.samples_per_tile, table.tile_width
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    elif pixels.ndim == 3 and pixels.shape[-1] != samples and pixels.shape[0] == samples:
        pixels = np.moveaxis(pixels, 0, -1)
    high, wide, deep = pixels.shape
    if deep != samples or wide < width or high < rows or pixels.dtype != table.dtype:
        raise CorruptTiffError(
            f"{name} gave {high} x {wide} x {deep} {pixels.dtype}, {rows} x {width} x {samples} {table.dtype} expected"
        )
    return pixels[:rows, :width]
