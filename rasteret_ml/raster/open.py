"""A file's header, over whatever reads ranges."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from rasteret_ml.cog.header import CogHeader, parse_header
from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.cog.sparse_file import NeedBytes, SparseFile
from rasteret_ml.errors import CorruptTiffError, DataError, redact
from rasteret_ml.fetch.reader import RangeReader
from rasteret_ml.ranges import ByteRange

__all__ = ["FIRST_BYTES", "OpenedFile", "read_header"]

FIRST_BYTES = 32 * 1024
"""The first request: the whole header of a usual scene (a 10980-pixel one in 512-pixel tiles needs 6 KiB)."""
_LEAST_BYTES = 8 * 1024
_MAX_ROUNDS = 64
_UNKNOWN_SIZE = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedFile:
    """A header with what the server said of the file."""

    header: CogHeader
    """The parsed header."""
    size: int | None
    """Bytes of the file."""
    etag: str | None
    """Its version tag."""

    def band(self, index: int) -> CogMetadata:
        """Metadata of band `index` (from 0)."""
        return self.header.band(index, file_size=self.size, etag=self.etag)


async def read_header(reader: RangeReader, href: str) -> OpenedFile:
    """Fetch and parse a header: `FIRST_BYTES`, then exactly the extents that are missing.

    Raises:
        DataError: a subclass says what is wrong with the file; the message names it.
        FetchError: the bytes could not be had.
    """
    first = await reader.read(href, ByteRange(0, FIRST_BYTES))
    file = SparseFile(_UNKNOWN_SIZE if first.size is None else first.size)
    file.add(0, bytes(first.data))
    for _ in range(_MAX_ROUNDS):
        try:
            header = await asyncio.to_thread(parse_header, file)
            return OpenedFile(header=header, size=first.size, etag=first.etag)
        except NeedBytes as need:
            # A directory is read in many small steps: a few KiB at a time saves round trips.
            span = ByteRange(need.range.start, min(max(need.range.length, _LEAST_BYTES), file.size - need.range.start))
        except DataError as error:
            raise type(error)(f"{redact(href)}: {error}") from error
        more = await reader.read(href, span)
        if not len(more.data):
            raise CorruptTiffError(f"{redact(href)}: the header goes on at {span}, where the file has no bytes.")
        file.add(span.start, bytes(more.data))
    raise CorruptTiffError(f"{redact(href)}: the header is scattered over more than {_MAX_ROUNDS} places.")
