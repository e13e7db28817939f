"""Local orders: an epoch's chips reordered so that chips which share tiles follow each other closely.

A local order is a permutation of the epoch's uniform draws: the chips, and so their coverage of the area, stay the
same, and a cache of decoded tiles serves several of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, full_turn
from rasteret_ml.geo.regions import Floats, Geometries, Integers
from rasteret_ml.samplers.aoi.target_grids import TargetGrid

_TILE = 512  # Tile side in pixels that is assumed for datasets without `tile_layout()` (most COGs have it).
_CHUNK = 65536  # Chips to look up at a time: where scenes overlap, each may intersect hundreds.


@dataclass(frozen=True, slots=True, kw_only=True)
class Locality:
    """How local an epoch's order is: from close to uniform (many small blocks) to very local (few large ones).

    Chips come from `blocks` active blocks of tiles at a time, one from each in turn, in random order; an exhausted
    block is replaced by another one. A chip belongs to the tile that holds its upper left corner.

    A worker's tile cache should hold about `blocks * 2 * (tiles + 1)` tiles per band (128 by default: 64 MB per band
    of 512 x 512 uint16), for chips up to a tile's size. With a smaller cache, tiles are decoded several times.

    Example:
        >>> sampler = RandomAOISampler(dataset, 256, 10_000, locality=Locality(blocks=16, lanes=4, batch_size=16))
    """

    #: Active blocks, from as many scenes as possible. With as many as a batch has chips, batches hold as many scenes
    #: and tiles as uniform draws do.
    blocks: int = 16
    #: Side of a block in tiles (in chips, if these are larger). A block is traversed from one of its four sides, the
    #: chips in a row of tiles in random order.
    tiles: int = 3
    #: Batches that alternate, each with its own active blocks. With as many lanes as workers (or a multiple), each
    #: worker keeps to its own blocks and every tile is decoded by one worker only. The order depends on this number,
    #: not on the actual number of workers.
    lanes: int = 1
    batch_size: int = 16  #: Chips in a batch; only used with several lanes.

    def __post_init__(self) -> None:
        for name in ("blocks", "tiles", "lanes", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise UsageError(f"Locality({name}=) must be an integer >= 1, got {value!r}.")


# Tiles ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TilePositions:
    """The tile that holds each chip's upper left corner."""

    scene: Integers  #: Index of the scene that holds the chip's centre; -1 = none `[N]`.
    row: Integers  #: Row of tiles in that scene, downwards; for scene -1, in the whole dataset `[N]`.
    column: Integers  #: Column of tiles, to the right `[N]`.

    def blocks(self, side: int) -> Integers:
        """Return the index from 0 of each chip's block of `side` x `side` tiles `[N]`."""
        codes = np.zeros(len(self.scene), np.int64)
        if not len(codes):
            return codes
        for values in (self.scene, self.row // side, self.column // side):
            codes = codes * (int(np.ptp(values)) + 1) + (values - int(np.min(values)))
        blocks: Integers = np.unique(codes, return_inverse=True)[1].reshape(-1)
        return blocks


class TileLookup:
    """Find the tiles that chips of `size` pixels (height, width) begin in, on a dataset with one target grid.

    Tiles come from `dataset.tile_layout()`; without it, they are assumed to be 512 pixels wide, from each scene's upper
    left corner. A combination has the scenes of all its parts, those of the first part first. Where scenes overlap, a
    chip belongs to the one that is read first: of the first part, then the newest, then the first in the index. Scenes
    must overlap `when`; those of a `TargetGrid`, which may take the dataset's place, exist at all times.
    """

    def __init__(self, dataset: Any, size: tuple[int, int], when: slice) -> None:
        self._chip = np.array([size[1] * dataset.res[0], size[0] * dataset.res[1]])
        self._turn = full_turn(crs_text(dataset.crs))
        parts = [_scenes(leaf, when) for leaf in _leaves(dataset)]
        shapes = np.concatenate([shapes for shapes, _ in parts])
        # Dates of one place count as one scene: the newest represents them all, and lookups stay small.
        kept = ~pd.Series(shapely.to_wkb(shapes), dtype=object).duplicated().to_numpy()
        self._tree = shapely.STRtree(shapes[kept])
        is_grid = isinstance(dataset, TargetGrid)
        xmin, _, _, ymax = shapely.total_bounds(dataset.shapes) if is_grid else dataset.index.total_bounds
        no_scene = [(xmin, ymax, _TILE * dataset.res[0], _TILE * dataset.res[1])]
        grids = np.concatenate([np.concatenate([grids for _, grids in parts])[kept], no_scene])
        # Blocks are traversed row by row of tiles. Chips larger than a tile need larger rows: tiles are grouped.
        grids[:, 2:] *= np.maximum(1, np.ceil(self._chip / grids[:, 2:] - 1e-6))
        self._grids: Floats = grids

    def __len__(self) -> int:
        """Return the number of scenes with distinct outlines."""
        return len(self._tree)

    def locate(self, corners: Floats) -> TilePositions:
        """Return the tiles that hold upper left corners (x, y) `[N, 2]`."""
        scene = np.full(len(corners), -1, np.int64)
        for start in range(0, len(corners), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            scene[chunk] = self._scenes_at(corners[chunk] + self._chip / 2 * (1, -1))
        left, top, width, height = self._grids[scene].T
        column = np.floor((corners[:, 0] - left) / width).astype(np.int64)
        row = np.floor((top - corners[:, 1]) / height).astype(np.int64)
        return TilePositions(scene=scene, row=row, column=column)

    def _scenes_at(self, centres: Floats) -> Integers:
        """The first scene that holds each centre, or -1; longitudes also match a full turn away."""
        none = len(self._tree)
        found = np.full(len(centres), none, np.int64)
        for shift in (0.0,) if self._turn is None else (0.0, -self._turn, self._turn):
            missing = np.flatnonzero(found == none)
            points = shapely.points(centres[missing] + (shift, 0.0))
            chip, scene = self._tree.query(points, predicate="intersects")
            np.minimum.at(found, missing[chip], scene)
        found[found == none] = -1
        return found


class GridTileLookup:
    """Find the tiles that chips begin in, on each target grid of a dataset.

    With several target grids, all tiles are assumed to be 512 pixels wide.
    """

    def __init__(self, dataset: Any, grids: Sequence[TargetGrid], size: tuple[int, int], when: slice) -> None:
        self._lookups = [TileLookup(part, size, when) for part in ([dataset] if len(grids) == 1 else grids)]

    def locate(self, corners: Floats, grid_index: Integers) -> TilePositions:
        """Return the tiles that hold upper left corners (x, y) `[N, 2]` on target grids `[N]`."""
        scene, row, column = np.full((3, len(corners)), -1, np.int64)
        offset = 0
        for number, lookup in enumerate(self._lookups):
            here = np.flatnonzero(grid_index == number)
            found = lookup.locate(corners[here])
            scene[here] = np.where(found.scene >= 0, found.scene + offset, -1)
            row[here], column[here] = found.row, found.column
            offset += len(lookup)
        return TilePositions(scene=scene, row=row, column=column)


def _leaves(dataset: Any) -> Iterator[Any]:
    """The datasets that a combination consists of, left to right."""
    parts = getattr(dataset, "datasets", None)
    if not parts:
        yield dataset
        return
    for part in parts:
        yield from _leaves(part)


def _scenes(dataset: Any, when: slice) -> tuple[Geometries, Floats]:
    """Outlines `[N]` and tile grids `[N, 4]` (left, top, tile width, tile height) of scenes, the newest first."""
    if isinstance(dataset, TargetGrid):
        return dataset.shapes, _assumed_tiles(dataset.shapes, dataset.res)
    index = dataset.index
    times = index.index
    here = np.flatnonzero((times.left <= when.stop) & (times.right >= when.start))
    here = here[np.argsort(-times.left.to_numpy()[here].astype(np.int64), kind="stable")]
    shapes = np.asarray(index.geometry, dtype=object)[here]
    layout = dataset.tile_layout() if hasattr(dataset, "tile_layout") and "rid" in index.columns else None
    if layout is None:
        return shapes, _assumed_tiles(shapes, dataset.res)
    at = np.searchsorted(layout.rows, index["rid"].to_numpy()[here])
    return shapes, np.stack([layout.x0, layout.y0, layout.tile_width, layout.tile_height], axis=1)[at]


def _assumed_tiles(shapes: Geometries, res: tuple[float, float]) -> Floats:
    bounds = shapely.bounds(shapes)
    return np.column_stack([bounds[:, 0], bounds[:, 3], np.broadcast_to(np.array(res) * _TILE, (len(shapes), 2))])


# Order ----------------------------------------------------------------------------------------------------


def local_order(tiles: TilePositions, locality: Locality, random: np.random.Generator) -> Integers:
    """Return a permutation `[N]` of an epoch's chips.

    Scenes are concatenated in random order, block after block, and cut into `blocks * lanes` streams of equal length,
    whose blocks are shuffled. The streams are then interleaved, one chip from each: systematic sampling (Madow and
    Madow 1944) over the scenes. Every stretch of the epoch thus holds each scene's share of chips, no scene is left
    for the end, and all streams end together.
    """
    count, streams = len(tiles.scene), locality.blocks * locality.lanes
    block = tiles.blocks(locality.tiles)
    queue = _queue(tiles, block, random)
    stream = np.arange(count) * streams // max(count, 1)
    shuffled = np.lexsort((random.random(_size(block))[block[queue]], stream))
    queue, stream = queue[shuffled], stream[shuffled]
    turn = np.arange(count) - np.searchsorted(stream, np.arange(streams))[stream]
    lane = stream % locality.lanes
    order = np.lexsort((random.random(count), turn, lane))
    if locality.lanes > 1:
        lane = lane[order]
        position = np.arange(count) - np.searchsorted(lane, np.arange(locality.lanes))[lane]
        order = order[np.lexsort((lane, position // locality.batch_size))]
    permutation: Integers = queue[order]
    return permutation


def _queue(tiles: TilePositions, block: Integers, random: np.random.Generator) -> Integers:
    """Chips by scene, block and row of tiles: scenes and blocks in random order, each block from a random side."""
    scene_key = random.random(_size(tiles.scene) + 1)[tiles.scene]  # the last key belongs to scene -1
    blocks = _size(block)
    block_key, side = random.random(blocks)[block], np.floor(4 * random.random(blocks)).astype(np.int64)[block]
    distance = np.choose(side, [tiles.row, -tiles.row, tiles.column, -tiles.column])
    return np.lexsort((random.random(len(block)), distance, block_key, scene_key))


def _size(indices: Integers) -> int:
    """The length of an array that indices from 0 (or -1) address."""
    return int(np.max(indices, initial=-1)) + 1
