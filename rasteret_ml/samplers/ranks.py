"""How an epoch's positions are dealt to the processes that train together."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch.distributed

from rasteret_ml.errors import UsageError

__all__ = ["Ranks", "Remainder", "checked_remainder", "checked_seed", "epoch_random", "rank_positions", "uniforms"]

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


Remainder = Literal["drop", "pad", "repeat"]
"""Where the ranks do not divide an epoch: leave its last chips out ("drop"), or deal some more to make it even:
"pad", chips without a valid pixel that no loss or metric counts, or "repeat", those from its beginning again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One of several processes that train together."""

    count: int = 1
    """How many there are."""
    rank: int = 0
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        """Check."""
        if self.count < 1 or not 0 <= self.rank < self.count:
            raise UsageError(f"Rank {self.rank} of {self.count} is none: ranks are counted from 0.")

    @classmethod
    def now(cls) -> Self:
        """Those of torch's process group; one alone where there is none."""
        group = torch.distributed
        if not (group.is_available() and group.is_initialized()):
            return cls()
        return cls(count=group.get_world_size(), rank=group.get_rank())


def rank_positions(total: int, start: int, ranks: Ranks, remainder: Remainder) -> range:
    """The positions of an epoch, from `start` on, that are a rank's: every `ranks.count`-th one.

    So `n` chips of each rank are together `n * ranks.count` neighbours in the epoch's order, whatever the ranks: the
    sequence of global batches does not depend on how many share it. All ranks get as many. Positions from `total` on
    are what evens them out.

    Args:
        total: Chips in the epoch.
        start: Position at which it is taken up.
        ranks: Whose they are.
        remainder: What to do with a remainder.
    """
    left = max(0, total - start)
    each = left // ranks.count if remainder == "drop" else -(-left // ranks.count)
    first = start + ranks.rank
    return range(first, first + each * ranks.count, ranks.count)


def checked_remainder(value: Any) -> Remainder:
    """One of the three.

    Raises:
        UsageError: it is none.
    """
    if value not in ("drop", "pad", "repeat"):
        raise UsageError(f"remainder= is 'drop', 'pad' or 'repeat', not {value!r}.")
    chosen: Remainder = value
    return chosen
