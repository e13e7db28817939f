"""Where the pixels of one grid lie on another: exact to a millionth of a pixel, at a fraction of the transforms.

Map projections are smooth. A block of pixels is therefore transformed at 12 x 12 Chebyshev nodes and interpolated
between them, which leaves about 1e-9 pixels of error; other points of the block are transformed too, and where
they disagree by more than `_TOLERANCE` (a pole, a seam, an edge of the projection) the block is cut in four,
until its pixels are transformed one by one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.crs import full_turn, same_crs, transform_points
from rasteret_ml.geo.grid import Grid

__all__ = ["Positions", "contiguous", "positions", "to_source", "turn_columns"]

Floats = npt.NDArray[np.float64]

_NODES = 12
_TOLERANCE = 1e-6
"""Largest error of an interpolated position, in source pixels."""
_SMALLEST = 32
"""Blocks of so many rows and columns are not cut further."""
_CHECKS = np.array([0.0, 0.13, 0.37, 0.5, 0.71, 0.94, 1.0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """Fractional positions on a source grid; (0, 0) is its first corner, infinite = there is no answer."""

    cols: Floats
    """Columns."""
    rows: Floats
    """Rows, of the same shape."""


def positions(target: Grid, source: Grid, *, corners: bool = False) -> Positions:
    """Where the pixel centres of `target`, `[H, W]`, lie on `source`, or its pixel corners, `[H + 1, W + 1]`.

    On a geographic source each longitude is the one (of all that are whole turns apart) nearest to the
    middle of the source, so that a source may lie at -180..180, 0..360 or across either end.
    """
    edge = 0.0 if corners else 0.5
    at_cols: Floats = np.arange(target.width + corners, dtype=np.float64) + edge
    at_rows: Floats = np.arange(target.height + corners, dtype=np.float64) + edge
    if same_crs(target.crs, source.crs):
        x, y = _affine(target, at_cols[None, :], at_rows[:, None])
        cols, rows = _on_source(source, x, y)
        return Positions(cols=_without_noise(cols), rows=_without_noise(rows))
    x, y = np.empty((2, len(at_rows), len(at_cols)))
    _fill(target, source, at_cols, at_rows, x, y)
    cols, rows = _on_source(source, x, y)
    return Positions(cols=cols, rows=rows)


def to_source(target: Grid, source: Grid, cols: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Coordinates in `source`'s CRS of fractional positions on `target`, point by point."""
    x, y = _affine(target, cols, rows)
    return transform_points(x, y, str(target.crs), str(source.crs))


def contiguous(x: Floats, crs: str | None, near: Any) -> Floats:
    """Longitudes moved by whole turns to within half a turn of `near`; other coordinates as they are."""
    turn = full_turn(crs)
    if turn is None:
        return x
    with np.errstate(invalid="ignore"):
        moved = x - turn * np.floor((x - near) / turn + 0.5)  # half-open: near - turn / 2 is in, near + turn / 2 is not
    return np.where(np.isfinite(x), moved, x)


def turn_columns(grid: Grid) -> float | None:
    """How many columns are 360 degrees on a geographic, axis-aligned grid, not always a whole number; else None."""
    turn = full_turn(grid.crs)
    return turn / abs(grid.transform.a) if turn is not None and grid.is_axis_aligned else None


def _affine(grid: Grid, cols: Floats, rows: Floats) -> tuple[Floats, Floats]:
    t = grid.transform
    return t.a * cols + t.b * rows + t.c, t.d * cols + t.e * rows + t.f


def _on_source(source: Grid, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    middle, _ = source.transform @ (source.width / 2, source.height / 2)
    with np.errstate(invalid="ignore"):
        cols, rows = source.to_pixels(contiguous(x, source.crs, middle), y)
    lost = ~(np.isfinite(cols) & np.isfinite(rows))
    return np.where(lost, np.inf, cols), np.where(lost, np.inf, rows)


def _without_noise(at: Floats) -> Floats:
    """Positions within a millionth of half a pixel's multiple put exactly there: aligned grids give copies."""
    near = np.round(at * 2) / 2
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(at - near) < _TOLERANCE, near, at)


def _fill(target: Grid, source: Grid, at_cols: Floats, at_rows: Floats, x: Floats, y: Floats) -> None:
    """Write the coordinates of all (at_rows x at_cols) into `x` and `y`."""
    found = _interpolated(target, source, at_cols, at_rows)
    if found is not None:
        x[:], y[:] = found
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


def _interpolated(target: Grid, source: Grid, at_cols: Floats, at_rows: Floats) -> tuple[Floats, Floats] | None:
    """Coordinates from a polynomial through a few exact ones, None where it does not hold."""
    if at_cols.size * at_rows.size < 2 * _NODES**2:
        return None
    (col0, col1), (row0, row1) = (at_cols[0], at_cols[-1]), (at_rows[0], at_rows[-1])
    nodes_x, nodes_y = _nodes() * (col1 - col0) + col0, _nodes() * (row1 - row0) + row0
    checks_x, checks_y = _CHECKS * (col1 - col0) + col0, _CHECKS * (row1 - row0) + row0
    x, y = _exact(target, source, nodes_x, nodes_y)
    if x is None or y is None:
        return None
    check_x, check_y = _exact(target, source, checks_x, checks_y, near=float(x[0, 0]))
    if check_x is None or check_y is None:
        return None
    x = contiguous(x, source.crs, x[0, 0])
    down, across = _weights(checks_y, nodes_y), np.ascontiguousarray(_weights(checks_x, nodes_x).T)
    error_x, error_y = _through(down, x, across) - check_x, _through(down, y, across) - check_y
    i = ~source.transform
    error = np.maximum(np.abs(i.a * error_x + i.b * error_y), np.abs(i.d * error_x + i.e * error_y))
    if not error.max() <= _TOLERANCE:
        return None
    down, across = _weights(at_rows, nodes_y), np.ascontiguousarray(_weights(at_cols, nodes_x).T)
    return _through(down, x, across), _through(down, y, across)


def _through(down: Floats, values: Floats, across: Floats) -> Floats:
    # Not `@`: BLAS would start threads of its own for it, which stall where workers already use every core.
    return np.asarray(np.einsum("ik,kj->ij", np.einsum("ik,kj->ij", down, values), across))


def _exact(
    target: Grid, source: Grid, cols: Floats, rows: Floats, near: float | None = None
) -> tuple[Floats, Floats] | tuple[None, None]:
    x, y = to_source(target, source, *np.meshgrid(cols, rows))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None, None
    return (x if near is None else contiguous(x, source.crs, near)), y


@functools.cache
def _nodes() -> Floats:
    """Chebyshev nodes of the first kind on 0..1."""
    angles = (2 * np.arange(_NODES) + 1) * np.pi / (2 * _NODES)
    return np.asarray((1 - np.cos(angles)) / 2)


def _weights(at: Floats, nodes: Floats) -> Floats:
    """The barycentric interpolation matrix `[len(at), nodes]` (Berrut and Trefethen 2004, eq. 5.4)."""
    angles = (2 * np.arange(len(nodes)) + 1) * np.pi / (2 * len(nodes))
    distance = at[:, None] - nodes
    hit = distance == 0
    ratio = (-1.0) ** np.arange(len(nodes)) * np.sin(angles) / np.where(hit, 1.0, distance)
    on_node = hit.any(axis=1)
    ratio[on_node] = hit[on_node]
    return np.asarray(ratio / ratio.sum(axis=1, keepdims=True))
