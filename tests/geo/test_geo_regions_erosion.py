"""The swept box is subtracted from many polygons exactly as from each alone, however they are split up."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from rasteret_ml.geo import regions


def stars(count: int, seed: int) -> np.ndarray:
    """Concave polygons of 5 to 40 corners, every third with a hole."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        corners = int(random.integers(5, 41))
        angle = np.sort(random.random(corners)) * 2 * np.pi
        radius = random.uniform(20, 100, corners)
        outer = shapely.make_valid(shapely.Polygon(np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])))
        whole = regions.polygonal(outer)
        parts = shapely.get_parts(whole if number % 3 else whole.difference(shapely.Point(0, 0).buffer(8, quad_segs=3)))
        made.extend(shapely.get_parts(regions.polygonal(shapely.union_all(parts))))
    return np.array(made, dtype=object)


@pytest.mark.parametrize(("each", "hulls"), [(2048, 1 << 17), (7, 100), (1, 1)])
def test_many_are_eroded_as_each_is(monkeypatch, each, hulls):
    """The same polygons as one at a time, to the last digit of their area, in their order."""
    monkeypatch.setattr(regions, "_PER_TASK", each)
    monkeypatch.setattr(regions, "_HULLS_PER_TASK", hulls)
    parts = stars(120, 1)
    for width, height in ((3.0, 5.0), (40.0, 20.0), (400.0, 400.0)):
        expected = np.array([regions.erode_by_box(part, width, height) for part in parts], dtype=object)
        found = regions.polygonal_each(regions._subtract_swept(parts, width, height))
        assert shapely.area(shapely.symmetric_difference(found, expected)).max() < 1e-9
        assert shapely.is_valid(found).all()
        assert (shapely.is_empty(found) == shapely.is_empty(expected)).all()


def test_threads_keep_the_order(monkeypatch):
    """Of any number of geometries, none as well."""
    monkeypatch.setattr(regions, "_PER_TASK", 3)
    for count in (0, 1, 3, 4, 50):
        points = shapely.points(np.arange(count), np.zeros(count))
        found = regions.map_in_threads(lambda part: shapely.buffer(part, 0.25), points)
        assert np.array_equal(shapely.get_x(shapely.centroid(found)).round(9), np.arange(count))
