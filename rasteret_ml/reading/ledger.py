"""Failures on their way from the process that reads to the one that trains, and the budget that they are held to there.

They travel with their batch, so that none is lost or met early: whatever is read ahead by however many workers, the
budget is exceeded at the same batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data._utils.pin_memory import pin_memory

from rasteret_ml.errors import ErrorBudgetError
from rasteret_ml.reading.failures import Failure, FailureCounts, FailureReport
from rasteret_ml.reading.policy import ErrorPolicy

__all__ = ["BatchCarrier", "CarriedBatch", "FailureLedger", "hand_over"]

_log = logging.getLogger(__name__)

_COUNTED = {"retry": ("retried",), "replace": ("replaced",), "fill": ("filled",), "raise": ()}
"""What each action's budget is of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedBatch:
    """A collated batch between the process that read it and the loader's."""

    batch: Any
    """What the collate function gave."""
    samples: int
    """How many it is of."""
    failures: tuple[Failure, ...]
    """Those of them that failed."""

    def pin_memory(self) -> CarriedBatch:
        """For torch's pinning thread."""
        return replace(self, batch=pin_memory(self.batch))  # type: ignore[no-untyped-call]


class BatchCarrier:
    """A collate function that adds what `hand_over` gave for the batch.

    Args:
        collate: The loader's own.
        loader: Which one.
    """

    def __init__(self, collate: Callable[[Any], Any], loader: str) -> None:
        self._collate = collate
        self._loader = loader

    def __call__(self, samples: Any) -> CarriedBatch:
        """Collate."""
        _, failures = _handed_over.pop(self._loader, ((), []))
        return CarriedBatch(batch=self._collate(samples), samples=len(samples), failures=tuple(failures))


_handed_over: dict[str, tuple[tuple[int, ...], list[Failure]]] = {}
"""By loader: of which batch (pass, number), and what failed. Of this process."""


def hand_over(loader: str, batch: tuple[int, int], failures: Sequence[Failure]) -> None:
    """Give a batch's failures to the collate function that this process calls next; those of another one are void."""
    held = _handed_over.get(loader)
    if held is None or held[0] != batch:
        held = _handed_over[loader] = batch, []
    held[1].extend(failures)


class FailureLedger:
    """The failures of one pass, in the process that trains."""

    def __init__(self, policy: ErrorPolicy) -> None:
        self._policy = policy
        self._counts = FailureCounts()
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
        if not isinstance(item, CarriedBatch):
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
