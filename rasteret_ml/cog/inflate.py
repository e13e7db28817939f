"""Deflate streams of which only the beginning is wanted.

libdeflate writes from the front and stops with "insufficient space" where the output is full: what it wrote by then
is the beginning of the data. It never writes a part of a stored block or of a match, so the last `_SLACK` bytes of
the output may be missing. That is how it is made and not what it promises: a stream with all kinds of blocks is
tried once a process, and nothing is cut short where that fails.
"""

from __future__ import annotations

import functools
import zlib

import imagecodecs
import numpy as np
import numpy.typing as npt

__all__ = ["inflate_front"]

_SLACK = 65535 + 258
"""The longest stored block and the longest match (RFC 1951, 3.2.4 and 3.2.5)."""
_WORTH = 0.85
"""Share of the whole above which stopping early gains nothing."""


def inflate_front(data: bytes | memoryview, size: int, out: npt.NDArray[np.uint8]) -> bool:
    """Put the first `size` bytes of a zlib stream into `out`, and rubbish after them.

    Returns:
        Whether it did. If not, `out` holds nothing of use: the stream is shorter, broken, or nearly all of it is
        wanted; then decode it whole. The checksum at the end of the stream is not looked at.
    """
    if size + _SLACK > _WORTH * out.size or not _stops_where_full():
        return False
    return _inflate_front(data, size, out)


def _inflate_front(data: bytes | memoryview, size: int, out: npt.NDArray[np.uint8]) -> bool:
    try:
        imagecodecs.deflate_decode(data, out=out[: size + _SLACK])
    except imagecodecs.DeflateError as error:
        return "INSUFFICIENT_SPACE" in str(error)
    return False


@functools.cache
def _stops_where_full() -> bool:
    """Whether the library behaves as described, for stored blocks, fixed and dynamic codes, and long matches."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 80_000, np.uint8).tobytes()
    mixed = rng.integers(0, 5, 60_000, np.uint8).tobytes() + bytes(40_000)
    for plain, level, strategy in (
        (noise, 0, zlib.Z_DEFAULT_STRATEGY),
        (mixed, 1, zlib.Z_DEFAULT_STRATEGY),
        (mixed, 1, zlib.Z_FIXED),
    ):
        packer = zlib.compressobj(level, strategy=strategy)
        packed = packer.compress(plain) + packer.flush()
        for size in (1, 12_001):
            out = np.empty(len(plain), np.uint8)
            if not _inflate_front(packed, size, out) or out[:size].tobytes() != plain[:size]:
                return False
    return True
