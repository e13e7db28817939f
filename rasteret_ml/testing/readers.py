"""Readers that need no network, and one that keeps a record."""

from __future__ import annotations

from collections.abc import Mapping

from rasteret_ml.errors import FetchError, FetchNotFoundError
from rasteret_ml.fetch.reader import RangeReader, RangeResponse
from rasteret_ml.ranges import ByteRange

__all__ = ["MemoryReader", "RecordingReader"]


class MemoryReader:
    """Reads from byte strings by address."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        if href not in self._files:
            raise FetchNotFoundError(f"{href}: no such file.")
        data = self._files[href]
        if span.start >= len(data) > 0:
            raise FetchError(f"{href}: {span} starts past the end of the file ({len(data)} bytes).")
        return RangeResponse(data=data[span.start : span.stop], size=len(data))

    async def aclose(self) -> None:
        """Nothing to release."""


class RecordingReader:
    """A reader around a reader that remembers every call."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.calls: list[tuple[str, ByteRange]] = []
        """(address, range) of every read, in order."""

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        self.calls.append((href, span))
        return await self._reader.read(href, span)

    async def aclose(self) -> None:
        """Close the reader inside."""
        await self._reader.aclose()
