"""List the stored tiles that plans need, each once, with the chips that their pixels go to; without I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.tile_table import TileRead, TileTable
from rasteret_ml.errors import CorruptTiffError, FileChangedError, redact
from rasteret_ml.geo.grid import Window
from rasteret_ml.ranges import ByteRange, CoalesceLimits, MergedRange, coalesce
from rasteret_ml.raster.assemble import BandBuffers, ChipBuffers
from rasteret_ml.raster.plan import BandPlan, ChipPlan
from rasteret_ml.raster.source import BandSource
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.storage.urls import sidecar_href


@dataclass(frozen=True, slots=True, eq=False)
class TileCopy:
    """A copy from a decoded tile to a chip."""

    target: npt.NDArray[Any]  #: Channel of the chip, or its mask.
    unread: npt.NDArray[np.bool_] | None  #: Set to False where pixels are copied; None = not tracked.
    #: Set to True where the codec marks pixels invalid; None = the codec has no validity.
    invalid: npt.NDArray[np.bool_] | None
    read: TileRead  #: Source window in the tile and target window in the chip.
    sample: int  #: Sample of a pixel-interleaved tile.


@dataclass(slots=True, kw_only=True, eq=False)
class TileJob:
    """A stored tile and the copies of its pixels."""

    source: BandSource  #: The first band that needs the tile (bands of a pixel-interleaved file share tiles).
    image: str  #: Image of the file, such as "overview 1".
    table: TileTable  #: Tile table to decode it with.
    read: TileRead  #: The tile.
    range: ByteRange  #: Bytes to fetch: the block leader, if any, and the tile.
    href: str  #: File that holds the tile: the band's, or a sidecar.
    copies: list[TileCopy] = field(default_factory=list)  #: Where its pixels go.

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for jobs that decode the same bytes in the same way (some writers store equal tiles once)."""
        table, read = self.table, self.read
        shape = read.stored_rows, read.image_rows, read.image_cols, table.tile_width, table.samples_per_tile
        return self.href, self.range, shape, table.dtype, table.compression, self.indexed

    @property
    def stored(self) -> ByteRange:
        """Bytes of the tile, without the block leader."""
        leader = self.read.leader
        return ByteRange(self.range.start + leader, self.range.length - leader)

    @property
    def indexed(self) -> tuple[int | None, str | None]:
        """Size and ETag of the file when it was indexed."""
        sidecar, metadata = self.table.sidecar, self.source.metadata
        return (metadata.file_size, metadata.etag) if sidecar is None else (sidecar.size, sidecar.etag)


def tile_jobs(plans: Sequence[ChipPlan], buffers: Sequence[ChipBuffers] | None = None) -> list[TileJob]:
    """Return one job for each stored tile of the plans, with copies to `buffers` (one per plan) if given."""
    jobs: dict[tuple[Any, ...], TileJob] = {}
    for i, plan in enumerate(plans):
        for j, band in enumerate(plan.bands):
            source, buffer = band.source, None if buffers is None else buffers[i].bands[j]
            images = (False, band.level.image, band.tiles), (True, band.level.mask, band.mask_tiles)
            for is_mask, table, reads in images:
                if table is None:
                    continue
                href = source.href if table.sidecar is None else sidecar_href(source.href, table.sidecar.suffix)
                for read in reads:
                    if read.range is None:
                        continue
                    # This key is cheap to hash; `TileJob.key` is compared only once per tile and table.
                    key = id(table), href, read.range, read.stored_rows, read.image_rows, read.image_cols
                    job = jobs.get(key)
                    if job is None:
                        image = f"overview {band.level.number}" if band.level.number else "full resolution"
                        image = f"mask of {image}" if is_mask else image
                        job = TileJob(source=source, image=image, table=table, read=read, range=read.range, href=href)
                        job = jobs[key] = jobs.setdefault(job.key, job)
                    if buffer is not None:
                        job.copies.append(_tile_copy(band, table, buffer, read, is_mask))
    return list(dict.fromkeys(jobs.values()))


def _tile_copy(band: BandPlan, table: TileTable, buffer: BandBuffers, read: TileRead, is_mask: bool) -> TileCopy:
    # An overview may be band-interleaved where its image is pixel-interleaved: its tiles then hold one sample.
    sample = band.source.metadata.mask_sample if is_mask else band.source.sample
    sample = sample if table.samples_per_tile > 1 else 0
    if is_mask:
        assert buffer.mask is not None
        return TileCopy(buffer.mask, None, None, read, sample)
    return TileCopy(buffer.data, buffer.unread, buffer.codec_invalid, read, sample)


