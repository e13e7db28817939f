"""Local orders: the chips of an epoch, put in an order in which a tile is decoded once for many of them.

A local order is a permutation: an epoch holds exactly the chips that it holds without it, so how evenly they cover
the area cannot change; only when each comes does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.samplers.aoi.target_grids import target_grids_of
from rasteret_ml.samplers.cells import Cells, GridLattice

__all__ = ["BatchDiversity", "Locality", "batch_diversity", "local_order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDiversity:
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


def batch_diversity(aois: Iterable[Any], dataset: Any, batch_size: int) -> BatchDiversity:
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
    frames = target_grids_of(dataset)
    numbers = {frame.crs: number for number, frame in enumerate(frames)}
    # Of a dataset with one frame, queries may be plain slices.
    frame = np.array([0 if len(frames) == 1 else numbers[q.crs] for q in queries])
    (x, y, _), res = queries[0], frames[frame[0]].res
    size = (round((y.stop - y.start) / res[1]), round((x.stop - x.start) / res[0]))
    corners = np.array([(q[0].start, q[1].stop) for q in queries], dtype=np.float64)
    when = slice(min(q[2].start for q in queries), max(q[2].stop for q in queries))
    cells = GridLattice(dataset, frames, size, when).cells(corners, frame)
    tiles, scenes = cells.blocks(1), cells.scene + 1
    return BatchDiversity(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """How local an epoch's order is: the knob between uniform (many blocks, small ones) and local (few).

    Chips are drawn from `blocks` active blocks of tiles at a time, one from each in turn, in a random order; a block
    that is used up makes way for another. A chip belongs to the tile that holds its upper left corner.

    A worker's tile cache should hold what the active blocks are at: about `blocks * 2 * (tiles + 1)` tiles a band
    (128 by default: 64 MB a band of 512 x 512 uint16), for chips up to a tile's size. With a smaller one tiles are
    decoded several times.
    """

    blocks: int = 16
    """Active blocks, of as many scenes as possible. As many as a batch has chips keep its scenes and places as
    mixed as uniform draws do."""
    tiles: int = 3
    """Side of a block in tiles (in chips, where these are larger). A block is swept from one of its four sides to the
    other, chips in a row of tiles at random."""
    lanes: int = 1
    """Batches that take turns, each with its own active blocks. With as many lanes as workers (or a multiple), each
    worker keeps to its own blocks and a tile is decoded by one worker only; with fewer, by several. The order depends
    on what is declared here, never on the workers that there are."""
    batch_size: int = 16
    """Chips in a batch; matters with several lanes alone."""

    def __post_init__(self) -> None:
        for name in ("blocks", "tiles", "lanes", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise UsageError(f"Locality({name}=) is a whole number of at least 1, not {value!r}.")

    @classmethod
    def of(cls, value: Locality | int | None) -> Locality | None:
        """A number stands for that many blocks; None for no locality.

        Raises:
            UsageError: neither of these.
        """
        return value if value is None or isinstance(value, Locality) else cls(blocks=value)


def local_order(cells: Cells, locality: Locality, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """The order in which the chips of an epoch are served: a permutation `[N]` of their numbers.

    Scenes are laid end to end in a random order, block after block, and cut into `blocks * lanes` streams of equal
    length, in each of which the blocks are shuffled. Every stream gives a chip in turn: systematic sampling (Madow
    and Madow 1944) over the scenes. So each scene has its share of the chips in every stretch of the epoch, none
    is left for its end, and all streams end together.

    Args:
        cells: Where each chip lies in its scene's tiles.
        locality: The knob.
        random: The epoch's random numbers.
    """
    count, streams = len(cells.scene), locality.blocks * locality.lanes
    block = cells.blocks(locality.tiles)
    queue = _queue(cells, block, random)
    stream = np.arange(count) * streams // max(count, 1)
    shuffled = np.lexsort((random.random(_kinds(block))[block[queue]], stream))
    queue, stream = queue[shuffled], stream[shuffled]
    turn = np.arange(count) - np.searchsorted(stream, np.arange(streams))[stream]
    lane = stream % locality.lanes
    served = np.lexsort((random.random(count), turn, lane))
    if locality.lanes > 1:
        lane = lane[served]
        place = np.arange(count) - np.searchsorted(lane, np.arange(locality.lanes))[lane]
        served = served[np.lexsort((lane, place // locality.batch_size))]
    order: npt.NDArray[np.int64] = queue[served]
    return order


def _queue(cells: Cells, block: npt.NDArray[np.int64], random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Chips by scene, block, row of tiles: scenes and blocks in random order, each block swept from a random side."""
    scene_key = random.random(_kinds(cells.scene) + 1)[cells.scene]  # the last one is scene -1's
    blocks = _kinds(block)
    block_key, side = random.random(blocks)[block], np.floor(4 * random.random(blocks)).astype(np.int64)[block]
    sweep = np.choose(side, [cells.row, -cells.row, cells.column, -cells.column])
    return np.lexsort((random.random(len(block)), sweep, block_key, scene_key))


def _kinds(numbers: npt.NDArray[np.int64]) -> int:
    """How many numbers from 0 there may be."""
    return int(np.max(numbers, initial=-1)) + 1
