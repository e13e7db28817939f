"""Coordinate reference systems: one text for each CRS, cached transformers, always x before y.

A CRS is passed around as text: `EPSG:32633` if an authority has a code for it, otherwise WKT2. Text pickles, hashes
and compares at no cost; pyproj objects are slow at all three and stay in this file.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.antimeridian import close_slits, fold, move_near, rejoin, repeat_turns, split_crossings

Floats = npt.NDArray[np.float64]
Geometries = npt.NDArray[np.object_]
Bounds = tuple[float, float, float, float]

LONLAT = "EPSG:4326"  #: Longitude/latitude in degrees, longitude first (OGC:CRS84 axis order).

_DEGREES = 360.0
_MARGIN = 5.0  # Degrees around its area of use within which a projection still returns sensible coordinates.
_local = threading.local()


@functools.lru_cache(maxsize=256)
def pyproj_crs(text: str) -> pyproj.CRS:
    """Return the pyproj object of a CRS text; raise UsageError if it is none."""
    try:
        return pyproj.CRS.from_user_input(text)
    except pyproj.exceptions.CRSError as error:
        raise UsageError(
            f"A coordinate reference system must be an EPSG code, WKT or PROJ text, got {text!r} ({error})."
        ) from None


def crs_text(crs: Any) -> str:
    """Return the text of any CRS: an EPSG number, text, a pyproj or rasterio object; raise UsageError for others."""
    if isinstance(crs, (int, np.integer)) and not isinstance(crs, bool):
        crs = f"EPSG:{int(crs)}"
    if isinstance(crs, str):
        return _canonical(crs)
    if not hasattr(crs, "to_wkt"):
        raise UsageError(
            f"A coordinate reference system must be an EPSG code, text, or a pyproj or rasterio CRS, got {crs!r}."
        )
    return _canonical(crs.to_wkt())


@functools.lru_cache(maxsize=256)
def _canonical(text: str) -> str:
    crs = pyproj_crs(text)
    if crs.name == "WGS 84 (CRS84)":  # OGC:CRS84 differs from 4326 in axis order only; here x is always first
        return LONLAT
    authority = crs.to_authority(min_confidence=100)
    return ":".join(authority) if authority else crs.to_wkt()


@functools.lru_cache(maxsize=256)
def epsg_code(text: str | None) -> int | None:
    """Return the EPSG code of a CRS text, None if it has none."""
    if text is None:
        return None
    if text.startswith("EPSG:") and text[5:].isdigit():
        return int(text[5:])
    code = pyproj_crs(text).to_epsg(min_confidence=100)
    return None if code is None else int(code)


@functools.lru_cache(maxsize=1024)
def same_crs(a: str | None, b: str | None) -> bool:
    """Return whether two CRS texts mean the same system, apart from axis order."""
    if a is None or b is None or a == b:
        return a == b
    return bool(pyproj_crs(a).equals(pyproj_crs(b), ignore_axis_order=True))


@functools.lru_cache(maxsize=256)
def full_turn(text: str | None) -> float | None:
    """Return 360 degrees of longitude in the units of a geographic CRS, None for any other CRS."""
    if text is None:
        return None
    crs = pyproj_crs(text)
    if not crs.is_geographic or not crs.axis_info:
        return None
    radians = float(crs.axis_info[0].unit_conversion_factor)
    turn = 2 * np.pi / radians if radians > 0 else 360.0
    return float(round(turn, 9))  # a degree is a rounded number of radians


def _transformer(source: str, target: str) -> pyproj.Transformer:
    # One cache per thread: a pyproj transformer must not be shared between threads.
    cache: dict[tuple[str, str], pyproj.Transformer] = _local.__dict__.setdefault("transformers", {})
    key = (source, target)
    if key not in cache:
        try:
            cache[key] = pyproj.Transformer.from_crs(pyproj_crs(source), pyproj_crs(target), always_xy=True)
        except pyproj.exceptions.ProjError as error:
            raise UsageError(f"Coordinates cannot be transformed from CRS {source} to {target}: {error}.") from None
    return cache[key]


def transform_points(x: Floats, y: Floats, source: str, target: str) -> tuple[Floats, Floats]:
    """Return coordinates in `target`; infinite for points that it cannot express."""
    if same_crs(source, target):
        return x, y
    out_x, out_y = _transformer(source, target).transform(x, y)
    return np.asarray(out_x), np.asarray(out_y)


def transform_bounds(bounds: Bounds, source: str, target: str) -> Bounds:
    """Return bounds (xmin, ymin, xmax, ymax) in `target`; each edge is densified with 21 points.

    In a geographic target bounds that cross the antimeridian have xmin > xmax (RFC 7946, section 5.2), and bounds
    around a pole span all longitudes.
    """
    if same_crs(source, target):
        return bounds
    xmin, ymin, xmax, ymax = _transformer(source, target).transform_bounds(*bounds, densify_pts=21)
    return float(xmin), float(ymin), float(xmax), float(ymax)


def transform_geometries(
    geometries: Geometries, source: str, target: str, *, segments: int = 32, near: Bounds | None = None
) -> Geometries:
    """Return geometries `[N]` in `target`.

    In a geographic target, geometries that cross the antimeridian or hold a pole are cut at +-180 degrees into several
    parts and are valid; so are those with longitudes beyond +-180 (of a raster of 0..360). From a geographic CRS such
    parts are joined again before they are projected. Edges longer than 1/`segments` of a geometry's extent are
    densified first.

    `near` are the bounds in `target` that matter: what lies more than five times their size away is cut off first,
    because a polygon around half the world has no image in a UTM zone. In a geographic target geometries are moved by
    whole turns to the longitudes of `near`.
    """
    turn = full_turn(target)
    if not same_crs(source, target):
        geometries = _project(geometries, source, target, segments, near)
    if turn is None:
        return geometries
    if near is None or not np.isfinite(near).all():
        return fold(geometries, turn)
    return move_near(geometries, (near[0] + near[2]) / 2, turn)


def _project(geometries: Geometries, source: str, target: str, segments: int, near: Bounds | None) -> Geometries:
    source_turn, target_turn = full_turn(source), full_turn(target)
    if near is not None:
        geometries = _cut_far_parts(geometries, source, target, near)
    elif source_turn == _DEGREES and target_turn is None:
        geometries = _cut_to_area_of_use(geometries, target)
    if source_turn is not None and target_turn is None:
        geometries = rejoin(geometries, source_turn)
    extents = shapely.bounds(geometries)
    longest = np.maximum(extents[:, 2] - extents[:, 0], extents[:, 3] - extents[:, 1])
    dense = shapely.segmentize(geometries, np.where(longest > 0, longest / segments, 1.0))

    def project(points: Floats) -> Floats:
        return np.column_stack(transform_points(points[:, 0], points[:, 1], source, target))

    projected = np.asarray(shapely.transform(shapely.force_2d(dense), project), dtype=object)
    if source_turn is None and target_turn is not None:
        return split_crossings(projected, target_turn)
    if source_turn is not None and target_turn is None:
        return close_slits(projected, extents, source_turn)
    return projected


def _cut_to_area_of_use(geometries: Geometries, target: str) -> Geometries:
    """Cut geometries around half the globe or more to the area of use of a projected CRS: the rest has no image."""
    area = pyproj_crs(target).area_of_use
    extents = shapely.bounds(geometries)
    wide = extents[:, 2] - extents[:, 0] > _DEGREES / 2
    if area is None or not wide.any():
        return geometries
    east = area.east + _DEGREES if area.east < area.west else area.east
    west, east, south, north = area.west - _MARGIN, east + _MARGIN, area.south - _MARGIN, area.north + _MARGIN
    if east - west >= _DEGREES:
        west, east = -_DEGREES, _DEGREES
    box = shapely.box(west, max(south, -90), east, min(north, 90))
    cut = geometries.copy()
    for i in np.flatnonzero(wide):
        repeated = repeat_turns([shapely.make_valid(geometries[i])], _DEGREES if east - west < _DEGREES else None)
        cut[i] = shapely.intersection(shapely.union_all(repeated) if len(repeated) > 1 else repeated[0], box)
    return cut


def _cut_far_parts(geometries: Geometries, source: str, target: str, near: Bounds) -> Geometries:
    xmin, ymin, xmax, ymax = near
    reach = 5 * max(xmax - xmin, ymax - ymin)
    around = (xmin - reach, ymin - reach, xmax + reach, ymax + reach)
    try:
        xmin, ymin, xmax, ymax = transform_bounds(around, target, source)
    except pyproj.exceptions.ProjError:
        return geometries
    turn = full_turn(source)
    if turn is not None and xmin > xmax:
        xmax += turn
    box = shapely.box(xmin, ymin, xmax, ymax)
    if not np.isfinite(shapely.bounds(box)).all() or box.area == 0:
        return geometries
    if turn is not None:  # longitudes a turn apart are the same place
        box = shapely.union_all([shapely.box(xmin + k * turn, ymin, xmax + k * turn, ymax) for k in (-1, 0, 1)])
    far = ~shapely.covers(box, geometries)
    cut = geometries.copy()
    cut[far] = shapely.intersection(shapely.make_valid(geometries[far]), box)
    return cut
