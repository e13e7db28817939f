"""Samples that could not be read: what was wrong, what was done, and the sum of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.utils.data._utils.pin_memory import pin_memory

from rasteret_ml.errors import ErrorBudgetError, RasteretError, redact
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.execute import TileError

__all__ = [
    "BatchWithErrors",
    "CollateWithErrors",
    "FailureBudget",
    "FailureCounter",
    "FailureReport",
    "Fault",
    "Faults",
    "SampleError",
    "hand_over",
]

_log = logging.getLogger(__name__)

_COUNTED = {"retry": ("retried",), "replace": ("replaced",), "fill": ("filled",), "raise": ()}
"""What each action's budget is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWithErrors:
    """A collated batch between the process that read it and the loader's."""

    batch: Any
    """What the collate function gave."""
    samples: int
    """How many it is of."""
    failures: tuple[SampleError, ...]
    """Those of them that failed."""

    def pin_memory(self) -> BatchWithErrors:
        """For torch's pinning thread."""
        return replace(self, batch=pin_memory(self.batch))  # type: ignore[no-untyped-call]


class CollateWithErrors:
    """A collate function that adds what `hand_over` gave for the batch.

    Args:
        collate: The loader's own.
        loader: Which one.
    """

    def __init__(self, collate: Callable[[Any], Any], loader: str) -> None:
        self._collate = collate
        self._loader = loader

    def __call__(self, samples: Any) -> BatchWithErrors:
        """Collate."""
        _, failures = _handed_over.pop(self._loader, ((), []))
        return BatchWithErrors(batch=self._collate(samples), samples=len(samples), failures=tuple(failures))


_handed_over: dict[str, tuple[tuple[int, ...], list[SampleError]]] = {}
"""By loader: of which batch (pass, number), and what failed. Of this process."""


def hand_over(loader: str, batch: tuple[int, int], failures: Sequence[SampleError]) -> None:
    """Give a batch's failures to the collate function that this process calls next; those of another one are void."""
    held = _handed_over.get(loader)
    if held is None or held[0] != batch:
        held = _handed_over[loader] = batch, []
    held[1].extend(failures)


class FailureBudget:
    """The failures of one pass, in the process that trains."""

    def __init__(self, policy: ErrorPolicy) -> None:
        self._policy = policy
        self._counts = FailureCounter()
        self._logged = 0

    @property
    def report(self) -> FailureReport:
        """As far as the pass has come."""
        return self._counts.report()

    def received(self, item: Any) -> Any:
        """The batch in what a process sent.

        Raises:
            ErrorBudgetError: more has failed than the policy allows.
        """
        if not isinstance(item, BatchWithErrors):
            return item
        first = not self._counts.done
        self._counts.add(item.samples, item.failures)
        if item.failures:
            if first:
                _log.warning(
                    "%s (the first of this pass; others are counted and summed up at its end)", item.failures[0]
                )
            self._check(ended=False)
        return item.batch

    def ended(self) -> None:
        """The pass is over.

        Raises:
            ErrorBudgetError: more has failed than the policy allows.
        """
        self._check(ended=True)
        self.sum_up()

    def sum_up(self) -> None:
        """Log the report, if there is anything in it that was not logged yet."""
        failed = self._counts.done.total()
        if failed > self._logged:
            self._logged = failed
            _log.warning("%s", self.report)

    def _check(self, *, ended: bool) -> None:
        failed = sum(self._counts.done[done] for done in _COUNTED[self._policy.action])
        if not self._policy.allows(failed, self._counts.samples, ended=ended):
            self._logged = self._counts.done.total()  # the error says it all
            raise ErrorBudgetError(
                f"More failed than errors= allows ({self._policy}): {self.report}\n"
                "Mend what is at fault, leave its records out, or give errors= a larger budget."
            )


class Faults:
    """Why queries of a batch could not be read, by their place in it.

    A dataset that is given one (see `BatchReadable.begin`) notes what fails here and goes on with the others; the
    samples of failed queries then have the form of all, and no meaning.
    """

    def __init__(self) -> None:
        self._found: dict[int, list[TileError | RasteretError]] = {}
        self._places: Sequence[int] | None = None

    def note(self, place: int, why: TileError | RasteretError) -> None:
        """A query could not be read."""
        self._found.setdefault(place if self._places is None else self._places[place], []).append(why)

    def within(self, places: Sequence[int]) -> Faults:
        """For a side that reads only the queries at these places: what it notes is noted here."""
        part = Faults()
        part._found = self._found
        part._places = places if self._places is None else [self._places[place] for place in places]
        return part

    @property
    def by_place(self) -> dict[int, tuple[TileError | RasteretError, ...]]:
        """What was found, by place in the whole batch, ascending."""
        return {place: tuple(self._found[place]) for place in sorted(self._found)}

    def has(self, place: int) -> bool:
        """Whether this query failed."""
        return (place if self._places is None else self._places[place]) in self._found


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
    def of(cls, why: TileError | RasteretError) -> Fault:
        """From what a dataset noted."""
        if not isinstance(why, TileError):
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
class SampleError:
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
    failures: tuple[SampleError, ...]
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


class FailureCounter:
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
        self._kept: list[SampleError] = []

    def add(self, samples: int, failures: Sequence[SampleError]) -> None:
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
