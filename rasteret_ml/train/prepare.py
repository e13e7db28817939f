"""Native pixels to model input, on the device: float, normalised, invalid pixels neutral."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rasteret_ml.loading.sample import Sample

__all__ = ["flip_and_turn", "prepare"]


def prepare(batch: Sample, mean: Sequence[float], std: Sequence[float], ignore_index: int = -100) -> Sample:
    """A batch ready for a model.

    `image` becomes float32 `(x - mean) / std` per band (axis -3), and 0, the mean, where `mask_valid` is False.
    Class `mask` becomes `ignore_index`, float `mask` NaN, outside `mask_aoi` where the batch has one.
    """
    ready = dict(batch)
    image = batch["image"].float()
    shape = (-1, 1, 1)
    centre = torch.as_tensor(mean, dtype=torch.float32, device=image.device).view(shape)
    spread = torch.as_tensor(std, dtype=torch.float32, device=image.device).view(shape)
    normal = (image - centre) / spread
    # where(), not multiplication: NaN times 0 is NaN.
    ready["image"] = torch.where(batch["mask_valid"], normal, torch.zeros((), device=image.device))
    if "mask" in batch and "mask_aoi" in batch:
        mask, inside = batch["mask"], batch["mask_aoi"].squeeze(-3)
        outside = torch.tensor(float("nan") if mask.is_floating_point() else ignore_index, device=mask.device)
        ready["mask"] = torch.where(inside, mask, outside.to(mask.dtype))
    return ready


def flip_and_turn(batch: Sample, generator: torch.Generator | None = None) -> Sample:
    """Each sample of a batch flipped and turned by quarter at random; image, labels and validity together.

    Turns need square chips; others are only flipped. Georeferencing keys are left as they were: they describe
    the chip before the turn.
    """
    keys = [key for key in batch if key.startswith(("image", "mask"))]
    turned = dict(batch)
    size = batch["image"].shape[0]
    square = batch["image"].shape[-1] == batch["image"].shape[-2]
    draws = torch.randint(0, 8 if square else 2, (size,), generator=generator).tolist()
    for key in keys:
        turned[key] = torch.stack([_turn(value, draw, square) for value, draw in zip(batch[key], draws, strict=True)])
    return turned


def _turn(value: torch.Tensor, draw: int, square: bool) -> torch.Tensor:
    value = torch.rot90(value, draw // 2, (-2, -1)) if square else value
    return torch.flip(value, (-1,)) if draw % 2 else value
