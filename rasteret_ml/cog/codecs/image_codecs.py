"""Codecs that know their own size: JPEG, WebP, JPEG XL, JPEG 2000, LERC.

The rule for all of them: the size in the stream is read first, must hold the part of the tile that lies in the
image, and may not pass the tile's own size rounded up to 16 (a JPEG block; writers pad strips so). Only then does
the decoder run, into an array of exactly that size, which imagecodecs checks once more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.byte_codecs import scratch
from rasteret_ml.cog.codecs.image_headers import (
    ImageHeader,
    jpeg2000_frame,
    jpeg_frame,
    jpegxl_frame,
    lerc_frame,
    refuse_frames_in_tables,
    webp_frame,
)
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError

__all__ = ["IMAGE_CODECS", "decode_image"]

_Needed = tuple[int, int]
_Decoded = tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]
_YCBCR = 6
_BLOCK = 16


def decode_image(data: memoryview, table: TileTable, rows: int, needed: _Needed) -> _Decoded:
    """Pixels `[rows, tile_width, samples]`, and the codec's own validity of that shape (LERC) or None.

    Args:
        data: The compressed stream.
        table: The image it belongs to.
        rows: Rows that the tile stores by the book.
        needed: Rows and columns that lie in the image; a stream may be cropped to these.

    Raises:
        CorruptTiffError: the stream's size or sample type is not the tile's; whatever the codec raises.
    """
    pixels, valid = IMAGE_CODECS[table.compression][1](data, table, needed)
    shape = (rows, table.tile_width, table.samples_per_tile)
    return _fitted(pixels, shape), None if valid is None else _fitted(valid, shape)


def _checked(frame: ImageHeader, table: TileTable, needed: _Needed, name: str) -> ImageHeader:
    samples = table.samples_per_tile
    limits = (_rounded(table.tile_height), _rounded(table.tile_width))
    if not (needed[0] <= frame.height <= limits[0] and needed[1] <= frame.width <= limits[1]):
        raise CorruptTiffError(
            f"{name} holds {frame.height} x {frame.width} pixels, {needed[0]} x {needed[1]} of a tile of "
            f"{table.tile_height} x {table.tile_width} expected"
        )
    if frame.samples not in (None, samples):
        raise CorruptTiffError(f"{name} holds {frame.samples} samples a pixel, {samples} expected")
    if frame.dtype is not None and np.dtype(frame.dtype) != table.dtype:
        raise CorruptTiffError(f"{name} holds {np.dtype(frame.dtype)} samples, {table.dtype} expected")
    return frame


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _room(frame: ImageHeader, table: TileTable) -> npt.NDArray[Any]:
    """Scratch `[h, w, samples]`, or `[h, w]` for one sample, as imagecodecs likes it."""
    samples = table.samples_per_tile
    shape = (frame.height, frame.width, samples) if samples > 1 else (frame.height, frame.width)
    size = frame.height * frame.width * samples * table.dtype.itemsize
    return scratch(size, "image").view(table.dtype).reshape(shape)


def _fitted(pixels: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    """Cropped to the tile, or filled up with zeros."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    pixels = pixels[: shape[0], : shape[1]]
    if pixels.shape == shape:
        return pixels
    out = np.zeros(shape, pixels.dtype)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def _jpeg(data: memoryview, table: TileTable, needed: _Needed) -> _Decoded:
    tables = table.jpeg_tables or None
    if tables is not None:
        refuse_frames_in_tables(tables)
    frame = _checked(jpeg_frame(data), table, needed, "JPEG")
    if frame.subsampled and table.photometric != _YCBCR:  # colours that TIFF calls something else: libtiff refuses too
        raise CorruptTiffError("JPEG stores some samples at a lower resolution, which only YCbCr pixels may")
    # Samples are stored as they are unless TIFF says YCbCr, whatever an Adobe marker says: libjpeg would convert
    # three and four of them unless told.
    stored = {3: "YCBCR" if table.photometric == _YCBCR else "RGB", 4: "CMYK"}.get(table.samples_per_tile)
    shown = "RGB" if stored == "YCBCR" else stored
    out = _room(frame, table)
    return imagecodecs.jpeg8_decode(data, tables=tables, colorspace=stored, outcolorspace=shown, out=out), None


