"""Convert chips to xarray and GeoPandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from rasteret_ml.geo.crs import pyproj_crs
from rasteret_ml.geo.geometries import GeometryArray
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.jobs import bounding_window
from rasteret_ml.raster.plan import fill_value
from rasteret_ml.raster.raster_info import RasterInfo


def to_xarray(info: RasterInfo, chips: Sequence[Chip | None]) -> xr.Dataset:
    """Return one Dataset that spans all chips of a record: variables `[time, y, x]` named by band.

    Invalid pixels and pixels outside all geometries hold nodata, or NaN if the file declares none. Coordinates are
    pixel centres; `spatial_ref` holds the CRS and transform by the CF convention, as rioxarray reads it.
    """
    present = [chip for chip in chips if chip is not None]
    grid, windows = _mosaic_grid(present)
    variables = {}
    for c, band in enumerate(present[0].bands):
        nodata = present[0].nodata[c]
        data = np.full(grid.shape, fill_value(nodata, present[0].data.dtype), present[0].data.dtype)
        filled = np.zeros(grid.shape, bool)
        for chip, window in zip(present, windows, strict=True):
            shown = chip.inside & chip.valid[c]
            data[window.slices][shown] = chip.data[c][shown]
            filled[window.slices] |= shown
        attrs: dict[str, Any] = {} if nodata is None else {"_FillValue": nodata}
        attrs["grid_mapping"] = "spatial_ref"
        variables[band] = xr.Variable(("time", "y", "x"), _mask_outside(data, filled, nodata)[None], attrs)
    time = np.datetime64("NaT", "ns") if info.datetime is None else np.datetime64(info.datetime, "ns")
    coords: dict[str, Any] = {"time": np.array([time]), "spatial_ref": _spatial_ref(grid)} | _pixel_centres(grid)
    return xr.Dataset(variables, coords=coords, attrs={"id": info.id, "collection": info.collection})


def to_geodataframe(info: RasterInfo, chips: Sequence[Chip | None], geometries: GeometryArray) -> gpd.GeoDataFrame:
    """Return one row per geometry and band: `data` and `valid` `[H, W]`, `transform` and `crs` of the grid.

    `geometry_id` is the position in `geometries`; geometries that do not touch the raster have no row.
    """
    rows, shapes = [], []
    for i, chip in enumerate(chips):
        if chip is None:
            continue
        for c, band in enumerate(chip.bands):
            valid = chip.valid[c] & chip.inside
            rows.append(
                {
                    "geometry_id": i,
                    "id": info.id,
                    "datetime": pd.NaT if info.datetime is None else pd.Timestamp(info.datetime),
                    "band": band,
                    "data": _mask_outside(chip.data[c], valid, chip.nodata[c]),
                    "valid": valid,
                    "transform": chip.grid.transform,
                    "crs": chip.grid.crs,
                    "nodata": chip.nodata[c],
                    "cloud_cover": info.cloud_cover,
                    "collection": info.collection,
                }
            )
            shapes.append(geometries.geometries[i])
    return gpd.GeoDataFrame(pd.DataFrame(rows), geometry=shapes, crs=geometries.crs)


def _mask_outside(
    data: npt.NDArray[Any], inside: npt.NDArray[np.bool_], nodata: int | float | None
) -> npt.NDArray[Any]:
    """Return `data` with pixels outside set to nodata, or NaN if there is none.

    Integers become floats only to hold NaN: float32, or float64 for 32 bits and more.
    """
    if inside.all():
        return data
    if nodata is not None:
        return np.where(inside, data, data.dtype.type(fill_value(nodata, data.dtype)))
    if data.dtype.kind in "iu":
        data = data.astype(np.float32 if data.dtype.itemsize <= 2 else np.float64)
    return np.where(inside, data, data.dtype.type(np.nan))


def _mosaic_grid(chips: Sequence[Chip]) -> tuple[Grid, list[Window]]:
    """Return the grid that spans all chips, and the window of each chip on it."""
    base = chips[0].grid
    windows = []
    for chip in chips:
        window = base.window_of(chip.grid)
        assert window is not None, "chips of one record are aligned"
        windows.append(window)
    span = bounding_window(windows)
    return base.window(span), [w.relative_to(span) for w in windows]


def _pixel_centres(grid: Grid) -> dict[str, Any]:
    t, (height, width) = grid.transform, grid.shape
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    if grid.is_axis_aligned:
        return {"x": ("x", t.c + x * t.a), "y": ("y", t.f + y * t.e)}
    cols, rows = np.meshgrid(x, y)
    return {"xc": (("y", "x"), t.a * cols + t.b * rows + t.c), "yc": (("y", "x"), t.d * cols + t.e * rows + t.f)}


def _spatial_ref(grid: Grid) -> xr.Variable:
    t = grid.transform
    attrs = {"GeoTransform": " ".join(repr(float(v)) for v in (t.c, t.a, t.b, t.f, t.d, t.e))}
    if grid.crs is not None:
        wkt = pyproj_crs(grid.crs).to_wkt()
        attrs |= {"crs_wkt": wkt, "spatial_ref": wkt}
    return xr.Variable((), 0, attrs)
