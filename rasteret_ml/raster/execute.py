"""Plans to pixels: one fetch for all plans of a batch, decoding while bytes still arrive.

Each tile is fetched and decoded once, however many chips and bands it serves; its pixels go straight from
the decoder's scratch into every chip that wants them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs import decode_tile
from rasteret_ml.cog.metadata import TileTable
from rasteret_ml.cog.tiles import TileRead
from rasteret_ml.errors import DataError, FetchError, FileChangedError, RasteretError, ReadError, redact
from rasteret_ml.fetch.reader import RangeReader
from rasteret_ml.ranges import ByteRange, CoalesceLimits, MergedRange, coalesce
from rasteret_ml.raster.assemble import BandBuffers, allocate, finish
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.plan import BandSource, ChipPlan
from rasteret_ml.raster.together import together
from rasteret_ml.telemetry import Meter

_T = TypeVar("_T")

__all__ = ["Engine", "ReadFailure", "ReadResult", "TileJob", "execute", "tile_jobs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an execution runs on."""

    reader: RangeReader
    """Where bytes come from."""
    pool: Executor | None = None
    """Where tiles are decoded; None = the loop's default threads."""
    max_concurrent: int = 50
    """Range requests in flight."""
    coalesce: CoalesceLimits = CoalesceLimits()
    """When ranges become one request."""
    meter: Meter = field(default_factory=Meter)
    """Counters."""
    progress: Callable[[int], object] | None = None
    """Called with the number of tiles that a request brought, as they land."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFailure:
    """One tile that could not be had."""

    record: str
    """Record id."""
    band: str
    """Band name."""
    href: str
    """Address without secrets."""
    tile: int
    """Tile index in the band's table."""
    range: ByteRange
    """Its bytes."""
    error: RasteretError
    """Why."""

    def __str__(self) -> str:
        return (
            f"record {self.record}, band {self.band}, {self.href}, tile {self.tile}, {self.range}: "
            f"{type(self.error).__name__}: {self.error}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadResult:
    """Chips in the order of their plans, and what failed (empty unless failures were allowed)."""

    chips: tuple[Chip, ...]
    """One per plan."""
    failures: tuple[ReadFailure, ...]
    """Tiles whose pixels are missing: fill value, invalid."""


@dataclass(slots=True, kw_only=True, eq=False)
class TileJob:
    """One stored tile and everybody who wants pixels of it."""

    source: BandSource
    """The first band that asked (bands of a chunky file share tiles)."""
    table: TileTable
    """How to decode it."""
    read: TileRead
    """Which tile, where its bytes are."""
    pastes: list[_Paste] = field(default_factory=list)

    @property
    def range(self) -> ByteRange:
        """The tile's bytes."""
        assert self.read.range is not None
        return self.read.range


@dataclass(frozen=True, slots=True, eq=False)
class _Paste:
    target: npt.NDArray[Any]
    unread: npt.NDArray[np.bool_] | None
    invalid: npt.NDArray[np.bool_] | None
    read: TileRead
    sample: int


def tile_jobs(
    plans: Sequence[ChipPlan], buffers: Sequence[Sequence[BandBuffers]] | None = None
) -> dict[str, list[TileJob]]:
    """Every stored tile of the plans once, by address."""
    jobs: dict[tuple[str, int, int], TileJob] = {}
    for i, plan in enumerate(plans):
        for j, band in enumerate(plan.bands):
            source, metadata = band.source, band.source.metadata
            parts = [(metadata.image, read, source.sample, False) for read in band.tiles]
            if metadata.mask is not None:
                parts += [(metadata.mask, read, 0, True) for read in band.mask_tiles]
            for table, read, sample, is_mask in parts:
                if read.range is None:
                    continue
                key = (source.href, read.range.start, read.range.length)
                job = jobs.setdefault(key, TileJob(source=source, table=table, read=read))
                if buffers is not None:
                    held = buffers[i][j]
                    target = held.mask if is_mask else held.data
                    assert target is not None
                    unread, invalid = (None, None) if is_mask else (held.unread, held.codec_invalid)
                    job.pastes.append(_Paste(target, unread, invalid, read, sample))
    by_href: dict[str, list[TileJob]] = {}
    for (href, _, _), job in jobs.items():
        by_href.setdefault(href, []).append(job)
    return by_href


async def execute(plans: Sequence[ChipPlan], engine: Engine, *, allow_failures: bool = False) -> ReadResult:
    """Read all plans together.

    Raises:
        ReadError: a tile could not be fetched or decoded and failures are not allowed; the other requests
            are cancelled. The message names record, band, address, tile, byte range and cause.
    """
    buffers = [allocate(plan) for plan in plans]
    failures: list[ReadFailure] = []
    limit = asyncio.Semaphore(engine.max_concurrent)
    keep = failures if allow_failures else None
    await together(
        _serve(href, merged, [jobs[i] for i in merged.parts], engine, limit, keep)
        for href, jobs in tile_jobs(plans, buffers).items()
        for merged in coalesce([job.range for job in jobs], engine.coalesce)
    )
    chips = await _in_pool(engine, lambda: [finish(p, b) for p, b in zip(plans, buffers, strict=True)])
    engine.meter.add(chips=len(chips))
    return ReadResult(chips=tuple(chips), failures=tuple(failures))


async def _serve(
    href: str,
    merged: MergedRange,
    jobs: list[TileJob],
    engine: Engine,
    limit: asyncio.Semaphore,
    failures: list[ReadFailure] | None,
) -> None:
    """Fetch one merged range and decode the tiles in it."""
    async with limit:  # held while decoding too: it bounds the bytes that wait for the decoder
        try:
            response = await engine.reader.read(href, merged.span)
            _check_unchanged(jobs[0].source, response.size)
            if len(response.data) < merged.span.length:
                raise FetchError(f"{redact(href)}: {len(response.data)} bytes came for {merged.span}.")
        except (FetchError, DataError) as error:
            _report([(job, error) for job in jobs], failures)
            return
        body, start = memoryview(response.data), merged.span.start
        work = [partial(_decode, chunk, body, start, engine.meter) for chunk in _chunks(jobs)]
        outcomes = await asyncio.gather(*(_in_pool(engine, decode) for decode in work))
        _report([failed for outcome in outcomes for failed in outcome], failures)
    if engine.progress is not None:
        engine.progress(len(jobs))


def _chunks(jobs: list[TileJob], small: int = 256 * 1024) -> list[list[TileJob]]:
    """Tiles in groups of about `small` compressed bytes, so that tiny ones share a hop to the pool."""
    chunks: list[list[TileJob]] = [[]]
    held = 0
    for job in jobs:
        if held >= small:
            chunks.append([])
            held = 0
        chunks[-1].append(job)
        held += job.range.length
    return chunks


def _decode(jobs: list[TileJob], body: memoryview, start: int, meter: Meter) -> list[tuple[TileJob, RasteretError]]:
    began = time.perf_counter()
    failed: list[tuple[TileJob, RasteretError]] = []
    for job in jobs:
        offset = job.range.start - start
        try:
            pixels, valid = decode_tile(body[offset : offset + job.range.length], job.table, job.read.stored_rows)
        except DataError as error:
            failed.append((job, error))
            continue
        for paste in job.pastes:
            rows, cols = paste.read.source.slices
            target = paste.read.target.slices
            paste.target[target] = pixels[rows, cols, paste.sample]
            if paste.unread is not None:
                paste.unread[target] = False
            if valid is not None and paste.invalid is not None:
                paste.invalid[target] = ~valid[rows, cols, paste.sample]
    meter.add(
        tiles_decoded=len(jobs) - len(failed),
        bytes_used=sum(job.range.length for job in jobs),
        decode_seconds=time.perf_counter() - began,
    )
    return failed


def _report(failed: Sequence[tuple[TileJob, RasteretError]], failures: list[ReadFailure] | None) -> None:
    for job, error in failed:
        failure = ReadFailure(
            record=job.source.record,
            band=job.source.band,
            href=redact(job.source.href),
            tile=job.read.index,
            range=job.range,
            error=error,
        )
        if failures is None:
            raise ReadError(str(failure)) from error
        failures.append(failure)


def _check_unchanged(source: BandSource, size: int | None) -> None:
    expected = source.metadata.file_size
    if size is not None and expected is not None and size != expected:
        raise FileChangedError(
            f"{redact(source.href)}: the file has {size} bytes, but {expected} when it was indexed; "
            "it was rewritten: build the Collection again."
        )


async def _in_pool(engine: Engine, work: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(engine.pool, work)
