"""Datasets with several target grids, the antimeridian, and the reach of chips."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import shapely
from fields import CRS, HOLED, L_SHAPE, PARTS, SQUARE, Plane, TwoZones, boxes, centres, chi_squared
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.errors import GeometryError
from rasteret_ml.geo.crs import transform_geometries
from rasteret_ml.geo.regions import dilate_by_box, erode_by_box, polygonal, union_polygons
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of

POINT = st.tuples(st.integers(0, 60), st.integers(0, 60))
POINT_IN = shapely.Point(50, 50)
ALONG = shapely.LineString([(0, 0), (900, 900)])
ZONES = ("EPSG:32632", CRS)


@pytest.fixture
def batch_diversity(monkeypatch):
    """The measure of diversity in the benchmarks."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    return importlib.import_module("batch_diversity").batch_diversity


def moved(shape, source, target):
    return transform_geometries(np.array([shape], dtype=object), source, target)[0]


@examples(60)
@given(
    st.lists(POINT, min_size=2, max_size=9, unique=True),
    st.sampled_from(["area", "line", "points"]),
    st.integers(1, 30),
)
def test_dilation_equals_brute_force(points, kind, width):
    """Boxes centred in the dilation intersect the geometry, and others do not."""
    line = shapely.LineString(points)
    shape = {
        "area": polygonal(shapely.Polygon([*points, (61, 61)])),
        "line": line,
        "points": shapely.MultiPoint(points),
    }[kind]
    height = 7.0
    grown = dilate_by_box(shape, width, height)
    if shape.is_empty:
        assert grown.is_empty
        return
    assert grown.is_valid
    xy = np.random.default_rng(0).uniform(-40, 110, (200, 2))
    half = np.array([width, height]) / 2
    met = shapely.intersects(shape, shapely.box(*(xy - half).T, *(xy + half).T))
    at = shapely.points(xy)
    clear = shapely.distance(at, grown.boundary) > 1e-6
    np.testing.assert_array_equal(shapely.intersects(grown, at)[clear], met[clear])


def test_dilation_fills_small_holes_and_keeps_large_ones():
    """It also reverts an erosion of boxes."""
    grown = dilate_by_box(HOLED, 600, 400)
    assert grown.equals(shapely.box(700, 800, 6300, 6200) - shapely.box(2300, 1700, 5200, 5400))
    assert dilate_by_box(HOLED, 4000, 400).equals(shapely.box(-1000, 800, 8000, 6200))
    assert dilate_by_box(erode_by_box(SQUARE, 300, 500), 300, 500).equals(SQUARE)


def test_the_default_target_grid():
    """It consists of the dataset's grid and index."""
    (grid,) = target_grids_of(Plane(SQUARE))
    assert (grid.crs, grid.res, grid.origin) == (CRS, (10.0, 10.0), (0.0, 10000.0))
    assert grid.shapes[0] is not None


def test_target_grids_are_drawn_by_area():
    """Each chip lies on its grid's pixels and in its CRS, in proportion to areas in square metres."""
    data = TwoZones()
    aois = list(rm.RandomAOISampler(data, 16, 8000, seed=2))
    zones = np.array([a.crs for a in aois])
    assert set(zones) == set(ZONES)
    sides = [erode_by_box(data.west, 160, 160).area, erode_by_box(data.east, 320, 320).area]
    counts = [(zones == zone).sum() for zone in ZONES]
    statistic, limit = chi_squared(counts, np.array(sides) / sum(sides) * 8000)
    assert statistic < limit
    for zone, scene, res in zip(ZONES, (data.west, data.east), (10.0, 20.0), strict=True):
        own = [a for a in aois if a.crs == zone]
        assert {a[0].step for a in own} == {res}
        assert shapely.covers(scene.buffer(1e-6), boxes(own)).all()


