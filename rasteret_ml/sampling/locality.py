"""Local orders: the chips of an epoch, put in an order in which a tile is decoded once for many of them.

A local order is a permutation: an epoch holds exactly the chips that it holds without it, so how evenly they cover
the area cannot change; only when each comes does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.sampling.cells import Cells

__all__ = ["Locality", "local_order"]


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
