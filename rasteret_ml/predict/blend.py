"""What becomes of a pixel that several chips predict."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError

__all__ = ["Arrays", "Blend", "Centre", "Merge", "Merging", "merging", "rises"]

Merge = Literal["blend", "centre"]
"""Where chips overlap: "blend", the mean of their scores, weighted with a window that falls smoothly to a chip's edges;
or "centre", the one chip that has the pixel nearest to its middle, nothing mixed."""

Arrays = tuple[npt.NDArray[Any], ...]
"""What is kept of a block: `[K, H, W]`, and what says how much each pixel has `[H, W]`."""

_RANK_BITS = 36
"""Of a key: the rest is for the place in the chip."""


class Merging(Protocol):
    """How chips become a block."""

    def layout(self, planes: int, block: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and type of each array of a block."""
        ...

    def empty(self, planes: int, block: int) -> Arrays:
        """A block without a chip."""
        ...

    def weigh(self, shape: tuple[int, int], position: int) -> npt.NDArray[Any]:
        """What each pixel of a chip counts `[H, W]`, for `add`."""
        ...

    def add(
        self, part: Arrays, values: npt.NDArray[Any], weights: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
    ) -> None:
        """Put a part of a chip, `values [K, h, w]`, on the same part of a block, in place."""
        ...

    def join(self, block: Arrays, other: Arrays) -> None:
        """Put what another rank has of a block on it, in place."""
        ...

    def result(self, block: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Values `[K, H, W]`, and where there are any `[H, W]`."""
        ...


def merging(merge: str, dtype: str) -> Merging:
    """How chips of values of a type are merged.

    Raises:
        UsageError: no such way.
    """
    if merge == "blend":
        return Blend()
    if merge == "centre":
        return Centre(dtype=dtype)
    raise UsageError(f"merge is 'blend' or 'centre', not {merge!r}.")


def rises(length: int) -> npt.NDArray[np.int64]:
    """How far each of `length` pixels is from the nearer end, from 1."""
    steps = np.arange(1, length + 1)
    return np.minimum(steps, steps[::-1])


@lru_cache(4)
def _hann(shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    rows, cols = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in shape)
    return np.outer(rows, cols).astype(np.float32)


@lru_cache(4)
def _nearness(shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = ((np.outer(rises(shape[0]), rises(shape[1])) + 1) << _RANK_BITS) - 1
    return found


@dataclass(frozen=True, slots=True)
class Blend:
    """The weighted mean; weights are a Hann window, sin^2, over the chip, nowhere 0."""

    def layout(self, planes: int, block: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Sums of weighted scores, and of weights."""
        return ((planes, block, block), "float32"), ((block, block), "float32")

    def empty(self, planes: int, block: int) -> Arrays:
        """Zeros."""
        return tuple(np.zeros(shape, dtype) for shape, dtype in self.layout(planes, block))

    def weigh(self, shape: tuple[int, int], position: int) -> npt.NDArray[Any]:
        """The window, float32."""
        return _hann(shape)

    def add(
        self, part: Arrays, values: npt.NDArray[Any], weights: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
    ) -> None:
        """Add weighted scores, and the weights."""
        if not valid.all():
            weights = weights * valid
            values = np.where(valid, values, 0)  # NaN times 0 is NaN
        for plane, scores in zip(part[0], values, strict=True):
            plane += scores * weights
        part[1][...] += weights

    def join(self, block: Arrays, other: Arrays) -> None:
        """Add both sums."""
        for own, its in zip(block, other, strict=True):
            own += its

    def result(self, block: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Means."""
        valid = block[1] > 0
        return block[0] / np.where(valid, block[1], 1), valid


@dataclass(frozen=True, slots=True)
class Centre:
    """The chip in which a pixel is nearest the middle: by the product of its distances to the nearer edges.

    Of equals it is the earlier chip; the order in which they come does not matter.
    """

    dtype: str
    """Of values."""

    def layout(self, planes: int, block: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Values and keys; the greater key wins."""
        return ((planes, block, block), self.dtype), ((block, block), "int64")

    def empty(self, planes: int, block: int) -> Arrays:
        """Keys of -1, below all."""
        (values, dtype), (keys, kind) = self.layout(planes, block)
        return np.zeros(values, dtype), np.full(keys, -1, kind)

    def weigh(self, shape: tuple[int, int], position: int) -> npt.NDArray[Any]:
        """Keys: the product, then the position, earlier ones greater."""
        return _nearness(shape) - position

    def add(
        self, part: Arrays, values: npt.NDArray[Any], weights: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
    ) -> None:
        """Take the pixels with greater keys."""
        better = valid & (weights > part[1])
        np.copyto(part[0], values, where=better, casting="same_kind")
        np.copyto(part[1], weights, where=better)

    def join(self, block: Arrays, other: Arrays) -> None:
        """As `add`."""
        self.add(block, other[0], other[1], other[1] >= 0)

    def result(self, block: Arrays) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Values as they are."""
        return block[0], block[1] >= 0
