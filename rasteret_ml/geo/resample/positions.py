"""Where the pixels of one grid lie on another, and which source window a target grid needs.

`rasterio.warp.reproject` interpolates positions with an error of up to 0.125 pixels, so that a pixel depends on how its
chip was cut; exact transforms of every pixel are slow. Map projections are smooth: here a block of pixels is
transformed at 12 x 12 Chebyshev nodes and interpolated between them, with an error of about 1e-9 pixels. Other points
of the block are transformed as a check; if they differ by more than `_TOLERANCE` (a pole, a seam, an edge of the
projection) the block is cut in four, in the end down to single transforms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from affine import Affine

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import full_turn, same_crs, transform_points
from rasteret_ml.geo.grid import Grid, Window, full_turns

Floats = npt.NDArray[np.float64]
Resampling = Literal["nearest", "bilinear", "cubic", "average", "mode"]  #: Kernels by their GDAL names.

LARGEST_BOX = 8.0  #: A target pixel that covers this many times more than the middle one lies across a seam.
_KERNEL_RADIUS = {"nearest": 0, "bilinear": 1, "cubic": 2, "average": 1, "mode": 1}
_LATTICE = 21  # Points along each side of a target that are projected to find its source window.
_STEADY = 1.1
_NODES = 12
_ANGLES = (2 * np.arange(_NODES) + 1) * np.pi / (2 * _NODES)
_CHEBYSHEV = (1 - np.cos(_ANGLES)) / 2  # Nodes of the first kind on 0..1.
_TOLERANCE = 1e-6  # Largest error of an interpolated position, in source pixels.
_SMALLEST = 32  # Blocks of this many rows and columns are not cut further.
_CHECKS = np.array([0.0, 0.13, 0.37, 0.5, 0.71, 0.94, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Fractional positions on a source grid; (0, 0) is its first corner, infinite means outside its CRS."""

    cols: Floats  #: Columns.
    rows: Floats  #: Rows, of the same shape.


def positions(target: Grid, source: Grid, *, corners: bool = False) -> Positions:
    """Return where the pixel centres `[H, W]` of `target`, or its pixel corners `[H + 1, W + 1]`, lie on `source`.

    On a geographic source each longitude is moved by whole turns to the middle of the source, so that a source may lie
    at -180..180, 0..360 or across either end.
    """
    edge = 0.0 if corners else 0.5
    at_cols: Floats = np.arange(target.width + corners, dtype=np.float64) + edge
    at_rows: Floats = np.arange(target.height + corners, dtype=np.float64) + edge
    if same_crs(target.crs, source.crs):
        x, y = _affine(target, at_cols[None, :], at_rows[:, None])
        cols, rows = _on_source(source, x, y)
        return Positions(cols=_snap_to_halves(cols), rows=_snap_to_halves(rows))
    x, y = np.empty((2, len(at_rows), len(at_cols)))
    _fill(target, source, at_cols, at_rows, x, y)
    cols, rows = _on_source(source, x, y)
    return Positions(cols=cols, rows=rows)


