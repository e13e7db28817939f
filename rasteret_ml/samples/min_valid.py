"""Chips with too few valid pixels, drawn again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.sample import Sample

__all__ = ["ReadSpares", "resample_low_valid", "valid_share"]


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


ReadSpares = Callable[[Sequence[int], Sequence[Any]], Sequence[Sample | None]]
"""Reads spares, given whose they are (places in the batch) and where; None for one that cannot be read."""


def resample_low_valid(
    queries: Sequence[Any], samples: Sequence[Sample | None], read: ReadSpares, leave: Collection[int] = ()
) -> list[Sample | None]:
    """The samples, those below their AOI's `min_valid` read again from its spare places, all of a try together.

    The first that suffices is taken; where none does, the best. So the choice depends on the pixels and the AOI
    alone, and never on how a batch is made up.

    Args:
        queries: What was asked for.
        samples: What came; None is worse than a sample without a valid pixel, and gives way to any spare.
        read: Reads spares.
        leave: Places of samples that stay as they are.
    """
    found, kept = {}, list(samples)
    for i, (query, sample) in enumerate(zip(queries, samples, strict=True)):
        if isinstance(query, AOI) and i not in leave and (sample is None or query.min_valid > 0):
            found[i] = _share(sample)
    attempt = 0
    while True:
        again = [i for i in found if found[i] < queries[i].min_valid and attempt < len(queries[i].spares)]
        if not again:
            return kept
        spares = [queries[i].spare(attempt) for i in again]
        for i, sample in zip(again, _read_those_there(again, spares, read), strict=True):
            share = _share(sample)
            if share > found[i]:
                kept[i], found[i] = sample, share
        attempt += 1


def _share(sample: Sample | None) -> float:
    return -1.0 if sample is None else valid_share(sample)


def _read_those_there(places: list[int], spares: list[Any], read: ReadSpares) -> Sequence[Sample | None]:
    """A sample a spare, None where nothing is: a spare is no request, and must not cost the sample there is."""
    try:
        return read(places, spares)
    except NoOverlapError:
        if len(spares) == 1:
            return [None]
        return [_read_those_there([i], [spare], read)[0] for i, spare in zip(places, spares, strict=True)]
