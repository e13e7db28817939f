"""Random chips: uniform over an area, or by weight or class, each position a pure function."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.fingerprint import Fingerprint, digest
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.regions import TriangleRegion, clipped, erode_each
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, coverage_from, without
from rasteret_ml.samplers.aoi.weights import Balance, Weight, place_weights
from rasteret_ml.samplers.cells import GridLattice, largest_shares, shares
from rasteret_ml.samplers.locality import Locality, local_order
from rasteret_ml.samplers.ranks import Remainder, epoch_random, uniforms
from rasteret_ml.samplers.sampler import ChipSampler, Floats, dilated, pixel_pair

__all__ = ["Placement", "RandomAOISampler", "Redraws", "checked_share"]

Placement = Literal["centre", "inside"]
"""Where a chip lies in its polygon: its centre in it, or all of it."""

Integers = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)
_OVERLAP_TRIES = 32
"""Places looked at for a chip that is to overlap its polygon."""


class RandomAOISampler(ChipSampler):
    """Random chips, uniform over the area they may lie in, or by weight or class.

    The chip at a position is a pure function of (seed, epoch, position). `rasteret_ml.DataLoader` counts epochs by
    itself; with torch's own, call `set_epoch` before each, or every epoch is the same. Of a dataset with several
    frames (`grid="native"`) a chip lies on one of them, its CRS said in `aoi.crs`; frames are drawn from by their area
    on the ground, and where they overlap each counts.

    Args:
        dataset: Any TorchGeo dataset, ours or stock, or a combination.
        size: Chip size in pixels, one number or (height, width).
        length: Chips in an epoch.
        aois: Polygons to draw from: an `AOITable`, or anything that `AOITable.of` takes. None = everywhere that the
            dataset has data.
        seed: Of the order.
        placement: "centre": the chip's centre lies in the polygon (and, where the polygon leaves room, the chip
            in the scenes). "inside": the whole chip lies in it. Default "inside" without `aois`, else "centre".
        aois_crs: CRS of `aois` where they do not carry one; default lon/lat.
        time: Time of interest: (start, end), an ISO interval or a pandas Interval; default all. An AOI with a time
            window of its own has what both have in common.
        locality: None = the order in which chips are drawn. A `Locality`, or its number of blocks = the same chips
            in an order in which neighbours come soon after one another, so that a cache of decoded tiles serves
            them; `batch_diversity` measures what it costs. An epoch's order is then made as a whole, at its first chip.
        weight: How often each AOI is drawn, in proportion: a column, numbers `[N]`, or a callable that makes them of
            the table's rows (a GeoDataFrame). Default the table's own weights, else the area that centres may lie in.
            Within an AOI draws are uniform.
        balance: Classes that are drawn equally often, within each by weight or area: True = the table's labels; or a
            column, or values `[N]`.
        min_overlap: Share, 0 to 1, of a chip that lies in its AOI's polygon. At most 32 places in the polygon are
            tried; where none will do, the best one is taken.
        inset: Distance from the polygon's edge, in CRS units, that centres (placement "inside": chips) keep.
        outside: What to do with an AOI that no chip can come from (outside every scene or time, too small for `size`,
            `inset` or `min_overlap`): "raise", or "drop" (logged).
        min_valid: Share, 0 to 1, of valid pixels that a chip should have. The AOIs carry further draws from the same
            polygon, `aoi.spares`, which `RasteretDataset` reads where a chip has too few.
        max_redraws: Chips looked at for a position at most, for `min_valid`.
        remainder: See `Remainder`; by default several ranks leave out the last chips, fewer than there are ranks.

    Raises:
        UsageError: a size, length or locality below 1, or (inside, min_overlap) a polygon that no chip fits in.
        GeometryError: an AOI that is no polygon or lies outside every scene.
    """

    def __init__(
        self,
        dataset: Any,
        size: int | tuple[int, int],
        length: int,
        aois: Any = None,
        *,
        seed: int = 0,
        placement: Placement | None = None,
        aois_crs: Any = None,
        time: Any = None,
        locality: Locality | int | None = None,
        weight: Weight | None = None,
        balance: Balance | None = None,
        min_overlap: float = 0.0,
        inset: float = 0.0,
        outside: Outside = "raise",
        min_valid: float = 0.0,
        max_redraws: int = 4,
        remainder: Remainder = "drop",
    ) -> None:
        self.locality = Locality.of(locality)
        self.size = pixel_pair(size)
        if int(length) != length or length < 1:
            raise UsageError(f"length is the number of chips in an epoch, at least 1, not {length}.")
        if placement not in (None, "centre", "inside"):
            raise UsageError(f"placement is 'centre' or 'inside', not {placement!r}.")
        self.length = int(length)
        self.placement: Placement = placement or ("inside" if aois is None else "centre")
        self._tries = Redraws.of(min_valid, max_redraws)
        self.min_overlap = checked_share(min_overlap, "min_overlap")
        super().__init__(
            dataset,
            coverage_from(dataset, aois, aois_crs, inset=inset, outside=outside),
            time,
            outside,
            seed,
            remainder,
        )
        if self.min_overlap:
            self.places = _large_enough(self.places, self.size, self.min_overlap, outside)
            shapely.prepare(self.places.whole)
        self.places, self._regions = _centres(self.places, self.size, self.placement, outside)
        self._weights = place_weights(self.places, self._regions, weight, balance)
        self._region = TriangleRegion(self._regions, self._weights)
        self._ground: Floats = self.places.res * (self.size[1], self.size[0])
        self._lattice = (
            None if self.locality is None else GridLattice(dataset, self.places.frames, self.size, self._windows.time)
        )
        self._ordered: _Ordered | None = None

    @property
    def total(self) -> int:
        """Chips in an epoch, of all ranks together."""
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ordered": None}

    def _options(self) -> Fingerprint:
        tried = f"min_valid={self._tries.min_valid:g} max_redraws={self._tries.count}"
        local = self.locality
        served = None if local is None else f"{local.blocks}x{local.tiles}x{local.lanes}/{local.batch_size}"
        return {
            "size": list(self.size),
            "locality": served,
            "options": f"{self.placement} min_overlap={self.min_overlap:g} {tried}",
            "weights": digest(self._weights),
        }

    def _made(self, positions: range) -> list[AOI]:
        corners, owners = self._drawn(positions) if self._lattice is None else self._served(positions)
        share = self._tries.min_valid
        return [
            self._aoi(own[0], int(place), position, self.size, share, tuple((float(x), float(y)) for x, y in own[1:]))
            for position, own, place in zip(positions, corners, owners, strict=True)
        ]

    def _drawn(self, positions: range) -> tuple[Floats, Integers]:
        """Upper left corners `[count, 1 + spares, 2]` and places `[count]` as drawn."""
        points, owners = self._region.points(uniforms(self.seed, self.epoch, positions)[:, :3])
        drawn = [self._overlapping(points, owners, positions, 0)]
        for spare in range(1, self._tries.count):
            points = self._redrawn(owners, positions, spare * _OVERLAP_TRIES)
            drawn.append(self._overlapping(points, owners, positions, spare))
        half = self._ground[owners] / 2 * (-1, 1)
        return np.stack(drawn, axis=1) + half[:, None], owners

    def _redrawn(self, owners: Integers, positions: range, attempt: int) -> Floats:
        """Further points `[count, 2]` in the same places."""
        return self._region.points_in(owners, uniforms(self.seed, self.epoch, positions, attempt)[:, :3])

    def _overlapping(self, points: Floats, owners: Integers, positions: range, spare: int) -> Floats:
        """The centres, those of chips that overlap too little replaced by better ones in the same place."""
        if not self.min_overlap:
            return points
        best, found = points.copy(), self._shares(points, owners)
        for attempt in range(1, _OVERLAP_TRIES):
            short = np.flatnonzero(found < self.min_overlap)
            if not len(short):
                break
            points = self._redrawn(owners, positions, spare * _OVERLAP_TRIES + attempt)[short]
            share = self._shares(points, owners[short])
            better = share > found[short]
            best[short[better]], found[short[better]] = points[better], share[better]
        return best

    def _shares(self, points: Floats, owners: Integers) -> Floats:
        ground = self._ground[owners]
        return shares(self.places.whole[owners], points + ground / 2 * (-1, 1), ground)

    def _served(self, positions: range) -> tuple[Floats, Integers]:
        """The same in the local order, which is made once an epoch."""
        ordered = self._ordered
        if ordered is None or ordered.key != (self.seed, self.epoch):
            assert self._lattice is not None
            assert self.locality is not None
            key = self.seed, self.epoch
            corners, owners = self._drawn(range(self.length))
            cells = self._lattice.cells(corners[:, 0], self.places.frame[owners])
            order = local_order(cells, self.locality, epoch_random(*key))
            ordered = self._ordered = _Ordered(key=key, corners=corners[order], owners=owners[order])
        part = slice(positions.start, positions.stop, positions.step)
        return ordered.corners[part], ordered.owners[part]

    def _reached(self, frame: int) -> npt.NDArray[np.object_]:
        here = np.flatnonzero(self.places.frame == frame)
        if not len(here):
            return np.zeros(0, dtype=object)
        width, height = self._ground[here[0]]
        return dilated(self._regions[here], width, height)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraws:
    """What makes a chip good enough, and how often another is tried."""

    min_valid: float
    """Share of valid pixels, 0 to 1."""
    count: int
    """Chips looked at for a position, at least 1: 1 where nothing is asked of them."""

    @classmethod
    def of(cls, min_valid: float, max_redraws: int) -> Redraws:
        """Checked.

        Raises:
            UsageError: a share that is none, or no try.
        """
        if isinstance(max_redraws, bool) or not isinstance(max_redraws, (int, np.integer)) or max_redraws < 1:
            raise UsageError(f"tries is a whole number of at least 1, not {max_redraws!r}.")
        share = checked_share(min_valid, "min_valid")
        return cls(min_valid=share, count=int(max_redraws) if share else 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ordered:
    """An epoch's chips in the order they are served in."""

    key: tuple[int, int]
    """Seed and epoch."""
    corners: Floats
    """Upper left corners, the chip's and its spares' `[N, 1 + spares, 2]`."""
    owners: Integers
    """Places that they were drawn from `[N]`."""


