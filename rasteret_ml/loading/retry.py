"""Chips with too few valid pixels, drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rasteret_ml.loading.sample import Sample
from rasteret_ml.sampling.aoi import AOI

__all__ = ["enough_of_it", "valid_share"]


def valid_share(sample: Sample) -> float:
    """Share of pixels that are valid in all bands and, where `mask_clear` is there, clear; over all dates."""
    valid = sample["mask_valid"].all(-3)
    if "mask_clear" in sample:
        valid = valid & sample["mask_clear"].all(-3)
    return float(valid.float().mean())


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
        for i, sample in zip(again, read([queries[i].spare(attempt) for i in again]), strict=True):
            share = valid_share(sample)
            if share > found[i]:
                samples[i], found[i] = sample, share
        attempt += 1
