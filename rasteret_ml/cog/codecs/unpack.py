"""Samples from byte streams: byte order, predictors, packed bits, subsampled YCbCr (TIFF 6.0, sections 14 and 21)."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.byte_codecs import decode_bytes, inflate_start, scratch
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError
from rasteret_ml.geo.grid import Window

_DEFLATE = (8, 32946)
_WITH_PREDICTOR = {5, 8, 32946, 34925, 50000}
_YCBCR = 6


def applied_predictor(table: TileTable) -> int:
    """Return the predictor that libtiff applies: only LZW, deflate, LZMA and ZSTD regard the tag."""
    return table.predictor if table.compression in _WITH_PREDICTOR else 1


def chroma_subsampling(table: TileTable) -> tuple[int, int]:
    """Return the columns and rows of luma per chroma sample: (1, 1) unless the image is YCbCr."""
    return table.ycbcr_subsampling if table.photometric == _YCBCR else (1, 1)


def decode_samples(
    data: bytes | memoryview, table: TileTable, *, rows: int, image_rows: int, window: Window, stop_early: bool
) -> npt.NDArray[Any]:
    """Return pixels `[rows, tile_width, samples]`; rows from `image_rows` on that the stream lacks are zero.

    Only `window` is sure to hold pixels: predictors are undone no further, and with `stop_early` a deflate stream is
    decoded no further than its last row. Raise CorruptTiffError as `decode_bytes` does.
    """
    across, down = chroma_subsampling(table)
    samples, width = table.samples_per_tile, table.tile_width
    if (across, down) != (1, 1):
        raw = decode_bytes(
            data,
            table,
            row_bytes=-(-width // across) * (across * down + 2),
            rows=-(-rows // down),
            image_rows=-(-image_rows // down),
            tile_rows=-(-table.tile_height // down),
        )
        pixels: npt.NDArray[Any] = unpack_units(raw, rows, width, across, down)
    else:
        start = scratch(rows * table.row_bytes, "raw") if stop_early and table.compression in _DEFLATE else None
        if start is not None and inflate_start(data, window.row_stop * table.row_bytes, start):
            raw = start
        else:
            raw = decode_bytes(
                data, table, row_bytes=table.row_bytes, rows=rows, image_rows=image_rows, tile_rows=table.tile_height
            )
        pixels = _typed_samples(raw, table, rows, window).reshape(rows, width, samples)
    if table.photometric == _YCBCR and samples == 3:
        return ycbcr_to_rgb(pixels, table.ycbcr_coefficients)
    return pixels


def _typed_samples(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, window: Window) -> npt.NDArray[Any]:
    """All samples in `table.dtype`, of any shape; correct inside `window`."""
    kind, predictor = table.dtype.kind, applied_predictor(table)
    if table.bits_per_sample and kind == "f":
        return _unpack_float24(raw, table, rows, predictor)
    if table.bits_per_sample and kind != "c":
        return _unpack_bits(raw, table, rows)
    if predictor == 3:
        return _undo_float_predictor(raw, table, rows, window.slices[0])
    # libtiff swaps and sums a complex sample as one word where it has a predictor, elsewhere as two.
    words_per_sample = 2 if kind == "c" and predictor == 1 else 1
    words: npt.NDArray[Any] = raw.view(f"u{table.bits // 8 // words_per_sample}")
    if table.big_endian != (sys.byteorder == "big") and words.itemsize > 1:
        words = words.byteswap(inplace=raw.flags.writeable)
    if predictor == 2:
        deltas = words.reshape(rows, table.tile_width, table.samples_per_tile)[window.slices[0], : window.col_stop]
        imagecodecs.delta_decode(deltas, axis=-2, out=deltas)
    if table.bits_per_sample:  # complex integers, which numpy lacks
        return words.view(f"i{table.bits // 16}").astype(f"f{table.dtype.itemsize // 2}").view(table.dtype)
    return words.view(table.dtype)


def _undo_byte_differences(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, item: int) -> npt.NDArray[np.uint8]:
    """Byte planes `[rows, item, width * samples]` of TIFF Technical Note 3, the most significant first."""
    differences = raw.reshape(rows, item * table.tile_width, table.samples_per_tile)
    imagecodecs.delta_decode(differences, axis=-2, out=differences)
    return raw.reshape(rows, item, table.tile_width * table.samples_per_tile)


def _undo_float_predictor(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, wanted: slice) -> npt.NDArray[Any]:
    """Undo the floating point predictor (TIFF Technical Note 3) in the rows `wanted`.

    Not by `imagecodecs.floatpred_decode`, which takes four times as long for the same result: here differences are
    undone on bytes (`delta_decode`, 2.7 GB/s) and byte planes are interleaved by strided copies.
    """
    item = table.dtype.itemsize
    stored = raw.reshape(rows, -1)[wanted]
    planes = _undo_byte_differences(stored.reshape(-1), table, len(stored), item)
    out = scratch(raw.size, "wide").view(table.dtype)
    by_byte = out.view(np.uint8).reshape(rows, -1, item)[wanted]
    for k in range(item):
        by_byte[:, :, k] = planes[:, item - 1 - k if sys.byteorder == "little" else k, :]
    return out


def _unpack_float24(raw: npt.NDArray[np.uint8], table: TileTable, rows: int, predictor: int) -> npt.NDArray[np.float32]:
    """Sign, 7 bits of exponent (bias 63), 16 of mantissa (TIFF Technical Note 3), widened without loss.

    Not by `imagecodecs.float24_decode`, which loses the payload of NaN that GDAL keeps.
    """
    if predictor == 3:
        high, middle, low = np.moveaxis(_undo_byte_differences(raw, table, rows, 3), 1, 0).astype(np.uint32)
    else:
        high, middle, low = raw.reshape(-1, 3).T[:: 1 if table.big_endian else -1].astype(np.uint32)
    exponent, mantissa = high & 127, middle << 8 | low
    bits = exponent + 64 << 23 | mantissa << 7
    not_finite = exponent == 127
    bits[not_finite] = 255 << 23 | mantissa[not_finite] << 7
    values: npt.NDArray[np.float32] = bits.view(np.float32)
    subnormal = exponent == 0
    values[subnormal] = mantissa[subnormal] * np.float32(2.0**-78)
    bits |= high >> 7 << 31
    return values


def _unpack_bits(raw: npt.NDArray[np.uint8], table: TileTable, rows: int) -> npt.NDArray[Any]:
    """Samples of 1 to 31 bits, most significant bit first in either byte order, each row padded to a byte."""
    row_samples, bits = table.tile_width * table.samples_per_tile, table.bits
    if bits == 1:
        values = np.unpackbits(raw.reshape(rows, -1), axis=1)[:, :row_samples]
    else:
        values = imagecodecs.packints_decode(raw.tobytes(), table.dtype, bits, runlen=row_samples)[: rows * row_samples]
        if values.size < rows * row_samples:
            raise CorruptTiffError(f"the tile unpacks to {values.size} samples, {rows * row_samples} expected")
    return np.ascontiguousarray(values, table.dtype)


def unpack_units(raw: npt.NDArray[np.uint8], rows: int, width: int, across: int, down: int) -> npt.NDArray[np.uint8]:
    """Return pixels `[rows, width, 3]` from data units of subsampled YCbCr (TIFF 6.0, section 21).

    A unit is `down` x `across` samples of Y, row by row, then one of Cb and one of Cr that apply to all of them
    (repeated, not interpolated, as in GDAL).
    """
    units_across, units_down = -(-width // across), -(-rows // down)
    units = raw.reshape(units_down, units_across, across * down + 2)
    luma = units[..., :-2].reshape(units_down, units_across, down, across).swapaxes(1, 2)
    out = np.empty((rows, width, 3), np.uint8)
    out[..., 0] = luma.reshape(units_down * down, units_across * across)[:rows, :width]
    out[..., 1:] = units[..., -2:].repeat(down, axis=0)[:rows].repeat(across, axis=1)[:, :width]
    return out


def ycbcr_to_rgb(pixels: npt.NDArray[np.uint8], coefficients: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    """Convert `[h, w, 3]` of full-range Y, Cb, Cr to red, green, blue, bit for bit as libtiff and GDAL do.

    Y, Cb and Cr have the reference black and white (0, 255, 128, 255, 128, 255) of 8-bit files; `coefficients` are
    those of TIFF tag 529.
    """
    cr_to_red, cr_to_green, cb_to_blue, cb_to_green = _ycbcr_tables(coefficients)
    luma, cb, cr = pixels[..., 0].astype(np.int32), pixels[..., 1], pixels[..., 2]
    out = np.empty(pixels.shape, np.uint8)
    for band, shift in enumerate((cr_to_red[cr], (cb_to_green[cb] + cr_to_green[cr]) >> 16, cb_to_blue[cb])):
        out[..., band] = (luma + shift).clip(0, 255)
    return out


@lru_cache(maxsize=8)
def _ycbcr_tables(coefficients: tuple[float, float, float]) -> tuple[npt.NDArray[np.int32], ...]:
    """The fixed-point tables of libtiff's `TIFFYCbCrToRGBInit`."""
    red, green, blue = (np.float32(v) for v in coefficients)
    two, half = np.float32(2), 1 << 15

    def fixed(value: np.float32) -> int:
        return int(float(min(max(value, np.float32(0)), two)) * 65536 + 0.5)

    of_red, of_blue = two - two * red, two - two * blue
    code = np.arange(-128, 128, dtype=np.int64)
    return (
        ((fixed(of_red) * code + half) >> 16).astype(np.int32),
        (-fixed(red * of_red / green) * code).astype(np.int32),
        ((fixed(of_blue) * code + half) >> 16).astype(np.int32),
        (-fixed(blue * of_blue / green) * code + half).astype(np.int32),
    )
