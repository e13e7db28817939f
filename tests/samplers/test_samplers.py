"""Samplers, orders and splits."""

from __future__ import annotations

import pickle
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.features import geometry_mask

import rasteret_ml as rm
from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.samplers.ranks import epoch_random, parse_seed, uniforms

CRS = "EPSG:32633"


class Plane:
    """A minimal dataset for samplers."""

    res = (10.0, 10.0)

    def __init__(self, *shapes: shapely.Geometry) -> None:
        when = pd.Timestamp("2023-01-01")
        index = pd.IntervalIndex.from_arrays([when] * len(shapes), [when] * len(shapes), closed="both", name="datetime")
        self.index = gpd.GeoDataFrame(geometry=list(shapes), crs=CRS, index=index)
        self.crs = self.index.crs

    @property
    def bounds(self):
        xmin, ymin, xmax, ymax = self.index.total_bounds
        return (
            slice(xmin, xmax, 10.0),
            slice(ymin, ymax, 10.0),
            slice(self.index.index.left.min(), self.index.index.right.max(), 1),
        )


SQUARE = shapely.box(0, 0, 10000, 10000)
L_SHAPE = shapely.Polygon([(0, 0), (9000, 0), (9000, 800), (800, 800), (800, 9000), (0, 9000)])


def box_of(aoi) -> shapely.Polygon:
    x, y, _ = aoi
    return shapely.box(x.start, y.start, x.stop, y.stop)


def test_order_is_a_function_of_seed_epoch_and_position():
    """The numbers do not depend on how many are drawn, or on what was drawn before."""
    whole = uniforms(3, 5, range(100))
    np.testing.assert_array_equal(uniforms(3, 5, range(40, 47)), whole[40:47])
    np.testing.assert_array_equal(uniforms(3, 5, range(11, 100, 4)), whole[11:100:4])
    assert uniforms(3, 5, range(11, 11, 4)).shape == (0, 4)
    assert not np.array_equal(uniforms(3, 6, range(100)), whole)
    assert not np.array_equal(uniforms(4, 5, range(100)), whole)
    sampler = rm.RandomAOISampler(Plane(SQUARE), 64, 3000, seed=3)
    aois = list(sampler)
    assert [tuple(a) for a in aois[1020:1030]] == [tuple(sampler.at(i)) for i in range(1020, 1030)]
    longer = list(rm.RandomAOISampler(Plane(SQUARE), 64, 5000, seed=3))
    assert [tuple(a) for a in longer[:3000]] == [tuple(a) for a in aois]


def test_no_chip_misses_its_polygon_in_ten_thousand_draws(shared_data: Path):
    """The centre of each chip lies in its AOI, holes and multi-parts included."""
    plane = Plane(shapely.box(250000, 270000, 280000, 295000))
    plane.index = plane.index.set_crs(27700, allow_override=True)
    plane.crs = plane.index.crs
    for name in ("single_poly", "single_poly_hole", "multi_polys", "region_of_interest"):
        path = shared_data / "landcover" / "polygons" / f"aber_osgb_{name}.geojson"
        table = gpd.read_file(path)
        sampler = rm.RandomAOISampler(plane, 16, 10_000, aois=str(path), seed=1)
        aois = list(sampler)
        shapes = np.asarray(table.geometry)[[a.row for a in aois]]
        centres = shapely.points([((a[0].start + a[0].stop) / 2, (a[1].start + a[1].stop) / 2) for a in aois])
        assert shapely.distance(shapes, centres).max() < 1e-6
        assert shapely.intersects(shapes, np.array([box_of(a) for a in aois])).all()
        assert all(a.geometry.equals_exact(s, 1e-6) for a, s in zip(aois[:50], shapes[:50], strict=True))


def test_inside_means_the_whole_chip():
    """Also in an L-shaped polygon."""
    sampler = rm.RandomAOISampler(Plane(SQUARE), 32, 2000, aois=[L_SHAPE], aois_crs=CRS, placement="inside")
    assert shapely.covers(L_SHAPE.buffer(1e-6), np.array([box_of(a) for a in sampler])).all()


def test_draws_are_uniform_over_the_area():
    """Chi-squared over 64 cells of the region that centres may take (99.9 % quantile of 63 degrees: 103.4)."""
    sampler = rm.RandomAOISampler(Plane(SQUARE), 100, 20_000, seed=8)
    centres = np.array([((x.start + x.stop) / 2, (y.start + y.stop) / 2) for x, y, _ in sampler])
    cells = np.floor((centres - 500) / (9000 / 8)).astype(int)
    counts = np.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64)
    assert ((counts - 312.5) ** 2 / 312.5).sum() < 103.4


def test_chips_stay_inside_the_scenes_if_the_polygon_leaves_room():
    """A field at the scene's edge is still sampled, with whole chips."""
    field = shapely.box(-500, 4000, 1200, 6000)
    sampler = rm.RandomAOISampler(Plane(SQUARE), 50, 500, aois=[field], aois_crs=CRS)
    boxes = np.array([box_of(a) for a in sampler])
    assert shapely.covers(SQUARE.buffer(1e-6), boxes).all()


