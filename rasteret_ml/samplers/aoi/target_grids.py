"""What a dataset covers: its frames, and cutting it in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.geometries import polygons_from
from rasteret_ml.geo.regions import polygonal, union_polygons

__all__ = ["TargetGrid", "coverage_of", "spatial_split", "target_grids_of"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetGrid:
    """A grid that chips lie on, and what is covered on it. A dataset has one, or one for each CRS of its scenes."""

    crs: str
    """CRS text."""
    res: tuple[float, float]
    """Pixel size (x, y) in CRS units."""
    origin: tuple[float, float]
    """A corner (x, y) of a pixel."""
    shapes: npt.NDArray[np.object_]
    """Outlines of the scenes, in the CRS `[N]`."""


def coverage_of(dataset: Any) -> BaseGeometry:
    """The union of a dataset's index geometries, in its CRS."""
    shapes = np.asarray(dataset.index.geometry, dtype=object)
    if not len(shapes):
        raise UsageError("The dataset is empty: its index has no rows.")
    return union_polygons(shapes)


def target_grids_of(dataset: Any) -> list[TargetGrid]:
    """What `dataset.target_grids()` says; of a dataset that has no such method, its one grid.

    Raises:
        UsageError: the dataset is empty.
    """
    if not len(dataset.index):
        raise UsageError("The dataset is empty: its index has no rows.")
    stated = getattr(dataset, "target_grids", None)
    if callable(stated):
        found: list[TargetGrid] = list(stated())
        return found
    grid = getattr(dataset, "grid", None)
    if grid is not None:
        origin = grid.transform.c, grid.transform.f
    else:
        x, y, _ = dataset.bounds
        origin = x.start, y.stop
    shapes = np.asarray(dataset.index.geometry, dtype=object)
    return [TargetGrid(crs=crs_text(dataset.crs), res=dataset.res, origin=origin, shapes=shapes)]


def spatial_split(
    dataset: Any,
    by: Any = None,
    *,
    side: str | None = None,
    fraction: float = 0.2,
    crs: Any = None,
) -> tuple[gpd.GeoDataFrame, gpd.GeoDataFrame]:
    """Cut what a dataset covers in two, for training and validation.

    Give either `by`, or `side` with `fraction`.

    Args:
        dataset: Any TorchGeo dataset.
        by: A polygon or bounding box (the second part is inside it), or a line of two or more points (the second
            part is on its right, seen along the line).
        side: "top", "bottom", "left" or "right": the second part is this side of the coverage's bounding box.
        fraction: Share of the box's height or width that the second part takes, between 0 and 1.
        crs: CRS of `by`; default the dataset's.

    Returns:
        (first, second), a polygon each in the dataset's CRS, to pass as `aois=`. They share no pixel centre.

    Raises:
        UsageError: both or neither of `by` and `side`, or a part that would be empty.
    """
    if (by is None) == (side is None):
        raise UsageError("spatial_split needs either by= (a polygon, box or line) or side=.")
    coverage, own = coverage_of(dataset), crs_text(dataset.crs)
    cutter = _side_box(coverage.bounds, str(side), fraction) if by is None else _cutter(by, crs, own, coverage)
    parts = [polygonal(shapely.difference(coverage, cutter)), polygonal(shapely.intersection(coverage, cutter))]
    for name, part in zip(("first", "second"), parts, strict=True):
        if part.area == 0:
            raise UsageError(f"The split leaves the {name} part empty; the dataset covers {coverage.bounds} in {own}.")
    first, second = (
        gpd.GeoDataFrame({"split": [n]}, geometry=[p], crs=own) for n, p in zip((0, 1), parts, strict=True)
    )
    return first, second


def _side_box(bounds: Sequence[float], side: str, fraction: float) -> BaseGeometry:
    if not 0 < fraction < 1:
        raise UsageError(f"fraction lies between 0 and 1, not {fraction}.")
    xmin, ymin, xmax, ymax = bounds
    width, height = (xmax - xmin) * fraction, (ymax - ymin) * fraction
    boxes = {
        "top": (xmin, ymax - height, xmax, ymax),
        "bottom": (xmin, ymin, xmax, ymin + height),
        "left": (xmin, ymin, xmin + width, ymax),
        "right": (xmax - width, ymin, xmax, ymax),
    }
    if side not in boxes:
        raise UsageError(f"side is one of {', '.join(boxes)}, not {side!r}.")
    return shapely.box(*boxes[side])


def _cutter(by: Any, crs: Any, own: str, coverage: BaseGeometry) -> BaseGeometry:
    if isinstance(by, shapely.LineString):
        line = transform_geometries(np.array([by], dtype=object), own if crs is None else crs_text(crs), own)[0]
        return _right_of(line, coverage)
    given = getattr(by, "crs", None)
    found = polygons_from(by, None if given is not None else own if crs is None else crs)
    return polygonal(shapely.union_all(transform_geometries(found.geometries, found.crs, own)))


def _right_of(line: shapely.LineString, coverage: BaseGeometry) -> BaseGeometry:
    """The right side of a line whose ends are drawn out past the coverage."""
    xmin, ymin, xmax, ymax = coverage.buffer(1).bounds
    reach = 4 * (xmax - xmin + ymax - ymin)
    points = shapely.get_coordinates(line)
    points = points[np.append(True, (np.diff(points, axis=0) != 0).any(axis=1))]
    if len(points) < 2 or not np.isfinite(points).all():
        raise UsageError(f"by= is a line of two or more different points, not {line.wkt[:100]}.")

    def beyond(end: npt.NDArray[np.float64], inner: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        direction = end - inner
        outer: npt.NDArray[np.float64] = end + direction / np.hypot(*direction) * reach
        return outer

    drawn = np.vstack([beyond(points[0], points[1]), points, beyond(points[-1], points[-2])])
    side = shapely.buffer(shapely.LineString(drawn), -reach, single_sided=True, join_style="mitre")
    return polygonal(side)
