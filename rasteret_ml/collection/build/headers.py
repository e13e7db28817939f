"""Many headers at once: bounded, tolerant, reported."""


from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from tqdm import tqdm
from rasteret_ml.errors import RasteretError
from rasteret_ml.storage.reader import RangeReader
from rasteret_ml.storage.urls import is_remote, local_path
from rasteret_ml.raster.engine import gather_or_cancel
import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from rasteret_ml.cog.header.parse import CogHeader, parse_header
from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.cog.header.ifd import NeedBytes, SparseFile
from rasteret_ml.cog.tile_table import Sidecar
from rasteret_ml.errors import (
    AccessDeniedError,
    CorruptTiffError,
    DataError,
    FetchNotFoundError,
    NotATiffError,
    redact,
)
from rasteret_ml.storage.reader import RangeReader
from rasteret_ml.storage.urls import sidecar_href
from rasteret_ml.ranges import ByteRange, CoalesceLimits, coalesce

__all__ = ["FIRST_BYTES", "HeaderParser", "OpenedFile", "read_header", "read_headers"]

_log = logging.getLogger(__name__)

FIRST_BYTES = 32 * 1024
"""The first request: the whole header of a usual scene (a 10980-pixel one in 512-pixel tiles needs 6 KiB)."""
_LEAST_BYTES = 8 * 1024
_MAX_ROUNDS = 256
_MOST_AT_ONCE = 32
"""Headers parsed between two looks at the loop."""
_UNKNOWN_SIZE = 1 << 62
_TOGETHER = CoalesceLimits(waste=16.0)
"""Pieces of a header are small: a request costs more than the bytes between two of them."""


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


