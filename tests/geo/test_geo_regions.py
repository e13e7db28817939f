"""Erosion and uniform points against brute force and statistics."""

from __future__ import annotations

import numpy as np
import shapely
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.geo.regions import TriangleRegion, erode_by_box, polygonal

POINT = st.tuples(st.integers(0, 100), st.integers(0, 100))
POLYGONS = (
    st.lists(POINT, min_size=4, max_size=12, unique=True)
    .map(shapely.Polygon)
    .map(polygonal)
    .filter(lambda p: p.area > 1)
)


def _spread(region, count: int, seed: int) -> np.ndarray:
    xmin, ymin, xmax, ymax = region.bounds
    return np.random.default_rng(seed).uniform((xmin, ymin), (xmax, ymax), (count, 2))


@examples(50)
@given(region=POLYGONS, width=st.floats(0.5, 40), height=st.floats(0.5, 40), seed=st.integers(0, 99))
def test_erosion_equals_brute_force(region, width: float, height: float, seed: int) -> None:
    """A box lies inside the region exactly where its centre lies in the erosion (invalid rings repaired first)."""
    eroded = erode_by_box(region, width, height)
    assert eroded.is_valid
    shapely.prepare(region)
    centres = _spread(region, 300, seed)
    half = np.array([width, height]) / 2
    boxes = shapely.box(*(centres - half).T, *(centres + half).T)
    fits = shapely.contains(region, boxes)
    points = shapely.points(centres)
    clear = shapely.distance(points, eroded.boundary) > 1e-6 if not eroded.is_empty else np.ones(len(points), bool)
    assert np.array_equal(shapely.intersects(points, eroded)[clear], fits[clear])


def test_erosion_of_a_box_is_a_box() -> None:
    """Half a width from the sides, half a height from top and bottom; holes grow by as much."""
    region = shapely.box(0, 0, 100, 50)
    assert erode_by_box(region, 10, 20).equals(shapely.box(5, 10, 95, 40))
    holed = region.difference(shapely.box(40, 20, 60, 30))
    assert erode_by_box(holed, 10, 20).equals(shapely.box(5, 10, 95, 40).difference(shapely.box(35, 10, 65, 40)))


def test_erosion_where_nothing_fits_is_empty() -> None:
    """A box larger than the region has no place; of two parts only the larger one remains."""
    assert erode_by_box(shapely.box(0, 0, 9, 9), 10, 10).is_empty
    assert erode_by_box(shapely.Polygon(), 1, 1).is_empty
    parts = shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(10, 10, 30, 30)])
    assert erode_by_box(parts, 10, 10).equals(shapely.box(15, 15, 25, 25))


def test_polygonal_repairs_and_drops_lines() -> None:
    """A bow tie is its two triangles, lines vanish, a valid polygon is left as it is."""
    tie = polygonal(shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)]))
    assert tie.is_valid
    assert tie.area == 2
    box = shapely.box(0, 0, 1, 1)
    assert polygonal(box) == box
    mixed = shapely.GeometryCollection([box, shapely.LineString([(5, 5), (6, 6)]), shapely.Point(9, 9)])
    assert polygonal(mixed).equals(box)
    assert polygonal(shapely.LineString([(0, 0), (1, 1)])).is_empty


@examples(50)
@given(regions=st.lists(POLYGONS, min_size=1, max_size=4), seed=st.integers(0, 99), weighted=st.booleans())
def test_points_lie_in_the_region_they_name(regions, seed: int, weighted: bool) -> None:
    """Every point is inside its own polygon (an edge's rounding aside), the ends of the unit interval included."""
    weights = np.arange(1.0, len(regions) + 1) if weighted else None
    uniforms = np.random.default_rng(seed).random((200, 3))
    uniforms[0], uniforms[1] = 0.0, np.nextafter(1.0, 0.0)
    points, owner = TriangleRegion(np.array(regions, dtype=object), weights).points(uniforms)
    assert points.shape == (200, 2)
    distance = shapely.distance(np.array(regions, dtype=object)[owner], shapely.points(points))
    assert distance.max() < 1e-9


def _chi_square(counts: np.ndarray, shares: np.ndarray) -> float:
    expected = shares / shares.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_points_are_uniform() -> None:
    """In an L with a hole, counts in a 6 x 6 lattice of cells follow the cells' areas (chi-square, 99.99 %)."""
    region = shapely.Polygon([(0, 0), (60, 0), (60, 25), (25, 25), (25, 60), (0, 60)]).difference(
        shapely.box(5, 5, 18, 14)
    )
    uniforms = np.random.default_rng(7).random((60_000, 3))
    points, _ = TriangleRegion(np.array([region], dtype=object)).points(uniforms)
    cells = [shapely.box(x, y, x + 10, y + 10) for x in range(0, 60, 10) for y in range(0, 60, 10)]
    shares = shapely.area(shapely.intersection(cells, region))
    counts = np.array([np.all((points >= c.bounds[:2]) & (points < c.bounds[2:]), axis=1).sum() for c in cells])
    assert counts.sum() == len(points)
    assert not counts[shares == 0].any()
    assert _chi_square(counts[shares > 0], shares[shares > 0]) < 60  # 22 degrees of freedom


def test_regions_are_drawn_by_area_or_by_weight() -> None:
    """Without weights a region three times as large is drawn three times as often; with weights these decide."""
    regions = np.array([shapely.box(0, 0, 10, 10), shapely.box(20, 0, 50, 10)], dtype=object)
    uniforms = np.random.default_rng(3).random((40_000, 3))
    for weights, shares in ((None, [1, 3]), (np.array([1.0, 1.0]), [1, 1]), (np.array([4.0, 1.0]), [4, 1])):
        _, owner = TriangleRegion(regions, weights).points(uniforms)
        assert _chi_square(np.bincount(owner, minlength=2), np.array(shares, float)) < 15


def test_a_region_of_no_weight_is_never_drawn() -> None:
    """Not even by a uniform number of exactly zero."""
    regions = np.array([shapely.box(0, 0, 1, 1), shapely.box(5, 5, 6, 6)], dtype=object)
    uniforms = np.zeros((3, 3))
    uniforms[1] = np.nextafter(1.0, 0.0)
    _, owner = TriangleRegion(regions, np.array([0.0, 2.0])).points(uniforms)
    assert owner.tolist() == [1, 1, 1]


def test_points_are_a_function_of_the_uniforms() -> None:
    """The same numbers give the same points, alone or in a batch."""
    region = TriangleRegion(np.array([shapely.box(0, 0, 3, 1), shapely.Point(9, 9).buffer(2)], dtype=object))
    uniforms = np.random.default_rng(1).random((50, 3))
    points, owner = region.points(uniforms)
    alone = [region.points(uniforms[i : i + 1]) for i in range(50)]
    assert np.array_equal(points, np.concatenate([p for p, _ in alone]))
    assert np.array_equal(owner, np.concatenate([o for _, o in alone]))
