"""Merge samples of the same chip: join channels (`&`), or fill by validity (`|`) after giving both sides the same keys.

TorchGeo's own merge concatenates validity masks and unites pixels by their maximum; these keep masks and pixels exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any

import pandas as pd
import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import epsg_code
from rasteret_ml.geo.grid import Grid
from rasteret_ml.samples.sample import TENSOR_ONLY, Sample, aoi_columns, bounds_tensor, snapped_slices

_TIME_KEYS = ("time", "time_valid", "length", "record")
_LEFT_FIRST = (*_TIME_KEYS, "bounds", "crs", "epsg", "transform", "aoi", "label", "draw", "mask_aoi")
_VALIDITIES = ("mask_valid", "mask_clear")
_DEFAULTS = {"scale": 1.0, "offset": 0.0}
_DAY = 86400.0  # Seconds.


def pixel_keys(sample: Sample) -> list[str]:
    """Return the keys of images and labels, without validity and AOI masks."""
    keys = [key for key in sample if key.startswith(("image", "mask")) and key not in (*_VALIDITIES, "mask_aoi")]
    return [key for key in keys if isinstance(sample[key], torch.Tensor) and sample[key].ndim >= 2]


def scale_name(key: str, pixels: Iterable[str]) -> str:
    """Return the name of `scale` or `offset` in a joined sample: `scale_image_s1` beside the pixels `image_s1`.

    All other keys, and the scale of `image`, keep their name.
    """
    images = [name for name in pixels if name.startswith("image")]
    return key if key not in _DEFAULTS or "image" in images or not images else f"{key}_{images[0]}"


def num_dates(sample: Sample) -> int | None:
    """Return T; None if the sample is no time series."""
    if "time_valid" in sample:
        return len(sample["time_valid"])
    return next((len(sample[key]) for key in pixel_keys(sample) if sample[key].ndim == 4), None)


def join_samples(samples: Sequence[Sample]) -> Sample:
    """Join samples: concatenate `image` along C, AND the validity masks, and keep the first sample's metadata.

    Series `[T, C, H, W]` must have the same T and dates, whatever their keys; a date is valid (`time_valid`) if it is
    valid in both, and `length` counts those. Next to a series, a single image or label does not affect `time`,
    `time_valid`, `length` and `record`; its validity applies to every date. Labels under different keys stay separate.
    `scale` and `offset` belong to `image`; those of `image_s1` become `scale_image_s1` and `offset_image_s1`.
    UsageError: labels under the same key, images of different types or sizes, or series of different dates.
    """
    named = [{scale_name(key, pixel_keys(sample)): value for key, value in sample.items()} for sample in samples]
    return reduce(_join, named)


def _join(left: Sample, right: Sample) -> Sample:
    _check_dates("&", left, right)
    if "image" in left and "image" in right:
        _check_images(left["image"], right["image"])
        left, right = _add_scales(left, right), _add_scales(right, left)
    joined, right = _join_dates(dict(left), right)
    for key, value in right.items():
        if key not in joined:
            joined[key] = value
        elif key == "image" or key in _DEFAULTS:
            joined[key] = torch.cat([joined[key], value], dim=-1 if key in _DEFAULTS else -3)
        elif key in _VALIDITIES:
            joined[key] = joined[key].all(-3, keepdim=True) & value.all(-3, keepdim=True)
        elif key not in _LEFT_FIRST:
            raise UsageError(
                f"Datasets joined with `&` must have different keys, got {key!r} twice; set key= in one of them, or "
                "rename it with transforms=."
            )
    count = num_dates(joined)
    if count is not None and "mask_clear" in joined and joined["mask_clear"].ndim == 3:
        joined["mask_clear"] = joined["mask_clear"].repeat(count, 1, 1, 1)
    return joined


def _add_scales(sample: Sample, other: Sample) -> Sample:
    """Add the default scale and offset where only the other sample has them."""
    shape = sample["image"].shape[:-2]
    missing = [key for key in _DEFAULTS if key in other and key not in sample]
    return sample | {key: torch.full(shape, _DEFAULTS[key], dtype=other[key].dtype) for key in missing}


def _join_dates(left: Sample, right: Sample) -> tuple[Sample, Sample]:
    """Keep the dates of the only series, or of two series those that are valid in both."""
    is_series = num_dates(left) is not None, num_dates(right) is not None
    if is_series == (False, True):
        left = _without_dates(left)
    elif is_series == (True, False):
        right = _without_dates(right)
    elif "time_valid" in left and "time_valid" in right:
        valid = left["time_valid"] & right["time_valid"]
        left |= {"time_valid": valid, "length": valid.sum()[None]}
        for key, missing in (("time", torch.nan), ("record", -1)):
            if key in left:
                left[key] = torch.where(valid, left[key], missing)
    return left, right


def _without_dates(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key not in _TIME_KEYS}


def _check_images(a: torch.Tensor, b: torch.Tensor) -> None:
    if (a.dtype, a.ndim, a.shape[-2:]) != (b.dtype, b.ndim, b.shape[-2:]):
        raise UsageError(
            "Images joined with `&` must have one type and one height and width, and not mix time series and single "
            f"images, got {a.dtype} and {b.dtype} of {tuple(a.shape)} and {tuple(b.shape)}; convert one with its "
            "transforms=, or set another key= for it."
        )


def _check_dates(operator: str, a: Sample, b: Sample) -> None:
    """Check that the dates at each index of T are of the same UTC day, or at most half a day apart."""
    counts = num_dates(a), num_dates(b)
    if None in counts:
        return
    remedy = f"or read the {'bands' if operator == '&' else 'records'} of both with one dataset."
    if counts[0] != counts[1]:
        raise UsageError(
            f"Time series merged with `{operator}` must have the same length, got {counts[0]} and {counts[1]} dates; "
            f"give both the same length= in series=, {remedy}"
        )
    if any(key not in sample for key in ("time", "time_valid") for sample in (a, b)):
        return
    different = ((a["time"] - b["time"]).abs() > _DAY / 2) & ((a["time"] // _DAY) != (b["time"] // _DAY))
    indices = (different & a["time_valid"] & b["time_valid"]).nonzero().flatten().tolist()
    if indices:
        pairs = [f"{_format_time(a['time'][i])} and {_format_time(b['time'][i])}" for i in indices[:3]]
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        raise UsageError(
            f"Time series merged with `{operator}` must have the same dates, got {', '.join(pairs)}{more}; give both "
            f"the same series= and the same filters, {remedy}"
        )


def _format_time(seconds: torch.Tensor) -> str:
    return f"{pd.Timestamp(float(seconds), unit='s'):%Y-%m-%d %H:%M}"


def merge_by_validity(samples: Sequence[Sample]) -> Sample:
    """Return the first sample, with invalid pixels filled from the next samples where those are valid.

    Series are filled date by date and must have the same dates. `time` and `record` stay those of the first sample,
    even for filled pixels; dates that it lacks (padding) come from the other, with `scale` and `offset`. Labels
    `[H, W]` next to a series are filled where the first sample has no valid date and the other has one. If only one
    sample has `mask_clear`, pixels of the other are not clear. UsageError: samples of different keys, types, dates or
    sizes, or of different scale and offset.
    """
    merged = dict(samples[0])
    for other in samples[1:]:
        keys, other_keys = sorted(pixel_keys(merged)), sorted(pixel_keys(other))
        if keys != other_keys:
            raise UsageError(
                f"Datasets merged with `|` must have the same pixels, got {keys} and {other_keys}; give both the same "
                "key= (or rename with transforms=), or join them with `&`."
            )
        valid, other_valid = (sample["mask_valid"].all(-3, keepdim=True) for sample in (merged, other))
        if valid.shape != other_valid.shape:
            raise UsageError(
                f"Samples merged with `|` must have one shape, got {tuple(valid.shape)} and "
                f"{tuple(other_valid.shape)}; series need the same length=."
            )
        _check_dates("|", merged, other)
        fill = other_valid & ~valid
        _check_scales(merged, other, fill)
        if "mask_clear" in merged or "mask_clear" in other:
            not_clear = {"mask_clear": torch.zeros_like(valid)}
            merged, other = not_clear | merged, not_clear | other
        any_date = fill if fill.ndim == 3 else other_valid.any(0) & ~valid.any(0)
        for key in merged:
            if key.startswith(("image", "mask")) and key in other:
                value = merged[key]
                where = any_date[0] if value.ndim == 2 else fill if value.ndim == fill.ndim else any_date
                merged[key] = torch.where(where, cast_exactly(key, other[key], value.dtype, where), value)
        _add_dates(merged, other)
    return merged


def cast_exactly(key: str, values: torch.Tensor, dtype: torch.dtype, where: torch.Tensor) -> torch.Tensor:
    """Cast values to `dtype`; stock datasets give float32, whatever is stored.

    UsageError: the cast changes a value at a pixel in `where`.
    """
    if values.dtype == dtype:
        return values
    cast = values.to(dtype)
    if not ((cast.to(values.dtype) == values) | ~where).all():
        raise UsageError(
            f"Datasets merged with `|` must give {key!r} in one type, got {dtype} and {values.dtype}; convert one of "
            "them with transforms=."
        )
    return cast


def _scales(merged: Sample, other: Sample) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the scales and offsets of both samples by key, with defaults where one sample has none."""
    pairs = {}
    for key in dict.fromkeys([*merged, *other]):
        default = _DEFAULTS.get(key.partition("_")[0])
        if default is not None:
            filler = torch.full_like(merged[key] if key in merged else other[key], default)
            pairs[key] = merged.get(key, filler), other.get(key, filler)
    return pairs


