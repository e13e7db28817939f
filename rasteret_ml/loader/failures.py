"""Samples that could not be read: what to do about them, what was done, and how many failures a pass allows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch.utils.data._utils.pin_memory import pin_memory

from rasteret_ml.errors import ErrorBudgetError, RasteretError, UsageError, redact
from rasteret_ml.raster.execute import TileError
from rasteret_ml.samplers.sampler import config_from

ErrorAction = Literal["raise", "retry", "replace", "fill"]  #: See `ErrorPolicy.action`.

# A budget that is a share refers to at least so many samples, since one failure at the start says little.
_MIN_SAMPLES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPolicy:
    """What a `DataLoader` does about samples whose data cannot be read.

    A policy covers failures of the network and of files: a tile that does not arrive, or cannot be decoded. Wrong
    arguments, errors in code and errors of other libraries' datasets always raise. No sample is ever left out, so
    batches, ranks and epochs keep their length. `DataLoader.failures` lists what was done; it is also logged at the end
    of the pass.

    Raises:
        UsageError: an unknown action, or invalid numbers.

    Example:
        >>> policy = rm.ErrorPolicy(action="replace", retries=2, budget=0.01)  # doctest: +SKIP
        >>> loader = rm.DataLoader(images, 16, sampler=sampler, errors=policy)  # doctest: +SKIP
    """

    #: "raise": the error ends the pass. "retry": the sample is read again, up to `retries` times, then the error is
    #: raised (each request was retried before that, see `RetryPolicy`). "replace": after the retries, another sample
    #: takes its place: from the next spare place of its AOI if it has any (`min_valid=`), else a copy of the next good
    #: sample of its batch, with that one's `draw`, `aoi` and `label`; if the batch has none, the error is raised.
    #: "fill": after the retries, a sample of the same shape without a valid pixel (see `collate.blank_sample`); choose
    #: it for validation, where "replace" would count a sample twice.
    action: ErrorAction = "raise"
    retries: int = 1  #: How often a failed sample is read again.
    #: Samples of a pass (of each rank, under DDP) that may be replaced, filled or, with "retry", read again before
    #: `ErrorBudgetError` ends it: an int is a count, a float a share (1 is one sample, 1.0 all), None any number. A
    #: share refers to the samples so far, but at least to 200 until the pass has ended, and always allows one, unless
    #: it is 0.
    budget: int | float | None = 0.05

    def __post_init__(self) -> None:
        """Check."""
        if self.action not in get_args(ErrorAction):
            raise UsageError(f"errors= must be one of {', '.join(get_args(ErrorAction))}, got {self.action!r}.")
        if not _is_count(self.retries) or (self.action == "retry" and not self.retries):
            raise UsageError(f"retries= must be an integer >= {int(self.action == 'retry')}, got {self.retries!r}.")
        share = isinstance(self.budget, float) and 0 <= self.budget <= 1
        if self.budget is not None and not _is_count(self.budget) and not share:
            raise UsageError(f"budget= must be a count, a share from 0.0 to 1.0, or None, got {self.budget!r}.")
        if self.action == "raise" and (self.retries, self.budget) != (1, 0.05):
            raise UsageError("retries= and budget= need errors='retry', 'replace' or 'fill'; 'raise' uses neither.")

    @classmethod
    def of(cls, errors: ErrorPolicy | str | Mapping[str, Any] | None) -> ErrorPolicy:
        """Return a policy from itself, its action, or a mapping of its fields (as in YAML); None = "raise".

        Raises:
            UsageError: another action or type, or unknown fields.
        """
        return config_from(cls, errors, "errors=", "action")

    def __str__(self) -> str:
        if self.budget is None:
            return f"{self.action}, any number"
        count = isinstance(self.budget, int)
        return f"{self.action}, at most {self.budget if count else format(self.budget, '.2%')} of the samples"


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


_log = logging.getLogger(__name__)

_MAX_FILES = 1000  # Files that are counted by name.
_MAX_KEPT = 1000  # Errors that are kept whole; all are counted.
_MAX_SHOWN = 5  # Names in a summary.
# The outcomes that count against each action's budget.
_COUNTED = {"retry": ("retried",), "replace": ("replaced",), "fill": ("filled",), "raise": ()}


def detached(error: TileError | RasteretError) -> TileError | RasteretError:
    """Return an error without secrets, and without the frames and buffers that its traceback keeps alive."""
    if isinstance(error, TileError):
        return replace(error, error=type(error.error)(redact(str(error.error))), href=redact(error.href))
    return type(error)(redact(str(error)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleError:
    """A sample that could not be read as requested."""

    batch: int  #: Number of the batch in the pass.
    position: int  #: Position of the sample in the batch.
    #: (seed, epoch, position) of the sample; None where no sampler of this library drew it.
    draw: tuple[int, int, int] | None
    aoi: int | None  #: Row of its AOI's table; None where it has none.
    #: "retried": it was read again successfully. "replaced", "filled": see `ErrorPolicy`. "passed over": the sample is
    #: right, but a spare place of it that `min_valid=` needed could not be read.
    outcome: Literal["retried", "replaced", "filled", "passed over"]
    replacement: str | None  #: What took its place.
    attempts: int  #: Failed reads, spare places included.
    errors: tuple[TileError | RasteretError, ...] = field(compare=False)  #: What was wrong, each once.
    more: int  #: Errors beyond these.

    def __str__(self) -> str:
        drawn = "" if self.draw is None else " (seed {}, epoch {}, position {})".format(*self.draw)
        aoi = "" if self.aoi is None else f", AOI {self.aoi}"
        replacement = "" if self.replacement is None else f" by {self.replacement}"
        more = f" and {self.more} more" if self.more else ""
        causes = "; ".join(str(e) if isinstance(e, TileError) else f"{type(e).__name__}: {e}" for e in self.errors)
        return f"batch {self.batch}, sample {self.position}{drawn}{aoi} was {self.outcome}{replacement}: {causes}{more}"


@dataclass(slots=True, kw_only=True)
class FailureReport:
    """What a pass over a loader could not read so far; it grows while the pass goes on."""

    #: Samples handed over, failed ones included; 0 where `errors` is "raise", which hands over none that failed.
    samples: int = 0
    #: How many of them were "retried", "replaced", "filled" and "passed over".
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)  #: How often each class of error occurred.
    #: How often each file failed; of the first thousand files, the others as "others".
    files: Counter[str] = field(default_factory=Counter)
    failures: list[SampleError] = field(default_factory=list)  #: The first thousand of them, in the order of the pass.

    @property
    def failed(self) -> int:
        """Samples that could not be read as requested."""
        return self.outcomes.total()

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

    batch: Any  #: What the collate function returned.
    samples: int  #: Number of samples.
    errors: tuple[SampleError, ...]  #: Those of them that failed.

    def pin_memory(self) -> BatchWithErrors:
        """Pin the batch's memory; called by torch's pinning thread."""
        return replace(self, batch=pin_memory(self.batch))  # type: ignore[no-untyped-call]


def collate_with_errors(
    collate: Callable[[Any], Any], take_errors: Callable[[], tuple[SampleError, ...]], samples: Any
) -> BatchWithErrors:
    """Collate the batch that was read last in this process, whose errors `take_errors` returns, and keep them with it.

    They travel together, so that the budget is exceeded at the same batch however far workers have read ahead.
    """
    errors = take_errors()
    return BatchWithErrors(batch=collate(samples), samples=len(samples), errors=errors)


class FailureBudget:
    """The failures of one pass, counted in bounded memory in the process that trains, and the number allowed."""

    def __init__(self, policy: ErrorPolicy) -> None:
        self._policy = policy
        self.report = FailureReport()  #: The failures of the pass so far.
        self._logged = 0

    def receive(self, item: Any) -> Any:
        """Count the failures of what a worker sent, and return the batch in it; may raise ErrorBudgetError."""
        if not isinstance(item, BatchWithErrors):
            return item
        report = self.report
        if item.errors and not report.failures:
            _log.warning("%s (the first of this pass; the others are summarized at its end)", item.errors[0])
        report.samples += item.samples
        for failure in item.errors:
            report.outcomes[failure.outcome] += 1
            for error in failure.errors:
                cause = error.error if isinstance(error, TileError) else error
                report.kinds[type(cause).__name__] += 1
                if isinstance(error, TileError):
                    known = error.href in report.files or len(report.files) < _MAX_FILES
                    report.files[error.href if known else "others"] += 1
        report.failures += item.errors[: max(0, _MAX_KEPT - len(report.failures))]
        if item.errors:
            self._check(ended=False)
        return item.batch

    def end(self) -> None:
        """End the pass; may raise ErrorBudgetError."""
        self._check(ended=True)
        self.log_summary()

    def log_summary(self) -> None:
        """Log the report, if it holds failures that were not logged yet."""
        if self.report.failed > self._logged:
            self._logged = self.report.failed
            _log.warning("%s", self.report)

    def _check(self, *, ended: bool) -> None:
        failed = sum(self.report.outcomes[outcome] for outcome in _COUNTED[self._policy.action])
        allowed = self._policy.budget
        if allowed and isinstance(allowed, float):
            samples = self.report.samples
            allowed = max(1.0, allowed * (samples if ended else max(samples, _MIN_SAMPLES)))
        if allowed is not None and failed > allowed:
            self._logged = self.report.failed  # the error says it all
            raise ErrorBudgetError(
                f"More samples failed than errors= allows ({self._policy}): {self.report}\n"
                "Repair the files, leave their records out, or give errors= a larger budget."
            )


def _listing(counts: Counter[str]) -> str:
    shown = [f"{name} {count}" for name, count in counts.most_common(_MAX_SHOWN)]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
