"""What is done about the samples of a batch that could not be read: read again, replaced, or filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rasteret_ml.errors import RasteretError, ReadError
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.loader.failures import Fault, Faults, SampleError
from rasteret_ml.raster.execute import TileError
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.blank import blank_sample
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.sample import Sample

__all__ = ["FailureRecovery"]

_MOST_FAULTS = 16
"""Faults that are kept of a sample."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Case:
    """What went wrong with a sample."""

    reasons: dict[str, TileError | RasteretError] = field(default_factory=dict)
    """Each once, by its words."""
    readings: int = 0
    """In vain."""
    lost: bool = False
    """Whether the sample itself could not be read, however often."""
    lost_spares: int = 0
    """Spare places of it of which that is true."""
    instead: str | None = None
    """What took its place."""

    @property
    def ordered(self) -> list[TileError | RasteretError]:
        """The reasons in an order that is not that of their arrival."""
        return [self.reasons[words] for words in sorted(self.reasons)]


class FailureRecovery:
    """One batch, and what became of the samples that failed.

    What is done is a function of the batch's queries and of which data cannot be read: not of workers or timing.

    Args:
        policy: Not "raise".
        queries: The batch's.
        read: Reads queries, noting what fails: `read(queries, faults)`.
        ignored: Class of label pixels that do not count, by key.
    """

    def __init__(
        self,
        policy: ErrorPolicy,
        queries: Sequence[Any],
        read: Callable[[Sequence[Any], Faults], list[Sample]],
        ignored: dict[str, int],
    ) -> None:
        self._policy = policy
        self._queries = queries
        self._read = read
        self._ignored = ignored
        self._cases: dict[int, _Case] = {}

    def mended(self, samples: Sequence[Sample], faults: Faults) -> list[Sample]:
        """As many samples as were asked for.

        Args:
            samples: As they were read.
            faults: What was noted then.

        Raises:
            ReadError, DataError, FetchError: a sample that the policy has no remedy for.
        """
        places = range(len(self._queries))
        found: list[Sample | None]
        found, forms = self._read_again(places, self._queries, samples, faults)
        lost = [place for place in places if found[place] is None]
        for place in lost:
            self._cases[place].lost = True
        filling = self._policy.action == "fill"
        found = resample_low_valid(self._queries, found, self._read_spares, leave=lost if filling else ())
        if filling:
            return [forms[i] if sample is None else sample for i, sample in enumerate(found)]
        return self._replaced(found)

    def failures(self, batch: int) -> tuple[SampleError, ...]:
        """What failed, by place.

        Args:
            batch: The batch's number in its pass.
        """
        return tuple(self._failure(batch, place, case) for place, case in sorted(self._cases.items()))

    def _read_again(
        self, places: Sequence[int], queries: Sequence[Any], samples: Sequence[Sample], faults: Faults
    ) -> tuple[list[Sample | None], dict[int, Sample]]:
        """Samples, None where even the last reading failed; and blank ones for those, by their order here."""
        found: list[Sample | None] = list(samples)
        failed = self._note(faults, places)
        for _ in range(self._policy.retries):
            if not failed:
                break
            again = Faults()
            for i, sample in zip(failed, self._read([queries[i] for i in failed], again), strict=True):
                found[i] = sample
            still = self._note(again, [places[i] for i in failed])
            failed = [failed[k] for k in still]
        if failed and self._policy.action == "retry":
            raise self._error(places[failed[0]], f"it was read {self._policy.retries + 1} times in vain")
        forms = {i: blank_sample(last, self._ignored) for i in failed if (last := found[i]) is not None}
        return [None if i in forms else sample for i, sample in enumerate(found)], forms

    def _note(self, faults: Faults, places: Sequence[int]) -> list[int]:
        """Keep what failed with the samples it belongs to; which queries did. One that is blank anyway cannot."""
        failed = {i: reasons for i, reasons in faults.by_place.items() if not self._is_blank(places[i])}
        for i, reasons in failed.items():
            case = self._cases.setdefault(places[i], _Case())
            case.readings += 1
            case.reasons |= {str(why): why for why in reasons}
        return list(failed)

    def _is_blank(self, place: int) -> bool:
        query = self._queries[place]
        return isinstance(query, AOI) and bool(query.blank)

    def _read_spares(self, places: Sequence[int], spares: Sequence[Any]) -> list[Sample | None]:
        """Spare places of the samples at `places`, None where one cannot be read."""
        faults = Faults()
        samples = self._read(spares, faults)
        found, _ = self._read_again(places, spares, samples, faults)
        for place, sample in zip(places, found, strict=True):
            if sample is None:
                self._cases[place].lost_spares += 1
            elif place in self._cases:
                self._cases[place].instead = "a spare place of its AOI"
        return found

    def _replaced(self, found: Sequence[Sample | None]) -> list[Sample]:
        """With copies of the next good sample, in a circle; none is taken that only evens out ranks."""
        whole, count = [], len(found)
        for place, sample in enumerate(found):
            chosen, other = sample, place
            while chosen is None:
                other = (other + 1) % count
                if other == place:
                    raise self._error(place, "no other sample of its batch could be read to take its place")
                chosen = None if self._is_blank(other) else found[other]
            if other != place:
                self._cases[place].instead = f"sample {other}"
                chosen = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in chosen.items()}
            whole.append(chosen)
        return whole

    def _error(self, place: int, why: str) -> RasteretError:
        reason = self._cases[place].ordered[0]
        if isinstance(reason, TileError):
            return ReadError(f"{reason} (sample {place} of its batch: {why})")
        return type(reason)(f"{reason} (sample {place} of its batch: {why})")

    def _failure(self, batch: int, place: int, case: _Case) -> SampleError:
        query = self._queries[place]
        drawn = query if isinstance(query, AOI) else None
        reasons = case.ordered
        if case.lost:
            done = "filled" if self._policy.action == "fill" else "replaced"
        else:
            done = "passed over" if case.lost_spares else "retried"
        return SampleError(
            batch=batch,
            place=place,
            draw=None if drawn is None else drawn.draw,
            aoi=None if drawn is None or drawn.row < 0 else drawn.row,
            done=done,  # type: ignore[arg-type]
            instead=case.instead if case.lost else None,
            readings=case.readings,
            faults=tuple(Fault.of(why) for why in reasons[:_MOST_FAULTS]),
            more=max(0, len(reasons) - _MOST_FAULTS),
        )
