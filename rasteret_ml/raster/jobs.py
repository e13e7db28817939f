"""The stored tiles that plans need, each once, and where their pixels go (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.tile_table import TileRead, TileTable
from rasteret_ml.errors import CorruptTiffError, FileChangedError, redact
from rasteret_ml.geo.window import Window
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.assemble import BandBuffers, ChipBuffers
from rasteret_ml.raster.plan import BandPlan, ChipPlan
from rasteret_ml.raster.source import BandSource
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.storage.urls import sidecar_href

__all__ = [
    "TileCopy",
    "TileJob",
    "bounding_window",
    "check_tile",
    "check_unchanged",
    "copy_tile",
    "tile_jobs",
    "tile_payload",
]


@dataclass(frozen=True, slots=True, eq=False)
class TileCopy:
    """Where some pixels of a tile go."""

    target: npt.NDArray[Any]
    """The chip's channel, or its mask."""
    unread: npt.NDArray[np.bool_] | None
    """Set to False where the pixels land; None = not tracked."""
    invalid: npt.NDArray[np.bool_] | None
    """Receives what the codec marks invalid; None = the codec has no validity."""
    read: TileRead
    """Which pixels of the tile, and where in the chip."""
    sample: int
    """Which sample of an interleaved tile."""


@dataclass(slots=True, kw_only=True, eq=False)
class TileJob:
    """One stored tile and where its pixels go."""

    source: BandSource
    """The first band that needs it (bands of a pixel-interleaved file share tiles)."""
    image: str
    """Which image of the file."""
    table: TileTable
    """How to decode it."""
    read: TileRead
    """Which tile."""
    range: ByteRange
    """The bytes to fetch: the tile, after its block leader where there is one."""
    href: str
    """The file that holds it: the band's, or a sidecar."""
    copies: list[TileCopy] = field(default_factory=list)
    """Where its pixels go."""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for jobs of the same bytes decoded in the same way (some writers store equal tiles once)."""
        table, read = self.table, self.read
        shape = read.stored_rows, read.image_rows, read.image_cols, table.tile_width, table.samples_per_tile
        return self.href, self.range, shape, table.dtype, table.compression, self.indexed

    @property
    def stored(self) -> ByteRange:
        """The tile's own bytes."""
        leader = self.read.leader
        return ByteRange(self.range.start + leader, self.range.length - leader)

    @property
    def indexed(self) -> tuple[int | None, str | None]:
        """Size and version tag of that file when it was indexed."""
        sidecar, metadata = self.table.sidecar, self.source.metadata
        return (metadata.file_size, metadata.etag) if sidecar is None else (sidecar.size, sidecar.etag)


def tile_jobs(plans: Sequence[ChipPlan], buffers: Sequence[ChipBuffers] | None = None) -> list[TileJob]:
    """Return every stored tile of the plans, once."""
    jobs: dict[tuple[Any, ...], TileJob] = {}
    for i, plan in enumerate(plans):
        for j, band in enumerate(plan.bands):
            buffer = None if buffers is None else buffers[i].bands[j]
            for is_mask, table, reads in _images(band):
                href = _href(band.source, table)
                for read in reads:
                    if read.range is None:
                        continue
                    # A short key per tile and chip; the long one, `TileJob.key`, joins tiles that several tables share.
                    key = id(table), href, read.range, read.stored_rows, read.image_rows, read.image_cols
                    job = jobs.get(key) or _job(jobs, key, band, is_mask, table, read, href)
                    if buffer is not None:
                        job.copies.append(_tile_copy(band, buffer, read, is_mask))
    return list(dict.fromkeys(jobs.values()))


def _job(
    jobs: dict[tuple[Any, ...], TileJob],
    key: tuple[Any, ...],
    band: BandPlan,
    is_mask: bool,
    table: TileTable,
    read: TileRead,
    href: str,
) -> TileJob:
    """Return the job of a tile that is new to this table; bands of a pixel-interleaved file have a table each."""
    assert read.range is not None
    image = _image_name(band, is_mask)
    job = TileJob(source=band.source, image=image, table=table, read=read, range=read.range, href=href)
    jobs[key] = jobs.setdefault(job.key, job)
    return jobs[key]


