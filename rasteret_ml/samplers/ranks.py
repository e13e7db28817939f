"""Random numbers for the positions of an epoch, and their distribution over the ranks of a process group."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch.distributed

from rasteret_ml.errors import UsageError

_WORDS = 4  # 64-bit words in one step of Philox's counter (Salmon et al. 2011); a position takes one step

#: What to do if the number of ranks does not divide an epoch: leave out its last chips ("drop"), or give every rank as
#: many by adding chips without a valid pixel, which no loss or metric counts ("pad"), or by repeating the epoch's first
#: chips ("repeat").
Remainder = Literal["drop", "pad", "repeat"]


def uniforms(seed: int, epoch: int, positions: range, attempt: int = 0) -> npt.NDArray[np.float64]:
    """Return four uniform numbers in [0, 1) for each position, `[len(positions), 4]`.

    The numbers of a position do not depend on the other positions or the machine; each attempt has its own.
    """
    bits = np.random.Philox(key=_key(seed, epoch), counter=[0, 0, attempt, 0])
    bits.advance(positions.start)
    span = positions[-1] + 1 - positions.start if positions else 0
    return np.random.Generator(bits).random((span, _WORDS))[:: positions.step]


def epoch_random(seed: int, epoch: int) -> np.random.Generator:
    """Return a generator for a whole epoch, whose numbers differ from those of `uniforms`.

    Call only its `random` method: NumPy guarantees a stable stream for bit generators, not for other distributions.
    """
    # The highest word of the counter is 1, which no position reaches.
    return np.random.Generator(np.random.Philox(key=_key(seed, epoch), counter=[0, 0, 0, 1]))


def parse_seed(seed: Any) -> int:
    """Return a seed as an integer that fits a sample's `draw` (int64); raises UsageError for other values."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise UsageError(f"seed must be an integer, got {seed!r}.") from None
    if not -(2**63) <= value < 2**63:
        raise UsageError(f"seed must fit in a signed 64-bit integer, got {value}.")
    return value


def _key(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    # dtype is explicit: NumPy converts a list with a large integer to float64, which merges neighbouring seeds.
    return np.array([seed % 2**64, epoch % 2**64], np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The rank of this process and the number of processes that train together."""

    count: int = 1  #: Number of processes.
    rank: int = 0  #: Index of this process, from 0.

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.rank < self.count:
            raise UsageError(f"rank must be between 0 and count - 1, got rank {self.rank} of {self.count}.")

    @classmethod
    def now(cls) -> Self:
        """Return the rank in torch's default process group, or a single rank without one."""
        group = torch.distributed
        if not (group.is_available() and group.is_initialized()):
            return cls()
        return cls(count=group.get_world_size(), rank=group.get_rank())
