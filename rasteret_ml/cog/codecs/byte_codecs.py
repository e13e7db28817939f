"""Codecs of plain byte streams (deflate, LZW, ZSTD, …), decoded by imagecodecs into memory of a known size.

What imagecodecs lacks here:

- It cannot decode only the start of a deflate stream, which is all that a chip smaller than its tiles needs:
  `inflate_start`.
- Before 2026.5 its LZW decoder crashes the process on damaged streams: `check_lzw_codes`.
- Fresh memory for each tile lets two threads scale 1.47-fold, reused memory 1.87-fold: `scratch`.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError

_MAX_KEPT = 32 * 1024 * 1024  # Scratch memory of more bytes is not kept.
_local = threading.local()


def scratch(size: int, slot: str) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of this thread's memory named `slot`, which the next call overwrites."""
    memory: npt.NDArray[np.uint8] | None = getattr(_local, slot, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        if size <= _MAX_KEPT:
            setattr(_local, slot, memory)
    return memory[:size]


def decode_bytes(
    data: bytes | memoryview, table: TileTable, *, row_bytes: int, rows: int, image_rows: int, tile_rows: int
) -> npt.NDArray[np.uint8]:
    """Decompress a tile to exactly `rows` rows of `row_bytes`; read-only if it was not compressed.

    The stream must hold `image_rows`, and (if compressed) at most `tile_rows`, else CorruptTiffError is raised, as for
    a stream that cannot be decoded. Rows that it lacks are zero.
    """
    size, limit = rows * row_bytes, max(rows, tile_rows) * row_bytes
    if table.compression == 1:
        name, stored = "the tile", np.frombuffer(data, np.uint8)
        stored.flags.writeable = False  # the caller owns the bytes
        if stored.size >= size:
            return stored[:size]
        decoded, out = stored.size, scratch(size, "raw")
        out[:decoded] = stored
    else:
        name, decode = BYTE_CODECS[table.compression]
        out = scratch(limit + 1, "raw")  # one byte more reveals a stream that is too long
        try:
            decoded = len(decode(data, out=out))
        except CorruptTiffError:
            raise
        except Exception as error:  # each imagecodecs codec has its own error class
            raise CorruptTiffError(
                f"{name} of {len(data)} bytes cannot be decoded to {size} bytes: {type(error).__name__}: {error}"
            ) from error
    if decoded > limit:
        raise CorruptTiffError(f"{name} gave more than the {limit} bytes of a full tile, {size} expected")
    if decoded < image_rows * row_bytes:
        raise CorruptTiffError(f"{name} gave {decoded} bytes, {size} expected, {image_rows * row_bytes} at least")
    if decoded < size:
        out[decoded - decoded % row_bytes : size] = 0
    return out[:size]


# Deflate ------------------------------------------------------------------------------------------------------------
# libdeflate writes from the front, at most 40 bytes ahead of its position, and stops with "insufficient space" at the
# first match or stored block that does not fit. A mark after the required bytes shows whether it came that far: if the
# mark was overwritten, everything before it (less those 40 bytes) is complete. libdeflate does not promise this, so
# it is tried once per process with all kinds of blocks, and streams are decoded whole if the trial fails.

_MARK = np.frombuffer(b"\x9d\x17\xe4\x6bnot written\xd2", np.uint8)
_MARGIN = 1024  # Bytes between the required bytes and the mark.
# Bytes decoded beyond the required ones; the longest match is 258 bytes (RFC 1951, 3.2.5).
_EXTRA = _MARGIN + _MARK.size + 1024
_MAX_SHARE = 0.95  # Share of the stream above which stopping early saves nothing.


def inflate_start(data: bytes | memoryview, size: int, out: npt.NDArray[np.uint8]) -> bool:
    """Decode the first `size` bytes of a zlib stream into `out`, without its checksum; arbitrary bytes follow them.

    False if the stream is shorter, damaged, or nearly all of it is required: `out` then holds arbitrary bytes, and the
    whole stream must be decoded.
    """
    if size + _EXTRA > _MAX_SHARE * out.size or not _can_stop_early():
        return False
    return _inflate_to_mark(data, size, out)


def _inflate_to_mark(data: bytes | memoryview, size: int, out: npt.NDArray[np.uint8]) -> bool:
    mark = out[size + _MARGIN : size + _MARGIN + _MARK.size]
    mark[:] = _MARK
    try:
        imagecodecs.deflate_decode(data, out=out[: size + _EXTRA])
    except imagecodecs.DeflateError as error:
        return "INSUFFICIENT_SPACE" in str(error) and not np.array_equal(mark, _MARK)
    return False


@functools.cache
def _can_stop_early() -> bool:
    """Whether the library behaves as described above: stored blocks, fixed and dynamic codes, long matches."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 80_000, np.uint8).tobytes()
    mixed = rng.integers(0, 5, 60_000, np.uint8).tobytes() + bytes(40_000)
    default, fixed = zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED
    for plain, level, strategy in ((noise, 0, default), (mixed, 1, default), (mixed, 1, fixed)):
        compressor = zlib.compressobj(level, strategy=strategy)
        stream = compressor.compress(plain) + compressor.flush()
        for size in (1, 12_001, 70_000):
            out = np.empty(len(plain), np.uint8)
            if not _inflate_to_mark(stream, size, out):
                if level:  # level 0 makes stored blocks, which are copied as a whole or not at all
                    return False
            elif out[:size].tobytes() != plain[:size]:
                return False
    return True


# LZW ----------------------------------------------------------------------------------------------------------------
# Old decoders do not check that the first code after a CLEAR is a byte, and follow a pointer that was never set. The
# width of a code depends only on its number since the last CLEAR (TIFF 6.0, section 13), so all codes between two
# CLEARs are checked at once.

_CLEAR, _END = 256, 257
_MAX_CODES = 8192
_USUAL_CODES = 3850  # Codes between two CLEARs in the streams of most writers.


def _code_layout(first_of_width: tuple[int, int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Start in bits and width of each code after a CLEAR, from the numbers of the first 10-, 11- and 12-bit codes."""
    widths = np.full(_MAX_CODES, 9, np.int64)
    for first in first_of_width:
        widths[first:] += 1
    return np.cumsum(widths) - widths, widths.astype(np.uint32)


_NEW_LAYOUT, _OLD_LAYOUT = _code_layout((254, 766, 1790)), _code_layout((255, 767, 1791))


@functools.cache
def _decoder_checks_lzw() -> bool:
    # CLEAR, 258, END: an old decoder takes 258 for a byte, and stops before it looks it up.
    stream = (_CLEAR << 23 | 258 << 14 | _END << 5).to_bytes(4, "big")
    try:
        imagecodecs.lzw_decode(stream, out=np.empty(8, np.uint8))
    except Exception:
        return True
    return False


def _decode_lzw(data: bytes | memoryview, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`imagecodecs.lzw_decode`, safe on any bytes."""
    if not _decoder_checks_lzw():
        check_lzw_codes(np.frombuffer(data, np.uint8))
    decoded: npt.NDArray[np.uint8] = imagecodecs.lzw_decode(data, out=out)
    return decoded


def check_lzw_codes(stream: npt.NDArray[np.uint8]) -> None:
    """Raise CorruptTiffError unless the code after each CLEAR of an LZW stream is a byte."""
    if stream.size < 2:
        return
    old = stream[0] == 0 and bool(stream[1] & 1)  # least significant bit first, wider codes start one code later
    starts, widths = _OLD_LAYOUT if old else _NEW_LAYOUT
    padded = np.concatenate([stream, np.zeros(4, np.uint8)]).astype(np.uint32)
    first, middle, last = padded[:-2], padded[1:-1], padded[2:]
    words = first | middle << 8 | last << 16 if old else first << 16 | middle << 8 | last
    end, position = stream.size * 8, 9  # decoders require the first code to be a CLEAR
    while position + 9 <= end:
        for count in (_USUAL_CODES, _MAX_CODES):
            bits = position + starts[:count]
            bits = bits[: np.searchsorted(bits, end - 8)]
            shift, width = (bits & 7).astype(np.uint32), widths[: bits.size]
            codes = words[bits >> 3] >> (shift if old else 24 - shift - width) & (1 << width) - 1
            stops = np.flatnonzero(codes >> 1 == _CLEAR >> 1)
            if stops.size or bits.size < count:
                break
        if codes[0] > _END:
            raise CorruptTiffError(f"the code after an LZW CLEAR is code {codes[0]}, a byte expected")
        if not stops.size or codes[stops[0]] == _END:
            return
        position = int(bits[stops[0]]) + int(width[stops[0]])


#: Name and decoder (`decode(data, out=array)`) of each value of the Compression tag (259).
BYTE_CODECS: dict[int, tuple[str, Callable[..., Any]]] = {
    5: ("LZW", _decode_lzw),
    8: ("deflate", imagecodecs.deflate_decode),
    32946: ("deflate", imagecodecs.deflate_decode),
    32773: ("PackBits", imagecodecs.packbits_decode),
    34925: ("LZMA", imagecodecs.lzma_decode),
    50000: ("ZSTD", imagecodecs.zstd_decode),
}
