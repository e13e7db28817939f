"""A check that no two splits can read the same area at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from rasteret_ml.errors import SplitLeakError, UsageError
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.geometries import object_array, polygons_from
from rasteret_ml.geo.regions import Geometries, polygonal_each, union_polygons
from rasteret_ml.samplers.aoi.target_grids import target_grids_of

_SLIVER = 0.01  # Share of a pixel; a strip thinner than this holds no pixel.
_ROUNDING = 1e-12  # Relative error of coordinates that are sums of a few numbers.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reach:
    """Where and when a split can read."""

    regions: dict[str, Geometries]  # Polygons by CRS text, without overlaps within a CRS.
    times: tuple[pd.Timestamp, pd.Timestamp] | None  # First and last instant, both inclusive; None = all times.
    pixels: dict[str, float]  # Smaller side of a pixel by CRS text; empty for plain polygons.


def check_splits(splits: Mapping[str, Any] | gpd.GeoDataFrame, *, buffer: float = 0.0, crs: Any = None) -> None:
    """Raise an error if splits leak into each other.

    Two splits leak if both of these are true:

    - their regions share an area or, with a buffer, are closer to each other than the buffer;
    - their times overlap: the spans from the first to the last instant of each, both ends inclusive. Tables, polygons
      and datasets with undated records exist at all times.

    Places are compared, not files: different records of one place at overlapping times leak, because they show the
    same fields; the same place in two separate years does not. A strip thinner than a hundredth of a pixel holds no
    pixel and is ignored.

    Args:
        splits: What each split, by name, draws from: a sampler (all that its chips can cover), a dataset (all that it
            covers), a GeoDataFrame or other polygons (see `geometries_from`). Or one table with a column `split`; rows
            without a split are ignored.
        buffer: Minimum distance between splits, in units of the first one's CRS, or of the second one's if only that
            one has pixels.
        crs: CRS of polygons that do not state it; default longitude/latitude.

    Raises:
        SplitLeakError: if two splits leak. The message contains the area, a place in it, and the remedy.
        UsageError: if a split is not a sampler, dataset or polygons.

    Example:
        >>> check_splits({"train": train_sampler, "val": val_sampler}, buffer=500)
    """
    if not (np.isfinite(buffer) and buffer >= 0):
        raise UsageError(f"buffer must be a finite distance >= 0, got {buffer!r}.")
    if isinstance(splits, gpd.GeoDataFrame):
        if "split" not in splits.columns:
            raise UsageError(f"The table has no column 'split'; it has {list(splits.columns)}.")
        splits = dict(iter(splits.groupby("split", observed=True)))
    reaches = {str(name): _reach_of(str(name), source, crs) for name, source in splits.items()}
    for (first, a), (second, b) in itertools.combinations(reaches.items(), 2):
        if a.times is None or b.times is None or (a.times[0] <= b.times[1] and b.times[0] <= a.times[1]):
            for own_crs, pixel, own, other in _in_common_crs(a, b):
                _check_pair(f"Splits {first!r} and {second!r}", own, other, buffer, own_crs, pixel)


def _reach_of(name: str, source: Any, crs: Any) -> _Reach:
    if hasattr(source, "reach"):  # a sampler
        regions = {crs_text(text): _parts(object_array([polygon])) for text, polygon in source.reach()}
        times, grids = source.times, getattr(getattr(source, "coverage", None), "target_grids", ())
    elif hasattr(source, "index") and hasattr(source, "bounds") and hasattr(source, "res"):  # a dataset
        grids, span = target_grids_of(source), source.index.index
        regions, times = {grid.crs: _parts(grid.shapes) for grid in grids}, (span.left.min(), span.right.max())
    else:
        try:
            table = polygons_from(source, None if getattr(source, "crs", None) is not None else crs)
        except UsageError as error:
            raise UsageError(f"Split {name!r} must be a sampler, a dataset or polygons: {error}") from None
        regions, times, grids = {table.crs: _parts(table.geometries)}, None, ()
    return _Reach(regions=regions, times=times, pixels={grid.crs: min(grid.res) for grid in grids})


def _parts(polygons: Geometries) -> Geometries:
    parts: Geometries = shapely.get_parts(union_polygons(polygonal_each(polygons)))
    return parts


def _in_common_crs(a: _Reach, b: _Reach) -> Iterator[tuple[str, float, Geometries, Geometries]]:
    """CRS, pixel size (0 = none) and polygons of both, in the CRS of the first, or of the one that has pixels."""
    first, second = (b, a) if b.pixels and not a.pixels else (a, b)
    for crs, regions in first.regions.items():
        xmin, ymin, xmax, ymax = (float(v) for v in shapely.total_bounds(regions))
        for other_crs, others in second.regions.items():
            moved = polygonal_each(transform_geometries(others, other_crs, crs, near=(xmin, ymin, xmax, ymax)))
            yield crs, first.pixels.get(crs, 0.0), regions, moved[~shapely.is_empty(moved)]


def _check_pair(names: str, a: Geometries, b: Geometries, buffer: float, crs: str, pixel: float) -> None:
    if not len(a) or not len(b):
        return
    # Thinner strips hold no pixel, or are rounding errors of the coordinates.
    width = max(_SLIVER * pixel, 8 * _ROUNDING * float(np.abs(shapely.total_bounds(a)).max()))
    i, j = shapely.STRtree(b).query(a, predicate="intersects")
    shared = shapely.intersection(a[i], b[j])
    shared = shared[~shapely.is_empty(shapely.buffer(shared, -width / 2, join_style="mitre"))]
    if len(shared):
        areas = shapely.area(shared)
        pixels = f" (about {areas.sum() / pixel**2:,.0f} pixels)" if pixel else ""
        raise SplitLeakError(
            f"{names} leak: both can read an area of {areas.sum():,.6g} square units of {crs}{pixels}, for example at "
            f"{_location(shared[int(np.argmax(areas))])}, at overlapping times. Separate their AOIs (split_blocks, "
            "split_aois), keep chips inside them (placement='inside', or a larger buffer=), or give the splits times "
            "that do not overlap (time=)."
        )
    if not buffer:
        return
    i, j = shapely.STRtree(b).query(a, predicate="dwithin", distance=max(0.0, buffer - width))
    if len(i):
        distances = shapely.distance(a[i], b[j])
        nearest = int(np.argmin(distances))
        middle = shapely.centroid(shapely.shortest_line(a[i[nearest]], b[j[nearest]]))
        raise SplitLeakError(
            f"{names} are {float(distances[nearest]):,.6g} apart at {_location(middle)}, less than the buffer of "
            f"{buffer:,.6g} (units of {crs}), at overlapping times. Split them with buffer={buffer:g} plus the length "
            "by which chips extend past their AOIs, keep chips inside them (placement='inside'), or give the splits "
            "times that do not overlap (time=)."
        )


def _location(geometry: Any) -> str:
    point = shapely.point_on_surface(geometry)
    return f"x, y = {point.x:.10g}, {point.y:.10g}"
