"""Geometries and the antimeridian: longitudes are a circle, and shapely's plane is not.

Everywhere `turn` is a full turn of longitude in the units of the CRS (360 for degrees). What lies in one turn
around zero is cut at its ends into several parts, as RFC 7946 (section 3.1.9) asks for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import shapely
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

__all__ = ["closed_slits", "crossing_split", "folded", "moved_near", "rejoined", "wraps_globe"]

Geometries = npt.NDArray[np.object_]

_NOISE = 1e-9


def wraps_globe(geometries: Sequence[BaseGeometry], turn: float | None) -> list[BaseGeometry]:
    """The geometries, and what they are a turn further west and east (the same places); without a turn just they."""
    shifts = (0.0,) if turn is None else (0.0, -turn, turn)
    return [translate(geometry, shift) if shift else geometry for shift in shifts for geometry in geometries]


def crossing_split(geometries: Geometries, turn: float) -> Geometries:
    """Projected outlines, given as longitudes and latitudes, whose edges jump from one end of the turn to the other.

    A ring is followed round the circle; one that ends a turn away from its start holds a pole and is closed
    along it. The results are valid and lie within half a turn of zero; geometries without a jump stay as they are.
    """
    xy, owner = shapely.get_coordinates(geometries, return_index=True)
    with np.errstate(invalid="ignore"):
        steps = np.diff(xy[:, 0])
    jumps = (np.abs(steps) > turn / 2) & (np.diff(owner) == 0) & np.isfinite(steps)
    out = geometries.copy()
    for i in np.unique(owner[1:][jumps]):
        if np.isfinite(shapely.bounds(geometries[i])).all():
            out[i] = _split(geometries[i], turn)
    return out


def closed_slits(projected: Geometries, extents: npt.NDArray[np.float64], turn: float) -> Geometries:
    """Projected geometries whose extents `[N, 4]` in longitude/latitude span a turn, made valid.

    Both their ends are one line on the ground: round a pole it is a slit from the outline to the pole.
    """
    spans = extents[:, 2] - extents[:, 0] >= turn * (1 - _NOISE)
    out = projected.copy()
    for i in np.flatnonzero(spans & ~shapely.is_valid(projected)):
        if np.isfinite(shapely.bounds(projected[i])).all():
            parts = shapely.get_parts(shapely.make_valid(projected[i]))
            out[i] = shapely.union_all(parts[shapely.get_dimensions(parts) == shapely.get_dimensions(projected[i])])
    return out


def folded(geometries: Geometries, turn: float) -> Geometries:
    """Geometries whose longitudes run past half a turn, cut and moved to within half a turn of zero."""
    bounds = shapely.bounds(geometries)
    with np.errstate(invalid="ignore"):
        past = np.isfinite(bounds).all(axis=1) & (np.abs(bounds[:, ::2]).max(axis=1) > turn / 2 * (1 + _NOISE))
    out = geometries.copy()
    for i in np.flatnonzero(past):
        out[i] = _fold(geometries[i], turn)
    return out


def moved_near(geometries: Geometries, middle: float, turn: float) -> Geometries:
    """Geometries moved by whole turns to the longitudes around `middle`.

    What is less than half a turn wide is moved in one piece, its parts on both sides of the antimeridian joined
    again; what is wider is cut half a turn from `middle`.
    """
    geometries = rejoined(geometries, turn)
    bounds = shapely.bounds(geometries)
    with np.errstate(invalid="ignore"):
        turns = np.round((middle - (bounds[:, 0] + bounds[:, 2]) / 2) / turn)
        wide = bounds[:, 2] - bounds[:, 0] > turn / 2
        out_of_reach = (bounds[:, 0] < middle - turn / 2) | (bounds[:, 2] > middle + turn / 2)
    out = geometries.copy()
    for i in np.flatnonzero(np.where(wide, out_of_reach, turns != 0) & np.isfinite(bounds).all(axis=1)):
        if wide[i]:
            out[i] = translate(_fold(translate(geometries[i], -middle), turn), middle)
        else:
            out[i] = translate(geometries[i], turns[i] * turn)
    return out


def rejoined(geometries: Geometries, turn: float) -> Geometries:
    """Multi-part geometries that touch both ends of the turn, their western parts moved on by a turn and joined.

    Left alone where the whole would still be half a turn wide or more (it goes round a pole).
    """
    bounds = shapely.bounds(geometries)
    end = turn / 2 * (1 - _NOISE)
    with np.errstate(invalid="ignore"):
        both = (bounds[:, 0] <= -end) & (bounds[:, 2] >= end) & (shapely.get_num_geometries(geometries) > 1)
    out = geometries.copy()
    for i in np.flatnonzero(both):
        parts = shapely.get_parts(geometries[i])
        west = shapely.bounds(parts)[:, 2] <= 0
        joined = shapely.union_all([translate(p, turn) if w else p for p, w in zip(parts, west, strict=True)])
        xmin, _, xmax, _ = joined.bounds
        if xmax - xmin < turn / 2:
            out[i] = joined
    return out


def _split(geometry: BaseGeometry, turn: float) -> BaseGeometry:
    if geometry.geom_type == "Polygon":
        holes = [_region(hole, turn) for hole in geometry.interiors]
        outer = _region(geometry.exterior, turn)
        return shapely.difference(outer, shapely.union_all(holes)) if holes else outer
    if geometry.geom_type == "LineString":
        return _fold(shapely.LineString(_followed(shapely.get_coordinates(geometry), turn)), turn)
    return shapely.union_all([_split(part, turn) for part in shapely.get_parts(geometry)])


def _region(ring: BaseGeometry, turn: float) -> BaseGeometry:
    """What a ring encloses, within half a turn of zero."""
    xy = _followed(shapely.get_coordinates(ring), turn)
    if abs(xy[-1, 0] - xy[0, 0]) > turn / 2:
        pole = np.copysign(turn / 4, xy[:, 1].mean())
        xy = np.concatenate([xy, [(xy[-1, 0], pole), (xy[0, 0], pole)]])
    return _fold(shapely.Polygon(xy), turn)


def _followed(xy: npt.NDArray[np.float64], turn: float) -> npt.NDArray[np.float64]:
    """The same points, each within half a turn of the one before."""
    steps = np.diff(xy[:, 0])
    steps -= turn * np.round(steps / turn)
    return np.column_stack([xy[0, 0] + np.concatenate([[0.0], np.cumsum(steps)]), xy[:, 1]])


def _fold(geometry: BaseGeometry, turn: float) -> BaseGeometry:
    """A geometry cut at every odd half turn, its pieces moved to within half a turn of zero."""
    geometry = shapely.make_valid(geometry)
    xmin, ymin, xmax, ymax = geometry.bounds
    dimension = shapely.get_dimensions(geometry)
    pieces = []
    for k in range(round(xmin / turn), round(xmax / turn) + 1):
        strip = shapely.box((k - 0.5) * turn, ymin - 1, (k + 0.5) * turn, ymax + 1)
        for piece in shapely.get_parts(shapely.intersection(geometry, strip)):
            if shapely.get_dimensions(piece) == dimension:
                pieces.append(translate(piece, -k * turn))
    # The grid (a tenth of a millimetre) heals cuts whose ends a turn's subtraction has moved by a last digit.
    return shapely.union_all(pieces, grid_size=_NOISE)
