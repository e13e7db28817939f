"""Readers for tests, and tests that every `RangeReader` must pass."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from rasteret_ml.errors import FetchError, FetchNotFoundError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.reader import RangeReader, RangeResponse

__all__ = ["MemoryReader", "RangeReaderSuite", "RecordingReader"]


class MemoryReader:
    """Read from byte strings by URL."""

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
    """Wrap a reader and record its calls."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.calls: list[tuple[str, ByteRange]] = []
        """(URL, range) of every read, in order."""

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        self.calls.append((href, span))
        return await self._reader.read(href, span)

    async def aclose(self) -> None:
        """Close the wrapped reader."""
        await self._reader.aclose()


class RangeReaderSuite:
    """Tests of a `RangeReader`: subclass as `class TestMyReader(RangeReaderSuite)` and implement `make`."""

    content = bytes(range(256)) * 40
    """Content of the file that `make` provides."""

    def make(self) -> tuple[RangeReader, str, str]:
        """Return a new reader, the URL of a file with `content`, and the URL of no file."""
        raise NotImplementedError

    def _read(self, *spans: ByteRange, missing: bool = False) -> list[bytes]:
        async def run() -> list[bytes]:
            reader, url, missing_url = self.make()
            try:
                found = [await reader.read(missing_url if missing else url, span) for span in spans]
                assert all(response.size in (None, len(self.content)) for response in found)
                return [bytes(response.data) for response in found]
            finally:
                await reader.aclose()

        return asyncio.run(run())

    def test_reads_exactly_the_range(self) -> None:
        """At the start, in the middle and at the end."""
        n = len(self.content)
        spans = [ByteRange(0, 1), ByteRange(17, 500), ByteRange(n - 3, 3), ByteRange(0, n)]
        assert self._read(*spans) == [self.content[s.start : s.stop] for s in spans]

    def test_a_range_past_the_end_comes_back_short(self) -> None:
        """The first request of a header may be larger than the file."""
        n = len(self.content)
        assert self._read(ByteRange(n - 10, 1000)) == [self.content[-10:]]

    def test_a_missing_file_is_a_fetch_error(self) -> None:
        """Not another error, and no data."""
        try:
            self._read(ByteRange(0, 10), missing=True)
        except FetchError:
            return
        raise AssertionError("a missing file was read")

    def test_a_range_beyond_the_end_is_a_fetch_error(self) -> None:
        """There are no bytes to return."""
        try:
            self._read(ByteRange(len(self.content) + 5, 10))
        except FetchError:
            return
        raise AssertionError("bytes past the end were read")
