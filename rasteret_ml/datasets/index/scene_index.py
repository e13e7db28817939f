"""TorchGeo's index of records, and the grids and tiles that samplers need; vectorized over all records."""

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

from rasteret_ml.collection.column_arrays import iterate_footprints
from rasteret_ml.datasets.index.scene_table import SceneTable, dump_compressed, load_compressed, pixel_sizes
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import LONLAT, Geometries, crs_text, same_crs, transform_geometries, transform_points
from rasteret_ml.geo.times import INSTANT, Times
from rasteret_ml.raster.reprojected_grid import reprojected_grid
from rasteret_ml.samplers.aoi.target_grids import TargetGrid

_CHUNK = 8192  # Records per job of a thread.
_THREADS = 4
_POLYGON = 3
# Tolerance in pixels for simplifying a cut outline, which would else be as long as its densified footprint.
_SLACK = 0.25


def grid_outlines(transforms: npt.NDArray[np.float64], shapes: npt.NDArray[np.int32]) -> Geometries:
    """Return the outlines of grids in their own CRS, exact also for rotated ones; arrays as in `SceneTable`."""
    a, b, c, d, e, f = transforms.T
    height, width = shapes.T.astype(np.float64)
    x = np.stack([c, a * width + c, a * width + b * height + c, b * height + c], axis=1)
    y = np.stack([f, d * width + f, d * width + e * height + f, e * height + f], axis=1)
    straight = (b == 0) & (d == 0)
    out = np.empty(len(transforms), dtype=object)
    out[straight] = shapely.box(
        x[straight].min(axis=1), y[straight].min(axis=1), x[straight].max(axis=1), y[straight].max(axis=1)
    )
    out[~straight] = shapely.polygons(np.stack([x[~straight], y[~straight]], axis=2))
    return out


def cut_to_footprints(extents: Geometries, footprints: Geometries, crs: str, pixel: float) -> Geometries:
    """Intersect extents in `crs` with footprints in longitude/latitude (none missing or empty).

    A footprint that follows the extent's edge within `pixel` is that edge, rounded: intersecting with it would open
    hairline gaps between neighbours. A footprint that misses the extent is wrong and is ignored.
    """
    footprints = _valid(transform_geometries(footprints, LONLAT, crs))
    cut = shapely.intersection(extents, footprints)
    removed = shapely.area(extents) - shapely.area(cut)
    whole = (removed <= 0) | (shapely.area(cut) == 0)
    # The strip within a pixel of an outline is no larger than this; if more is removed, the footprint is a real cut.
    strip = 1.01 * (pixel * shapely.length(footprints) + np.pi * pixel**2)
    unsure = np.flatnonzero(~whole & (removed <= strip))
    whole[unsure] = shapely.covers(shapely.buffer(footprints[unsure], pixel), extents[unsure])
    cut[~whole] = shapely.simplify(cut[~whole], pixel * _SLACK)
    return np.where(whole, extents, cut)


def _valid(geometries: Geometries) -> Geometries:
    invalid = ~shapely.is_valid(geometries)
    geometries[invalid] = shapely.make_valid(geometries[invalid])
    return geometries


def follows_the_edge(
    footprints: Geometries, transforms: npt.NDArray[np.float64], shapes: npt.NDArray[np.int32], crs: str
) -> npt.NDArray[np.bool_]:
    """Return which footprints `[N]` outline their raster: its corners, and only points on its edge, within a pixel.

    Their straight lines in longitude and latitude stand for the raster's edges, from which they deviate by up to
    hundreds of metres; so only their points are compared, as columns and rows of the raster's own grid.
    """
    plain = (shapely.get_type_id(footprints) == _POLYGON) & (shapely.get_num_interior_rings(footprints) == 0)
    outlines = footprints.copy()
    outlines[~plain] = None
    xy, owner = shapely.get_coordinates(outlines, return_index=True)
    count = len(footprints)
    x, y = transform_points(xy[:, 0], xy[:, 1], LONLAT, crs)
    a, b, c, d, e, f = transforms[owner].T
    with np.errstate(all="ignore"):
        u, v = (e * (x - c) - b * (y - f)) / (a * e - b * d), (a * (y - f) - d * (x - c)) / (a * e - b * d)
        height, width = shapes[owner].T.astype(np.float64)
        on_side = (np.minimum(abs(u), abs(u - width)) <= 1) & (v >= -1) & (v <= height + 1)
        on_side |= (np.minimum(abs(v), abs(v - height)) <= 1) & (u >= -1) & (u <= width + 1)
        follows: npt.NDArray[np.bool_] = plain & (np.bincount(owner, ~on_side, count) == 0)
        for right, bottom in ((0, 0), (1, 0), (1, 1), (0, 1)):
            at_corner = (abs(u - right * width) <= 1) & (abs(v - bottom * height) <= 1)
            follows &= np.bincount(owner, at_corner, count) > 0
        # The points of a notch from edge to edge all lie on the edges; only the area reveals it.
        cross = np.append(u[:-1] * v[1:] - u[1:] * v[:-1], 0.0)
        cross[:-1][owner[:-1] != owner[1:]] = 0.0
        enclosed = abs(np.bincount(owner, np.nan_to_num(cross), count)) / 2
        sides = shapes.astype(np.float64)
        follows &= abs(enclosed - sides.prod(axis=1)) <= 2 * sides.sum(axis=1)
    return follows