def _check_scales(merged: Sample, other: Sample, fill: torch.Tensor) -> None:
    """Check that scales are equal in all dates that are filled, except in dates that only `other` has."""
    mixed = fill.flatten(-3).any(-1)
    if "time_valid" in merged and "time_valid" in other:
        mixed = mixed & merged["time_valid"] & other["time_valid"]
    if not mixed.any():
        return
    for key, (a, b) in _scales(merged, other).items():
        if mixed.ndim:
            a, b = a[mixed], b[mixed]
        if not torch.equal(a, b):
            raise UsageError(
                f"Samples merged with `|` must have one {key}, got {a} and {b}; convert one of them with transforms=."
            )


def _add_dates(merged: Sample, other: Sample) -> None:
    """Add the dates that only `other` has."""
    if "time_valid" not in merged or "time_valid" not in other:
        return
    new = other["time_valid"] & ~merged["time_valid"]
    for key in ("time", "record"):
        if key in merged and key in other:
            merged[key] = torch.where(new, other[key], merged[key])
    for key, (a, b) in _scales(merged, other).items():
        merged[key] = torch.where(new[:, None], b, a)
    merged["time_valid"] = merged["time_valid"] | other["time_valid"]
    if "length" in merged and "length" in other:
        merged["length"] = torch.maximum(merged["length"], other["length"])


