"""Mean and standard deviation of bands, and the classes of labels, over valid pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.sampling.samplers import GridAOISampler

__all__ = ["BandStatistics", "band_statistics", "class_counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStatistics:
    """Statistics of each band over valid pixels, in stored units."""

    mean: tuple[float, ...]
    """Mean `[C]`."""
    std: tuple[float, ...]
    """Standard deviation `[C]` (population); 1 for a constant band, so that it can be divided by."""
    count: tuple[int, ...]
    """Valid pixels seen `[C]`."""


def band_statistics(
    dataset: Any, *, aois: Any = None, size: int = 256, max_chips: int = 64, batch_size: int = 8, seed: int = 0
) -> BandStatistics:
    """Statistics from a regular grid of chips, a random `max_chips` of them where there are more.

    Args:
        dataset: An image dataset, or a combination whose samples have `image` and `mask_valid`.
        aois: Polygons to stay in; statistics for training should not look at validation data.
        size: Chip size in pixels.
        max_chips: Chips read at most.
        batch_size: Chips read together.
        seed: Which chips, where not all.

    Raises:
        UsageError: no valid pixel was found.
    """
    total = squares = count = np.zeros(1)
    for image, valid in _chips(dataset, "image", aois, size, max_chips, batch_size, seed):
        pixels, keep = image.numpy().astype(np.float64), np.broadcast_to(valid.numpy(), image.shape)
        axes = tuple(i for i in range(pixels.ndim) if i != pixels.ndim - 3)
        count = count + keep.sum(axis=axes)
        total = total + np.where(keep, pixels, 0).sum(axis=axes)
        squares = squares + np.square(np.where(keep, pixels, 0)).sum(axis=axes)
    if not np.all(count > 0):
        raise UsageError("Some band has no valid pixel in the chips looked at; take more (max_chips=) or other AOIs.")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    std = np.where(std > 0, std, 1.0)
    return BandStatistics(mean=tuple(mean.tolist()), std=tuple(std.tolist()), count=tuple(int(c) for c in count))


def class_counts(
    dataset: Any, *, aois: Any = None, size: int = 256, max_chips: int = 256, batch_size: int = 8, seed: int = 0
) -> dict[int, int]:
    """Pixels of each class in `mask` over valid pixels, by class; arguments as for `band_statistics`."""
    counts: dict[int, int] = {}
    for mask, valid in _chips(dataset, "mask", aois, size, max_chips, batch_size, seed):
        if mask.is_floating_point():
            raise UsageError("These labels are continuous; they have no classes.")
        for value, n in zip(*np.unique(mask.numpy()[valid.numpy()[0]], return_counts=True), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(n)
    return dict(sorted(counts.items()))


def _chips(
    dataset: Any, key: str, aois: Any, size: int, max_chips: int, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    grid = GridAOISampler(dataset, size, aois=aois)
    positions: Sequence[int] = range(len(grid))
    if len(grid) > max_chips:
        positions = sorted(np.random.default_rng(seed).choice(len(grid), max_chips, replace=False).tolist())
    for start in range(0, len(positions), batch_size):
        for sample in dataset.__getitems__([grid.at(p) for p in positions[start : start + batch_size]]):
            if key not in sample:
                raise UsageError(f"The dataset's samples have no {key!r}.")
            yield sample[key], sample["mask_valid"]
