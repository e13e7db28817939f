"""A guard for imagecodecs' LZW decoder, which in older versions crashes the process on altered streams.

Before 2026.5 or so it does not check that the first code after a CLEAR is a byte, and follows a pointer that was
never set. The widths of codes depend on their number since the last CLEAR alone (TIFF 6.0, section 13), so that
all codes between two CLEARs can be looked at in one go.
"""

from __future__ import annotations

import imagecodecs
import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import CorruptTiffError

__all__ = ["decode_lzw", "refuse_dangling_codes"]

_CLEAR, _END = 256, 257
_CODES = 8192
_WORDS = 3850


def decode_lzw(data: bytes | memoryview, out: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`imagecodecs.lzw_decode` into `out`, safe on any bytes.

    Raises:
        CorruptTiffError: a CLEAR is followed by a code that is not a byte.
    """
    if not _CHECKED:
        refuse_dangling_codes(np.frombuffer(data, np.uint8))
    decoded: npt.NDArray[np.uint8] = imagecodecs.lzw_decode(data, out=out)
    return decoded


def _decoder_checks_itself() -> bool:
    # CLEAR, 258, END: the old decoder takes 258 for a byte, and stops before it looks it up.
    stream = (_CLEAR << 23 | 258 << 14 | _END << 5).to_bytes(4, "big")
    try:
        imagecodecs.lzw_decode(stream, out=np.empty(8, np.uint8))
    except Exception:
        return True
    return False


def _layout(changes: tuple[int, int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
    """Where each code after a CLEAR starts, in bits, and its width; `changes` are the first of 10, 11 and 12 bits."""
    widths = np.full(_CODES, 9, np.int64)
    for first in changes:
        widths[first:] += 1
    return np.cumsum(widths) - widths, widths.astype(np.uint32)


_NEW, _OLD = _layout((254, 766, 1790)), _layout((255, 767, 1791))
_CHECKED = _decoder_checks_itself()


def refuse_dangling_codes(stream: npt.NDArray[np.uint8]) -> None:
    """Look at the code after each CLEAR.

    Raises:
        CorruptTiffError: one is not a byte.
    """
    if stream.size < 2:
        return
    old = stream[0] == 0 and bool(stream[1] & 1)  # least significant bit first, widths change one code later
    starts, widths = _OLD if old else _NEW
    padded = np.concatenate([stream, np.zeros(4, np.uint8)]).astype(np.uint32)
    first, middle, last = padded[:-2], padded[1:-1], padded[2:]
    words = first | middle << 8 | last << 16 if old else first << 16 | middle << 8 | last
    end, position = stream.size * 8, 9  # the first code is a CLEAR, or the decoder stops there
    while position + 9 <= end:
        for count in (_WORDS, _CODES):
            bits = position + starts[:count]
            bits = bits[: np.searchsorted(bits, end - 8)]
            inside, width = (bits & 7).astype(np.uint32), widths[: bits.size]
            codes = words[bits >> 3] >> (inside if old else 24 - inside - width) & (1 << width) - 1
            stops = np.flatnonzero(codes >> 1 == _CLEAR >> 1)
            if stops.size or bits.size < count:
                break
        if codes[0] > _END:
            raise CorruptTiffError(f"LZW starts its table over with code {codes[0]}, a byte expected")
        if not stops.size or codes[stops[0]] == _END:
            return
        position = int(bits[stops[0]]) + int(width[stops[0]])
