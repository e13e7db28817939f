"""Polygonal regions to draw points from: unions, clipping, erosion and dilation by a box, uniform points.

GEOS handles a few shapes as a whole. Many shapes are split into parts that are found through an STRtree and processed
in vectorised pieces: the result is the same, in time that grows with their number instead of its square.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.geo.geometries import object_array

Geometries = npt.NDArray[np.object_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_FEW = 1000  # Shapes up to which GEOS takes them as a whole.
_PAIR_COST = 10_000_000  # Shapes times vertices up to which each shape is cut by the whole region.
_MAX_CELLS = 1 << 24  # Cells of a grid that boxes are drawn on.
_CHUNK = 65536  # Shapes processed at once.
_PER_TASK = 2048  # Geometries in a task of a thread pool: enough to hide Python's share of the work.
_HULLS_PER_TASK = 1 << 17  # Swept edges in a task of a thread pool.


def map_in_threads(function: Callable[[Geometries], Geometries], geometries: Geometries) -> Geometries:
    """Apply an elementwise function to geometries `[N]`, in threads (shapely releases the GIL)."""
    tasks = -(-len(geometries) // _PER_TASK)
    if tasks < 2:
        return function(geometries)
    return np.concatenate(_in_pool(function, np.array_split(geometries, tasks)))


def _in_pool(function: Callable[[Any], Geometries], tasks: Sequence[Any]) -> list[Geometries]:
    with ThreadPoolExecutor(max(1, min(len(tasks), os.cpu_count() or 1))) as pool:
        return list(pool.map(function, tasks))


def polygonal(geometry: BaseGeometry) -> BaseGeometry:
    """Return the valid, polygonal part of a geometry (a bow tie becomes two triangles; lines vanish)."""
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry)
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    parts = [p for p in shapely.get_parts(geometry) if p.geom_type in ("Polygon", "MultiPolygon") and p.area > 0]
    return shapely.union_all(parts) if parts else shapely.Polygon()


def polygonal_each(geometries: Geometries) -> Geometries:
    """Return `polygonal` of each geometry `[N]`."""
    good = np.isin(shapely.get_type_id(geometries), (3, 6)) & shapely.is_valid(geometries)
    if good.all():
        return geometries
    out = geometries.copy()
    out[~good] = object_array([polygonal(geometry) for geometry in geometries[~good]])
    return out


def union_polygons(shapes: Geometries) -> BaseGeometry:
    """Return the union of polygons `[N]`, valid and polygonal; a million distinct boxes take seconds."""
    if len(shapes) <= _FEW:
        return polygonal(shapely.union_all(shapely.make_valid(shapes)))
    boxes, is_box = boxes_of(shapes)
    if is_box.all():
        boxes = boxes[~pd.DataFrame(boxes).duplicated().to_numpy()]  # dates of one place repeat its box
        rectangles = _covering_rectangles(boxes)
        # There are fewer rectangles than boxes if these lie in rows and columns, and more if they are scattered.
        if rectangles is not None and 2 * len(rectangles) <= len(boxes):
            boxes = rectangles
        distinct = shapely.box(*boxes.T)
    else:
        distinct = polygonal_each(shapes[~pd.Series(shapely.to_wkb(shapes), dtype=object).duplicated().to_numpy()])
    return polygonal(shapely.disjoint_subset_union_all(distinct))


def clip_polygons(shapes: Geometries, region: BaseGeometry) -> Geometries:
    """Return the polygonal part of each valid polygon `[N]` inside a valid polygonal region; may be empty."""
    if len(shapes) * int(shapely.get_num_coordinates(region)) <= _PAIR_COST:
        out = shapes.copy()
        cut = np.ones(len(shapes), bool)
        if len(shapes) > _FEW:
            shapely.prepare(region)
            cut = ~shapely.covers(region, shapes)
        out[cut] = polygonal_each(shapely.intersection(shapes[cut], region))
        return out
    parts = shapely.get_parts(region)
    shapely.prepare(shapes)
    shapely.prepare(parts)
    owner, part = shapely.STRtree(parts).query(shapes, predicate="intersects")
    pieces = shapes[owner]
    cut = ~shapely.covers(parts[part], pieces)
    whole = cut.copy()
    whole[cut] = shapely.covers(pieces[cut], parts[part[cut]])
    pieces[whole] = parts[part[whole]]
    cut &= ~whole
    pieces[cut] = polygonal_each(shapely.intersection(pieces[cut], parts[part[cut]]))
    # After rounding, parts that met in a point may overlap by a last digit.
    return polygonal_each(_gather(pieces, owner, len(shapes)))


def erode_by_box(region: BaseGeometry, width: float, height: float) -> BaseGeometry:
    """Return the centres at which a `width` x `height` box lies inside `region`; empty if it fits nowhere.

    The exact Minkowski erosion: a box leaves the region where its centre lies in the box swept along the region's
    boundary, and a box swept along a segment is the convex hull of the boxes at the two ends.
    """
    parts = shapely.get_parts(region)
    if len(parts) > _FEW:
        # Parts of a polygon meet in points at most, and no box passes through a point.
        eroded = _erode_parts(parts, width, height)
        return shapely.multipolygons(_polygons(eroded[~shapely.is_empty(eroded)])[0])
    rings = shapely.get_rings(parts)
    if not len(rings):
        return shapely.Polygon()
    starts, ends, _ = _edges(rings)
    return polygonal(shapely.difference(region, shapely.union_all(_sweep(starts, ends, width, height))))


def dilate_by_box(geometry: BaseGeometry, width: float, height: float) -> BaseGeometry:
    """Return what a `width` x `height` box covers whose centre lies in a polygon, line or point; valid and polygonal.

    The exact Minkowski sum: the geometry and the box swept along its lines, segment by segment.
    """
    parts = shapely.get_parts(geometry)
    while (shapely.get_type_id(parts) > 3).any():
        parts = shapely.get_parts(parts)
    dimension = shapely.get_dimensions(parts)
    convex = dimension == 2
    convex[convex] = _are_convex(parts[convex])
    xy, owner = shapely.get_coordinates(parts[convex], return_index=True)
    moved = (xy[:, None] + _corners(width, height)).reshape(-1, 2)
    dilated = shapely.convex_hull(shapely.linestrings(moved, indices=np.repeat(owner, 4)))
    concave = (dimension == 2) & ~convex
    lines = np.concatenate([shapely.get_rings(parts[concave]), parts[dimension == 1]])
    starts, ends, _ = _edges(lines)
    points = shapely.get_coordinates(parts[dimension == 0])
    swept = _sweep(np.concatenate([starts, points]), np.concatenate([ends, points]), width, height)
    covered = np.concatenate([dilated, parts[concave], swept])
    return union_polygons(covered) if len(covered) else shapely.Polygon()


def erode_each(regions: Geometries, width: float, height: float) -> Geometries:
    """Return `erode_by_box` of each region `[N]`."""
    if shapely.get_num_geometries(regions).sum() <= _FEW or len(regions) == 1:
        return object_array([erode_by_box(region, width, height) for region in regions])
    parts, owner = _polygons(regions)
    return _gather(_erode_parts(parts, width, height), owner, len(regions))


def boxes_of(shapes: Geometries) -> tuple[Floats, Mask]:
    """Return the bounds of shapes (xmin, ymin, xmax, ymax) `[N, 4]`, and which shapes are exactly these boxes `[N]`."""
    bounds = shapely.bounds(shapes)
    is_box: Mask = (shapely.get_type_id(shapes) == 3) & (shapely.get_num_coordinates(shapes) == 5)
    # Of four corners in any order, only a walk around the box encloses all of it.
    with np.errstate(invalid="ignore"):
        area = (bounds[:, 2] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 1])
    is_box &= shapely.area(shapes) > 0.75 * area
    for start in range(0, len(shapes), _CHUNK):
        here = start + np.flatnonzero(is_box[start : start + _CHUNK])
        xy = shapely.get_coordinates(shapes[here]).reshape(-1, 5, 2)
        low, high = bounds[here, None, :2], bounds[here, None, 2:]
        is_box[here] = ((xy == low) | (xy == high)).all(axis=(1, 2))
    return bounds, is_box


class TriangleRegion:
    """Polygons cut into triangles, so that uniform numbers become uniform points without rejection.

    A region `[N]` is drawn in proportion to its weight `[N]` (default its area), a point in it uniformly. A region
    without triangles (a sliver thinner than floating point) is represented by one of its points. Many regions are cut
    only where points are drawn.
    """

    def __init__(self, regions: Geometries, weights: Floats | None = None) -> None:
        self._regions = regions
        shares = np.maximum(shapely.area(regions), np.finfo(np.float64).tiny) if weights is None else weights
        cumulative = np.concatenate([[0.0], np.cumsum(shares)])
        self._cumulative: Floats = cumulative / cumulative[-1]
        self._cut: _Triangles | None = None
        if len(regions) <= _FEW:
            self._cut = _Triangles(regions, np.arange(len(regions)))

    def points(self, uniforms: Floats) -> tuple[Floats, Integers]:
        """Return points (x, y) `[N, 2]` and the region of each `[N]`, from uniform numbers in [0, 1) `[N, 3]`."""
        owners = np.searchsorted(self._cumulative, uniforms[:, 0], side="right") - 1
        owners = owners.clip(max=len(self._regions) - 1)
        low, high = self._cumulative[owners], self._cumulative[owners + 1]
        return self._points(owners, (uniforms[:, 0] - low) / (high - low), uniforms), owners

    def points_in(self, regions: Integers, uniforms: Floats) -> Floats:
        """Return points `[N, 2]` in given regions `[N]`, from uniform numbers in [0, 1) `[N, 3]`."""
        return self._points(regions, uniforms[:, 0], uniforms)

    def _points(self, owners: Integers, along: Floats, uniforms: Floats) -> Floats:
        """Points in the triangles that lie `along` [0, 1) of the areas of regions."""
        if self._cut is None or not np.isin(owners, self._cut.numbers).all():
            self._cut = _Triangles(self._regions, np.unique(owners))
        a, b, c = self._cut.locate(owners, along)
        u, v = uniforms[:, 1], uniforms[:, 2]
        # Folding the unit square's upper triangle onto the lower one keeps the density uniform.
        over = u + v > 1
        u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
        points: Floats = a + u[:, None] * (b - a) + v[:, None] * (c - a)
        return points


class _Triangles:
    """The regions with some numbers (ascending `[K]`) as triangles."""

    def __init__(self, regions: Geometries, numbers: Integers) -> None:
        subset = regions[numbers]
        chunks = [_triangles(subset, start) for start in range(0, len(subset), _CHUNK)]
        corners, areas, owner = (np.concatenate(column) for column in zip(*chunks, strict=True))
        last = np.searchsorted(owner, np.arange(len(subset)), side="right") - 1
        ends = np.cumsum(areas)
        before = np.concatenate([[0.0], ends[last[:-1]]])[owner]
        self.numbers = numbers
        self._corners: Floats = corners  # Corners of the triangles, region by region `[M, 3, 2]`.
        self._last = last  # Last triangle of each region `[K]`.
        # Rank of the triangle's region, plus the share of the region's area up to the triangle's end `[M]`.
        self._reach: Floats = owner + (ends - before) / np.bincount(owner, areas)[owner]

    def locate(self, owners: Integers, along: Floats) -> Floats:
        """Return the corners `[3, N, 2]` of the triangles that lie `along` [0, 1) of the areas of regions `[N]`."""
        rank = np.searchsorted(self.numbers, owners)
        first = np.where(rank > 0, self._last[rank - 1] + 1, 0)
        which = np.searchsorted(self._reach, rank + along, side="right").clip(first, self._last[rank])
        corners: Floats = self._corners[which].swapaxes(0, 1)
        return corners


def _triangles(regions: Geometries, start: int) -> tuple[Floats, Floats, Integers]:
    """Corners `[M, 3, 2]`, areas `[M]` and numbers of the regions `[M]` of a chunk of regions from `start`."""
    chunk = regions[start : start + _CHUNK]
    parts, part_owner = _polygons(chunk)
    corners, areas, owners = [], [], []
    for first in range(0, len(parts), _CHUNK):
        xy, area, part = _triangulate(parts[first : first + _CHUNK])
        corners.append(xy)
        areas.append(area)
        owners.append(part_owner[first + part])
    without = np.setdiff1d(np.arange(len(chunk)), np.concatenate([*owners, np.zeros(0, np.int64)]))
    points = shapely.get_coordinates(shapely.point_on_surface(chunk[without]))
    owner = np.concatenate([*owners, without])
    order = np.argsort(owner, kind="stable")
    xy = np.concatenate([*corners, np.repeat(points[:, None], 3, axis=1)])
    return xy[order], np.concatenate([*areas, np.ones(len(without))])[order], start + owner[order]


def _triangulate(polygons: Geometries) -> tuple[Floats, Floats, Integers]:
    """Corners `[M, 3, 2]` and areas `[M]` of triangles, and the polygon of each `[M]`."""
    boxes, is_box = boxes_of(polygons)
    if len(polygons) > _FEW and is_box.all():
        corners = boxes[:, [[0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 0, 3]]].reshape(-1, 3, 2)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 2
        return corners, np.repeat(area, 2), np.repeat(np.arange(len(polygons)), 2)
    triangles, owner = shapely.get_parts(shapely.constrained_delaunay_triangles(polygons), return_index=True)
    corners = shapely.get_coordinates(triangles).reshape(len(triangles), 4, 2)[:, :3]
    return corners, shapely.area(triangles), owner


def _corners(width: float, height: float) -> Floats:
    corners: Floats = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2)
    return corners


def _polygons(shapes: Geometries) -> tuple[Geometries, Integers]:
    """The polygons of polygons and multipolygons `[N]`, and the shape that each is a part of, both `[M]`."""
    if (shapely.get_type_id(shapes) == 3).all():
        return shapes, np.arange(len(shapes))
    parts: tuple[Geometries, Integers] = shapely.get_parts(shapes, return_index=True)
    return parts


def _are_convex(polygons: Geometries) -> Mask:
    convex: Mask = shapely.area(shapely.convex_hull(polygons)) <= shapely.area(polygons) * (1 + 1e-12)
    return convex


def _edges(lines: Geometries) -> tuple[Floats, Floats, Integers]:
    """Starts and ends of the edges of lines or rings `[E, 2]`, and the number of each edge's line `[E]`."""
    xy, line = shapely.get_coordinates(lines, return_index=True)
    first = np.flatnonzero(line[1:] == line[:-1])
    return xy[first], xy[first + 1], line[first]


