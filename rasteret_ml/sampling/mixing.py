"""How mixed the batches of an order are, against uniform draws of the same chips."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.aois.places import frames_of
from rasteret_ml.errors import UsageError
from rasteret_ml.sampling.cells import FrameLattice

__all__ = ["Mixing", "mixing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """Distinct scenes and tiles in a batch, and what they would be in a random order of the same chips."""

    scenes: float
    """Mean number of distinct scenes in a batch (a chip's scene holds its centre)."""
    scenes_uniform: float
    """The same, expected of a batch drawn from the same chips uniformly."""
    tiles: float
    """Mean number of distinct tiles in a batch (a chip's tile holds its upper left corner)."""
    tiles_uniform: float
    """The same, expected of a batch drawn from the same chips uniformly."""

    @property
    def scene_ratio(self) -> float:
        """Scenes against uniform: 1 = as mixed; above 1 = more evenly spread."""
        return self.scenes / self.scenes_uniform

    @property
    def tile_ratio(self) -> float:
        """Tiles against uniform."""
        return self.tiles / self.tiles_uniform


def mixing(aois: Iterable[Any], dataset: Any, batch_size: int) -> Mixing:
    """Measure how mixed the batches of an order are.

    Args:
        aois: A sampler or a list of queries `(x, y, t)`, chips of one size; an epoch of it is gone through.
        dataset: The dataset that they are for.
        batch_size: Chips in a batch. A multiple of it shows how mixed several batches in succession are.

    Raises:
        UsageError: fewer chips than a batch.

    The expectation is Hurlbert's (1971), of distinct kinds in a sample without replacement: the sum over kinds of
    1 - C(N - n, k) / C(N, k).
    """
    queries = list(aois)
    if not 1 <= batch_size <= len(queries):
        raise UsageError(f"mixing needs at least one batch of {batch_size}; there are {len(queries)} chips.")
    frames = frames_of(dataset)
    numbers = {frame.crs: number for number, frame in enumerate(frames)}
    # Of a dataset with one frame, queries may be plain slices.
    frame = np.array([0 if len(frames) == 1 else numbers[q.crs] for q in queries])
    (x, y, _), res = queries[0], frames[frame[0]].res
    size = (round((y.stop - y.start) / res[1]), round((x.stop - x.start) / res[0]))
    corners = np.array([(q[0].start, q[1].stop) for q in queries], dtype=np.float64)
    when = slice(min(q[2].start for q in queries), max(q[2].stop for q in queries))
    cells = FrameLattice(dataset, frames, size, when).cells(corners, frame)
    tiles, scenes = cells.blocks(1), cells.scene + 1
    return Mixing(
        scenes=_distinct(scenes, batch_size),
        scenes_uniform=_expected(scenes, batch_size),
        tiles=_distinct(tiles, batch_size),
        tiles_uniform=_expected(tiles, batch_size),
    )


def _distinct(kinds: npt.NDArray[np.int64], batch_size: int) -> float:
    """Mean number of distinct kinds in the whole batches."""
    whole = len(kinds) // batch_size * batch_size
    batches = np.sort(kinds[:whole].reshape(-1, batch_size), axis=1)
    return float(1 + (np.diff(batches, axis=1) != 0).sum(axis=1).mean())


def _expected(kinds: npt.NDArray[np.int64], batch_size: int) -> float:
    """Expected number of distinct kinds in a batch drawn without replacement."""
    total, counts = len(kinds), np.bincount(kinds)
    left = total - counts[counts > 0, None] - np.arange(batch_size)
    missed = np.prod(np.maximum(left, 0) / (total - np.arange(batch_size)), axis=1)
    return float((1 - missed).sum())
