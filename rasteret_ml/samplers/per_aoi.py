"""A chip for each AOI: centred, at random places in it, or all of it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint
from rasteret_ml.geo.regions import TriangleRegion
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, coverage_from, ground_scale
from rasteret_ml.samplers.random import Redraws
from rasteret_ml.samplers.ranks import Remainder, epoch_random, uniforms
from rasteret_ml.samplers.sampler import ChipSampler, Floats, dilated, pixel_pair

__all__ = ["PerAOISampler"]

Integers = npt.NDArray[np.int64]

_NEAR = 1e-6
"""Share of a pixel that counts as nothing."""


class PerAOISampler(ChipSampler):
    """Each AOI once an epoch, or `chips` times; points and lines as well as polygons.

    What is drawn, and the order, is a pure function of (seed, epoch). Of a dataset with several frames
    (`grid="native"`) an AOI's chips lie on the frame that covers most of it, the first one where several do.

    Args:
        dataset: Any TorchGeo dataset, ours or stock, or a combination.
        size: Chip size in pixels, one number or (height, width). None = as large as the AOI's bounding box, out to
            whole pixels: chips of different sizes, which `collate` pads.
        aois: An `AOITable`, or anything that `AOITable.of` takes.
        chips: Chips of each AOI in an epoch.
        placement: "centre": on the AOI's centroid, or on a point in it where the centroid is outside; of an AOI that
            reaches past the scenes, the part in them. "random": the centre anywhere in a polygon or on a line.
        pad: Pixels added on each side where `size` is None.
        shuffle: Whether each epoch has its own order; else the table's.
        seed: Of order and places.
        aois_crs: CRS of `aois` where they do not carry one; default lon/lat.
        time: Time of interest; an AOI with a time window of its own has what both have in common.
        outside: What to do with an AOI outside every scene or time: "raise", or "drop" (logged).
        min_valid: As for `RandomAOISampler`: further draws are random places in the AOI; a point has none.
        max_redraws: As for `RandomAOISampler`.
        remainder: See `Remainder`; default "drop" with `shuffle`, else "pad", so that several ranks together see each
            chip exactly once.

    Raises:
        UsageError: arguments that contradict one another: several chips that would be the same, `pad` beside `size`,
            `min_valid` where there is one place alone.
        GeometryError: an AOI outside every scene.
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
        min_valid: float = 0.0,
        max_redraws: int = 4,
        remainder: Remainder | None = None,
    ) -> None:
        if aois is None:
            raise UsageError("EachAOISampler needs aois=, a table of geometries.")
        self.size = None if size is None else pixel_pair(size)
        self.chips, self.placement, self.pad, self.shuffle = int(chips), placement, int(pad), bool(shuffle)
        self._tries = Redraws.of(min_valid, max_redraws)
        self._check()
        places = _best_frames(coverage_from(dataset, aois, aois_crs, outside=outside, area=False))
        super().__init__(dataset, places, time, outside, seed, remainder or ("drop" if self.shuffle else "pad"))
        flat = shapely.get_dimensions(self.places.shapes) == 0
        if self._tries.count > 1 and flat.all():
            raise UsageError("min_valid= tries other places in an AOI, and a point has none; leave it out.")
        self._movable = ~flat
        self._insides = None
        if self.size is None:
            self._corners, self._sizes = _bounding_chips(self.places, self.pad)
        else:
            self._ground: Floats = self.places.res * (self.size[1], self.size[0])
            self._centres = _middles(self.places.shapes)
            if self.placement == "random" or self._tries.count > 1:
                self._insides = _Insides(self.places.shapes)
        self._order: tuple[tuple[int, int], Integers] | None = None

    def _check(self) -> None:
        if self.placement not in ("centre", "random"):
            raise UsageError(f"placement is 'centre' or 'random', not {self.placement!r}.")
        if self.chips < 1 or self.pad < 0:
            raise UsageError(f"chips is at least 1 and pad at least 0, not {self.chips} and {self.pad}.")
        if self.size is not None and self.pad:
            raise UsageError("pad= widens whole AOIs; a chip of a given size has no padding: leave one of them out.")
        if self.size is None and (self.placement == "random" or self._tries.count > 1):
            raise UsageError("A whole AOI has one place alone: placement='random' and min_valid= need a size.")
        if self.chips > 1 and self.placement == "centre":
            raise UsageError(f"{self.chips} chips in one place would be the same; say placement='random' and a size.")

    @property
    def total(self) -> int:
        """Chips in an epoch, of all ranks together."""
        return len(self.places) * self.chips

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}

    def _options(self) -> Fingerprint:
        tried = f"min_valid={self._tries.min_valid:g} max_redraws={self._tries.count}"
        return {
            "size": None if self.size is None else list(self.size),
            "options": f"chips={self.chips} {self.placement} pad={self.pad} shuffle={self.shuffle} {tried}",
        }

    def _made(self, positions: range) -> list[AOI]:
        numbers = np.arange(positions.start, positions.stop, positions.step)
        owners = (self._drawn_at()[numbers] if self.shuffle else numbers) // self.chips
        if self.size is None:
            return [
                self._aoi(self._corners[place], int(place), position, (int(height), int(width)))
                for position, place, (height, width) in zip(positions, owners, self._sizes[owners], strict=True)
            ]
        made = []
        for position, place, own in zip(positions, owners, self._placed(owners, positions), strict=True):
            spares = tuple((float(x), float(y)) for x, y in own[1:]) if self._movable[place] else ()
            made.append(self._aoi(own[0], int(place), position, self.size, self._tries.min_valid, spares))
        return made

    def _drawn_at(self) -> Integers:
        """The number of the chip at each position: a permutation."""
        key = self.seed, self.epoch
        if self._order is None or self._order[0] != key:
            self._order = key, np.argsort(epoch_random(*key).random(self.total), kind="stable")
        return self._order[1]

    def _placed(self, owners: Integers, positions: range) -> Floats:
        """Upper left corners of chips and their spares `[N, 1 + spares, 2]`."""
        drawn = [] if self.placement == "random" else [self._centres[owners]]
        for attempt in range(len(drawn), self._tries.count):
            assert self._insides is not None
            numbers = uniforms(self.seed, self.epoch, positions, attempt)[:, :3]
            drawn.append(self._insides.points(owners, numbers))
        corners: Floats = np.stack(drawn, axis=1) + (self._ground[owners] / 2 * (-1, 1))[:, None]
        return corners

    def _reached(self, frame: int) -> npt.NDArray[np.object_]:
        here = np.flatnonzero(self.places.frame == frame)
        if self.size is None:
            (x, y), sizes = self._corners[here].T, self._sizes[here] * self.places.res[here][:, ::-1]
            whole: npt.NDArray[np.object_] = shapely.box(x, y - sizes[:, 0], x + sizes[:, 1], y)
            return whole
        if not len(here):
            return np.zeros(0, dtype=object)
        (x, y), (width, height) = self._centres[here].T, self._ground[here].T
        boxes: npt.NDArray[np.object_] = shapely.box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        if self._insides is None:
            return boxes
        return np.concatenate([boxes, dilated(self.places.shapes[here], *self._ground[here[0]])])


