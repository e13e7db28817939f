"""Windows of whole pixels, and pixel grids: a CRS, an affine transform and a shape."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A rectangle of pixels; it may reach past the image (boundless), with negative rows and columns."""

    row: int  #: First row.
    col: int  #: First column.
    height: int  #: Rows, at least 1.
    width: int  #: Columns, at least 1.

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UsageError(f"A window must have at least one row and column, got {self.height} x {self.width}.")

    @property
    def row_stop(self) -> int:
        """Row just past the last one (exclusive)."""
        return self.row + self.height

    @property
    def col_stop(self) -> int:
        """Column just past the last one (exclusive)."""
        return self.col + self.width

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """(rows, columns), to index an array that starts at row 0 and column 0."""
        return slice(self.row, self.row_stop), slice(self.col, self.col_stop)

    def intersection(self, other: Window) -> Window | None:
        """Return the shared pixels, None if there are none."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        height = min(self.row_stop, other.row_stop) - row
        width = min(self.col_stop, other.col_stop) - col
        if height < 1 or width < 1:
            return None
        return Window(row=row, col=col, height=height, width=width)

    def relative_to(self, origin: Window) -> Window:
        """Return the same pixels, counted from the first row and column of `origin`."""
        return Window(row=self.row - origin.row, col=self.col - origin.col, height=self.height, width=self.width)

    def __str__(self) -> str:
        return f"rows {self.row}:{self.row_stop}, columns {self.col}:{self.col_stop}"


Floats = npt.NDArray[np.float64]
Bounds = tuple[float, float, float, float]  #: (xmin, ymin, xmax, ymax) in the units of a CRS.

ALIGNMENT_TOLERANCE = 1e-3  #: Pixels by which two grids may drift apart over a chip and still be the same grid.
_EDGE_NOISE = 1e-6  # Pixels.


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up."""
    return math.floor(value + 0.5)


