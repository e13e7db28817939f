"""Samples that could not be read: what was wrong, what was done, and the sum of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rasteret_ml.errors import RasteretError, redact
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.execute import ReadFailure

__all__ = ["Failure", "FailureCounts", "FailureReport", "Fault"]

_MOST_NAMES = 1000
"""Files that are counted by name."""
_SHOWN = 5
"""Names in a summary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that was wrong: a tile that could not be had, or records that do not go together."""

    kind: str
    """Class of the error."""
    reason: str
    """Its message, without secrets."""
    record: str | None = None
    """Record id; this and what follows is None where no single tile is at fault."""
    band: str | None = None
    """Band name."""
    href: str | None = None
    """Address without secrets."""
    image: str | None = None
    """Which image of the file."""
    tile: int | None = None
    """Tile index in that image, row-major."""
    range: ByteRange | None = None
    """Its bytes."""

    @classmethod
    def of(cls, why: ReadFailure | RasteretError) -> Fault:
        """From what a dataset noted."""
        if not isinstance(why, ReadFailure):
            return cls(kind=type(why).__name__, reason=redact(str(why)))
        return cls(
            kind=type(why.error).__name__,
            reason=redact(str(why.error)),
            record=why.record,
            band=why.band,
            href=redact(why.href),
            image=why.image,
            tile=why.tile,
            range=why.range,
        )

    def __str__(self) -> str:
        if self.href is None:
            return f"{self.kind}: {self.reason}"
        place = f"record {self.record}, band {self.band}, {self.href}, {self.image}, tile {self.tile}, {self.range}"
        return f"{place}: {self.kind}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A sample that could not be read as it was asked for."""

    batch: int
    """Which batch of the pass."""
    place: int
    """Which sample of the batch."""
    draw: tuple[int, int, int] | None
    """(seed, epoch, position) of the sample; None where no sampler of ours drew it."""
    aoi: int | None
    """Row of its AOI's table; None where it has none."""
    done: Literal["retried", "replaced", "filled", "passed over"]
    """"retried": it was read again, and is right. "replaced", "filled": see `ErrorPolicy`. "passed over": the sample is
    right, but a spare place of it that `min_valid=` asked for could not be read."""
    instead: str | None
    """What took its place."""
    readings: int
    """How often it was read in vain, spare places included."""
    faults: tuple[Fault, ...]
    """What was wrong, each once."""
    more: int
    """Faults beyond these."""

    def __str__(self) -> str:
        drawn = "" if self.draw is None else " (seed {}, epoch {}, position {})".format(*self.draw)
        aoi = "" if self.aoi is None else f", AOI {self.aoi}"
        instead = "" if self.instead is None else f" by {self.instead}"
        more = f" and {self.more} more" if self.more else ""
        what = "; ".join(map(str, self.faults))
        return f"batch {self.batch}, sample {self.place}{drawn}{aoi} was {self.done}{instead}: {what}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """What a pass over a loader could not read, as far as it has come."""

    samples: int
    """Handed over, of which some may have failed; 0 where `errors` is "raise", which hands over none that has."""
    failed: int
    """Samples that could not be read as they were asked for."""
    done: dict[str, int]
    """How many of them were "retried", "replaced", "filled" and "passed over"."""
    kinds: dict[str, int]
    """How often each class of error was met, most frequent first."""
    files: dict[str, int]
    """How often each file was at fault, most frequent first; of the first thousand files, the others as "others"."""
    failures: tuple[Failure, ...]
    """The first of them, in the order of the pass."""

    def __str__(self) -> str:
        if not self.failed:
            return f"all {self.samples} samples were read"
        share = f" ({self.failed / self.samples:.2%})" if self.samples else ""
        lines = [f"{self.failed} of {self.samples} samples could not be read{share}: {_listing(self.done)}"]
        lines += [f"  by reason: {_listing(self.kinds)}"]
        lines += [f"  by file: {_listing(self.files)}"] if self.files else []
        lines += [f"  first: {self.failures[0]}"] if self.failures else []
        return "\n".join(lines)


class FailureCounts:
    """Adds failures up, in bounded memory.

    Args:
        keep: Failures that are kept whole; all are counted.
    """

    def __init__(self, keep: int = 1000) -> None:
        self.samples = 0
        """Handed over."""
        self.done: Counter[str] = Counter()
        """What was done."""
        self._keep = keep
        self._kinds: Counter[str] = Counter()
        self._files: Counter[str] = Counter()
        self._kept: list[Failure] = []

    def add(self, samples: int, failures: Sequence[Failure]) -> None:
        """Samples of a batch, and those of them that failed."""
        self.samples += samples
        for failure in failures:
            self.done[failure.done] += 1
            for fault in failure.faults:
                self._kinds[fault.kind] += 1
                if fault.href is not None:
                    known = fault.href in self._files or len(self._files) < _MOST_NAMES
                    self._files[fault.href if known else "others"] += 1
        self._kept += failures[: max(0, self._keep - len(self._kept))]

    def report(self) -> FailureReport:
        """The sum."""
        return FailureReport(
            samples=self.samples,
            failed=self.done.total(),
            done=dict(sorted(self.done.items())),
            kinds=dict(_ranked(self._kinds.items())),
            files=dict(_ranked(self._files.items())),
            failures=tuple(self._kept),
        )


def _ranked(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))


def _listing(counts: dict[str, int]) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:_SHOWN]]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