def checked_share(value: float, what: str) -> float:
    """A share as a float.

    Raises:
        UsageError: it does not lie between 0 and 1.
    """
    if isinstance(value, bool) or not 0 <= value <= 1:
        raise UsageError(f"{what} is a share between 0 and 1, not {value!r}.")
    return float(value)


def _large_enough(places: AOICoverage, size: tuple[int, int], share: float, outside: Outside) -> AOICoverage:
    """Without the AOIs whose polygon no chip can overlap by so much."""
    if places.table is None:
        raise UsageError("min_overlap= is the share of a chip in its AOI's polygon; give aois=.")
    small = largest_shares(places.whole, places.res * (size[1], size[0])) < share * (1 - 1e-9)
    if not small.any():
        return places
    return without(
        places,
        small,
        outside,
        lambda rows: (
            f"No chip of {size[0]} x {size[1]} pixels lies in AOIs {rows} by {share:g} (min_overlap); take a smaller "
            "size or share"
        ),
        UsageError,
    )


def _centres(
    places: AOICoverage, size: tuple[int, int], placement: Placement, outside: Outside
) -> tuple[AOICoverage, npt.NDArray[np.object_]]:
    """The places that chips fit in, and where a chip's centre may lie in each."""
    regions = places.shapes.copy()
    for number, frame in enumerate(places.frames):
        here = np.flatnonzero(places.frame == number)
        if not len(here):
            continue
        width, height = size[1] * frame.res[0], size[0] * frame.res[1]
        if placement == "inside":
            regions[here] = _room(places.shapes[here], width, height)
        else:
            roomy = _room(object_array([places.coverages[number]]), width, height)[0]
            within = clipped(places.shapes[here], roomy)
            regions[here] = np.where(shapely.area(within) > 0, within, places.shapes[here])
    small = shapely.is_empty(regions)
    if not small.any():
        return places, regions
    pixels = f"{size[0]} x {size[1]} pixels"

    def why(rows: str) -> str:
        where = "what the dataset covers (of an `&`, both sides)" if places.table is None else f"AOIs {rows}"
        return f"No chip of {pixels} fits in {where}; take a smaller size, or placement='centre'"

    if places.table is None and not small.all():
        _log.warning(
            "No chip of %s fits in the scenes in %s.", pixels, [places.frames[n].crs for n in np.flatnonzero(small)]
        )
    return without(places, small, outside, why, UsageError), regions[~small]


def _room(shapes: npt.NDArray[np.object_], width: float, height: float) -> npt.NDArray[np.object_]:
    """Where a chip's centre may lie; a shape as large as the chip leaves one place, a millionth of a chip wide."""
    room = erode_each(shapes, width, height)
    tight = shapely.is_empty(room)
    if tight.any():
        room[tight] = erode_each(shapes[tight], width * (1 - 1e-6), height * (1 - 1e-6))
    return room
