"""Samples to a batch: stacked in native dtype, ragged ones padded as invalid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, epsg_code
from rasteret_ml.samples.buffers import batch_buffers, side_by_side
from rasteret_ml.samples.sample import Sample, bounds_tensor

__all__ = ["collate"]

_SQUEEZED = ("label", "aoi", "epsg", "length")
_SERIES: dict[str, tuple[int, float | int | bool]] = {
    "time": (1, float("nan")),
    "record": (1, -1),
    "time_valid": (1, False),
    "scale": (2, 1.0),
    "offset": (2, 0.0),
}
"""What has an axis T first, of how many axes, and what it is padded with."""


def collate(samples: Sequence[Sample], ignore_index: int = -100) -> Sample:
    """Stack samples along a new first axis.

    Every tensor keeps its dtype (uint16 stays uint16). What a batch was read into as one buffer is passed on without
    a copy; the rest is stacked, in a worker straight into shared memory.

    Chips of several sizes are padded at the bottom and right, series `[T, C, H, W]` of several lengths at the end:
    `image*` with 0, `mask*` by type (bool False, float NaN, integers `ignore_index`), `time` with NaN, `record` with
    -1, `time_valid` with False, `scale` with 1 and `offset` with 0. `label`, `aoi`, `epsg` and `length` lose their axis
    of one: `[B]`. The slices and CRS that TorchGeo 0.8 keeps in items become tensors (`bounds` float64 `[B, 9]`, `crs`
    int64 `[B]`, 0 = no EPSG code).

    Raises:
        UsageError: samples with different keys, or tensors that differ in more than height, width and T.
    """
    if not samples:
        raise UsageError("There are no samples to collate.")
    keys = list(samples[0])
    for i, sample in enumerate(samples):
        if set(sample) != set(keys):
            missing = sorted(set(keys) ^ set(sample))
            raise UsageError(f"Samples 0 and {i} of a batch do not have the same keys: {missing} is in one only.")
    columns = {key: _column(key, [_tensor(key, sample[key]) for sample in samples], ignore_index) for key in keys}
    return columns | _stacked({key: rows for key, rows in columns.items() if _to_stack(rows)})


def _tensor(key: str, value: Any) -> Any:
    if key == "bounds" and isinstance(value, tuple):
        return bounds_tensor(value)
    if key == "crs" and not isinstance(value, torch.Tensor):
        return torch.tensor(epsg_code(crs_text(value)) or 0)
    return value


def _column(key: str, values: list[Any], ignore_index: int) -> Any:
    """The batch's tensor where its rows lie side by side; else the values, tensors all of one shape."""
    if not isinstance(values[0], torch.Tensor):
        return values
    if any(v.shape != values[0].shape for v in values):
        values = _padded(key, values, ignore_index)
    whole = side_by_side(values)
    if whole is not None and (whole.untyped_storage().is_shared() or get_worker_info() is None):
        return whole[:, 0] if key in _SQUEEZED and whole.shape[1:] == (1,) else whole
    if key in _SQUEEZED and values[0].shape == (1,):
        values = [v[0] for v in values]
    return values


def _to_stack(rows: Any) -> bool:
    return isinstance(rows, list) and isinstance(rows[0], torch.Tensor)


def _stacked(columns: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches of these rows; in a worker one copy, straight into shared memory."""
    plain = [key for key, rows in columns.items() if all(type(v) is torch.Tensor and _in_memory(v) for v in rows)]
    kinds = [((len(columns[key]), *columns[key][0].shape), columns[key][0].dtype) for key in plain]
    outs = dict(zip(plain, batch_buffers(kinds) if kinds else [], strict=True))
    return {key: torch.stack(rows, out=outs.get(key)) for key, rows in columns.items()}


def _in_memory(value: torch.Tensor) -> bool:
    return value.device.type == "cpu" and value.layout == torch.strided


def _padded(key: str, values: list[torch.Tensor], ignore_index: int) -> list[torch.Tensor]:
    """Values of one shape: the largest along each axis that may differ."""
    shapes = [tuple(v.shape) for v in values]
    kind = _kind(key)
    axes = _open_axes(kind, len(shapes[0]))
    if len({len(shape) for shape in shapes}) == 1:
        size = tuple(max(lengths) for lengths in zip(*shapes, strict=True))
        differ = {axis for axis, lengths in enumerate(zip(*shapes, strict=True)) if len(set(lengths)) > 1}
        if differ <= axes:
            fill = _fill(kind, values[0].dtype, ignore_index)
            return [_grown(value, size, fill) for value in values]
    which = "T" if kind in _SERIES else "height and width, or in T as [T, C, H, W]"
    raise UsageError(f"{key!r} cannot be batched: shapes {sorted(set(shapes))} differ in more than {which}.")


def _kind(key: str) -> str:
    """The key that another one is like: `scale_image_s1` is padded as `scale`."""
    kind = key.partition("_")[0]
    return kind if kind in ("scale", "offset") else key


def _open_axes(key: str, axes: int) -> set[int]:
    """The axes along which samples may differ."""
    if key in _SERIES:
        return {0} if axes == _SERIES[key][0] else set()
    if not key.startswith(("image", "mask")) or axes < 2:
        return set()
    return {axes - 2, axes - 1} | ({0} if axes == 4 else set())


def _fill(key: str, dtype: torch.dtype, ignore_index: int) -> float | int | bool:
    if key in _SERIES:
        return _SERIES[key][1]
    if key.startswith("image"):
        return 0
    if dtype == torch.bool:
        return False
    if dtype.is_floating_point:
        return float("nan")
    if not torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        raise UsageError(f"{key!r} is {dtype}, which cannot hold ignore_index={ignore_index} as padding; convert it.")
    return ignore_index


def _grown(value: torch.Tensor, size: tuple[int, ...], fill: float | int | bool) -> torch.Tensor:
    if tuple(value.shape) == size:
        return value
    whole = torch.full(size, fill, dtype=value.dtype)
    whole[tuple(slice(length) for length in value.shape)] = value
    return whole
