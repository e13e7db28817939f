"""The processes that predict a map together: those of torch's process group, or one alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed

__all__ = ["Crew"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Who is who, and two ways to speak; each is called by all ranks at the same time."""

    rank: int = 0
    """Which this one is, from 0."""
    count: int = 1
    """How many there are."""

    @classmethod
    def now(cls) -> Crew:
        """As the process group is."""
        group = torch.distributed
        if not (group.is_available() and group.is_initialized()):
            return cls()
        return cls(rank=group.get_rank(), count=group.get_world_size())

    def told_by_first(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def of_all(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found
