"""What reads run on: the reader, the decode pool, the request limiter and the tile cache."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rasteret_ml.errors import UsageError
from rasteret_ml.ranges import CoalesceLimits
from rasteret_ml.raster.tile_cache import TileCache
from rasteret_ml.storage.open import SignHook, SigningReader
from rasteret_ml.storage.reader import FetchLimits, RangeReader, as_reader
from rasteret_ml.telemetry import Meter


async def gather_or_cancel(works: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await all; the first error cancels the others and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


class RequestLimiter:
    """A first-come, first-served semaphore over requests in flight and over bytes requested or not yet decoded.

    A single request of more than `max_bytes` runs alone. Belongs to one event loop.
    """

    def __init__(self, requests: int = 50, max_bytes: int = 128 * 1024 * 1024) -> None:
        self._free = requests
        self._free_bytes = self._limit = max_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait for room for a request of `size` bytes and hold it inside the block."""
        size = min(size, self._limit)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        self._wake()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():  # else cancelled while it was waiting
                self._free += 1
                self._free_bytes += size
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            size, granted = self._waiting[0]
            if not granted.done():  # else cancelled
                if not self._free or self._free_bytes < size:
                    return
                self._free -= 1
                self._free_bytes -= size
                granted.set_result(None)
            self._waiting.popleft()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Engine:
    """The shared machinery of reads on one event loop."""

    reader: RangeReader  #: Where bytes come from.
    pool: Executor | None = None  #: Where tiles are decoded; None = the loop's default threads.
    #: Requests and bytes in flight; shared by all reads on the loop.
    limiter: RequestLimiter = field(default_factory=RequestLimiter)
    #: Tiles in flight and cached; shared by all reads of the same files on the loop.
    tiles: TileCache = field(default_factory=TileCache)
    #: Whether to decode a tile only down to its last needed row: a third less work for chips smaller than tiles, but an
    #: error in the rest of the tile, and a checksum at its end, go unnoticed.
    stop_early: bool = False
    coalesce: CoalesceLimits = CoalesceLimits()  #: When neighbouring ranges become one request.
    meter: Meter = field(default_factory=Meter)  #: Counters.
    progress: Callable[[int], object] | None = None  #: Called with the number of tiles of each request as they land.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadConfig:
    """How bytes are read. Holds nothing that cannot travel to a worker process.

    Raises:
        UsageError: a limit below its minimum.
    """

    #: Called with each href just before it is read (must pickle, for spawned workers); the result is never stored.
    sign: SignHook | None = None
    #: Another source of bytes (see `as_reader`), such as an obstore store; None = the library's own reader.
    backend: Any = None
    limits: FetchLimits = FetchLimits()  #: Timeouts, retries and connections.
    max_concurrent: int = 50  #: Range requests in flight, in each process.
    #: Decoded tiles kept in each process, in bytes; 0 = none. Useful where chips of nearby batches share tiles: see
    #: `Locality`, and `DataLoader.stats()` for the hits.
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise UsageError(f"max_concurrent must be >= 1, got {self.max_concurrent}.")
        if self.cache_bytes < 0:
            raise UsageError(f"cache_bytes must be >= 0, got {self.cache_bytes}.")

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for configs that one engine serves; compares `sign` and `backend` by identity."""
        return id(self.sign), id(self.backend), self.limits, self.max_concurrent, self.cache_bytes

    def reader(self, own: RangeReader) -> RangeReader:
        """Return the backend, else the library's `own` reader, signing addresses where there is a hook."""
        reader = own if self.backend is None else as_reader(self.backend)
        return reader if self.sign is None else SigningReader(reader, self.sign)
