"""Samples that stand for nothing: of the right keys, shapes and types, with no valid pixel and no label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.sample import Sample

__all__ = ["NO_LABEL", "blank_padding", "blank_sample"]

NO_LABEL = -100
"""Class of a sample without one: what torch's losses ignore by default."""

_UNKNOWN: dict[str, float | int | bool] = {
    "time": math.nan,
    "record": -1,
    "time_valid": False,
    "length": 0,
    "scale": 1.0,
    "offset": 0.0,
}
"""What is said of pixels, where there are none."""


def blank_sample(sample: Sample, ignore_index: int | Mapping[str, int] = NO_LABEL) -> Sample:
    """A sample with the same keys, shapes and types that holds no pixel; the sample given is not changed.

    `image*` is 0, as what `collate` pads; every boolean `mask*` is False; label pixels are `ignore_index`, or NaN where
    they are floats; `label` is -100 or NaN; `time` NaN, `record` -1, `time_valid` False, `length` 0, `scale` 1 and
    `offset` 0. Whose the sample is and where it lies stays: `aoi`, `draw`, `bounds`, `transform`, `epsg`, `crs`, and
    any key that this library does not know. A collated batch may be given as well.

    Args:
        sample: Of the kind that is wanted.
        ignore_index: Class of label pixels that do not count; by key where there are several heads.
    """
    return {key: _blank(key, value, ignore_index) for key, value in sample.items()}


def _blank(key: str, value: Any, ignore_index: int | Mapping[str, int]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if key.startswith("image"):
        return torch.zeros_like(value)
    if key.startswith("mask"):
        ignored = ignore_index if isinstance(ignore_index, int) else ignore_index.get(key, NO_LABEL)
        return _without_label(value, ignored)
    if key == "label":
        return _without_label(value, NO_LABEL)
    kind = key if key in _UNKNOWN else key.partition("_")[0]  # `scale_image_s1` is a scale
    known = kind in ("scale", "offset") or key in _UNKNOWN
    return torch.full_like(value, _UNKNOWN[kind]) if known else value


def _without_label(value: torch.Tensor, ignored: int) -> torch.Tensor:
    if value.dtype == torch.bool:
        return torch.zeros_like(value)
    return torch.full_like(value, math.nan if value.is_floating_point() else ignored)


def blank_padding(queries: Sequence[Any], samples: list[Sample], ignored: Mapping[str, int]) -> list[Sample]:
    """Blank the samples that only pad a rank's epoch, so that they count for nothing.

    Args:
        queries: Of the samples.
        samples: One per query.
        ignored: Class of label pixels that do not count, by key.
    """
    padding = [isinstance(query, AOI) and query.blank for query in queries]
    if not any(padding):
        return samples
    return [blank_sample(sample, ignored) if pad else sample for sample, pad in zip(samples, padding, strict=True)]