def test_degrees_are_converted_to_areas():
    """A square degree at 60 degrees north has half the area of one at the equator."""

    class Globe(Plane):
        def target_grids(self):
            shapes = (shapely.box(0, -0.5, 1, 0.5), shapely.box(0, 59.5, 1, 60.5))
            return [
                TargetGrid(crs="EPSG:4326", res=(1e-3, 1e-3), origin=(0.0, 60.5), shapes=np.array([s], dtype=object))
                for s in shapes
            ]

    globe = Globe(shapely.box(0, -0.5, 1, 60.5), crs="EPSG:4326", res=(1e-3, 1e-3))
    north = [a[1].start > 50 for a in rm.RandomAOISampler(globe, 4, 6000)]
    statistic, limit = chi_squared([sum(north), 6000 - sum(north)], [2000, 4000])
    assert statistic < 2 * limit  # the scale at the centroid is used for the whole scene
    weighted = rm.RandomAOISampler(
        globe, 4, 6000, aois=[shapely.box(0, 60, 1, 60.4), shapely.box(0, 0, 1, 0.4)], weight=[3, 1]
    )
    rows = np.bincount([a.row for a in weighted])
    statistic, limit = chi_squared(rows, [4500, 1500])
    assert statistic < limit


def test_aois_are_sampled_on_the_grids_that_they_intersect():
    """A field that both grids cover is sampled on both, and one in the east only on the eastern grid."""
    data = TwoZones()
    overlap = moved(data.west, ZONES[0], CRS) & data.east
    fields = [overlap.buffer(-500), shapely.box(310000, 5010000, 312000, 5012000)]
    sampler = rm.RandomAOISampler(data, 8, 3000, aois=fields, aois_crs=CRS, seed=1)
    seen = {(a.row, a.crs) for a in sampler}
    assert seen == {(0, ZONES[0]), (0, CRS), (1, CRS)}
    for a in list(sampler)[:300]:
        field = moved(fields[a.row], CRS, a.crs)
        assert field.buffer(0.5).contains(shapely.Point(*centres([a])[0]))
    each = list(rm.PerAOISampler(data, 8, [*fields, shapely.Point(311000, 5011000)], aois_crs=CRS))
    assert [a.row for a in each] == [0, 1, 2]
    assert [a.crs for a in each[1:]] == [CRS, CRS]
    with pytest.raises(GeometryError, match=r"AOI 1 .*outside every scene"):
        rm.RandomAOISampler(data, 8, 1, aois=[fields[1], shapely.box(5e5, 0, 6e5, 1e5)], aois_crs=CRS)


def test_per_aoi_uses_the_grid_that_covers_most():
    """It need not be the first grid that the AOI intersects."""
    data = TwoZones()
    west_in_east = moved(data.west, ZONES[0], CRS)
    field = shapely.box(west_in_east.bounds[2] - 1500, 5010000, west_in_east.bounds[2] + 9000, 5012000)
    assert field.intersects(west_in_east)
    assert [a.crs for a in rm.PerAOISampler(data, 8, [field], aois_crs=CRS)] == [CRS]


def test_a_grid_covers_the_area_of_all_target_grids_once():
    """Chips of the first grid cover the shared area, except for chips that extend past its edge."""
    data = TwoZones()
    aois = list(rm.GridAOISampler(data, 50))
    west = union_polygons(boxes([a for a in aois if a.crs == ZONES[0]]))
    east = union_polygons(boxes([a for a in aois if a.crs == CRS]))
    assert west.buffer(1).covers(data.west)
    first = moved(data.west, ZONES[0], CRS)
    assert east.buffer(1).covers(data.east - first.buffer(1))
    assert all(not first.buffer(-1500).intersects(box) for box in boxes([a for a in aois if a.crs == CRS]))


def test_locality_with_several_target_grids(batch_diversity):
    """The same chips in another order."""
    data = TwoZones()
    plain = rm.RandomAOISampler(data, 16, 400, seed=3)
    local = rm.RandomAOISampler(data, 16, 400, seed=3, locality=2)
    assert sorted((a.crs, a[0].start, a[1].start) for a in plain) == sorted(
        (a.crs, a[0].start, a[1].start) for a in local
    )
    assert [a[0] for a in plain] != [a[0] for a in local]
    found = batch_diversity(local, data, 8)
    assert found.scenes_uniform == pytest.approx(2, abs=0.1)
    assert found.tiles < batch_diversity(plain, data, 8).tiles


