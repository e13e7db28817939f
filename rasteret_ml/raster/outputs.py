"""Chips as tables for people: xarray and GeoPandas."""

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
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.window import Window
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.plan import fill_value
from rasteret_ml.raster.raster_info import RasterInfo

__all__ = ["mask_outside", "to_geodataframe", "to_xarray"]


def to_xarray(info: RasterInfo, chips: Sequence[Chip | None]) -> xr.Dataset:
    """One Dataset around all chips, which share a grid: variables `[time, y, x]` named by band.

    Pixels inside no geometry, and invalid ones, hold nodata, or NaN where none is declared: a table has no other
    validity. Coordinates are pixel centres; `spatial_ref` follows CF as rioxarray reads it.
    """
    held = [chip for chip in chips if chip is not None]
    grid, windows = _canvas(held)
    variables = {}
    for c, band in enumerate(held[0].bands):
        nodata = held[0].nodata[c]
        canvas = np.full(grid.shape, fill_value(nodata, held[0].data.dtype), held[0].data.dtype)
        seen = np.zeros(grid.shape, bool)
        for chip, window in zip(held, windows, strict=True):
            shown = chip.inside & chip.valid[c]
            canvas[window.slices][shown] = chip.data[c][shown]
            seen[window.slices] |= shown
        values = mask_outside(canvas, seen, nodata)
        facts: dict[str, Any] = {} if nodata is None else {"_FillValue": nodata}
        variables[band] = xr.Variable(("time", "y", "x"), values[None], facts | {"grid_mapping": "spatial_ref"})
    when = np.datetime64("NaT", "ns") if info.datetime is None else np.datetime64(info.datetime, "ns")
    coords: dict[str, Any] = {"time": np.array([when]), "spatial_ref": _spatial_ref(grid)} | _centres(grid)
    attributes = {"id": info.id, "collection": info.collection}
    return xr.Dataset(variables, coords=coords, attrs=attributes)


def to_geodataframe(info: RasterInfo, chips: Sequence[Chip | None], geometries: GeometryArray) -> gpd.GeoDataFrame:
    """A row per geometry and band: `data` `[H, W]` with `valid` `[H, W]`, `transform` and `crs` of its grid.

    `geometry_id` is the position in the geometries given; geometries that miss the raster have no row.
    """
    rows, shapes = [], []
    for i, chip in enumerate(chips):
        if chip is None:
            continue
        for c, band in enumerate(chip.bands):
            rows.append(
                {
                    "geometry_id": i,
                    "id": info.id,
                    "datetime": pd.NaT if info.datetime is None else pd.Timestamp(info.datetime),
                    "band": band,
                    "data": mask_outside(chip.data[c], chip.inside & chip.valid[c], chip.nodata[c]),
                    "valid": chip.valid[c] & chip.inside,
                    "transform": chip.grid.transform,
                    "crs": chip.grid.crs,
                    "nodata": chip.nodata[c],
                    "cloud_cover": info.cloud_cover,
                    "collection": info.collection,
                }
            )
            shapes.append(geometries.geometries[i])
    return gpd.GeoDataFrame(pd.DataFrame(rows), geometry=shapes, crs=geometries.crs)


def mask_outside(data: npt.NDArray[Any], inside: npt.NDArray[np.bool_], nodata: int | float | None) -> npt.NDArray[Any]:
    """`data` with the pixels outside set to nodata, or to NaN where none is declared.

    Only then, and only if a pixel is outside, do integers become float32 (float64 where 32 or more bits
    would not fit).
    """
    if inside.all():
        return data
    if nodata is not None:
        return np.where(inside, data, data.dtype.type(fill_value(nodata, data.dtype)))
    if data.dtype.kind in "iu":
        data = data.astype(np.float32 if data.dtype.itemsize <= 2 else np.float64)
    return np.where(inside, data, data.dtype.type(np.nan))


def _canvas(chips: Sequence[Chip]) -> tuple[Grid, list[Window]]:
    base = chips[0].grid
    windows = []
    for chip in chips:
        window = base.window_of(chip.grid)
        assert window is not None, "chips of one record share a grid"
        windows.append(window)
    row, col = min(w.row for w in windows), min(w.col for w in windows)
    whole = Window(
        row=row,
        col=col,
        height=max(w.row_stop for w in windows) - row,
        width=max(w.col_stop for w in windows) - col,
    )
    return base.window(whole), [w.relative_to(whole) for w in windows]


def _centres(grid: Grid) -> dict[str, Any]:
    t, (height, width) = grid.transform, grid.shape
    if grid.is_axis_aligned:
        x, y = t.c + (np.arange(width) + 0.5) * t.a, t.f + (np.arange(height) + 0.5) * t.e
        return {"x": ("x", x), "y": ("y", y)}
    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return {
        "xc": (("y", "x"), t.a * cols + t.b * rows + t.c),
        "yc": (("y", "x"), t.d * cols + t.e * rows + t.f),
    }


def _spatial_ref(grid: Grid) -> xr.Variable:
    t = grid.transform
    geotransform = " ".join(repr(float(v)) for v in (t.c, t.a, t.b, t.f, t.d, t.e))
    attributes: dict[str, Any] = {"GeoTransform": geotransform}
    if grid.crs is not None:
        wkt = pyproj_crs(grid.crs).to_wkt()
        attributes |= {"crs_wkt": wkt, "spatial_ref": wkt}
    return xr.Variable((), 0, attributes)