def _webp(data: memoryview, table: TileTable, needed: _Needed) -> _Decoded:
    out = _room(_checked(webp_frame(data), table, needed, "WebP"), table)
    # An opaque alpha band is dropped by the encoder; asking for it brings it back.
    return imagecodecs.webp_decode(data, hasalpha=table.samples_per_tile == 4, out=out), None


def _jpegxl(data: memoryview, table: TileTable, needed: _Needed) -> _Decoded:
    out = _room(_checked(jpegxl_frame(data), table, needed, "JPEG XL"), table)
    options = {"index": 0, "keeporientation": True, "numthreads": 1}
    if out.ndim == 2:
        return imagecodecs.jpegxl_decode(data, out=out, **options), None
    try:
        return imagecodecs.jpegxl_decode(data, out=out, **options), None
    except ValueError:  # grey with extra channels comes as planes
        planes = out.reshape(out.shape[-1], *out.shape[:2])
        return np.moveaxis(imagecodecs.jpegxl_decode(data, out=planes, **options), 0, -1), None


def _jpeg2000(data: memoryview, table: TileTable, needed: _Needed) -> _Decoded:
    frame, codestream = jpeg2000_frame(data)
    out = _room(_checked(frame, table, needed, "JPEG 2000"), table)
    return imagecodecs.jpeg2k_decode(codestream, numthreads=1, out=out), None


def _lerc(data: memoryview, table: TileTable, needed: _Needed) -> _Decoded:
    data, samples = _unwrapped(data, table), table.samples_per_tile
    frame = lerc_frame(data)
    planes = samples > 1 and frame.samples == 1  # bands with masks of their own
    if planes:
        frame = ImageHeader(height=frame.height, width=frame.width, samples=samples, dtype=frame.dtype)
    out = _room(_checked(frame, table, needed, "LERC"), table)
    if planes:
        out = out.reshape(samples, frame.height, frame.width)
    out[...] = 0
    pixels, mask = imagecodecs.lerc_decode(data, masks=True, out=out)
    if table.big_endian != (sys.byteorder == "big"):  # libtiff swaps what it encodes, and what it has decoded
        pixels = pixels.byteswap(inplace=True)
    if planes:
        pixels = np.moveaxis(pixels, 0, -1)
    if mask is None:
        return pixels, None
    per_sample = np.asarray(mask, dtype=bool)
    per_sample = np.moveaxis(per_sample, 0, -1) if per_sample.ndim == 3 else per_sample[:, :, None]
    return pixels, np.broadcast_to(per_sample, (frame.height, frame.width, samples))


def _unwrapped(data: memoryview, table: TileTable) -> memoryview:
    """LERC out of the deflate or ZSTD around it, within libtiff's bound on the size of a blob."""
    if bytes(data[:1]) == b"\x78":
        inflate: Callable[..., Any] = imagecodecs.deflate_decode
    elif bytes(data[:4]) == b"\x28\xb5\x2f\xfd":
        inflate = imagecodecs.zstd_decode
    else:
        return data
    pixels = _rounded(table.tile_height) * _rounded(table.tile_width)
    size = pixels * table.samples_per_tile * table.dtype.itemsize
    out = scratch(size + size // 3 + 1024 * table.samples_per_tile, "raw")
    return memoryview(inflate(data, out=out))


IMAGE_CODECS: dict[int, tuple[str, Callable[[memoryview, TileTable, _Needed], _Decoded]]] = {
    7: ("JPEG", _jpeg),
    33005: ("JPEG 2000", _jpeg2000),
    34712: ("JPEG 2000", _jpeg2000),
    34887: ("LERC", _lerc),
    50001: ("WebP", _webp),
    50002: ("JPEG XL", _jpegxl),
    52546: ("JPEG XL", _jpegxl),
}
