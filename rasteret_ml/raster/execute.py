"""Plans to pixels: one fetch for all plans of a batch, decoding while bytes still arrive.

Each tile is fetched and decoded once, however many chips and bands it serves; its pixels go straight from
the decoder's scratch into every chip that wants them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs import decode_tile
from rasteret_ml.cog.table import TileTable
from rasteret_ml.cog.tiles import TileRead
from rasteret_ml.errors import (
    CorruptTiffError,
    DataError,
    FetchError,
    FileChangedError,
    RasteretError,
    ReadError,
    redact,
)
from rasteret_ml.fetch.reader import RangeReader, RangeResponse
from rasteret_ml.fetch.urls import sidecar_href
from rasteret_ml.ranges import ByteRange, CoalesceLimits, MergedRange, coalesce
from rasteret_ml.raster.assemble import BandBuffers, allocate, finish
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.plan import BandPlan, ChipPlan
from rasteret_ml.raster.source import BandSource
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
    image: str
    """Which image of the file: "full resolution", "overview 1", "mask of overview 1" …"""
    tile: int
    """Tile index in that image, row-major."""
    range: ByteRange
    """Its bytes."""
    error: RasteretError
    """Why."""

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
    failures: tuple[ReadFailure, ...]
    """Tiles whose pixels are missing: fill value, invalid."""


@dataclass(slots=True, kw_only=True, eq=False)
class TileJob:
    """One stored tile and everybody who wants pixels of it."""

    source: BandSource
    """The first band that asked (bands of a chunky file share tiles)."""
    image: str
    """Which image of the file."""
    table: TileTable
    """How to decode it."""
    read: TileRead
    """Which tile, where its bytes are."""
    pastes: list[_Paste] = field(default_factory=list)

    @property
    def range(self) -> ByteRange:
        """What is fetched for the tile."""
        assert self.read.range is not None
        return self.read.range

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two jobs one: the same bytes, read in the same way (some writers store equal tiles once)."""
        table, read = self.table, self.read
        shape = read.stored_rows, read.image_rows, read.image_cols, table.tile_width, table.samples_per_tile
        return self.href, self.range, shape, table.dtype, table.compression

    @property
    def stored(self) -> ByteRange:
        """The tile's own bytes."""
        leader = self.read.leader
        return ByteRange(self.range.start + leader, self.range.length - leader)

    @property
    def href(self) -> str:
        """The file that holds it: the band's, or a sidecar."""
        sidecar = self.table.sidecar
        return self.source.href if sidecar is None else sidecar_href(self.source.href, sidecar.suffix)

    @property
    def indexed(self) -> tuple[int | None, str | None]:
        """Size and version tag of that file when it was indexed."""
        sidecar, metadata = self.table.sidecar, self.source.metadata
        return (metadata.file_size, metadata.etag) if sidecar is None else (sidecar.size, sidecar.etag)


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
    jobs: dict[tuple[Any, ...], TileJob] = {}
    for i, plan in enumerate(plans):
        for j, band in enumerate(plan.bands):
            held = None if buffers is None else buffers[i][j]
            for is_mask, table, read in _stored(band):
                job = TileJob(source=band.source, image=_image_name(band, is_mask), table=table, read=read)
                job = jobs.setdefault(job.key, job)
                if held is not None:
                    job.pastes.append(_paste(band, held, read, is_mask))
    by_href: dict[str, list[TileJob]] = {}
    for job in jobs.values():
        by_href.setdefault(job.href, []).append(job)
    return by_href


def _stored(band: BandPlan) -> Iterator[tuple[bool, TileTable, TileRead]]:
    for read in band.tiles:
        if read.range is not None:
            yield False, band.level.image, read
    for read in band.mask_tiles:
        if read.range is not None and band.level.mask is not None:
            yield True, band.level.mask, read


def _image_name(band: BandPlan, is_mask: bool) -> str:
    image = f"overview {band.level.number}" if band.level.number else "full resolution"
    return f"mask of {image}" if is_mask else image


def _paste(band: BandPlan, held: BandBuffers, read: TileRead, is_mask: bool) -> _Paste:
    if not is_mask:
        sample = _sample_of(band.level.image, band.source.sample)
        return _Paste(held.data, held.unread, held.codec_invalid, read, sample)
    assert held.mask is not None
    assert band.level.mask is not None
    return _Paste(held.mask, None, None, read, _sample_of(band.level.mask, band.source.metadata.mask_sample))


def _sample_of(table: TileTable, sample: int) -> int:
    """Where a band stands in a tile; overviews may be interleaved otherwise than their image."""
    return sample if table.samples_per_tile > 1 else 0


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
    by_href = tile_jobs(plans, buffers)
    refused = [(job, error) for jobs in by_href.values() for job in jobs if (error := _refusal(job)) is not None]
    _report(refused, keep)
    bad = {id(job) for job, _ in refused}
    sound = {href: [job for job in jobs if id(job) not in bad] for href, jobs in by_href.items()}
    await together(
        _serve(href, merged, [jobs[i] for i in merged.parts], engine, limit, keep)
        for href, jobs in sound.items()
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
            _check_unchanged(jobs[0], response)
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
        offset, read = job.range.start - start, job.read
        try:
            data = _payload(job, body[offset : offset + job.range.length])
            pixels, valid = decode_tile(data, job.table, read.stored_rows, read.image_rows, read.image_cols)
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
            href=redact(job.href),
            image=job.image,
            tile=job.read.index,
            range=job.stored,
            error=error,
        )
        if failures is None:
            raise ReadError(str(failure)) from error
        failures.append(failure)


def _refusal(job: TileJob) -> CorruptTiffError | None:
    """Why a tile is not even fetched: a byte count that no such tile has, or one past the end of its file."""
    size, _ = job.indexed
    if size is not None and job.range.stop > size:
        return CorruptTiffError(f"the tile reaches past the end of the file ({size} bytes)")
    most = 2 * job.table.tile_bytes + 1024 * 1024
    if job.range.length > most:
        return CorruptTiffError(f"its byte count is {job.stored.length}, for {job.table.tile_bytes} bytes of pixels")
    return None


def _check_unchanged(job: TileJob, response: RangeResponse) -> None:
    size, etag = job.indexed
    if response.size is not None and size is not None and response.size != size:
        what = f"the file has {response.size} bytes, but {size} when it was indexed"
    elif _version(response.etag) != _version(etag) and response.etag and etag:
        what = f"the file's version is {response.etag}, but {etag} when it was indexed"
    else:
        return
    raise FileChangedError(f"{redact(job.href)}: {what}; it was rewritten: build the Collection again.")


def _version(etag: str | None) -> str:
    """An ETag without what servers add to it: the mark of a weak one, a note that the body was compressed."""
    return (etag or "").removeprefix("W/").strip('"').removesuffix("-gzip")


def _payload(job: TileJob, fetched: memoryview) -> memoryview:
    """The tile's own bytes, after a look at the size that a COG repeats before them."""
    leader = job.read.leader
    if leader and int.from_bytes(fetched[:leader], "little") != len(fetched) - leader:
        raise FileChangedError(
            f"{redact(job.href)}: the block leader before the tile does not repeat its byte count; the file was "
            "rewritten since it was indexed: build the Collection again."
        )
    return fetched[leader:]


async def _in_pool(engine: Engine, work: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(engine.pool, work)
