"""Byte codecs, predictors and the packing of samples: streams that do not know their own size.

Decoders are given scratch of the decoded size, one a thread: pages that are touched already make two
threads scale 1.87-fold instead of 1.47-fold.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.deflate import inflate_front
from rasteret_ml.cog.codecs.lzw import decode_lzw
from rasteret_ml.cog.codecs.ycbcr import chroma_subsampling, to_rgb, unpack_units
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError
from rasteret_ml.geo.window import Window

__all__ = ["BYTE_CODECS", "applied_predictor", "decode_samples", "scratch"]

BYTE_CODECS: dict[int, tuple[str, Callable[..., Any]]] = {
    8: ("deflate", imagecodecs.deflate_decode),
    32946: ("deflate", imagecodecs.deflate_decode),
    5: ("LZW", decode_lzw),
    32773: ("PackBits", imagecodecs.packbits_decode),
    34925: ("LZMA", imagecodecs.lzma_decode),
    50000: ("ZSTD", imagecodecs.zstd_decode),
}
_DEFLATE = (8, 32946)
_PREDICTED = {5, 8, 32946, 34925, 50000}
_YCBCR = 6
_KEPT = 32 * 1024 * 1024
_held = threading.local()


def scratch(size: int, slot: str) -> npt.NDArray[np.uint8]:
    """`size` bytes of this thread's memory of that name, overwritten by the next call; big ones are not kept."""
    held: npt.NDArray[np.uint8] | None = getattr(_held, slot, None)
    if held is None or held.size < size:
        held = np.empty(size, np.uint8)
        if size <= _KEPT:
            setattr(_held, slot, held)
    return held[:size]


def applied_predictor(table: TileTable) -> int:
    """The predictor as libtiff applies it: the tag belongs to LZW, deflate, LZMA and ZSTD, others ignore it."""
    return table.predictor if table.compression in _PREDICTED else 1


