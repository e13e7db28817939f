"""Replace samples with too few valid pixels by samples of other places."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.sample import Sample

#: Reads spare queries, given their positions in the batch; returns None for those that cannot be read.
ReadSpares = Callable[[Sequence[int], Sequence[Any]], Sequence[Sample | None]]


def valid_share(sample: Sample) -> float:
    """Return the share of pixels, over all dates, that are valid in all bands and clear (if there is `mask_clear`).

    UsageError: the sample has no `mask_valid`.
    """
    if "mask_valid" not in sample:
        raise UsageError(f"min_valid= needs samples with mask_valid, got {sorted(sample)}; keep it in transforms=.")
    valid = sample["mask_valid"].all(-3)
    if "mask_clear" in sample:
        valid = valid & sample["mask_clear"].all(-3)
    if "time_valid" in sample and valid.ndim == 3:
        valid = valid[sample["time_valid"]]
    return float(valid.float().mean()) if valid.numel() else 0.0


def resample_low_valid(
    queries: Sequence[Any], samples: Sequence[Sample | None], read: ReadSpares, leave: Collection[int] = ()
) -> list[Sample | None]:
    """Return the samples, with those below their AOI's `min_valid` replaced by samples of its spares.

    The first spare that reaches `min_valid` is used, else the best sample; any spare replaces an unreadable one (None).
    The samples at the positions `leave` are kept as they are. The result depends on pixels and AOI only, not on the
    other samples of the batch. Each attempt reads all its spares together.
    """
    shares, result = {}, list(samples)
    for i, (query, sample) in enumerate(zip(queries, samples, strict=True)):
        if isinstance(query, AOI) and i not in leave and (sample is None or query.min_valid > 0):
            shares[i] = _share(sample)
    attempt = 0
    while True:
        low = [i for i in shares if shares[i] < queries[i].min_valid and attempt < len(queries[i].spares)]
        if not low:
            return result
        spares = [queries[i].spare(attempt) for i in low]
        for i, sample in zip(low, _read_overlapping(low, spares, read), strict=True):
            share = _share(sample)
            if share > shares[i]:
                result[i], shares[i] = sample, share
        attempt += 1


def _share(sample: Sample | None) -> float:
    return -1.0 if sample is None else valid_share(sample)


def _read_overlapping(positions: list[int], spares: list[Any], read: ReadSpares) -> Sequence[Sample | None]:
    """Read spares; None for those that overlap no record, because a spare must not fail the batch."""
    try:
        return read(positions, spares)
    except NoOverlapError:
        if len(spares) == 1:
            return [None]
        return [_read_overlapping([i], [spare], read)[0] for i, spare in zip(positions, spares, strict=True)]
