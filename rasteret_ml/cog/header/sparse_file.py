"""A file of which only some bytes are known."""

from __future__ import annotations

from collections.abc import Sequence

from rasteret_ml.errors import CorruptTiffError
from rasteret_ml.ranges import ByteRange

__all__ = ["NeedBytes", "SparseFile"]

_MAX_PEEK = 32 * 1024 * 1024
"""Largest run that a header may ask for: the offsets of four million tiles."""


class NeedBytes(Exception):  # noqa: N818 - a request, not an error
    """The header goes on in bytes that are not there yet: fetch `ranges`, all of them, and parse again."""

    def __init__(self, ranges: Sequence[ByteRange]) -> None:
        super().__init__(", ".join(map(str, ranges)))
        self.ranges = tuple(ranges)


class SparseFile:
    """The known extents of a file."""

    def __init__(self, size: int) -> None:
        """Make an empty one; `size` is the whole file's length in bytes."""
        self.size = size
        self._extents: list[tuple[int, bytes]] = []

    def add(self, start: int, data: bytes) -> None:
        """Learn the bytes from `start` on."""
        self._extents.append((start, bytes(data)))
        self._extents.sort(key=lambda extent: extent[0])
        joined: list[tuple[int, bytes]] = []
        for begin, chunk in self._extents:
            if joined and begin <= joined[-1][0] + len(joined[-1][1]):
                first, held = joined[-1]
                joined[-1] = (first, held + chunk[first + len(held) - begin :])
            else:
                joined.append((begin, chunk))
        self._extents = joined

    def peek(self, start: int, length: int) -> bytes:
        """The bytes at `start`, fewer at the end of the file.

        Raises:
            NeedBytes: not all of them are known.
            CorruptTiffError: no header has that many.
        """
        stop = min(start + length, self.size)
        if stop <= start:
            return b""
        if stop - start > _MAX_PEEK:
            raise CorruptTiffError(f"the header claims {stop - start} bytes in one piece")
        known = start
        for begin, chunk in self._extents:
            if begin <= start < begin + len(chunk):
                if stop <= begin + len(chunk):
                    return chunk[start - begin : stop - begin]
                known = begin + len(chunk)
        raise NeedBytes([ByteRange(known, stop - known)])