def copy_tile(copies: Sequence[TileCopy], pixels: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None) -> None:
    """Copy the pixels of a decoded tile, `[rows, cols, samples]`, to every target."""
    for copy in copies:
        rows, cols = copy.read.source.slices
        target = copy.read.target.slices
        copy.target[target] = pixels[rows, cols, copy.sample]
        if copy.unread is not None:
            copy.unread[target] = False
        if valid is not None and copy.invalid is not None:
            copy.invalid[target] = ~valid[rows, cols, copy.sample]


def bounding_window(windows: Sequence[Window]) -> Window:
    """Return the smallest window that holds all `windows`, at least one."""
    row, col = min(w.row for w in windows), min(w.col for w in windows)
    height, width = max(w.row_stop for w in windows) - row, max(w.col_stop for w in windows) - col
    return Window(row=row, col=col, height=height, width=width)


def check_tile(job: TileJob) -> CorruptTiffError | None:
    """Return an error if a tile must not be fetched: implausible byte count, or a range past the end of the file."""
    size, _ = job.indexed
    if size is not None and job.range.stop > size:
        return CorruptTiffError(f"the tile reaches past the end of the file ({size} bytes)")
    tile_bytes = job.table.tile_bytes
    if job.range.length > 2 * tile_bytes + 1024 * 1024:
        return CorruptTiffError(
            f"the byte count is {job.stored.length}, but the tile holds {tile_bytes} bytes of pixels"
        )
    return None


def check_unchanged(job: TileJob, response: RangeResponse) -> None:
    """Raise FileChangedError if the size or ETag of a file is not what it was when the file was indexed."""
    size, etag = job.indexed
    if response.size is not None and size is not None and response.size != size:
        change = f"the file has {response.size} bytes, but had {size} when it was indexed"
    elif response.etag and etag and response.etag != etag and _etag_value(response.etag) != _etag_value(etag):
        change = f"the file's version is {response.etag}, but was {etag} when it was indexed"
    else:
        return
    raise FileChangedError(f"{redact(job.href)}: {change}; it was rewritten: build the Collection again.")


def _etag_value(etag: str) -> str:
    """Strip the weak prefix and the compression suffix that servers add."""
    return etag.removeprefix("W/").strip('"').removesuffix("-gzip")


def tile_payload(job: TileJob, fetched: memoryview) -> memoryview:
    """Return the bytes of the tile; FileChangedError if its block leader (GDAL's COG layout) has another byte count."""
    leader = job.read.leader
    if leader and int.from_bytes(fetched[:leader], "little") != len(fetched) - leader:
        raise FileChangedError(
            f"{redact(job.href)}: the block leader must repeat the tile's byte count; the file was rewritten since "
            "it was indexed: build the Collection again."
        )
    return fetched[leader:]


def merge_jobs(jobs: Sequence[TileJob], limits: CoalesceLimits) -> list[MergedRange]:
    """Return the requests that fetch all jobs, each of one file; their parts are positions in `jobs`."""
    by_href: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        by_href.setdefault(job.href, []).append(i)
    return [
        MergedRange(merged.span, tuple(found[i] for i in merged.parts))
        for found in by_href.values()
        for merged in coalesce([jobs[i].range for i in found], limits)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEstimate:
    """Cost of reading chips together."""

    chips: int  #: Number of chips.
    files: int  #: Number of files.
    tiles: int  #: Stored tiles to fetch and decode.
    sparse_tiles: int  #: Tiles that are not stored and cost nothing.
    requests: int  #: Range requests.
    bytes_wanted: int  #: Compressed bytes of the tiles.
    bytes_fetched: int  #: Bytes to transfer, including gaps between merged ranges.
    levels: Mapping[str, tuple[int, ...]]  #: Resolutions read, by band: 0 = full, 1 = first overview, …


def explain(plans: Sequence[ChipPlan], limits: CoalesceLimits | None = None) -> ReadEstimate:
    """Estimate the cost of executing `plans`: a dry run of `execute`."""
    jobs = tile_jobs(plans)
    requests = merge_jobs(jobs, limits or CoalesceLimits())
    bands = [band for plan in plans for band in plan.bands]
    levels: dict[str, set[int]] = {}
    for band in bands:
        if band.window is not None:
            levels.setdefault(band.source.band, set()).add(band.level.number)
    return ReadEstimate(
        chips=len(plans),
        files=len({job.href for job in jobs}),
        tiles=len(jobs),
        sparse_tiles=sum(read.range is None for band in bands for read in (*band.tiles, *band.mask_tiles)),
        requests=len(requests),
        bytes_wanted=sum(job.range.length for job in jobs),
        bytes_fetched=sum(request.span.length for request in requests),
        levels={band: tuple(sorted(numbers)) for band, numbers in levels.items()},
    )