def _sweep(starts: Floats, ends: Floats, width: float, height: float) -> Geometries:
    """What a box covers that moves along segments `[E]`."""
    corners = _corners(width, height)
    swept: Geometries = shapely.convex_hull(
        shapely.linestrings(np.concatenate([starts[:, None] + corners, ends[:, None] + corners], axis=1))
    )
    return swept


def _erode_parts(parts: Geometries, width: float, height: float) -> Geometries:
    """`erode_by_box` of each of many polygons `[N]`."""
    boxes, is_box = boxes_of(parts)
    out = np.full(len(parts), shapely.Polygon(), dtype=object)
    small = boxes + np.array([width, height, -width, -height]) / 2
    fits = is_box & (small[:, 0] < small[:, 2]) & (small[:, 1] < small[:, 3])
    out[fits] = shapely.box(*small[fits].T)
    rest = np.flatnonzero(~is_box)
    convex = _are_convex(parts[rest])
    out[rest[convex]] = _erode_convex(parts[rest[convex]], width, height)
    rest = rest[~convex]
    out[rest] = polygonal_each(_subtract_swept(parts[rest], width, height))
    return out


def _subtract_swept(polygons: Geometries, width: float, height: float) -> Geometries:
    """Each polygon `[N]` without what the box covers when it is swept along the polygon's edges."""

    def subtract(numbers: Integers) -> Geometries:
        rings, owner = shapely.get_rings(polygons[numbers], return_index=True)
        starts, ends, ring = _edges(rings)
        owner = owner[ring]
        table = np.full((len(numbers), int(np.bincount(owner).max())), None, dtype=object)
        table[owner, np.arange(len(owner)) - np.searchsorted(owner, owner)] = _sweep(starts, ends, width, height)
        left: Geometries = shapely.difference(polygons[numbers], shapely.union_all(table, axis=1))
        return left

    # Polygons of similar numbers of edges are processed together, so that the table of their hulls is full.
    size = shapely.get_num_coordinates(polygons)
    order = np.argsort(size, kind="stable")
    start, tasks = 0, []
    while start < len(polygons):
        largest = int(size[order[min(start + _PER_TASK, len(polygons)) - 1]])
        count = max(1, min(_PER_TASK, _HULLS_PER_TASK // largest))
        tasks.append(order[start : start + count])
        start += count
    out = polygons.copy()
    for numbers, left in zip(tasks, _in_pool(subtract, tasks), strict=True):
        out[numbers] = left
    return out


def _erode_convex(polygons: Geometries, width: float, height: float) -> Geometries:
    """`erode_by_box` of convex polygons: a box lies inside one where all four of its corners do."""
    if not len(polygons):
        return polygons
    out, hard = _move_sides(polygons, width, height)
    moved = [shapely.transform(polygons[hard], lambda xy, by=corner: xy - by) for corner in _corners(width, height)]
    out[hard] = polygonal_each(functools.reduce(shapely.intersection, moved))
    return out


def _move_sides(polygons: Geometries, width: float, height: float) -> tuple[Geometries, Mask]:
    """Convex polygons with each side moved inwards by half the box's extent across it `[N]`.

    This is the erosion, unless a side vanishes or two sides are in line: then None, and True in the second array `[N]`.
    """
    xy, owner = shapely.get_coordinates(shapely.orient_polygons(polygons), return_index=True)
    closing = np.append(owner[1:] != owner[:-1], True)  # a ring's last point is its first
    start, here = np.searchsorted(owner, owner), np.flatnonzero(~closing)
    before = np.where(here == start[here], np.searchsorted(owner, owner[here], side="right") - 2, here - 1)
    along = np.zeros_like(xy)
    along[here] = xy[here + 1] - xy[here]
    # A ring's inside is to its left: c is inside by the reach where cross(along, c - xy) = |along| reach.
    reach = (np.abs(along[:, 1]) * width + np.abs(along[:, 0]) * height)[:, None] / 2
    side, next_side = along[before], along[here]
    cross = side[:, 0] * next_side[:, 1] - side[:, 1] * next_side[:, 0]
    in_line = cross <= 1e-9 * np.hypot(*side.T) * np.hypot(*next_side.T)
    moved = xy.copy()
    moved[here] += (reach[before] * next_side - reach[here] * side) / np.where(in_line, 1, cross)[:, None]
    moved[closing] = moved[start[closing]]
    vanished = ((moved[here + 1] - moved[here]) * next_side).sum(axis=1) <= 0
    hard = np.bincount(owner[here], in_line | vanished, minlength=len(polygons)) > 0
    easy = ~hard[owner]
    ring = np.cumsum(closing[easy]) - closing[easy]
    out = np.full(len(polygons), None, dtype=object)
    out[~hard] = shapely.polygons(shapely.linearrings(moved[easy], indices=ring))
    return out, hard


def _gather(pieces: Geometries, owner: Integers, count: int) -> Geometries:
    """Polygons that do not overlap as one polygon or multipolygon for each of `count` owners."""
    parts, piece = _polygons(pieces)
    kept = shapely.area(parts) > 0
    parts, owner = parts[kept], owner[piece[kept]]
    order = np.argsort(owner, kind="stable")
    parts, owner = parts[order], owner[order]
    out = np.full(count, shapely.Polygon(), dtype=object)
    many = np.bincount(owner, minlength=count)[owner] > 1
    out[owner[~many]] = parts[~many]
    shapely.multipolygons(parts[many], indices=owner[many], out=out)
    return out


def _covering_rectangles(boxes: Floats) -> Floats | None:
    """Disjoint rectangles `[M, 4]` that cover what boxes `[N, 4]` cover; None if the boxes have too many edges."""
    x, y = np.unique(boxes[:, ::2]), np.unique(boxes[:, 1::2])
    if len(x) * len(y) > _MAX_CELLS:
        return None
    x0, x1 = np.searchsorted(x, boxes[:, 0]), np.searchsorted(x, boxes[:, 2])
    y0, y1 = np.searchsorted(y, boxes[:, 1]), np.searchsorted(y, boxes[:, 3])
    depth = np.zeros((len(y), len(x)), np.int32)
    for row, column, step in ((y0, x0, 1), (y1, x1, 1), (y0, x1, -1), (y1, x0, -1)):
        np.add.at(depth, (row, column), step)
    inside = np.cumsum(np.cumsum(depth, axis=0, out=depth), axis=1, out=depth) > 0
    edges = np.diff(inside.astype(np.int8), axis=1, prepend=0)
    row, left = np.nonzero(edges == 1)
    right = np.nonzero(edges == -1)[1]
    # Runs of the same columns in consecutive rows are one rectangle.
    order = np.lexsort((row, right, left))
    row, left, right = row[order], left[order], right[order]
    new = np.ones(len(row), bool)
    new[1:] = (np.diff(left) != 0) | (np.diff(right) != 0) | (np.diff(row) != 1)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(row)) - 1
    return np.column_stack([x[left[first]], y[row[first]], x[right[first]], y[row[last] + 1]])
