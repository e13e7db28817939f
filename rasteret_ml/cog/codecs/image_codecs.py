"""Codecs whose streams declare their own size: JPEG, WebP, JPEG XL, JPEG 2000, LERC.

For all of them the size in the stream is read first. It must cover the part of the tile that lies in the image and may
not exceed the tile's size rounded up to 16 (a JPEG block; some writers pad strips to it). Only then does the decoder
run, into an array of exactly that size, which imagecodecs checks once more.
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
    check_jpeg_tables,
    jpeg2000_header,
    jpeg_header,
    jpegxl_header,
    lerc_header,
    webp_header,
)
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError

__all__ = ["IMAGE_CODECS", "decode_image"]

_ImagePart = tuple[int, int]
"""Rows and columns of a tile that lie in the image."""
_Decoded = tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]
_YCBCR = 6
_JPEG_BLOCK = 16


def decode_image(data: memoryview, table: TileTable, rows: int, image_part: _ImagePart) -> _Decoded:
    """Return pixels `[rows, tile_width, samples]`, and the codec's own validity mask of that shape (LERC) or None.

    Args:
        data: The compressed stream.
        table: The image that the tile belongs to.
        rows: Rows to return.
        image_part: Rows and columns that lie in the image; a stream may be cropped to these.

    Raises:
        CorruptTiffError: Size or sample type of the stream differ from the tile's. Decoders raise errors of their own.
    """
    pixels, valid = IMAGE_CODECS[table.compression][1](data, table, image_part)
    shape = (rows, table.tile_width, table.samples_per_tile)
    return _crop_or_pad(pixels, shape), None if valid is None else _crop_or_pad(valid, shape)


def _allocate(header: ImageHeader, table: TileTable, image_part: _ImagePart, name: str) -> npt.NDArray[Any]:
    """Check a declared size, and return scratch memory for it: `[h, w, samples]`, or `[h, w]` for one sample."""
    samples = table.samples_per_tile
    limits = (_round_up(table.tile_height), _round_up(table.tile_width))
    if not (image_part[0] <= header.height <= limits[0] and image_part[1] <= header.width <= limits[1]):
        raise CorruptTiffError(
            f"{name} holds {header.height} x {header.width} pixels, {image_part[0]} x {image_part[1]} of a tile of "
            f"{table.tile_height} x {table.tile_width} expected"
        )
    if header.samples not in (None, samples):
        raise CorruptTiffError(f"{name} holds {header.samples} samples per pixel, {samples} expected")
    if header.dtype is not None and np.dtype(header.dtype) != table.dtype:
        raise CorruptTiffError(f"{name} holds {np.dtype(header.dtype)} samples, {table.dtype} expected")
    shape = (header.height, header.width, samples) if samples > 1 else (header.height, header.width)
    size = header.height * header.width * samples * table.dtype.itemsize
    return scratch(size, "image").view(table.dtype).reshape(shape)


def _round_up(size: int) -> int:
    return -(-size // _JPEG_BLOCK) * _JPEG_BLOCK


def _crop_or_pad(pixels: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    """Crop to the tile, or pad with zeros."""
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    pixels = pixels[: shape[0], : shape[1]]
    if pixels.shape == shape:
        return pixels
    out = np.zeros(shape, pixels.dtype)
    out[: pixels.shape[0], : pixels.shape[1]] = pixels
    return out


def _jpeg(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    tables = table.jpeg_tables or None
    if tables is not None:
        check_jpeg_tables(tables)
    header = jpeg_header(data)
    out = _allocate(header, table, image_part, "JPEG")
    if header.subsampled and table.photometric != _YCBCR:  # libtiff refuses it too
        raise CorruptTiffError("JPEG stores some samples at a lower resolution, which only YCbCr pixels may")
    # TIFF decides whether pixels are YCbCr, whatever an Adobe marker says; libjpeg would guess by itself.
    stored = {3: "YCBCR" if table.photometric == _YCBCR else "RGB", 4: "CMYK"}.get(table.samples_per_tile)
    output = "RGB" if stored == "YCBCR" else stored
    return imagecodecs.jpeg8_decode(data, tables=tables, colorspace=stored, outcolorspace=output, out=out), None


def _webp(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    out = _allocate(webp_header(data), table, image_part, "WebP")
    # Encoders drop an opaque alpha band; `hasalpha` restores it.
    return imagecodecs.webp_decode(data, hasalpha=table.samples_per_tile == 4, out=out), None


def _jpegxl(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    out = _allocate(jpegxl_header(data), table, image_part, "JPEG XL")
    options = {"index": 0, "keeporientation": True, "numthreads": 1}
    if out.ndim == 2:
        return imagecodecs.jpegxl_decode(data, out=out, **options), None
    try:
        return imagecodecs.jpegxl_decode(data, out=out, **options), None
    except ValueError:  # grey with extra channels is decoded as planes
        planes = out.reshape(out.shape[-1], *out.shape[:2])
        return np.moveaxis(imagecodecs.jpegxl_decode(data, out=planes, **options), 0, -1), None


def _jpeg2000(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    header, codestream = jpeg2000_header(data)
    out = _allocate(header, table, image_part, "JPEG 2000")
    return imagecodecs.jpeg2k_decode(codestream, numthreads=1, out=out), None


def _lerc(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    data, samples = _unwrap_lerc(data, table), table.samples_per_tile
    header = lerc_header(data)
    planes = samples > 1 and header.samples == 1  # each band has its own mask
    if planes:
        header = ImageHeader(height=header.height, width=header.width, samples=samples, dtype=header.dtype)
    out = _allocate(header, table, image_part, "LERC")
    if planes:
        out = out.reshape(samples, header.height, header.width)
    out[...] = 0
    pixels, mask = imagecodecs.lerc_decode(data, masks=True, out=out)
    if table.big_endian != (sys.byteorder == "big"):  # libtiff swaps before encoding and after decoding
        pixels = pixels.byteswap(inplace=True)
    if planes:
        pixels = np.moveaxis(pixels, 0, -1)
    if mask is None:
        return pixels, None
    per_sample = np.asarray(mask, dtype=bool)
    per_sample = np.moveaxis(per_sample, 0, -1) if per_sample.ndim == 3 else per_sample[:, :, None]
    return pixels, np.broadcast_to(per_sample, (header.height, header.width, samples))


def _unwrap_lerc(data: memoryview, table: TileTable) -> memoryview:
    """Remove the deflate or ZSTD compression around LERC, within libtiff's bound on the size of a blob."""
    if bytes(data[:1]) == b"\x78":
        inflate: Callable[..., Any] = imagecodecs.deflate_decode
    elif bytes(data[:4]) == b"\x28\xb5\x2f\xfd":
        inflate = imagecodecs.zstd_decode
    else:
        return data
    pixels = _round_up(table.tile_height) * _round_up(table.tile_width)
    size = pixels * table.samples_per_tile * table.dtype.itemsize
    out = scratch(size + size // 3 + 1024 * table.samples_per_tile, "raw")
    return memoryview(inflate(data, out=out))


IMAGE_CODECS: dict[int, tuple[str, Callable[[memoryview, TileTable, _ImagePart], _Decoded]]] = {
    7: ("JPEG", _jpeg),
    33005: ("JPEG 2000", _jpeg2000),
    34712: ("JPEG 2000", _jpeg2000),
    34887: ("LERC", _lerc),
    50001: ("WebP", _webp),
    50002: ("JPEG XL", _jpegxl),
    52546: ("JPEG XL", _jpegxl),
}
