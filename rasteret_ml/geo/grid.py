"""Pixel grids: a CRS, an affine transform and a shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import full_turn, same_crs
from rasteret_ml.geo.window import Window

__all__ = ["ALIGNMENT_TOLERANCE", "Bounds", "Grid", "full_turns", "pixel_size", "round_half_up"]

Bounds = tuple[float, float, float, float]
"""(xmin, ymin, xmax, ymax) in the units of a CRS."""

ALIGNMENT_TOLERANCE = 1e-3
"""How far, in pixels, two grids may drift apart over a chip and still count as the same grid."""


def round_half_up(value: float) -> int:
    """The nearest integer; halves go up."""
    return math.floor(value + 0.5)


def pixel_size(res: Any) -> tuple[float, float] | None:
    """`res`, one number or (x, y) in CRS units, as a pair; None stays None.

    Raises:
        UsageError: not positive and finite.
    """
    if res is None:
        return None
    try:
        x, y = (float(v) for v in (res if np.ndim(res) else (res, res)))
    except (TypeError, ValueError):
        x = y = math.nan
    if isinstance(res, str) or not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
        raise UsageError(f"res is a positive pixel size or (x, y), not {res!r}.")
    return x, y


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where the pixels of an array lie on the ground."""

    crs: str | None
    """CRS text (see `geo.crs`), None where the file has none."""
    transform: Affine
    """Maps (column, row) of a pixel's upper-left corner to (x, y); (0, 0) is the array's first corner."""
    shape: tuple[int, int]
    """(height, width) in pixels."""

    @property
    def height(self) -> int:
        """Rows."""
        return self.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.shape[1]

    @property
    def is_axis_aligned(self) -> bool:
        """Whether rows run along x and columns along y (no rotation, no shear)."""
        return bool(self.transform.b == 0 and self.transform.d == 0)

    @property
    def res(self) -> tuple[float, float]:
        """Pixel size (x, y), positive, in CRS units."""
        t = self.transform
        return math.hypot(t.a, t.d), math.hypot(t.b, t.e)

    @property
    def bounds(self) -> Bounds:
        """(xmin, ymin, xmax, ymax) of the outer edges."""
        xs, ys = zip(*self._outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def turn(self) -> int | None:
        """How many columns are 360 degrees, on a geographic, axis-aligned grid; None elsewhere.

        Also None where that is no whole number of columns (within `ALIGNMENT_TOLERANCE`): such a raster cannot
        be continued past its edge by its own pixels.
        """
        turn = full_turn(self.crs)
        if turn is None or not self.is_axis_aligned or self.transform.a == 0:
            return None
        columns = turn / abs(self.transform.a)
        whole = round(columns)
        return whole if whole >= 1 and abs(columns - whole) <= ALIGNMENT_TOLERANCE else None

    @property
    def footprint(self) -> shapely.Polygon:
        """The outline, exact also for a rotated grid."""
        return shapely.Polygon(self._outline)

    @property
    def _outline(self) -> tuple[tuple[float, float], ...]:
        """The corners on the ground; by hand, since every chip asks and `Affine @` takes its time."""
        t = self.transform
        return tuple((col * t.a + row * t.b + t.c, col * t.d + row * t.e + t.f) for col, row in self._corners)

    @property
    def _corners(self) -> tuple[tuple[int, int], ...]:
        h, w = self.shape
        return (0, 0), (w, 0), (w, h), (0, h)

    def window(self, window: Window) -> Grid:
        """The grid of a window of this one (boundless)."""
        t, col, row = self.transform, window.col, window.row
        x, y = t.a * col + t.b * row + t.c, t.d * col + t.e * row + t.f
        return Grid(crs=self.crs, transform=Affine(t.a, t.b, x, t.d, t.e, y), shape=window.shape)

    def with_res(self, res: tuple[float, float]) -> Grid:
        """The same corner and extent with pixels of `res` (x, y) in CRS units; north up."""
        xmin, ymin, xmax, ymax = self.bounds
        t = self.transform
        if self.is_axis_aligned and t.a > 0 and t.e < 0:
            xmin, ymax = t.c, t.f
        shape = (max(1, round((ymax - ymin) / res[1])), max(1, round((xmax - xmin) / res[0])))
        return Grid(crs=self.crs, transform=Affine(res[0], 0.0, xmin, 0.0, -res[1], ymax), shape=shape)

    def window_of(self, other: Grid, *, wrap: bool = True) -> Window | None:
        """Where `other` lies on this grid, or None where their pixels do not coincide.

        They coincide when CRS and pixel vectors agree and the origins are a whole number of pixels
        apart, all within `ALIGNMENT_TOLERANCE` pixels at every corner of `other`. On a grid with a `turn`, of the
        windows that are whole turns apart the one that shares most columns with this grid is meant: longitude
        -100 lies on a raster of 0..360 at 260 (unless `wrap` is False).
        """
        if not same_crs(self.crs, other.crs):
            return None
        mine, its = self.transform, other.transform
        if mine.b == mine.d == its.b == its.d == 0:
            off_x, off_y = (its.c - mine.c) / mine.a, (its.f - mine.f) / mine.e
            col, row = round(off_x), round(off_y)
            far_x = off_x - col + (its.a / mine.a - 1) * other.width
            far_y = off_y - row + (its.e / mine.e - 1) * other.height
            worst = max(abs(off_x - col), abs(off_y - row), abs(far_x), abs(far_y))
        else:
            to_here = ~mine @ its
            col, row = round(to_here.c), round(to_here.f)
            here = ((corner, to_here @ corner) for corner in other._corners)
            worst = max(max(abs(at[0] - c[0] - col), abs(at[1] - c[1] - row)) for c, at in here)
        if not worst <= ALIGNMENT_TOLERANCE:
            return None
        turn = self.turn if wrap else None
        if turn is not None:
            col += turn * full_turns(col, col + other.width, self.width, turn)
        return Window(row=row, col=col, height=other.height, width=other.width)

    def window_around(self, bounds: Bounds) -> Window:
        """The smallest window that holds `bounds` (floor of the start, ceil of the stop; boundless).

        The rule of `rasterio.features.geometry_window`; here floating-point noise (1e-6 pixels) around a
        pixel edge does not add a row or column.
        """
        xmin, ymin, xmax, ymax = bounds
        inverse = ~self.transform
        corners = [inverse @ c for c in ((xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax))]
        cols, rows = [c[0] for c in corners], [c[1] for c in corners]
        row, col = _floor(min(rows)), _floor(min(cols))
        return Window(row=row, col=col, height=max(1, _ceil(max(rows)) - row), width=max(1, _ceil(max(cols)) - col))

    def snap(self, bounds: Bounds) -> Grid:
        """The chip grid for `bounds`: size and origin rounded to whole pixels of this grid, half up.

        Raises:
            UsageError: this grid is rotated, or `bounds` are empty or not finite.
        """
        if not self.is_axis_aligned:
            raise UsageError("A rotated grid has no x and y slices; choose `crs=` and `res=` for the dataset.")
        xmin, ymin, xmax, ymax = bounds
        if not (all(map(math.isfinite, bounds)) and xmax > xmin and ymax > ymin):
            raise UsageError(f"Bounds must be finite with xmin < xmax and ymin < ymax, not {bounds}.")
        t = self.transform
        width = max(1, round_half_up((xmax - xmin) / abs(t.a)))
        height = max(1, round_half_up((ymax - ymin) / abs(t.e)))
        col = round_half_up(((xmin if t.a > 0 else xmax) - t.c) / t.a)
        row = round_half_up(((ymax if t.e < 0 else ymin) - t.f) / t.e)
        return self.window(Window(row=row, col=col, height=height, width=width))

    def to_pixels(
        self, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(columns, rows), fractional, of points given in this grid's CRS; not finite where a point is not."""
        i = ~self.transform
        with np.errstate(invalid="ignore"):
            return i.a * x + i.b * y + i.c, i.d * x + i.e * y + i.f


def full_turns(left: float, right: float, width: int, turn: float) -> int:
    """By how many turns (in columns) to move columns `left` to `right`, so that most of them lie in 0 to `width`."""
    middle = round((width - left - right) / 2 / turn)

    def rank(turns: int) -> tuple[float, int]:
        move = turns * turn
        return min(right + move, width) - max(left + move, 0.0), -abs(turns)

    return max((0, middle - 1, middle, middle + 1), key=rank)


_EDGE_NOISE = 1e-6


def _floor(value: float) -> int:
    nearest = round(value)
    return nearest if abs(value - nearest) < _EDGE_NOISE else math.floor(value)


def _ceil(value: float) -> int:
    nearest = round(value)
    return nearest if abs(value - nearest) < _EDGE_NOISE else math.ceil(value)
