"""Regions that points are drawn from: unions and cuts of many shapes, erosion by a box, uniform points in polygons.

What is done for a few shapes by GEOS as a whole is done for many by parts, found through an STRtree: the same regions,
in time that grows with their number and not with its square.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.geo.geometries import object_array

__all__ = [
    "TriangleRegion",
    "boxes_of",
    "clipped",
    "dilate_by_box",
    "erode_by_box",
    "erode_each",
    "in_threads",
    "polygonal",
    "polygonal_each",
    "union_of",
    "without_swept",
]

Geometries = npt.NDArray[np.object_]

_EACH = 2048
"""Geometries in one piece of work: enough that Python's share of it is nothing."""
_HULLS = 1 << 17
"""Swept edges in one piece of work."""


def in_threads(function: Callable[[Geometries], Geometries], geometries: Geometries) -> Geometries:
    """A function of geometries `[N]`, each for itself, by parts of them at a time (shapely works without the GIL)."""
    count = -(-len(geometries) // _EACH)
    if count < 2:
        return function(geometries)
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        return np.concatenate(list(pool.map(function, np.array_split(geometries, count))))


def without_swept(parts: Geometries, corners: npt.NDArray[np.float64]) -> Geometries:
    """Each polygon `[N]` without what a convex shape with these `corners` `[K, 2]` covers, moved along its edges.

    Polygons of like numbers of edges are done together, so that the table of their edges is full.
    """
    size = shapely.get_num_coordinates(parts)
    order = np.argsort(size, kind="stable")
    out = parts.copy()
    start, pieces = 0, []
    while start < len(parts):
        # The last one of a piece has the most edges, and with it the table is as wide.
        rows = max(1, min(_EACH, _HULLS // int(size[order[min(start + _EACH, len(parts)) - 1]])))
        pieces.append(order[start : start + rows])
        start += rows
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1) or 1) as pool:
        for piece, left in zip(pieces, pool.map(lambda p: _left_of(parts[p], corners), pieces), strict=True):
            out[piece] = left
    return out


def _left_of(parts: Geometries, corners: npt.NDArray[np.float64]) -> Geometries:
    rings, part = shapely.get_rings(parts, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    first = np.flatnonzero(ring[1:] == ring[:-1])
    ends = np.concatenate([xy[first, None] + corners, xy[first + 1, None] + corners], axis=1)
    owner = part[ring[first]]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    table = np.full((len(parts), int(np.max(place)) + 1), None, dtype=object)
    table[owner, place] = shapely.convex_hull(shapely.linestrings(ends))
    left: Geometries = shapely.difference(parts, shapely.union_all(table, axis=1))
    return left


Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_FEW = 1000
"""Shapes that GEOS takes as a whole."""
_PAIR_COST = 10_000_000
"""Shapes times vertices up to which each shape is cut by the whole region."""
_MAX_CELLS = 1 << 24
"""Cells of a grid that boxes are drawn on."""
_CHUNK = 65536


def polygonal(geometry: BaseGeometry) -> BaseGeometry:
    """The valid, polygonal part of a geometry (a bow tie becomes its two triangles; slivers of line vanish)."""
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry)
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    parts = [p for p in shapely.get_parts(geometry) if p.geom_type in ("Polygon", "MultiPolygon") and p.area > 0]
    return shapely.union_all(parts) if parts else shapely.Polygon()


def polygonal_each(geometries: Geometries) -> Geometries:
    """`polygonal` of each `[N]`."""
    good = np.isin(shapely.get_type_id(geometries), (3, 6)) & shapely.is_valid(geometries)
    if good.all():
        return geometries
    out = geometries.copy()
    out[~good] = object_array([polygonal(geometry) for geometry in geometries[~good]])
    return out


def union_of(shapes: Geometries) -> BaseGeometry:
    """The union of polygons `[N]`, valid and polygonal. A million distinct boxes take seconds."""
    if len(shapes) <= _FEW:
        return polygonal(shapely.union_all(shapely.make_valid(shapes)))
    boxes, is_box = boxes_of(shapes)
    if is_box.all():
        # Dates of one place repeat its box.
        boxes = boxes[~pd.DataFrame(boxes).duplicated().to_numpy()]
        rectangles = _covered(boxes)
        # Rectangles of a grid are fewer where the boxes lie in rows and columns, and more where they lie anyhow.
        if rectangles is not None and 2 * len(rectangles) <= len(boxes):
            boxes = rectangles
        distinct = shapely.box(*boxes.T)
    else:
        distinct = polygonal_each(shapes[~pd.Series(shapely.to_wkb(shapes), dtype=object).duplicated().to_numpy()])
    united = shapely.disjoint_subset_union_all(distinct)
    return united if united.geom_type in ("Polygon", "MultiPolygon") else polygonal(united)


def clipped(shapes: Geometries, region: BaseGeometry) -> Geometries:
    """The polygonal part of each valid polygon `[N]` that lies in a valid polygonal region; empty where none does."""
    if len(shapes) * int(shapely.get_num_coordinates(region)) <= _PAIR_COST:
        out = shapes.copy()
        if len(shapes) > _FEW:
            shapely.prepare(region)
        cut = ~shapely.covers(region, shapes) if len(shapes) > _FEW else np.ones(len(shapes), bool)
        out[cut] = polygonal_each(shapely.intersection(shapes[cut], region))
        return out
    parts = shapely.get_parts(region)
    shapely.prepare(shapes)
    shapely.prepare(parts)
    which, part = shapely.STRtree(parts).query(shapes, predicate="intersects")
    pieces = shapes[which]
    cut = ~shapely.covers(parts[part], pieces)
    whole = cut.copy()
    whole[cut] = shapely.covers(pieces[cut], parts[part[cut]])
    pieces[whole] = parts[part[whole]]
    cut &= ~whole
    pieces[cut] = polygonal_each(shapely.intersection(pieces[cut], parts[part[cut]]))
    # Rounded, parts that met in a point may overlap by a last digit.
    return polygonal_each(_gathered(pieces, which, len(shapes)))


def erode_by_box(region: BaseGeometry, width: float, height: float) -> BaseGeometry:
    """The centres at which a `width` x `height` box lies wholly inside `region`; empty where it fits nowhere.

    The exact Minkowski erosion: a box at c leaves the region just where c lies in the box swept along the
    region's boundary, and a box swept along a segment is the convex hull of the boxes at its two ends.
    """
    parts = shapely.get_parts(region)
    if len(parts) > _FEW:
        # Parts of a polygon meet in points at most, and no box passes through a point.
        eroded = _eroded_parts(parts, width, height)
        return shapely.multipolygons(_polygons(eroded[~shapely.is_empty(eroded)])[0])
    corners = _corners(width, height)
    hulls = []
    for ring in shapely.get_rings(parts):
        points = shapely.get_coordinates(ring)
        ends = np.concatenate([points[:-1, None] + corners, points[1:, None] + corners], axis=1)
        hulls.append(shapely.convex_hull(shapely.multipoints(ends)))
    if not hulls:
        return shapely.Polygon()
    return polygonal(shapely.difference(region, shapely.union_all(np.concatenate(hulls))))


def dilate_by_box(geometry: BaseGeometry, width: float, height: float) -> BaseGeometry:
    """All that a `width` x `height` box covers whose centre lies in a polygon, line or point; valid and polygonal.

    The exact Minkowski sum: the geometry and the box swept along its lines, segment by segment.
    """
    parts = shapely.get_parts(geometry)
    while (shapely.get_type_id(parts) > 3).any():
        parts = shapely.get_parts(parts)
    dimension = shapely.get_dimensions(parts)
    corners = _corners(width, height)
    convex = dimension == 2
    convex[convex] = shapely.area(shapely.convex_hull(parts[convex])) <= shapely.area(parts[convex]) * (1 + 1e-12)
    xy, owner = shapely.get_coordinates(parts[convex], return_index=True)
    moved = (xy[:, None] + corners).reshape(-1, 2)
    whole = shapely.convex_hull(shapely.linestrings(moved, indices=np.repeat(owner, 4)))
    areal = (dimension == 2) & ~convex
    lines = np.concatenate([shapely.get_rings(parts[areal]), parts[dimension == 1]])
    points = shapely.get_coordinates(parts[dimension == 0])
    xy, line = shapely.get_coordinates(lines, return_index=True)
    first = np.flatnonzero(line[1:] == line[:-1])
    starts, ends = np.concatenate([xy[first], points]), np.concatenate([xy[first + 1], points])
    swept = np.concatenate([starts[:, None] + corners, ends[:, None] + corners], axis=1)
    hulls = shapely.convex_hull(shapely.multipoints(swept))
    covered = np.concatenate([whole, parts[areal], hulls])
    return union_of(covered) if len(covered) else shapely.Polygon()


def erode_each(regions: Geometries, width: float, height: float) -> Geometries:
    """`erode_by_box` of each region `[N]`."""
    count = shapely.get_num_geometries(regions)
    if count.sum() <= _FEW or len(regions) == 1:
        return object_array([erode_by_box(region, width, height) for region in regions])
    parts, owner = _polygons(regions)
    return _gathered(_eroded_parts(parts, width, height), owner, len(regions))


def boxes_of(shapes: Geometries) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Bounds `[N, 4]` of shapes (xmin, ymin, xmax, ymax), and which of them are exactly these boxes `[N]`."""
    bounds = shapely.bounds(shapes)
    is_box: npt.NDArray[np.bool_] = (shapely.get_type_id(shapes) == 3) & (shapely.get_num_coordinates(shapes) == 5)
    # Of four corners in any order, only a walk around the box encloses all of it.
    with np.errstate(invalid="ignore"):
        whole = (bounds[:, 2] - bounds[:, 0]) * (bounds[:, 3] - bounds[:, 1])
    is_box &= shapely.area(shapes) > 0.75 * whole
    for start in range(0, len(shapes), _CHUNK):
        here = start + np.flatnonzero(is_box[start : start + _CHUNK])
        xy = shapely.get_coordinates(shapes[here]).reshape(-1, 5, 2)
        low, high = bounds[here, None, :2], bounds[here, None, 2:]
        is_box[here] = ((xy == low) | (xy == high)).all(axis=(1, 2))
    return bounds, is_box


class TriangleRegion:
    """Polygons cut into triangles, so that uniform numbers become uniform points without rejection."""

    def __init__(self, regions: Geometries, weights: Floats | None = None) -> None:
        """Of many regions, each is cut where points in it are asked for.

        Each is drawn in proportion to its weight (default: its area), uniformly inside. A region without triangles (a
        sliver thinner than floating point) is represented by one of its points.
        """
        self._regions = regions
        shares = np.maximum(shapely.area(regions), np.finfo(np.float64).tiny) if weights is None else weights
        cumulative = np.concatenate([[0.0], np.cumsum(shares)])
        self._cumulative: Floats = cumulative / cumulative[-1]
        self._cut: _Cut | None = _Cut.of(regions, np.arange(len(regions))) if len(regions) <= _FEW else None

    def points(self, uniforms: Floats) -> tuple[Floats, Integers]:
        """Points `[N, 2]` (x, y) and the region each lies in `[N]`, from uniform numbers `[N, 3]` in [0, 1)."""
        owners = np.searchsorted(self._cumulative, uniforms[:, 0], side="right") - 1
        owners = owners.clip(max=len(self._regions) - 1)
        low, high = self._cumulative[owners], self._cumulative[owners + 1]
        return self._points(owners, (uniforms[:, 0] - low) / (high - low), uniforms), owners

    def points_in(self, regions: Integers, uniforms: Floats) -> Floats:
        """Points `[N, 2]` in given regions `[N]`, from uniform numbers `[N, 3]` in [0, 1)."""
        return self._points(regions, uniforms[:, 0], uniforms)

    def _points(self, owners: Integers, along: Floats, uniforms: Floats) -> Floats:
        """Points in regions, in the triangles that lie `along` [0, 1) of their areas."""
        if self._cut is None or not np.isin(owners, self._cut.numbers, assume_unique=False).all():
            self._cut = _Cut.of(self._regions, np.unique(owners))
        a, b, c = self._cut.triangles(owners, along)
        u, v = uniforms[:, 1], uniforms[:, 2]
        # Folding the unit square's upper triangle onto the lower one keeps the density uniform.
        over = u + v > 1
        u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
        found: Floats = a + u[:, None] * (b - a) + v[:, None] * (c - a)
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Cut:
    """Some regions in triangles."""

    numbers: Integers
    """Numbers of the regions, ascending `[K]`."""
    corners: Floats
    """Corners of the triangles, region by region `[M, 3, 2]`."""
    reach: Floats
    """Rank of the triangle's region, and the share of its area up to the triangle's end `[M]`."""
    last: Integers
    """Last triangle of each region `[K]`."""

    @classmethod
    def of(cls, regions: Geometries, numbers: Integers) -> _Cut:
        """The triangles of regions by their numbers."""
        chosen = regions[numbers]
        cut = [_triangles(chosen, start) for start in range(0, len(chosen), _CHUNK)]
        corners, areas, owner = (np.concatenate(column) for column in zip(*cut, strict=True))
        last = np.searchsorted(owner, np.arange(len(chosen)), side="right") - 1
        ends = np.cumsum(areas)
        before = np.concatenate([[0.0], ends[last[:-1]]])[owner]
        return cls(
            numbers=numbers,
            corners=corners,
            reach=owner + (ends - before) / np.bincount(owner, areas)[owner],
            last=last,
        )

    def triangles(self, owners: Integers, along: Floats) -> Floats:
        """Corners `[3, N, 2]` of the triangles that lie `along` [0, 1) of the areas of regions `[N]`."""
        rank = np.searchsorted(self.numbers, owners)
        first = np.where(rank > 0, self.last[rank - 1] + 1, 0)
        which = np.searchsorted(self.reach, rank + along, side="right").clip(first, self.last[rank])
        found: Floats = self.corners[which].swapaxes(0, 1)
        return found


def _triangles(regions: Geometries, start: int) -> tuple[Floats, Floats, Integers]:
    """Corners `[M, 3, 2]`, areas `[M]` and numbers of the regions `[M]` of a chunk of regions from `start`."""
    chunk = regions[start : start + _CHUNK]
    parts, part_owner = _polygons(chunk)
    corners, areas, owners = [], [], []
    for first in range(0, len(parts), _CHUNK):
        xy, area, part = _triangles_of(parts[first : first + _CHUNK])
        corners.append(xy)
        areas.append(area)
        owners.append(part_owner[first + part])
    bare = np.setdiff1d(np.arange(len(chunk)), np.concatenate([*owners, np.zeros(0, np.int64)]))
    points = shapely.get_coordinates(shapely.point_on_surface(chunk[bare]))
    owner = np.concatenate([*owners, bare])
    order = np.argsort(owner, kind="stable")
    xy = np.concatenate([*corners, np.repeat(points[:, None], 3, axis=1)])
    return xy[order], np.concatenate([*areas, np.ones(len(bare))])[order], start + owner[order]


def _triangles_of(parts: Geometries) -> tuple[Floats, Floats, Integers]:
    """Corners, areas and parts of the triangles that polygons are cut into."""
    boxes, is_box = boxes_of(parts)
    if len(parts) > _FEW and is_box.all():
        corners = boxes[:, [[0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 0, 3]]].reshape(-1, 3, 2)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 2
        return corners, np.repeat(area, 2), np.repeat(np.arange(len(parts)), 2)
    pieces, part = shapely.get_parts(shapely.constrained_delaunay_triangles(parts), return_index=True)
    corners = shapely.get_coordinates(pieces).reshape(len(pieces), 4, 2)[:, :3]
    return corners, shapely.area(pieces), part


def _corners(width: float, height: float) -> Floats:
    corners: Floats = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (width / 2, height / 2)
    return corners


def _polygons(shapes: Geometries) -> tuple[Geometries, Integers]:
    """The polygons that polygons and multipolygons `[N]` are made of `[M]`, and the shape that each is of `[M]`."""
    if (shapely.get_type_id(shapes) == 3).all():
        return shapes, np.arange(len(shapes))
    parts: tuple[Geometries, Integers] = shapely.get_parts(shapes, return_index=True)
    return parts


def _eroded_parts(parts: Geometries, width: float, height: float) -> Geometries:
    """`erode_by_box` of many polygons."""
    boxes, is_box = boxes_of(parts)
    out = np.full(len(parts), shapely.Polygon(), dtype=object)
    small = boxes + np.array([width, height, -width, -height]) / 2
    room = is_box & (small[:, 0] < small[:, 2]) & (small[:, 1] < small[:, 3])
    out[room] = shapely.box(*small[room].T)
    rest = np.flatnonzero(~is_box)
    hulls = shapely.convex_hull(parts[rest])
    is_convex = shapely.area(hulls) <= shapely.area(parts[rest]) * (1 + 1e-12)
    out[rest[is_convex]] = _eroded_convex(parts[rest[is_convex]], width, height)
    rest = rest[~is_convex]
    out[rest] = polygonal_each(without_swept(parts[rest], _corners(width, height)))
    return out


def _eroded_convex(parts: Geometries, width: float, height: float) -> Geometries:
    """`erode_by_box` of convex polygons.

    A box lies in a convex region just where all of its corners do: in the region moved by each, met with itself.
    """
    if not len(parts):
        return parts
    out, hard = _sides_moved(parts, width, height)
    moved = [shapely.transform(parts[hard], lambda xy, by=corner: xy - by) for corner in _corners(width, height)]
    met = moved[0]
    for other in moved[1:]:
        met = shapely.intersection(met, other)
    out[hard] = polygonal_each(met)
    return out


def _sides_moved(parts: Geometries, width: float, height: float) -> tuple[Geometries, npt.NDArray[np.bool_]]:
    """Convex polygons with each side moved inwards by half the box's reach across it `[N]`.

    This is the erosion, but for those where a side vanishes or two are in line: None, and True in the second `[N]`.
    """
    xy, part = shapely.get_coordinates(shapely.orient_polygons(parts), return_index=True)
    closing = np.append(part[1:] != part[:-1], True)  # a ring's last point is its first
    start, here = np.searchsorted(part, part), np.flatnonzero(~closing)
    before = np.where(here == start[here], np.searchsorted(part, part[here], side="right") - 2, here - 1)
    along = np.zeros_like(xy)
    along[here] = xy[here + 1] - xy[here]
    # A ring runs with its inside to the left: c is inside by the reach where cross(along, c - xy) = |along| reach.
    reach = (np.abs(along[:, 1]) * width + np.abs(along[:, 0]) * height)[:, None] / 2
    one, two = along[before], along[here]
    turn = one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]
    flat = turn <= 1e-9 * np.hypot(*one.T) * np.hypot(*two.T)
    moved = xy.copy()
    moved[here] += (reach[before] * two - reach[here] * one) / np.where(flat, 1, turn)[:, None]
    moved[closing] = moved[start[closing]]
    vanished = ((moved[here + 1] - moved[here]) * two).sum(axis=1) <= 0
    hard = np.bincount(part[here], flat | vanished, minlength=len(parts)) > 0
    easy = ~hard[part]
    ring = np.cumsum(closing[easy]) - closing[easy]
    out = np.full(len(parts), None, dtype=object)
    out[~hard] = shapely.polygons(shapely.linearrings(moved[easy], indices=ring))
    return out, hard


def _gathered(pieces: Geometries, owner: Integers, count: int) -> Geometries:
    """Polygons that do not overlap, given with their owner, as one polygon or multipolygon an owner `[count]`."""
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


def _covered(boxes: Floats) -> Floats | None:
    """Rectangles `[M, 4]`, none overlapping, that cover what boxes `[N, 4]` do; None where their edges are too many."""
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
    # Runs of the same columns in rows that follow one another are one rectangle.
    order = np.lexsort((row, right, left))
    row, left, right = row[order], left[order], right[order]
    new = np.ones(len(row), bool)
    new[1:] = (np.diff(left) != 0) | (np.diff(right) != 0) | (np.diff(row) != 1)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(row)) - 1
    return np.column_stack([x[left[first]], y[row[first]], x[right[first]], y[row[last] + 1]])
