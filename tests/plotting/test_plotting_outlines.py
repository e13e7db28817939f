"""Masks and polygons as vertices, against the pixels and shapely."""

from __future__ import annotations

import itertools

import numpy as np
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from property_settings import examples
from rasterio.features import rasterize

from rasteret_ml.plotting.outlines import mask_edges, mask_path, polygon_paths

_MASKS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def _rectangles(path):
    return [shapely.Polygon(corners) for corners in np.asarray(path.vertices).reshape(-1, 5, 2)]


@examples(80)
@given(_MASKS)
def test_the_path_covers_each_true_pixel_once_and_nothing_else(mask):
    boxes = _rectangles(mask_path(mask))
    assert sum(box.area for box in boxes) == mask.sum()
    burnt = np.zeros(mask.shape, int)
    for box in boxes:
        xmin, ymin, xmax, ymax = (round(v + 0.5) for v in box.bounds)
        burnt[ymin:ymax, xmin:xmax] += 1
    np.testing.assert_array_equal(burnt, mask)


def test_equal_rows_are_one_rectangle():
    mask = np.zeros((500, 400), bool)
    mask[100:300, 50:350] = True
    assert len(_rectangles(mask_path(mask))) == 1


@examples(80)
@given(_MASKS)
def test_edges_are_where_neighbours_differ(mask):
    expected = set()
    for row, col in np.ndindex(*mask.shape):
        if row and mask[row, col] != mask[row - 1, col]:
            expected.add(((col - 0.5, row - 0.5), (col + 0.5, row - 0.5)))
        if col and mask[row, col] != mask[row, col - 1]:
            expected.add(((col - 0.5, row - 0.5), (col - 0.5, row + 0.5)))
    found = set()
    for (x0, y0), (x1, y1) in mask_edges(mask):
        steps = round(abs(x1 - x0) + abs(y1 - y0))
        points = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
        pieces = set(itertools.pairwise(points))
        assert not pieces & found
        found |= pieces
    assert found == expected


def test_polygon_paths_keep_parts_and_holes_and_know_their_geometry():
    holed = shapely.box(0, 0, 10, 10) - shapely.box(3, 3, 6, 6)
    clockwise = shapely.Polygon([(20, 0), (20, 5), (25, 5), (25, 0)])
    two = shapely.MultiPolygon([clockwise, holed.buffer(0)])
    geometries = np.array([holed, shapely.Point(1, 1), two, None, shapely.Polygon()], object)
    paths, owners = polygon_paths(geometries)
    assert owners.tolist() == [0, 2]
    grid = np.stack(np.meshgrid(np.arange(0.25, 30, 0.5), np.arange(0.25, 12, 0.5)), -1).reshape(-1, 2)
    for path, owner in zip(paths, owners, strict=True):
        inside = np.zeros(len(grid), int)
        for ring in path.to_polygons():  # winding number: what is filled
            x, y = ring[:, 0], ring[:, 1]
            turn = np.sign((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())
            inside += int(turn) * shapely.contains_xy(shapely.Polygon(ring), grid[:, 0], grid[:, 1])
        expected = shapely.contains_xy(geometries[owner], grid[:, 0], grid[:, 1])
        np.testing.assert_array_equal(inside != 0, expected)


def test_no_polygons_no_paths():
    paths, owners = polygon_paths(np.array([None, shapely.Point(0, 0)], object))
    assert paths == []
    assert owners.tolist() == []


def test_a_burn_of_the_path_is_rasterios():
    rng = np.random.default_rng(1)
    mask = rng.random((40, 60)) < 0.4
    shapes = [shapely.affinity.translate(box, 0.5, 0.5) for box in _rectangles(mask_path(mask))]
    np.testing.assert_array_equal(rasterize(shapes, out_shape=mask.shape).astype(bool), mask)
