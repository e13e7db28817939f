"""The image size that a compressed stream declares, read before a decoder allocates memory for it.

imagecodecs allocates what a stream declares, and a few bytes may declare a gigapixel. libjpeg decodes a truncated
stream to a full image with a garbage tail, without an error. Only the fields needed to prevent both are read here;
the decoders check the rest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from rasteret_ml.errors import CorruptTiffError

__all__ = [
    "ImageHeader",
    "check_jpeg_tables",
    "jpeg2000_header",
    "jpeg_header",
    "jpegxl_header",
    "lerc_header",
    "webp_header",
]

_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MAX_SCANS = 100
"""As libtiff: each scan of a progressive JPEG costs a pass over the whole image."""
_MAX_J2K_TILES = 4096
_JXL_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_LERC_TYPES = ("i1", "u1", "i2", "u2", "i4", "u4", "f4", "f8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageHeader:
    """The size and sample type that a stream declares."""

    height: int
    """Rows."""
    width: int
    """Columns."""
    samples: int | None = None
    """Samples per pixel; None if not read."""
    dtype: str | None = None
    """numpy's name of the sample type; None if not read."""
    subsampled: bool = False
    """Whether some samples are stored at a lower resolution than others."""


def jpeg_header(data: memoryview) -> ImageHeader:
    """Read the frame header of a JPEG stream (ITU-T T.81, annex B), which must have an end-of-image marker.

    Raises:
        CorruptTiffError: No frame, more than one, no end of image, or more than 100 scans.
    """
    if bytes(data[:2]) != b"\xff\xd8":
        raise CorruptTiffError(f"JPEG starts with {bytes(data[:2]).hex() or 'nothing'}, ffd8 expected")
    frame, scans, position = None, 0, 2
    while True:
        found = _MARKER.search(data, position)
        if found is None:
            raise CorruptTiffError(f"JPEG of {len(data)} bytes is truncated: it has no end-of-image marker")
        marker, position = data[found.end() - 1], found.end()
        if marker == _EOI:
            break
        if marker == _SOI:
            raise CorruptTiffError("JPEG holds a second start of image before the end of the first")
        if marker in _SOF:
            if frame is not None:
                raise CorruptTiffError("JPEG holds two frames")
            frame = _frame_header(data[position:])
        scans += marker == _SOS
        position += max(2, int.from_bytes(data[position : position + 2], "big"))
    if frame is None:
        raise CorruptTiffError("JPEG holds no frame")
    if scans > _MAX_SCANS:
        raise CorruptTiffError(f"JPEG holds {scans} scans, at most {_MAX_SCANS} expected")
    return frame


def _frame_header(field: memoryview) -> ImageHeader:
    samples = field[7] if len(field) > 7 else 0
    factors = bytes(field[9 : 8 + 3 * samples : 3])
    if not samples or len(factors) < samples:
        raise CorruptTiffError("JPEG is truncated in its frame header")
    return ImageHeader(
        height=int.from_bytes(field[3:5], "big"),
        width=int.from_bytes(field[5:7], "big"),
        samples=samples,
        dtype="u1" if field[2] <= 8 else "u2",
        subsampled=len(set(factors)) > 1,
    )


def check_jpeg_tables(tables: bytes) -> None:
    """Check that JPEGTables (TIFF tag 347) hold tables only, and no image to be decoded.

    Raises:
        CorruptTiffError: They hold a frame or a scan.
    """
    position = 2
    while (found := _MARKER.search(tables, position)) is not None:
        marker, position = tables[found.end() - 1], found.end()
        if marker in _SOF or marker == _SOS:
            raise CorruptTiffError("the JPEG tables hold an image")
        position += max(2, int.from_bytes(tables[position : position + 2], "big")) if marker != _EOI else 0


def webp_header(data: memoryview) -> ImageHeader:
    """Read the canvas size of a still WebP file (RFC 9649): RIFF with VP8, VP8L or VP8X.

    Raises:
        CorruptTiffError: Not WebP, or an animation.
    """
    head = bytes(data[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        raise CorruptTiffError(f"WebP starts with {head[:12]!r}, RIFF....WEBP expected")
    kind = head[12:16]
    if kind == b"VP8X":
        if head[20] & 2:
            raise CorruptTiffError("WebP holds an animation, a still image expected")
        return ImageHeader(
            width=int.from_bytes(head[24:27], "little") + 1, height=int.from_bytes(head[27:30], "little") + 1
        )
    if kind == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return ImageHeader(width=(bits & 0x3FFF) + 1, height=(bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
        return ImageHeader(width=width & 0x3FFF, height=height & 0x3FFF)
    raise CorruptTiffError(f"WebP holds {kind!r}, a VP8 image expected")


def jpegxl_header(data: memoryview) -> ImageHeader:
    """Read the SizeHeader of a JPEG XL codestream (ISO/IEC 18181-1), bare or in its container.

    Raises:
        CorruptTiffError: There is no codestream.
    """
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
    if ratio:
        above, below = _JXL_RATIOS[ratio - 1]
        return ImageHeader(height=height, width=height * above // below)
    return ImageHeader(height=height, width=side())


def jpeg2000_header(data: memoryview) -> tuple[ImageHeader, memoryview]:
    """Read the SIZ marker of a JPEG 2000 codestream (ISO/IEC 15444-1, A.5.1), and return the codestream too.

    A codestream in a JP2 box is returned without the box, so that no colour box changes the samples.

    Raises:
        CorruptTiffError: No codestream, components that are subsampled or differ, or too many tiles.
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
    return ImageHeader(height=bottom - top, width=right - left, samples=samples, dtype=dtype), data[start:]


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


def lerc_header(data: memoryview) -> ImageHeader:
    """Read the header of a Lerc2 blob (github.com/Esri/lerc, Lerc2.h); its depth is `samples`.

    Raises:
        CorruptTiffError: Not Lerc2, or an impossible value.
    """
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
    return ImageHeader(height=height, width=width, samples=depth, dtype=_LERC_TYPES[kind])
