"""What a loader does about samples that cannot be read, and how many there may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rasteret_ml.errors import UsageError

__all__ = ["ErrorAction", "ErrorPolicy"]

ErrorAction = Literal["raise", "retry", "replace", "fill"]
"""See `ErrorPolicy.action`."""

_LEAST = 200
"""Samples that a share is taken of before so many were handed over: one failure at the start is no rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPolicy:
    """What a `DataLoader` does about samples whose data cannot be read.

    That is what the wire or a file is at fault for: a tile that does not come, or cannot be decoded. Wrong arguments
    and mistakes in code raise under every policy, and so does what a dataset of another library raises. No sample is
    ever left out, so that batches, ranks and epochs keep their length. Whatever was done is in `DataLoader.failures`,
    and logged at the end of the pass.

    Raises:
        UsageError: no such action, or numbers that cannot be.
    """

    action: ErrorAction = "raise"
    """"raise": the error ends the pass. "retry": the sample is read again, `retries` times, then raised (the fetching
    itself tries each request again before, see `RetryPolicy`). "replace": after the retries, another sample in its
    place: from the next spare place of its own AOI where it has any (`min_valid=`), else a copy of the next good sample
    of its batch, with that one's `draw`, `aoi` and `label`; it is raised where the whole batch has none. "fill": after
    the retries, a sample of the same form in which nothing counts (see `collate.blank_sample`); the one to choose
    for validation, where "replace" would count a sample twice."""
    retries: int = 1
    """Readings of a failed sample beyond the first one."""
    budget: int | float | None = 0.05
    """Samples of a pass (of each rank's own, under DDP) that may be replaced or filled or, with "retry", read again,
    before `ErrorBudgetError` ends it: an int is a count, a float a share (1 is one sample, 1.0 all), None any number. A
    share is of the samples handed over so far, but at least of 200 before the pass has ended, and always allows one,
    unless it is 0."""

    def __post_init__(self) -> None:
        """Check."""
        if self.action not in get_args(ErrorAction):
            raise UsageError(f"errors= is {', '.join(map(repr, get_args(ErrorAction)))}, not {self.action!r}.")
        if not _is_count(self.retries) or (self.action == "retry" and not self.retries):
            raise UsageError(f"retries= is a whole number, at least {int(self.action == 'retry')}, not {self.retries}.")
        share = isinstance(self.budget, float) and 0 <= self.budget <= 1
        if self.budget is not None and not _is_count(self.budget) and not share:
            raise UsageError(f"budget= is a count of samples, a share from 0.0 to 1.0, or None, not {self.budget!r}.")
        if self.action == "raise" and (self.retries, self.budget) != (1, 0.05):
            raise UsageError("retries= and budget= are for errors='retry', 'replace' and 'fill'; 'raise' has neither.")

    @classmethod
    def of(cls, errors: ErrorPolicy | str | Mapping[str, Any] | None) -> ErrorPolicy:
        """From an action, from a mapping of the fields (as in YAML), or from a policy; None = raise.

        Raises:
            UsageError: none of these.
        """
        if errors is None or isinstance(errors, ErrorPolicy):
            return errors or cls()
        if isinstance(errors, str):
            return cls(action=errors)  # type: ignore[arg-type]
        known = {field.name for field in fields(cls)}
        if not isinstance(errors, Mapping) or not set(errors) <= known:
            raise UsageError(f"errors= is an action, or a mapping of {', '.join(sorted(known))}, not {errors!r}.")
        return cls(**errors)

    def allows(self, failed: int, samples: int, *, ended: bool = False) -> bool:
        """Whether so many of the samples handed over may have failed.

        Args:
            failed: Samples that the action was applied to.
            samples: Handed over so far, these included.
            ended: Whether the pass has no more.
        """
        if self.budget is None:
            return True
        if isinstance(self.budget, int):
            return failed <= self.budget
        most = self.budget * (samples if ended else max(samples, _LEAST))
        return failed <= (max(1.0, most) if self.budget else 0)

    def __str__(self) -> str:
        if self.budget is None:
            return f"{self.action}, any number"
        count = isinstance(self.budget, int)
        return f"{self.action}, at most {self.budget if count else format(self.budget, '.2%')} of the samples"


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
