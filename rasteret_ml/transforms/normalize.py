"""Native pixels to model input, on the device: float, scaled, normalised, invalid pixels neutral."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.merge import scale_name
from rasteret_ml.samples.sample import Sample

__all__ = [
    "fill_invalid",
    "ignored_outside",
    "image_keys",
    "label_keys",
    "normalize",
    "per_band_numbers",
    "validity_keys",
]

PerBand = Sequence[float] | Mapping[str, Sequence[float]]
"""A number for each band of the one image, or such by key of the image."""


def normalize(
    batch: Sample,
    mean: PerBand | None = None,
    std: PerBand | None = None,
    ignore_index: int = -100,
    *,
    scaled: bool = False,
) -> Sample:
    """A batch ready for a model, on the device that the batch is on.

    Each image (`image`, `image_s1` ...; `[B, C, H, W]` or `[B, T, C, H, W]`, any real type) becomes float32:

    1. with `scaled`, stored values become what they stand for, `x * scale + offset`, by each sample's own numbers
       (those of `image_s1` are `scale_image_s1` and `offset_image_s1`);
    2. `(x - mean) / std` per band (axis -3), where these are given;
    3. 0, which then is the mean, where `mask_valid` is False.

    So `mean` and `std` are of stored values, which `dataset_statistics` measures, or with `scaled` of scaled ones,
    which `dataset_statistics(scaled=True)` measures. Where all records have one scale and offset both give the same
    numbers; where they differ (Sentinel-2 before and after January 2022) only `scaled` makes them comparable.
    `scale` and `offset` leave the batch once they are applied. All is computed in float32, for 32- and 64-bit
    integers and float64 in float64 and rounded once.

    Class labels (`mask`, `mask_...`) become `ignore_index`, float labels NaN, outside `mask_aoi` where the batch has
    one. The batch that was given is left as it was.

    Args:
        batch: Of our loader; images without `mask_valid` count as valid.
        mean: Per band, or a mapping from each image key to its bands'; None = 0.
        std: Likewise; None = 1.
        ignore_index: Class of labels that do not count.
        scaled: Whether to apply the batch's `scale` and `offset`.

    Raises:
        UsageError: an image of several without its own mean or std; `scaled` and no `scale` in the batch; numbers
            that do not fit the bands, or a std of 0; complex pixels; labels of a type that cannot hold `ignore_index`.
    """
    ready = dict(batch)
    keys = image_keys(batch)
    for key in keys:
        image = _floating(key, batch[key])
        if scaled:
            image = image * _scaling("scale", key, keys, batch, image) + _scaling("offset", key, keys, batch, image)
        for values, name in ((mean, "mean"), (std, "std")):
            if values is not None:
                number = _per_band(name, _chosen(name, values, key, keys), image)
                image = image - number if name == "mean" else image / number
        ready[key] = image.to(torch.float32)
    if scaled:
        ready = {key: value for key, value in ready.items() if key.partition("_")[0] not in ("scale", "offset")}
    fill_invalid(ready)
    if "mask_aoi" in batch:
        for key in label_keys(batch):
            ready[key] = ignored_outside(key, batch[key], batch["mask_aoi"], ignore_index)
    return ready


def image_keys(batch: Sample) -> list[str]:
    """Names of a batch's images, `[B, C, H, W]` or `[B, T, C, H, W]`."""
    return [key for key in batch if key.startswith("image") and _rank(batch[key]) >= 4]


def label_keys(batch: Sample) -> list[str]:
    """Names of a batch's labels, `[B, H, W]` or with more axes before H; booleans are validities, not labels."""
    named = [key for key in batch if key.startswith("mask") and _rank(batch[key]) >= 3]
    return [key for key in named if batch[key].dtype != torch.bool]


def validity_keys(batch: Sample) -> list[str]:
    """Names of what is True where something holds: `mask_valid`, `mask_aoi`, `mask_clear`."""
    named = [key for key in batch if key.startswith("mask") and _rank(batch[key]) >= 3]
    return [key for key in named if batch[key].dtype == torch.bool]


