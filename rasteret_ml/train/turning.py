"""Flips and quarter turns of each sample of a batch, exact, on the device and without waiting for it."""

from __future__ import annotations

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.loading.sample import Sample
from rasteret_ml.train.prepare import image_keys, label_keys, validity_keys

__all__ = ["draw_hashes", "flip_and_turn"]

_GOLDEN = 0x9E3779B97F4A7C15
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def draw_hashes(batch: Sample, stream: int) -> torch.Tensor:
    """int64 `[B]`, not negative, of each sample's `draw` (seed, epoch, position) and a stream alone.

    By the finaliser of SplitMix64 (Steele, Lea & Flood 2014) after each number; computed where `draw` lies, so that
    nothing waits for the device.

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


def flip_and_turn(batch: Sample, seed: int = 0) -> Sample:
    """Each sample of a batch in one of the eight ways to lay a square, by its `draw`; images, labels, validity alike.

    All dates and all keys of a sample turn together. Chips that are not square are flipped, and turned by half. No
    pixel is resampled, so the chip still lies on its ground: `bounds` stay true, and `transform` becomes that of the
    turned pixels. The global random state is neither used nor changed.

    Args:
        batch: Prepared or native, with `draw` int64 `[B, 3]`.
        seed: Another one gives other turns to the same draws.

    Raises:
        UsageError: a batch without `draw`, or images and labels of different sizes.
    """
    keys = [*image_keys(batch), *label_keys(batch), *validity_keys(batch)]
    sizes = {tuple(batch[key].shape[-2:]) for key in keys}
    if len(sizes) != 1:
        raise UsageError(f"Images and labels of one size turn together; {keys} are of {sorted(sizes)}.")
    ((height, width),) = sizes
    codes = draw_hashes(batch, 2 * seed)
    # The upper bits of the hash: the code is as good as any three of them.
    across, down, over = (((codes >> (62 - bit)) & 1).bool() for bit in range(3))
    turned = dict(batch)
    for key in keys:
        value = batch[key]
        rows = [-1, *[1] * (value.ndim - 1)]
        device = value.device
        value = torch.where(across.to(device).view(rows), value.flip(-1), value)
        value = torch.where(down.to(device).view(rows), value.flip(-2), value)
        if height == width:
            value = torch.where(over.to(device).view(rows), value.transpose(-1, -2), value)
        turned[key] = value.contiguous()  # where() may keep the strides of what was transposed
    if "transform" in batch:
        over = over if height == width else torch.zeros_like(over)
        turned["transform"] = _laid(batch["transform"], across, down, over, height, width)
    return turned


def _laid(
    transform: torch.Tensor, across: torch.Tensor, down: torch.Tensor, over: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Of pixels before the turn `[B, 9]` to that of pixels after it."""
    across, down, over = (flag.to(transform.device, transform.dtype) for flag in (across, down, over))
    before = transform.reshape(-1, 3, 3)
    x, y, corner = before.unbind(-1)
    corner = corner + x * (across * width)[:, None] + y * (down * height)[:, None]
    x, y = x * (1 - 2 * across)[:, None], y * (1 - 2 * down)[:, None]
    swap = over[:, None].bool()
    after = torch.stack([torch.where(swap, y, x), torch.where(swap, x, y), corner], dim=-1)
    return after.reshape(transform.shape)
