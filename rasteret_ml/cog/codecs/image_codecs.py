"""Codecs whose streams declare their own size: JPEG, WebP, JPEG XL, JPEG 2000, LERC.

imagecodecs allocates what a stream declares, and a few bytes may declare a gigapixel. libjpeg decodes a truncated
stream to a full image with a garbage tail, without an error. So the size in the stream is read first. It must cover
the part of the tile that lies in the image and may not exceed the tile's size rounded up to 16 (a JPEG block; some
writers pad strips to it). Only then does the decoder run, into an array of exactly that size.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.byte_codecs import scratch
from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError

_ImagePart = tuple[int, int]  # Rows and columns of a tile that lie in the image.
_Decoded = tuple[npt.NDArray[Any], npt.NDArray[np.bool_] | None]
_YCBCR = 6
_JPEG_BLOCK = 16
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MAX_SCANS = 100  # As libtiff: each scan of a progressive JPEG costs a pass over the whole image.
_MAX_J2K_TILES = 4096
_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_LERC_TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")


@dataclass(frozen=True, slots=True, kw_only=True)
class _ImageHeader:
    """The size and sample type that a stream declares."""

    height: int  # Rows.
    width: int  # Columns.
    samples: int | None = None  # Samples per pixel; None if not read.
    dtype: str | None = None  # numpy's name of the sample type; None if not read.
    subsampled: bool = False  # Whether some samples are stored at a lower resolution than others.


def decode_image(data: memoryview, table: TileTable, rows: int, image_part: _ImagePart) -> _Decoded:
    """Return pixels `[rows, tile_width, samples]`, and the codec's own validity mask of that shape (LERC) or None.

    A stream may be cropped to `image_part`. Raise CorruptTiffError if its size or sample type differs from the tile's;
    decoders raise errors of their own.
    """
    pixels, valid = IMAGE_CODECS[table.compression][1](data, table, image_part)
    shape = (rows, table.tile_width, table.samples_per_tile)
    return _crop_or_pad(pixels, shape), None if valid is None else _crop_or_pad(valid, shape)


def _allocate(header: _ImageHeader, table: TileTable, image_part: _ImagePart, name: str) -> npt.NDArray[Any]:
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


# Declared sizes -------------------------------------------------------------------------------------------------------
# Each function raises CorruptTiffError if the stream is invalid or declares what no tile may hold.


def _jpeg_header(data: memoryview) -> _ImageHeader:
    """Read the frame header of a JPEG stream (ITU-T T.81, annex B), which must have an end-of-image marker."""
    if bytes(data[:2]) != b"\xff\xd8":
        raise CorruptTiffError(f"JPEG starts with {bytes(data[:2]).hex() or 'nothing'}, ffd8 expected")
    frame, scans = None, 0
    for marker, position in _jpeg_markers(data):
        if marker == _EOI:
            break
        if marker == _SOI:
            raise CorruptTiffError("JPEG holds a second start of image before the end of the first")
        if marker in _SOF:
            if frame is not None:
                raise CorruptTiffError("JPEG holds two frames")
            frame = _frame_header(data[position:])
        scans += marker == _SOS
    else:
        raise CorruptTiffError(f"JPEG of {len(data)} bytes is truncated: it has no end-of-image marker")
    if frame is None:
        raise CorruptTiffError("JPEG holds no frame")
    if scans > _MAX_SCANS:
        raise CorruptTiffError(f"JPEG holds {scans} scans, at most {_MAX_SCANS} expected")
    return frame


def _jpeg_markers(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Each marker after the start of image, and the position of the segment that follows it."""
    position = 2
    while (found := _MARKER.search(data, position)) is not None:
        marker, position = data[found.end() - 1], found.end()
        yield marker, position
        position += max(2, int.from_bytes(data[position : position + 2], "big")) if marker != _EOI else 0


