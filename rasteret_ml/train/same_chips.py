"""The same chips each epoch, for Lightning's `overfit_batches`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler, SequentialSampler

__all__ = ["SameChips"]


class SameChips(SequentialSampler, DistributedSampler[Any]):
    """The first epoch of a sampler, again and again.

    Lightning takes it for what it asks for when a few batches are to be overfitted: a sampler that does not shuffle (in
    the place of any other it puts one that counts 0, 1, 2 …, which is no chip), and one that deals to ranks by itself.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        self._sampler.set_epoch(0)
        return iter(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the first one."""
