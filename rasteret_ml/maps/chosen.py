"""Some of a grid's chips, by position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DistributedSampler

from rasteret_ml.aois.aoi import AOI

__all__ = ["ChosenChips"]


class ChosenChips(DistributedSampler[AOI]):
    """The chips of a `GridAOISampler` at given positions `[N]`, for one rank.

    It is torch's DistributedSampler to whoever asks: Lightning then deals it to no other ranks.

    Args:
        sampler: Where chips come from.
        positions: Their places in its order.
    """

    def __init__(self, sampler: Any, positions: npt.NDArray[np.int64]) -> None:
        self._sampler = sampler
        self.positions = positions
        """Places in the sampler's order."""
        super().__init__(range(len(positions)), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[AOI]:
        return (self._sampler.at(int(position)) for position in self.positions)
