"""Flips and quarter turns of each sample of a batch, exact, by its draw alone."""

from __future__ import annotations

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.sample import Sample
from rasteret_ml.transforms.normalize import image_keys, label_keys, validity_keys

__all__ = ["draw_hashes", "pixels_of_one_size", "random_flip_rot90"]

_GOLDEN = 0x9E3779B97F4A7C15
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def draw_hashes(batch: Sample, stream: int) -> torch.Tensor:
    """int64 `[B]`, not negative, of each sample's `draw` (seed, epoch, position) and a stream alone.

    By the finaliser of SplitMix64 (Steele, Lea & Flood 2014) after each number.

    Raises:
        UsageError: a batch without `draw`.
    """
    draw: torch.Tensor | None = batch.get("draw")
    if draw is None or draw.ndim != 2 or draw.shape[1] != 3:
        raise UsageError(
            "Augmentation draws its numbers from batch['draw'] (seed, epoch, position; int64 [B, 3]), which queries of "
            "our samplers bring; use one of them, or put such a tensor into the batch."
        )
    state = torch.full_like(draw[:, 0], _signed(stream + 1))
    for column in draw.unbind(1):
        state = _mixed(state + column)
    hashes: torch.Tensor = state & (2**63 - 1)
    return hashes


def _mixed(state: torch.Tensor) -> torch.Tensor:
    state = state + _signed(_GOLDEN)
    for bits, factor in _MIXES:
        state = (state ^ _shifted(state, bits)) * _signed(factor)
    mixed: torch.Tensor = state ^ _shifted(state, 31)
    return mixed


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filled with zeros: torch's own shift copies the sign."""
    shifted: torch.Tensor = (state >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def pixels_of_one_size(batch: Sample) -> tuple[list[str], tuple[int, int]]:
    """Names of images, labels and validities, and their height and width.

    Raises:
        UsageError: there are none, or they differ.
    """
    keys = [*image_keys(batch), *label_keys(batch), *validity_keys(batch)]
    sizes = {(batch[key].shape[-2], batch[key].shape[-1]) for key in keys}
    if len(sizes) != 1:
        raise UsageError(f"Images and labels of one size move together; {keys} are of {sorted(sizes)}.")
    return keys, sizes.pop()


def random_flip_rot90(batch: Sample, seed: int = 0) -> Sample:
    """Each sample of a batch in one of the eight ways to lay a square, by its `draw`; images, labels, validity alike.

    All dates and all keys of a sample turn together. Chips that are not square are flipped, and turned by half. No
    pixel is resampled, so the chip still lies on its ground: `bounds` stay true, and `transform` becomes that of the
    turned pixels. The global random state is neither used nor changed.

    Args:
        batch: Prepared or native, with `draw` int64 `[B, 3]`, best on the host (see `to_device`), which reads it.
        seed: Another one gives other turns to the same draws.

    Raises:
        UsageError: a batch without `draw`, or images and labels of different sizes.
    """
    keys, (height, width) = pixels_of_one_size(batch)
    square = height == width
    # The upper bits of the hash: flipped across, flipped down, rows and columns exchanged.
    codes = [code >> 60 if square else code >> 60 & 3 for code in draw_hashes(batch, 2 * seed).tolist()]
    turned = dict(batch)
    for key in keys:
        turned[key] = torch.stack([_laid(value, code) for value, code in zip(batch[key], codes, strict=True)])
    if "transform" in batch:
        transform: torch.Tensor = batch["transform"]
        moves = torch.tensor([_move(code, height, width) for code in codes], dtype=transform.dtype)
        turned["transform"] = (transform.reshape(-1, 3, 3) @ moves.to(transform.device)).reshape(transform.shape)
    return turned


def _laid(value: torch.Tensor, code: int) -> torch.Tensor:
    across, down, over = _flags(code)
    axes = [axis for axis, wanted in ((-1, across), (-2, down)) if wanted]
    value = value.flip(axes) if axes else value
    return value.transpose(-1, -2) if over else value


def _move(code: int, height: int, width: int) -> list[list[float]]:
    """Columns and rows of pixels after the turn to those before it, a 3 x 3 matrix."""
    across, down, over = _flags(code)
    x, y = (-1.0 if across else 1.0), (-1.0 if down else 1.0)
    corner = (float(width * across), float(height * down))
    if over:
        return [[0.0, x, corner[0]], [y, 0.0, corner[1]], [0.0, 0.0, 1.0]]
    return [[x, 0.0, corner[0]], [0.0, y, corner[1]], [0.0, 0.0, 1.0]]


def _flags(code: int) -> tuple[bool, bool, bool]:
    return bool(code & 1), bool(code & 2), bool(code & 4)