def pixel_size(res: Any) -> tuple[float, float] | None:
    """Return `res`, one number or (x, y) in CRS units, as a pair; None stays None.

    Raise UsageError if it is not positive and finite.
    """
    if res is None:
        return None
    try:
        x, y = (float(v) for v in (res if np.ndim(res) else (res, res)))
    except (TypeError, ValueError):
        x = y = math.nan
    if isinstance(res, str) or not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
        raise UsageError(f"res must be a pixel size > 0 or a pair (x, y) of them, got {res!r}.")
    return x, y


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where the pixels of an array lie: CRS, affine transform and shape.

    grid = Grid(crs="EPSG:32633", transform=Affine(10, 0, 500000, 0, -10, 5000000), shape=(256, 256))
    grid.bounds  # (500000.0, 4997440.0, 502560.0, 5000000.0)
    """

    crs: str | None  #: CRS text (see `geo.crs`), None if the file has none.
    transform: Affine  #: From (column, row) of a pixel's upper-left corner to (x, y).
    shape: tuple[int, int]  #: (height, width) in pixels.

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
        """(xmin, ymin, xmax, ymax) of the outer edges, in CRS units."""
        xs, ys = zip(*self._outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def turn(self) -> int | None:
        """Columns in 360 degrees of a geographic, axis-aligned grid; None for other grids.

        Also None if that is not a whole number (within `ALIGNMENT_TOLERANCE`): such a raster cannot be continued past
        its edge by its own pixels.
        """
        columns = self.turn_columns
        if columns is None:
            return None
        whole = round(columns)
        return whole if whole >= 1 and abs(columns - whole) <= ALIGNMENT_TOLERANCE else None

    @property
    def turn_columns(self) -> float | None:
        """Columns in 360 degrees, as `turn`, but perhaps fractional."""
        turn = full_turn(self.crs)
        return turn / abs(self.transform.a) if turn is not None and self.is_axis_aligned and self.transform.a else None

    @property
    def footprint(self) -> shapely.Polygon:
        """The outline, also exact for a rotated grid."""
        return shapely.Polygon(self._outline)

    @property
    def _outline(self) -> tuple[tuple[float, float], ...]:
        """The corners in CRS units; without `Affine @`, which is slow for something done for each chip."""
        t = self.transform
        return tuple((col * t.a + row * t.b + t.c, col * t.d + row * t.e + t.f) for col, row in self._corners)

    @property
    def _corners(self) -> tuple[tuple[int, int], ...]:
        h, w = self.shape
        return (0, 0), (w, 0), (w, h), (0, h)

    def window(self, window: Window) -> Grid:
        """Return the grid of a window of this one (boundless)."""
        t, col, row = self.transform, window.col, window.row
        x, y = t.a * col + t.b * row + t.c, t.d * col + t.e * row + t.f
        return Grid(crs=self.crs, transform=Affine(t.a, t.b, x, t.d, t.e, y), shape=window.shape)

    def with_res(self, res: tuple[float, float]) -> Grid:
        """Return a north-up grid of the same corner and extent with pixels of `res` (x, y) in CRS units."""
        xmin, ymin, xmax, ymax = self.bounds
        t = self.transform
        if self.is_axis_aligned and t.a > 0 and t.e < 0:
            xmin, ymax = t.c, t.f
        shape = (max(1, round((ymax - ymin) / res[1])), max(1, round((xmax - xmin) / res[0])))
        return Grid(crs=self.crs, transform=Affine(res[0], 0.0, xmin, 0.0, -res[1], ymax), shape=shape)

    def window_of(self, other: Grid, *, wrap: bool = True) -> Window | None:
        """Return the window of `other` on this grid, None if their pixels do not coincide.

        They coincide if the CRSs are the same, and pixel sizes agree and origins are a whole number of pixels apart
        within `ALIGNMENT_TOLERANCE` at every corner of `other`. With a `turn`, `wrap` moves the window by whole
        turns to where it shares most columns with this grid: longitude -100 lies on a raster of 0..360 at 260.
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
        """Return the smallest window that contains `bounds` (floor of the start, ceil of the stop; boundless).

        The rule of `rasterio.features.geometry_window`, except that floating-point noise (1e-6 pixels) at the edge of a
        pixel does not add a row or column.
        """
        xmin, ymin, xmax, ymax = bounds
        inverse = ~self.transform
        corners = [inverse @ c for c in ((xmin, ymin), (xmax, ymin), (xmax, ymax), (xmin, ymax))]
        cols, rows = [c[0] for c in corners], [c[1] for c in corners]
        row, col = math.floor(min(rows) + _EDGE_NOISE), math.floor(min(cols) + _EDGE_NOISE)
        row_stop, col_stop = math.ceil(max(rows) - _EDGE_NOISE), math.ceil(max(cols) - _EDGE_NOISE)
        return Window(row=row, col=col, height=max(1, row_stop - row), width=max(1, col_stop - col))

    def snap(self, bounds: Bounds) -> Grid:
        """Return the chip grid for `bounds`: size and origin are rounded to whole pixels of this grid, half up.

        Raise UsageError if this grid is rotated, or `bounds` are empty or not finite.
        """
        if not self.is_axis_aligned:
            raise UsageError("A rotated grid cannot be sliced in x and y; choose `crs=` and `res=` for the dataset.")
        xmin, ymin, xmax, ymax = bounds
        if not (all(map(math.isfinite, bounds)) and xmax > xmin and ymax > ymin):
            raise UsageError(f"Bounds must be finite with xmin < xmax and ymin < ymax, got {bounds}.")
        t = self.transform
        width = max(1, round_half_up((xmax - xmin) / abs(t.a)))
        height = max(1, round_half_up((ymax - ymin) / abs(t.e)))
        col = round_half_up(((xmin if t.a > 0 else xmax) - t.c) / t.a)
        row = round_half_up(((ymax if t.e < 0 else ymin) - t.f) / t.e)
        return self.window(Window(row=row, col=col, height=height, width=width))

    def to_pixels(self, x: Floats, y: Floats) -> tuple[Floats, Floats]:
        """Return fractional (columns, rows) of points in this grid's CRS; not finite where a point is not."""
        i = ~self.transform
        with np.errstate(invalid="ignore"):
            return i.a * x + i.b * y + i.c, i.d * x + i.e * y + i.f


def full_turns(left: float, right: float, width: int, turn: float) -> int:
    """Return by how many turns to move columns `left` to `right` so that most of them lie in 0 to `width`."""
    centred = round((width - left - right) / 2 / turn)

    def shared_columns(turns: int) -> tuple[float, int]:
        move = turns * turn
        return min(right + move, width) - max(left + move, 0.0), -abs(turns)

    return max((0, centred - 1, centred, centred + 1), key=shared_columns)
