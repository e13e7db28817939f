"""Deflate streams of which only the beginning is wanted.

libdeflate writes from the front, runs ahead of itself by a few words, and stops with "insufficient space" at the first
match or stored block that the output has no room for. So a mark behind what is wanted tells whether it came that far:
where the mark is gone, all before it (less the few words) is written. That is how it is made and not what it promises:
streams with all kinds of blocks are tried once a process, and nothing is cut short where that fails.
"""

from __future__ import annotations

import functools
import zlib

import imagecodecs
import numpy as np
import numpy.typing as npt

__all__ = ["inflate_front"]

_MARK = np.frombuffer(b"\x9d\x17\xe4\x6bnot written\xd2", np.uint8)
_AHEAD = 1024
"""Bytes between what is wanted and the mark; libdeflate runs at most 40 ahead."""
_SLACK = _AHEAD + _MARK.size + 1024
"""Bytes asked for beyond what is wanted; the longest match is 258 (RFC 1951, 3.2.5), and the mark is before it."""
_WORTH = 0.95
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
    mark = out[size + _AHEAD : size + _AHEAD + _MARK.size]
    mark[:] = _MARK
    try:
        imagecodecs.deflate_decode(data, out=out[: size + _SLACK])
    except imagecodecs.DeflateError as error:
        return "INSUFFICIENT_SPACE" in str(error) and not np.array_equal(mark, _MARK)
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
        for size in (1, 12_001, 70_000):
            out = np.empty(len(plain), np.uint8)
            if not _inflate_front(packed, size, out):
                if level:  # at level 0 blocks are stored, and such a block is copied whole or not at all
                    return False
            elif out[:size].tobytes() != plain[:size]:
                return False
    return True