def with_validity(sample: Sample) -> Sample:
    """Return a stock dataset's sample with `mask_valid`: pixels that are 0 or NaN in all channels are invalid.

    UsageError: the sample has neither `image` nor `mask`.
    """
    if "mask_valid" in sample:
        return sample
    pixels = sample.get("image", sample.get("mask"))
    if pixels is None:
        raise UsageError(f"Samples merged with `|` must have 'image' or 'mask', got {sorted(sample)}.")
    if pixels.ndim == 2:
        pixels = pixels[None]
    present = (pixels != 0) & (pixels == pixels)  # NaN != NaN
    return sample | {"mask_valid": present.any(-3, keepdim=True)}


def stock_sample(sample: Sample, grid: Grid, t: slice, ignore_index: int | None) -> Sample:
    """Return the pixels and validity of a stock dataset's sample, with the chip's bounds and transform in float64.

    Invalid labels become `ignore_index`; in a stock dataset they are 0, which may also be a class.
    """
    kept = {key: value for key, value in sample.items() if key.startswith(("image", "mask")) or key == "crs"}
    kept["bounds"] = bounds_tensor(snapped_slices(grid, t)) if TENSOR_ONLY else snapped_slices(grid, t)
    kept["transform"] = _transform(grid)
    for key in pixel_keys(kept):
        labels = kept[key]
        if key.startswith("mask") and ignore_index is not None and not labels.is_floating_point():
            valid = kept["mask_valid"].all(-3)
            kept[key] = torch.where(valid.reshape(labels.shape), labels, ignore_index)
    return kept


