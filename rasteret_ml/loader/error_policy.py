"""What a loader does about samples that cannot be read, and how many it allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rasteret_ml.errors import UsageError

__all__ = ["ErrorAction", "ErrorPolicy"]

ErrorAction = Literal["raise", "retry", "replace", "fill"]
"""See `ErrorPolicy.action`."""

_MIN_SAMPLES = 200
"""A budget that is a share refers to at least so many samples, since one failure at the start says little."""


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

    action: ErrorAction = "raise"
    """"raise": the error ends the pass. "retry": the sample is read again, up to `retries` times, then the error is
    raised (each request was retried before that, see `RetryPolicy`). "replace": after the retries, another sample takes
    its place: from the next spare place of its AOI if it has any (`min_valid=`), else a copy of the next good sample of
    its batch, with that one's `draw`, `aoi` and `label`; if the batch has none, the error is raised. "fill": after the
    retries, a sample of the same shape without a valid pixel (see `collate.blank_sample`); choose it for
    validation, where "replace" would count a sample twice."""
    retries: int = 1
    """How often a failed sample is read again."""
    budget: int | float | None = 0.05
    """Samples of a pass (of each rank, under DDP) that may be replaced, filled or, with "retry", read again before
    `ErrorBudgetError` ends it: an int is a count, a float a share (1 is one sample, 1.0 all), None any number. A share
    refers to the samples so far, but at least to 200 until the pass has ended, and always allows one, unless it is
    0."""

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
            UsageError: another type, or unknown fields.
        """
        if errors is None or isinstance(errors, ErrorPolicy):
            return errors or cls()
        if isinstance(errors, str):
            return cls(action=errors)  # type: ignore[arg-type]
        known = {field.name for field in fields(cls)}
        if not isinstance(errors, Mapping) or not set(errors) <= known:
            raise UsageError(f"errors= must be an action or a mapping of {', '.join(sorted(known))}, got {errors!r}.")
        return cls(**errors)

    def allows(self, failed: int, samples: int, *, ended: bool = False) -> bool:
        """Return whether the budget allows a number of failures.

        Args:
            failed: Samples that the action was applied to.
            samples: Samples of the pass so far, failed ones included.
            ended: Whether the pass has ended.
        """
        if self.budget is None:
            return True
        if isinstance(self.budget, int):
            return failed <= self.budget
        allowed = self.budget * (samples if ended else max(samples, _MIN_SAMPLES))
        return failed <= (max(1.0, allowed) if self.budget else 0)

    def __str__(self) -> str:
        if self.budget is None:
            return f"{self.action}, any number"
        count = isinstance(self.budget, int)
        return f"{self.action}, at most {self.budget if count else format(self.budget, '.2%')} of the samples"


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
