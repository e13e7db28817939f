"""A check that two splits cannot read the same ground at the same time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.errors import SplitLeakError, UsageError
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.geometries import polygons_from
from rasteret_ml.geo.regions import polygonal_each, union_polygons
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of

__all__ = ["check_splits"]

_SLIVER = 0.01
"""Share of a pixel that a common strip has to be wide to hold a pixel."""
_ROUNDING = 1e-12
"""Relative error of coordinates that came about by a few sums."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reach:
    """Where and when a split can read."""

    regions: dict[str, npt.NDArray[np.object_]]
    """Polygons by CRS text; those of one CRS do not overlap."""
    times: tuple[pd.Timestamp, pd.Timestamp] | None
    """First and last instant, both included; None = all time."""
    pixels: dict[str, float]
    """Smaller side of a pixel in each CRS; empty where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compared:
    """Regions of two splits in one CRS."""

    crs: str
    """CRS text."""
    a: npt.NDArray[np.object_]
    """Polygons of the one, which do not overlap."""
    b: npt.NDArray[np.object_]
    """Polygons of the other."""
    pixel: float
    """Smaller side of a pixel in the CRS, 0 where there is none."""


def check_splits(splits: Mapping[str, Any] | gpd.GeoDataFrame, *, buffer: float = 0.0, crs: Any = None) -> None:
    """Refuse splits that leak into one another.

    Two splits leak where both of these are true:

    - their regions share an area, or, with a buffer, are closer to one another than it;
    - their times overlap: the spans from the first to the last instant of each, both ends included. What has no times
      (a table, a polygon) or holds an undated record is there at all times.

    The ground counts, not the file: different records of one place at overlapping times leak, since they show the same
    fields; the same place in two years that do not overlap does not. A strip thinner than a hundredth of a pixel holds
    no pixel and does not count.

    Args:
        splits: What each split, by name, draws from: a sampler (all that its chips can reach into), a dataset (all that
            it covers), a GeoDataFrame or other polygons (see `geometries_from`). Or one table with a column `split`;
            rows without a split are not looked at.
        buffer: Least distance between splits, in units of the first one's CRS; where that is a table, of the other's
            if it has pixels.
        crs: CRS of polygons that do not carry one; default longitude/latitude.

    Raises:
        SplitLeakError: two splits leak; names them, the area and a place that they have in common, and the remedy.
        UsageError: something that is no sampler, dataset or polygons.
    """
    if not (np.isfinite(buffer) and buffer >= 0):
        raise UsageError(f"buffer is a distance, not negative, not {buffer!r}.")
    if isinstance(splits, gpd.GeoDataFrame):
        if "split" not in splits.columns:
            raise UsageError(f"The table has no column 'split'; it has {list(splits.columns)}.")
        splits = dict(iter(splits.groupby("split", observed=True)))
    found = {str(name): _reach_of(str(name), thing, crs) for name, thing in splits.items()}
    for (one, a), (two, b) in itertools.combinations(found.items(), 2):
        if _same_time(a, b):
            for compared in _common_crs(a, b):
                _compare(f"Splits {one!r} and {two!r}", compared, buffer)


def _reach_of(name: str, thing: Any, crs: Any) -> _Reach:
    if hasattr(thing, "reach"):  # a sampler
        found: dict[str, list[Any]] = {}
        for text, polygon in thing.reach():
            found.setdefault(crs_text(text), []).append(polygon)
        regions = {text: _parts(np.array(polygons, dtype=object)) for text, polygons in found.items()}
        first, last = thing.times
        frames = getattr(getattr(thing, "places", None), "frames", ())
        return _Reach(regions=regions, times=(pd.Timestamp(first), pd.Timestamp(last)), pixels=_pixels(frames))
    if hasattr(thing, "index") and hasattr(thing, "bounds") and hasattr(thing, "res"):  # a dataset
        frames, span = target_grids_of(thing), thing.index.index
        regions = {frame.crs: _parts(frame.shapes) for frame in frames}
        return _Reach(regions=regions, times=(span.left.min(), span.right.max()), pixels=_pixels(frames))
    try:
        polygons = polygons_from(thing, None if getattr(thing, "crs", None) is not None else crs)
    except UsageError as error:
        raise UsageError(f"Split {name!r} is no sampler, dataset or table of polygons: {error}") from None
    return _Reach(regions={polygons.crs: _parts(polygons.geometries)}, times=None, pixels={})


def _parts(polygons: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    parts: npt.NDArray[np.object_] = shapely.get_parts(union_polygons(polygonal_each(polygons)))
    return parts


def _pixels(frames: Iterable[TargetGrid]) -> dict[str, float]:
    return {frame.crs: min(frame.res) for frame in frames}


def _same_time(a: _Reach, b: _Reach) -> bool:
    return a.times is None or b.times is None or (a.times[0] <= b.times[1] and b.times[0] <= a.times[1])


def _common_crs(a: _Reach, b: _Reach) -> Iterator[_Compared]:
    """Each pair of regions in the CRS of the first; in the second's where only that one has pixels."""
    first, second = (b, a) if b.pixels and not a.pixels else (a, b)
    for own, regions in first.regions.items():
        xmin, ymin, xmax, ymax = (float(v) for v in shapely.total_bounds(regions))
        for other, theirs in second.regions.items():
            moved = polygonal_each(transform_geometries(theirs, other, own, near=(xmin, ymin, xmax, ymax)))
            moved = moved[~shapely.is_empty(moved)]
            yield _Compared(crs=own, a=regions, b=moved, pixel=first.pixels.get(own, 0.0))


def _compare(who: str, compared: _Compared, buffer: float) -> None:
    a, b, crs, pixel = compared.a, compared.b, compared.crs, compared.pixel
    if not len(a) or not len(b):
        return
    size = float(np.abs(shapely.total_bounds(a)).max())
    # A strip is this wide at least where it holds a pixel; never less than what sums of coordinates are wrong by.
    width = max(_SLIVER * pixel, 8 * _ROUNDING * size)
    i, j = shapely.STRtree(b).query(a, predicate="intersects")
    common = shapely.intersection(a[i], b[j])
    common = common[~shapely.is_empty(shapely.buffer(common, -width / 2, join_style="mitre"))]
    if len(common):
        area = float(shapely.area(common).sum())
        pixels = f" (about {area / pixel**2:,.0f} pixels)" if pixel else ""
        raise SplitLeakError(
            f"{who} leak: they can read an area of {area:,.6g} square units of {crs}{pixels} in common, for example at "
            f"{_place(common[int(np.argmax(shapely.area(common)))])}, at overlapping times. Cut their AOIs apart "
            "(split_blocks, split_aois), keep chips within them (placement='inside', or a larger buffer=), or give the "
            "splits times that do not overlap (time=)."
        )
    if not buffer:
        return
    i, j = shapely.STRtree(b).query(a, predicate="dwithin", distance=max(0.0, buffer - width))
    if len(i):
        distances = shapely.distance(a[i], b[j])
        nearest = int(np.argmin(distances))
        at = shapely.centroid(shapely.shortest_line(a[i[nearest]], b[j[nearest]]))
        raise SplitLeakError(
            f"{who} lie {float(distances[nearest]):,.6g} apart at {_place(at)}, less than the buffer of {buffer:,.6g} "
            f"(units of {crs}), at overlapping times. Split them with buffer={buffer:g} plus what chips reach out of "
            "their AOIs, keep chips within them (placement='inside'), or give the splits times apart (time=)."
        )


def _place(geometry: Any) -> str:
    point = shapely.point_on_surface(geometry)
    return f"x, y = {point.x:.10g}, {point.y:.10g}"
