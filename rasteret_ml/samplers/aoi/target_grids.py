"""The grids that a dataset's chips lie on, what it covers, and how to cut that in two."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetGrid:
    """A pixel grid that chips lie on, and the scenes on it. A dataset has one, or one for each CRS of its scenes."""

    crs: str  #: CRS text.
    res: tuple[float, float]  #: Pixel size (x, y) in CRS units.
    origin: tuple[float, float]  #: A corner (x, y) of a pixel.
    shapes: npt.NDArray[np.object_]  #: Outlines of the scenes, in the CRS `[N]`.


def coverage_of(dataset: Any) -> BaseGeometry:
    """Return the union of a dataset's index geometries, in its CRS; raises UsageError if it is empty."""
    _require_rows(dataset)
    return union_polygons(np.asarray(dataset.index.geometry, dtype=object))


def target_grids_of(dataset: Any) -> list[TargetGrid]:
    """Return `dataset.target_grids()`, or the single grid of a dataset without this method.

    Raises UsageError if the dataset is empty.
    """
    _require_rows(dataset)
    if callable(getattr(dataset, "target_grids", None)):
        return list(dataset.target_grids())
    grid = getattr(dataset, "grid", None)
    if grid is not None:
        origin = grid.transform.c, grid.transform.f
    else:
        x, y, _ = dataset.bounds
        origin = x.start, y.stop
    shapes = np.asarray(dataset.index.geometry, dtype=object)
    return [TargetGrid(crs=crs_text(dataset.crs), res=dataset.res, origin=origin, shapes=shapes)]


def _require_rows(dataset: Any) -> None:
    if not len(dataset.index):
        raise UsageError("The dataset is empty: its index has no rows.")


def spatial_split(
    dataset: Any, by: Any = None, *, side: str | None = None, fraction: float = 0.2, crs: Any = None
) -> tuple[gpd.GeoDataFrame, gpd.GeoDataFrame]:
    """Cut what a dataset covers in two, for training and validation.

    Pass either `by`, or `side` with `fraction`.

    Args:
        dataset: Any TorchGeo dataset.
        by: A polygon or bounding box (the second part is inside it), or a line of two or more points (the second
            part is on its right, seen along the line).
        side: "top", "bottom", "left" or "right": the side of the coverage's bounding box that becomes the second part.
        fraction: Share of the box's height or width that the second part takes, between 0 and 1.
        crs: CRS of `by`; default the dataset's.

    Returns:
        (first, second), one polygon each in the dataset's CRS, to pass as `aois=`. No pixel centre lies in both.

    Raises:
        UsageError: if both or neither of `by` and `side` are given, or a part would be empty.

    Example:
        >>> train, val = spatial_split(dataset, side="top", fraction=0.3)
    """
    if (by is None) == (side is None):
        raise UsageError("spatial_split needs either by= (a polygon, box or line) or side=.")
    coverage, target_crs = coverage_of(dataset), crs_text(dataset.crs)
    cutter = _side_box(coverage.bounds, str(side), fraction) if by is None else _cutter(by, crs, target_crs, coverage)
    tables = []
    for number, cut in enumerate((shapely.difference, shapely.intersection)):
        part = polygonal(cut(coverage, cutter))
        if part.area == 0:
            raise UsageError(
                f"The split leaves the {('first', 'second')[number]} part empty; the dataset covers {coverage.bounds} "
                f"in {target_crs}."
            )
        tables.append(gpd.GeoDataFrame({"split": [number]}, geometry=[part], crs=target_crs))
    return tables[0], tables[1]


def _side_box(bounds: tuple[float, float, float, float], side: str, fraction: float) -> BaseGeometry:
    if not 0 < fraction < 1:
        raise UsageError(f"fraction must be between 0 and 1, got {fraction}.")
    xmin, ymin, xmax, ymax = bounds
    width, height = (xmax - xmin) * fraction, (ymax - ymin) * fraction
    boxes = {
        "top": (xmin, ymax - height, xmax, ymax),
        "bottom": (xmin, ymin, xmax, ymin + height),
        "left": (xmin, ymin, xmin + width, ymax),
        "right": (xmax - width, ymin, xmax, ymax),
    }
    if side not in boxes:
        raise UsageError(f"side must be one of {', '.join(boxes)}, got {side!r}.")
    return shapely.box(*boxes[side])


def _cutter(by: Any, crs: Any, target_crs: str, coverage: BaseGeometry) -> BaseGeometry:
    """The region of the second part."""
    crs = target_crs if crs is None else crs
    if isinstance(by, shapely.LineString):
        line = transform_geometries(np.array([by], dtype=object), crs_text(crs), target_crs)[0]
        return _right_of(line, coverage)
    found = polygons_from(by, None if getattr(by, "crs", None) is not None else crs)
    return polygonal(shapely.union_all(transform_geometries(found.geometries, found.crs, target_crs)))


def _right_of(line: shapely.LineString, coverage: BaseGeometry) -> BaseGeometry:
    """The right side of a line, extended at both ends past the coverage."""
    xmin, ymin, xmax, ymax = coverage.buffer(1).bounds
    reach = 4 * (xmax - xmin + ymax - ymin)
    points = shapely.get_coordinates(line)
    points = points[np.append(True, (np.diff(points, axis=0) != 0).any(axis=1))]
    if len(points) < 2 or not np.isfinite(points).all():
        raise UsageError(f"by must be a line of two or more different points, got {line.wkt[:100]}.")
    first, last = points[0] - points[1], points[-1] - points[-2]
    start = points[0] + first / np.hypot(*first) * reach
    end = points[-1] + last / np.hypot(*last) * reach
    extended = shapely.LineString(np.vstack([start, points, end]))
    return polygonal(shapely.buffer(extended, -reach, single_sided=True, join_style="mitre"))
