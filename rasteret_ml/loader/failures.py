"""Samples that could not be read: what was wrong, what was done, and how many failures a pass allows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch.utils.data._utils.pin_memory import pin_memory

from rasteret_ml.errors import ErrorBudgetError, RasteretError, redact
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.raster.execute import TileError

__all__ = [
    "BatchWithErrors",
    "CollateWithErrors",
    "FailureBudget",
    "FailureReport",
    "SampleError",
    "detached",
]

_log = logging.getLogger(__name__)

_MAX_FILES = 1000
"""Files that are counted by name."""
_MAX_KEPT = 1000
"""Errors that are kept whole; all are counted."""
_MAX_SHOWN = 5
"""Names in a summary."""
_COUNTED = {"retry": ("retried",), "replace": ("replaced",), "fill": ("filled",), "raise": ()}
"""The outcomes that count against each action's budget."""


def detached(error: TileError | RasteretError) -> TileError | RasteretError:
    """Return an error without secrets, and without the frames and buffers that its traceback keeps alive."""
    if isinstance(error, TileError):
        return replace(error, error=type(error.error)(redact(str(error.error))), href=redact(error.href))
    return type(error)(redact(str(error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleError:
    """A sample that could not be read as requested."""

    batch: int
    """Number of the batch in the pass."""
    position: int
    """Position of the sample in the batch."""
    draw: tuple[int, int, int] | None
    """(seed, epoch, position) of the sample; None where no sampler of this library drew it."""
    aoi: int | None
    """Row of its AOI's table; None where it has none."""
    outcome: Literal["retried", "replaced", "filled", "passed over"]
    """"retried": it was read again successfully. "replaced", "filled": see `ErrorPolicy`. "passed over": the sample is
    right, but a spare place of it that `min_valid=` needed could not be read."""
    replacement: str | None
    """What took its place."""
    attempts: int
    """Failed reads, spare places included."""
    errors: tuple[TileError | RasteretError, ...] = field(compare=False)
    """What was wrong, each once."""
    more: int
    """Errors beyond these."""
    causes: tuple[str, ...] = field(init=False, repr=False)
    """`errors` as text; exceptions do not compare, these do."""

    def __post_init__(self) -> None:
        """Describe the errors."""
        causes = (str(e) if isinstance(e, TileError) else f"{type(e).__name__}: {e}" for e in self.errors)
        object.__setattr__(self, "causes", tuple(causes))

    def __str__(self) -> str:
        drawn = "" if self.draw is None else " (seed {}, epoch {}, position {})".format(*self.draw)
        aoi = "" if self.aoi is None else f", AOI {self.aoi}"
        replacement = "" if self.replacement is None else f" by {self.replacement}"
        more = f" and {self.more} more" if self.more else ""
        causes = "; ".join(self.causes)
        return f"batch {self.batch}, sample {self.position}{drawn}{aoi} was {self.outcome}{replacement}: {causes}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureReport:
    """What a pass over a loader could not read so far."""

    samples: int
    """Samples handed over, failed ones included; 0 where `errors` is "raise", which hands over none that failed."""
    failed: int
    """Samples that could not be read as requested."""
    outcomes: dict[str, int]
    """How many of them were "retried", "replaced", "filled" and "passed over"."""
    kinds: dict[str, int]
    """How often each class of error occurred, most frequent first."""
    files: dict[str, int]
    """How often each file failed, most frequent first; of the first thousand files, the others as "others"."""
    failures: tuple[SampleError, ...]
    """The first of them, in the order of the pass."""

    def __str__(self) -> str:
        if not self.failed:
            return f"all {self.samples} samples were read"
        share = f" ({self.failed / self.samples:.2%})" if self.samples else ""
        lines = [f"{self.failed} of {self.samples} samples could not be read{share}: {_listing(self.outcomes)}"]
        lines += [f"  by reason: {_listing(self.kinds)}"]
        lines += [f"  by file: {_listing(self.files)}"] if self.files else []
        lines += [f"  first: {self.failures[0]}"] if self.failures else []
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchWithErrors:
    """A collated batch on its way from the process that read it to the loader's."""

    batch: Any
    """What the collate function returned."""
    samples: int
    """Number of samples."""
    errors: tuple[SampleError, ...]
    """Those of them that failed."""

    def pin_memory(self) -> BatchWithErrors:
        """Pin the batch's memory; called by torch's pinning thread."""
        return replace(self, batch=pin_memory(self.batch))  # type: ignore[no-untyped-call]


class CollateWithErrors:
    """A collate function that keeps the errors of a batch with it.

    They travel together, so that the budget is exceeded at the same batch however far workers have read ahead.

    Args:
        collate: The loader's own.
        take_errors: Returns the errors of the batch that was read last in this process.
    """

    def __init__(self, collate: Callable[[Any], Any], take_errors: Callable[[], tuple[SampleError, ...]]) -> None:
        self._collate = collate
        self._take_errors = take_errors

    def __call__(self, samples: Any) -> BatchWithErrors:
        """Collate."""
        errors = self._take_errors()
        return BatchWithErrors(batch=self._collate(samples), samples=len(samples), errors=errors)


class FailureBudget:
    """The failures of one pass, counted in bounded memory in the process that trains, and the number allowed."""

    def __init__(self, policy: ErrorPolicy) -> None:
        self._policy = policy
        self._samples = 0
        self._outcomes: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._files: Counter[str] = Counter()
        self._kept: list[SampleError] = []
        self._logged = 0

    @property
    def report(self) -> FailureReport:
        """The failures of the pass so far."""
        return FailureReport(
            samples=self._samples,
            failed=self._outcomes.total(),
            outcomes=dict(sorted(self._outcomes.items())),
            kinds=dict(_ranked(self._kinds.items())),
            files=dict(_ranked(self._files.items())),
            failures=tuple(self._kept),
        )

    def receive(self, item: Any) -> Any:
        """Count the failures of what a worker sent, and return the batch in it.

        Raises:
            ErrorBudgetError: more samples failed than the policy allows.
        """
        if not isinstance(item, BatchWithErrors):
            return item
        first = not self._outcomes
        self._count(item.samples, item.errors)
        if item.errors:
            if first:
                _log.warning("%s (the first of this pass; the others are summarized at its end)", item.errors[0])
            self._check(ended=False)
        return item.batch

    def end(self) -> None:
        """End the pass.

        Raises:
            ErrorBudgetError: more samples failed than the policy allows.
        """
        self._check(ended=True)
        self.log_summary()

    def log_summary(self) -> None:
        """Log the report, if it holds failures that were not logged yet."""
        failed = self._outcomes.total()
        if failed > self._logged:
            self._logged = failed
            _log.warning("%s", self.report)

    def _count(self, samples: int, failed: Sequence[SampleError]) -> None:
        self._samples += samples
        for failure in failed:
            self._outcomes[failure.outcome] += 1
            for error in failure.errors:
                cause = error.error if isinstance(error, TileError) else error
                self._kinds[type(cause).__name__] += 1
                if isinstance(error, TileError):
                    known = error.href in self._files or len(self._files) < _MAX_FILES
                    self._files[error.href if known else "others"] += 1
        self._kept += failed[: max(0, _MAX_KEPT - len(self._kept))]

    def _check(self, *, ended: bool) -> None:
        failed = sum(self._outcomes[outcome] for outcome in _COUNTED[self._policy.action])
        if not self._policy.allows(failed, self._samples, ended=ended):
            self._logged = self._outcomes.total()  # the error says it all
            raise ErrorBudgetError(
                f"More samples failed than errors= allows ({self._policy}): {self.report}\n"
                "Repair the files, leave their records out, or give errors= a larger budget."
            )


def _ranked(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted(counts, key=lambda pair: (-pair[1], pair[0]))


def _listing(counts: dict[str, int]) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:_MAX_SHOWN]]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
