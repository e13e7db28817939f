"""Samples of the same chip to one: joined (`&`), or filled by validity (`|`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import pandas as pd
import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.sample import Sample

__all__ = ["converted", "dates_of", "join_samples", "merge_by_validity", "pixel_keys", "scale_name", "with_validity"]

_LEFT_FIRST = (
    "bounds", "crs", "epsg", "transform", "time", "time_valid", "length", "record", "aoi", "label", "draw",
    "mask_aoi",
)  # fmt: skip
_TIMES = ("time", "time_valid", "length", "record")
_VALIDITIES = ("mask_valid", "mask_clear")
_NEUTRAL = {"scale": 1.0, "offset": 0.0}
_DAY = 86400.0
"""Seconds."""


def pixel_keys(sample: Sample) -> list[str]:
    """Names of a sample's pixels: images and labels, not what is said of them."""
    named = [key for key in sample if key.startswith(("image", "mask")) and key not in (*_VALIDITIES, "mask_aoi")]
    return [key for key in named if isinstance(sample[key], torch.Tensor) and sample[key].ndim >= 2]


def scale_name(key: str, pixels: Iterable[str]) -> str:
    """What `scale` or `offset` of a sample with these pixels is called beside another sample's.

    They belong to `image`; those of `image_s1` are `scale_image_s1` and `offset_image_s1`.
    """
    images = [name for name in pixels if name.startswith("image")]
    return key if key not in _NEUTRAL or "image" in images or not images else f"{key}_{images[0]}"


def dates_of(sample: Sample) -> int | None:
    """T of a sample with an axis T; None = it has none."""
    if "time_valid" in sample:
        return len(sample["time_valid"])
    return next((len(sample[key]) for key in pixel_keys(sample) if sample[key].ndim == 4), None)


def join_samples(samples: Sequence[Sample]) -> Sample:
    """One sample of several of the same chip: images along C, validities by AND, places and times of the first.

    Two series `[T, C, H, W]` need the same T, whatever their keys, and the same dates: a date is valid
    (`time_valid`) where both have it, and `length` is their number. Beside a series a single image or label has no
    say in `time`, `time_valid`, `length` and `record`; its validity counts for each date. Labels of different keys
    are several heads. `scale` and `offset` are those of `image`; of another key, `image_s1`, they are
    `scale_image_s1` and `offset_image_s1`.

    Raises:
        UsageError: two labels of one key, images of different types or sizes, or series of different dates.
    """
    named = [{scale_name(key, pixel_keys(sample)): value for key, value in sample.items()} for sample in samples]
    return reduce(_joined, named)


def _joined(joined: Sample, other: Sample) -> Sample:
    _refuse_other_dates("&", joined, other)
    if "image" in joined and "image" in other:
        _refuse_other_images(joined["image"], other["image"])
        joined, other = _scaled_alike(joined, other), _scaled_alike(other, joined)
    joined, other = _dated_alike(dict(joined), other)
    for key, value in other.items():
        if key not in joined:
            joined[key] = value
        elif key == "image" or key in _NEUTRAL:
            joined[key] = torch.cat([joined[key], value], dim=-1 if key in _NEUTRAL else -3)
        elif key in _VALIDITIES:
            joined[key] = joined[key].all(-3, keepdim=True) & value.all(-3, keepdim=True)
        elif key not in _LEFT_FIRST:
            raise UsageError(
                f"Both datasets of an `&` give {key!r}; give one of them another key=, or rename it with transforms=."
            )
    count = dates_of(joined)
    if count is not None and "mask_clear" in joined and joined["mask_clear"].ndim == 3:
        joined["mask_clear"] = joined["mask_clear"].repeat(count, 1, 1, 1)
    return joined


def _scaled_alike(sample: Sample, other: Sample) -> Sample:
    """Scale and offset of all channels, where only the other side states them."""
    shape = sample["image"].shape[:-2]
    stated = [key for key in _NEUTRAL if key in other and key not in sample]
    return sample | {key: torch.full(shape, _NEUTRAL[key], dtype=other[key].dtype) for key in stated}


def _dated_alike(joined: Sample, other: Sample) -> tuple[Sample, Sample]:
    """Dates are the series', wherever it stands; of two series those that both have."""
    counts = dates_of(joined), dates_of(other)
    if counts[0] is None and counts[1] is not None:
        return _undated(joined), other
    if counts[0] is not None and counts[1] is None:
        return joined, _undated(other)
    if "time_valid" in joined and "time_valid" in other:
        there = joined["time_valid"] & other["time_valid"]
        joined |= {"time_valid": there, "length": there.sum()[None]}
        for key, missing in (("time", torch.nan), ("record", -1)):
            if key in joined:
                joined[key] = torch.where(there, joined[key], missing)
    return joined, other


def _undated(sample: Sample) -> Sample:
    return {key: value for key, value in sample.items() if key not in _TIMES}


def _refuse_other_images(a: torch.Tensor, b: torch.Tensor) -> None:
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
    if a.shape[-2:] != b.shape[-2:]:
        raise UsageError(f"The images of an `&` are of different sizes: {tuple(a.shape)} and {tuple(b.shape)}.")


