"""What a read would cost, before any byte is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rasteret_ml.ranges import ByteRange, CoalesceLimits, coalesce
from rasteret_ml.raster.jobs import tile_jobs
from rasteret_ml.raster.plan import ChipPlan

__all__ = ["ReadEstimate", "explain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEstimate:
    """The cost of executing some plans together."""

    chips: int
    """Chips asked for."""
    files: int
    """Files touched."""
    tiles: int
    """Stored tiles fetched and decoded, each once."""
    sparse_tiles: int
    """Tiles that are not stored and cost nothing."""
    requests: int
    """Range requests."""
    bytes_wanted: int
    """Compressed bytes of the tiles."""
    bytes_fetched: int
    """Bytes on the wire, merge waste included."""
    levels: Mapping[str, tuple[int, ...]]
    """By band, the resolutions that are read from: 0 = full, 1 = the first overview …"""


def explain(plans: Sequence[ChipPlan], limits: CoalesceLimits | None = None) -> ReadEstimate:
    """The estimate for `plans`; the same planning that `execute` does, without the reader."""
    jobs = tile_jobs(plans)
    by_href: dict[str, list[ByteRange]] = {}
    for job in jobs:
        by_href.setdefault(job.href, []).append(job.range)
    merged = [m for ranges in by_href.values() for m in coalesce(ranges, limits or CoalesceLimits())]
    reads = [read for plan in plans for band in plan.bands for read in (*band.tiles, *band.mask_tiles)]
    levels: dict[str, set[int]] = {}
    for band in (band for plan in plans for band in plan.bands if band.window is not None):
        levels.setdefault(band.source.band, set()).add(band.level.number)
    return ReadEstimate(
        chips=len(plans),
        files=len(by_href),
        tiles=len(jobs),
        sparse_tiles=sum(read.range is None for read in reads),
        requests=len(merged),
        bytes_wanted=sum(job.range.length for job in jobs),
        bytes_fetched=sum(m.span.length for m in merged),
        levels={name: tuple(sorted(found)) for name, found in levels.items()},
    )