def fill_missing_keys(sample: Sample, keys: set[str], types: dict[str, torch.dtype], grid: Grid) -> Sample:
    """Return one side's sample, which has `mask_valid`, with all keys of both sides, and pixels of the given types.

    Missing values are neutral: `scale` 1, `offset` 0, `record` -1, `time` NaN, `mask_clear` False (unknown is not
    clear); `epsg` and `transform` are the chip grid's. `types` by key is empty where they are not known. UsageError:
    single images where the other side gives a series, or pixels under other keys or of another type.
    """
    filled, count = dict(sample), num_dates(sample)
    if "time_valid" in keys and count is None:
        raise UsageError("One side of an `|` gives a time series, the other single images; give both the same series=.")
    if types and set(types) != set(pixel_keys(sample)):
        raise UsageError(
            f"The sides of an `|` give different pixels, {sorted(types)} and {sorted(pixel_keys(sample))}, which "
            "cannot fill each other; use the same key for both (or rename with transforms=), or combine them with `&`."
        )
    for key, dtype in types.items():
        valid = sample["mask_valid"].all(-3, keepdim=sample[key].ndim >= sample["mask_valid"].ndim)
        filled[key] = cast_exactly(key, sample[key], dtype, valid)
    for key in sorted(keys - set(sample)):
        value = _neutral(key, sample, grid, count)
        if value is not None:
            filled[key] = value
    return filled


def _neutral(key: str, sample: Sample, grid: Grid, count: int | None) -> torch.Tensor | None:
    dates = 1 if count is None else count
    prefix, _, name = key.partition("_")
    if prefix in _DEFAULTS:
        images = [name] if name in sample else [k for k in pixel_keys(sample) if k.startswith("image")]
        return torch.full(sample[images[0]].shape[:-2], _DEFAULTS[prefix]) if images else None
    if key == "mask_clear":
        return torch.zeros_like(sample["mask_valid"].all(-3, keepdim=True))
    values: dict[str, torch.Tensor] = {
        "time": torch.full((dates,), math.nan, dtype=torch.float64),
        "record": torch.full((dates,), -1),
        "time_valid": torch.ones(dates, dtype=torch.bool),
        "length": torch.tensor([dates]),
        "epsg": torch.tensor([epsg_code(grid.crs) or 0]),
        "transform": _transform(grid),
    }
    return values.get(key)


def add_query_keys(samples: Sequence[Sample], queries: Sequence[Any]) -> None:
    """Add `aoi`, `label` and `draw` to all samples of a batch, or remove them from all: sides may differ in them."""
    columns = aoi_columns(queries)
    for key in ("aoi", "label", "draw"):
        if key in columns:
            for sample, value in zip(samples, columns[key], strict=True):
                sample.setdefault(key, value)
        elif not all(key in sample for sample in samples):
            for sample in samples:
                sample.pop(key, None)


def _transform(grid: Grid) -> torch.Tensor:
    return torch.tensor(tuple(grid.transform)[:9], dtype=torch.float64)
