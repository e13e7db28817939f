"""Many scenes and many AOIs: fast paths give the same results as GEOS."""

from __future__ import annotations

import math
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from shapely.affinity import rotate

import rasteret_ml as rm
from rasteret_ml.errors import GeometryError
from rasteret_ml.geo import regions
from rasteret_ml.samplers.grid_sampler import grid_chips

CRS = "EPSG:32633"

# Whole numbers up to 12 make boxes that overlap, touch in sides and corners, and repeat.
BOX = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 5), st.integers(1, 5)).map(
    lambda v: shapely.box(v[0], v[1], v[0] + v[2], v[1] + v[3])
)
BOXES = st.lists(BOX, min_size=2, max_size=25)
ANGLE = st.sampled_from([0, 0, 17.3, 45])


@pytest.fixture(autouse=True, scope="module")
def few():
    """Use the fast paths from two shapes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_FEW", 1)
        patch.setattr(regions, "_PAIR_COST", 0)
        patch.setattr(regions, "_CHUNK", 7)
        yield


def turned(shapes, angle):
    return np.array([rotate(shape, angle, origin=(6, 6)) if angle else shape for shape in shapes], dtype=object)


def difference(one, other, grid_size=None):
    return shapely.area(shapely.symmetric_difference(one, other, grid_size=grid_size))


def eroded(shape, width, height):
    """Brute force: the part that a box moved along the outline never covers."""
    boundary = shapely.get_parts(shape.boundary)
    segments = [seg for line in boundary for seg in zip(line.coords[:-1], line.coords[1:], strict=True)]
    corner = shapely.box(-width / 2, -height / 2, width / 2, height / 2)
    swept = [
        shapely.MultiPoint([(x + dx, y + dy) for x, y in seg for dx, dy in corner.exterior.coords]).convex_hull
        for seg in segments
    ]
    return shape.difference(shapely.union_all(swept)) if segments else shapely.Polygon()


@examples(200)
@given(BOXES, ANGLE)
def test_unions(boxes, angle):
    """For boxes and other polygons."""
    shapes = turned(boxes, angle)
    united = regions.union_polygons(shapes)
    assert united.is_valid
    # With a grid size: without it, GEOS may lose a whole box if rotated ones almost touch.
    assert difference(united, shapely.union_all(shapes, grid_size=1e-12), grid_size=1e-12) < 1e-9
    if not angle:  # rotated boxes may miss each other by rounding
        assert shapely.get_num_geometries(united) == shapely.get_num_geometries(shapely.union_all(shapes))


@examples(60)
@given(BOXES)
def test_a_grid_of_boxes_is_covered_by_rectangles(boxes):
    """The rectangles do not overlap."""
    rectangles = shapely.box(*regions._covering_rectangles(shapely.bounds(boxes)).T)
    assert shapely.area(rectangles).sum() == shapely.area(shapely.union_all(boxes))
    assert difference(shapely.union_all(rectangles), shapely.union_all(boxes)) == 0


def test_rows_and_columns_of_scenes_become_one():
    """Like the tiles of Sentinel-2: overlapping, with many dates each."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(40) * 1e5, np.arange(30) * 1e5))
    boxes = np.tile(shapely.box(x, y, x + 109800, y + 109800), 3)
    assert regions.union_polygons(boxes).equals(shapely.box(0, 0, 39e5 + 109800, 29e5 + 109800))


def test_invalid_shapes_among_many_are_repaired():
    """A bow tie counts as its two triangles."""
    tie = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    united = regions.union_polygons(np.array([tie, shapely.box(5, 5, 6, 6), shapely.box(7, 7, 8, 8)], dtype=object))
    assert united.is_valid
    assert united.area == pytest.approx(4)


@examples(100)
@given(BOXES, BOXES, ANGLE, ANGLE)
def test_cuts(shapes, others, angle, other_angle):
    """Each shape is clipped to the parts of the region."""
    whole = shapely.union_all(turned(others, other_angle))
    shapes = turned(shapes, angle)
    cut = regions.clip_polygons(shapes, whole)
    expected = shapely.intersection(shapes, whole)
    assert difference(cut, expected).max() < 1e-9
    assert shapely.is_valid(cut).all()
    assert np.isin(shapely.get_type_id(cut), (3, 6)).all()


