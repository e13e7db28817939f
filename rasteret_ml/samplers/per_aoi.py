"""One or more chips for each AOI: centred, at random points in it, or its whole bounding box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint
from rasteret_ml.geo.regions import TriangleRegion
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, clip_aois
from rasteret_ml.samplers.random import Redraws
from rasteret_ml.samplers.ranks import Remainder, epoch_random, uniforms
from rasteret_ml.samplers.sampler import ChipSampler, Floats, Integers, dilate_shapes, parse_size

Geometries = npt.NDArray[np.object_]

_TOLERANCE = 1e-6  # Share of a pixel that rounding errors may reach.


class PerAOISampler(ChipSampler):
    """Each AOI once per epoch, or `chips` times; points and lines as well as polygons.

    Chips and their order are a pure function of (seed, epoch). If a dataset has several target grids
    (`grid="native"`), an AOI's chips lie on the one that covers most of it, the first of several equal ones.

    Args:
        dataset: Any TorchGeo dataset or combination of datasets.
        size: Chip size in pixels, one number or (height, width). None = the AOI's bounding box, extended to whole
            pixels: chips of different sizes, which `collate` pads.
        aois: An `AOITable`, or anything that `AOITable.of` takes.
        chips: Chips per AOI in an epoch.
        placement: "centre": on the AOI's centroid, or on a point in it if the centroid lies outside; if the AOI
            extends past the scenes, on the part inside them. "random": the centre anywhere in a polygon or on a line.
        pad: Pixels to add on each side if `size` is None.
        shuffle: Whether to shuffle each epoch; else the table's order is used.
        seed: Seed of order and random placement.
        aois_crs: CRS of `aois` if they do not state it; default longitude/latitude.
        time: Time of interest; it is intersected with an AOI's own time window.
        outside: What to do with an AOI outside every scene or time: "raise", or "drop" (logged).
        min_valid: As for `RandomAOISampler`; further draws are random points in the AOI. A point has none.
        remainder: See `Remainder`; default "drop" with `shuffle`, else "pad", so that several ranks together see each
            chip exactly once.

    Raises:
        UsageError: if arguments contradict each other: several identical chips, `pad` together with `size`, or
            `min_valid` if chips have only one possible place.
        GeometryError: if an AOI lies outside every scene.

    Example:
        >>> sampler = PerAOISampler(dataset, 64, "fields.gpkg", placement="random", chips=4, shuffle=True)
    """

    def __init__(
        self,
        dataset: Any,
        size: int | tuple[int, int] | None = None,
        aois: Any = None,
        *,
        chips: int = 1,
        placement: Literal["centre", "random"] = "centre",
        pad: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        aois_crs: Any = None,
        time: Any = None,
        outside: Outside = "raise",
        min_valid: Redraws | Mapping[str, Any] | float = 0.0,
        remainder: Remainder | None = None,
    ) -> None:
        if aois is None:
            raise UsageError("PerAOISampler needs aois=, a table of geometries.")
        self.size = None if size is None else parse_size(size)
        self.chips, self.placement, self.pad, self.shuffle = int(chips), placement, int(pad), bool(shuffle)
        self.redraws = Redraws.of(min_valid)
        self._check_arguments()
        coverage = _largest_pairs(clip_aois(dataset, aois, aois_crs, outside=outside, polygons_only=False))
        super().__init__(dataset, coverage, time, outside, seed, remainder or ("drop" if self.shuffle else "pad"))
        is_point = shapely.get_dimensions(self.coverage.shapes) == 0
        if self.redraws.draws > 1 and is_point.all():
            raise UsageError("min_valid= tries other places in an AOI, but points have none; leave it out.")
        self._spares: Integers = np.where(is_point, 0, self.redraws.draws - 1)
        self._interiors = None
        if self.size is None:
            self._corners, self._sizes = _bounding_chips(self.coverage, self.pad)
        else:
            self._chip_sizes: Floats = self.coverage.res * (self.size[1], self.size[0])
            self._centres = _centres(self.coverage.shapes)
            if self.placement == "random" or self.redraws.draws > 1:
                self._interiors = _RandomPoints(self.coverage.shapes)
        self._order: tuple[tuple[int, int], Integers] | None = None

    def _check_arguments(self) -> None:
        if self.placement not in ("centre", "random"):
            raise UsageError(f"placement must be 'centre' or 'random', got {self.placement!r}.")
        if self.chips < 1:
            raise UsageError(f"chips must be >= 1, got {self.chips}.")
        if self.pad < 0:
            raise UsageError(f"pad must be >= 0, got {self.pad}.")
        if self.size is not None and self.pad:
            raise UsageError("pad= extends whole AOIs and cannot be combined with size=; leave one of them out.")
        if self.size is None and (self.placement == "random" or self.redraws.draws > 1):
            raise UsageError("A chip of a whole AOI has only one place: placement='random' and min_valid= need a size.")
        if self.chips > 1 and self.placement == "centre":
            raise UsageError(f"{self.chips} centred chips would be the same; use placement='random' and a size.")

    @property
    def total(self) -> int:
        """Chips in an epoch, over all ranks."""
        return len(self.coverage) * self.chips

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}

    def _plan_options(self) -> Fingerprint:
        return {
            "size": None if self.size is None else list(self.size),
            "options": f"chips={self.chips} {self.placement} pad={self.pad} shuffle={self.shuffle} {self.redraws.text}",
        }

    def _draw(self, positions: range) -> list[AOI]:
        chips = np.arange(positions.start, positions.stop, positions.step)
        pairs = (self._permutation()[chips] if self.shuffle else chips) // self.chips
        if self.size is None:
            sizes = self._sizes[pairs].tolist()
            return [
                self._make_aoi(self._corners[pair, None], pair, position, (height, width))
                for position, pair, (height, width) in zip(positions, pairs, sizes, strict=True)
            ]
        size, min_valid = self.size, self.redraws.min_valid
        return [
            self._make_aoi(own[: 1 + self._spares[pair]], pair, position, size, min_valid)
            for position, pair, own in zip(positions, pairs, self._draw_corners(pairs, positions), strict=True)
        ]

    def _permutation(self) -> Integers:
        """The chip at each position of the shuffled epoch."""
        key = self.seed, self.epoch
        if self._order is None or self._order[0] != key:
            self._order = key, np.argsort(epoch_random(*key).random(self.total), kind="stable")
        return self._order[1]

    def _draw_corners(self, pairs: Integers, positions: range) -> Floats:
        """Upper left corners of chips and their spares `[N, draws, 2]`."""
        centres = [] if self.placement == "random" else [self._centres[pairs]]
        for attempt in range(len(centres), self.redraws.draws):
            assert self._interiors is not None
            numbers = uniforms(self.seed, self.epoch, positions, attempt)[:, :3]
            centres.append(self._interiors.points(pairs, numbers))
        corners: Floats = np.stack(centres, axis=1) + (self._chip_sizes[pairs] / 2 * (-1, 1))[:, None]
        return corners

    def _reach_on(self, grid: int) -> Geometries:
        here = np.flatnonzero(self.coverage.grid_index == grid)
        if not len(here):
            return np.zeros(0, dtype=object)
        boxes: Geometries
        if self.size is None:
            (x, y), sizes = self._corners[here].T, self._sizes[here] * self.coverage.res[here][:, ::-1]
            boxes = shapely.box(x, y - sizes[:, 0], x + sizes[:, 1], y)
            return boxes
        (x, y), (width, height) = self._centres[here].T, self._chip_sizes[here].T
        boxes = shapely.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if self._interiors is None:
            return boxes
        return np.concatenate([boxes, dilate_shapes(self.coverage.shapes[here], *self._chip_sizes[here[0]])])


class _RandomPoints:
    """Random points in polygons and on lines; points are returned unchanged."""

    def __init__(self, shapes: Geometries) -> None:
        self._shapes = shapes
        self._is_polygon = shapely.get_dimensions(shapes) == 2
        self._number = np.cumsum(self._is_polygon) - 1
        self._region = TriangleRegion(shapes[self._is_polygon]) if self._is_polygon.any() else None

    def points(self, indices: Integers, numbers: Floats) -> Floats:
        """Return points `[N, 2]` in shapes by their indices `[N]`, from uniform numbers `[N, 3]` in [0, 1)."""
        found = np.empty((len(indices), 2))
        in_polygon = self._is_polygon[indices]
        if in_polygon.any():
            assert self._region is not None
            found[in_polygon] = self._region.points_in(self._number[indices[in_polygon]], numbers[in_polygon])
        others = self._shapes[indices[~in_polygon]]
        is_line = np.isin(shapely.get_type_id(others), (1, 5))
        points = shapely.point_on_surface(others)
        distance = numbers[~in_polygon][is_line, 0]
        points[is_line] = shapely.line_interpolate_point(others[is_line], distance, normalized=True)
        found[~in_polygon] = shapely.get_coordinates(points)
        return found


def _centres(shapes: Geometries) -> Floats:
    """Centroids `[N, 2]`, or points on the shapes where these lie outside."""
    points = shapely.centroid(shapes)
    off = ~shapely.intersects(shapes, points)
    points[off] = shapely.point_on_surface(shapes[off])
    found: Floats = shapely.get_coordinates(points)
    return found


def _largest_pairs(coverage: AOICoverage) -> AOICoverage:
    """For each AOI, the pair with the target grid that covers most of it; in the table's order."""
    if len(coverage.target_grids) == 1:
        return coverage
    shapes, dimension = coverage.shapes, shapely.get_dimensions(coverage.shapes)
    scale = np.sqrt(coverage.m2_per_unit(shapes))
    measure = np.where(dimension == 1, shapely.length(shapes) * scale, shapely.get_num_coordinates(shapes))
    measure = np.where(dimension == 2, shapely.area(shapes) * scale**2, measure)
    largest = np.zeros(len(coverage.table or ()))
    np.maximum.at(largest, coverage.aoi_index, measure)
    # Projections change areas slightly: sizes that differ by less than a thousandth count as equal.
    good = np.flatnonzero(measure >= largest[coverage.aoi_index] * (1 - 1e-3))
    order = good[np.lexsort((coverage.grid_index[good], coverage.aoi_index[good]))]
    return coverage.select(order[np.unique(coverage.aoi_index[order], return_index=True)[1]])


def _bounding_chips(coverage: AOICoverage, pad: int) -> tuple[Floats, Integers]:
    """Upper left corners `[N, 2]` and sizes (height, width) `[N, 2]` of bounding boxes, extended to whole pixels."""
    origin = np.array([grid.origin for grid in coverage.target_grids])[coverage.grid_index]
    xmin, ymin, xmax, ymax = shapely.bounds(coverage.full_shapes).T
    xres, yres = coverage.res.T
    left, right = (xmin - origin[:, 0]) / xres, (xmax - origin[:, 0]) / xres
    top, bottom = (origin[:, 1] - ymax) / yres, (origin[:, 1] - ymin) / yres
    column, row = np.floor(left + _TOLERANCE) - pad, np.floor(top + _TOLERANCE) - pad
    stop_column = np.maximum(np.ceil(right - _TOLERANCE) + pad, column + 1 + 2 * pad)
    stop_row = np.maximum(np.ceil(bottom - _TOLERANCE) + pad, row + 1 + 2 * pad)
    corners = np.column_stack([origin[:, 0] + column * xres, origin[:, 1] - row * yres])
    return corners, np.column_stack([stop_row - row, stop_column - column]).astype(np.int64)
