"""Gives the samples of both sides of an `|` the same keys, so that they batch together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import epsg_code
from rasteret_ml.geo.grid import Grid
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.merge import cast_exactly, num_dates, pixel_keys
from rasteret_ml.samples.sample import TENSOR_ONLY, Sample, bounds_tensor, snapped_slices

__all__ = ["add_query_keys", "fill_missing_keys", "stock_sample"]


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
    """Return a sample with all keys of both sides, and pixels of the given types.

    Missing values are neutral: `scale` 1, `offset` 0, `record` -1, `time` NaN, `mask_clear` False (unknown is not
    clear); `epsg` and `transform` are the grid's.

    Args:
        sample: The sample of one side, with `mask_valid`.
        keys: The keys of the samples of both sides.
        types: Types of the pixels by key; empty where they are not known.
        grid: The chip's grid.

    Raises:
        UsageError: single images where the other side gives a series, or pixels under other keys or of another type.
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
    if key in ("scale", "offset") or key.startswith(("scale_", "offset_")):
        prefix, _, name = key.partition("_")
        images = [name] if name in sample else [k for k in pixel_keys(sample) if k.startswith("image")]
        return torch.full(sample[images[0]].shape[:-2], 1.0 if prefix == "scale" else 0.0) if images else None
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
    rows = [[query.row] if isinstance(query, AOI) and query.row >= 0 else None for query in queries]
    labels = [query.label if isinstance(query, AOI) else None for query in queries]
    are_classes = all(isinstance(label, int) for label in labels)
    columns: tuple[tuple[str, list[Any], torch.dtype], ...] = (
        ("aoi", rows, torch.int64),
        ("label", [None if v is None else [v] for v in labels], torch.int64 if are_classes else torch.float32),
        ("draw", [query.draw if isinstance(query, AOI) else None for query in queries], torch.int64),
    )
    for key, values, dtype in columns:
        if all(key in sample for sample in samples):
            continue
        for sample, value in zip(samples, values, strict=True):
            if None in values:
                sample.pop(key, None)
            elif key not in sample:
                sample[key] = torch.tensor(value, dtype=dtype)


def _transform(grid: Grid) -> torch.Tensor:
    return torch.tensor(tuple(grid.transform)[:9], dtype=torch.float64)