@examples(150)
@given(BOXES, ANGLE, st.floats(0.1, 6), st.floats(0.1, 6))
def test_erosions(boxes, angle, width, height):
    """For boxes, convex and other parts, separately and united."""
    shapes = turned(boxes, angle)
    united = shapely.union_all(shapes)
    expected = eroded(united, width, height)
    assert difference(regions.erode_by_box(united, width, height), expected) < 1e-9
    each = regions.erode_each(shapes, width, height)
    assert np.abs(shapely.area(each) - [eroded(s, width, height).area for s in shapes]).max() < 1e-9
    both = regions.erode_each(np.array([united, *shapes], dtype=object), width, height)
    assert difference(both[0], expected) < 1e-9


@examples(100)
@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=5, max_size=9),
    st.floats(0.1, 9),
    st.floats(0.1, 9),
)
def test_erosion_of_convex_polygons(points, width, height):
    """With sides that remain and sides that vanish."""
    hull = shapely.MultiPoint(points).convex_hull
    if hull.geom_type != "Polygon" or hull.area < 1e-3:
        return
    both = np.array([hull, rotate(hull, 90)], dtype=object)
    found = regions._erode_convex(both, width, height)
    # With a grid size: without it, GEOS may return all of two polygons that differ by rounding.
    assert difference(found[0], eroded(hull, width, height), grid_size=1e-12) < 1e-9
    assert shapely.is_valid(found).all()


def test_small_parts_vanish():
    """The result is an empty region, not an error."""
    parts = shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(5, 5, 6, 6)])
    assert regions.erode_by_box(parts, 2, 2).is_empty
    assert regions.erode_by_box(parts, 1, 1).is_empty


@examples(60)
@given(BOXES, ANGLE)
def test_triangles_fill_their_regions(boxes, angle):
    """For boxes, multi-part polygons, and slivers without area."""
    united = shapely.union_all(turned(boxes, angle))
    shapes = np.array([united, shapely.Polygon([(50, 50), (51, 50), (50, 50)]), *turned(boxes, angle)], dtype=object)
    corners, areas, owner = zip(*[regions._triangles(shapes, start) for start in range(0, len(shapes), 7)], strict=True)
    corners, areas, owner = np.concatenate(corners), np.concatenate(areas), np.concatenate(owner)
    assert (np.diff(owner) >= 0).all()
    sums = np.bincount(owner, areas)
    assert sums[1] == 1  # a sliver is one of its points
    assert (corners[owner == 1] == corners[owner == 1][:, :1]).all()
    np.testing.assert_allclose(np.delete(sums, 1), np.delete(shapely.area(shapes), 1))
    triangles = shapely.polygons(corners[owner == 0])
    assert difference(shapely.union_all(triangles), united) < 1e-9


def floor(value):
    """Round down with a tolerance of a millionth of a pixel."""
    return round(value) if abs(value - round(value)) < 1e-6 else math.floor(value)


def brute_grid(shapes, grid):
    """Brute force: the chips of a grid, each tested against its polygon."""
    corners, owners = [], []
    (x0, y0), (xres, yres), (width, height), (right, down) = grid.origin, grid.res, grid.size, grid.stride
    for i, shape in enumerate(shapes):
        xmin, ymin, xmax, ymax = shape.bounds
        left, top = x0 + floor((xmin - x0) / xres) * xres, y0 - floor((y0 - ymax) / yres) * yres
        columns = max(1, math.ceil((xmax - left - width) / right - 1e-6) + 1)
        rows = max(1, math.ceil((top - ymin - height) / down - 1e-6) + 1)
        for row in range(rows):
            for column in range(columns):
                x, y = left + column * right, top - row * down
                chip = shapely.box(x, y - height, x + width, y)
                overlaps = shapely.relate_pattern(shape, chip, "T********")
                if overlaps:
                    corners.append((x, y))
                    owners.append(i)
    return np.array(corners), np.array(owners)


@examples(100)
@given(
    BOXES, ANGLE, st.sampled_from([(1.0, 1.0), (0.5, 0.25)]), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)
)
def test_grids(boxes, angle, res, width, height, stride):
    """For one multi-part polygon and for many, in the same order as brute force."""
    shapes = turned(boxes, angle)
    size = (width * res[0], height * res[1])
    steps = (min(stride, width) * res[0], min(stride, height) * res[1])
    grid = SimpleNamespace(origin=(0.25, 12.0), res=res, size=size, stride=steps)
    for given_shapes in (shapes[:6], np.array([shapely.union_all(shapes)], dtype=object)):
        corners, owners = grid_chips(given_shapes, **vars(grid))
        expected, expected_owners = brute_grid(given_shapes, grid)
        if angle:
            # Rounding decides whether a rotated edge overlaps what it touches.
            corners, owners = certain(given_shapes, corners, owners, grid)
            expected, expected_owners = certain(given_shapes, expected, expected_owners, grid)
        np.testing.assert_array_equal(corners, expected)
        np.testing.assert_array_equal(owners, expected_owners)


