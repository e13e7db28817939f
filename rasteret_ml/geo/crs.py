"""Coordinate reference systems: one text per CRS, cached transformers, x before y always.

A CRS travels as text: `EPSG:32633` where an authority has a code for it, otherwise WKT2. Text pickles,
hashes and compares at no cost; pyproj objects do none of that well and stay in this file.
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
from rasteret_ml.geo.antimeridian import closed_slits, crossing_split, folded, moved_near, rejoined, wraps_globe

__all__ = [
    "LONLAT",
    "crs_text",
    "epsg_code",
    "full_turn",
    "pyproj_crs",
    "same_crs",
    "transform_bounds",
    "transform_geometries",
    "transform_points",
]

LONLAT = "EPSG:4326"
"""Longitude/latitude in degrees, longitude first (OGC:CRS84 axis order)."""

_DEGREES = 360.0
_MARGIN = 5.0
"""Degrees around its area of use in which a projection still gives sensible coordinates."""
_local = threading.local()


@functools.lru_cache(maxsize=256)
def pyproj_crs(text: str) -> pyproj.CRS:
    """The pyproj object for a CRS text."""
    try:
        return pyproj.CRS.from_user_input(text)
    except pyproj.exceptions.CRSError as error:
        raise UsageError(f"Not a coordinate reference system: {text!r} ({error}).") from None


def crs_text(crs: Any) -> str:
    """The text of any CRS: an EPSG number, a string, WKT, a pyproj or rasterio object.

    Raises:
        UsageError: `crs` is not a CRS.
    """
    if isinstance(crs, bool) or crs is None:
        raise UsageError(f"Not a coordinate reference system: {crs!r}.")
    if isinstance(crs, (int, np.integer)):
        return _canonical(f"EPSG:{int(crs)}")
    if isinstance(crs, str):
        return _canonical(crs)
    to_wkt = getattr(crs, "to_wkt", None)
    if to_wkt is None:
        raise UsageError(f"Not a coordinate reference system: {crs!r}.")
    return _canonical(to_wkt())


@functools.lru_cache(maxsize=256)
def _canonical(text: str) -> str:
    crs = pyproj_crs(text)
    if crs.name == "WGS 84 (CRS84)":  # OGC:CRS84 differs from 4326 in axis order only; here x is always first
        return LONLAT
    authority = crs.to_authority(min_confidence=100)
    return ":".join(authority) if authority else crs.to_wkt()


@functools.lru_cache(maxsize=256)
def epsg_code(text: str | None) -> int | None:
    """The EPSG number of a CRS text, None where it has none."""
    if text is None:
        return None
    if text.startswith("EPSG:") and text[5:].isdigit():
        return int(text[5:])
    code = pyproj_crs(text).to_epsg(min_confidence=100)
    return None if code is None else int(code)


@functools.lru_cache(maxsize=1024)
def same_crs(a: str | None, b: str | None) -> bool:
    """Whether two CRS texts mean the same system (axis order aside)."""
    if a == b:
        return True
    if a is None or b is None:
        return False
    return bool(pyproj_crs(a).equals(pyproj_crs(b), ignore_axis_order=True))


@functools.lru_cache(maxsize=256)
def full_turn(text: str | None) -> float | None:
    """What 360 degrees of longitude are in the units of a geographic CRS; None for every other CRS."""
    if text is None:
        return None
    crs = pyproj_crs(text)
    if not crs.is_geographic or not crs.axis_info:
        return None
    radians = float(crs.axis_info[0].unit_conversion_factor)
    turn = 2 * np.pi / radians if radians > 0 else 360.0
    return float(round(turn, 9))  # a degree is a rounded number of radians


def _transformer(source: str, target: str) -> pyproj.Transformer:
    # One cache a thread: pyproj transformers must not be shared between threads.
    cache: dict[tuple[str, str], pyproj.Transformer] = _local.__dict__.setdefault("transformers", {})
    key = (source, target)
    if key not in cache:
        try:
            cache[key] = pyproj.Transformer.from_crs(pyproj_crs(source), pyproj_crs(target), always_xy=True)
        except pyproj.exceptions.ProjError as error:
            raise UsageError(f"There is no way from CRS {source} to {target}: {error}.") from None
    return cache[key]


def transform_points(
    x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], source: str, target: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Coordinates in `target`; where there is no answer they are infinite."""
    if same_crs(source, target):
        return x, y
    out_x, out_y = _transformer(source, target).transform(x, y)
    return np.asarray(out_x), np.asarray(out_y)


