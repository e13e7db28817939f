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

__all__ = [
    "LONLAT",
    "crs_text",
    "epsg_code",
    "pyproj_crs",
    "same_crs",
    "transform_bounds",
    "transform_geometries",
    "transform_points",
]

LONLAT = "EPSG:4326"
"""Longitude/latitude in degrees, longitude first (OGC:CRS84 axis order)."""

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


def _transformer(source: str, target: str) -> pyproj.Transformer:
    # One cache a thread: pyproj transformers must not be shared between threads.
    cache: dict[tuple[str, str], pyproj.Transformer] = _local.__dict__.setdefault("transformers", {})
    key = (source, target)
    if key not in cache:
        cache[key] = pyproj.Transformer.from_crs(pyproj_crs(source), pyproj_crs(target), always_xy=True)
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
    """Bounds (xmin, ymin, xmax, ymax) in `target`, from edges densified by 21 points each."""
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

    `near` are the bounds, in `target`, that matter: what lies more than five times their size away from them is
    cut off before, because a polygon around half the world has no image in a UTM zone.
    """
    if same_crs(source, target):
        return geometries
    if near is not None:
        geometries = _cut_far_parts(geometries, source, target, near)
    extents = shapely.bounds(geometries)
    longest = np.maximum(extents[:, 2] - extents[:, 0], extents[:, 3] - extents[:, 1])
    dense = shapely.segmentize(geometries, np.where(longest > 0, longest / segments, 1.0))

    def project(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.column_stack(transform_points(points[:, 0], points[:, 1], source, target))

    return np.asarray(shapely.transform(shapely.force_2d(dense), project), dtype=object)


def _cut_far_parts(
    geometries: npt.NDArray[np.object_], source: str, target: str, near: tuple[float, float, float, float]
) -> npt.NDArray[np.object_]:
    xmin, ymin, xmax, ymax = near
    reach = 5 * max(xmax - xmin, ymax - ymin)
    around = (xmin - reach, ymin - reach, xmax + reach, ymax + reach)
    try:
        box = shapely.box(*transform_bounds(around, target, source))
    except pyproj.exceptions.ProjError:
        return geometries
    if not np.isfinite(shapely.bounds(box)).all() or box.area == 0:
        return geometries
    far = ~shapely.covers(box, geometries)
    cut = geometries.copy()
    cut[far] = shapely.intersection(shapely.make_valid(geometries[far]), box)
    return cut
