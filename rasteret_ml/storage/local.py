"""Local files behind the same protocol as HTTP."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any

import numpy as np

from rasteret_ml.errors import AccessDeniedError, FetchError, FetchNotFoundError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.storage.urls import local_path
from rasteret_ml.telemetry import Meter

_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)


class LocalReader:
    """Reads ranges of local files; keeps no file open between reads.

    Bytes in the page cache are copied at once, without a thread: passing half a megabyte through a thread costs seven
    times the copy, mostly for memory that its allocator frees and allocates again. A read that would wait for a
    disk runs in the loop's thread pool.
    """

    def __init__(self, meter: Meter | None = None) -> None:
        self._meter = meter or Meter()
        # Folders whose file system cannot tell what is cached (network shares); "" = all folders.
        self._threaded: set[str] = set() if _NO_WAIT else {""}

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        path = local_path(href)
        response = self._read_cached(path, span)
        if response is None:
            response = await asyncio.to_thread(_read, path, span)
        self._meter.add(requests=1, bytes_fetched=len(response.data))
        return response

    def _read_cached(self, path: str, span: ByteRange) -> RangeResponse | None:
        """The bytes if they are in the page cache, else None."""
        folder = os.path.dirname(path)
        if folder in self._threaded or "" in self._threaded:
            return None
        try:
            return _read(path, span, _NO_WAIT)
        except _NotCached as error:
            if error.errno != errno.EAGAIN:
                self._threaded.add(folder)
            return None

    async def aclose(self) -> None:
        """Do nothing: no file is kept open."""


class _NotCached(OSError):  # noqa: N818 - a signal between two functions of this file
    """Not all bytes are in the page cache (EAGAIN), or the file system cannot tell (other numbers)."""


def _read(path: str, span: ByteRange, flags: int = 0) -> RangeResponse:
    try:
        with open(path, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if span.start >= stat.st_size and stat.st_size:
                raise FetchError(
                    f"{path}: {span} starts past the end of the file ({stat.st_size} bytes); if the file was rewritten "
                    "after it was indexed, build the Collection again."
                )
            size = max(0, min(span.length, stat.st_size - span.start))
            memory: Any = np.empty(size, np.uint8)  # unlike a bytearray, not filled with zeros first
            buffer = memoryview(memory)
            count = _fill(file.fileno(), buffer, span.start, flags)
    except FileNotFoundError:
        raise FetchNotFoundError(f"{path}: no such file.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise AccessDeniedError(f"{path}: cannot be read ({error.strerror}).") from None
    except (FetchError, _NotCached):
        raise
    except OSError as error:
        raise FetchError(f"{path}: cannot be read ({error}).") from error
    etag = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
    return RangeResponse(data=buffer[:count].toreadonly(), size=stat.st_size, etag=etag)


def _fill(descriptor: int, buffer: memoryview, start: int, flags: int) -> int:
    """Read from offset `start` into `buffer` and return the number of bytes; `_NotCached` if RWF_NOWAIT has to wait."""
    if not flags:
        total = 0
        while total < len(buffer) and (count := os.preadv(descriptor, [buffer[total:]], start + total)):
            total += count
        return total
    try:
        total = os.preadv(descriptor, [buffer], start, flags) if len(buffer) else 0
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise _NotCached(error.errno, "not cached") from None
        raise
    if total < len(buffer):
        raise _NotCached(errno.EAGAIN, "partly cached")
    return total