def transform_bounds(
    bounds: tuple[float, float, float, float], source: str, target: str
) -> tuple[float, float, float, float]:
    """Bounds (xmin, ymin, xmax, ymax) in `target`, from edges densified by 21 points each.

    In a geographic target xmin > xmax where the bounds cross the antimeridian (RFC 7946, section 5.2), and a pole
    inside makes them span all longitudes.
    """
    if same_crs(source, target):
        return bounds
    xmin, ymin, xmax, ymax = _transformer(source, target).transform_bounds(*bounds, densify_pts=21)
    return float(xmin), float(ymin), float(xmax), float(ymax)


def transform_geometries(
    geometries: npt.NDArray[np.object_],
    source: str,
    target: str,
    *,
    segments: int = 32,
    near: tuple[float, float, float, float] | None = None,
) -> npt.NDArray[np.object_]:
    """Geometries in `target`; edges longer than 1/`segments` of each extent are densified first.

    In a geographic target what crosses the antimeridian, or holds a pole, is cut at +-180 degrees into several
    parts and is valid; longitudes past +-180 (a raster of 0..360) are moved back likewise. From a geographic CRS
    such parts are joined again before they are projected.

    `near` are the bounds, in `target`, that matter: what lies more than five times their size away from them is
    cut off before, because a polygon around half the world has no image in a UTM zone. In a geographic target
    geometries are moved by whole turns to the longitudes of `near`.
    """
    turn = full_turn(target)
    if not same_crs(source, target):
        geometries = _projected(geometries, source, target, segments, near)
    if turn is None:
        return geometries
    if near is None or not np.isfinite(near).all():
        return folded(geometries, turn)
    return moved_near(geometries, (near[0] + near[2]) / 2, turn)


def _projected(
    geometries: npt.NDArray[np.object_],
    source: str,
    target: str,
    segments: int,
    near: tuple[float, float, float, float] | None,
) -> npt.NDArray[np.object_]:
    source_turn, target_turn = full_turn(source), full_turn(target)
    if near is not None:
        geometries = _cut_far_parts(geometries, source, target, near)
    elif source_turn == _DEGREES and target_turn is None:
        geometries = _cut_to_area_of_use(geometries, target)
    if source_turn is not None and target_turn is None:
        geometries = rejoined(geometries, source_turn)
    extents = shapely.bounds(geometries)
    longest = np.maximum(extents[:, 2] - extents[:, 0], extents[:, 3] - extents[:, 1])
    dense = shapely.segmentize(geometries, np.where(longest > 0, longest / segments, 1.0))

    def project(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.column_stack(transform_points(points[:, 0], points[:, 1], source, target))

    found = np.asarray(shapely.transform(shapely.force_2d(dense), project), dtype=object)
    if source_turn is None and target_turn is not None:
        return crossing_split(found, target_turn)
    if source_turn is not None and target_turn is None:
        return closed_slits(found, extents, source_turn)
    return found


def _cut_to_area_of_use(geometries: npt.NDArray[np.object_], target: str) -> npt.NDArray[np.object_]:
    """Of geometries round much of the globe, what a projected CRS is made for (and a margin): the rest has no image."""
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
    cut[wide] = [
        shapely.intersection(shapely.union_all(wraps_globe([whole], _DEGREES)), box)
        if east - west < _DEGREES
        else shapely.intersection(whole, box)
        for whole in shapely.make_valid(geometries[wide])
    ]
    return cut


def _cut_far_parts(
    geometries: npt.NDArray[np.object_], source: str, target: str, near: tuple[float, float, float, float]
) -> npt.NDArray[np.object_]:
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
    if turn is not None:  # the same place may be written with longitudes a turn apart
        box = shapely.union_all([shapely.box(xmin + k * turn, ymin, xmax + k * turn, ymax) for k in (-1, 0, 1)])
    far = ~shapely.covers(box, geometries)
    cut = geometries.copy()
    cut[far] = shapely.intersection(shapely.make_valid(geometries[far]), box)
    return cut
