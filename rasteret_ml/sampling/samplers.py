"""Samplers of AOIs: random chips and grids of chips, in polygons or over everything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from torch.utils.data import Sampler

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.region import TriangleRegion, clipped, erode_each
from rasteret_ml.sampling.aoi import AOI, AOIDetails
from rasteret_ml.sampling.cells import TileLattice
from rasteret_ml.sampling.gridding import ChipGrid, lay_grid
from rasteret_ml.sampling.locality import Locality, local_order
from rasteret_ml.sampling.order import epoch_random, uniforms
from rasteret_ml.sampling.places import Places, places_of

__all__ = ["GridAOISampler", "Placement", "RandomAOISampler"]

Placement = Literal["centre", "inside"]
"""Where a chip lies in its polygon: its centre in it, or all of it."""

_BLOCK = 1024


class _AOISampler(Sampler[AOI]):
    """What both samplers share: a dataset, a chip size, places, an epoch."""

    def __init__(
        self, dataset: Any, size: int | tuple[int, int], aois: Any, aois_crs: Any, toi: Any, seed: int
    ) -> None:
        self.size = _size(size)
        self.seed = int(seed)
        self.epoch = 0
        self._passes = 0
        self._epoch_was_set = False
        self.places: Places = places_of(dataset, aois, aois_crs)
        """The polygons that chips are drawn from, in the dataset's CRS."""
        self._res: tuple[float, float] = dataset.res
        self._time = _time_slice(dataset, toi)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass (Lightning and `DataLoader` do)."""
        self.epoch = int(epoch)
        self._epoch_was_set = True

    def start_pass(self) -> None:
        """Called by `DataLoader` before each pass: the next epoch, unless one was set since the last one."""
        if self._passes and not self._epoch_was_set:
            self.epoch += 1
        self._passes += 1
        self._epoch_was_set = False

    def _aoi(self, xmin: float, ymax: float, place: int, position: int) -> AOI:
        height, width = self.size
        xres, yres = self._res
        x = slice(xmin, xmin + width * xres, xres)
        y = slice(ymax - height * yres, ymax, yres)
        details = AOIDetails(
            geometry=self.places.wkb[place],
            crs=self.places.crs,
            row=int(self.places.rows[place]),
            epoch=self.epoch,
            position=position,
            seed=self.seed,
        )
        return AOI((x, y, self._time), details)


class RandomAOISampler(_AOISampler):
    """Random chips, uniform over the area they may lie in.

    The chip at a position is a pure function of (seed, epoch, position). `rasteret_ml.DataLoader` counts epochs by
    itself; with torch's own, call `set_epoch` before each, or every epoch is the same.

    Args:
        dataset: Any TorchGeo dataset, ours or stock, or a combination.
        size: Chip size in pixels, one number or (height, width).
        length: Chips in an epoch.
        aois: Polygons to draw from: a GeoDataFrame, a path to GeoParquet or GeoJSON, or geometries (see
            `geometries_from`). None = everywhere that the dataset has data.
        seed: Of the order.
        placement: "centre": the chip's centre lies in the polygon (and, where the polygon leaves room, the chip
            in the scenes). "inside": the whole chip lies in it. Default "inside" without `aois`, else "centre".
        aois_crs: CRS of `aois` where they do not carry one; default lon/lat.
        toi: Time of interest: (start, end), an ISO interval or a pandas Interval; default all.
        locality: None = the order in which chips are drawn. A `Locality`, or its number of blocks = the same chips
            in an order in which neighbours come soon after one another, so that a cache of decoded tiles serves
            them; `mixing` measures what it costs. An epoch's order is then made as a whole, at its first chip.

    Raises:
        UsageError: a size, length or locality below 1, or (inside) a polygon that no chip fits in.
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
        toi: Any = None,
        locality: Locality | int | None = None,
    ) -> None:
        self.locality = Locality.of(locality)
        super().__init__(dataset, size, aois, aois_crs, toi, seed)
        if int(length) < 1:
            raise UsageError(f"length is the number of chips in an epoch, at least 1, not {length}.")
        if placement not in (None, "centre", "inside"):
            raise UsageError(f"placement is 'centre' or 'inside', not {placement!r}.")
        self.length = int(length)
        self.placement: Placement = placement or ("inside" if aois is None else "centre")
        self._region = TriangleRegion(self._centres())
        self._lattice = None if self.locality is None else TileLattice(dataset, self.size, self._time)
        self._ordered: _Ordered | None = None

    def _centres(self) -> npt.NDArray[np.object_]:
        """Per place, where a chip's centre may lie."""
        width, height = _ground(self.size, self._res)
        places = self.places
        if self.placement == "inside":
            regions = _room(places.shapes, width, height)
            small = places.rows[shapely.is_empty(regions)].tolist()
            if small:
                where = "the scenes" if small == [-1] else f"AOIs {small[:10]} ({len(small)} in all)"
                raise UsageError(
                    f"No chip of {self.size[0]} x {self.size[1]} pixels fits in {where}; take a smaller size, or "
                    "placement='centre'."
                )
            return regions
        roomy = _room(object_array([places.coverage]), width, height)[0]
        within = clipped(places.shapes, roomy)
        return np.where(shapely.area(within) > 0, within, places.shapes)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[AOI]:
        for start in range(0, self.length, _BLOCK):
            count = min(_BLOCK, self.length - start)
            yield from self._block(start, count)

    def at(self, position: int) -> AOI:
        """The AOI at a position of the current epoch."""
        if not 0 <= position < self.length:
            raise IndexError(f"position {position} of an epoch of {self.length}")
        return self._block(position, 1)[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ordered": None}

    def _block(self, start: int, count: int) -> list[AOI]:
        corners, owners = self._drawn(start, count) if self._lattice is None else self._served(start, count)
        return [
            self._aoi(float(x), float(y), int(place), start + i)
            for i, ((x, y), place) in enumerate(zip(corners, owners, strict=True))
        ]

    def _drawn(self, start: int, count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Upper left corners `[count, 2]` and places `[count]` as drawn."""
        points, owners = self._region.points(uniforms(self.seed, self.epoch, start, count)[:, :3])
        half_width, half_height = self.size[1] * self._res[0] / 2, self.size[0] * self._res[1] / 2
        return points + np.array([-half_width, half_height]), owners

    def _served(self, start: int, count: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """The same in the local order, which is made once an epoch."""
        ordered = self._ordered
        if ordered is None or ordered.key != (self.seed, self.epoch):
            assert self._lattice is not None
            assert self.locality is not None
            key = self.seed, self.epoch
            corners, owners = self._drawn(0, self.length)
            order = local_order(self._lattice.cells(corners), self.locality, epoch_random(*key))
            ordered = self._ordered = _Ordered(key=key, corners=corners[order], owners=owners[order])
        stop = start + count
        return ordered.corners[start:stop], ordered.owners[start:stop]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ordered:
    """An epoch's chips in the order they are served in."""

    key: tuple[int, int]
    """Seed and epoch."""
    corners: npt.NDArray[np.float64]
    """Upper left corners `[N, 2]`."""
    owners: npt.NDArray[np.int64]
    """Places that they were drawn from `[N]`."""


class GridAOISampler(_AOISampler):
    """A regular grid of chips over each polygon: every pixel in at least one, row by row.

    Chips lie on the dataset's pixels. The last ones of a row or column may reach past the polygon and the
    scenes (their size is exact; what is outside is invalid).

    Args:
        dataset: As for `RandomAOISampler`.
        size: Chip size in pixels.
        stride: Steps in pixels, one number or (rows, columns); default `size`.
        aois: Polygons to cover; None = everywhere that the dataset has data.
        aois_crs: CRS of `aois` where they do not carry one.
        toi: Time of interest.

    Raises:
        UsageError: a size or stride below 1, or a stride above the size (it would leave gaps).
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
    ) -> None:
        super().__init__(dataset, size, aois, aois_crs, toi, 0)
        self.stride = self.size if stride is None else _size(stride, "stride")
        if self.stride[0] > self.size[0] or self.stride[1] > self.size[1]:
            raise UsageError(f"A stride of {self.stride} leaves gaps between chips of {self.size}.")
        ground = {"size": _ground(self.size, self._res), "stride": _ground(self.stride, self._res)}
        grid = ChipGrid(origin=_pixel_corner(dataset), res=self._res, **ground)
        self._corners, self._owners = lay_grid(self.places.shapes, grid)

    def __len__(self) -> int:
        return len(self._corners)

    def __iter__(self) -> Iterator[AOI]:
        return (self.at(position) for position in range(len(self)))

    def at(self, position: int) -> AOI:
        """The AOI at a position."""
        x, y = self._corners[position]
        return self._aoi(float(x), float(y), int(self._owners[position]), position)


def _room(shapes: npt.NDArray[np.object_], width: float, height: float) -> npt.NDArray[np.object_]:
    """Where a chip's centre may lie; a shape as large as the chip leaves one place, a millionth of a chip wide."""
    room = erode_each(shapes, width, height)
    tight = shapely.is_empty(room)
    if tight.any():
        room[tight] = erode_each(shapes[tight], width * (1 - 1e-6), height * (1 - 1e-6))
    return room


def _ground(pixels: tuple[int, int], res: tuple[float, float]) -> tuple[float, float]:
    """Width and height in CRS units of (height, width) pixels."""
    return pixels[1] * res[0], pixels[0] * res[1]


def _pixel_corner(dataset: Any) -> tuple[float, float]:
    """A corner of a pixel of the dataset's grid."""
    grid = getattr(dataset, "grid", None)
    if grid is not None:
        return grid.transform.c, grid.transform.f
    x, y, _ = dataset.bounds
    return x.start, y.stop


def _size(value: int | tuple[int, int], what: str = "size") -> tuple[int, int]:
    try:
        pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
        height, width = (int(v) for v in pair)
    except (TypeError, ValueError):
        raise UsageError(f"{what} is a number of pixels or (height, width), not {value!r}.") from None
    if height < 1 or width < 1:
        raise UsageError(f"{what} must be at least one pixel, not {value!r}.")
    return height, width


def _time_slice(dataset: Any, toi: Any) -> slice:
    _, _, t = dataset.bounds
    if toi is None:
        return slice(t.start, t.stop, 1)
    if isinstance(toi, pd.Interval):
        return slice(toi.left, toi.right, 1)
    start, stop = toi.split("/") if isinstance(toi, str) else toi
    return slice(pd.Timestamp(start), pd.Timestamp(stop), 1)
