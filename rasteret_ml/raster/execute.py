"""Execute plans: one fetch for all plans of a batch, decoding while bytes still arrive.

Each tile is fetched and decoded once, however many chips and bands need it; its pixels go straight from the decoder's
scratch memory into every chip.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from rasteret_ml.raster.assemble import ChipBuffers, allocate, empty_chip, finish_chip
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.engine import Engine, gather_or_cancel
from rasteret_ml.raster.jobs import (
    TileJob,
    bounding_window,
    check_tile,
    check_unchanged,
    copy_tile,
    tile_jobs,
    tile_payload,
)
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.tile_cache import DecodedTile, InFlightTile, TileCache, TileSchedule
from rasteret_ml.storage.reader import RangeResponse

_T = TypeVar("_T")

# Compressed bytes per job of the decode pool; smaller jobs cost more to hand over than to run.
_CHUNK_BYTES = 256 * 1024
_CHUNK_CHIPS = 4  # Chips, or cached tiles, per job of the pool.
# Errors that every request for the same file would meet.
_FILE_ERRORS = (DataError, FetchNotFoundError, AccessDeniedError, RangeNotSupportedError)


@dataclass(frozen=True, slots=True, kw_only=True)
class TileError:
    """One tile that could not be read."""

    record: str  #: Record id.
    band: str  #: Band name.
    href: str  #: Address without secrets.
    image: str  #: Which image of the file: "full resolution", "overview 1", "mask of overview 1" …
    tile: int  #: Tile index in that image, row-major.
    range: ByteRange  #: Its bytes.
    error: RasteretError  #: Why.
    #: What needed it, by position: plans in `execute`, requests in `read_chips`, geometries in `load_bands`.
    positions: tuple[int, ...] = ()

    def __str__(self) -> str:
        return (
            f"record {self.record}, band {self.band}, {self.href}, {self.image}, tile {self.tile}, {self.range}: "
            f"{type(self.error).__name__}: {self.error}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExecuteResult:
    """Chips in the order of their plans, and the tiles that failed."""

    chips: list[Chip]  #: One per plan.
    errors: list[TileError]  #: Tiles that could not be read; empty unless errors were allowed.


async def execute(
    plans: Sequence[ChipPlan],
    engine: Engine,
    *,
    into: Sequence[npt.NDArray[Any] | None] | None = None,
    allow_errors: bool = False,
    drop_incomplete: bool = False,
) -> ExecuteResult:
    """Read all plans together.

    Args:
        plans: What to read.
        engine: What to run on.
        into: Per plan an array `[C, H, W]` of its dtype that becomes the chip's data, or None for a new one.
        allow_errors: Whether tiles may fail; the result lists those that did.
        drop_incomplete: Where tiles may fail: a chip that lacks one has no valid pixel, instead of the pixels that
            came. Tracking which came costs a tenth of the work.

    Raises:
        ReadError: a tile could not be fetched or decoded and errors are not allowed; the other requests are cancelled.
            The message names record, band, address, tile, byte range and cause.
    """
    targets = into if into is not None else [None] * len(plans)
    track = allow_errors and not drop_incomplete
    with engine.meter.track("assemble"):
        pairs = zip(plans, targets, strict=True)
        buffers = [allocate(plan, target, track_unread=track) for plan, target in pairs]
        jobs = tile_jobs(plans, buffers)
    execution = _Execution(engine, buffers, [] if allow_errors else None)
    await execution.run(jobs)
    chips = await execution.finish(plans, drop_incomplete)
    engine.meter.add(chips=len(chips))
    return ExecuteResult(chips=chips, errors=execution.errors or [])


class _Execution:
    """One call of `execute`: its engine, its buffers, and its errors (None: the first error raises)."""

    def __init__(self, engine: Engine, buffers: Sequence[ChipBuffers], errors: list[TileError] | None) -> None:
        self._engine = engine
        self._buffers = buffers
        self.errors = errors

    async def run(self, jobs: Sequence[TileJob]) -> None:
        """Read all tiles; tiles that another batch was reading and abandoned are read in the next round."""
        rejected = [(job, error) for job in jobs if (error := check_tile(job)) is not None]
        self._report(rejected)
        bad = {id(job) for job, _ in rejected}
        pending = [job for job in jobs if id(job) not in bad]
        while pending:
            schedule = self._engine.tiles.schedule(pending)
            abandoned: list[TileJob] = []
            try:
                await gather_or_cancel(
                    [
                        *(self._serve(*request) for request in _requests(schedule.own, self._engine.coalesce)),
                        *(self._copy_cached(schedule, i) for i in range(0, len(schedule.cached), _CHUNK_CHIPS)),
                        *([self._await_others(schedule, abandoned)] if schedule.joined else []),
                    ]
                )
            finally:  # including those never started
                self._engine.tiles.abandon(schedule.own)
            pending = abandoned

    async def _serve(self, href: str, merged: MergedRange, tiles: list[InFlightTile]) -> None:
        """Fetch one merged range and decode the tiles in it."""
        if await self._fetch_and_decode(href, merged, tiles):
            return
        # Each tile alone, so that one bad tile does not fail those it was merged with.
        alone = [MergedRange(tile.job.range, (0,)) for tile in tiles]
        await gather_or_cancel([self._serve(href, one, [tile]) for one, tile in zip(alone, tiles, strict=True)])

    async def _fetch_and_decode(self, href: str, merged: MergedRange, tiles: list[InFlightTile]) -> bool:
        """Return False where the tiles cannot be fetched together but may be one by one."""
        engine = self._engine
        async with engine.limiter.hold(merged.span.length):  # held while decoding too: it bounds the bytes that wait
            try:
                with engine.meter.track("fetch"):
                    response = await engine.reader.read(href, merged.span)
                _check(response, tiles, href, merged.span)
            except (FetchError, DataError) as error:
                if len(tiles) > 1 and self.errors is not None and not isinstance(error, _FILE_ERRORS):
                    return False
                self._end((tile, error) for tile in tiles)
                return True
            body, start = memoryview(response.data), merged.span.start
            decoding = []
            for chunk in _chunks(tiles):
                decoding.append(self._in_pool(partial(_decode_chunk, chunk, body, start, engine)))
                decoding[-1].add_done_callback(partial(self._decoded, chunk))
            # Shielded: a thread cannot be stopped, and other batches may need what it decodes.
            for outcome in await asyncio.gather(*map(asyncio.shield, decoding)):
                self._report([(tile.job, error) for tile, error in outcome if error is not None])
        if engine.progress is not None:
            engine.progress(len(tiles))
        return True

    def _decoded(
        self, tiles: list[InFlightTile], work: asyncio.Future[list[tuple[InFlightTile, RasteretError | None]]]
    ) -> None:
        """Mark tiles as ended when their thread has, even if this batch no longer waits."""
        if work.cancelled() or work.exception() is not None:
            self._engine.tiles.abandon(tiles, taken=True)
            return
        for tile, error in work.result():
            self._engine.tiles.end(tile, error)

    async def _copy_cached(self, schedule: TileSchedule, start: int) -> None:
        cached = schedule.cached[start : start + _CHUNK_CHIPS]

        def copy() -> None:
            with self._engine.meter.track("assemble"):
                for job, tile in cached:
                    copy_tile(job.copies, tile.pixels, tile.valid)

        await self._in_pool(copy)
        self._engine.meter.add(cache_hits=len(cached))
        if self._engine.progress is not None:
            self._engine.progress(len(cached))

    async def _await_others(self, schedule: TileSchedule, abandoned: list[TileJob]) -> None:
        failed = []
        for job, tile in schedule.joined:
            await asyncio.wait([tile.ended])
            if tile.ended.cancelled():
                abandoned.append(job)
            elif (error := tile.ended.result()) is not None:
                failed.append((job, error))
        landed = len(schedule.joined) - len(abandoned)
        self._engine.meter.add(tiles_shared=landed)
        self._report(failed)
        if self._engine.progress is not None:
            self._engine.progress(landed)

    async def finish(self, plans: Sequence[ChipPlan], drop_incomplete: bool) -> list[Chip]:
        """Turn the filled buffers into chips."""
        pairs = list(zip(plans, self._buffers, strict=True))
        lost = {i for error in self.errors or () for i in error.positions} if drop_incomplete else set()
        meter = self._engine.meter

        def finish_some(start: int) -> list[Chip]:
            began = time.perf_counter()
            positions = range(start, min(start + _CHUNK_CHIPS, len(pairs)))
            with meter.track("assemble"):
                chips = [(empty_chip if i in lost else finish_chip)(*pairs[i]) for i in positions]
            meter.add(assemble_seconds=time.perf_counter() - began)
            return chips

        done = await asyncio.gather(
            *(self._in_pool(partial(finish_some, i)) for i in range(0, len(pairs), _CHUNK_CHIPS))
        )
        return [chip for chips in done for chip in chips]

    def _end(self, outcomes: Any) -> None:
        found = list(outcomes)
        for tile, error in found:
            self._engine.tiles.end(tile, error)
        self._report([(tile.job, error) for tile, error in found if error is not None])

    def _report(self, failed: Sequence[tuple[TileJob, RasteretError]]) -> None:
        for job, error in failed:
            tile_error = TileError(
                record=job.source.record,
                band=job.source.band,
                href=redact(job.href),
                image=job.image,
                tile=job.read.index,
                range=job.stored,
                error=error,
                positions=_positions_needing(job, self._buffers),
            )
            if self.errors is None:
                raise ReadError(str(tile_error)) from error
            self.errors.append(tile_error)

    def _in_pool(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        return asyncio.get_running_loop().run_in_executor(self._engine.pool, work)


def _positions_needing(job: TileJob, buffers: Sequence[ChipBuffers]) -> tuple[int, ...]:
    """Return the positions of the chips that pixels of a tile go to."""
    targets = {id(copy.target) for copy in job.copies}
    arrays = [[id(array) for band in chip.bands for array in (band.data, band.mask)] for chip in buffers]
    return tuple(i for i, own in enumerate(arrays) if not targets.isdisjoint(own))


def _requests(
    tiles: Sequence[InFlightTile], limits: CoalesceLimits
) -> list[tuple[str, MergedRange, list[InFlightTile]]]:
    by_href: dict[str, list[InFlightTile]] = {}
    for tile in tiles:
        by_href.setdefault(tile.job.href, []).append(tile)
    return [
        (href, merged, [found[i] for i in merged.parts])
        for href, found in by_href.items()
        for merged in coalesce([tile.job.range for tile in found], limits)
    ]


def _check(response: RangeResponse, tiles: Sequence[InFlightTile], href: str, span: ByteRange) -> None:
    check_unchanged(tiles[0].job, response)
    if len(response.data) < span.length:
        raise FetchError(f"{redact(href)}: {len(response.data)} bytes were returned for {span}.")


def _chunks(tiles: Sequence[InFlightTile]) -> list[list[InFlightTile]]:
    """Group tiles into jobs of about `_CHUNK_BYTES` compressed bytes."""
    chunks: list[list[InFlightTile]] = [[]]
    size = 0
    for tile in tiles:
        if size >= _CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(tile)
        size += tile.job.range.length
    return chunks


def _decode_chunk(
    tiles: Sequence[InFlightTile], body: memoryview, start: int, engine: Engine
) -> list[tuple[InFlightTile, RasteretError | None]]:
    began = time.perf_counter()
    with engine.meter.track("decode"):
        outcomes = _decode(tiles, body, start, engine.tiles, engine.stop_early)
    engine.meter.add(
        tiles_decoded=sum(error is None for _, error in outcomes),
        bytes_used=sum(tile.job.range.length for tile, _ in outcomes),
        decode_seconds=time.perf_counter() - began,
    )
    return outcomes


def _decode(
    tiles: Sequence[InFlightTile], body: memoryview, start: int, cache: TileCache, stop_early: bool
) -> list[tuple[InFlightTile, RasteretError | None]]:
    outcomes: list[tuple[InFlightTile, RasteretError | None]] = []
    for tile in tiles:
        job = tile.job
        offset, read = job.range.start - start, job.read
        copies = cache.take(tile)
        if copies is None:
            continue
        part = None if cache.max_bytes else bounding_window(copies)
        try:
            data = tile_payload(job, body[offset : offset + job.range.length])
            size = read.stored_rows, read.image_rows, read.image_cols
            pixels, valid = decode_tile(data, job.table, *size, part, stop_early=stop_early)
        except DataError as error:
            outcomes.append((tile, error))
            continue
        copy_tile(copies, pixels, valid)
        if cache.max_bytes:
            cache.keep(tile, DecodedTile(np.array(pixels), None if valid is None else np.array(valid)))
        outcomes.append((tile, None))
    return outcomes
