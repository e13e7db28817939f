"""Files, by the same contract as HTTP."""

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

__all__ = ["LocalReader"]

_NO_WAIT: int = getattr(os, "RWF_NOWAIT", 0)


class LocalReader:
    """Reads ranges of local files; holds no file open between reads.

    What lies in the page cache is copied at once, without a thread: handing half a megabyte to another thread and
    back costs seven times the copy, most of it for memory that the thread's allocator gives back and takes again.
    Anything that would wait for a disk goes to the loop's thread pool.
    """

    def __init__(self, meter: Meter | None = None) -> None:
        self._meter = meter or Meter()
        self._threaded: set[str] = set() if _NO_WAIT else {""}
        """Folders on file systems that cannot say what they have at hand (network shares); "" = all of them."""

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        path = local_path(href)
        response = self._at_hand(path, span)
        if response is None:
            response = await asyncio.to_thread(_read, path, span)
        self._meter.add(requests=1, bytes_fetched=len(response.data))
        return response

    def _at_hand(self, path: str, span: ByteRange) -> RangeResponse | None:
        folder = os.path.dirname(path)
        if folder in self._threaded or "" in self._threaded:
            return None
        try:
            return _read(path, span, _NO_WAIT)
        except _NotAtHand as reason:
            if reason.never:
                self._threaded.add(folder)
            return None

    async def aclose(self) -> None:
        """Nothing to release."""


class _NotAtHand(Exception):  # noqa: N818 - a signal between two functions, never seen outside
    """The bytes would have to be waited for; `never`: here they always must be."""

    def __init__(self, *, never: bool) -> None:
        super().__init__()
        self.never = never


def _read(path: str, span: ByteRange, flags: int = 0) -> RangeResponse:
    try:
        with open(path, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if span.start >= stat.st_size and stat.st_size:
                raise FetchError(
                    f"{path}: {span} starts past the end of the file ({stat.st_size} bytes); if it was indexed with "
                    "more, it was rewritten: build the Collection again."
                )
            size = max(0, min(span.length, stat.st_size - span.start))
            store: Any = np.empty(size, np.uint8)  # not filled with zeros first, as a bytearray is
            buffer = memoryview(store)
            known = _fill(file.fileno(), buffer, span.start, flags)
    except FileNotFoundError:
        raise FetchNotFoundError(f"{path}: no such file.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise AccessDeniedError(f"{path}: cannot be read ({error.strerror}).") from None
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{path}: cannot be read ({error}).") from error
    return RangeResponse(
        data=buffer[:known].toreadonly(), size=stat.st_size, etag=f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
    )


def _fill(descriptor: int, buffer: memoryview, start: int, flags: int) -> int:
    """Read into `buffer`; how many bytes there were.

    Raises:
        _NotAtHand: with `flags` RWF_NOWAIT, not all of them are in memory.
    """
    if not flags:
        known = 0
        while known < len(buffer) and (count := os.preadv(descriptor, [buffer[known:]], start + known)):
            known += count
        return known
    try:
        known = os.preadv(descriptor, [buffer], start, flags) if len(buffer) else 0
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise _NotAtHand(never=error.errno != errno.EAGAIN) from None
        raise
    if known < len(buffer):
        raise _NotAtHand(never=False)
    return known
