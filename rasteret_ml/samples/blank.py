"""Samples that stand for nothing: of the right keys, shapes and types, with no valid pixel and no label."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torchgeo.datasets import IntersectionDataset, UnionDataset

from rasteret_ml.samples.sample import Sample

__all__ = ["NO_LABEL", "blank_sample", "ignored_by_key"]

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
        ignore_index: Class of label pixels that do not count; by key where there are several heads (`ignored_by_key`).
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


def ignored_by_key(dataset: Any) -> dict[str, int]:
    """Class of label pixels that do not count, by key of each head; of combinations those of their parts."""
    if isinstance(dataset, (IntersectionDataset, UnionDataset)):
        sides = [ignored_by_key(side) for side in dataset.datasets]
        return sides[1] | sides[0]
    ignored = getattr(dataset, "ignore_index", None)
    form = getattr(getattr(dataset, "_batches", None), "form", None)
    key = getattr(dataset, "key", None) if form is None else form.key
    return {key: ignored} if isinstance(ignored, int) and isinstance(key, str) else {}
