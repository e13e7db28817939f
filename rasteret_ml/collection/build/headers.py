"""Read the headers of TIFF files over a `RangeReader`: one file, or very many at once."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from rasteret_ml.cog.header.ifd import NeedBytes, SparseFile
from rasteret_ml.cog.header.parse import CogHeader, parse_header
from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.cog.tile_table import Sidecar
from rasteret_ml.errors import (
    AccessDeniedError,
    CorruptTiffError,
    DataError,
    FetchNotFoundError,
    NotATiffError,
    RasteretError,
    redact,
)
from rasteret_ml.ranges import ByteRange, CoalesceLimits, coalesce
from rasteret_ml.raster.engine import gather_or_cancel
from rasteret_ml.storage.reader import RangeReader
from rasteret_ml.storage.urls import is_remote, local_path, sidecar_href

_log = logging.getLogger(__name__)

#: Length of the first request: the whole header of a usual scene (10980 pixels square in 512-pixel tiles: 6 KiB).
FIRST_BYTES = 32 * 1024
_MIN_BYTES = 8 * 1024
_MAX_ROUNDS = 256
_MAX_PARSED_TOGETHER = 32
_UNKNOWN_SIZE = 1 << 62
# Extents of a header are small: a request costs more than the bytes between two of them.
_COALESCE = CoalesceLimits(waste=16.0)
_SidecarHeader = tuple[CogHeader, Sidecar]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpenedFile:
    """A parsed header, with what the server says about the file."""

    header: CogHeader  #: The parsed header.
    size: int | None  #: Length of the file in bytes.
    etag: str | None  #: Version tag of the file.

    def band(self, index: int) -> CogMetadata:
        """Metadata of band `index` (from 0)."""
        return self.header.band(index, file_size=self.size, etag=self.etag)


async def read_headers(
    reader: RangeReader,
    hrefs: Sequence[str],
    on_result: Callable[[str, OpenedFile | RasteretError], Awaitable[None]],
    *,
    sidecars: bool | None,
    max_concurrent: int,
    progress: bool,
) -> None:
    """Read many headers, started in the order of `hrefs`, and pass on each header or error as it arrives.

    `max_concurrent` tasks read one file after another; a task starts its next file once `on_result` has returned, and
    an exception from it cancels all. `sidecars`: look for `.ovr` and `.msk` files; None = only beside local files.
    """
    parser, queue = HeaderParser(), iter(hrefs)

    async def work(bar: tqdm) -> None:
        for href in queue:
            result: OpenedFile | RasteretError
            try:
                with_sidecars = _has_local_sidecar(href) if sidecars is None else sidecars
                result = await read_header(reader, href, sidecars=with_sidecars, parser=parser)
            except RasteretError as error:
                result = error
            await on_result(href, result)
            bar.update()

    with tqdm(total=len(hrefs), desc="headers", unit="file", disable=not progress) as bar:
        await gather_or_cancel([work(bar) for _ in range(min(max_concurrent, len(hrefs)))])


def _has_local_sidecar(href: str) -> bool:
    return not is_remote(href) and any(os.path.exists(local_path(href) + suffix) for suffix in (".ovr", ".msk"))


async def read_header(
    reader: RangeReader, href: str, *, sidecars: bool = False, parser: HeaderParser | None = None
) -> OpenedFile:
    """Fetch and parse one header: `FIRST_BYTES`, then exactly the extents that are missing.

    `sidecars`: look for overviews (`.ovr`) and a mask (`.msk`) beside a file that has none inside, as GDAL does; up to
    three more requests. `parser` is shared between concurrent reads. A `DataError` names the file, its subclass why.
    """
    parser = parser or HeaderParser()
    opened = await _read_one(reader, href, parser)
    if not sidecars:
        return opened
    header = opened.header
    if header.mask is None:
        mask = await _read_sidecar(reader, href, ".msk", parser)
        if mask is not None:
            header = header.with_mask(*mask)
            overviews = None if header.overview_masks else await _read_overviews(reader, href, ".msk.ovr", parser)
            if overviews is not None:
                header = header.with_mask_overviews(*overviews)
    if not header.overviews:
        overviews = await _read_overviews(reader, href, ".ovr", parser)
        if overviews is not None:
            header = header.with_overviews(*overviews)
    return replace(opened, header=header)


async def _read_sidecar(reader: RangeReader, href: str, suffix: str, parser: HeaderParser) -> _SidecarHeader | None:
    try:
        opened = await _read_one(reader, sidecar_href(href, suffix), parser)
    except (FetchNotFoundError, AccessDeniedError, NotATiffError):
        return None  # S3 answers 403 for a missing file; some servers send an HTML page instead of 404
    return opened.header, Sidecar(suffix=suffix, size=opened.size, etag=opened.etag)


async def _read_overviews(reader: RangeReader, href: str, suffix: str, parser: HeaderParser) -> _SidecarHeader | None:
    try:
        return await _read_sidecar(reader, href, suffix, parser)
    except DataError as error:  # overviews are optional: without them, full resolution is read
        _log.warning("the overviews beside a file are ignored: %s", error)
        return None


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
    # A directory and its values lie close together: fetching a few KiB at a time saves rounds.
    widened = [ByteRange(r.start, min(max(r.length, _MIN_BYTES), file.size - r.start)) for r in missing]
    spans = [merged.span for merged in coalesce(widened, _COALESCE)]
    for span, response in zip(spans, await asyncio.gather(*(reader.read(href, span) for span in spans)), strict=True):
        if not len(response.data):
            raise CorruptTiffError(f"{redact(href)}: the header continues at {span}, beyond the end of the file.")
        file.add(span.start, bytes(response.data))


class HeaderParser:
    """Parses headers on another thread, all that are waiting in one go: a thread switch costs half a parse.

    Belongs to one event loop. Concurrent reads share one, so that a loop with hundreds of requests in flight stays
    responsive.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[SparseFile, asyncio.Future[CogHeader]]] = deque()
        self._is_busy = False

    async def parse(self, file: SparseFile) -> CogHeader:
        """Parse a header; raises what `parse_header` does, such as `NeedBytes`."""
        future: asyncio.Future[CogHeader] = asyncio.get_running_loop().create_future()
        self._waiting.append((file, future))
        if not self._is_busy:
            self._start_batch()
        return await future

    def _start_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _MAX_PARSED_TOGETHER))]
        self._is_busy = bool(batch)
        if batch:
            parsing = asyncio.get_running_loop().run_in_executor(None, _parse_all, [file for file, _ in batch])
            parsing.add_done_callback(lambda done: self._finish_batch(done, [future for _, future in batch]))

    def _finish_batch(
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
                continue  # cancelled by its caller
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
        self._start_batch()


def _parse_all(files: Sequence[SparseFile]) -> list[CogHeader | Exception]:
    outcomes: list[CogHeader | Exception] = []
    for file in files:
        try:
            outcomes.append(parse_header(file))
        except Exception as error:
            outcomes.append(error)
    return outcomes
