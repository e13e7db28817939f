"""Plans to pixels: one fetch for all plans of a batch, decoding while bytes still arrive.

Each tile is fetched and decoded once, however many chips and bands it serves; its pixels go straight from
the decoder's scratch into every chip that wants them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.decode import decode_tile
from rasteret_ml.errors import (
    AccessDeniedError,
    DataError,
    FetchError,
    FetchNotFoundError,
    RangeNotSupportedError,
    RasteretError,
    ReadError,
    redact,
)
from rasteret_ml.ranges import ByteRange, CoalesceLimits, MergedRange, coalesce
from rasteret_ml.raster.assemble import ChipBuffers, allocate, empty_chip, finish
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.jobs import (
    TileJob,
    check_tile,
    check_unchanged,
    copy_tile,
    tile_jobs,
    tile_payload,
    wanted_part,
)
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.tile_cache import DecodedTile, InFlightTile, TileSchedule, TileStore
from rasteret_ml.storage.reader import RangeReader, RangeResponse
from rasteret_ml.telemetry import Meter

__all__ = ["Engine", "ReadResult", "RequestLimiter", "TileError", "execute", "gather_or_cancel"]


async def gather_or_cancel(works: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await all; the first failure cancels the others and is raised as itself."""
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
    """A semaphore over two things at once; used on one loop.

    Args:
        requests: Requests in flight.
        held_bytes: Bytes asked for or waiting to be decoded. A single request that is larger runs alone.
    """

    def __init__(self, requests: int = 50, held_bytes: int = 128 * 1024 * 1024) -> None:
        self._free = requests
        self._free_bytes = self._limit = held_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait for room for a request of `size` bytes, and keep it inside the block."""
        size = min(size, self._limit)
        if self._waiting or not self._fits(size):
            await self._turn(size)
        else:
            self._take(size)
        try:
            yield
        finally:
            self._give(size)

    async def _turn(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(size)  # it was granted in the same step as it was cancelled
            else:
                self._wake()
            raise

    def _fits(self, size: int) -> bool:
        return self._free > 0 and self._free_bytes >= size

    def _take(self, size: int) -> None:
        self._free -= 1
        self._free_bytes -= size

    def _give(self, size: int) -> None:
        self._free += 1
        self._free_bytes += size
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if turn.done():  # cancelled
                self._waiting.popleft()
                continue
            if not self._fits(size):
                return
            self._waiting.popleft()
            self._take(size)
            turn.set_result(None)


_T = TypeVar("_T")

_SMALL = 256 * 1024
"""Compressed bytes that are worth a hop to the decode pool."""
_HOP = 4
"""Chips, or kept tiles, that share a hop."""
_OF_A_FILE = (DataError, FetchNotFoundError, AccessDeniedError, RangeNotSupportedError)
"""What is wrong with any request for a part of a file, if it is with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an execution runs on."""

    reader: RangeReader
    """Where bytes come from."""
    pool: Executor | None = None
    """Where tiles are decoded; None = the loop's default threads."""
    slots: RequestLimiter = field(default_factory=RequestLimiter)
    """Requests and bytes in flight; shared by all that runs on a loop."""
    tiles: TileStore = field(default_factory=TileStore)
    """Tiles in flight and kept; shared by all that reads the same files on a loop."""
    stop_early: bool = False
    """Whether a tile is decoded no further than its rows are wanted: a third less work for chips smaller than tiles,
    but an error in the rest of a tile, and a checksum at its end, go unnoticed."""
    coalesce: CoalesceLimits = CoalesceLimits()
    """When ranges become one request."""
    meter: Meter = field(default_factory=Meter)
    """Counters."""
    progress: Callable[[int], object] | None = None
    """Called with the number of tiles that a request brought, as they land."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileError:
    """One tile that could not be had."""

    record: str
    """Record id."""
    band: str
    """Band name."""
    href: str
    """Address without secrets."""
    image: str
    """Which image of the file: "full resolution", "overview 1", "mask of overview 1" …"""
    tile: int
    """Tile index in that image, row-major."""
    range: ByteRange
    """Its bytes."""
    error: RasteretError
    """Why."""
    plans: tuple[int, ...] = ()
    """Which of the plans that were read wanted it, by place."""

    def __str__(self) -> str:
        return (
            f"record {self.record}, band {self.band}, {self.href}, {self.image}, tile {self.tile}, {self.range}: "
            f"{type(self.error).__name__}: {self.error}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadResult:
    """Chips in the order of their plans, and what failed (empty unless failures were allowed)."""

    chips: tuple[Chip, ...]
    """One per plan."""
    failures: tuple[TileError, ...]
    """Tiles whose pixels are missing: fill value, invalid."""


async def execute(
    plans: Sequence[ChipPlan],
    engine: Engine,
    *,
    into: Sequence[npt.NDArray[Any] | None] | None = None,
    allow_failures: bool = False,
    whole: bool = False,
) -> ReadResult:
    """Read all plans together.

    Args:
        plans: What to read.
        engine: What to run on.
        into: Per plan an array `[C, H, W]` of its dtype that becomes the chip's data, or None for a new one.
        allow_failures: Whether tiles may fail; those are listed in the result.
        whole: Where tiles may fail: a chip that lacks one has no valid pixel, instead of those that came. To note which
            came costs a tenth of the work.

    Raises:
        ReadError: a tile could not be fetched or decoded and failures are not allowed; the other requests
            are cancelled. The message names record, band, address, tile, byte range and cause.
    """
    targets = into if into is not None else [None] * len(plans)
    track = allow_failures and not whole
    with engine.meter.track("assemble"):
        pairs = zip(plans, targets, strict=True)
        buffers = [allocate(plan, target, track_unread=track) for plan, target in pairs]
        jobs = tile_jobs(plans, buffers)
    reading = _Reading(engine, buffers, [] if allow_failures else None)
    await reading.run(jobs)
    chips = await reading.finish(plans, whole)
    engine.meter.add(chips=len(chips))
    return ReadResult(chips=tuple(chips), failures=tuple(reading.failures or ()))


class _Reading:
    """One execution: its engine, where pixels go, and what failed (None: the first failure raises)."""

    def __init__(self, engine: Engine, buffers: Sequence[ChipBuffers], failures: list[TileError] | None) -> None:
        self._engine = engine
        self._buffers = buffers
        self.failures = failures

    async def run(self, jobs: Sequence[TileJob]) -> None:
        """Bring all tiles; what another batch was reading and gave up is read in the next round."""
        refused = [(job, error) for job in jobs if (error := check_tile(job)) is not None]
        self._report(refused)
        bad = {id(job) for job, _ in refused}
        left = [job for job in jobs if id(job) not in bad]
        while left:
            boarding = self._engine.tiles.schedule(left)
            abandoned: list[TileJob] = []
            try:
                await gather_or_cancel(
                    [
                        *(self._serve(*request) for request in _requests(boarding.own, self._engine.coalesce)),
                        *(self._paste_kept(boarding, i) for i in range(0, len(boarding.kept), _HOP)),
                        *([self._await_others(boarding, abandoned)] if boarding.joined else []),
                    ]
                )
            finally:  # also of what was never started
                self._engine.tiles.abandon(boarding.own)
            left = abandoned

    async def _serve(self, href: str, merged: MergedRange, flights: list[InFlightTile]) -> None:
        """Fetch one merged range and decode the tiles in it."""
        if await self._fetch_and_decode(href, merged, flights):
            return
        # Each tile by itself, so that a tile's failing is its own, and not that of what it was fetched with.
        alone = [MergedRange(flight.job.range, (0,)) for flight in flights]
        await gather_or_cancel([self._serve(href, one, [flight]) for one, flight in zip(alone, flights, strict=True)])

    async def _fetch_and_decode(self, href: str, merged: MergedRange, flights: list[InFlightTile]) -> bool:
        """Whether it was done; not where many tiles cannot be had together, but may be apart."""
        engine = self._engine
        async with engine.slots.hold(merged.span.length):  # while decoding too: it bounds the bytes that wait
            try:
                with engine.meter.track("fetch"):
                    response = await engine.reader.read(href, merged.span)
                _check(response, flights, href, merged.span)
            except (FetchError, DataError) as error:
                if len(flights) > 1 and self.failures is not None and not isinstance(error, _OF_A_FILE):
                    return False
                self._end((flight, error) for flight in flights)
                return True
            body, start = memoryview(response.data), merged.span.start
            decoding = []
            for chunk in _chunks(flights):
                decoding.append(self._in_pool(partial(_decode_chunk, chunk, body, start, engine)))
                decoding[-1].add_done_callback(partial(self._decoded, chunk))
            # Shielded: a thread cannot be stopped, and what it decodes may be others' as well.
            for outcome in await asyncio.gather(*map(asyncio.shield, decoding)):
                self._report([(flight.job, error) for flight, error in outcome if error is not None])
        if engine.progress is not None:
            engine.progress(len(flights))
        return True

    def _decoded(
        self, flights: list[InFlightTile], work: asyncio.Future[list[tuple[InFlightTile, RasteretError | None]]]
    ) -> None:
        """Ends flights when their thread has, also where nobody of this batch waits any more."""
        if work.cancelled() or work.exception() is not None:
            self._engine.tiles.abandon(flights, taken=True)
            return
        for flight, error in work.result():
            self._engine.tiles.end(flight, error)

    async def _paste_kept(self, boarding: TileSchedule, start: int) -> None:
        kept = boarding.kept[start : start + _HOP]

        def paste() -> None:
            with self._engine.meter.track("assemble"):
                for job, tile in kept:
                    copy_tile(job.pastes, tile.pixels, tile.valid)

        await self._in_pool(paste)
        self._engine.meter.add(cache_hits=len(kept))
        if self._engine.progress is not None:
            self._engine.progress(len(kept))

    async def _await_others(self, boarding: TileSchedule, abandoned: list[TileJob]) -> None:
        failed = []
        for job, flight in boarding.joined:
            await asyncio.wait([flight.ended])
            if flight.ended.cancelled():
                abandoned.append(job)
            elif (error := flight.ended.result()) is not None:
                failed.append((job, error))
        landed = len(boarding.joined) - len(abandoned)
        self._engine.meter.add(tiles_shared=landed)
        self._report(failed)
        if self._engine.progress is not None:
            self._engine.progress(landed)

    async def finish(self, plans: Sequence[ChipPlan], whole: bool) -> list[Chip]:
        """The chips of buffers that are full."""
        pairs = list(zip(plans, self._buffers, strict=True))
        lost = {place for failure in self.failures or () for place in failure.plans} if whole else set()
        meter = self._engine.meter

        def some(start: int) -> list[Chip]:
            began = time.perf_counter()
            places = range(start, min(start + _HOP, len(pairs)))
            with meter.track("assemble"):
                chips = [(empty_chip if i in lost else finish)(*pairs[i]) for i in places]
            meter.add(assemble_seconds=time.perf_counter() - began)
            return chips

        done = await asyncio.gather(*(self._in_pool(partial(some, i)) for i in range(0, len(pairs), _HOP)))
        return [chip for chips in done for chip in chips]

    def _end(self, outcomes: Any) -> None:
        found = list(outcomes)
        for flight, error in found:
            self._engine.tiles.end(flight, error)
        self._report([(flight.job, error) for flight, error in found if error is not None])

    def _report(self, failed: Sequence[tuple[TileJob, RasteretError]]) -> None:
        for job, error in failed:
            failure = TileError(
                record=job.source.record,
                band=job.source.band,
                href=redact(job.href),
                image=job.image,
                tile=job.read.index,
                range=job.stored,
                error=error,
                plans=_wanted_by(job, self._buffers),
            )
            if self.failures is None:
                raise ReadError(str(failure)) from error
            self.failures.append(failure)

    def _in_pool(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        return asyncio.get_running_loop().run_in_executor(self._engine.pool, work)


def _wanted_by(job: TileJob, buffers: Sequence[ChipBuffers]) -> tuple[int, ...]:
    """The chips, by place, that pixels of a tile go to."""
    targets = {id(paste.target) for paste in job.pastes}
    held = [[id(where) for band in chip.bands for where in (band.data, band.mask)] for chip in buffers]
    return tuple(i for i, own in enumerate(held) if not targets.isdisjoint(own))


def _requests(
    flights: Sequence[InFlightTile], limits: CoalesceLimits
) -> list[tuple[str, MergedRange, list[InFlightTile]]]:
    by_href: dict[str, list[InFlightTile]] = {}
    for flight in flights:
        by_href.setdefault(flight.job.href, []).append(flight)
    return [
        (href, merged, [found[i] for i in merged.parts])
        for href, found in by_href.items()
        for merged in coalesce([flight.job.range for flight in found], limits)
    ]


def _check(response: RangeResponse, flights: Sequence[InFlightTile], href: str, span: ByteRange) -> None:
    check_unchanged(flights[0].job, response)
    if len(response.data) < span.length:
        raise FetchError(f"{redact(href)}: {len(response.data)} bytes came for {span}.")


def _chunks(flights: Sequence[InFlightTile]) -> list[list[InFlightTile]]:
    """Tiles in groups of about `_SMALL` compressed bytes, so that tiny ones share a hop to the pool."""
    chunks: list[list[InFlightTile]] = [[]]
    held = 0
    for flight in flights:
        if held >= _SMALL:
            chunks.append([])
            held = 0
        chunks[-1].append(flight)
        held += flight.job.range.length
    return chunks


def _decode_chunk(
    flights: Sequence[InFlightTile], body: memoryview, start: int, engine: Engine
) -> list[tuple[InFlightTile, RasteretError | None]]:
    began = time.perf_counter()
    with engine.meter.track("decode"):
        outcomes = _decode(flights, body, start, engine.tiles, engine.stop_early)
    engine.meter.add(
        tiles_decoded=sum(error is None for _, error in outcomes),
        bytes_used=sum(flight.job.range.length for flight, _ in outcomes),
        decode_seconds=time.perf_counter() - began,
    )
    return outcomes


def _decode(
    flights: Sequence[InFlightTile], body: memoryview, start: int, tiles: TileStore, stop_early: bool
) -> list[tuple[InFlightTile, RasteretError | None]]:
    outcomes: list[tuple[InFlightTile, RasteretError | None]] = []
    for flight in flights:
        job = flight.job
        offset, read = job.range.start - start, job.read
        pastes = tiles.take(flight)
        if pastes is None:
            continue
        part = None if tiles.cache_bytes else wanted_part(pastes)
        try:
            data = tile_payload(job, body[offset : offset + job.range.length])
            size = read.stored_rows, read.image_rows, read.image_cols
            pixels, valid = decode_tile(data, job.table, *size, part, stop_early=stop_early)
        except DataError as error:
            outcomes.append((flight, error))
            continue
        copy_tile(pastes, pixels, valid)
        if tiles.cache_bytes:
            tiles.keep(flight, DecodedTile(np.array(pixels), None if valid is None else np.array(valid)))
        outcomes.append((flight, None))
    return outcomes