def _frame_header(field: memoryview) -> _ImageHeader:
    samples = field[7] if len(field) > 7 else 0
    factors = bytes(field[9 : 8 + 3 * samples : 3])
    if not samples or len(factors) < samples:
        raise CorruptTiffError("JPEG is truncated in its frame header")
    return _ImageHeader(
        height=int.from_bytes(field[3:5], "big"),
        width=int.from_bytes(field[5:7], "big"),
        samples=samples,
        dtype="u1" if field[2] <= 8 else "u2",
        subsampled=len(set(factors)) > 1,
    )


def _webp_header(data: memoryview) -> _ImageHeader:
    """Read the canvas size of a still WebP file (RFC 9649): RIFF with VP8, VP8L or VP8X."""
    head = bytes(data[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        raise CorruptTiffError(f"WebP starts with {head[:12]!r}, RIFF....WEBP expected")
    kind = head[12:16]
    if kind == b"VP8X":
        if head[20] & 2:
            raise CorruptTiffError("WebP holds an animation, a still image expected")
        width, height = int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    elif kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(head[k : k + 2], "little") & 0x3FFF for k in (26, 28))
    else:
        raise CorruptTiffError(f"WebP holds {kind!r}, a VP8 image expected")
    return _ImageHeader(width=width, height=height)


def _jpegxl_header(data: memoryview) -> _ImageHeader:
    """Read the SizeHeader of a JPEG XL codestream (ISO/IEC 18181-1), bare or in its container."""
    start = _box(data, (b"jxlc", b"jxlp")) if bytes(data[:12]) == _JXL_CONTAINER else 0
    if bytes(data[start : start + 2]) != b"\xff\x0a":
        raise CorruptTiffError(f"JPEG XL starts with {bytes(data[:4]).hex() or 'nothing'}, ff0a expected")
    bits = int.from_bytes(data[start + 2 : start + 14], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & (1 << count) - 1
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return (take(5) + 1) * 8 if small else take((9, 13, 18, 30)[take(2)]) + 1

    height = side()
    ratio = take(3)
    if ratio == 0:
        return _ImageHeader(height=height, width=side())
    above, below = _JXL_RATIOS[ratio - 1]
    return _ImageHeader(height=height, width=height * above // below)


def _jpeg2000_header(data: memoryview) -> tuple[_ImageHeader, memoryview]:
    """Read the SIZ marker of a JPEG 2000 codestream (ISO/IEC 15444-1, A.5.1), and return the codestream too.

    A codestream in a JP2 box is returned without the box, so that no colour box changes the samples.
    """
    start = _box(data, (b"jp2c",)) if bytes(data[4:8]) == b"jP  " else 0
    head = data[start : start + 42]
    if bytes(head[:4]) != b"\xff\x4f\xff\x51" or len(head) < 42:
        raise CorruptTiffError(f"JPEG 2000 starts with {bytes(head[:4]).hex() or 'nothing'}, ff4fff51 expected")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = (
        int.from_bytes(head[8 + 4 * k : 12 + 4 * k], "big") for k in range(8)
    )
    samples = int.from_bytes(head[40:42], "big")
    components = bytes(data[start + 42 : start + 42 + 3 * samples])
    if len(components) < 3 * samples or not samples:
        raise CorruptTiffError("JPEG 2000 is truncated in its size header")
    if any(components[k : k + 3] != bytes([components[0], 1, 1]) for k in range(0, len(components), 3)):
        raise CorruptTiffError("JPEG 2000 components differ in type or size")
    if tile_width < 1 or tile_height < 1 or left < tile_left or top < tile_top or right <= left or bottom <= top:
        raise CorruptTiffError("JPEG 2000 declares an impossible size")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > _MAX_J2K_TILES:
        raise CorruptTiffError(f"JPEG 2000 holds {tiles} tiles, at most {_MAX_J2K_TILES} expected")
    bits = (components[0] & 0x7F) + 1
    item = 1 if bits <= 8 else 2 if bits <= 16 else 4
    dtype = f"{'i' if components[0] & 0x80 else 'u'}{item}"
    return _ImageHeader(height=bottom - top, width=right - left, samples=samples, dtype=dtype), data[start:]


def _box(data: memoryview, kinds: tuple[bytes, ...]) -> int:
    """Start of the contents of the first box of these kinds (ISO/IEC 15444-1, annex I), else the end of `data`."""
    position = 0
    while position + 8 <= len(data):
        size, kind = int.from_bytes(data[position : position + 4], "big"), bytes(data[position + 4 : position + 8])
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        if kind in kinds:
            return position + head + (4 if kind == b"jxlp" else 0)
        if size < head:
            break
        position += size
    return len(data)


def _lerc_header(data: memoryview) -> _ImageHeader:
    """Read the header of a Lerc2 blob (github.com/Esri/lerc, Lerc2.h); its depth is `samples`."""
    if bytes(data[:6]) != b"Lerc2 ":
        raise CorruptTiffError(f"LERC starts with {bytes(data[:6])!r}, 'Lerc2 ' expected")
    version = int.from_bytes(data[6:10], "little")
    if not 2 <= version <= 6:
        raise CorruptTiffError(f"LERC version {version}, 2 to 6 expected")
    start = 14 if version >= 3 else 10
    fields = np.frombuffer(bytes(data[start : start + 28]).ljust(28, b"\0"), "<i4").tolist()
    if version < 4:
        fields.insert(2, 1)
    height, width, depth, kind = fields[0], fields[1], fields[2], fields[6]
    if height < 1 or width < 1 or depth < 1 or not 0 <= kind < len(_LERC_TYPES):
        raise CorruptTiffError(f"LERC of {height} x {width} x {depth} of type {kind} is impossible")
    return _ImageHeader(height=height, width=width, samples=depth, dtype=_LERC_TYPES[kind])


# Decoders -------------------------------------------------------------------------------------------------------------


def _jpeg(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    tables = table.jpeg_tables or None
    if any(marker in _SOF or marker == _SOS for marker, _ in _jpeg_markers(tables or b"")):
        raise CorruptTiffError("the JPEG tables hold an image")
    header = _jpeg_header(data)
    out = _allocate(header, table, image_part, "JPEG")
    if header.subsampled and table.photometric != _YCBCR:  # libtiff refuses it too
        raise CorruptTiffError("JPEG stores some samples at a lower resolution, which only YCbCr pixels may")
    # TIFF decides whether pixels are YCbCr, whatever an Adobe marker says; libjpeg would guess by itself.
    stored = {3: "YCBCR" if table.photometric == _YCBCR else "RGB", 4: "CMYK"}.get(table.samples_per_tile)
    output = "RGB" if stored == "YCBCR" else stored
    return imagecodecs.jpeg8_decode(data, tables=tables, colorspace=stored, outcolorspace=output, out=out), None


def _webp(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    out = _allocate(_webp_header(data), table, image_part, "WebP")
    # Encoders drop an opaque alpha band; `hasalpha` restores it.
    return imagecodecs.webp_decode(data, hasalpha=table.samples_per_tile == 4, out=out), None


def _jpegxl(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    out = _allocate(_jpegxl_header(data), table, image_part, "JPEG XL")
    options = {"index": 0, "keeporientation": True, "numthreads": 1}
    if out.ndim == 2:
        return imagecodecs.jpegxl_decode(data, out=out, **options), None
    try:
        return imagecodecs.jpegxl_decode(data, out=out, **options), None
    except ValueError:  # grey with extra channels is decoded as planes
        planes = out.reshape(out.shape[-1], *out.shape[:2])
        return np.moveaxis(imagecodecs.jpegxl_decode(data, out=planes, **options), 0, -1), None


def _jpeg2000(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    header, codestream = _jpeg2000_header(data)
    out = _allocate(header, table, image_part, "JPEG 2000")
    return imagecodecs.jpeg2k_decode(codestream, numthreads=1, out=out), None


def _lerc(data: memoryview, table: TileTable, image_part: _ImagePart) -> _Decoded:
    data, samples = _unwrap_lerc(data, table), table.samples_per_tile
    header = _lerc_header(data)
    planes = samples > 1 and header.samples == 1  # each band has its own mask
    if planes:
        header = replace(header, samples=samples)
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
