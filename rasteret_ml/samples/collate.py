"""Stack samples to a batch, pad samples of different sizes, and blank samples that must not count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, epsg_code
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.buffers import batch_buffers, stacked_base
from rasteret_ml.samples.sample import Sample, bounds_tensor

NO_LABEL = -100  #: Class of missing labels, which torch's losses ignore by default.
_SQUEEZED = ("label", "aoi", "epsg", "length")
# Keys with T as first axis: the number of axes, and the value of padding.
_SERIES: dict[str, tuple[int, float | int | bool]] = {
    "time": (1, math.nan),
    "record": (1, -1),
    "time_valid": (1, False),
    "scale": (2, 1.0),
    "offset": (2, 0.0),
}


def collate(samples: Sequence[Sample], ignore_index: int = NO_LABEL) -> Sample:
    """Stack samples along a new first axis, without changing their types.

    Tensors that were read to one buffer are not copied; others are stacked, in a worker directly to shared memory.

    Samples of different sizes are padded at the bottom and right, series `[T, C, H, W]` of different lengths at the
    end: `image*` with 0, `mask*` with False, NaN or `ignore_index` by type, `time` with NaN, `record` with -1,
    `time_valid` with False, `scale` with 1 and `offset` with 0. `label`, `aoi`, `epsg` and `length` become `[B]`. The
    slices and CRS of TorchGeo 0.8 become tensors: `bounds` float64 `[B, 9]` and `crs` int64 `[B]`, 0 = no EPSG code.

    Args:
        samples: At least one.
        ignore_index: Class of padding in label masks.

    Raises:
        UsageError: no samples, different keys, or tensors that differ in more than height, width and T.
    """
    if not samples:
        raise UsageError("samples must hold at least one sample, got none.")
    keys = list(samples[0])
    for i, sample in enumerate(samples):
        if set(sample) != set(keys):
            different = sorted(set(keys) ^ set(sample))
            raise UsageError(
                f"Samples of a batch must have the same keys; only one of samples 0 and {i} has {different}."
            )
    columns = {key: _column(key, [_to_tensor(key, sample[key]) for sample in samples], ignore_index) for key in keys}
    to_stack = {key: rows for key, rows in columns.items() if isinstance(rows, list) and torch.is_tensor(rows[0])}
    return columns | _stack(to_stack)


def _to_tensor(key: str, value: Any) -> Any:
    if key == "bounds" and isinstance(value, tuple):
        return bounds_tensor(value)
    if key == "crs" and not isinstance(value, torch.Tensor):
        return torch.tensor(epsg_code(crs_text(value)) or 0)
    return value


def _column(key: str, values: list[Any], ignore_index: int) -> Any:
    """Return the batch tensor if `values` are its rows, else a list of values, tensors padded to one shape."""
    if not isinstance(values[0], torch.Tensor):
        return values
    if any(v.shape != values[0].shape for v in values):
        values = _pad(key, values, ignore_index)
    base, squeezed = stacked_base(values), key in _SQUEEZED and values[0].shape == (1,)
    if base is not None and (base.untyped_storage().is_shared() or get_worker_info() is None):
        return base[:, 0] if squeezed else base
    return [v[0] for v in values] if squeezed else values


def _stack(columns: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack rows; in a worker directly to shared memory."""
    plain = [key for key, rows in columns.items() if all(type(v) is torch.Tensor and _is_dense(v) for v in rows)]
    specs = [((len(columns[key]), *columns[key][0].shape), columns[key][0].dtype) for key in plain]
    outs = dict(zip(plain, batch_buffers(specs) if specs else [], strict=True))
    return {key: torch.stack(rows, out=outs.get(key)) for key, rows in columns.items()}


def _is_dense(value: torch.Tensor) -> bool:
    return value.device.type == "cpu" and value.layout == torch.strided


def _pad(key: str, values: list[torch.Tensor], ignore_index: int) -> list[torch.Tensor]:
    """Pad values at the end of the axes that may differ, to the largest size along each."""
    shapes = [tuple(v.shape) for v in values]
    if len({len(shape) for shape in shapes}) == 1:
        lengths = list(zip(*shapes, strict=True))
        different = {axis for axis, sizes in enumerate(lengths) if len(set(sizes)) > 1}
        if different <= _ragged_axes(key, len(lengths)):
            shape, fill = tuple(map(max, lengths)), _fill_value(key, values[0].dtype, ignore_index)
            return [_pad_to(value, shape, fill) for value in values]
    axes = "T" if _base_key(key) in _SERIES else "height and width, or in T as [T, C, H, W]"
    raise UsageError(f"{key!r} cannot be batched: shapes {sorted(set(shapes))} differ in more than {axes}.")


def _base_key(key: str) -> str:
    """Return "scale" for `scale_image_s1`, "offset" likewise, and other keys unchanged."""
    prefix = key.partition("_")[0]
    return prefix if prefix in ("scale", "offset") else key


def _ragged_axes(key: str, ndim: int) -> set[int]:
    """Return the axes along which samples may differ."""
    if _base_key(key) in _SERIES:
        return {0} if ndim == _SERIES[_base_key(key)][0] else set()
    if not key.startswith(("image", "mask")) or ndim < 2:
        return set()
    return {ndim - 2, ndim - 1} | ({0} if ndim == 4 else set())


def _fill_value(key: str, dtype: torch.dtype, ignore_index: int) -> float | int | bool:
    if _base_key(key) in _SERIES:
        return _SERIES[_base_key(key)][1]
    if key.startswith("image"):
        return 0
    if dtype == torch.bool:
        return False
    if dtype.is_floating_point:
        return math.nan
    if not torch.iinfo(dtype).min <= ignore_index <= torch.iinfo(dtype).max:
        raise UsageError(f"{key!r} is {dtype}, which cannot hold ignore_index={ignore_index}; convert it to int64.")
    return ignore_index


def _pad_to(value: torch.Tensor, shape: tuple[int, ...], fill: float | int | bool) -> torch.Tensor:
    if tuple(value.shape) == shape:
        return value
    padded = torch.full(shape, fill, dtype=value.dtype)
    padded[tuple(map(slice, value.shape))] = value
    return padded


def blank_sample(sample: Sample, ignore_index: int | Mapping[str, int] = NO_LABEL) -> Sample:
    """Return a sample, or batch, with the same keys, shapes and types, but without valid pixels and labels.

    Values are those of padding in `collate`, with `ignore_index` for all label masks or by key; `label` is -100 or NaN,
    and `length` is 0. Identity and place are kept: `aoi`, `draw`, `bounds`, `transform`, `epsg`, `crs`, unknown keys.
    """
    return {key: _blank(key, value, ignore_index) for key, value in sample.items()}


def _blank(key: str, value: Any, ignore_index: int | Mapping[str, int]) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if key == "length":
        return torch.zeros_like(value)
    if key == "label":
        ignore_index = NO_LABEL
    elif not key.startswith(("image", "mask")) and _base_key(key) not in _SERIES:
        return value
    ignored = ignore_index if isinstance(ignore_index, int) else ignore_index.get(key, NO_LABEL)
    return torch.full_like(value, _fill_value(key, value.dtype, ignored))


def blank_padding(queries: Sequence[Any], samples: list[Sample], ignored: Mapping[str, int]) -> list[Sample]:
    """Blank the samples that only pad the epoch of a rank; `ignored` is the class of missing labels by key."""
    is_padding = [isinstance(query, AOI) and query.blank for query in queries]
    if not any(is_padding):
        return samples
    return [blank_sample(s, ignored) if blank else s for s, blank in zip(samples, is_padding, strict=True)]
