"""Hatches and outlines of masks, against the pixels."""

from __future__ import annotations

import itertools

import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from picture_oracle import artists
from rasterio.features import rasterize

from rasteret_ml.plotting.chips import ChipLayers, draw_chips

_MASKS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def _drawn(gid, **masks):
    """The polygons or lines `[N, 2]` in pixels that are drawn under that name, as often as they are drawn."""
    (mask,) = masks.values()
    figure = draw_chips([ChipLayers(labels=np.zeros(mask.shape, int), **masks)])
    return [path.to_polygons(closed_only=False) for area in artists(figure.axes[0], gid) for path in area.get_paths()]


def _hatched(mask):
    return next(iter(_drawn("not valid", valid=~mask)), [])


def _signed_area(ring):
    x, y = ring.T
    return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2


def _burnt(rings, shape):
    """How often each pixel's centre is wound around."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    count = np.zeros(shape, int)
    for ring in rings:
        count += int(np.sign(_signed_area(ring))) * shapely.contains_xy(shapely.Polygon(ring), x, y)
    return count


@settings(max_examples=80, deadline=None)
@given(_MASKS)
def test_the_hatch_covers_each_masked_pixel_once_and_nothing_else(mask):
    rings = [ring for ring in _hatched(mask) if _signed_area(ring)]
    assert sum(map(_signed_area, rings)) == mask.sum()
    np.testing.assert_array_equal(abs(_burnt(rings, mask.shape)), mask)
    assert all((ring % 1 == 0.5).all() for ring in rings)


def test_a_rectangle_is_one_polygon():
    mask = np.zeros((500, 400), bool)
    mask[100:300, 50:350] = True
    (ring,) = _hatched(mask)
    assert shapely.Polygon(ring).equals(shapely.box(49.5, 99.5, 349.5, 299.5))


@settings(max_examples=80, deadline=None)
@given(_MASKS)
def test_the_outline_is_where_neighbours_differ(mask):
    expected = set()
    for row, col in np.ndindex(*mask.shape):
        if row and mask[row, col] != mask[row - 1, col]:
            expected.add(((col - 0.5, row - 0.5), (col + 0.5, row - 0.5)))
        if col and mask[row, col] != mask[row, col - 1]:
            expected.add(((col - 0.5, row - 0.5), (col - 0.5, row + 0.5)))
    lines = _drawn("AOI", inside=mask)
    assert len(lines) == (2 if expected else 0)  # a dark rim under a bright line
    for drawn in lines:
        found = set()
        for line in drawn:
            for ends in itertools.pairwise(map(tuple, line)):
                (x0, y0), (x1, y1) = sorted(ends)
                steps = round(abs(x1 - x0) + abs(y1 - y0))
                points = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1) if steps]
                pieces = set(itertools.pairwise(points))
                assert not pieces & found
                found |= pieces
        assert found == expected


def test_a_burn_of_the_hatch_is_rasterios():
    mask = np.random.default_rng(1).random((40, 60)) < 0.4
    rings = [ring for ring in _hatched(mask) if _signed_area(ring)]
    burnt = np.zeros(mask.shape, int)
    for ring in rings:
        shape = shapely.affinity.translate(shapely.Polygon(ring), 0.5, 0.5)
        burnt += int(np.sign(_signed_area(ring))) * rasterize([shape], out_shape=mask.shape)
    np.testing.assert_array_equal(burnt.astype(bool), mask)
