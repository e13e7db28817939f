"""TorchGeo's index of records, and where their tiles lie: all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.collection.column_arrays import outlines
from rasteret_ml.datasets.index.extents import cut_to_footprints, follows_the_edge, grid_outlines
from rasteret_ml.datasets.index.scene_table import SceneTable, dump_compressed, load_compressed
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, same_crs, transform_geometries
from rasteret_ml.geo.times import INSTANT
from rasteret_ml.raster.reprojected_grid import reprojected_grid

__all__ = ["TileLayout", "moved_index", "pack_index", "restore_index", "scene_index", "tile_layout", "unpack_index"]


def restore_index(new: Any, old: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """`new` with the CRS and the column names that it lost on its way from `old`.

    TorchGeo's `random_grid_cell_assignment` numbers the columns (the old geometry is then one of them), and that of 0.8
    forgets the CRS. Anything else is given back as it is.

    Raises:
        UsageError: not a GeoDataFrame with geometries.
    """
    if not isinstance(new, gpd.GeoDataFrame) or new._geometry_column_name not in new.columns:
        raise UsageError(f"A dataset's index is a GeoDataFrame with a geometry, not a {type(new).__name__}.")
    names, crs = list(old.columns), old.crs if new.crs is None else new.crs
    if list(new.columns) != [*range(len(names)), new.geometry.name]:
        return new.set_crs(crs) if new.crs is None else new
    data = {name: new[i].to_numpy() for i, name in enumerate(names) if name != old.geometry.name}
    typed = {name: values.astype(old[name].dtype) for name, values in data.items()}
    return gpd.GeoDataFrame(typed, geometry=new.geometry.to_numpy(), crs=crs, index=new.index)


_CHUNK = 8192
"""Records whose outlines are cut together, by one thread."""
_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileLayout:
    """Where the tiles of scenes lie, in the dataset's CRS; arrays `[N]` in the order of `rows`."""

    rows: npt.NDArray[np.int64]
    """Rows of the Collection, ascending."""
    x0: npt.NDArray[np.float64]
    """Left edge of the first tile."""
    y0: npt.NDArray[np.float64]
    """Upper edge of the first tile."""
    tile_width: npt.NDArray[np.float64]
    """Width of a tile in CRS units."""
    tile_height: npt.NDArray[np.float64]
    """Height of a tile in CRS units."""


def scene_index(facts: SceneTable, crs: str) -> gpd.GeoDataFrame:
    """TorchGeo's index: geometry in `crs`, closed time intervals named `datetime`, and `rid` = row.

    The geometry is the raster's own extent cut to the footprint; undated records span all time.
    """
    geometry = _extents(facts, crs)
    lost = ~np.isfinite(shapely.bounds(geometry)).all(axis=1)
    if lost.any():
        raise UsageError(
            f"Record {facts.id_of(int(np.argmax(lost)))} has no place in {crs}; choose another crs=, or leave it out."
        )
    first = facts.grid(0)
    pixel = max(first.res if first.crs == crs else reprojected_grid(first, crs).res)

    def cut(part: tuple[slice, npt.NDArray[np.object_]]) -> None:
        geometry[part[0]] = _cut(facts, part[0], geometry[part[0]], part[1], crs, pixel)

    with ThreadPoolExecutor(_THREADS) as pool:  # shapely and pyproj let go of the GIL
        for _ in pool.map(cut, _footprints(facts)):
            pass
    undated = np.isnat(facts.times)
    left = np.where(undated, pd.Timestamp.min.to_datetime64(), facts.times)
    right = np.where(undated, pd.Timestamp.max.to_datetime64(), facts.times + INSTANT.to_timedelta64())
    intervals = pd.IntervalIndex.from_arrays(
        pd.DatetimeIndex(left), pd.DatetimeIndex(right), closed="both", name="datetime"
    )
    return gpd.GeoDataFrame({"rid": facts.rows}, geometry=geometry, crs=crs, index=intervals)


def _extents(facts: SceneTable, crs: str) -> npt.NDArray[np.object_]:
    """The whole rasters in `crs`."""
    geometry = grid_outlines(facts.transforms, facts.shapes)
    for code, name in enumerate(facts.crs_texts):
        here = facts.crs_codes == code
        moved = transform_geometries(geometry[here], name, crs)
        wrong = ~shapely.is_valid(moved)
        moved[wrong] = shapely.make_valid(moved[wrong])
        geometry[here] = moved
    return geometry


