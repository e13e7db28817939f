"""Geometries from whatever people hold: one way in, one clear refusal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely
from rasterio.features import geometry_mask
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import GeometryError
from rasteret_ml.geo.crs import LONLAT, crs_text
from rasteret_ml.geo.grid import Grid

__all__ = [
    "GeometryArray",
    "are_finite",
    "geometries_from",
    "object_array",
    "polygon_mask",
    "polygons_from",
    "unpack_geometries",
]


def polygon_mask(geometry: BaseGeometry, grid: Grid, *, all_touched: bool = False) -> npt.NDArray[np.bool_]:
    """Which pixels of `grid` lie in `geometry` (given in the grid's CRS), bool `[H, W]`.

    A pixel is inside when its centre is, or, with `all_touched`, when the geometry touches it: the rule of
    `rasterio.features.geometry_mask`, whose burn this is.
    """
    if geometry.is_empty or not shapely.box(*grid.bounds).intersects(shapely.box(*geometry.bounds)):
        return np.zeros(grid.shape, dtype=bool)
    inside = geometry_mask(
        [geometry], out_shape=grid.shape, transform=grid.transform, all_touched=all_touched, invert=True
    )
    return np.asarray(inside, dtype=bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometryArray:
    """Geometries and the CRS of their coordinates."""

    geometries: npt.NDArray[np.object_]
    """Shapely geometries `[N]`, none missing, none empty."""
    crs: str
    """CRS text."""
    table: gpd.GeoDataFrame | None = None
    """The table they came from, where they came from one."""

    def __len__(self) -> int:
        return len(self.geometries)


def geometries_from(source: Any, crs: Any = None) -> GeometryArray:
    """Read geometries of any kind.

    Args:
        source: A GeoDataFrame or GeoSeries; a GeoArrow or WKB array, chunked array or table (anything with
            `__arrow_c_array__`/`__arrow_c_stream__`); a shapely geometry; WKB bytes; a GeoJSON mapping
            (geometry, feature or collection); a bounding box of four numbers (xmin, ymin, xmax, ymax); a list
            of these; a path to a GeoParquet, GeoJSON or other vector file.
        crs: The CRS of the coordinates where `source` does not say it; else longitude/latitude. A CRS that
            contradicts the one in `source` is an error.

    Raises:
        GeometryError: nothing readable, a missing or empty geometry or one with coordinates that are no numbers (its
            position is named), or two CRSs.
    """
    values, own_crs, table = unpack_geometries(source)
    if own_crs is not None and crs is not None and crs_text(own_crs) != crs_text(crs):
        raise GeometryError(
            f"The geometries say they are in {crs_text(own_crs)}, but {crs_text(crs)} was given; drop one of them."
        )
    if not len(values):
        raise GeometryError("No geometries were given.")
    for bad, what in ((shapely.is_missing(values), "missing"), (shapely.is_empty(values), "empty")):
        if bad.any():
            raise GeometryError(f"Geometry {int(np.flatnonzero(bad)[0])} is {what}; drop it first.")
    finite = are_finite(values)
    if not finite.all():
        raise GeometryError(
            f"Geometry {int(np.argmin(finite))} has coordinates that are NaN or infinite; drop it first."
        )
    chosen = own_crs if own_crs is not None else crs
    return GeometryArray(geometries=values, crs=LONLAT if chosen is None else crs_text(chosen), table=table)


def are_finite(geometries: npt.NDArray[np.object_]) -> npt.NDArray[np.bool_]:
    """Which geometries `[N]` have nothing but finite coordinates (x, y)."""
    xy, owner = shapely.get_coordinates(geometries, return_index=True)
    good = np.ones(len(geometries), bool)
    good[owner[~np.isfinite(xy).all(axis=1)]] = False
    return good


def polygons_from(source: Any, crs: Any = None) -> GeometryArray:
    """`geometries_from`, refusing everything that has no area.

    Raises:
        GeometryError: a point, line or collection; the message says how to buffer it.
    """
    found = geometries_from(source, crs)
    kinds = shapely.get_type_id(found.geometries)
    bad = np.flatnonzero(~np.isin(kinds, (3, 6)))
    if len(bad):
        i = int(bad[0])
        raise GeometryError(
            f"Geometry {i} is a {found.geometries[i].geom_type}; a Polygon or MultiPolygon is needed. "
            "Give points and lines an area first, for example with `.buffer(distance)`."
        )
    return found


def unpack_geometries(source: Any) -> tuple[npt.NDArray[np.object_], Any, gpd.GeoDataFrame | None]:
    """Geometries as they come (also missing and empty ones), the CRS that they state, and their table if any.

    Raises:
        GeometryError: nothing readable.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(os.fspath(source))
    if isinstance(source, gpd.GeoDataFrame):
        if source._geometry_column_name not in source.columns:
            raise GeometryError(f"The GeoDataFrame has no geometry column; it has {list(source.columns)}.")
        return np.asarray(source.geometry.array, dtype=object), source.crs, source
    if isinstance(source, gpd.GeoSeries):
        return np.asarray(source.array, dtype=object), source.crs, None
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__"):
        return _from_arrow(source)
    if isinstance(source, Mapping) and source.get("type") == "FeatureCollection":
        features = source.get("features")
        if not isinstance(features, Sequence):
            raise GeometryError("A GeoJSON FeatureCollection without a list of features holds no geometries.")
        return object_array([_one(f, i) for i, f in enumerate(features)]), _geojson_crs(source), None
    if _is_single(source):
        return object_array([_one(source, 0)]), None, None
    if isinstance(source, Iterable):
        return object_array([_one(item, i) for i, item in enumerate(source)]), None, None
    raise _refusal(source, None)


def _read_file(path: str) -> gpd.GeoDataFrame:
    try:
        return gpd.read_parquet(path) if path.endswith((".parquet", ".geoparquet")) else gpd.read_file(path)
    except Exception as error:
        raise GeometryError(f"Cannot read geometries from {path}: {error}") from error


def _from_arrow(source: Any) -> tuple[npt.NDArray[np.object_], Any, gpd.GeoDataFrame | None]:
    if isinstance(source, pa.ChunkedArray):
        source = source.combine_chunks()
    if isinstance(source, pa.Array) and not isinstance(source, pa.ExtensionArray):
        if pa.types.is_binary(source.type) or pa.types.is_large_binary(source.type):
            return object_array([_one(item, i) for i, item in enumerate(source.to_pylist())]), None, None
        if pa.types.is_list(source.type) or pa.types.is_large_list(source.type):
            return _from_ragged(source), None, None
    try:
        if hasattr(source, "__arrow_c_stream__"):
            table = gpd.GeoDataFrame.from_arrow(source)
            return np.asarray(table.geometry.array, dtype=object), table.crs, table
        series = gpd.GeoSeries.from_arrow(source)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise GeometryError(
            f"This Arrow data has no geometry type that is known ({error}); give GeoArrow, or WKB in a binary column."
        ) from error
    return np.asarray(series.array, dtype=object), series.crs, None


def _from_ragged(array: Any) -> npt.NDArray[np.object_]:
    """Polygons or multipolygons from GeoArrow storage whose type name was lost on the way."""
    if array.null_count:
        raise GeometryError("The GeoArrow array has missing geometries; drop them first.")
    offsets, level = [], array
    kinds = {2: shapely.GeometryType.POLYGON, 3: shapely.GeometryType.MULTIPOLYGON}
    while pa.types.is_list(level.type) or pa.types.is_large_list(level.type):
        starts = level.offsets.to_numpy()
        offsets.append(starts - starts[0])
        level = level.flatten()
    if len(offsets) not in kinds or not (pa.types.is_struct(level.type) or pa.types.is_fixed_size_list(level.type)):
        raise GeometryError(
            f"An Arrow array of type {array.type} holds no polygons; polygons or multipolygons are needed."
        )
    if pa.types.is_struct(level.type):
        xy = np.column_stack([level.field("x").to_numpy(), level.field("y").to_numpy()])
    else:
        xy = level.flatten().to_numpy().reshape(len(level), -1)[:, :2]
    return object_array(list(shapely.from_ragged_array(kinds[len(offsets)], xy, tuple(reversed(offsets)))))


def _is_single(source: Any) -> bool:
    if isinstance(source, (BaseGeometry, bytes, bytearray, memoryview, Mapping)) or hasattr(
        source, "__geo_interface__"
    ):
        return True
    return _is_bbox(source)


def _is_bbox(source: Any) -> bool:
    if not isinstance(source, (tuple, list, np.ndarray)) or len(source) != 4:
        return False
    return all(isinstance(v, (int, float, np.integer, np.floating)) for v in source)


def _one(item: Any, position: int) -> BaseGeometry | None:
    try:
        if item is None or isinstance(item, BaseGeometry):
            return item
        if isinstance(item, (bytes, bytearray, memoryview)):
            return shapely.from_wkb(bytes(item))
        if _is_bbox(item):
            return _box(item)
        mapping = item if isinstance(item, Mapping) else getattr(item, "__geo_interface__", None)
        if isinstance(mapping, Mapping):
            return shape(mapping["geometry"] if mapping.get("type") == "Feature" else mapping)
    except GeometryError:
        raise
    except Exception as error:
        raise GeometryError(f"Geometry {position} cannot be read: {error}") from error
    raise _refusal(item, position)


def _box(values: Any) -> BaseGeometry:
    xmin, ymin, xmax, ymax = (float(v) for v in values)
    if not (xmin < xmax and ymin < ymax):
        raise GeometryError(
            f"A bounding box is (xmin, ymin, xmax, ymax) with xmin < xmax and ymin < ymax, not {tuple(values)}."
        )
    return shapely.box(xmin, ymin, xmax, ymax)


def _geojson_crs(source: Mapping[str, Any]) -> str | None:
    # GeoJSON 2008 allowed a "crs" member; RFC 7946 means longitude/latitude.
    stated = source.get("crs")
    if isinstance(stated, Mapping):
        stated = (stated.get("properties") or {}).get("name")
    return None if stated is None else str(stated)


def object_array(items: list[Any]) -> npt.NDArray[np.object_]:
    """A list as an object array `[N]`, its items untouched (numpy would unpack some)."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _refusal(item: Any, position: int | None) -> GeometryError:
    where = "" if position is None else f" at position {position}"
    return GeometryError(
        f"A {type(item).__name__}{where} is not a geometry; give polygons as GeoArrow, WKB, shapely, GeoJSON, "
        "a GeoDataFrame, or a bounding box (xmin, ymin, xmax, ymax)."
    )
