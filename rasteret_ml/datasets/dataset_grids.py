"""The CRSs and pixels that chips lie on, for samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.datasets.index.scene_table import SceneTable, pixel_sizes
from rasteret_ml.geo.crs import crs_text, same_crs, transform_geometries
from rasteret_ml.geo.regions import clip_polygons, polygonal_each, union_polygons
from rasteret_ml.samplers.aoi.target_grids import TargetGrid

__all__ = ["cut_target_grids", "narrowed_target_grids", "native_target_grids", "target_grids_beyond"]

Geometries = npt.NDArray[np.object_]


def cut_target_grids(frames: Sequence[TargetGrid], index: gpd.GeoDataFrame) -> list[TargetGrid]:
    """Frames cut to what an index covers, each to its own part of it; those of which nothing is left are none."""
    shapes, crs = np.asarray(index.geometry, dtype=object), crs_text(index.crs)
    return _remade(frames, lambda frame: clip_polygons(frame.shapes, _region(shapes, crs, frame)), least=0)


def target_grids_beyond(frames: Sequence[TargetGrid], first: Sequence[TargetGrid]) -> list[TargetGrid]:
    """What frames cover that others do not.

    What is narrower than two pixels is left out: edges of the others, moved to another CRS, leave such slivers.
    """

    def rest(frame: TargetGrid) -> Geometries:
        shapes = frame.shapes
        for other in first:
            shapes = polygonal_each(shapely.difference(shapes, _region(other.shapes, other.crs, frame)))
        return shapes

    return _remade(frames, rest, least=1)


def _region(shapes: Geometries, crs: str, frame: TargetGrid) -> BaseGeometry:
    """What shapes cover, in a frame's CRS."""
    return union_polygons(transform_geometries(shapes, crs, frame.crs, near=tuple(shapely.total_bounds(frame.shapes))))


def _remade(frames: Sequence[TargetGrid], of: Callable[[TargetGrid], Geometries], least: float) -> list[TargetGrid]:
    """Frames with other shapes, of those that a box of `least` pixels to each side fits into."""
    kept = []
    for frame in frames:
        shapes = of(frame)
        there = shapely.area(shapely.buffer(shapes, -least * min(frame.res)) if least else shapes) > 0
        if there.any():
            kept.append(replace(frame, shapes=shapes[there]))
    return kept


def native_target_grids(index: gpd.GeoDataFrame, facts: SceneTable) -> list[TargetGrid]:
    """What the scenes of each CRS and pixel size cover, and the first one's pixels, in the records' order."""
    positions = np.searchsorted(facts.rows, index["rid"].to_numpy().astype(np.int64))
    shapes = np.asarray(index.geometry, dtype=object)
    sizes = np.round(np.log(pixel_sizes(facts.transforms[positions])), 6)
    kinds = np.column_stack([facts.crs_codes[positions], sizes])
    _, first, kind = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    frames = []
    for number in np.argsort(positions[first], kind="stable"):
        here = kind.reshape(-1) == number
        grid = facts.grid(int(positions[here].min()))
        crs = str(grid.crs)
        moved = transform_geometries(shapes[here], crs_text(index.crs), crs)
        origin = float(grid.transform.c), float(grid.transform.f)
        frames.append(TargetGrid(crs=crs, res=grid.res, origin=origin, shapes=moved))
    return frames


def narrowed_target_grids(frames: Sequence[TargetGrid], index: gpd.GeoDataFrame) -> list[TargetGrid]:
    """Frames cut to what another index covers, such as that of an `&`; those of which nothing is left are none."""
    shapes, crs = np.asarray(index.geometry, dtype=object), crs_text(index.crs)
    if len(frames) == 1 and same_crs(frames[0].crs, crs):
        return [replace(frames[0], shapes=shapes)]
    kept = []
    for frame in frames:
        covered = union_polygons(
            transform_geometries(shapes, crs, frame.crs, near=tuple(shapely.total_bounds(frame.shapes)))
        )
        cut = clip_polygons(frame.shapes, covered)
        cut = cut[shapely.area(cut) > 0]
        if len(cut):
            kept.append(replace(frame, shapes=cut))
    return kept
