"""One or more chips for each AOI: centred, at random points in it, or its whole bounding box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint
from rasteret_ml.geo.regions import Floats, Geometries, Integers, TriangleRegion
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, clip_aois
from rasteret_ml.samplers.random import Redraws
from rasteret_ml.samplers.ranks import Remainder, uniforms
from rasteret_ml.samplers.sampler import ChipSampler, chip_boxes, config_from, dilate_shapes, parse_size

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
        self.redraws = config_from(Redraws, min_valid, "min_valid", "min_valid")
        self._check_arguments()
        coverage = _largest_pairs(clip_aois(dataset, aois, aois_crs, outside=outside, polygons_only=False))
        super().__init__(dataset, coverage, time, outside, seed, remainder or ("drop" if self.shuffle else "pad"))
        self.total = len(self.coverage) * self.chips
        is_point = shapely.get_dimensions(self.coverage.shapes) == 0
        if self.redraws.draws > 1 and is_point.all():
            raise UsageError("min_valid= tries other places in an AOI, but points have none; leave it out.")
        self._spares: Integers = np.where(is_point, 0, self.redraws.draws - 1)
        # Each AOI's chip that is not at a random place: its upper left corner and pixels (height, width) `[N, 2]`.
        if self.size is None:
            self._corners, self._sizes = _bounding_chips(self.coverage, self.pad)
            self._chip_sizes: Floats = self.coverage.res * self._sizes[:, ::-1]
        else:
            self._sizes = np.broadcast_to(np.array(self.size, np.int64), (len(self.coverage), 2))
            self._chip_sizes = self.coverage.chip_sizes(self.size)
            self._corners = _centres(self.coverage.shapes) + self._chip_sizes / 2 * (-1, 1)
        self._region = None
        if self.placement == "random" or self.redraws.draws > 1:
            self._region = TriangleRegion(self.coverage.shapes)  # represents a point by itself

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

    def _plan_options(self) -> Fingerprint:
        return {
            "size": None if self.size is None else list(self.size),
            "options": f"chips={self.chips} {self.placement} pad={self.pad} shuffle={self.shuffle} {self.redraws.text}",
        }

    def _draw(self, positions: range) -> list[AOI]:
        chips: Integers = np.arange(positions.start, positions.stop, positions.step, dtype=np.int64)
        if self.shuffle:
            chips = self._once_per_epoch(lambda random: np.argsort(random.random(self.total), kind="stable"))[chips]
        pairs = chips // self.chips
        corners, sizes = self._draw_corners(pairs, positions), self._sizes[pairs].tolist()
        return [
            self._make_aoi(own[: 1 + self._spares[pair]], pair, position, size, self.redraws.min_valid)
            for position, pair, own, size in zip(positions, pairs, corners, sizes, strict=True)
        ]

    def _draw_corners(self, pairs: Integers, positions: range) -> Floats:
        """Upper left corners of chips and their spares `[N, draws, 2]`."""
        corners = [] if self.placement == "random" else [self._corners[pairs]]
        for attempt in range(len(corners), self.redraws.draws):
            numbers = uniforms(self.seed, self.epoch, positions, attempt)[:, :3]
            corners.append(self._random_points(pairs, numbers) + self._chip_sizes[pairs] / 2 * (-1, 1))
        return np.stack(corners, axis=1)

    def _random_points(self, pairs: Integers, numbers: Floats) -> Floats:
        """Points `[N, 2]` in or on shapes, from uniform numbers `[N, 3]` in [0, 1)."""
        assert self._region is not None
        found, shapes = self._region.points_in(pairs, numbers), self.coverage.shapes[pairs]
        on_line = np.isin(shapely.get_type_id(shapes), (1, 5))
        points = shapely.line_interpolate_point(shapes[on_line], numbers[on_line, 0], normalized=True)
        found[on_line] = shapely.get_coordinates(points)
        return found

    def _reach_of(self, pairs: Integers) -> Geometries:
        boxes = chip_boxes(self._corners[pairs], self._chip_sizes[pairs])
        if self._region is not None:
            boxes = np.append(boxes, dilate_shapes(self.coverage.shapes[pairs], *self._chip_sizes[pairs[0]]))
        return boxes


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
