"""What is done about the samples of a batch that could not be read: read again, replaced, or filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rasteret_ml.datasets.batches import SampleBatch
from rasteret_ml.errors import RasteretError, ReadError
from rasteret_ml.loader.failures import ErrorPolicy, SampleError, detached
from rasteret_ml.raster.execute import TileError
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.collate import blank_sample
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.sample import Sample

_MAX_ERRORS = 16  # Errors that are kept of a sample.


@dataclass(slots=True, kw_only=True, eq=False)
class _FailedSample:
    """What went wrong with a sample."""

    errors: dict[str, TileError | RasteretError] = field(default_factory=dict)  # Each once, by its text.
    attempts: int = 0  # Failed reads.
    lost: bool = False  # Whether the sample itself could not be read in any attempt.
    lost_spares: int = 0  # Spare places of it that could not be read in any attempt.
    replacement: str | None = None  # What took its place.

    @property
    def sorted_errors(self) -> list[TileError | RasteretError]:
        """The errors in an order that does not depend on timing."""
        return [self.errors[text] for text in sorted(self.errors)]


class FailureRecovery:
    """One batch, and what becomes of its samples that failed.

    The result is a function of the batch's queries and of which data cannot be read, not of workers or timing. The
    policy has any action but "raise", `read` allows errors, and `ignored` is the class of label pixels that do not
    count, by key.
    """

    def __init__(
        self,
        policy: ErrorPolicy,
        queries: Sequence[Any],
        read: Callable[[Sequence[Any]], SampleBatch],
        ignored: Mapping[str, int],
    ) -> None:
        self._policy = policy
        self._queries = queries
        self._read = read
        self._ignored = ignored
        self._cases: dict[int, _FailedSample] = {}

    def recover(self, batch: SampleBatch, number: int) -> tuple[list[Sample], list[SampleError]]:
        """Return a sample for every query, and the errors of those that failed in the first read, `batch`.

        `number` is that of the batch in its pass. ReadError, DataError or FetchError: a sample that the policy has no
        remedy for.
        """
        positions = range(len(self._queries))
        found, blanks = self._retry(positions, self._queries, batch)
        lost = [i for i in positions if found[i] is None]
        for i in lost:
            self._cases[i].lost = True
        fill = self._policy.action == "fill"
        found = resample_low_valid(self._queries, found, self._read_spares, leave=lost if fill else ())
        if fill:
            samples = [blanks[i] if sample is None else sample for i, sample in enumerate(found)]
        else:
            samples = self._replace(found)
        return samples, [self._sample_error(number, i, case) for i, case in sorted(self._cases.items())]

    def _retry(
        self, positions: Sequence[int], queries: Sequence[Any], batch: SampleBatch
    ) -> tuple[list[Sample | None], dict[int, Sample]]:
        """Return the samples, None where every attempt failed, and blank samples for those by index in `queries`."""
        found: list[Sample | None] = list(batch.samples)
        failed = self._record_errors(batch, positions)
        for _ in range(self._policy.retries):
            if not failed:
                break
            again = self._read([queries[i] for i in failed])
            for i, sample in zip(failed, again.samples, strict=True):
                found[i] = sample
            still = self._record_errors(again, [positions[i] for i in failed])
            failed = [failed[k] for k in still]
        if failed and self._policy.action == "retry":
            raise self._error(positions[failed[0]], f"{self._policy.retries + 1} attempts failed")
        blanks = {i: blank_sample(last, self._ignored) for i in failed if (last := found[i]) is not None}
        return [None if i in blanks else sample for i, sample in enumerate(found)], blanks

    def _record_errors(self, batch: SampleBatch, positions: Sequence[int]) -> list[int]:
        """Record the errors of a read by sample, and return which queries failed; padding samples cannot fail."""
        failed = {i: batch.errors[i] for i in sorted(batch.errors) if not self._is_padding(positions[i])}
        for i, errors in failed.items():
            case = self._cases.setdefault(positions[i], _FailedSample())
            case.attempts += 1
            case.errors |= {str(error): error for error in errors}
        return list(failed)

    def _is_padding(self, position: int) -> bool:
        query = self._queries[position]
        return isinstance(query, AOI) and bool(query.blank)

    def _read_spares(self, positions: Sequence[int], spares: Sequence[Any]) -> list[Sample | None]:
        """Read spare places of the samples at `positions`; None where one cannot be read."""
        found, _ = self._retry(positions, spares, self._read(spares))
        for i, sample in zip(positions, found, strict=True):
            if sample is None:
                self._cases[i].lost_spares += 1
            elif i in self._cases:
                self._cases[i].replacement = "a spare place of its AOI"
        return found

    def _replace(self, found: Sequence[Sample | None]) -> list[Sample]:
        """Replace missing samples by copies of the next good one, wrapping around; padding samples are not copied."""
        samples, count = [], len(found)
        for i, sample in enumerate(found):
            chosen, other = sample, i
            while chosen is None:
                other = (other + 1) % count
                if other == i:
                    raise self._error(i, "no other sample of its batch could be read to replace it")
                chosen = None if self._is_padding(other) else found[other]
            if other != i:
                self._cases[i].replacement = f"sample {other}"
                chosen = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in chosen.items()}
            samples.append(chosen)
        return samples

    def _error(self, position: int, reason: str) -> RasteretError:
        error = self._cases[position].sorted_errors[0]
        kind = ReadError if isinstance(error, TileError) else type(error)
        return kind(f"{error} (sample {position} of its batch: {reason})")

    def _sample_error(self, batch: int, position: int, case: _FailedSample) -> SampleError:
        query = self._queries[position]
        aoi = query if isinstance(query, AOI) else None
        errors = case.sorted_errors
        if case.lost:
            outcome = "filled" if self._policy.action == "fill" else "replaced"
        else:
            outcome = "passed over" if case.lost_spares else "retried"
        return SampleError(
            batch=batch,
            position=position,
            draw=None if aoi is None else aoi.draw,
            aoi=None if aoi is None or aoi.row < 0 else aoi.row,
            outcome=outcome,  # type: ignore[arg-type]
            replacement=case.replacement if case.lost else None,
            attempts=case.attempts,
            errors=tuple(detached(error) for error in errors[:_MAX_ERRORS]),
            more=max(0, len(errors) - _MAX_ERRORS),
        )