def fill_invalid(batch: Sample) -> None:
    """Set images to 0 where `mask_valid` is False, in place of the batch's entries but not of its tensors.

    A single image beside a series is valid where any date is; an image with other bands than a `mask_valid` per band
    is valid where all of them are.
    """
    if "mask_valid" not in batch:
        return
    for key in image_keys(batch):
        image = batch[key]
        # where(), not multiplication: NaN times 0 is NaN.
        batch[key] = torch.where(_validity_of(image, batch["mask_valid"]), image, 0.0)


def ignored_outside(key: str, labels: torch.Tensor, inside: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels `[B, ..., H, W]`, `ignore_index` or NaN where `inside` (`[B, 1, H, W]`, or with T) is False at no date."""
    while inside.ndim > 3:
        inside = inside.any(1)
    inside = inside.reshape(inside.shape[0], *[1] * (labels.ndim - 3), *inside.shape[-2:])
    if labels.is_floating_point():
        return torch.where(inside, labels, float("nan"))
    kind = torch.iinfo(labels.dtype)
    if not kind.min <= ignore_index <= kind.max:
        raise UsageError(f"{key!r} is {labels.dtype}, which cannot hold ignore_index={ignore_index}; convert it.")
    return torch.where(inside, labels, ignore_index)


def _rank(value: object) -> int:
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _floating(key: str, image: torch.Tensor) -> torch.Tensor:
    """Pixels to compute with. uint16 has few operations of its own, but converts."""
    if image.is_complex():
        raise UsageError(f"{key!r} is {image.dtype}; give its magnitude or its parts, with transforms=.")
    wide = image.dtype == torch.float64 or (not image.is_floating_point() and image.dtype.itemsize > 2)
    return image.to(torch.float64 if wide else torch.float32)


def _scaling(name: str, key: str, keys: list[str], batch: Sample, image: torch.Tensor) -> torch.Tensor:
    """The batch's `scale` or `offset` `[B, C]` or `[B, T, C]` of an image, to multiply or add."""
    own = f"{name}_{key}"
    # Where an image of another key is alone, its numbers have the short names.
    short = name if key == "image" or scale_name(name, keys) == own else own
    found: torch.Tensor | None = batch.get(own, batch.get(short))
    if found is None and not any(other.startswith(f"{name}_") or other == name for other in batch):
        raise UsageError(
            f"scaled=True needs {short!r} in the batch, which is there where a record states one; prepare without "
            "scaled=, as stored values then are what they stand for."
        )
    if found is None:  # beside images that have one: stored values are what they stand for
        return torch.full((), 1.0 if name == "scale" else 0.0, dtype=image.dtype, device=image.device)
    if found.shape != image.shape[:-2]:
        raise UsageError(f"{name!r} of {key!r} is {tuple(found.shape)}, its pixels are {tuple(image.shape)}.")
    return found.to(image.dtype)[..., None, None]


def _chosen(name: str, values: PerBand, key: str, keys: list[str]) -> Sequence[float]:
    if isinstance(values, Mapping):
        if key in values:
            return values[key]
    elif len(keys) == 1:
        return values
    raise UsageError(f"There are images {keys}; give {name} of each, as {name}={{{key!r}: [...], ...}}.")


def _per_band(name: str, values: Sequence[float], image: torch.Tensor) -> torch.Tensor:
    numbers = per_band_numbers(name, values)
    if len(numbers) != image.shape[-3]:
        raise UsageError(f"{name} has {len(numbers)} numbers, the image {image.shape[-3]} bands.")
    return _on_device(numbers, image.dtype, image.device)


def per_band_numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """The numbers of `mean` or `std`.

    Raises:
        UsageError: it is one number alone, or a std that nothing can be divided by.
    """
    if not hasattr(values, "__len__"):
        raise UsageError(f"{name} is a list with a number for each band, not {values!r}.")
    numbers = tuple(float(value) for value in values)
    if name == "std" and not all(number > 0 for number in numbers):
        raise UsageError(f"std is {list(numbers)}; each is above 0. Give 1 for a band that is the same everywhere.")
    return numbers


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copied there once: each copy from pageable memory makes the host wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _validity_of(image: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """`mask_valid` in a shape that goes with an image's."""
    if valid.shape[-3] not in (1, image.shape[-3]):
        valid = valid.all(-3, keepdim=True)
    if valid.ndim > image.ndim:
        return valid.any(1)
    return valid[:, None] if valid.ndim < image.ndim else valid