def restore_index(new: Any, old: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """Restore the CRS and column names of `old` that `new` lost.

    TorchGeo's `random_grid_cell_assignment` replaces the column names by numbers (the old geometry is one of the
    columns then), and that of 0.8 drops the CRS. Any other index is returned unchanged.
    """
    if not isinstance(new, gpd.GeoDataFrame) or new._geometry_column_name not in new.columns:
        raise UsageError(f"index must be a GeoDataFrame with a geometry, got {type(new).__name__}.")
    names, crs = list(old.columns), old.crs if new.crs is None else new.crs
    if list(new.columns) != [*range(len(names)), new.geometry.name]:
        return new.set_crs(crs) if new.crs is None else new
    data = {name: new[i].to_numpy() for i, name in enumerate(names) if name != old.geometry.name}
    typed = {name: values.astype(old[name].dtype) for name, values in data.items()}
    return gpd.GeoDataFrame(typed, geometry=new.geometry.to_numpy(), crs=crs, index=new.index)


def scene_index(scenes: SceneTable, crs: str) -> gpd.GeoDataFrame:
    """Return TorchGeo's index: geometry in `crs`, closed time intervals named `datetime`, and `rid` = row.

    The geometry is the raster's own extent intersected with the footprint; undated records span all time. Raises
    UsageError if a record cannot be projected to `crs`.
    """
    geometry = _extents(scenes, crs)
    unprojected = ~np.isfinite(shapely.bounds(geometry)).all(axis=1)
    if unprojected.any():
        raise UsageError(
            f"Record {scenes.id_of(int(np.argmax(unprojected)))} cannot be projected to {crs}; choose another crs=, or "
            "leave the record out."
        )
    first = scenes.grid(0)
    pixel = max(first.res if first.crs == crs else reprojected_grid(first, crs).res)

    with ThreadPoolExecutor(_THREADS) as pool:  # shapely and pyproj release the GIL
        list(pool.map(lambda part: _cut(geometry, scenes, part[0], part[1], crs, pixel), _footprints(scenes)))
    times = index_times(scenes.times, scenes.times)
    return gpd.GeoDataFrame({"rid": scenes.rows}, geometry=geometry, crs=crs, index=times)


def index_times(start: Times, stop: Times) -> pd.IntervalIndex:
    """Return TorchGeo's closed intervals of tz-naive UTC times; NaT = open. Instants get the length that it needs."""
    left = np.where(np.isnat(start), pd.Timestamp.min.to_datetime64(), start)
    right = np.where(np.isnat(stop), pd.Timestamp.max.to_datetime64(), stop)
    right[left == right] += INSTANT.to_timedelta64()
    return pd.IntervalIndex.from_arrays(pd.DatetimeIndex(left), pd.DatetimeIndex(right), closed="both", name="datetime")


def _extents(scenes: SceneTable, crs: str) -> Geometries:
    """Return the outlines of the whole rasters in `crs`."""
    geometry = grid_outlines(scenes.transforms, scenes.shapes)
    for code, name in enumerate(scenes.crs_texts):
        here = scenes.crs_codes == code
        geometry[here] = _valid(transform_geometries(geometry[here], name, crs))
    return geometry


def _footprints(scenes: SceneTable) -> Iterator[tuple[slice, Geometries]]:
    """Yield footprints in longitude/latitude in chunks, with the slice of records they belong to."""
    start = row = 0
    for wkb in iterate_footprints(scenes.collection, _CHUNK):
        stop = int(np.searchsorted(scenes.rows, row + len(wkb)))
        if stop > start:
            yield slice(start, stop), np.asarray(shapely.from_wkb(wkb[scenes.rows[start:stop] - row]), dtype=object)
        start, row = stop, row + len(wkb)


def _cut(extents: Geometries, scenes: SceneTable, part: slice, footprints: Geometries, crs: str, pixel: float) -> None:
    """Cut the extents `[N]` of a part of the scenes in place, to the footprints of this part."""
    extents = extents[part]
    cutting = ~(shapely.is_missing(footprints) | shapely.is_empty(footprints))
    codes = scenes.crs_codes[part]
    for code in np.unique(codes[cutting]):
        here = np.flatnonzero(cutting & (codes == code))
        cutting[here] = ~follows_the_edge(
            footprints[here], scenes.transforms[part][here], scenes.shapes[part][here], scenes.crs_texts[code]
        )
    if cutting.any():
        extents[cutting] = cut_to_footprints(extents[cutting], footprints[cutting], crs, pixel)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileLayout:
    """Where the tiles of scenes lie, in the dataset's CRS: arrays `[N]` in the order of `rows`."""

    rows: npt.NDArray[np.int64]  #: Rows of the Collection, ascending.
    x0: npt.NDArray[np.float64]  #: Left edge of the first tile.
    y0: npt.NDArray[np.float64]  #: Upper edge of the first tile.
    tile_width: npt.NDArray[np.float64]  #: Width of a tile in CRS units.
    tile_height: npt.NDArray[np.float64]  #: Height of a tile in CRS units.


def tile_layout(scenes: SceneTable, crs: str) -> TileLayout:
    """Return where the tiles of the first bands lie in `crs`; approximate for records in another CRS, or rotated.

    Those have no axis-aligned tiles in `crs`: their tiles are assumed to start at the upper left corner of the bounds,
    and to have the size of the bounds divided by the number of tiles.
    """
    sizes = np.where(scenes.tiles > 0, scenes.tiles, scenes.shapes).astype(np.float64)
    a, b, c, d, e, f = scenes.transforms.T
    height, width = scenes.shapes.T.astype(np.float64)
    x0, y0 = np.minimum(c, c + a * width), np.maximum(f, f + e * height)
    # Tiles count from the raster's first corner: in a raster that runs right to left or upwards, the tile at the upper
    # left is the last one, which may be cut.
    x0 = np.where(a < 0, c + a * np.ceil(width / sizes[:, 1]) * sizes[:, 1], x0)
    y0 = np.where(e > 0, f + e * np.ceil(height / sizes[:, 0]) * sizes[:, 0], y0)
    tile_width, tile_height = abs(a) * sizes[:, 1], abs(e) * sizes[:, 0]
    own = np.array([same_crs(text, crs) for text in scenes.crs_texts])[scenes.crs_codes] & (b == 0) & (d == 0)
    if not own.all():
        bounds = shapely.bounds(_extents(scenes, crs)[~own])
        x0[~own], y0[~own] = bounds[:, 0], bounds[:, 3]
        tile_width[~own] = (bounds[:, 2] - bounds[:, 0]) * (sizes[:, 1] / width)[~own]
        tile_height[~own] = (bounds[:, 3] - bounds[:, 1]) * (sizes[:, 0] / height)[~own]
    return TileLayout(rows=scenes.rows, x0=x0, y0=y0, tile_width=tile_width, tile_height=tile_height)


def native_target_grids(index: gpd.GeoDataFrame, scenes: SceneTable) -> list[TargetGrid]:
    """Return, for each CRS and pixel size of the scenes, their extent and the first one's pixels, in record order."""
    positions = np.searchsorted(scenes.rows, index["rid"].to_numpy().astype(np.int64))
    shapes = np.asarray(index.geometry, dtype=object)
    sizes = np.round(np.log(pixel_sizes(scenes.transforms[positions])), 6)
    keys = np.column_stack([scenes.crs_codes[positions], sizes])
    _, first, group = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    grids = []
    for number in np.argsort(positions[first], kind="stable"):
        here = group.reshape(-1) == number
        grid = scenes.grid(int(positions[here].min()))
        crs = str(grid.crs)
        moved = transform_geometries(shapes[here], crs_text(index.crs), crs)
        origin = float(grid.transform.c), float(grid.transform.f)
        grids.append(TargetGrid(crs=crs, res=grid.res, origin=origin, shapes=moved))
    return grids


def reproject_index(index: gpd.GeoDataFrame, crs: str) -> gpd.GeoDataFrame:
    """Return an index in another CRS."""
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


def describe_times(index: Any) -> str:
    """Describe the time span of a TorchGeo index, such as "2023-05-01 00:00 to 2023-05-05 00:00 UTC".

    An end that is open in all rows is ".."; rows that are open at both ends are counted as undated.
    """
    left, right = pd.DatetimeIndex(index.index.left), pd.DatetimeIndex(index.index.right)
    starts, stops = left > pd.Timestamp.min, right < pd.Timestamp.max
    always = int(np.sum(~starts & ~stops))
    first = f"{left[starts].min():%Y-%m-%d %H:%M}" if starts.any() else ".."
    last = f"{right[stops].max():%Y-%m-%d %H:%M}" if stops.any() else ".."
    span = [] if first == last == ".." else [f"{first} to {last} UTC"]
    return ", ".join(span + ([f"{always:,} undated"] if always else [])) or "none"
