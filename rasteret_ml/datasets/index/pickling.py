"""Arrays and indexes of very many records, made small for the way to a worker."""

from __future__ import annotations

from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

__all__ = ["pack_array", "pack_index", "unpack_array", "unpack_index"]

Pickled = tuple[Any, ...]
"""A kind, and what is needed to make the array again."""

_POLYGON = 3


def pack_array(array: npt.NDArray[Any]) -> Pickled:
    """An array as little as makes it again, bit for bit: runs and repeats as such, whole numbers as integers."""
    if array.ndim == 2:
        return "columns", [pack_array(np.ascontiguousarray(column)) for column in array.T], len(array)
    if len(array) < 2 or array.dtype.kind not in "iufM" or array.dtype.itemsize not in (4, 8):
        return "plain", array
    bits = array.view(np.int64 if array.dtype.itemsize == 8 else np.int32)
    steps = np.diff(bits)
    if (steps == steps[0]).all() and (steps[0] == 0 or array.dtype.kind in "iu"):
        return "run", array[:1].copy(), int(steps[0]), len(array)
    if array.dtype == np.float64:
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int32)
        if (whole.astype(np.float64).view(np.int64) == bits).all():
            return "whole", whole
    return "plain", array


def unpack_array(packed: Pickled) -> npt.NDArray[Any]:
    """The inverse of `pack_array`."""
    kind, *rest = packed
    if kind == "columns":
        columns, rows = rest
        found = [unpack_array(column) for column in columns]
        return np.stack(found, axis=1) if found else np.zeros((rows, 0))
    if kind == "run":
        first, step, count = rest
        whole = first.view(np.int64 if first.dtype.itemsize == 8 else np.int32)[0] + step * np.arange(count)
        bits: npt.NDArray[Any] = whole.astype(np.int64 if first.dtype.itemsize == 8 else np.int32)
        return bits.view(first.dtype)
    array: npt.NDArray[Any] = rest[0]
    return array.astype(np.float64) if kind == "whole" else array


def pack_index(index: gpd.GeoDataFrame) -> Pickled:
    """A TorchGeo index without its objects; other frames, and other columns than numbers, travel as they are."""
    times = index.index
    plain = isinstance(times, pd.IntervalIndex) and times.left.tz is None if len(index) else False
    names = [name for name in index.columns if name != index.geometry.name]
    if not plain or any(index[name].dtype.kind not in "iuf" for name in names) or index.attrs:
        return "frame", index
    left, right = times.left.to_numpy(), times.right.to_numpy()
    columns = [(name, pack_array(index[name].to_numpy())) for name in names]
    lasting = right.view(np.int64) - left.view(np.int64)  # one number where all are instants
    place = int(index.columns.get_loc(index.geometry.name))
    shapes = _pack_shapes(np.asarray(index.geometry, dtype=object))
    crs = None if index.crs is None else index.crs.to_wkt()
    span = pack_array(left), pack_array(lasting), times.closed, times.name
    return "index", columns, index.geometry.name, place, shapes, crs, span


def unpack_index(packed: Pickled) -> gpd.GeoDataFrame:
    """The inverse of `pack_index`."""
    kind, *rest = packed
    if kind == "frame":
        return rest[0]
    columns, name, place, shapes, crs, (left, lasting, closed, title) = rest
    starts = unpack_array(left)
    ends = (starts.view(np.int64) + unpack_array(lasting)).view(starts.dtype)
    times = pd.IntervalIndex.from_arrays(pd.DatetimeIndex(starts), pd.DatetimeIndex(ends), closed=closed, name=title)
    data = [(column, unpack_array(values)) for column, values in columns]
    data.insert(place, (name, _unpack_shapes(shapes)))
    return gpd.GeoDataFrame(dict(data), geometry=name, crs=crs, index=times)


def _pack_shapes(shapes: npt.NDArray[np.object_]) -> Pickled:
    bounds = shapely.bounds(shapes)
    boxes = (shapely.get_type_id(shapes) == _POLYGON) & (shapely.get_num_coordinates(shapes) == 5)
    boxes[boxes] = shapely.equals_exact(shapes[boxes], shapely.box(*bounds[boxes].T))
    others = np.flatnonzero(~boxes)
    return pack_array(bounds[boxes]), others, shapely.to_wkb(shapes[others]), len(shapes)


def _unpack_shapes(packed: Pickled) -> npt.NDArray[np.object_]:
    bounds, others, wkb, count = packed
    shapes = np.empty(count, dtype=object)
    boxes = np.ones(count, bool)
    boxes[others] = False
    shapes[boxes] = shapely.box(*unpack_array(bounds).reshape(-1, 4).T)
    shapes[others] = shapely.from_wkb(wkb)
    return shapes
