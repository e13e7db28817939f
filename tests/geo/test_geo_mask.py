"""Polygon masks equal rasterio's."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.features import geometry_mask

from rasteret_ml.geo.geometries import polygon_mask
from rasteret_ml.geo.grid import Grid

STRAIGHT = Affine(10, 0, 500000, 0, -10, 5000000)
ROTATED = Affine.translation(500000, 5000000) @ Affine.rotation(25) @ Affine.scale(10, -10)
POINT = st.tuples(st.floats(-40, 120), st.floats(-40, 120))


@examples(100)
@given(
    points=st.lists(POINT, min_size=3, max_size=12),
    hole=st.booleans(),
    all_touched=st.booleans(),
    transform=st.sampled_from([STRAIGHT, ROTATED]),
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
)
def test_equals_geometry_mask(points, hole, all_touched: bool, transform: Affine, shape) -> None:
    """Random polygons (with holes, partly or wholly outside), straight and rotated grids, both touch rules."""
    polygon = shapely.convex_hull(shapely.MultiPoint([(500000 + x, 5000000 - y) for x, y in points]))
    if polygon.geom_type != "Polygon":
        return
    if hole:
        polygon = polygon.difference(polygon.centroid.buffer(15))
        if polygon.is_empty:
            return
    expected = geometry_mask([polygon], shape, transform, all_touched=all_touched, invert=True)
    found = polygon_mask(polygon, Grid(crs="EPSG:32633", transform=transform, shape=shape), all_touched=all_touched)
    assert found.dtype == bool
    assert np.array_equal(found, expected)


def test_a_pixel_is_inside_when_its_centre_is() -> None:
    """A box over exactly 2 x 3 pixels covers these; shrunk to the centres it still does, further it does not."""
    grid = Grid(crs=None, transform=Affine(1, 0, 0, 0, -1, 10), shape=(10, 10))
    expected = np.zeros((10, 10), bool)
    expected[3:5, 4:7] = True
    assert np.array_equal(polygon_mask(shapely.box(4, 5, 7, 7), grid), expected)
    assert np.array_equal(polygon_mask(shapely.box(4.4, 5.4, 6.6, 6.6), grid), expected)
    assert not polygon_mask(shapely.box(4.6, 5.6, 5.4, 6.4), grid).any()
    assert polygon_mask(shapely.box(4.6, 5.6, 5.4, 6.4), grid, all_touched=True).sum() == 4


@pytest.mark.parametrize("geometry", [shapely.Polygon(), shapely.box(900, 900, 901, 901)], ids=["empty", "far"])
def test_nothing_inside(geometry) -> None:
    """An empty or far polygon gives a mask without a pixel, not an error."""
    mask = polygon_mask(geometry, Grid(crs=None, transform=Affine(1, 0, 0, 0, -1, 10), shape=(10, 12)))
    assert mask.shape == (10, 12)
    assert not mask.any()


def test_multipolygon_is_the_union_of_its_parts() -> None:
    """Two parts, one mask."""
    grid = Grid(crs=None, transform=Affine(1, 0, 0, 0, -1, 10), shape=(10, 10))
    parts = [shapely.box(0, 0, 3, 3), shapely.box(5, 5, 9, 8)]
    expected = polygon_mask(parts[0], grid) | polygon_mask(parts[1], grid)
    assert expected.sum() == 9 + 12
    assert np.array_equal(polygon_mask(shapely.MultiPolygon(parts), grid), expected)