def test_a_polygon_around_the_world_contains_all_scenes():
    """It cannot be projected to a UTM zone, but it contains the scenes."""
    world = gpd.GeoSeries([shapely.box(-180, -85, 180, 85)], crs=4326)
    plane = Plane(shapely.box(400000, 5000000, 500000, 5100000))
    sampler = rm.GridAOISampler(plane, 2000, aois=world)
    assert len(sampler) == len(rm.GridAOISampler(plane, 2000))


def test_a_chip_as_large_as_the_scene_fits():
    """It is neither refused nor moved."""
    sampler = rm.RandomAOISampler(Plane(SQUARE), 1000, 3)
    for x, y, _ in sampler:
        assert (x.start, x.stop, y.start, y.stop) == pytest.approx((0, 10000, 0, 10000), abs=0.1)


def test_polygons_are_reprojected_to_the_datasets_crs():
    """Longitude/latitude polygons are sampled in metres."""
    here = gpd.GeoSeries([shapely.box(2000, 2000, 3000, 3000)], crs=CRS)
    sampler = rm.RandomAOISampler(Plane(SQUARE), 8, 200, aois=here.to_crs(4326))
    grown = here[0].buffer(1)
    assert all(grown.contains(box_of(a).centroid) for a in sampler)


@examples(40)
@given(
    st.integers(1, 60), st.integers(1, 60), st.data(), st.integers(30, 200), st.integers(30, 200), st.integers(-50, 50)
)
def test_a_grid_covers_every_pixel(height, width, data, rows, cols, shift):
    """For any size, stride and extent, and on the pixel grid."""
    stride = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    if (rows / stride[0]) * (cols / stride[1]) > 4000:
        return
    plane = Plane(shapely.box(10.0 * shift, 0, 10.0 * (shift + cols), 10.0 * rows))
    seen = np.zeros((rows, cols), bool)
    for x, y, _ in rm.GridAOISampler(plane, (height, width), stride):
        left, top = x.start / 10 - shift, rows - y.stop / 10
        assert left == pytest.approx(round(left), abs=1e-6)
        assert x.stop - x.start == pytest.approx(10 * width)
        assert y.stop - y.start == pytest.approx(10 * height)
        r, c = round(top), round(left)
        assert r >= 0
        assert c >= 0
        seen[r : r + height, c : c + width] = True
    assert seen.all()


def test_a_grid_in_a_polygon_covers_it_and_nothing_else():
    """Every chip intersects the polygon, and no pixel of it is left out."""
    sampler = rm.GridAOISampler(Plane(SQUARE), 20, aois=[L_SHAPE], aois_crs=CRS)
    boxes = np.array([box_of(a) for a in sampler])
    assert (shapely.area(shapely.intersection(boxes, L_SHAPE)) > 0).all()
    assert shapely.union_all(boxes).buffer(1e-6).covers(L_SHAPE)
    assert len(boxes) < 0.4 * len(rm.GridAOISampler(Plane(SQUARE), 20))


def test_aois_can_be_pickled():
    """An AOI is a tuple of three slices, and keeps its details when pickled."""
    aoi = next(iter(rm.RandomAOISampler(Plane(SQUARE), 8, 1, aois=[L_SHAPE], aois_crs=CRS, seed=5)))
    other = pickle.loads(pickle.dumps(aoi))
    assert isinstance(other, tuple)
    assert len(other) == 3
    assert other == aoi
    assert (other.row, other.epoch, other.position, other.seed, other.crs) == (0, 0, 0, 5, CRS)
    assert other.geometry.equals(L_SHAPE)
    with pytest.raises(AttributeError, match="nothing"):
        _ = aoi.nothing


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"size": 0}, UsageError, "at least one pixel"),
        ({"size": (8, -1)}, UsageError, "at least one pixel"),
        ({"size": "64"}, UsageError, "'64'"),
        ({"size": (2.7, 3)}, UsageError, "2.7"),
        ({"time": ("2023-02-01", "2023-01-01")}, UsageError, "ends before it starts"),
        ({"time": ("soon", "..")}, UsageError, "soon"),
        ({"size": "big"}, UsageError, "'big'"),
        ({"length": 0}, UsageError, "length"),
        ({"length": 2.5}, UsageError, "length"),
        ({"aois": [shapely.Point(1, 1)]}, GeometryError, "Point"),
        ({"aois": [SQUARE, shapely.box(5e5, 5e5, 5.1e5, 5.1e5)]}, GeometryError, "AOI 1 .*outside every scene"),
        ({"aois": [shapely.box(0, 0, 50, 50)], "placement": "inside"}, UsageError, r"fits in AOIs \[0\]"),
        ({"size": 5000}, UsageError, "fits in what the dataset covers"),
        ({"aois": "nowhere.geojson"}, GeometryError, "nowhere.geojson"),
        ({"placement": "beside"}, UsageError, "beside"),
    ],
)
def test_bad_arguments_are_refused(kwargs, error, text):
    """The constructor raises an error that names the argument."""
    arguments = {"size": 64, "length": 10, "aois_crs": CRS} | kwargs
    with pytest.raises(error, match=text):
        rm.RandomAOISampler(Plane(SQUARE), **arguments)


