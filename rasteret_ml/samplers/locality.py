"""Local orders: an epoch's chips reordered so that chips which share tiles follow each other closely.

A local order is a permutation of the epoch's uniform draws: the chips, and so their coverage of the area, stay the
same, and a cache of decoded tiles serves several of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, full_turn
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of
from rasteret_ml.samplers.sampler import Floats, Integers, parse_options

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

    @classmethod
    def of(cls, value: Locality | Mapping[str, int] | int | None) -> Locality | None:
        """Return a `Locality` from a number of blocks or a mapping of its fields; None stays None.

        Raises:
            UsageError: if a field is unknown or not an integer >= 1.
        """
        return None if value is None else parse_options(cls, value, "blocks")


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
    """Find the tiles that chips begin in, on a dataset with one target grid.

    Tiles come from `dataset.tile_layout()`; without it, they are assumed to be 512 pixels wide, from each scene's upper
    left corner. A combination has the scenes of all its parts, those of the first part first. Where scenes overlap, a
    chip belongs to the one that is read first: of the first part, then the newest, then the first in the index.

    Args:
        dataset: Any TorchGeo dataset.
        size: Chip size in pixels (height, width).
        when: Times that a scene must overlap.
    """

    def __init__(self, dataset: Any, size: tuple[int, int], when: slice) -> None:
        self._chip = np.array([size[1] * dataset.res[0], size[0] * dataset.res[1]])
        self._turn = full_turn(crs_text(dataset.crs))
        parts = [_scenes(leaf, when) for leaf in _leaves(dataset)]
        shapes = np.concatenate([shapes for shapes, _ in parts])
        # Dates of one place count as one scene: the newest represents them all, and lookups stay small.
        kept = ~pd.Series(shapely.to_wkb(shapes), dtype=object).duplicated().to_numpy()
        self._tree = shapely.STRtree(shapes[kept])
        xmin, _, _, ymax = dataset.index.total_bounds
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
        datasets = [dataset] if len(grids) == 1 else [_GridScenes(grid, when) for grid in grids]
        self._lookups = [TileLookup(part, size, when) for part in datasets]

    def locate(self, corners: Floats, grid_index: Integers) -> TilePositions:
        """Return the tiles that hold upper left corners (x, y) `[N, 2]` on target grids `[N]`."""
        scene, row, column = (np.full(len(corners), -1, np.int64) for _ in range(3))
        offset = 0
        for number, lookup in enumerate(self._lookups):
            here = np.flatnonzero(grid_index == number)
            found = lookup.locate(corners[here])
            scene[here] = np.where(found.scene >= 0, found.scene + offset, -1)
            row[here], column[here] = found.row, found.column
            offset += len(lookup)
        return TilePositions(scene=scene, row=row, column=column)


class _GridScenes:
    """A target grid in the form of a dataset with an index, whose scenes exist at all times."""

    def __init__(self, grid: TargetGrid, when: slice) -> None:
        self.res, self.crs = grid.res, grid.crs
        times = pd.IntervalIndex.from_arrays([when.start] * len(grid.shapes), [when.stop] * len(grid.shapes), "both")
        self.index = gpd.GeoDataFrame(geometry=list(grid.shapes), crs=grid.crs, index=times)


def _leaves(dataset: Any) -> Iterator[Any]:
    """The datasets that a combination consists of, left to right."""
    parts = getattr(dataset, "datasets", None)
    if not parts:
        yield dataset
        return
    for part in parts:
        yield from _leaves(part)


def _scenes(dataset: Any, when: slice) -> tuple[npt.NDArray[np.object_], Floats]:
    """Outlines `[N]` and tile grids `[N, 4]` (left, top, tile width, tile height) of scenes, the newest first."""
    index = dataset.index
    times = index.index
    here = np.flatnonzero((times.left <= when.stop) & (times.right >= when.start))
    here = here[np.argsort(-times.left.to_numpy()[here].astype(np.int64), kind="stable")]
    shapes = np.asarray(index.geometry, dtype=object)[here]
    layout = dataset.tile_layout() if hasattr(dataset, "tile_layout") and "rid" in index.columns else None
    if layout is not None:
        at = np.searchsorted(layout.rows, index["rid"].to_numpy()[here])
        return shapes, np.stack([layout.x0, layout.y0, layout.tile_width, layout.tile_height], axis=1)[at]
    bounds = shapely.bounds(shapes)
    tile = np.broadcast_to(np.array(dataset.res) * _TILE, (len(here), 2))
    return shapes, np.column_stack([bounds[:, 0], bounds[:, 3], tile])


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


# Diversity of batches -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDiversity:
    """Distinct scenes and tiles in a batch, and the expected numbers for a random order of the same chips."""

    scenes: float  #: Mean number of distinct scenes in a batch (a chip's scene holds its centre).
    scenes_uniform: float  #: Expected number of distinct scenes in a batch drawn uniformly from the same chips.
    tiles: float  #: Mean number of distinct tiles in a batch (a chip's tile holds its upper left corner).
    tiles_uniform: float  #: Expected number of distinct tiles in a batch drawn uniformly from the same chips.

    @property
    def scene_ratio(self) -> float:
        """Scenes relative to uniform draws: 1 = as diverse; above 1 = more evenly spread."""
        return self.scenes / self.scenes_uniform

    @property
    def tile_ratio(self) -> float:
        """Tiles relative to uniform draws."""
        return self.tiles / self.tiles_uniform


def batch_diversity(aois: Iterable[Any], dataset: Any, batch_size: int) -> BatchDiversity:
    """Measure how many different scenes and tiles the batches of an order hold.

    The expectation is Hurlbert's (1971) for distinct classes in a sample without replacement: the sum over classes of
    1 - C(N - n, k) / C(N, k).

    Args:
        aois: A sampler or a list of queries `(x, y, t)` for chips of one size; one epoch is iterated.
        dataset: The dataset that they query.
        batch_size: Chips in a batch. A multiple of it measures several successive batches together.

    Raises:
        UsageError: if there are fewer chips than `batch_size`.
    """
    queries = list(aois)
    if not 1 <= batch_size <= len(queries):
        raise UsageError(f"A batch of {batch_size} chips must fit in the epoch, which has {len(queries)}.")
    grids = target_grids_of(dataset)
    numbers = {grid.crs: number for number, grid in enumerate(grids)}
    # With a single target grid, queries may be plain slices without a CRS.
    grid_index = np.array([0 if len(grids) == 1 else numbers[query.crs] for query in queries])
    (x, y, _), res = queries[0], grids[grid_index[0]].res
    size = (round((y.stop - y.start) / res[1]), round((x.stop - x.start) / res[0]))
    corners = np.array([(x.start, y.stop) for x, y, _ in queries], dtype=np.float64)
    when = slice(min(t.start for _, _, t in queries), max(t.stop for _, _, t in queries))
    found = GridTileLookup(dataset, grids, size, when).locate(corners, grid_index)
    tiles, scenes = found.blocks(1), found.scene + 1
    return BatchDiversity(
        scenes=_mean_distinct(scenes, batch_size),
        scenes_uniform=_expected_distinct(scenes, batch_size),
        tiles=_mean_distinct(tiles, batch_size),
        tiles_uniform=_expected_distinct(tiles, batch_size),
    )


def _mean_distinct(values: Integers, batch_size: int) -> float:
    """Mean number of distinct values in the full batches."""
    batches = np.sort(values[: len(values) // batch_size * batch_size].reshape(-1, batch_size), axis=1)
    return float(1 + (np.diff(batches, axis=1) != 0).sum(axis=1).mean())


def _expected_distinct(values: Integers, batch_size: int) -> float:
    """Expected number of distinct values in a batch drawn without replacement."""
    total, counts = len(values), np.bincount(values)
    others = total - counts[counts > 0, None] - np.arange(batch_size)
    missed = np.prod(np.maximum(others, 0) / (total - np.arange(batch_size)), axis=1)
    return float((1 - missed).sum())
