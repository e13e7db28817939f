"""Read geometries from what people have (GeoArrow, WKB, GeoJSON, shapely, GeoPandas, files), and burn polygon masks."""

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

Geometries = npt.NDArray[np.object_]


def polygon_mask(geometry: BaseGeometry, grid: Grid, *, all_touched: bool = False) -> npt.NDArray[np.bool_]:
    """Return which pixels of `grid` lie in `geometry` (given in the grid's CRS), bool `[H, W]`.

    A pixel is inside if its centre is, or with `all_touched` if the geometry touches it:
    `rasterio.features.geometry_mask`, which is skipped for a geometry beside the grid.
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

    geometries: Geometries  #: Shapely geometries `[N]`, none missing, none empty.
    crs: str  #: CRS text.
    table: gpd.GeoDataFrame | None = None  #: The table that they came from, if any.

    def __len__(self) -> int:
        return len(self.geometries)


def geometries_from(source: Any, crs: Any = None) -> GeometryArray:
    """Read geometries of any kind.

    Args:
        source: A GeoDataFrame or GeoSeries; a GeoArrow or WKB array, chunked array or table (anything with
            `__arrow_c_array__` or `__arrow_c_stream__`); a shapely geometry; WKB bytes; a GeoJSON mapping (geometry,
            feature or collection); a bounding box (xmin, ymin, xmax, ymax); a list of these; or a path to a GeoParquet,
            GeoJSON or other vector file.
        crs: CRS of the coordinates if `source` has none; default longitude/latitude.

    Raises:
        GeometryError: No geometries, a missing or empty one or one with NaN or infinite coordinates (the message says
            which), one that cannot be read, or a `crs` that contradicts the one of `source`.
    """
    values, own_crs, table = unpack_geometries(source)
    if own_crs is not None and crs is not None and crs_text(own_crs) != crs_text(crs):
        raise GeometryError(f"crs must be that of the geometries, {crs_text(own_crs)}, or None, got {crs_text(crs)}.")
    if not len(values):
        raise GeometryError("No geometries were given; give at least one.")
    for bad, problem in (
        (shapely.is_missing(values), "is missing"),
        (shapely.is_empty(values), "is empty"),
        (~are_finite(values), "has coordinates that are NaN or infinite"),
    ):
        if bad.any():
            raise GeometryError(f"Geometry {int(np.argmax(bad))} {problem}; drop it first.")
    crs = crs if own_crs is None else own_crs
    return GeometryArray(geometries=values, crs=LONLAT if crs is None else crs_text(crs), table=table)


def are_finite(geometries: Geometries) -> npt.NDArray[np.bool_]:
    """Return which geometries `[N]` have only finite coordinates (x, y)."""
    xy, owner = shapely.get_coordinates(geometries, return_index=True)
    finite = np.ones(len(geometries), bool)
    finite[owner[~np.isfinite(xy).all(axis=1)]] = False
    return finite


def polygons_from(source: Any, crs: Any = None) -> GeometryArray:
    """Read polygons and multipolygons, as `geometries_from`; other types raise GeometryError too."""
    array = geometries_from(source, crs)
    bad = np.flatnonzero(~np.isin(shapely.get_type_id(array.geometries), (3, 6)))
    if len(bad):
        raise GeometryError(
            f"Geometry {bad[0]} is a {array.geometries[bad[0]].geom_type}; it must be a Polygon or MultiPolygon. Give "
            "points and lines an area first, for example with `.buffer(distance)`."
        )
    return array


def unpack_geometries(source: Any) -> tuple[Geometries, Any, gpd.GeoDataFrame | None]:
    """Return geometries as they are (also missing and empty ones), their own CRS, and their table if any.

    Raise GeometryError if `source` cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _read_file(os.fspath(source))
    if isinstance(source, gpd.GeoDataFrame):
        if source._geometry_column_name not in source.columns:
            raise GeometryError(f"A GeoDataFrame must have a geometry column, got columns {list(source.columns)}.")
        return np.asarray(source.geometry.array, dtype=object), source.crs, source
    if isinstance(source, gpd.GeoSeries):
        return np.asarray(source.array, dtype=object), source.crs, None
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__"):
        return _from_arrow(source)
    if isinstance(source, Mapping) and source.get("type") == "FeatureCollection":
        features = source.get("features")
        if not isinstance(features, Sequence):
            raise GeometryError("A GeoJSON FeatureCollection must have a list of features.")
        return _parse_all(features), _geojson_crs(source), None
    is_single = isinstance(source, (BaseGeometry, bytes, bytearray, memoryview, Mapping)) or _is_bbox(source)
    if is_single or hasattr(source, "__geo_interface__"):
        return _parse_all([source]), None, None
    if isinstance(source, Iterable):
        return _parse_all(source), None, None
    raise _not_a_geometry(source)


