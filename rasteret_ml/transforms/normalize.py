"""Stored pixels to model input, on the device: float32, normalised, invalid pixels set to the mean."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.merge import scale_name
from rasteret_ml.samples.sample import Sample

#: A number for each band of the image; with several images, a mapping of their keys to such numbers.
PerBand = Sequence[float] | Mapping[str, Sequence[float]]


def normalize(
    batch: Sample,
    mean: PerBand | None = None,
    std: PerBand | None = None,
    ignore_index: int = -100,
    *,
    scaled: bool = False,
) -> Sample:
    """Prepare a batch for a model, on the device that the batch is on.

        statistics = rm.dataset_statistics(dataset)
        ready = rm.normalize(batch, statistics.mean, statistics.std)

    Each image (`image`, `image_s1`, ...; `[B, C, H, W]` or `[B, T, C, H, W]`, any real dtype) becomes float32:

    1. with `scaled`, stored values are scaled, `x * scale + offset`, with the numbers of each sample (those of
       `image_s1` are `scale_image_s1` and `offset_image_s1`);
    2. `(x - mean) / std` per band (axis -3), where these are given;
    3. 0, which is then the mean, where `mask_valid` is False.

    `mean` and `std` are those of stored values, as `dataset_statistics` measures them, or with `scaled` those of scaled
    values (`dataset_statistics(scaled=True)`). Both are equivalent if all records have one scale and offset; where they
    differ (Sentinel-2 before and after January 2022) only `scaled` makes records comparable. `scale` and `offset` are
    removed once they are applied. Integers of 32 and 64 bits and float64 are computed in float64 and rounded once,
    other types in float32.

    Class labels (`mask`, `mask_...`) become `ignore_index`, float labels NaN, outside `mask_aoi` if the batch has one.

    Args:
        batch: A batch of `DataLoader`; images without `mask_valid` count as valid.
        mean: Per band, or a mapping of image keys to that; None = 0.
        std: Likewise; None = 1.
        ignore_index: Label to ignore.
        scaled: Whether to apply the batch's `scale` and `offset`.

    Returns:
        A new batch; the given one is not changed.

    Raises:
        UsageError: several images and no mean or std of each; `scaled` without `scale` in the batch; a mean or std that
            does not fit the bands, or a std that is not positive; complex pixels; labels whose dtype cannot hold
            `ignore_index`.
    """
    ready = dict(batch)
    keys = image_keys(batch)
    for key in keys:
        image = _floating(key, batch[key])
        if scaled:
            image = image * _scaling("scale", key, keys, batch, image) + _scaling("offset", key, keys, batch, image)
        for values, name in ((mean, "mean"), (std, "std")):
            if values is not None:
                number = _per_band(name, values, key, keys, image)
                image = image - number if name == "mean" else image / number
        ready[key] = image.to(torch.float32)
    if scaled:
        ready = {key: value for key, value in ready.items() if key.partition("_")[0] not in ("scale", "offset")}
    fill_invalid(ready)
    if "mask_aoi" in batch:
        for key in label_keys(batch):
            ready[key] = ignore_outside(key, batch[key], batch["mask_aoi"], ignore_index)
    return ready


def image_keys(batch: Sample) -> list[str]:
    """Return the keys of a batch's images, `[B, C, H, W]` or `[B, T, C, H, W]`."""
    return [key for key in batch if key.startswith("image") and _rank(batch[key]) >= 4]


def label_keys(batch: Sample) -> list[str]:
    """Return the keys of a batch's labels, `[B, H, W]` or with more axes before H; booleans are validities."""
    return [key for key in _mask_keys(batch) if batch[key].dtype != torch.bool]


def validity_keys(batch: Sample) -> list[str]:
    """Return the keys of a batch's boolean masks: `mask_valid`, `mask_aoi`, `mask_clear`."""
    return [key for key in _mask_keys(batch) if batch[key].dtype == torch.bool]


def _mask_keys(batch: Sample) -> list[str]:
    return [key for key in batch if key.startswith("mask") and _rank(batch[key]) >= 3]


