"""Grids of chips: every pixel of a polygon, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint
from rasteret_ml.geo.crs import transform_geometries
from rasteret_ml.geo.regions import boxes_of, polygonal_each, union_of
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, coverage_from, without
from rasteret_ml.samplers.cells import shares
from rasteret_ml.samplers.random import checked_share
from rasteret_ml.samplers.ranks import Remainder
from rasteret_ml.samplers.sampler import ChipSampler, Floats, pixel_pair

__all__ = ["ChipGrid", "GridAOISampler", "lay_grid"]

Integers = npt.NDArray[np.int64]

_CHUNK = 1 << 18
"""Chips tested at a time."""
_NEAR = 1e-6
"""Share of a pixel, or of a stride, that counts as nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipGrid:
    """The pixels that chips lie on, their size and their distance, in CRS units, each (x, y)."""

    origin: tuple[float, float]
    """A corner of a pixel."""
    res: tuple[float, float]
    """Pixel size."""
    size: tuple[float, float]
    """Width and height of a chip."""
    stride: tuple[float, float]
    """Steps to the right and down."""


def lay_grid(shapes: npt.NDArray[np.object_], grid: ChipGrid) -> tuple[Floats, Integers]:
    """Chips that meet the inside of each valid polygon `[N]`, row by row from its upper left corner.

    Returns:
        Upper left corners `[M, 2]` (x, y) and the polygon that each belongs to `[M]`, polygon by polygon.
    """
    bounds = shapely.bounds(shapes)
    (x0, y0), (xres, yres) = grid.origin, grid.res
    left = x0 + _floor((bounds[:, 0] - x0) / xres) * xres
    top = y0 - _floor((y0 - bounds[:, 3]) / yres) * yres
    shape_of = np.array([_steps(top - bounds[:, 1], *_axis(grid, 1)), _steps(bounds[:, 2] - left, *_axis(grid, 0))])
    found = list(_chips(shapes, left, top, shape_of, grid))
    owner, row, column = (np.concatenate(part) for part in zip(*found, strict=True))
    bare = np.setdiff1d(np.arange(len(shapes)), owner)
    if len(bare):  # thinner than what counts as nothing, along an edge of pixels: a chip all the same
        first = np.zeros(len(bare), np.int64)
        order = np.argsort(np.append(owner, bare), kind="stable")
        owner, row, column = (np.append(a, b)[order] for a, b in ((owner, bare), (row, first), (column, first)))
    if not (shapely.get_num_geometries(shapes) == 1).all():
        # A chip may meet several parts of a polygon.
        number = (owner * (row.max() + 1) + row) * (column.max() + 1) + column
        first = np.unique(number, return_index=True)[1]
        owner, row, column = owner[first], row[first], column[first]
    x, y = left[owner] + column * grid.stride[0], top[owner] - row * grid.stride[1]
    return np.column_stack([x, y]), owner


def _chips(
    shapes: npt.NDArray[np.object_], left: Floats, top: Floats, shape_of: Integers, grid: ChipGrid
) -> Iterator[tuple[Integers, Integers, Integers]]:
    """Polygon, row and column of the chips that meet each part of each polygon, parts in turn."""
    parts, owner = shapely.get_parts(shapes, return_index=True)
    boxes, is_box = boxes_of(parts)
    shapely.prepare(parts[~is_box])
    (width, height), (right, down) = grid.size, grid.stride
    last_row, last_column = shape_of[:, owner] - 1
    column0 = np.floor((boxes[:, 0] - left[owner] - width) / right).clip(0, last_column).astype(np.int64)
    column1 = np.ceil((boxes[:, 2] - left[owner]) / right).clip(0, last_column).astype(np.int64)
    row0 = np.floor((top[owner] - height - boxes[:, 3]) / down).clip(0, last_row).astype(np.int64)
    row1 = np.ceil((top[owner] - boxes[:, 1]) / down).clip(0, last_row).astype(np.int64)
    columns = column1 - column0 + 1
    ends = np.cumsum(columns * (row1 - row0 + 1))
    for start in range(0, int(ends[-1]), _CHUNK):
        number = np.arange(start, min(start + _CHUNK, int(ends[-1])))
        part = np.searchsorted(ends, number, side="right")
        number -= np.where(part > 0, ends[part - 1], 0)
        row, column = row0[part] + number // columns[part], column0[part] + number % columns[part]
        x, y = left[owner[part]] + column * right, top[owner[part]] - row * down
        chips = np.column_stack([x, y - height, x + width, y])
        inside = np.concatenate([chips[:, :2] < boxes[part, 2:], chips[:, 2:] > boxes[part, :2]], axis=1)
        met = np.all(inside, axis=1)
        loose = np.flatnonzero(met & ~is_box[part])
        met[loose] = _meet(parts[part[loose]], shapely.box(*chips[loose].T))
        yield owner[part[met]], row[met], column[met]


