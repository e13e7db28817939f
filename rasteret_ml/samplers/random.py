"""Random chips: uniform over an area, or by weight or class. Each position is a pure function of seed and epoch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint, digest
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.regions import Floats, Geometries, Integers, TriangleRegion, clip_polygons, erode_each
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Balance, Outside, Weight, clip_aois, sampling_weights
from rasteret_ml.samplers.locality import GridTileLookup, Locality, local_order
from rasteret_ml.samplers.ranks import Remainder, uniforms
from rasteret_ml.samplers.sampler import ChipSampler, chip_boxes, config_from, dilate_shapes, parse_size

Placement = Literal["centre", "inside"]  #: What must lie in the polygon: the chip's centre, or the whole chip.

_log = logging.getLogger(__name__)
_OVERLAP_ATTEMPTS = 32  # Points to try for a chip with a minimum overlap.


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipPlacement:
    """Where random chips may lie in their polygon."""

    #: "centre": the chip's centre lies in the polygon (and, if the polygon leaves room, the chip in the scenes).
    #: "inside": the whole chip lies in the polygon. None = "inside" without AOIs, else "centre".
    mode: Placement | None = None
    #: Minimum distance of the centre (mode "inside": of the chip) from the polygon's edge, in CRS units.
    inset: float = 0.0
    #: Share, 0 to 1, of a chip that must lie in its AOI's polygon. Up to 32 points in the polygon are tried, and if
    #: none suffices, the best one is taken.
    min_overlap: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in (None, "centre", "inside"):
            raise UsageError(f"placement must be 'centre' or 'inside', got {self.mode!r}.")
        parse_share(self.min_overlap, "min_overlap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraws:
    """When to replace a chip by another one from the same AOI."""

    min_valid: float = 0.0  #: Share of valid pixels, 0 to 1, below which a chip is replaced; 0 = never.
    max_redraws: int = 3  #: Maximum number of further chips to read for a position, until one has enough valid pixels.

    def __post_init__(self) -> None:
        parse_share(self.min_valid, "min_valid")
        count = self.max_redraws
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise UsageError(f"max_redraws must be an integer >= 1, got {count!r}.")

    @property
    def draws(self) -> int:
        """Chips to draw for a position, the first one included."""
        return 1 + int(self.max_redraws) if self.min_valid else 1

    @property
    def text(self) -> str:
        """The settings for a sampler's plan."""
        return f"min_valid={self.min_valid:g} draws={self.draws}"