def _footprints(facts: SceneTable) -> Iterator[tuple[slice, npt.NDArray[np.object_]]]:
    """Footprints in longitude/latitude, some at a time, and whose they are."""
    start = row = 0
    for wkb in outlines(facts.collection, _CHUNK):
        stop = int(np.searchsorted(facts.rows, row + len(wkb)))
        if stop > start:
            yield slice(start, stop), np.asarray(shapely.from_wkb(wkb[facts.rows[start:stop] - row]), dtype=object)
        start, row = stop, row + len(wkb)


def _cut(
    facts: SceneTable,
    part: slice,
    extents: npt.NDArray[np.object_],
    footprints: npt.NDArray[np.object_],
    crs: str,
    pixel: float,
) -> npt.NDArray[np.object_]:
    cutting = ~(shapely.is_missing(footprints) | shapely.is_empty(footprints))
    codes = facts.crs_codes[part]
    for code in np.unique(codes[cutting]):
        here = np.flatnonzero(cutting & (codes == code))
        cutting[here] = ~follows_the_edge(
            footprints[here], facts.transforms[part][here], facts.shapes[part][here], facts.crs_texts[code]
        )
    if cutting.any():
        extents[cutting] = cut_to_footprints(extents[cutting], footprints[cutting], crs, pixel)
    return extents


def tile_layout(facts: SceneTable, crs: str) -> TileLayout:
    """Where the first bands' tiles lie in `crs`; of records in another CRS, or rotated, about where.

    Those lie on no lattice of `crs`: their tiles are taken to start at the upper left corner of their bounds, and
    to be as large as the raster's bounds divided by its tiles.
    """
    sizes = np.where(facts.tiles > 0, facts.tiles, facts.shapes).astype(np.float64)
    a, b, c, d, e, f = facts.transforms.T
    height, width = facts.shapes.T.astype(np.float64)
    x0, y0 = np.minimum(c, c + a * width), np.maximum(f, f + e * height)
    # Tiles are counted from the raster's first corner: of one that runs from right to left or upwards, the first tile
    # seen from the upper left is the last, which may be cut.
    x0 = np.where(a < 0, c + a * np.ceil(width / sizes[:, 1]) * sizes[:, 1], x0)
    y0 = np.where(e > 0, f + e * np.ceil(height / sizes[:, 0]) * sizes[:, 0], y0)
    tile_width, tile_height = abs(a) * sizes[:, 1], abs(e) * sizes[:, 0]
    own = np.array([same_crs(text, crs) for text in facts.crs_texts])[facts.crs_codes] & (b == 0) & (d == 0)
    if not own.all():
        bounds = shapely.bounds(_extents(facts, crs)[~own])
        x0[~own], y0[~own] = bounds[:, 0], bounds[:, 3]
        tile_width[~own] = (bounds[:, 2] - bounds[:, 0]) * (sizes[:, 1] / width)[~own]
        tile_height[~own] = (bounds[:, 3] - bounds[:, 1]) * (sizes[:, 0] / height)[~own]
    return TileLayout(rows=facts.rows, x0=x0, y0=y0, tile_width=tile_width, tile_height=tile_height)


def moved_index(index: gpd.GeoDataFrame, crs: str) -> gpd.GeoDataFrame:
    """The same index in another CRS."""
    geometry = transform_geometries(np.asarray(index.geometry, dtype=object), crs_text(index.crs), crs)
    columns = {name: index[name] for name in index.columns if name != index.geometry.name}
    return gpd.GeoDataFrame(columns, geometry=geometry, crs=crs, index=index.index)


def pack_index(index: gpd.GeoDataFrame) -> bytes:
    """Pickle an index small: boxes as bounds, other geometries as WKB; 100,000 boxes with times are about 3 MB."""
    name, geometries = index.geometry.name, index.geometry.to_numpy()
    is_box = shapely.equals_exact(geometries, shapely.box(*shapely.bounds(geometries).T))
    frame = pd.DataFrame(index).copy(deep=False)
    frame[name] = None
    shapes = shapely.bounds(geometries[is_box]), is_box, shapely.to_wkb(geometries[~is_box])
    return dump_compressed((frame, name, index.crs, shapes))


def unpack_index(data: bytes) -> gpd.GeoDataFrame:
    """Load what `pack_index` returned."""
    frame, name, crs, (bounds, is_box, wkb) = load_compressed(data)
    geometries = np.empty(len(frame), dtype=object)
    geometries[is_box] = shapely.box(*bounds.T)
    geometries[~is_box] = shapely.from_wkb(wkb)
    frame[name] = geometries
    return gpd.GeoDataFrame(frame, geometry=name, crs=crs)