def _meet(parts: npt.NDArray[np.object_], chips: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    """Whether the insides of both have points in common, by the cheapest question first."""
    met: npt.NDArray[np.bool_] = shapely.intersects(parts, chips)
    inset = np.flatnonzero(met)
    inset = inset[~shapely.contains_properly(parts[inset], chips[inset])]
    met[inset] = ~shapely.touches(parts[inset], chips[inset])
    return met


def _axis(grid: ChipGrid, axis: int) -> tuple[float, float]:
    return grid.size[axis], grid.stride[axis]


def _steps(extent: Floats, size: float, stride: float) -> Integers:
    """Numbers of chips of `size` that cover each extent (1e-6 of a stride counts as nothing)."""
    counts: Integers = np.maximum(1, np.ceil((extent - size) / stride - _NEAR).astype(np.int64) + 1)
    return counts


def _floor(values: Floats) -> Floats:
    nearest = np.round(values)
    floored: Floats = np.where(np.abs(values - nearest) < _NEAR, nearest, np.floor(values))
    return floored


class GridAOISampler(ChipSampler):
    """A regular grid of chips over each polygon: every pixel in at least one, row by row.

    Chips lie on the dataset's pixels. The last ones of a row or column may reach past the polygon and the
    scenes (their size is exact; what is outside is invalid). With a stride of the size, each pixel of a polygon is in
    exactly one of its chips. Of a dataset with several frames (`grid="native"`), each frame's chips cover what no
    earlier frame does.

    Args:
        dataset: As for `RandomAOISampler`.
        size: Chip size in pixels.
        stride: Steps in pixels, one number or (rows, columns); default `size`.
        aois: Polygons to cover: an `AOITable`, or anything that `AOITable.of` takes; None = everywhere that the
            dataset has data.
        aois_crs: CRS of `aois` where they do not carry one.
        time: Time of interest; an AOI with a time window of its own has what both have in common.
        min_overlap: Share, 0 to 1, of a chip that must lie in its AOI's polygon; chips with less are left out.
        inset: By how much polygons are shrunk before they are covered, in CRS units.
        outside: What to do with an AOI that has no chip (outside every scene or time, gone after `inset`, no chip of
            `min_overlap`): "raise", or "drop" (logged).
        remainder: See `Remainder`; by default several ranks together see each chip exactly once, and blank ones beside.

    Raises:
        UsageError: a size or stride below 1, a stride above the size (it would leave gaps), or an AOI without a chip of
            `min_overlap`.
        GeometryError: an AOI that is no polygon or lies outside every scene.
    """

    def __init__(
        self,
        dataset: Any,
        size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        aois: Any = None,
        *,
        aois_crs: Any = None,
        time: Any = None,
        min_overlap: float = 0.0,
        inset: float = 0.0,
        outside: Outside = "raise",
        remainder: Remainder = "pad",
    ) -> None:
        self.size = pixel_pair(size)
        self.stride = self.size if stride is None else pixel_pair(stride, "stride")
        if self.stride[0] > self.size[0] or self.stride[1] > self.size[1]:
            raise UsageError(f"A stride of {self.stride} leaves gaps between chips of {self.size}.")
        self.min_overlap = checked_share(min_overlap, "min_overlap")
        super().__init__(
            dataset, coverage_from(dataset, aois, aois_crs, inset=inset, outside=outside), time, outside, 0, remainder
        )
        self.places = _without_earlier_frames(self.places)
        self._corners, self._owners = self._laid()
        if self.min_overlap:
            self._leave_out(outside)

    @property
    def total(self) -> int:
        """Chips in an epoch, of all ranks together."""
        return len(self._corners)

    def _made(self, positions: range) -> list[AOI]:
        return [self._aoi(self._corners[p], int(self._owners[p]), p, self.size) for p in positions]

    def _options(self) -> Fingerprint:
        return {"size": list(self.size), "stride": list(self.stride), "min_overlap": self.min_overlap}

    @property
    def corners(self) -> Floats:
        """Upper left corners (x, y) of all chips, in the CRS of each one's frame `[N, 2]`."""
        return self._corners

    @property
    def frame_of(self) -> Integers:
        """Number of the frame, in `places.frames`, that each chip lies on `[N]`."""
        return self.places.frame[self._owners]

    def _laid(self) -> tuple[Floats, Integers]:
        """Upper left corners `[N, 2]` and places `[N]`, frame by frame."""
        corners, owners = [], []
        for number, frame in enumerate(self.places.frames):
            here = np.flatnonzero(self.places.frame == number)
            if not len(here):
                continue
            (height, width), (down, right) = self.size, self.stride
            xres, yres = frame.res
            grid = ChipGrid(
                origin=frame.origin,
                res=frame.res,
                size=(width * xres, height * yres),
                stride=(right * xres, down * yres),
            )
            laid, owner = lay_grid(self.places.shapes[here], grid)
            corners.append(laid)
            owners.append(here[owner])
        return np.concatenate(corners), np.concatenate(owners)

    def _leave_out(self, outside: Outside) -> None:
        """Chips that overlap their polygon too little, and AOIs that have no other."""
        if self.places.table is None:
            raise UsageError("min_overlap= is the share of a chip in its AOI's polygon; give aois=.")
        whole = self.places.whole
        shapely.prepare(whole)
        found = shares(whole[self._owners], self._corners, self._ground())
        kept = found >= self.min_overlap * (1 - 1e-9)
        bare = np.bincount(self._owners[kept], minlength=len(self.places)) == 0
        if bare.any():
            text = (
                f"have no chip of which {self.min_overlap:g} lies in them (min_overlap); take a smaller size or share"
            )
            places = without(self.places, bare, outside, lambda rows: f"AOIs {rows} {text}", UsageError)
            self._owners = (np.cumsum(~bare) - 1)[self._owners]
            self.places = places
        self._corners, self._owners = self._corners[kept], self._owners[kept]

    def _ground(self) -> Floats:
        """Width and height of each chip in CRS units `[N, 2]`."""
        ground: Floats = self.places.res[self._owners] * (self.size[1], self.size[0])
        return ground

    def _reached(self, frame: int) -> npt.NDArray[np.object_]:
        here = self.places.frame[self._owners] == frame
        (x, y), (width, height) = self._corners[here].T, self._ground()[here].T
        boxes: npt.NDArray[np.object_] = shapely.box(x, y - height, x + width, y)
        return boxes


def _without_earlier_frames(places: AOICoverage) -> AOICoverage:
    """Shapes of each frame without what an earlier one covers; places of which nothing is left are left out."""
    if len(places.frames) == 1:
        return places
    shapes = places.shapes.copy()
    for number in range(1, len(places.frames)):
        here = np.flatnonzero(places.frame == number)
        if not len(here):
            continue
        crs, near = places.frames[number].crs, places.coverages[number].bounds
        earlier = [
            transform_geometries(np.array([places.coverages[k]], dtype=object), places.frames[k].crs, crs, near=near)
            for k in range(number)
        ]
        covered = union_of(polygonal_each(np.concatenate(earlier)))
        shapely.prepare(covered)
        met = here[shapely.intersects(covered, shapes[here])]
        shapes[met] = polygonal_each(shapely.difference(shapes[met], covered))
    pixel = places.res.prod(axis=1)
    # A sliver of less than a pixel is where the edges of two CRSs' scenes are written a little differently.
    left = (shapely.area(shapes) > pixel) | (places.frame == 0) | (shapely.area(shapes) == shapely.area(places.shapes))
    return replace(places, shapes=shapes).kept(left & ~shapely.is_empty(shapes))
