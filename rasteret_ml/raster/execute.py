"""Execute plans: one fetch for all plans of a batch, decoding while bytes still arrive.

Each tile is fetched and decoded once, however many chips and bands need it; its pixels go straight from the decoder's
scratch memory into every chip.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
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
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.assemble import ChipBuffers, allocate, finish_chip
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.engine import Engine, gather_or_cancel
from rasteret_ml.raster.jobs import (
    TileJob,
    bounding_window,
    check_tile,
    check_unchanged,
    copy_tile,
    merge_jobs,
    tile_jobs,
    tile_payload,
)
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.tile_cache import DecodedTile, InFlightTile

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
    """Read all plans together; `into` has per plan an array `[C, H, W]` that becomes the chip's data, None = a new one.

    The first tile that cannot be fetched or decoded raises ReadError, and the other requests are cancelled; with
    `allow_errors` the result lists such tiles. A chip that lacks one has the pixels that came or, with
    `drop_incomplete`, no valid pixel: tracking which came costs a tenth of the work.
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
        checked = [(job, check_tile(job)) for job in jobs]
        self._report(checked)
        pending = [job for job, error in checked if error is None]
        while pending:
            own, joined, cached = self._engine.tiles.schedule(pending)
            abandoned: list[TileJob] = []
            try:
                requests = merge_jobs([tile.job for tile in own], self._engine.coalesce)
                await gather_or_cancel(
                    [
                        *(self._serve(merged.span, [own[i] for i in merged.parts]) for merged in requests),
                        *(self._copy_cached(cached[i : i + _CHUNK_CHIPS]) for i in range(0, len(cached), _CHUNK_CHIPS)),
                        *([self._await_others(joined, abandoned)] if joined else []),
                    ]
                )
            finally:  # including those never started
                self._engine.tiles.abandon(own)
            pending = abandoned

    async def _serve(self, span: ByteRange, tiles: list[InFlightTile]) -> None:
        """Fetch a range and decode the tiles in it."""
        if not await self._fetch_and_decode(span, tiles):
            # Each tile alone, so that one bad tile does not fail those it was merged with.
            await gather_or_cancel([self._serve(tile.job.range, [tile]) for tile in tiles])

    async def _fetch_and_decode(self, span: ByteRange, tiles: list[InFlightTile]) -> bool:
        """Return False where the tiles cannot be fetched together but may be one by one."""
        engine, href = self._engine, tiles[0].job.href
        async with engine.limiter.hold(span.length):  # held while decoding too: it bounds the bytes that wait
            try:
                with engine.meter.track("fetch"):
                    response = await engine.reader.read(href, span)
                check_unchanged(tiles[0].job, response)
                if len(response.data) < span.length:
                    raise FetchError(f"{redact(href)}: {len(response.data)} bytes were returned for {span}.")
            except (FetchError, DataError) as error:
                if len(tiles) > 1 and self.errors is not None and not isinstance(error, _FILE_ERRORS):
                    return False
                for tile in tiles:
                    engine.tiles.end(tile, error)
                self._report([(tile.job, error) for tile in tiles])
                return True
            body, decoding = memoryview(response.data), []
            for chunk in _chunks(tiles):
                decoding.append(self._in_pool(partial(_decode, chunk, body, span.start, engine)))
                decoding[-1].add_done_callback(partial(self._decoded, chunk))
            # Shielded: a thread cannot be stopped, and other batches may need what it decodes.
            for outcomes in await asyncio.gather(*map(asyncio.shield, decoding)):
                self._report((tile.job, error) for tile, error in outcomes)
        self._landed(len(tiles))
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

    async def _copy_cached(self, cached: Sequence[tuple[TileJob, DecodedTile]]) -> None:
        def copy() -> None:
            with self._engine.meter.track("assemble"):
                for job, tile in cached:
                    copy_tile(job.copies, tile.pixels, tile.valid)

        await self._in_pool(copy)
        self._engine.meter.add(cache_hits=len(cached))
        self._landed(len(cached))

    async def _await_others(self, joined: Sequence[tuple[TileJob, InFlightTile]], abandoned: list[TileJob]) -> None:
        outcomes = []
        for job, tile in joined:
            await asyncio.wait([tile.ended])
            if tile.ended.cancelled():
                abandoned.append(job)
            else:
                outcomes.append((job, tile.ended.result()))
        self._engine.meter.add(tiles_shared=len(outcomes))
        self._report(outcomes)
        self._landed(len(outcomes))

    async def finish(self, plans: Sequence[ChipPlan], drop_incomplete: bool) -> list[Chip]:
        """Turn the filled buffers into chips."""
        pairs = list(zip(plans, self._buffers, strict=True))
        lost = {i for error in self.errors or () for i in error.positions} if drop_incomplete else set()
        meter = self._engine.meter

        def finish_some(start: int) -> list[Chip]:
            began = time.perf_counter()
            positions = range(start, min(start + _CHUNK_CHIPS, len(pairs)))
            with meter.track("assemble"):
                chips = [finish_chip(*pairs[i], lost=i in lost) for i in positions]
            meter.add(assemble_seconds=time.perf_counter() - began)
            return chips

        done = await asyncio.gather(
            *(self._in_pool(partial(finish_some, i)) for i in range(0, len(pairs), _CHUNK_CHIPS))
        )
        return [chip for chips in done for chip in chips]

    def _landed(self, tiles: int) -> None:
        if self._engine.progress is not None:
            self._engine.progress(tiles)

    def _report(self, outcomes: Iterable[tuple[TileJob, RasteretError | None]]) -> None:
        for job, error in outcomes:
            if error is None:
                continue
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


def _decode(
    tiles: Sequence[InFlightTile], body: memoryview, start: int, engine: Engine
) -> list[tuple[InFlightTile, RasteretError | None]]:
    """Decode the tiles in `body`, whose first byte is byte `start` of the file, except those abandoned meanwhile."""
    began, cache = time.perf_counter(), engine.tiles
    outcomes: list[tuple[InFlightTile, RasteretError | None]] = []
    with engine.meter.track("decode"):
        for tile in tiles:
            job, read = tile.job, tile.job.read
            copies = cache.take(tile)
            if copies is None:
                continue
            part = None if cache.max_bytes else bounding_window([copy.read.source for copy in copies])
            try:
                data = tile_payload(job, body[job.range.start - start : job.range.stop - start])
                size = read.stored_rows, read.image_rows, read.image_cols
                pixels, valid = decode_tile(data, job.table, *size, part, stop_early=engine.stop_early)
            except DataError as error:
                outcomes.append((tile, error))
                continue
            copy_tile(copies, pixels, valid)
            if cache.max_bytes:
                cache.keep(tile, DecodedTile(np.array(pixels), None if valid is None else np.array(valid)))
            outcomes.append((tile, None))
    engine.meter.add(
        tiles_decoded=sum(error is None for _, error in outcomes),
        bytes_used=sum(tile.job.range.length for tile, _ in outcomes),
        decode_seconds=time.perf_counter() - began,
    )
    return outcomes