class _Insides:
    """Random points in polygons and on lines; of points, themselves."""

    def __init__(self, shapes: npt.NDArray[np.object_]) -> None:
        self._shapes = shapes
        self._areal = shapely.get_dimensions(shapes) == 2
        self._number = np.cumsum(self._areal) - 1
        self._region = TriangleRegion(shapes[self._areal]) if self._areal.any() else None

    def points(self, places: Integers, numbers: Floats) -> Floats:
        """Points `[N, 2]` in shapes by their numbers `[N]`, from uniform numbers `[N, 3]` in [0, 1)."""
        found = np.empty((len(places), 2))
        areal = self._areal[places]
        if areal.any():
            assert self._region is not None
            found[areal] = self._region.points_in(self._number[places[areal]], numbers[areal])
        others = self._shapes[places[~areal]]
        is_line = np.isin(shapely.get_type_id(others), (1, 5))
        points = shapely.point_on_surface(others)
        points[is_line] = shapely.line_interpolate_point(others[is_line], numbers[~areal][is_line, 0], normalized=True)
        found[~areal] = shapely.get_coordinates(points)
        return found


def _middles(shapes: npt.NDArray[np.object_]) -> Floats:
    """Centroids `[N, 2]`, or points on the shapes where these are outside."""
    points = shapely.centroid(shapes)
    off = ~shapely.intersects(shapes, points)
    points[off] = shapely.point_on_surface(shapes[off])
    found: Floats = shapely.get_coordinates(points)
    return found


def _best_frames(places: AOICoverage) -> AOICoverage:
    """Of each AOI, the place in the frame that covers most of it; in the table's order."""
    if len(places.frames) == 1:
        return places
    shapes, dimension = places.shapes, shapely.get_dimensions(places.shapes)
    scale = np.sqrt(ground_scale(places, shapes))
    measure = np.where(dimension == 1, shapely.length(shapes) * scale, shapely.get_num_coordinates(shapes))
    measure = np.where(dimension == 2, shapely.area(shapes) * scale**2, measure)
    # Frames cut the same field a little differently: what differs by less is the same.
    most = np.zeros(len(places.table or ()))
    np.maximum.at(most, places.aoi, measure)
    good = np.flatnonzero(measure >= most[places.aoi] * (1 - 1e-3))
    order = good[np.lexsort((places.frame[good], places.aoi[good]))]
    return places.kept(order[np.unique(places.aoi[order], return_index=True)[1]])


def _bounding_chips(places: AOICoverage, pad: int) -> tuple[Floats, Integers]:
    """Upper left corners `[N, 2]` and sizes (height, width) `[N, 2]` of bounding boxes out to whole pixels."""
    bounds = shapely.bounds(places.whole)
    origin = np.array([frame.origin for frame in places.frames])[places.frame]
    left, right = ((bounds[:, k] - origin[:, 0]) / places.res[:, 0] for k in (0, 2))
    top, bottom = ((origin[:, 1] - bounds[:, k]) / places.res[:, 1] for k in (3, 1))
    column, row = np.floor(left + _NEAR) - pad, np.floor(top + _NEAR) - pad
    stop_column = np.maximum(np.ceil(right - _NEAR) + pad, column + 1 + 2 * pad)
    stop_row = np.maximum(np.ceil(bottom - _NEAR) + pad, row + 1 + 2 * pad)
    corners = np.column_stack([origin[:, 0] + column * places.res[:, 0], origin[:, 1] - row * places.res[:, 1]])
    return corners, np.column_stack([stop_row - row, stop_column - column]).astype(np.int64)