def to_source(target: Grid, source: Grid, cols: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Return coordinates in `source`'s CRS of fractional positions on `target`, each transformed exactly."""
    x, y = _affine(target, cols, rows)
    return transform_points(x, y, str(target.crs), str(source.crs))


def contiguous(x: Floats, crs: str | None, near: Any) -> Floats:
    """Return longitudes moved by whole turns to within half a turn of `near`; other coordinates unchanged."""
    turn = full_turn(crs)
    if turn is None:
        return x
    with np.errstate(invalid="ignore"):
        moved = x - turn * np.floor((x - near) / turn + 0.5)  # half-open: near - turn / 2 is in, near + turn / 2 is not
    return np.where(np.isfinite(x), moved, x)


def needed_window(target: Grid, source: Grid, resampling: Resampling) -> Window | None:
    """Return the pixels of `source` that resampling onto `target` can touch; the window may reach past its edges.

    A lattice of 21 x 21 points of the target is projected onto the source grid; the box around them is widened by the
    kernel (scaled if the target is coarser), and by how far edges may bow out between the points.

    On a geographic source the window is in one piece even if the target crosses the antimeridian: longitudes are made
    contiguous around the middle of the target, then moved by whole turns to where the source has most of them. The
    window then reaches past an edge of the source; a raster of all longitudes continues there from its other edge
    (`Grid.turn` columns away). A target that holds a pole needs all columns.

    Return None if no part of the target can be expressed in the source's CRS; raise UsageError for an unknown kernel or
    a grid without a CRS.
    """
    if resampling not in _KERNEL_RADIUS:
        raise UsageError(f"resampling must be one of {', '.join(_KERNEL_RADIUS)}, got {resampling!r}.")
    if target.crs is None or source.crs is None:
        raise UsageError("Both grids must have a CRS to be resampled; this file declares none.")
    steps = np.linspace(0.0, 1.0, _LATTICE)
    x, y = to_source(target, source, *np.meshgrid(steps * target.width, steps * target.height))
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.any():
        return None
    middle = x[_LATTICE // 2, _LATTICE // 2]
    x = contiguous(x, source.crs, middle if np.isfinite(middle) else x[finite][0])
    cols, rows = source.to_pixels(np.where(finite, x, np.nan), np.where(finite, y, np.nan))
    margin_col, margin_row = (
        int(np.ceil(_KERNEL_RADIUS[resampling] * max(1.0, scale))) + 1 for scale in pixel_ratio(target, source)
    )
    pad_row, pad_col = (
        margin + min(_bow(at), max(source.shape)) for margin, at in ((margin_row, rows), (margin_col, cols))
    )
    left, right = float(np.nanmin(cols)), float(np.nanmax(cols))
    top, bottom = float(np.nanmin(rows)), float(np.nanmax(rows))
    turn, poles = source.turn_columns, _poles_within(target, source)
    if poles or (turn is not None and right - left >= turn - 1):
        left, right, pad_col = 0.0, float(source.width), margin_col
        if resampling in ("average", "mode"):  # the box of a pixel beside a pole is wide
            pad_col = max(margin_col, min(int(np.ceil(LARGEST_BOX * margin_col)), int(np.ceil((turn or 0.0) / 2))))
        top, bottom = min([top, *poles]), max([bottom, *poles])
    elif turn is not None:
        shift = turn * full_turns(left, right, source.width, turn)
        left, right = left + shift, right + shift
    row, col = int(np.floor(top)) - pad_row, int(np.floor(left)) - pad_col
    height, width = int(np.ceil(bottom)) + pad_row - row, int(np.ceil(right)) + pad_col - col
    return Window(row=row, col=col, height=max(1, height), width=max(1, width))


def _bow(lattice: Floats) -> int:
    """How far a smooth curve can leave the lattice between its points (an eighth of its second difference, doubled)."""
    bends = np.concatenate([np.diff(lattice, 2, axis=axis).ravel() for axis in (0, 1)])
    bends = np.abs(bends[np.isfinite(bends)])
    return max(0, int(np.ceil(bends.max(initial=0.0) / 4 - 1e-3)))


def _poles_within(target: Grid, source: Grid) -> list[float]:
    """The rows of `source` of the poles that a target in a projected CRS holds."""
    quarter = (full_turn(source.crs) or 0.0) / 4
    if not quarter or full_turn(target.crs):
        return []
    lat = np.array([-quarter, quarter])
    col, row = target.to_pixels(*transform_points(np.zeros(2), lat, str(source.crs), str(target.crs)))
    with np.errstate(invalid="ignore"):
        within = (col >= -1) & (row >= -1) & (col <= target.width + 1) & (row <= target.height + 1)
    return [float(row) for row in source.to_pixels(np.zeros(2), lat)[1][within]]


def pixel_ratio(target: Grid, source: Grid) -> tuple[float, float]:
    """Return how many source columns and rows a target pixel spans at the middle of the target (1.0 if unknown).

    If the middle cannot be expressed in the source's CRS, the median over a 5 x 5 lattice of the target is returned.
    """
    middle = [target.width // 2], [target.height // 2]
    lattice = np.linspace(0, target.width - 1, 5), np.linspace(0, target.height - 1, 5)
    for at in (middle, lattice):
        col, row = np.meshgrid(*at)
        across, down = _spans(target, source, col.ravel() + 0.5, row.ravel() + 0.5)
        good = np.isfinite(across) & np.isfinite(down) & (across > 0) & (down > 0)
        if good.any():
            return float(np.median(across[good])), float(np.median(down[good]))
    return 1.0, 1.0


def steady_ratio(target: Grid, source: Grid) -> tuple[float, float]:
    """Return `pixel_ratio`, but at the middle of the source if it varies by less than 10 % over the source.

    All chips of a scene then share one overview and one kernel; on a raster of the globe the ratio depends on latitude.
    """
    t = target.transform
    ratio = _ratio_over(source, str(target.crs), (t.a, t.b, t.d, t.e))
    return pixel_ratio(target, source) if ratio is None else ratio


@functools.lru_cache(maxsize=4096)
def _ratio_over(source: Grid, crs: str, pixel: tuple[float, float, float, float]) -> tuple[float, float] | None:
    lattice = np.array([0.02, 0.5, 0.98])
    cols, rows = (at.ravel() for at in np.meshgrid(lattice * source.width, lattice * source.height))
    a, b, d, e = pixel
    target = Grid(crs=crs, transform=Affine(a, b, 0.0, d, e, 0.0), shape=(1, 1))
    with np.errstate(invalid="ignore"):
        spans = np.stack(_spans(target, source, *target.to_pixels(*to_source(source, target, cols, rows))))
    if not (np.isfinite(spans).all() and (spans.max(axis=1) < _STEADY * spans.min(axis=1)).all()):
        return None
    return float(spans[0, 4]), float(spans[1, 4])


def _spans(target: Grid, source: Grid, col: Floats, row: Floats) -> tuple[Floats, Floats]:
    """How many source columns and rows the target pixels that start at (col, row) span."""
    x, y = to_source(target, source, col + np.array([[0.0], [1.0], [0.0]]), row + np.array([[0.0], [0.0], [1.0]]))
    with np.errstate(invalid="ignore"):
        dx, dy = x[1:] - x[0], y[1:] - y[0]
        turn = full_turn(source.crs)
        if turn is not None:
            dx -= turn * np.round(dx / turn)
        i = ~source.transform
        return np.hypot(*(i.a * dx + i.b * dy)), np.hypot(*(i.d * dx + i.e * dy))


def _affine(grid: Grid, cols: Floats, rows: Floats) -> tuple[Floats, Floats]:
    t = grid.transform
    return t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f


def _on_source(source: Grid, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    middle, _ = source.transform @ (source.width / 2, source.height / 2)
    with np.errstate(invalid="ignore"):
        cols, rows = source.to_pixels(contiguous(x, source.crs, middle), y)
    lost = ~(np.isfinite(cols) & np.isfinite(rows))
    return np.where(lost, np.inf, cols), np.where(lost, np.inf, rows)


def _snap_to_halves(at: Floats) -> Floats:
    """Move positions within a millionth of a multiple of half a pixel onto it: aligned grids become copies."""
    near = np.round(at * 2) / 2
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(at - near) < _TOLERANCE, near, at)


def _fill(target: Grid, source: Grid, at_cols: Floats, at_rows: Floats, x: Floats, y: Floats) -> None:
    """Write the coordinates of all (at_rows x at_cols) into `x` and `y`."""
    interpolated = _interpolate(target, source, at_cols, at_rows)
    if interpolated is not None:
        x[:], y[:] = interpolated
        return
    height, width = x.shape
    if max(height, width) <= _SMALLEST:
        x[:], y[:] = to_source(target, source, *np.meshgrid(at_cols, at_rows))
        return
    middle_row = height // 2 if height > _SMALLEST else height
    middle_col = width // 2 if width > _SMALLEST else width
    for r in (slice(0, middle_row), slice(middle_row, height)):
        for c in (slice(0, middle_col), slice(middle_col, width)):
            if x[r, c].size:
                _fill(target, source, at_cols[c], at_rows[r], x[r, c], y[r, c])


def _interpolate(target: Grid, source: Grid, at_cols: Floats, at_rows: Floats) -> tuple[Floats, Floats] | None:
    """Coordinates from a polynomial through a few exact ones, None if it fails the check."""
    if at_cols.size * at_rows.size < 2 * _NODES**2:
        return None
    (col0, col1), (row0, row1) = (at_cols[0], at_cols[-1]), (at_rows[0], at_rows[-1])
    nodes_x, nodes_y = _CHEBYSHEV * (col1 - col0) + col0, _CHEBYSHEV * (row1 - row0) + row0
    checks_x, checks_y = _CHECKS * (col1 - col0) + col0, _CHECKS * (row1 - row0) + row0
    x, y = to_source(target, source, *np.meshgrid(nodes_x, nodes_y))
    check_x, check_y = to_source(target, source, *np.meshgrid(checks_x, checks_y))
    if not all(np.isfinite(values).all() for values in (x, y, check_x, check_y)):
        return None
    near = x[0, 0]
    x, check_x = contiguous(x, source.crs, near), contiguous(check_x, source.crs, near)
    down, across = _barycentric(checks_y, nodes_y), np.ascontiguousarray(_barycentric(checks_x, nodes_x).T)
    error_x, error_y = _through(down, x, across) - check_x, _through(down, y, across) - check_y
    i = ~source.transform
    error = np.maximum(np.abs(i.a * error_x + i.b * error_y), np.abs(i.d * error_x + i.e * error_y))
    if not error.max() <= _TOLERANCE:
        return None
    down, across = _barycentric(at_rows, nodes_y), np.ascontiguousarray(_barycentric(at_cols, nodes_x).T)
    return _through(down, x, across), _through(down, y, across)


def _through(down: Floats, values: Floats, across: Floats) -> Floats:
    # Not `@`: BLAS would start threads of its own, which stall if workers already use every core.
    return np.asarray(np.einsum("ik,kj->ij", np.einsum("ik,kj->ij", down, values), across))


def _barycentric(at: Floats, nodes: Floats) -> Floats:
    """The barycentric interpolation matrix `[len(at), len(nodes)]` (Berrut and Trefethen 2004, eq. 5.4)."""
    distance = at[:, None] - nodes
    hit = distance == 0
    ratio = (-1.0) ** np.arange(_NODES) * np.sin(_ANGLES) / np.where(hit, 1.0, distance)
    on_node = hit.any(axis=1)
    ratio[on_node] = hit[on_node]
    return np.asarray(ratio / ratio.sum(axis=1, keepdims=True))