def _refuse_other_dates(sign: str, a: Sample, b: Sample) -> None:
    """Dates go together by their place in T; they must be of one UTC day, or half a day apart at most."""
    counts = dates_of(a), dates_of(b)
    if None in counts:
        return
    one = "the bands" if sign == "&" else "the records"
    remedy = f"give both sides the same series= and the same filters, or read {one} of both with one dataset."
    if counts[0] != counts[1]:
        raise UsageError(
            f"The time series of an `{sign}` have {counts[0]} and {counts[1]} dates; give both the same length= in "
            f"series=, or read {one} of both with one dataset."
        )
    if any(key not in sample for key in ("time", "time_valid") for sample in (a, b)):
        return
    apart = ((a["time"] - b["time"]).abs() > _DAY / 2) & ((a["time"] // _DAY) != (b["time"] // _DAY))
    wrong = (apart & a["time_valid"] & b["time_valid"]).nonzero().flatten().tolist()
    if wrong:
        pairs = [f"{_text(a['time'][i])} and {_text(b['time'][i])}" for i in wrong[:3]]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"The time series of an `{sign}` are of different dates: {', '.join(pairs)}{more} share a place in T; "
            f"{remedy}"
        )


def _text(seconds: torch.Tensor) -> str:
    return f"{pd.Timestamp(float(seconds), unit='s'):%Y-%m-%d %H:%M}"


def merge_by_validity(samples: Sequence[Sample]) -> Sample:
    """The first sample, its invalid pixels taken from the next where those are valid.

    Series are filled date by date, and must have as many, of the same days. `time` and `record` stay the first one's,
    also for pixels that came from another; dates that it lacks (padding) are the other's, with their `scale` and
    `offset`. Labels `[H, W]` beside a series are filled where the first sample has no valid date and the other has
    one. Where only one sample tells clear pixels, the other's are not clear in `mask_clear`: unknown is not clear.

    Raises:
        UsageError: samples of different keys, types, dates, sizes, or scale and offset.
    """
    merged = dict(samples[0])
    for other in samples[1:]:
        _refuse_other_pixels(merged, other)
        valid, others = merged["mask_valid"].all(-3, keepdim=True), other["mask_valid"].all(-3, keepdim=True)
        if valid.shape != others.shape:
            raise UsageError(
                f"The sides of an `|` do not fit: their validity is {tuple(valid.shape)} and {tuple(others.shape)}; "
                "series need the same length."
            )
        _refuse_other_dates("|", merged, other)
        fill = others & ~valid
        _refuse_other_scales(merged, other, fill)
        if "mask_clear" in merged or "mask_clear" in other:
            unknown = torch.zeros_like(valid)
            merged, other = {"mask_clear": unknown} | merged, {"mask_clear": unknown} | other
        flat = fill if fill.ndim == 3 else others.any(0) & ~valid.any(0)
        for key in merged:
            if key.startswith(("image", "mask")) and key in other:
                merged[key] = _filled(key, merged[key], other[key], fill, flat)
        _add_dates(merged, other)
    return merged


def _refuse_other_pixels(merged: Sample, other: Sample) -> None:
    keys = pixel_keys(merged), pixel_keys(other)
    if set(keys[0]) != set(keys[1]):
        raise UsageError(
            f"The sides of an `|` give different pixels, {sorted(keys[0])} and {sorted(keys[1])}, which do not fill "
            "each other; give both the same key= (or rename with transforms=), or join them with `&`."
        )


def _filled(key: str, value: torch.Tensor, other: torch.Tensor, fill: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    where = flat[0] if value.ndim == 2 else fill if value.ndim == fill.ndim else flat
    return torch.where(where, converted(key, other, value.dtype, where), value)


def converted(key: str, other: torch.Tensor, dtype: torch.dtype, where: torch.Tensor) -> torch.Tensor:
    """`other` in the type of the first side (stock datasets give float32 whatever is stored), if that changes nothing.

    Raises:
        UsageError: it would, at a pixel that counts.
    """
    if other.dtype == dtype:
        return other
    same = other.to(dtype)
    if not ((same.to(other.dtype) == other) | ~where).all():
        raise UsageError(
            f"The sides of an `|` give {key!r} as {dtype} and {other.dtype}; convert one of them with transforms=."
        )
    return same


def _scales(merged: Sample, other: Sample) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What either side states, of both: 1 and 0 where a side states nothing."""
    pairs = {}
    for key in dict.fromkeys([*merged, *other]):
        neutral = _NEUTRAL.get(key.partition("_")[0])
        if neutral is not None:
            known = merged[key] if key in merged else other[key]
            plain = torch.full_like(known, neutral)
            pairs[key] = merged.get(key, plain), other.get(key, plain)
    return pairs


def _refuse_other_scales(merged: Sample, other: Sample, fill: torch.Tensor) -> None:
    """Pixels of another scale do not fill; whole dates do, which bring theirs."""
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
    for key, (a, b) in _scales(merged, other).items():
        merged[key] = torch.where(new[:, None], b, a)
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
