"""Files, by the same contract as HTTP."""

from __future__ import annotations

import asyncio
import os

from rasteret_ml.errors import AccessDeniedError, FetchError, FetchNotFoundError
from rasteret_ml.fetch.reader import RangeResponse
from rasteret_ml.fetch.urls import local_path
from rasteret_ml.ranges import ByteRange
from rasteret_ml.telemetry import Meter

__all__ = ["LocalReader"]


class LocalReader:
    """Reads ranges of local files in the loop's thread pool; holds no file open between reads."""

    def __init__(self, meter: Meter | None = None) -> None:
        self._meter = meter or Meter()

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        response = await asyncio.to_thread(_read, local_path(href), span)
        self._meter.add(requests=1, bytes_fetched=len(response.data))
        return response

    async def aclose(self) -> None:
        """Nothing to release."""


def _read(path: str, span: ByteRange) -> RangeResponse:
    try:
        with open(path, "rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if span.start >= stat.st_size and stat.st_size:
                raise FetchError(
                    f"{path}: {span} starts past the end of the file ({stat.st_size} bytes); if it was indexed with "
                    "more, it was rewritten: build the Collection again."
                )
            data = os.pread(file.fileno(), span.length, span.start)
    except FileNotFoundError:
        raise FetchNotFoundError(f"{path}: no such file.") from None
    except (PermissionError, IsADirectoryError) as error:
        raise AccessDeniedError(f"{path}: cannot be read ({error.strerror}).") from None
    except FetchError:
        raise
    except OSError as error:
        raise FetchError(f"{path}: cannot be read ({error}).") from error
    return RangeResponse(data=data, size=stat.st_size, etag=f"{stat.st_mtime_ns:x}-{stat.st_size:x}")