def test_grid_refuses_gaps():
    """A stride above the size would leave pixels out."""
    with pytest.raises(UsageError, match="gaps"):
        rm.GridAOISampler(Plane(SQUARE), 32, 33)


@pytest.mark.parametrize(
    ("options", "second"),
    [
        ({"side": "top", "fraction": 0.3}, shapely.box(0, 7000, 10000, 10000)),
        ({"side": "left", "fraction": 0.25}, shapely.box(0, 0, 2500, 10000)),
        ({"by": (2000, 2000, 4000, 4000)}, shapely.box(2000, 2000, 4000, 4000)),
        ({"by": shapely.LineString([(3000, 100), (3000, 200)])}, shapely.box(3000, 0, 10000, 10000)),
        ({"by": shapely.LineString([(3000, 100)] * 2 + [(3000, 200)])}, shapely.box(3000, 0, 10000, 10000)),
        ({"by": L_SHAPE}, L_SHAPE),
    ],
)
def test_spatial_split(options, second):
    """A side, box, line or polygon; the parts cover the whole and do not overlap."""
    one, two = rm.spatial_split(Plane(SQUARE), **options)
    assert two.geometry[0].symmetric_difference(second).area < 1e-3
    assert one.geometry[0].intersection(two.geometry[0]).area < 1e-3
    assert one.geometry[0].area + two.geometry[0].area == pytest.approx(SQUARE.area)
    assert one.crs == CRS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"side": "top", "by": L_SHAPE},
        {"side": "up"},
        {"side": "top", "fraction": 1},
        {"by": SQUARE},
        {"by": shapely.LineString([(5, 5), (5, 5)])},
    ],
)
def test_impossible_splits_are_refused(options):
    """Neither, both, an unknown side, an empty part."""
    with pytest.raises(UsageError):
        rm.spatial_split(Plane(SQUARE), **options)


@pytest.mark.slow
def test_mask_aoi_equals_rasterios_mask(shared_data: Path, tmp_path):
    """For holes and multi-parts, on real pixels."""
    files = str(shared_data / "landcover" / "images" / "*.tif")
    collection = rm.build(files, tmp_path / "c.parquet")
    for all_touched in (False, True):
        dataset = rm.RasteretDataset(
            collection,
            collection.bands[:1],
            sample={"mask_aoi": True, "all_touched": all_touched},
            reading={"cache_bytes": 10**8},
        )
        for name in ("single_poly", "single_poly_hole", "multi_polys"):
            path = shared_data / "landcover" / "polygons" / f"aber_osgb_{name}.geojson"
            table = gpd.read_file(path)
            seen = set()
            for aoi in rm.GridAOISampler(dataset, 96, aois=str(path)):
                sample = dataset[aoi]
                transform = Grid(crs=None, transform=_affine(sample), shape=(96, 96)).transform
                expected = geometry_mask(
                    [table.geometry[aoi.row]], (96, 96), transform, all_touched=all_touched, invert=True
                )
                np.testing.assert_array_equal(sample["mask_aoi"][0].numpy(), expected)
                seen.add(bool(expected.any()) and not expected.all())
            assert True in seen


def _affine(sample):
    from affine import Affine

    return Affine(*sample["transform"][:6].tolist())


def test_dates_in_a_time_of_interest_cover_whole_days():
    """An end without a time of day covers the whole day, month or year; ".." is open."""
    plane = Plane(SQUARE)
    for time, stop in (
        (("2022-12-01", "2023-01-01"), "2023-01-01T23:59:59"),
        ("2022-12/2023-01", "2023-01-31T23:59:59"),
        (("2022-12-01", "2023-01-01T10:00"), "2023-01-01T10:00"),
        (("2022", ".."), "2023-01-01"),
        (("2022", "9999-12-31"), "2262-04-11T23:47:16"),
        (pd.Interval(pd.Timestamp("2022-01-01"), pd.Timestamp("9999-12-31")), "2262-04-11T23:47:16"),
    ):
        _, _, t = next(iter(rm.RandomAOISampler(plane, 64, 1, time=time)))
        assert t.stop.floor("s") == pd.Timestamp(stop), time


def test_every_seed_has_its_own_order():
    """Also negative seeds, and those that are equal as float64."""
    seeds = [0, 1, -1, -2, 2**62, 2**62 + 1, -(2**63), 2**63 - 1]
    orders = {uniforms(seed, 0, range(4)).tobytes() for seed in seeds}
    assert len(orders) == len({epoch_random(seed, 0).random(4).tobytes() for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [1.5, "a", None, 2**63, -(2**63) - 1])
def test_a_seed_must_be_a_64_bit_integer(seed):
    with pytest.raises(UsageError, match="seed"):
        parse_seed(seed)
