"""Samplers of AOIs: random chips and grids of chips, in polygons or over everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from torch.utils.data import Sampler

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.region import TriangleRegion, erode_by_box
from rasteret_ml.sampling.aoi import AOI, AOIDetails
from rasteret_ml.sampling.order import uniforms
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

    Raises:
        UsageError: a size or length below 1, or (inside) a polygon that no chip fits in.
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
    ) -> None:
        super().__init__(dataset, size, aois, aois_crs, toi, seed)
        if int(length) < 1:
            raise UsageError(f"length is the number of chips in an epoch, at least 1, not {length}.")
        if placement not in (None, "centre", "inside"):
            raise UsageError(f"placement is 'centre' or 'inside', not {placement!r}.")
        self.length = int(length)
        self.placement: Placement = placement or ("inside" if aois is None else "centre")
        self._region = TriangleRegion(self._centres())

    def _centres(self) -> npt.NDArray[np.object_]:
        """Per place, where a chip's centre may lie."""
        width, height = self.size[1] * self._res[0], self.size[0] * self._res[1]
        places = self.places
        if self.placement == "inside":
            regions = [_room(shape, width, height) for shape in places.shapes]
            small = [int(places.rows[i]) for i, region in enumerate(regions) if region.is_empty]
            if small:
                where = "the scenes" if small == [-1] else f"AOIs {small[:10]} ({len(small)} in all)"
                raise UsageError(
                    f"No chip of {self.size[0]} x {self.size[1]} pixels fits in {where}; take a smaller size, or "
                    "placement='centre'."
                )
            return object_array(regions)
        roomy = _room(places.coverage, width, height)
        within = shapely.intersection(places.shapes, roomy)
        return object_array([w if w.area > 0 else p for w, p in zip(within, places.shapes, strict=True)])

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

    def _block(self, start: int, count: int) -> list[AOI]:
        points, owners = self._region.points(uniforms(self.seed, self.epoch, start, count)[:, :3])
        half_width, half_height = self.size[1] * self._res[0] / 2, self.size[0] * self._res[1] / 2
        corners = points + np.array([-half_width, half_height])
        return [
            self._aoi(float(x), float(y), int(place), start + i)
            for i, ((x, y), place) in enumerate(zip(corners, owners, strict=True))
        ]


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
        self._corners, self._owners = self._lay(dataset)

    def _lay(self, dataset: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        xres, yres = self._res
        x0, y0 = _pixel_corner(dataset)
        height, width = self.size[0] * yres, self.size[1] * xres
        corners, owners = [], []
        for i, shape in enumerate(self.places.shapes):
            xmin, ymin, xmax, ymax = shape.bounds
            left, top = x0 + _floor((xmin - x0) / xres) * xres, y0 - _floor((y0 - ymax) / yres) * yres
            columns = _steps(xmax - left, width, self.stride[1] * xres)
            rows = _steps(top - ymin, height, self.stride[0] * yres)
            x, y = (axis.ravel() for axis in np.meshgrid(left + columns, top - rows))
            shapely.prepare(shape)
            boxes = shapely.box(x, y - height, x + width, y)
            here = shapely.intersects(shape, boxes) & ~shapely.touches(shape, boxes)
            corners.append(np.column_stack([x[here], y[here]]))
            owners.append(np.full(int(here.sum()), i))
        return np.concatenate(corners), np.concatenate(owners)

    def __len__(self) -> int:
        return len(self._corners)

    def __iter__(self) -> Iterator[AOI]:
        return (self.at(position) for position in range(len(self)))

    def at(self, position: int) -> AOI:
        """The AOI at a position."""
        x, y = self._corners[position]
        return self._aoi(float(x), float(y), int(self._owners[position]), position)


def _room(shape: Any, width: float, height: float) -> Any:
    """Where a chip's centre may lie; a shape as large as the chip leaves one place, a millionth of a chip wide."""
    room = erode_by_box(shape, width, height)
    return room if not room.is_empty else erode_by_box(shape, width * (1 - 1e-6), height * (1 - 1e-6))


def _steps(extent: float, size: float, stride: float) -> npt.NDArray[np.float64]:
    """Offsets of chips of `size` that cover `extent` (1e-6 of a chip counts as nothing)."""
    count = max(1, math.ceil((extent - size) / stride - 1e-6) + 1)
    return np.arange(count, dtype=np.float64) * stride


def _floor(value: float) -> int:
    return round(value) if abs(value - round(value)) < 1e-6 else math.floor(value)


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
