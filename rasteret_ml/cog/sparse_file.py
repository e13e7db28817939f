"""A file of which only some bytes are known."""

from __future__ import annotations

import io
from typing import Any

from rasteret_ml.errors import CorruptTiffError
from rasteret_ml.ranges import ByteRange

__all__ = ["NeedBytes", "SparseFile"]

_MAX_READ = 256 * 1024 * 1024


class NeedBytes(Exception):  # noqa: N818 - a request, not an error
    """The header goes on in bytes that are not there yet."""

    def __init__(self, range: ByteRange) -> None:
        super().__init__(str(range))
        self.range = range


class SparseFile(io.RawIOBase):
    """A read-only file of which only some extents are known."""

    def __init__(self, size: int) -> None:
        """Make an empty one; `size` is the whole file's length in bytes."""
        self.size = size
        self.missing: ByteRange | None = None
        self._extents: list[tuple[int, bytes]] = []
        self._position = 0

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
        """
        stop = min(start + length, self.size)
        if stop <= start:
            return b""
        if stop - start > _MAX_READ:
            raise CorruptTiffError(f"a tag claims {stop - start} bytes")
        known = start
        for begin, chunk in self._extents:
            if begin <= start < begin + len(chunk):
                if stop <= begin + len(chunk):
                    return chunk[start - begin : stop - begin]
                known = begin + len(chunk)
        self.missing = ByteRange(known, stop - known)
        raise NeedBytes(self.missing)

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        data = self.peek(self._position, self.size if size < 0 else size)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """As a file's."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As a file's."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """As a file's."""
        return self._position

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True