def certain(shapes, corners, owners, grid):
    """Drop the chips that only touch their polygon up to rounding."""
    (x, y), (width, height) = corners.T, grid.size
    shared = shapely.area(shapely.intersection(shapes[owners], shapely.box(x, y - height, x + width, y)))
    return corners[shared > 1e-9], owners[shared > 1e-9]


class Sites:
    """A dataset of many scenes."""

    res = (10.0, 10.0)

    def __init__(self, shapes):
        when = pd.DatetimeIndex(["2023-01-01"]).repeat(len(shapes))
        index = pd.IntervalIndex.from_arrays(when, when, closed="both", name="datetime")
        self.index = gpd.GeoDataFrame(geometry=shapes, crs=CRS, index=index)
        self.crs = self.index.crs

    @property
    def bounds(self):
        xmin, ymin, xmax, ymax = self.index.total_bounds
        when = self.index.index.left[0]
        return slice(xmin, xmax, 10.0), slice(ymin, ymax, 10.0), slice(when, when, 1)


def sites(count):
    """Boxes of 1 km at random places 2 km apart."""
    x, y = (axis.ravel() * 2000.0 for axis in np.meshgrid(np.arange(count), np.arange(count)))
    jitter = np.random.default_rng(0).random((2, len(x))) * 500
    return shapely.box(x + jitter[0], y + jitter[1], x + jitter[0] + 1000, y + jitter[1] + 1000)


@pytest.fixture
def many():
    """Restore the default thresholds of the fast paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_FEW", 1000)
        patch.setattr(regions, "_PAIR_COST", 10**7)
        patch.setattr(regions, "_CHUNK", 65536)
        yield


def boxes_of(sampler):
    return np.array([shapely.box(x.start, y.start, x.stop, y.stop) for x, y, _ in sampler], dtype=object)


def test_samplers_of_thousands_of_scenes(many):
    """Chips lie in scenes, scenes are drawn equally often (chi-squared, 99.9 %), and the grid covers them all."""
    shapes = sites(60)
    dataset = Sites(shapes)
    chips = boxes_of(rm.RandomAOISampler(dataset, 50, 36000, locality=16))
    chip, scene = shapely.STRtree(shapely.buffer(shapes, 1e-6)).query(chips, predicate="covered_by")
    assert np.array_equal(chip, np.arange(len(chips)))
    counts = np.bincount(scene, minlength=len(shapes))
    assert ((counts - 10) ** 2 / 10).sum() < 3870  # 3599 degrees of freedom
    grid = boxes_of(rm.GridAOISampler(dataset, 60))
    scene, chip = shapely.STRtree(grid).query(shapes, predicate="intersects")
    met = shapely.area(shapely.intersection(shapes[scene], grid[chip]))
    assert np.bincount(scene, met).min() >= 1e6 - 1e-3


@pytest.mark.parametrize("placement", ["centre", "inside"])
def test_samplers_of_thousands_of_aois(many, placement):
    """Each chip lies in its AOI."""
    shapes = sites(60)
    fields = shapely.buffer(shapely.centroid(shapes), 450, quad_segs=4)
    sampler = rm.RandomAOISampler(Sites(shapes), 10, 5000, aois=fields, aois_crs=CRS, placement=placement)
    aois = list(sampler)
    own = fields[[a.row for a in aois]]
    chips = boxes_of(aois)
    tested = chips if placement == "inside" else shapely.centroid(chips)
    assert shapely.covers(shapely.buffer(own, 1e-6), tested).all()
    assert len({a.row for a in aois}) > 2500
    assert aois[7].geometry.equals(own[7])
    grid = rm.GridAOISampler(Sites(shapes), 100, aois=fields, aois_crs=CRS)
    assert len({a.row for a in grid}) == len(fields)


def test_an_aoi_outside_among_thousands_is_named(many):
    """The message states its row."""
    fields = sites(60)
    fields[2345] = shapely.box(-9e5, 0, -8e5, 10)
    with pytest.raises(GeometryError, match=r"AOI 2345 .*outside every scene"):
        rm.RandomAOISampler(Sites(sites(60)), 10, 5, aois=fields, aois_crs=CRS)
