"""Random flips and quarter turns of the samples of a batch, determined by their draws."""

from __future__ import annotations

import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.sample import Sample
from rasteret_ml.transforms.normalize import image_keys, label_keys, validity_keys

__all__ = ["draw_hashes", "pixel_keys", "random_flip_rot90"]

_GOLDEN = 0x9E3779B97F4A7C15
_MIXES = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def draw_hashes(batch: Sample, stream: int) -> torch.Tensor:
    """Hash each sample's `draw` (seed, epoch, position) and a stream number to a non-negative int64, `[B]`.

    Mixes with the finaliser of SplitMix64 (Steele, Lea & Flood 2014) after each number.

    Raises:
        UsageError: a batch without `draw`.
    """
    draw: torch.Tensor | None = batch.get("draw")
    if draw is None or draw.ndim != 2 or draw.shape[1] != 3:
        raise UsageError(
            "Augmentation needs batch['draw'] (seed, epoch, position; int64 [B, 3]), which this package's samplers "
            "provide; use one of them, or add such a tensor to the batch."
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
    """Shift right and fill with zeros; torch's shift copies the sign."""
    shifted: torch.Tensor = (state >> bits) & (2 ** (64 - bits) - 1)
    return shifted


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def pixel_keys(batch: Sample) -> tuple[list[str], tuple[int, int]]:
    """Return the keys of images, labels and validities, and their common height and width.

    Raises:
        UsageError: no such keys, or different sizes.
    """
    keys = [*image_keys(batch), *label_keys(batch), *validity_keys(batch)]
    sizes = {(batch[key].shape[-2], batch[key].shape[-1]) for key in keys}
    if len(sizes) != 1:
        raise UsageError(f"Images and labels must have one size, got {sorted(sizes)} of {keys}.")
    return keys, sizes.pop()


def random_flip_rot90(batch: Sample, seed: int = 0) -> Sample:
    """Flip and turn each sample of a batch at random, in one of the eight orientations of a square.

        batch = rm.random_flip_rot90(rm.normalize(batch, mean, std))

    The orientation depends on the sample's `draw` and the seed alone; images, labels and validity of all dates move
    together. Chips that are not square are flipped and turned by half. No pixel is resampled: `bounds` stay valid, and
    `transform` is updated. The global random state is neither used nor changed.

    Args:
        batch: Normalised or not, with `draw` int64 `[B, 3]`, best on the host, which reads it (see `to_device`).
        seed: Other seeds give other orientations for the same draws.

    Returns:
        A new batch.

    Raises:
        UsageError: a batch without `draw`, or images and labels of different sizes.
    """
    keys, (height, width) = pixel_keys(batch)
    square = height == width
    # The upper bits of the hash: flip columns, flip rows, transpose.
    codes = [code >> 60 if square else code >> 60 & 3 for code in draw_hashes(batch, 2 * seed).tolist()]
    turned = dict(batch)
    for key in keys:
        turned[key] = torch.stack([_oriented(value, code) for value, code in zip(batch[key], codes, strict=True)])
    if "transform" in batch:
        transform: torch.Tensor = batch["transform"]
        matrices = torch.tensor([_matrix(code, height, width) for code in codes], dtype=transform.dtype)
        turned["transform"] = (transform.reshape(-1, 3, 3) @ matrices.to(transform.device)).reshape(transform.shape)
    return turned


def _oriented(value: torch.Tensor, code: int) -> torch.Tensor:
    flip_columns, flip_rows, transpose = _bits(code)
    axes = [-1] * flip_columns + [-2] * flip_rows
    value = value.flip(axes) if axes else value
    return value.transpose(-1, -2) if transpose else value


def _matrix(code: int, height: int, width: int) -> list[list[float]]:
    """Return the 3 x 3 matrix from (column, row) after the move to (column, row) before it."""
    flip_columns, flip_rows, transpose = _bits(code)
    column = [-1.0 if flip_columns else 1.0, 0.0]
    row = [0.0, -1.0 if flip_rows else 1.0]
    if transpose:
        column.reverse()
        row.reverse()
    return [[*column, float(width * flip_columns)], [*row, float(height * flip_rows)], [0.0, 0.0, 1.0]]


def _bits(code: int) -> tuple[bool, bool, bool]:
    return bool(code & 1), bool(code & 2), bool(code & 4)