def decode_samples(
    data: bytes | memoryview,
    table: TileTable,
    rows: int,
    needed_rows: int,
    wanted: Window,
    stop_early: bool,
) -> npt.NDArray[Any]:
    """Pixels `[rows, tile_width, samples]`; rows past `needed_rows` that the stream lacks are zero.

    Only the part `wanted` is sure to hold pixels: predictors are undone no further than that, and with `stop_early` a
    deflate stream is read no further than its last row.

    Raises:
        CorruptTiffError: less than `needed_rows`, or more than a full tile.
    """
    across, down = chroma_subsampling(table)
    samples, width = table.samples_per_tile, table.tile_width
    if (across, down) != (1, 1):
        unit_row = -(-width // across) * (across * down + 2)
        raw = _decompress(data, table, unit_row, *(-(-n // down) for n in (rows, needed_rows, table.tile_height)))
        pixels: npt.NDArray[Any] = unpack_units(raw, rows, width, across, down)
    else:
        raw = None
        if stop_early and table.compression in _DEFLATE:
            out = scratch(rows * table.row_bytes, "raw")
            raw = out if inflate_front(data, wanted.row_stop * table.row_bytes, out) else None
        if raw is None:
            raw = _decompress(data, table, table.row_bytes, rows, needed_rows, table.tile_height)
        pixels = _typed(raw, table, rows, wanted).reshape(rows, width, samples)
    if table.photometric == _YCBCR and samples == 3:
        return to_rgb(pixels, table.ycbcr_coefficients)
    return pixels


def _decompress(
    data: bytes | memoryview, table: TileTable, row_bytes: int, rows: int, needed: int, full: int
) -> npt.NDArray[np.uint8]:
    """Exactly `rows` of `row_bytes`; read-only where nothing was compressed."""
    size, most = rows * row_bytes, max(rows, full) * row_bytes
    if table.compression == 1:
        name, whole = "the tile", np.frombuffer(data, np.uint8)
        whole.flags.writeable = False  # the bytes belong to whoever fetched them
        if whole.size >= size:
            return whole[:size]
        got, out = whole.size, scratch(size, "raw")
        out[:got] = whole
    else:
        name, decode = BYTE_CODECS[table.compression]
        out = scratch(most + 1, "raw")  # one byte more, or a stream that is too long would not show
        try:
            got = len(decode(data, out=out))
        except CorruptTiffError:
            raise
        except Exception as error:  # every imagecodecs codec has an error class of its own
            raise CorruptTiffError(
                f"{name} of {len(data)} bytes cannot be decoded to {size} bytes: {type(error).__name__}: {error}"
            ) from error
    if got > most:
        raise CorruptTiffError(f"{name} gave more than the {most} bytes of a full tile, {size} expected")
    if got < needed * row_bytes:
        raise CorruptTiffError(f"{name} gave {got} bytes, {size} expected, {needed * row_bytes} at least")
    if got < size:
        out[got - got % row_bytes : size] = 0
    return out[:size]


def _typed(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, wanted: Window) -> npt.NDArray[Any]:
    """All samples in `table.dtype`, in one dimension or more; right in the part `wanted`."""
    kind, predictor = table.dtype.kind, applied_predictor(table)
    if table.bits_per_sample and kind == "f":
        return _unpack_float24(raw, table, rows, predictor)
    if table.bits_per_sample and kind != "c":
        return _unpack_bits(raw, table, rows)
    if predictor == 3:
        return _undo_float_predictor(raw, table, rows, wanted.slices[0])
    stored = _native_words(raw, table, rows, predictor, wanted)
    if table.bits_per_sample:  # complex integers: numpy has no such type
        return stored.view(f"i{table.bits // 16}").astype(f"f{table.dtype.itemsize // 2}").view(table.dtype)
    return stored.view(table.dtype)


def _native_words(
    raw: npt.NDArray[np.uint8], table: TileTable, rows: int, predictor: int, wanted: Window
) -> npt.NDArray[Any]:
    """Native byte order, and differences undone (TIFF 6.0, section 14), on whole samples.

    A complex sample is two words, but one (swapped and summed as such) where libtiff takes differences of it.
    """
    parts = 2 if table.dtype.kind == "c" and predictor == 1 else 1
    words: npt.NDArray[Any] = raw.view(f"u{table.bits // 8 // parts}")
    if table.big_endian != (sys.byteorder == "big") and words.itemsize > 1:
        words = words.byteswap(inplace=raw.flags.writeable)
    if predictor == 2:
        deltas = words.reshape(rows, table.tile_width, table.samples_per_tile)[wanted.slices[0], : wanted.col_stop]
        imagecodecs.delta_decode(deltas, axis=-2, out=deltas)
    return words


def _undo_byte_differences(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, item: int) -> npt.NDArray[np.uint8]:
    """Byte planes `[rows, item, width * samples]` of TIFF Technical Note 3, the most significant first."""
    samples, width = table.samples_per_tile, table.tile_width
    differences = raw.reshape(rows, item * width, samples)
    imagecodecs.delta_decode(differences, axis=-2, out=differences)
    return raw.reshape(rows, item, width * samples)


def _undo_float_predictor(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, wanted: slice) -> npt.NDArray[Any]:
    """TIFF Technical Note 3: byte planes, most significant first in any byte order, then differences.

    Differences are undone on bytes (`delta_decode`, 2.7 GB/s) and planes put back by strided copies: four times
    `imagecodecs.floatpred_decode`, bit for bit the same.
    """
    item = table.dtype.itemsize
    part = raw.reshape(rows, -1)[wanted]
    planes = _undo_byte_differences(part.reshape(-1), table, len(part), item)
    out = scratch(raw.size, "wide").view(table.dtype)
    by_byte = out.view(np.uint8).reshape(rows, -1, item)[wanted]
    for k in range(item):
        by_byte[:, :, k] = planes[:, item - 1 - k if sys.byteorder == "little" else k, :]
    return out


def _unpack_float24(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, predictor: int) -> npt.NDArray[np.float32]:
    """Sign, 7 bits of exponent (bias 63), 16 of mantissa (TIFF Technical Note 3), widened without loss.

    By hand and not by `float24_decode`, which loses the payload of NaN that GDAL keeps.
    """
    if predictor == 3:
        high, middle, low = np.moveaxis(_undo_byte_differences(raw, table, rows, 3), 1, 0).astype(np.uint32)
    else:
        high, middle, low = raw.reshape(-1, 3).T[:: 1 if table.big_endian else -1].astype(np.uint32)
    exponent, mantissa = high & 127, middle << 8 | low
    bits = exponent + 64 << 23 | mantissa << 7
    endless = exponent == 127
    bits[endless] = 255 << 23 | mantissa[endless] << 7
    values: npt.NDArray[np.float32] = bits.view(np.float32)
    small = exponent == 0
    values[small] = mantissa[small] * np.float32(2.0**-78)
    bits |= high >> 7 << 31
    return values


def _unpack_bits(raw: npt.NDArray[np.uint8], table: TileTable, rows: int) -> npt.NDArray[Any]:
    """Samples of 1 to 31 bits, the most significant first in either byte order, each row padded to a byte."""
    run, bits = table.tile_width * table.samples_per_tile, table.bits
    if bits == 1:
        values = np.unpackbits(raw.reshape(rows, -1), axis=1)[:, :run]
    else:
        values = imagecodecs.packints_decode(raw.tobytes(), table.dtype, bits, runlen=run)[: rows * run]
        if values.size < rows * run:
            raise CorruptTiffError(f"unpacks to {values.size} samples, {rows * run} expected")
    return np.ascontiguousarray(values, table.dtype)
