"""The processes that predict a map together: those of torch's process group, or one alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed

from rasteret_ml.sampling.ranks import Ranks

__all__ = ["Crew"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew(Ranks):
    """The ranks, and two ways to speak; each is called by all of them at the same time."""

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
