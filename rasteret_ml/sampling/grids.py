"""Grids of chips: every pixel of a polygon, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.aois.aoi import AOI
from rasteret_ml.aois.ground import Outside, Places, places_of, without
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import transform_geometries
from rasteret_ml.geo.region import polygonal_each, union_of
from rasteret_ml.plans import Plan
from rasteret_ml.sampling.chips import ChipSampler, Floats, pixel_pair
from rasteret_ml.sampling.drawing import checked_share
from rasteret_ml.sampling.gridding import ChipGrid, lay_grid
from rasteret_ml.sampling.overlap import shares
from rasteret_ml.sampling.ranks import Uneven

__all__ = ["GridAOISampler"]

Integers = npt.NDArray[np.int64]


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
        toi: Time of interest; an AOI with a time window of its own has what both have in common.
        min_overlap: Share, 0 to 1, of a chip that must lie in its AOI's polygon; chips with less are left out.
        edge: By how much polygons are shrunk before they are covered, in CRS units.
        outside: What to do with an AOI that has no chip (outside every scene or time, gone after `edge`, no chip of
            `min_overlap`): "raise", or "drop" (logged).
        uneven: See `Uneven`; by default several ranks together see each chip exactly once, and blank ones beside.

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
        toi: Any = None,
        min_overlap: float = 0.0,
        edge: float = 0.0,
        outside: Outside = "raise",
        uneven: Uneven = "blank",
    ) -> None:
        self.size = pixel_pair(size)
        self.stride = self.size if stride is None else pixel_pair(stride, "stride")
        if self.stride[0] > self.size[0] or self.stride[1] > self.size[1]:
            raise UsageError(f"A stride of {self.stride} leaves gaps between chips of {self.size}.")
        self.min_overlap = checked_share(min_overlap, "min_overlap")
        super().__init__(
            dataset, places_of(dataset, aois, aois_crs, edge=edge, outside=outside), toi, outside, 0, uneven
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

    def _options(self) -> Plan:
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


def _without_earlier_frames(places: Places) -> Places:
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