@pytest.mark.parametrize(
    ("make", "epochs", "least"),
    [
        (lambda d: rm.RandomAOISampler(d, (20, 31), 1500, aois=[L_SHAPE, HOLED], aois_crs=CRS), 2, 0.9),
        (
            lambda d: rm.RandomAOISampler(
                d, 20, 300, aois=[HOLED, PARTS], aois_crs=CRS, placement={"inset": 20}, min_valid=0.5
            ),
            2,
            0.9,
        ),
        (lambda d: rm.RandomAOISampler(d, 100, 600), 1, 0.9),
        (lambda d: rm.GridAOISampler(d, (20, 31), aois=[L_SHAPE], aois_crs=CRS), 1, 1.0),
        (lambda d: rm.PerAOISampler(d, (80, 90), [HOLED, POINT_IN], aois_crs=CRS, min_valid=0.1), 80, 0.9),
        (lambda d: rm.PerAOISampler(d, None, [HOLED, L_SHAPE], aois_crs=CRS, pad=2), 1, 1.0),
        (lambda d: rm.PerAOISampler(d, 20, [ALONG, PARTS], aois_crs=CRS, placement="random", chips=400), 1, 0.8),
    ],
)
def test_reach_contains_every_chip_and_little_else(make, epochs, least):
    """It contains all chips and spares of several epochs, and is not much larger than their union."""
    sampler = make(Plane(SQUARE))
    ((crs, region),) = sampler.reach()
    assert crs == CRS
    assert region.is_valid
    chips = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for aoi in sampler:
            chips += [aoi, *(aoi.spare(k) for k in range(len(aoi.spares)))]
    assert shapely.covers(region.buffer(1e-3), boxes(chips)).all()
    assert union_polygons(boxes(chips)).area >= (least - 1e-9) * region.area


def test_reach_of_several_target_grids():
    """It has one region for each CRS."""
    found = dict(rm.RandomAOISampler(TwoZones(), 16, 10).reach())
    assert set(found) == set(ZONES)
    assert found[CRS].symmetric_difference(TwoZones.east).area < 1e-3


def test_aois_across_the_antimeridian_are_whole():
    """As two parts or past 180 degrees, on both sides of the scenes' longitudes."""
    fiji = Plane(shapely.box(170, -20, 180, -10), shapely.box(-180, -20, -175, -10), crs="EPSG:4326", res=(0.01, 0.01))
    past = shapely.box(178, -16, 183, -14)
    parts = shapely.MultiPolygon([shapely.box(178, -16, 180, -14), shapely.box(-180, -16, -177, -14)])
    for field in (past, parts):
        aois = list(rm.RandomAOISampler(fiji, 8, 400, aois=[field], seed=1))
        x, y = (centres(aois) - (0, 0)).T
        x = x % 360
        assert ((x >= 178 - 1e-9) & (x <= 183 + 1e-9) & (y >= -16) & (y <= -14)).all()
        counts = np.histogram(x, 5, (178, 183))[0]
        statistic, limit = chi_squared(counts, np.full(5, 80))
        assert statistic < limit
    zone = Plane(shapely.box(700000, 8200000, 900000, 8300000), crs="EPSG:32760")
    across = shapely.box(179.5, -16, 180.2, -15.8)
    aois = list(rm.PerAOISampler(zone, None, [across]))
    x, y, _ = aois[0]
    xmin, ymin, xmax, ymax = moved(across, "EPSG:4326", "EPSG:32760").bounds
    assert 0 <= xmin - x.start < 10
    assert 0 <= x.stop - xmax < 10
    assert 0 <= ymin - y.start < 10
    assert 0 <= y.stop - ymax < 10
