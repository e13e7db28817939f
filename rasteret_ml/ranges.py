"""Byte ranges and how neighbouring ones are merged into one request (pure, no I/O)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rasteret_ml.errors import UsageError

__all__ = ["ByteRange", "CoalesceLimits", "MergedRange", "coalesce"]


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """A run of bytes in a file."""

    start: int
    """Offset of the first byte."""
    length: int
    """Number of bytes, at least 1."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 1:
            raise UsageError(f"A byte range needs start >= 0 and length >= 1, not {self.start}, {self.length}.")

    @property
    def stop(self) -> int:
        """Offset just past the last byte (exclusive)."""
        return self.start + self.length

    def __str__(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoalesceLimits:
    """When two ranges of one file are worth a single request.

    The defaults come from measurements: an extra request costs as much CPU as 70-120 KB of unwanted
    bytes, one connection carries 60-95 MB/s, and COG tiles are 8 bytes apart (leader and trailer).
    """

    gap: int = 64 * 1024
    """Bytes between two ranges that may be read through and thrown away."""
    touching: int = 16
    """A gap up to this many bytes is always merged (COG block leader + trailer)."""
    waste: float = 0.25
    """Largest share of unwanted bytes, relative to the wanted ones."""
    span: int = 8 * 1024 * 1024
    """Largest merged request in bytes; a single larger range is still one request."""


@dataclass(frozen=True, slots=True)
class MergedRange:
    """One request that serves several ranges."""

    span: ByteRange
    """What is requested."""
    parts: tuple[int, ...]
    """Positions, in the sequence given to `coalesce`, of the ranges that it serves."""


def coalesce(ranges: Sequence[ByteRange], limits: CoalesceLimits) -> list[MergedRange]:
    """Merge ranges of one file into requests.

    Every input range lies whole inside the span of exactly one result; results are sorted by start.
    Ranges may overlap or repeat.
    """
    merged: list[MergedRange] = []
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    start = stop = useful = 0
    parts: list[int] = []
    for i in order:
        r = ranges[i]
        if parts:
            fresh = max(0, r.stop - max(stop, r.start))
            new_stop = max(stop, r.stop)
            waste = new_stop - start - useful - fresh
            gap = r.start - stop
            cheap = gap <= limits.touching or (gap <= limits.gap and waste <= limits.waste * (useful + fresh))
            if r.stop <= stop or (cheap and new_stop - start <= limits.span):
                parts.append(i)
                stop, useful = new_stop, useful + fresh
                continue
            merged.append(MergedRange(ByteRange(start, stop - start), tuple(parts)))
        start, stop, useful, parts = r.start, r.stop, r.length, [i]
    if parts:
        merged.append(MergedRange(ByteRange(start, stop - start), tuple(parts)))
    return merged