def _read_file(path: str) -> gpd.GeoDataFrame:
    try:
        return gpd.read_parquet(path) if path.endswith((".parquet", ".geoparquet")) else gpd.read_file(path)
    except Exception as error:
        raise GeometryError(f"Cannot read geometries from {path}: {error}") from error


def _from_arrow(source: Any) -> tuple[Geometries, Any, gpd.GeoDataFrame | None]:
    if isinstance(source, pa.ChunkedArray):
        source = source.combine_chunks()
    if isinstance(source, pa.Array) and not isinstance(source, pa.ExtensionArray):
        if pa.types.is_binary(source.type) or pa.types.is_large_binary(source.type):
            return _parse_all(source.to_pylist()), None, None
        if pa.types.is_list(source.type) or pa.types.is_large_list(source.type):
            return _from_ragged(source), None, None
    try:
        if hasattr(source, "__arrow_c_stream__"):
            table = gpd.GeoDataFrame.from_arrow(source)
            return np.asarray(table.geometry.array, dtype=object), table.crs, table
        series = gpd.GeoSeries.from_arrow(source)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise GeometryError(f"Arrow data must be GeoArrow, or WKB in a binary column ({error}).") from error
    return np.asarray(series.array, dtype=object), series.crs, None


def _from_ragged(array: Any) -> Geometries:
    """Polygons or multipolygons from GeoArrow storage that has lost its extension type."""
    if array.null_count:
        raise GeometryError("The GeoArrow array has missing geometries; drop them first.")
    offsets, level = [], array
    kinds = {2: shapely.GeometryType.POLYGON, 3: shapely.GeometryType.MULTIPOLYGON}
    while pa.types.is_list(level.type) or pa.types.is_large_list(level.type):
        starts = level.offsets.to_numpy()
        offsets.append(starts - starts[0])
        level = level.flatten()
    is_struct = pa.types.is_struct(level.type)
    if len(offsets) not in kinds or not (is_struct or pa.types.is_fixed_size_list(level.type)):
        raise GeometryError(f"An Arrow array of lists must hold polygons or multipolygons, got {array.type}.")
    if is_struct:
        xy = np.column_stack([level.field("x").to_numpy(), level.field("y").to_numpy()])
    else:
        xy = level.flatten().to_numpy().reshape(len(level), -1)[:, :2]
    return object_array(list(shapely.from_ragged_array(kinds[len(offsets)], xy, tuple(reversed(offsets)))))


def _is_bbox(source: Any) -> bool:
    if not isinstance(source, (tuple, list, np.ndarray)) or len(source) != 4:
        return False
    return all(isinstance(v, (int, float, np.integer, np.floating)) for v in source)


def _parse_all(items: Iterable[Any]) -> Geometries:
    geometries = []
    for position, item in enumerate(items):
        try:
            geometries.append(_parse(item))
        except GeometryError as error:
            raise GeometryError(f"Geometry {position}: {error}") from None
        except Exception as error:
            raise GeometryError(f"Geometry {position} cannot be read: {error}") from error
    return object_array(geometries)


def _parse(item: Any) -> BaseGeometry | None:
    """One geometry; None stays None."""
    if item is None or isinstance(item, BaseGeometry):
        return item
    if isinstance(item, (bytes, bytearray, memoryview)):
        return shapely.from_wkb(bytes(item))
    if _is_bbox(item):
        xmin, ymin, xmax, ymax = (float(v) for v in item)
        if not (xmin < xmax and ymin < ymax):
            raise GeometryError(
                f"A bounding box (xmin, ymin, xmax, ymax) must have xmin < xmax and ymin < ymax, got {tuple(item)}."
            )
        return shapely.box(xmin, ymin, xmax, ymax)
    mapping = item if isinstance(item, Mapping) else getattr(item, "__geo_interface__", None)
    if not isinstance(mapping, Mapping):
        raise _not_a_geometry(item)
    return shape(mapping["geometry"] if mapping.get("type") == "Feature" else mapping)


def _geojson_crs(source: Mapping[str, Any]) -> str | None:
    # GeoJSON 2008 had a "crs" member; RFC 7946 is always longitude/latitude.
    crs = source.get("crs")
    if isinstance(crs, Mapping):
        crs = (crs.get("properties") or {}).get("name")
    return None if crs is None else str(crs)


def object_array(items: list[Any]) -> Geometries:
    """Return a list as an object array `[N]` without unpacking its items, as numpy would."""
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def _not_a_geometry(item: Any) -> GeometryError:
    return GeometryError(
        f"A {type(item).__name__} is not a geometry; give polygons as GeoArrow, WKB, shapely, GeoJSON, a GeoDataFrame, "
        "or a bounding box (xmin, ymin, xmax, ymax)."
    )