def _images(band: BandPlan) -> Iterator[tuple[bool, TileTable, tuple[TileRead, ...]]]:
    yield False, band.level.image, band.tiles
    if band.level.mask is not None:
        yield True, band.level.mask, band.mask_tiles


def _href(source: BandSource, table: TileTable) -> str:
    return source.href if table.sidecar is None else sidecar_href(source.href, table.sidecar.suffix)


def _image_name(band: BandPlan, is_mask: bool) -> str:
    image = f"overview {band.level.number}" if band.level.number else "full resolution"
    return f"mask of {image}" if is_mask else image


def _tile_copy(band: BandPlan, buffer: BandBuffers, read: TileRead, is_mask: bool) -> TileCopy:
    if not is_mask:
        sample = _sample_of(band.level.image, band.source.sample)
        return TileCopy(buffer.data, buffer.unread, buffer.codec_invalid, read, sample)
    assert buffer.mask is not None
    assert band.level.mask is not None
    return TileCopy(buffer.mask, None, None, read, _sample_of(band.level.mask, band.source.metadata.mask_sample))


def _sample_of(table: TileTable, sample: int) -> int:
    """Return the band's sample in a tile; overviews may be interleaved differently from their image."""
    return sample if table.samples_per_tile > 1 else 0


def copy_tile(copies: Sequence[TileCopy], pixels: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None) -> None:
    """Copy the pixels `[rows, columns, samples]` of a decoded tile to every target."""
    for copy in copies:
        rows, cols = copy.read.source.slices
        target = copy.read.target.slices
        copy.target[target] = pixels[rows, cols, copy.sample]
        if copy.unread is not None:
            copy.unread[target] = False
        if valid is not None and copy.invalid is not None:
            copy.invalid[target] = ~valid[rows, cols, copy.sample]


def bounding_window(copies: Sequence[TileCopy]) -> Window | None:
    """Return the smallest window of a tile that holds all copies; None where there is none."""
    if not copies:
        return None
    sources = [copy.read.source for copy in copies]
    row, col = min(s.row for s in sources), min(s.col for s in sources)
    height, width = max(s.row_stop for s in sources) - row, max(s.col_stop for s in sources) - col
    return Window(row=row, col=col, height=height, width=width)


def check_tile(job: TileJob) -> CorruptTiffError | None:
    """Return why a tile must not be fetched: an implausible byte count, or a range past the end of the file."""
    size, _ = job.indexed
    if size is not None and job.range.stop > size:
        return CorruptTiffError(f"the tile reaches past the end of the file ({size} bytes)")
    most = 2 * job.table.tile_bytes + 1024 * 1024
    if job.range.length > most:
        return CorruptTiffError(f"its byte count is {job.stored.length}, for {job.table.tile_bytes} bytes of pixels")
    return None


def check_unchanged(job: TileJob, response: RangeResponse) -> None:
    """Compare the size and version of a file with those at the time of indexing.

    Raises:
        FileChangedError: the size or version differs.
    """
    size, etag = job.indexed
    if response.size is not None and size is not None and response.size != size:
        what = f"the file has {response.size} bytes, but had {size} when it was indexed"
    elif response.etag and etag and response.etag != etag and _version(response.etag) != _version(etag):
        what = f"the file's version is {response.etag}, but was {etag} when it was indexed"
    else:
        return
    raise FileChangedError(f"{redact(job.href)}: {what}; it was rewritten: build the Collection again.")


def _version(etag: str) -> str:
    """Strip what servers add to an ETag: the weak mark and a compression suffix."""
    return etag.removeprefix("W/").strip('"').removesuffix("-gzip")


def tile_payload(job: TileJob, fetched: memoryview) -> memoryview:
    """Check the size that a COG repeats before a tile, and return the tile's own bytes.

    Raises:
        FileChangedError: the sizes differ.
    """
    leader = job.read.leader
    if leader and int.from_bytes(fetched[:leader], "little") != len(fetched) - leader:
        raise FileChangedError(
            f"{redact(job.href)}: the block leader before the tile does not repeat its byte count; the file was "
            "rewritten since it was indexed: build the Collection again."
        )
    return fetched[leader:]
