"""Where the chips of a regular grid over polygons lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely

from rasteret_ml.geo.region import boxes_of

__all__ = ["ChipGrid", "lay_grid"]

Floats = npt.NDArray[np.float64]
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
    edge = np.flatnonzero(met)
    edge = edge[~shapely.contains_properly(parts[edge], chips[edge])]
    met[edge] = ~shapely.touches(parts[edge], chips[edge])
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