def fill_invalid(batch: Sample) -> None:
    """Set images to 0 where `mask_valid` is False; replaces entries of the batch, does not write to its tensors.

    A single image beside a series is valid where any date is. If `mask_valid` is per band, an image with other bands is
    valid where all bands are.
    """
    if "mask_valid" not in batch:
        return
    for key in image_keys(batch):
        image, valid = batch[key], batch["mask_valid"]
        if valid.shape[-3] not in (1, image.shape[-3]):
            valid = valid.all(-3, keepdim=True)
        if valid.ndim > image.ndim:
            valid = valid.any(1)
        elif valid.ndim < image.ndim:
            valid = valid[:, None]
        batch[key] = torch.where(valid, image, 0.0)  # not by multiplication: NaN times 0 is NaN


def ignore_outside(key: str, labels: torch.Tensor, inside: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Set labels `[B, ..., H, W]` outside to `ignore_index`, or to NaN if they are floats.

    They are inside where `inside` (`[B, H, W]`, `[B, 1, H, W]` or `[B, T, 1, H, W]`) is True on any date. Raises
    UsageError if the dtype of the labels cannot hold `ignore_index`.
    """
    while inside.ndim > 3:
        inside = inside.any(1)
    inside = inside.reshape(inside.shape[0], *[1] * (labels.ndim - 3), *inside.shape[-2:])
    if labels.is_floating_point():
        return torch.where(inside, labels, float("nan"))
    limits = torch.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        raise UsageError(f"{key!r} is {labels.dtype}, which cannot hold ignore_index={ignore_index}; convert it.")
    return torch.where(inside, labels, ignore_index)


def _rank(value: object) -> int:
    return value.ndim if isinstance(value, torch.Tensor) else 0


def _floating(key: str, image: torch.Tensor) -> torch.Tensor:
    """Convert pixels to compute with; uint16 supports few operations but conversion."""
    if image.is_complex():
        raise UsageError(f"{key!r} must be real, got {image.dtype}; take its magnitude or its parts with transforms=.")
    wide = image.dtype == torch.float64 or (not image.is_floating_point() and image.dtype.itemsize > 2)
    return image.to(torch.float64 if wide else torch.float32)


def _scaling(name: str, key: str, keys: list[str], batch: Sample, image: torch.Tensor) -> torch.Tensor:
    """Return an image's `scale` or `offset`, `[B, C, 1, 1]` or `[B, T, C, 1, 1]`."""
    own = f"{name}_{key}"
    # The numbers of an image that is alone have the short names, whatever its key.
    short = name if key == "image" or scale_name(name, keys) == own else own
    found: torch.Tensor | None = batch.get(own, batch.get(short))
    if found is None and not any(other.startswith(f"{name}_") or other == name for other in batch):
        raise UsageError(
            f"scaled=True needs {short!r} in the batch, and no record states one; leave scaled= out: stored values are "
            "not scaled."
        )
    if found is None:  # only other images are scaled
        return torch.full((), 1.0 if name == "scale" else 0.0, dtype=image.dtype, device=image.device)
    if found.shape != image.shape[:-2]:
        raise UsageError(f"{name!r} of {key!r} must be {tuple(image.shape[:-2])}, got {tuple(found.shape)}.")
    return found.to(image.dtype)[..., None, None]


def _per_band(name: str, values: PerBand, key: str, keys: list[str], image: torch.Tensor) -> torch.Tensor:
    """Return an image's mean or std, `[C, 1, 1]`."""
    if not isinstance(values, Mapping) and len(keys) == 1:
        values = {key: values}
    if not isinstance(values, Mapping) or key not in values:
        raise UsageError(f"{name} must be a mapping of the images {keys}, as {name}={{{key!r}: [...], ...}}.")
    numbers = per_band_numbers(name, values[key])
    if len(numbers) != image.shape[-3]:
        raise UsageError(f"{name} must have a number for each of {image.shape[-3]} bands, got {len(numbers)}.")
    return _on_device(numbers, image.dtype, image.device)


def per_band_numbers(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Check `mean` or `std`, and convert it to a tuple of floats."""
    if not hasattr(values, "__len__"):
        raise UsageError(f"{name} must be a list with a number for each band, got {values!r}.")
    numbers = tuple(float(value) for value in values)
    if name == "std" and not all(number > 0 for number in numbers):
        raise UsageError(f"std must be > 0 for each band, got {list(numbers)}; use 1 for a constant band.")
    return numbers


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to the device once: each copy from pageable memory makes the host wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)[:, None, None]