class RandomAOISampler(ChipSampler):
    """Random chips, uniform over the area where they may lie, or by weight or class.

    The chip at a position is a pure function of (seed, epoch, position). `rasteret_ml.DataLoader` counts epochs
    itself; with torch's DataLoader, call `set_epoch` before each one, or all epochs are the same. If a dataset has
    several target grids (`grid="native"`), each chip lies on one of them and states its CRS as `aoi.crs`; grids are
    drawn by their area in square metres, and areas where they overlap count for each of them.

    Args:
        dataset: Any TorchGeo dataset or combination of datasets.
        size: Chip size in pixels, one number or (height, width).
        length: Chips in an epoch.
        aois: Polygons to draw from: an `AOITable`, or anything that `AOITable.of` takes. None = everything that the
            dataset covers.
        seed: Seed of the order.
        placement: "centre" or "inside", a `ChipPlacement`, or a mapping of its fields, such as
            `{"mode": "inside", "inset": 30}`. Default "inside" without `aois`, else "centre".
        aois_crs: CRS of `aois` if they do not state it; default longitude/latitude.
        time: Time of interest: (start, end), an ISO interval or a pandas Interval; default all times. It is intersected
            with an AOI's own time window.
        locality: None = the order in which chips are drawn. A `Locality`, its number of blocks, or a mapping of its
            fields = the same chips in an order in which neighbours follow each other closely, so that they share
            decoded tiles; an epoch's whole order is computed at its first chip.
        weight: Relative frequency of each AOI: a column, numbers `[N]`, or a callable that returns them for the table's
            rows (a GeoDataFrame). Default the table's own weights, else the area where centres may lie. Draws within
            an AOI are uniform.
        balance: Classes to draw equally often, within each by weight or area: True = the table's labels, a column, or
            values `[N]`.
        outside: What to do with an AOI that no chip can be drawn from (outside every scene or time, too small for
            `size` or `placement`): "raise", or "drop" (logged).
        min_valid: Share, 0 to 1, of valid pixels that a chip should have; a `Redraws`, or a mapping of its fields, also
            sets the number of attempts. AOIs carry further draws from the same polygon, `aoi.spares`, which
            `RasteretDataset` reads if a chip has fewer valid pixels.
        remainder: See `Remainder`; by default the last chips are left out if the ranks do not divide an epoch.

    Raises:
        UsageError: if size, length or locality is below 1, or no chip fits in a polygon as `placement` requires.
        GeometryError: if an AOI is not a polygon, or lies outside every scene.

    Example:
        >>> sampler = RandomAOISampler(dataset, size=256, length=1000, aois="fields.gpkg", min_valid=0.9)
        >>> loader = DataLoader(dataset, batch_size=16, sampler=sampler)
    """

    def __init__(
        self,
        dataset: Any,
        size: int | tuple[int, int],
        length: int,
        aois: Any = None,
        *,
        seed: int = 0,
        placement: ChipPlacement | Mapping[str, Any] | Placement | None = None,
        aois_crs: Any = None,
        time: Any = None,
        locality: Locality | Mapping[str, int] | int | None = None,
        weight: Weight | None = None,
        balance: Balance | None = None,
        outside: Outside = "raise",
        min_valid: Redraws | Mapping[str, Any] | float = 0.0,
        remainder: Remainder = "drop",
    ) -> None:
        self.locality = None if locality is None else config_from(Locality, locality, "locality", "blocks")
        self.size = parse_size(size)
        if int(length) != length or length < 1:
            raise UsageError(f"length must be an integer >= 1, got {length}.")
        self.length = self.total = int(length)
        place = config_from(ChipPlacement, placement, "placement", "mode")
        self.placement = replace(place, mode=place.mode or ("inside" if aois is None else "centre"))
        self.redraws = config_from(Redraws, min_valid, "min_valid", "min_valid")
        coverage = clip_aois(dataset, aois, aois_crs, inset=place.inset, outside=outside)
        super().__init__(dataset, coverage, time, outside, seed, remainder)
        if place.min_overlap:
            self.coverage = _drop_small(self.coverage, self.size, place.min_overlap, outside)
            shapely.prepare(self.coverage.full_shapes)
        self.coverage, self._regions = _centre_regions(self.coverage, self.size, self.placement.mode, outside)
        self._weights = sampling_weights(self.coverage, self._regions, weight, balance)
        self._region = TriangleRegion(self._regions, self._weights)
        self._chip_sizes = self.coverage.chip_sizes(self.size)
        self._tiles = None
        if self.locality is not None:
            self._tiles = GridTileLookup(dataset, self.coverage.target_grids, self.size, self._time)

    def _plan_options(self) -> Fingerprint:
        local = self.locality
        return {
            "size": list(self.size),
            "locality": local and f"{local.blocks}x{local.tiles}x{local.lanes}/{local.batch_size}",
            "options": f"{self.placement.mode} min_overlap={self.placement.min_overlap:g} {self.redraws.text}",
            "weights": digest(self._weights),
        }

    def _draw(self, positions: range) -> list[AOI]:
        if self._tiles is None:
            corners, pairs = self._draw_chips(positions)
        else:
            selection = slice(positions.start, positions.stop, positions.step)
            corners, pairs = (chips[selection] for chips in self._once_per_epoch(self._draw_local))
        return [
            self._make_aoi(own, pair, position, self.size, self.redraws.min_valid)
            for position, own, pair in zip(positions, corners, pairs, strict=True)
        ]

    def _draw_chips(self, positions: range) -> tuple[Floats, Integers]:
        """Upper left corners, spares included, `[count, draws, 2]` and pairs of grid and AOI `[count]`, as drawn."""
        points, pairs = self._region.points(uniforms(self.seed, self.epoch, positions)[:, :3])
        centres = [self._improve_overlap(points, pairs, positions, 0)]
        for draw in range(1, self.redraws.draws):
            points = self._redraw(pairs, positions, draw * _OVERLAP_ATTEMPTS)
            centres.append(self._improve_overlap(points, pairs, positions, draw))
        to_corner = self._chip_sizes[pairs] / 2 * (-1, 1)
        return np.stack(centres, axis=1) + to_corner[:, None], pairs

    def _redraw(self, pairs: Integers, positions: range, attempt: int) -> Floats:
        """Further points `[count, 2]` in the same regions."""
        return self._region.points_in(pairs, uniforms(self.seed, self.epoch, positions, attempt)[:, :3])

    def _improve_overlap(self, points: Floats, pairs: Integers, positions: range, draw: int) -> Floats:
        """Replace centres of chips that overlap their polygon too little by better ones in the same region."""
        min_overlap = self.placement.min_overlap
        if not min_overlap:
            return points
        best, best_overlap = points.copy(), self._overlaps(points, pairs)
        for attempt in range(1, _OVERLAP_ATTEMPTS):
            short = np.flatnonzero(best_overlap < min_overlap)
            if not len(short):
                break
            points = self._redraw(pairs, positions, draw * _OVERLAP_ATTEMPTS + attempt)[short]
            overlap = self._overlaps(points, pairs[short])
            better = overlap > best_overlap[short]
            best[short[better]], best_overlap[short[better]] = points[better], overlap[better]
        return best

    def _overlaps(self, centres: Floats, pairs: Integers) -> Floats:
        sizes = self._chip_sizes[pairs]
        return overlaps(self.coverage.full_shapes[pairs], centres + sizes / 2 * (-1, 1), sizes)

    def _draw_local(self, random: np.random.Generator) -> tuple[Floats, Integers]:
        """As `_draw_chips`, all chips of an epoch in the local order."""
        assert self._tiles is not None
        assert self.locality is not None
        corners, pairs = self._draw_chips(range(self.length))
        tiles = self._tiles.locate(corners[:, 0], self.coverage.grid_index[pairs])
        permutation = local_order(tiles, self.locality, random)
        return corners[permutation], pairs[permutation]

    def _reach_of(self, pairs: Integers) -> Geometries:
        return dilate_shapes(self._regions[pairs], *self._chip_sizes[pairs[0]])


