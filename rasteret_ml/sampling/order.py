"""Randomness without state: numbers that depend on seed, epoch and position alone."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError

__all__ = ["checked_seed", "epoch_random", "uniforms"]

_WORDS = 4  # 64-bit words in one step of Philox's counter (Salmon et al. 2011): one step a position


def uniforms(seed: int, epoch: int, positions: range, attempt: int = 0) -> npt.NDArray[np.float64]:
    """Four uniform numbers in [0, 1) for each position, `[len(positions), 4]`.

    A position's numbers are the same however many others are drawn with it, and on every machine; each attempt at a
    position has its own.
    """
    bits = np.random.Philox(key=_key(seed, epoch), counter=[0, 0, attempt, 0])
    bits.advance(positions.start)
    span = positions[-1] + 1 - positions.start if positions else 0
    return np.random.Generator(bits).random((span, _WORDS))[:: positions.step]


def epoch_random(seed: int, epoch: int) -> np.random.Generator:
    """Numbers for an epoch as a whole, none of which `uniforms` ever gives.

    Draw with `random` alone: numpy promises its stream only of the bit generator.
    """
    # The counter's highest word is 1, which no position reaches.
    return np.random.Generator(np.random.Philox(key=_key(seed, epoch), counter=[0, 0, 0, 1]))


def checked_seed(seed: Any) -> int:
    """A seed as a number that a sample's `draw` (int64) can say.

    Raises:
        UsageError: it is no whole number, or beyond 64 bits.
    """
    try:
        found = operator.index(seed)
    except TypeError:
        raise UsageError(f"seed is a whole number, not {seed!r}.") from None
    if not -(2**63) <= found < 2**63:
        raise UsageError(f"seed lies within 64 bits (signed), {found} does not.")
    return found


def _key(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    # Of a list with one large number numpy makes doubles, which are not all different.
    return np.array([seed % 2**64, epoch % 2**64], np.uint64)
