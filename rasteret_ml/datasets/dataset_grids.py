"""The CRSs and pixels that chips of datasets and combinations lie on, for samplers."""

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

__all__ = ["cut_target_grids", "native_target_grids", "target_grids_beyond"]

Geometries = npt.NDArray[np.object_]


def native_target_grids(index: gpd.GeoDataFrame, scenes: SceneTable) -> list[TargetGrid]:
    """Return, for each CRS and pixel size of the scenes, their extent and the first one's pixels, in record order."""
    positions = np.searchsorted(scenes.rows, index["rid"].to_numpy().astype(np.int64))
    shapes = np.asarray(index.geometry, dtype=object)
    sizes = np.round(np.log(pixel_sizes(scenes.transforms[positions])), 6)
    groups = np.column_stack([scenes.crs_codes[positions], sizes])
    _, first, group = np.unique(groups, axis=0, return_index=True, return_inverse=True)
    grids = []
    for number in np.argsort(positions[first], kind="stable"):
        here = group.reshape(-1) == number
        grid = scenes.grid(int(positions[here].min()))
        crs = str(grid.crs)
        moved = transform_geometries(shapes[here], crs_text(index.crs), crs)
        origin = float(grid.transform.c), float(grid.transform.f)
        grids.append(TargetGrid(crs=crs, res=grid.res, origin=origin, shapes=moved))
    return grids


def cut_target_grids(grids: Sequence[TargetGrid], index: gpd.GeoDataFrame) -> list[TargetGrid]:
    """Cut grids to what an index covers, such as that of a combination; drop those of which nothing is left."""
    shapes, crs = np.asarray(index.geometry, dtype=object), crs_text(index.crs)
    if len(grids) == 1 and same_crs(grids[0].crs, crs):
        return [replace(grids[0], shapes=shapes)]
    return _with_shapes(grids, lambda grid: clip_polygons(grid.shapes, _union(shapes, crs, grid)), min_pixels=0)


def target_grids_beyond(grids: Sequence[TargetGrid], others: Sequence[TargetGrid]) -> list[TargetGrid]:
    """Cut grids to what others do not cover.

    Parts narrower than two pixels are dropped: reprojected edges of the others leave such slivers.
    """

    def difference(grid: TargetGrid) -> Geometries:
        shapes = grid.shapes
        for other in others:
            shapes = polygonal_each(shapely.difference(shapes, _union(other.shapes, other.crs, grid)))
        return shapes

    return _with_shapes(grids, difference, min_pixels=1)


def _union(shapes: Geometries, crs: str, grid: TargetGrid) -> BaseGeometry:
    """Return the union of shapes in a grid's CRS."""
    return union_polygons(transform_geometries(shapes, crs, grid.crs, near=tuple(shapely.total_bounds(grid.shapes))))


def _with_shapes(
    grids: Sequence[TargetGrid], cut: Callable[[TargetGrid], Geometries], min_pixels: float
) -> list[TargetGrid]:
    """Return grids with other shapes, keeping the shapes that hold a box of `min_pixels` to each side."""
    kept = []
    for grid in grids:
        shapes = cut(grid)
        large = shapely.area(shapely.buffer(shapes, -min_pixels * min(grid.res)) if min_pixels else shapes) > 0
        if large.any():
            kept.append(replace(grid, shapes=shapes[large]))
    return kept