def parse_share(value: float, argument: str) -> float:
    """Return a share as a float; raises UsageError unless it is between 0 and 1."""
    if isinstance(value, (str, bool)) or not 0 <= value <= 1:
        raise UsageError(f"{argument} must be between 0 and 1, got {value!r}.")
    return float(value)


def overlaps(polygons: Geometries, corners: Floats, sizes: Floats) -> Floats:
    """Return the share, 0 to 1, of each chip that lies in its valid polygon `[N]`.

    Chips are given by their upper left corners (x, y) `[N, 2]`, and widths and heights `[N, 2]` in the same units.
    """
    boxes = chip_boxes(corners, sizes)
    found: Floats = shapely.covers(polygons, boxes).astype(np.float64)
    partly = (found == 0) & shapely.intersects(polygons, boxes)
    area = shapely.area(shapely.intersection(polygons[partly], boxes[partly]))
    found[partly] = area / sizes[partly].prod(axis=1)
    return found


def max_overlaps(polygons: Geometries, sizes: Floats) -> Floats:
    """Return an upper bound, from area and bounding box, of `overlaps` for chips of a size `[N, 2]` anywhere `[N]`."""
    bounds = shapely.bounds(polygons)
    box = np.minimum(bounds[:, 2:] - bounds[:, :2], sizes).prod(axis=1)
    found: Floats = np.minimum(shapely.area(polygons), box) / sizes.prod(axis=1)
    return found


def _drop_small(coverage: AOICoverage, size: tuple[int, int], share: float, outside: Outside) -> AOICoverage:
    """Drop the AOIs whose polygon is too small for the minimum overlap."""
    if coverage.table is None:
        raise UsageError("min_overlap= is the share of a chip in its AOI's polygon; pass aois=.")
    small = max_overlaps(coverage.full_shapes, coverage.chip_sizes(size)) < share * (1 - 1e-9)
    pixels = f"{size[0]} x {size[1]} pixels"
    reason = f"No chip of {pixels} can overlap %s by {share:g} (min_overlap); use a smaller size or min_overlap"
    return coverage.drop(small, outside, reason, UsageError)


def _centre_regions(
    coverage: AOICoverage, size: tuple[int, int], mode: Placement | None, outside: Outside
) -> tuple[AOICoverage, Geometries]:
    """The pairs that chips fit in, and the region where a chip's centre may lie in each."""
    regions = coverage.shapes.copy()
    for number, grid, here in coverage.by_grid():
        width, height = size[1] * grid.res[0], size[0] * grid.res[1]
        shapes = coverage.shapes[here]
        if mode == "inside":
            regions[here] = _erode(shapes, width, height)
        else:
            extent = _erode(object_array([coverage.extents[number]]), width, height)[0]
            within = clip_polygons(shapes, extent)
            regions[here] = np.where(shapely.area(within) > 0, within, shapes)
    small = shapely.is_empty(regions)
    pixels = f"{size[0]} x {size[1]} pixels"
    if coverage.table is None and small.any() and not small.all():
        crss = [coverage.target_grids[number].crs for number in np.flatnonzero(small)]
        _log.warning("No chip of %s fits in the scenes in %s.", pixels, crss)
    reason = f"No chip of {pixels} fits in %s; use a smaller size, or placement='centre'"
    return coverage.drop(small, outside, reason, UsageError), regions[~small]


def _erode(shapes: Geometries, width: float, height: float) -> Geometries:
    """Where a chip's centre may lie; in a shape exactly as large as the chip, a region a millionth of a chip wide."""
    eroded = erode_each(shapes, width, height)
    tight = shapely.is_empty(eroded)
    if tight.any():
        eroded[tight] = erode_each(shapes[tight], width * (1 - 1e-6), height * (1 - 1e-6))
    return eroded
