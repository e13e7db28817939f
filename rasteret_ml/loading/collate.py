"""Samples to a batch: stacked in native dtype, ragged ones padded as invalid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, epsg_code
from rasteret_ml.loading.buffers import side_by_side
from rasteret_ml.loading.sample import Sample, bounds_tensor

__all__ = ["collate"]

_SQUEEZED = ("label", "aoi")


def collate(samples: Sequence[Sample], ignore_index: int = -100) -> Sample:
    """Stack samples along a new first axis.

    Every tensor keeps its dtype (uint16 stays uint16). What a batch was read into as one buffer is passed on without
    a copy; the rest is stacked, in a worker straight into shared memory.
    Chips of several sizes are padded at the bottom and right: `mask_*` with False, integer `mask` with
    `ignore_index`, float `mask` with NaN, `image` with 0. `label` and `aoi` lose their axis of one: `[B]`. The
    slices and CRS that TorchGeo 0.8 keeps in items become tensors (`bounds` float64 `[B, 9]`, `crs` int64 `[B]`,
    0 = no EPSG code).

    Raises:
        UsageError: samples with different keys, or tensors that differ in more than height and width.
    """
    if not samples:
        raise UsageError("There are no samples to collate.")
    keys = list(samples[0])
    for i, sample in enumerate(samples):
        if set(sample) != set(keys):
            missing = sorted(set(keys) ^ set(sample))
            raise UsageError(f"Samples 0 and {i} of a batch do not have the same keys: {missing} is in one only.")
    return {key: _stack(key, [_tensor(key, sample[key]) for sample in samples], ignore_index) for key in keys}


def _tensor(key: str, value: Any) -> Any:
    if key == "bounds" and isinstance(value, tuple):
        return bounds_tensor(value)
    if key == "crs" and not isinstance(value, torch.Tensor):
        return torch.tensor(epsg_code(crs_text(value)) or 0)
    return value


def _stack(key: str, values: list[Any], ignore_index: int) -> Any:
    if not isinstance(values[0], torch.Tensor):
        return values
    if any(v.shape != values[0].shape for v in values):
        values = _padded(key, values, ignore_index)
    whole = side_by_side(values)
    if whole is not None and (whole.untyped_storage().is_shared() or get_worker_info() is None):
        return whole[:, 0] if key in _SQUEEZED and whole.shape[1:] == (1,) else whole
    if key in _SQUEEZED and values[0].shape == (1,):
        values = [v[0] for v in values]
    out = None
    if get_worker_info() is not None:  # as torch's default_collate: one copy, straight into shared memory
        first = values[0]
        size = len(values) * first.numel()
        storage = first._typed_storage()._new_shared(size, device=first.device)
        out = first.new(storage).resize_(len(values), *first.size())
    return torch.stack(values, out=out)


def _padded(key: str, values: list[torch.Tensor], ignore_index: int) -> list[torch.Tensor]:
    shapes = [tuple(v.shape) for v in values]
    if len({(len(s), s[:-2]) for s in shapes}) > 1 or len(shapes[0]) < 2 or not key.startswith(("image", "mask")):
        raise UsageError(
            f"{key!r} cannot be batched: shapes {sorted(set(shapes))} differ in more than height and width."
        )
    height, width = max(s[-2] for s in shapes), max(s[-1] for s in shapes)
    first = values[0]
    fill: float | int | bool = 0
    if first.dtype == torch.bool:
        fill = False
    elif key == "mask":
        fill = float("nan") if first.is_floating_point() else ignore_index
    padded = []
    for value in values:
        whole = torch.full((*value.shape[:-2], height, width), fill, dtype=value.dtype)
        whole[..., : value.shape[-2], : value.shape[-1]] = value
        padded.append(whole)
    return padded
