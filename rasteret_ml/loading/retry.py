"""Chips with too few valid pixels, drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.loading.sample import Sample
from rasteret_ml.sampling.aoi import AOI

__all__ = ["enough_of_it", "valid_share"]


def valid_share(sample: Sample) -> float:
    """Share of pixels that are valid in all bands and, where `mask_clear` is there, clear; over all dates there are.

    Raises:
        UsageError: the sample has no `mask_valid`.
    """
    if "mask_valid" not in sample:
        raise UsageError("min_valid= needs samples with mask_valid; keep it in transforms=.")
    valid = sample["mask_valid"].all(-3)
    if "mask_clear" in sample:
        valid = valid & sample["mask_clear"].all(-3)
    if "time_valid" in sample and valid.ndim == 3:
        valid = valid[sample["time_valid"]]
    return float(valid.float().mean()) if valid.numel() else 0.0


def enough_of_it(
    queries: Sequence[Any], samples: list[Sample], read: Callable[[list[Any]], list[Sample]]
) -> list[Sample]:
    """The samples, those below their AOI's `min_valid` read again from its spare places, all of a try together.

    The first that suffices is taken; where none does, the best. So the choice depends on the pixels and the AOI
    alone, and never on how a batch is made up.
    """
    wanting = [i for i, query in enumerate(queries) if isinstance(query, AOI) and query.min_valid > 0]
    found = {i: valid_share(samples[i]) for i in wanting}
    attempt = 0
    while True:
        again = [i for i in wanting if found[i] < queries[i].min_valid and attempt < len(queries[i].spares)]
        if not again:
            return samples
        spares = [queries[i].spare(attempt) for i in again]
        for i, sample in zip(again, _read_those_there(spares, read), strict=True):
            share = -1.0 if sample is None else valid_share(sample)
            if sample is not None and share > found[i]:
                samples[i], found[i] = sample, share
        attempt += 1


def _read_those_there(spares: list[Any], read: Callable[[list[Any]], list[Sample]]) -> Sequence[Sample | None]:
    """A sample a spare, None where nothing is: a spare is no request, and must not cost the sample there is."""
    try:
        return read(spares)
    except NoOverlapError:
        return [None] if len(spares) == 1 else [_read_those_there([spare], read)[0] for spare in spares]
