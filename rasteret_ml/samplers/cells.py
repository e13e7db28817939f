"""Which scene's which tile a chip begins in: what locality and mixing are measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.geo.crs import crs_text, full_turn
from rasteret_ml.samplers.aoi.target_grids import TargetGrid

__all__ = ["Cells", "GridLattice", "TileLattice", "largest_shares", "shares"]

Geometries = npt.NDArray[np.object_]
Floats = npt.NDArray[np.float64]


def shares(polygons: Geometries, corners: Floats, sizes: Floats) -> Floats:
    """Share, 0 to 1, of each chip that lies in its own polygon `[N]`.

    Args:
        polygons: Valid polygons `[N]`; those that come often are best prepared.
        corners: Upper left corners (x, y) `[N, 2]`.
        sizes: Width and height, in the same units `[N, 2]`.
    """
    (x, y), (width, height) = corners.T, sizes.T
    boxes = shapely.box(x, y - height, x + width, y)
    found: Floats = shapely.covers(polygons, boxes).astype(np.float64)
    partly = (found == 0) & shapely.intersects(polygons, boxes)
    met = shapely.area(shapely.intersection(polygons[partly], boxes[partly]))
    found[partly] = met / (width[partly] * height[partly])
    return found


def largest_shares(polygons: Geometries, sizes: Floats) -> Floats:
    """A share that no chip of its size `[N, 2]` exceeds in each polygon `[N]`: by its area, and by its bounding box."""
    bounds = shapely.bounds(polygons)
    box = np.minimum(bounds[:, 2:] - bounds[:, :2], sizes).prod(axis=1)
    found: Floats = np.minimum(shapely.area(polygons), box) / sizes.prod(axis=1)
    return found


_TILE = 512
"""Side in pixels of the tiles of a dataset that does not say (most COGs')."""
_CHUNK = 65536
"""Chips looked up at a time: where scenes overlap, each may meet hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """Chips as tiles of scenes: of each chip, the tile that its upper left corner lies in."""

    scene: npt.NDArray[np.int64]
    """Number of the scene that holds the chip's centre; -1 = none does `[N]`."""
    row: npt.NDArray[np.int64]
    """Row of tiles in that scene, downwards; of scene -1, in the whole dataset `[N]`."""
    column: npt.NDArray[np.int64]
    """Column of tiles, to the right `[N]`."""

    def blocks(self, side: int) -> npt.NDArray[np.int64]:
        """Numbers from 0 of the blocks of `side` x `side` tiles `[N]`."""
        if not len(self.scene):
            return np.zeros(0, np.int64)
        packed = np.zeros(len(self.scene), np.int64)
        for part in (self.scene, self.row // side, self.column // side):
            packed = packed * (int(np.ptp(part)) + 1) + (part - int(np.min(part)))
        numbers: npt.NDArray[np.int64] = np.unique(packed, return_inverse=True)[1].reshape(-1)
        return numbers


class TileLattice:
    """The tile grids of a dataset's scenes.

    From `dataset.tile_layout()` where there is one; else each scene's tiles are taken to be 512 pixels wide, from its
    upper left corner. Of a combination, its parts' scenes, the first part's first.
    """

    def __init__(self, dataset: Any, size: tuple[int, int], when: slice) -> None:
        """Of the scenes that meet the times `when`, for chips of `size` pixels (height, width).

        Where scenes overlap, the first part's, then the newest, then the first in the index counts: the one that
        is read first.
        """
        self._chip = np.array([size[1] * dataset.res[0], size[0] * dataset.res[1]])
        self._turn = full_turn(crs_text(dataset.crs))
        parts = [_scenes(leaf, when) for leaf in _leaves(dataset)]
        shapes = np.concatenate([shapes for shapes, _ in parts])
        # Dates of one place are one scene: the newest stands for them all, and lookups stay small.
        kept = ~pd.Series(shapely.to_wkb(shapes), dtype=object).duplicated().to_numpy()
        self._tree = shapely.STRtree(shapes[kept])
        xmin, _, _, ymax = dataset.index.total_bounds
        nowhere = [(xmin, ymax, _TILE * dataset.res[0], _TILE * dataset.res[1])]
        grids = np.concatenate([np.concatenate([grids for _, grids in parts])[kept], nowhere])
        # A block of tiles is swept for chips of at most its tiles' size; for larger chips, the tiles are grouped.
        grids[:, 2:] *= np.maximum(1, np.ceil(self._chip / grids[:, 2:] - 1e-6))
        self._grids: npt.NDArray[np.float64] = grids

    def __len__(self) -> int:
        """Scenes at distinct places."""
        return len(self._tree)

    def cells(self, corners: npt.NDArray[np.float64]) -> Cells:
        """The tiles that chips with these upper left corners `[N, 2]` (x, y) begin in."""
        scene = np.full(len(corners), -1, np.int64)
        for start in range(0, len(corners), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            scene[chunk] = self._scenes_at(corners[chunk] + self._chip / 2 * (1, -1))
        grid = self._grids[scene]
        column = np.floor((corners[:, 0] - grid[:, 0]) / grid[:, 2]).astype(np.int64)
        row = np.floor((grid[:, 1] - corners[:, 1]) / grid[:, 3]).astype(np.int64)
        return Cells(scene=scene, row=row, column=column)

    def _scenes_at(self, centres: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The first scene that holds each centre; longitudes are also looked up a turn away."""
        none = len(self._tree)
        found = np.full(len(centres), none, np.int64)
        for shift in (0.0,) if self._turn is None else (0.0, -self._turn, self._turn):
            missing = np.flatnonzero(found == none)
            points = shapely.points(centres[missing] + (shift, 0.0))
            chip, scene = self._tree.query(points, predicate="intersects")
            np.minimum.at(found, missing[chip], scene)
        found[found == none] = -1
        return found


class GridLattice:
    """The tile grids of a dataset's frames: a `TileLattice` each.

    Of several frames, each scene's tiles are taken to be 512 pixels wide.
    """

    def __init__(self, dataset: Any, frames: Sequence[TargetGrid], size: tuple[int, int], when: slice) -> None:
        """As for `TileLattice`."""
        if len(frames) == 1:
            self._lattices = [TileLattice(dataset, size, when)]
        else:
            self._lattices = [TileLattice(_GridScenes(frame, when), size, when) for frame in frames]

    def cells(self, corners: npt.NDArray[np.float64], frame: npt.NDArray[np.int64]) -> Cells:
        """The tiles that chips with these upper left corners `[N, 2]`, on these frames `[N]`, begin in."""
        if len(self._lattices) == 1:
            return self._lattices[0].cells(corners)
        scene, row, column = (np.full(len(corners), -1, np.int64) for _ in range(3))
        first = 0
        for number, lattice in enumerate(self._lattices):
            here = np.flatnonzero(frame == number)
            found = lattice.cells(corners[here])
            scene[here] = np.where(found.scene >= 0, found.scene + first, -1)
            row[here], column[here] = found.row, found.column
            first += len(lattice)
        return Cells(scene=scene, row=row, column=column)


class _GridScenes:
    """A frame as a dataset's index, all of it at any time."""

    def __init__(self, frame: TargetGrid, when: slice) -> None:
        self.res, self.crs = frame.res, frame.crs
        times = pd.IntervalIndex.from_arrays([when.start] * len(frame.shapes), [when.stop] * len(frame.shapes), "both")
        self.index = gpd.GeoDataFrame(geometry=list(frame.shapes), crs=frame.crs, index=times)


def _leaves(dataset: Any) -> Iterator[Any]:
    """The datasets that a combination is made of, left to right."""
    parts = getattr(dataset, "datasets", None)
    if not parts:
        yield dataset
        return
    for part in parts:
        yield from _leaves(part)


def _scenes(dataset: Any, when: slice) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.float64]]:
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
