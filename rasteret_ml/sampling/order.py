"""Randomness without state: numbers that depend on seed, epoch and position alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["uniforms"]

_WORDS = 4  # 64-bit words in one step of Philox's counter (Salmon et al. 2011): one step a position


def uniforms(seed: int, epoch: int, start: int, count: int) -> npt.NDArray[np.float64]:
    """Four uniform numbers in [0, 1) for each of `count` positions from `start`, `[count, 4]`.

    A position's numbers are the same however many others are drawn with it, and on every machine.
    """
    bits = np.random.Philox(key=[seed % 2**64, epoch % 2**64])
    bits.advance(start)
    return np.random.Generator(bits).random((count, _WORDS))
