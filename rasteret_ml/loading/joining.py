"""Samples of the same chip to one: joined (`&`), or filled by validity (`|`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.loading.sample import Sample

__all__ = ["join_samples", "merge_by_validity", "with_validity"]

_LEFT_FIRST = (
    "bounds", "crs", "epsg", "transform", "time", "time_valid", "length", "record", "aoi", "label", "mask_aoi"
)  # fmt: skip
_VALIDITIES = ("mask_valid", "mask_clear")
_NEUTRAL = {"scale": 1.0, "offset": 0.0}


def join_samples(samples: Sequence[Sample]) -> Sample:
    """One sample of several of the same chip: images along C, validities by AND, places and times of the first.

    Images `[T, C, H, W]` join where they have as many dates: the dates of a place in T should be the same, `time` is
    the first one's. Labels `[H, W]` join any images; their validity counts for each date. Labels of different keys
    are several heads.

    Raises:
        UsageError: two labels of one key, or images of different types, dates or sizes.
    """
    joined = dict(samples[0])
    for other in samples[1:]:
        if "image" in joined and "image" in other:
            other = _scaled_alike(joined, other)
        for key, value in other.items():
            if key not in joined:
                joined[key] = value
            elif key == "image":
                joined[key] = _images(joined[key], value)
            elif key in _NEUTRAL:
                joined[key] = torch.cat([joined[key], value], dim=-1)
            elif key in _VALIDITIES:
                joined[key] = joined[key].all(-3, keepdim=True) & value.all(-3, keepdim=True)
            elif key not in _LEFT_FIRST:
                raise UsageError(
                    f"Both datasets of an `&` give {key!r}; give one of them another key=, or rename it with "
                    "transforms=."
                )
    return joined


def _scaled_alike(joined: Sample, other: Sample) -> Sample:
    """Scale and offset of all channels, where only one side states them."""
    other = dict(other)
    for key, value in _NEUTRAL.items():
        for sample, opposite in ((joined, other), (other, joined)):
            if key not in sample and key in opposite:
                sample[key] = torch.full(sample["image"].shape[:-2], value, dtype=opposite[key].dtype)
    return other


def _images(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.dtype != b.dtype:
        raise UsageError(
            f"The images of an `&` are {a.dtype} and {b.dtype}; convert one of them with transforms=, or name its "
            "key differently."
        )
    if a.ndim != b.ndim:
        raise UsageError(
            f"The images of an `&` are {tuple(a.shape)} and {tuple(b.shape)}: a time series and single images do not "
            "join; give one of them another key=."
        )
    if a.shape[:-3] != b.shape[:-3]:
        raise UsageError(
            f"The time series of an `&` have {a.shape[0]} and {b.shape[0]} dates; give both the same length, or one of "
            "them another key=."
        )
    if a.shape[-2:] != b.shape[-2:]:
        raise UsageError(f"The images of an `&` are of different sizes: {tuple(a.shape)} and {tuple(b.shape)}.")
    return torch.cat([a, b], dim=-3)


def merge_by_validity(samples: Sequence[Sample]) -> Sample:
    """The first sample, its invalid pixels taken from the next where those are valid.

    Series are filled date by date, and must have as many. `time` and `record` stay the first one's, also for pixels
    that came from another; dates that it lacks (padding) are the other's. Labels `[H, W]` beside a series are filled
    where the first sample has no valid date and the other has one.

    Raises:
        UsageError: samples of different types, dates, sizes, or scale and offset.
    """
    merged = dict(samples[0])
    for other in samples[1:]:
        valid, others = merged["mask_valid"].all(-3, keepdim=True), other["mask_valid"].all(-3, keepdim=True)
        if valid.shape != others.shape:
            raise UsageError(
                f"The sides of an `|` do not fit: their validity is {tuple(valid.shape)} and {tuple(others.shape)}; "
                "series need the same length."
            )
        fill = others & ~valid
        if fill.any():
            _refuse_other_scales(merged, other)
        flat = fill if fill.ndim == 3 else others.any(0) & ~valid.any(0)
        for key in merged:
            if key.startswith(("image", "mask")) and key in other:
                merged[key] = _filled(key, merged[key], other[key], fill, flat)
        _add_dates(merged, other)
    return merged


def _filled(key: str, value: torch.Tensor, other: torch.Tensor, fill: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    where = flat[0] if value.ndim == 2 else fill if value.ndim == fill.ndim else flat
    if value.dtype != other.dtype:
        other = _converted(key, value, other, where)
    return torch.where(where, other, value)


def _converted(key: str, value: torch.Tensor, other: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """`other` in the type of `value` (stock datasets give float32 whatever is stored), if that changes nothing."""
    same = other.to(value.dtype)
    if not ((same.to(other.dtype) == other) | ~where).all():
        raise UsageError(
            f"The sides of an `|` give {key!r} as {value.dtype} and {other.dtype}; convert one of them with "
            "transforms=."
        )
    return same


def _refuse_other_scales(merged: Sample, other: Sample) -> None:
    for key, neutral in _NEUTRAL.items():
        a, b = merged.get(key), other.get(key)
        if a is None and b is None:
            continue
        known = a if a is not None else b
        assert known is not None
        plain = torch.full_like(known, neutral)
        if not torch.equal(plain if a is None else a, plain if b is None else b):
            raise UsageError(
                f"The sides of an `|` have another {key}: {a} and {b}; bring them to one with transforms= before."
            )


def _add_dates(merged: Sample, other: Sample) -> None:
    """Dates that only the other sample has."""
    if "time_valid" not in merged or "time_valid" not in other:
        return
    new = other["time_valid"] & ~merged["time_valid"]
    for key in ("time", "record"):
        if key in merged and key in other:
            merged[key] = torch.where(new, other[key], merged[key])
    merged["time_valid"] = merged["time_valid"] | other["time_valid"]
    if "length" in merged and "length" in other:
        merged["length"] = torch.maximum(merged["length"], other["length"])


def with_validity(sample: Sample) -> Sample:
    """A sample of a stock dataset with `mask_valid`: TorchGeo's own rule is that what is 0 in all channels is empty."""
    if "mask_valid" in sample:
        return sample
    pixels = sample.get("image", sample.get("mask"))
    if pixels is None:
        raise UsageError(f"`|` needs 'image' or 'mask' in the samples of both sides, not {sorted(sample)}.")
    if pixels.ndim == 2:
        pixels = pixels[None]
    there = (pixels != 0) & (pixels == pixels)  # NaN is no value
    return sample | {"mask_valid": there.any(-3, keepdim=True)}