class HeaderParser:
    """Parses headers on another thread, those that wait together in one go: a hop costs as much as half a parse.

    For one event loop. Many reads share one, so that a loop with hundreds of requests in flight stays free to serve
    them.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[SparseFile, asyncio.Future[CogHeader]]] = deque()
        self._busy = False

    async def parse(self, file: SparseFile) -> CogHeader:
        """See `parse_header`.

        Raises:
            NeedBytes, DataError: as `parse_header`.
        """
        future: asyncio.Future[CogHeader] = asyncio.get_running_loop().create_future()
        self._waiting.append((file, future))
        if not self._busy:
            self._start()
        return await future

    def _start(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MOST_AT_ONCE))]
        self._busy = bool(batch)
        if not batch:
            return
        parsing = asyncio.get_running_loop().run_in_executor(None, _parse_all, [file for file, _ in batch])
        parsing.add_done_callback(lambda done: self._deliver(done, [future for _, future in batch]))

    def _deliver(
        self, done: asyncio.Future[list[CogHeader | Exception]], futures: Sequence[asyncio.Future[CogHeader]]
    ) -> None:
        if done.cancelled():  # the loop is closing
            for future in futures:
                future.cancel()
            return
        failure = done.exception()
        outcomes = [failure] * len(futures) if failure is not None else done.result()
        for future, outcome in zip(futures, outcomes, strict=True):
            if future.done():
                continue  # nobody waits any longer
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        self._start()


def _parse_all(files: Sequence[SparseFile]) -> list[CogHeader | Exception]:
    found: list[CogHeader | Exception] = []
    for file in files:
        try:
            found.append(parse_header(file))
        except Exception as error:
            found.append(error)
    return found


async def read_header(
    reader: RangeReader, href: str, *, sidecars: bool = False, parser: HeaderParser | None = None
) -> OpenedFile:
    """Fetch and parse a header: `FIRST_BYTES`, then exactly the extents that are missing.

    Args:
        reader: Where bytes come from.
        href: The file.
        sidecars: Also look for overviews (`.ovr`) and a mask (`.msk`) beside a file that has none inside, as GDAL
            does: up to three requests more.
        parser: Shared by the reads of many headers at once.

    Raises:
        DataError: a subclass says what is wrong with the file; the message names it.
        FetchError: the bytes could not be had.
    """
    parser = parser or HeaderParser()
    opened = await _read_one(reader, href, parser)
    if not sidecars:
        return opened
    header = opened.header
    if header.mask is None:
        mask = await _read_sidecar(reader, href, ".msk", parser)
        if mask is not None:
            header = header.with_mask(mask.header, _sidecar(mask, ".msk"))
            reduced = None if header.overview_masks else await _read_overviews(reader, href, ".msk.ovr", parser)
            if reduced is not None:
                header = header.with_mask_overviews(reduced.header, _sidecar(reduced, ".msk.ovr"))
    if not header.overviews:
        overviews = await _read_overviews(reader, href, ".ovr", parser)
        if overviews is not None:
            header = header.with_overviews(overviews.header, _sidecar(overviews, ".ovr"))
    return OpenedFile(header=header, size=opened.size, etag=opened.etag)


async def _read_sidecar(reader: RangeReader, href: str, suffix: str, parser: HeaderParser) -> OpenedFile | None:
    try:
        return await _read_one(reader, sidecar_href(href, suffix), parser)
    except (FetchNotFoundError, AccessDeniedError, NotATiffError):
        return None  # S3 answers 403 for what is not there; some servers send a page instead of 404


async def _read_overviews(reader: RangeReader, href: str, suffix: str, parser: HeaderParser) -> OpenedFile | None:
    try:
        return await _read_sidecar(reader, href, suffix, parser)
    except DataError as error:  # an overview is a convenience: without it pixels are read from full resolution
        _log.warning("overviews beside a file are not used: %s", error)
        return None


def _sidecar(opened: OpenedFile, suffix: str) -> Sidecar:
    return Sidecar(suffix=suffix, size=opened.size, etag=opened.etag)


async def _read_one(reader: RangeReader, href: str, parser: HeaderParser) -> OpenedFile:
    first = await reader.read(href, ByteRange(0, FIRST_BYTES))
    file = SparseFile(_UNKNOWN_SIZE if first.size is None else first.size)
    file.add(0, bytes(first.data))
    for _ in range(_MAX_ROUNDS):
        try:
            header = await parser.parse(file)
            return OpenedFile(header=header, size=first.size, etag=first.etag)
        except NeedBytes as need:
            missing = need.ranges
        except DataError as error:
            raise type(error)(f"{redact(href)}: {error}") from error
        await _fetch(reader, href, file, missing)
    raise CorruptTiffError(f"{redact(href)}: the header is scattered over more than {_MAX_ROUNDS} places.")


async def _fetch(reader: RangeReader, href: str, file: SparseFile, missing: Sequence[ByteRange]) -> None:
    # A directory and its values lie close together: a few KiB at a time saves rounds.
    wide = [ByteRange(r.start, min(max(r.length, _LEAST_BYTES), file.size - r.start)) for r in missing]
    spans = [merged.span for merged in coalesce(wide, _TOGETHER)]
    for span, answer in zip(spans, await asyncio.gather(*(reader.read(href, span) for span in spans)), strict=True):
        if not len(answer.data):
            raise CorruptTiffError(f"{redact(href)}: the header goes on at {span}, where the file has no bytes.")
        file.add(span.start, bytes(answer.data))




async def read_headers(
    reader: RangeReader,
    hrefs: Sequence[str],
    take: Callable[[str, OpenedFile | RasteretError], Awaitable[None]],
    *,
    sidecars: bool | None,
    max_concurrent: int,
    progress: bool,
) -> None:
    """Give `take` every file's header, or the reason why there is none, as they come.

    There are `max_concurrent` tasks, however many files: each reads one file after another, and the next only once
    `take` has done with the last.

    Args:
        reader: Where bytes come from.
        hrefs: The files, in the order in which they are begun.
        take: Called with each address and what was found there; what it raises ends the whole.
        sidecars: Look for `.ovr` and `.msk` beside files; None = those that local files have.
        max_concurrent: Files in flight.
        progress: Show a progress bar.
    """
    parser, queue = HeaderParser(), iter(hrefs)

    async def work(bar: tqdm) -> None:
        for href in queue:
            result: OpenedFile | RasteretError
            try:
                beside = _has_sidecar(href) if sidecars is None else sidecars
                result = await read_header(reader, href, sidecars=beside, parser=parser)
            except RasteretError as error:
                result = error
            await take(href, result)
            bar.update()

    with tqdm(total=len(hrefs), desc="headers", unit="file", disable=not progress) as bar:
        await gather_or_cancel([work(bar) for _ in range(min(max_concurrent, len(hrefs)))])


def _has_sidecar(href: str) -> bool:
    return not is_remote(href) and any(os.path.exists(local_path(href) + suffix) for suffix in (".ovr", ".msk"))


