"""Cut, join and move geometries at the antimeridian.

Longitude is a circle, but shapely computes on a plane and pyproj projects vertex by vertex: a polygon from 179 to -179
degrees spans the whole world for both, one around a pole has no area at the pole, and longitudes of a raster of 0..360
miss the same places at -180..180.

A `turn` is a full turn of longitude in the units of the CRS (360 for degrees). Results within half a turn of zero are
cut at +-turn / 2 into several parts, as RFC 7946 (section 3.1.9) requires.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import shapely
from shapely.affinity import translate
from shapely.geometry.base import BaseGeometry

Geometries = npt.NDArray[np.object_]

_NOISE = 1e-9


def repeat_turns(geometries: Sequence[BaseGeometry], turn: float | None) -> list[BaseGeometry]:
    """Return the geometries, then the same a turn further west, then east; without a turn only the geometries."""
    shifts = (0.0,) if turn is None else (0.0, -turn, turn)
    return [translate(geometry, shift) if shift else geometry for shift in shifts for geometry in geometries]


def split_crossings(geometries: Geometries, turn: float) -> Geometries:
    """Split projected outlines, given in longitude/latitude, whose edges jump from one end of the turn to the other.

    A ring is followed around the circle; one that ends a turn away from its start holds a pole and is closed along it.
    The results are valid and within half a turn of zero; geometries without a jump are returned unchanged.
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


def close_slits(projected: Geometries, extents: npt.NDArray[np.float64], turn: float) -> Geometries:
    """Make projected geometries valid whose extents in longitude/latitude `[N, 4]` span a turn.

    Their two ends are one line on the earth: around a pole it is a slit from the outline to the pole.
    """
    spans = extents[:, 2] - extents[:, 0] >= turn * (1 - _NOISE)
    out = projected.copy()
    for i in np.flatnonzero(spans & ~shapely.is_valid(projected)):
        if np.isfinite(shapely.bounds(projected[i])).all():
            parts = shapely.get_parts(shapely.make_valid(projected[i]))
            out[i] = shapely.union_all(parts[shapely.get_dimensions(parts) == shapely.get_dimensions(projected[i])])
    return out


def fold(geometries: Geometries, turn: float) -> Geometries:
    """Cut geometries whose longitudes exceed half a turn, and move the parts to within half a turn of zero."""
    bounds = shapely.bounds(geometries)
    with np.errstate(invalid="ignore"):
        past = np.isfinite(bounds).all(axis=1) & (np.abs(bounds[:, ::2]).max(axis=1) > turn / 2 * (1 + _NOISE))
    out = geometries.copy()
    for i in np.flatnonzero(past):
        out[i] = _fold(geometries[i], turn)
    return out


def move_near(geometries: Geometries, centre: float, turn: float) -> Geometries:
    """Move geometries by whole turns to the longitudes around `centre`.

    A geometry less than half a turn wide is moved in one piece, its parts on both sides of the antimeridian joined; a
    wider one is cut half a turn from `centre`.
    """
    geometries = rejoin(geometries, turn)
    bounds = shapely.bounds(geometries)
    with np.errstate(invalid="ignore"):
        turns = np.round((centre - (bounds[:, 0] + bounds[:, 2]) / 2) / turn)
        wide = bounds[:, 2] - bounds[:, 0] > turn / 2
        too_far = (bounds[:, 0] < centre - turn / 2) | (bounds[:, 2] > centre + turn / 2)
    out = geometries.copy()
    for i in np.flatnonzero(np.where(wide, too_far, turns != 0) & np.isfinite(bounds).all(axis=1)):
        if wide[i]:
            out[i] = translate(_fold(translate(geometries[i], -centre), turn), centre)
        else:
            out[i] = translate(geometries[i], turns[i] * turn)
    return out


def rejoin(geometries: Geometries, turn: float) -> Geometries:
    """Join multi-part geometries that touch both ends of the turn: the western parts are moved east by a turn.

    A geometry that would still be half a turn wide or more (one around a pole) is returned unchanged.
    """
    bounds = shapely.bounds(geometries)
    end = turn / 2 * (1 - _NOISE)
    with np.errstate(invalid="ignore"):
        both = (bounds[:, 0] <= -end) & (bounds[:, 2] >= end) & (shapely.get_num_geometries(geometries) > 1)
    out = geometries.copy()
    for i in np.flatnonzero(both):
        parts = shapely.get_parts(geometries[i])
        joined = shapely.union_all([translate(part, turn) if part.bounds[2] <= 0 else part for part in parts])
        xmin, _, xmax, _ = joined.bounds
        if xmax - xmin < turn / 2:
            out[i] = joined
    return out


def _split(geometry: BaseGeometry, turn: float) -> BaseGeometry:
    if geometry.geom_type == "Polygon":
        holes = [_enclosed(hole, turn) for hole in geometry.interiors]
        outer = _enclosed(geometry.exterior, turn)
        return shapely.difference(outer, shapely.union_all(holes)) if holes else outer
    if geometry.geom_type == "LineString":
        return _fold(shapely.LineString(_unwrap(shapely.get_coordinates(geometry), turn)), turn)
    return shapely.union_all([_split(part, turn) for part in shapely.get_parts(geometry)])


def _enclosed(ring: BaseGeometry, turn: float) -> BaseGeometry:
    """The polygon that a ring encloses, within half a turn of zero."""
    xy = _unwrap(shapely.get_coordinates(ring), turn)
    if abs(xy[-1, 0] - xy[0, 0]) > turn / 2:
        pole = np.copysign(turn / 4, xy[:, 1].mean())
        xy = np.concatenate([xy, [(xy[-1, 0], pole), (xy[0, 0], pole)]])
    return _fold(shapely.Polygon(xy), turn)


def _unwrap(xy: npt.NDArray[np.float64], turn: float) -> npt.NDArray[np.float64]:
    """The same points, each within half a turn of the one before."""
    steps = np.diff(xy[:, 0])
    steps -= turn * np.round(steps / turn)
    return np.column_stack([xy[0, 0] + np.concatenate([[0.0], np.cumsum(steps)]), xy[:, 1]])


def _fold(geometry: BaseGeometry, turn: float) -> BaseGeometry:
    """Cut a geometry at every odd half turn, and move the parts to within half a turn of zero."""
    geometry = shapely.make_valid(geometry)
    xmin, ymin, xmax, ymax = geometry.bounds
    dimension = shapely.get_dimensions(geometry)
    pieces = []
    for k in range(round(xmin / turn), round(xmax / turn) + 1):
        strip = shapely.box((k - 0.5) * turn, ymin - 1, (k + 0.5) * turn, ymax + 1)
        parts = shapely.get_parts(shapely.intersection(geometry, strip))
        pieces += [translate(part, -k * turn) for part in parts[shapely.get_dimensions(parts) == dimension]]
    # The grid (a tenth of a millimetre) heals cuts whose ends differ by a last digit after the subtraction of a turn.
    return shapely.union_all(pieces, grid_size=_NOISE)
