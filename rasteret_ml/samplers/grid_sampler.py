"""Grids of chips that cover every pixel of a polygon, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint
from rasteret_ml.geo.crs import transform_geometries
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.regions import Floats, Geometries, Integers, Mask, boxes_of, polygonal_each, union_polygons
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, clip_aois
from rasteret_ml.samplers.random import overlaps, parse_share
from rasteret_ml.samplers.ranks import Remainder
from rasteret_ml.samplers.sampler import ChipSampler, chip_boxes, parse_size

Pair = tuple[float, float]

_CHUNK = 1 << 18  # Chips to test at a time.
_TOLERANCE = 1e-6  # Share of a pixel, or of a stride, that rounding errors may reach.


def grid_chips(shapes: Geometries, origin: Pair, res: Pair, size: Pair, stride: Pair) -> tuple[Floats, Integers]:
    """Return the chips that intersect the interior of valid polygons `[N]`: polygon by polygon, and row by row.

    `origin` (x, y) is a corner of a pixel; pixel size, size and stride of chips are (x, y) in CRS units. Chips are
    given by upper left corners (x, y) `[M, 2]` and the index of each one's polygon `[M]`.
    """
    xmin, ymin, xmax, ymax = shapely.bounds(shapes).T
    (x0, y0), (xres, yres), (width, height), (right, down) = origin, res, size, stride
    left = x0 + _floor((xmin - x0) / xres) * xres
    top = y0 - _floor((y0 - ymax) / yres) * yres
    steps = np.array([(top - ymin - height) / down, (xmax - left - width) / right])
    counts = np.maximum(1, np.ceil(steps - _TOLERANCE).astype(np.int64) + 1)
    owner, row, column = (
        np.concatenate(part) for part in zip(*_intersecting(shapes, left, top, counts, size, stride), strict=True)
    )
    # Polygons thinner than the tolerance, along the edge of a pixel, get a chip too.
    missing = np.setdiff1d(np.arange(len(shapes)), owner)
    zeros = np.zeros(len(missing), np.int64)
    owner, row, column = np.append(owner, missing), np.append(row, zeros), np.append(column, zeros)
    # A chip may intersect several parts of a polygon: keep it once.
    number = (owner * (row.max() + 1) + row) * (column.max() + 1) + column
    first = np.unique(number, return_index=True)[1]
    owner, row, column = owner[first], row[first], column[first]
    return np.column_stack([left[owner] + column * right, top[owner] - row * down]), owner


def _intersecting(
    shapes: Geometries, left: Floats, top: Floats, counts: Integers, size: Pair, stride: Pair
) -> Iterator[tuple[Integers, Integers, Integers]]:
    """Polygon, row and column of the chips that intersect each polygon, part after part."""
    parts, owner = shapely.get_parts(shapes, return_index=True)
    boxes, is_box = boxes_of(parts)
    shapely.prepare(parts[~is_box])
    (width, height), (right, down) = size, stride
    last_row, last_column = counts[:, owner] - 1
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
        found = np.all(chips[:, :2] < boxes[part, 2:], axis=1) & np.all(chips[:, 2:] > boxes[part, :2], axis=1)
        to_test = np.flatnonzero(found & ~is_box[part])
        found[to_test] = _interiors_intersect(parts[part[to_test]], shapely.box(*chips[to_test].T))
        yield owner[part[found]], row[found], column[found]


def _interiors_intersect(parts: Geometries, chips: Geometries) -> Mask:
    """Whether interiors have points in common; the cheapest predicates come first."""
    found: Mask = shapely.intersects(parts, chips)
    index = np.flatnonzero(found)
    index = index[~shapely.contains_properly(parts[index], chips[index])]
    found[index] = ~shapely.touches(parts[index], chips[index])
    return found


def _floor(values: Floats) -> Floats:
    nearest = np.round(values)
    floored: Floats = np.where(np.abs(values - nearest) < _TOLERANCE, nearest, np.floor(values))
    return floored


class GridAOISampler(ChipSampler):
    """A regular grid of chips over each polygon: every pixel in at least one, row by row.

    Chips lie on the dataset's pixels. Those at the right and lower edges may extend past the polygon and the scenes:
    their size is exact, and pixels outside are invalid. With a stride equal to the size, each pixel of a polygon is in
    exactly one of its chips. If a dataset has several target grids (`grid="native"`), each grid's chips cover what no
    earlier grid does.

    Args:
        dataset: Any TorchGeo dataset or combination of datasets.
        size: Chip size in pixels, one number or (height, width).
        stride: Steps in pixels, one number or (rows, columns); default `size`.
        aois: Polygons to cover: an `AOITable`, or anything that `AOITable.of` takes; None = everything that the
            dataset covers.
        aois_crs: CRS of `aois` if they do not state it; default longitude/latitude.
        time: Time of interest; it is intersected with an AOI's own time window.
        min_overlap: Share, 0 to 1, of a chip that must lie in its AOI's polygon; chips with less are left out.
        inset: Distance by which to shrink polygons before they are covered, in CRS units.
        outside: What to do with an AOI that has no chip (outside every scene or time, gone after `inset`, no chip of
            `min_overlap`): "raise", or "drop" (logged).
        remainder: See `Remainder`; by default several ranks together see each chip exactly once, and blank chips pad
            their number.

    Raises:
        UsageError: if a size or stride is below 1, a stride is larger than the size (it would leave gaps), or an AOI
            has no chip of `min_overlap`.
        GeometryError: if an AOI is not a polygon, or lies outside every scene.

    Example:
        >>> sampler = GridAOISampler(dataset, size=256, stride=192, aois="study_area.geojson")
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
        self.size = parse_size(size)
        self.stride = self.size if stride is None else parse_size(stride, "stride")
        if self.stride[0] > self.size[0] or self.stride[1] > self.size[1]:
            raise UsageError(
                f"stride must be <= size {self.size}, got {self.stride}: it would leave gaps between chips."
            )
        self.min_overlap = parse_share(min_overlap, "min_overlap")
        coverage = clip_aois(dataset, aois, aois_crs, inset=inset, outside=outside)
        super().__init__(dataset, coverage, time, outside, 0, remainder)
        self.coverage = _without_earlier_grids(self.coverage)
        #: Upper left corners (x, y) of all chips, in the CRS of each one's target grid `[N, 2]`.
        self.corners: Floats
        self.corners, self._pairs = self._grid_chips()
        if self.min_overlap:
            self._drop_small_overlaps(outside)
        self.total = len(self.corners)

    @property
    def grid_index(self) -> Integers:
        """Index into `coverage.target_grids` of each chip `[N]`."""
        return self.coverage.grid_index[self._pairs]

    def _draw(self, positions: range) -> list[AOI]:
        return [self._make_aoi(self.corners[p, None], self._pairs[p], p, self.size) for p in positions]

    def _plan_options(self) -> Fingerprint:
        return {"size": list(self.size), "stride": list(self.stride), "min_overlap": self.min_overlap}

    def _grid_chips(self) -> tuple[Floats, Integers]:
        """Upper left corners `[N, 2]` and pairs of grid and AOI `[N]`, grid by grid."""
        (height, width), (down, right) = self.size, self.stride
        corners, pairs = [], []
        for _, target, here in self.coverage.by_grid():
            xres, yres = target.res
            size, stride = (width * xres, height * yres), (right * xres, down * yres)
            found, owner = grid_chips(self.coverage.shapes[here], target.origin, target.res, size, stride)
            corners.append(found)
            pairs.append(here[owner])
        return np.concatenate(corners), np.concatenate(pairs)

    def _drop_small_overlaps(self, outside: Outside) -> None:
        """Drop chips that overlap their polygon too little, and AOIs without any other chip."""
        coverage = self.coverage
        if coverage.table is None:
            raise UsageError("min_overlap= is the share of a chip in its AOI's polygon; pass aois=.")
        shapely.prepare(coverage.full_shapes)
        sizes = coverage.chip_sizes(self.size)[self._pairs]
        share = overlaps(coverage.full_shapes[self._pairs], self.corners, sizes)
        kept = share >= self.min_overlap * (1 - 1e-9)
        without_chips = np.bincount(self._pairs[kept], minlength=len(coverage)) == 0
        text = f"%s have no chip that overlaps them by {self.min_overlap:g} (min_overlap); use a smaller size or share"
        self.coverage = coverage.drop(without_chips, outside, text, UsageError)
        self.corners, self._pairs = self.corners[kept], (np.cumsum(~without_chips) - 1)[self._pairs[kept]]

    def _reach_of(self, pairs: Integers) -> Geometries:
        here = np.isin(self._pairs, pairs)
        return chip_boxes(self.corners[here], self.coverage.chip_sizes(self.size)[self._pairs[here]])


def _without_earlier_grids(coverage: AOICoverage) -> AOICoverage:
    """Remove from each grid's shapes what earlier grids cover; drop pairs of which nothing is left."""
    if len(coverage.target_grids) == 1:
        return coverage
    shapes = coverage.shapes.copy()
    for number, target, here in coverage.by_grid():
        if number == 0:
            continue
        near = coverage.extents[number].bounds
        earlier = [
            transform_geometries(object_array([extent]), grid.crs, target.crs, near=near)
            for grid, extent in zip(coverage.target_grids[:number], coverage.extents[:number], strict=True)
        ]
        covered = union_polygons(polygonal_each(np.concatenate(earlier)))
        shapely.prepare(covered)
        overlapping = here[shapely.intersects(covered, shapes[here])]
        shapes[overlapping] = polygonal_each(shapely.difference(shapes[overlapping], covered))
    # Less than a pixel is a sliver: two CRSs round the same edge of a scene differently.
    area = shapely.area(shapes)
    kept = (area > coverage.res.prod(axis=1)) | (coverage.grid_index == 0) | (area == shapely.area(coverage.shapes))
    return replace(coverage, shapes=shapes).select(kept & ~shapely.is_empty(shapes))
