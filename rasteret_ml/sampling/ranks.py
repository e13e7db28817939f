"""How an epoch's positions are dealt to the processes that train together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch.distributed

from rasteret_ml.errors import UsageError

__all__ = ["Ranks", "Uneven", "checked_uneven", "rank_positions"]

Uneven = Literal["drop", "blank", "repeat"]
"""Where the ranks do not divide an epoch: leave its last chips out ("drop"), or deal some more to make it even:
"blank", chips without a valid pixel that no loss or metric counts, or "repeat", those from its beginning again."""


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


def rank_positions(total: int, start: int, ranks: Ranks, uneven: Uneven) -> range:
    """The positions of an epoch, from `start` on, that are a rank's: every `ranks.count`-th one.

    So `n` chips of each rank are together `n * ranks.count` neighbours in the epoch's order, whatever the ranks: the
    sequence of global batches does not depend on how many share it. All ranks get as many. Positions from `total` on
    are what evens them out.

    Args:
        total: Chips in the epoch.
        start: Position at which it is taken up.
        ranks: Whose they are.
        uneven: What to do with a remainder.
    """
    left = max(0, total - start)
    each = left // ranks.count if uneven == "drop" else -(-left // ranks.count)
    first = start + ranks.rank
    return range(first, first + each * ranks.count, ranks.count)


def checked_uneven(value: Any) -> Uneven:
    """One of the three.

    Raises:
        UsageError: it is none.
    """
    if value not in ("drop", "blank", "repeat"):
        raise UsageError(f"uneven= is 'drop', 'blank' or 'repeat', not {value!r}.")
    chosen: Uneven = value
    return chosen
