"""PolygonDataset: what is painted, where labels are known, other CRSs, times, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio.features
import shapely
import torch
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from pyproj import Transformer

import rasteret_ml as rm
from rasteret_ml.errors import GeometryError, NoOverlapError, UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.samplers.aoi.aoi import AOI, AOIDetails
from rasteret_ml.samples.sample import TENSOR_ONLY

UTM = "EPSG:32633"
X, Y = 500000.0, 5000000.0
EVER = slice(pd.Timestamp.min, pd.Timestamp.max, 1)


def table(shapes, **columns) -> gpd.GeoDataFrame:
    """Polygons given in pixels of 10 m, columns and rows from the corner (X, Y)."""
    moved = [shapely.transform(s, lambda xy: np.column_stack([X + 10 * xy[:, 0], Y - 10 * xy[:, 1]])) for s in shapes]
    return gpd.GeoDataFrame(columns, geometry=moved, crs=UTM)


def chip(col: int, row: int, width: int, height: int) -> tuple[slice, slice]:
    """The slices of pixels of the same grid."""
    return slice(X + 10 * col, X + 10 * (col + width), 10), slice(Y - 10 * (row + height), Y - 10 * row, 10)


def transform_of(sample) -> Affine:
    return Affine(*sample["transform"][:6].tolist())


points = st.tuples(st.floats(-20, 60), st.floats(-20, 60))


@st.composite
def polygons(draw):
    """Up to six overlapping polygons, some with a hole, some of two parts."""
    shapes = []
    for _ in range(draw(st.integers(1, 6))):
        hull = shapely.MultiPoint(draw(st.lists(points, min_size=4, max_size=9))).convex_hull
        if draw(st.booleans()):
            hull = shapely.difference(hull, shapely.Point(draw(points)).buffer(draw(st.floats(1, 8)), quad_segs=2))
        if draw(st.booleans()):
            hull = shapely.union(hull, shapely.box(*draw(points), 61, 61))
        if hull.geom_type in ("Polygon", "MultiPolygon") and hull.area > 1e-3:
            shapes.append(hull)
    return shapes or [shapely.box(0, 0, 5, 5)]


@examples(60)
@given(polygons(), st.booleans(), st.sampled_from([None, 7]), st.sampled_from([None, "area", "rank"]), st.data())
def test_labels_equal_rasterio_in_drawing_order(shapes, all_touched, background, order, data):
    """For any overlap and order, with and without `all_touched` and a background."""
    n = len(shapes)
    rank = data.draw(st.permutations(range(n)))
    frame = table(shapes, cls=[int(i % 3) for i in range(n)], rank=rank)
    dataset = rm.PolygonDataset(
        frame, "cls", classes={0: 0, 1: 1, 2: 2}, background=background,
        rasterize={"order": order, "all_touched": all_touched},
        extent=shapely.box(X - 1000, Y - 2000, X + 2000, Y + 1000), res=10,
    )  # fmt: skip
    sample = dataset[chip(3, 5, 40, 30)]
    keys = {None: range(n), "area": [-s.area for s in frame.geometry], "rank": rank}[order]
    upwards = sorted(range(n), key=lambda i: keys[i])  # stable: the later one of equals is on top
    expected = rasterio.features.rasterize(
        [(frame.geometry[i], int(frame.cls[i])) for i in upwards], out_shape=(30, 40), transform=transform_of(sample),
        fill=-100 if background is None else background, all_touched=all_touched, dtype="int32",
    )  # fmt: skip
    np.testing.assert_array_equal(sample["mask"].numpy(), expected)
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), expected != -100)


def test_sample_keys_types_and_shapes():
    """As documented; no 0-d tensor among them."""
    dataset = rm.PolygonDataset(table([shapely.box(0, 0, 50, 50)]), res=10)
    sample = dataset[chip(0, 0, 20, 10)]
    found = {k: (v.dtype, tuple(v.shape)) for k, v in sample.items() if isinstance(v, torch.Tensor)}
    expected = {
        "mask": (torch.int64, (10, 20)),
        "mask_valid": (torch.bool, (1, 10, 20)),
        "transform": (torch.float64, (9,)),
    }
    if TENSOR_ONLY:
        expected["bounds"] = (torch.float64, (9,))
    else:
        assert (sample["bounds"][:2], sample["crs"].to_epsg()) == (chip(0, 0, 20, 10), 32633)
    assert found == expected
    assert (sample["mask"] == 1).all()
    batch = rm.collate(dataset.__getitems__([chip(0, 0, 20, 10), chip(5, 5, 20, 10)]))
    assert batch["mask"].shape == (2, 10, 20)
    assert batch["bounds"].dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "classes", "painted"),
    [
        ({}, {"oak": 0, "pine": 1}, [1, 0, -100]),
        ({"background": 0}, {"oak": 1, "pine": 2}, [2, 1, -100]),
        ({"background": 1}, {"oak": 0, "pine": 2}, [2, 0, -100]),
        ({"classes": ["pine", "oak"]}, {"pine": 0, "oak": 1}, [0, 1, -100]),
        ({"classes": ["pine", "oak"], "background": "oak"}, {"pine": 0, "oak": 1}, [0, 1, -100]),
        ({"classes": ["pine"], "ignore_index": 255}, {"pine": 0}, [0, 255, 255]),
        ({"classes": {"pine": 5, "oak": 3}, "background": 3}, {"pine": 5, "oak": 3}, [5, 3, -100]),
    ],
)
def test_text_becomes_classes(options, classes, painted):
    """Sorted, listed or mapped; a background leaves its number out; unlisted and missing values are unknown."""
    frame = table([shapely.box(i, 0, i + 1, 1) for i in range(3)], kind=["pine", "oak", None])
    dataset = rm.PolygonDataset(frame, "kind", res=10, **options)
    sample = dataset[chip(0, 0, 3, 1)]
    assert dataset.classes == classes
    assert sample["mask"][0].tolist() == painted
    assert sample["mask_valid"][0, 0].tolist() == [v != options.get("ignore_index", -100) for v in painted]


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([4, 1, 2], {1: 0, 2: 1, 4: 2}),
        ([4.0, np.nan, 2.0], {2: 0, 4: 1}),
        (pd.Categorical(["b", "a", "b"], ["b", "a", "c"]), {"a": 0, "b": 1}),
        ([True, False, True], {False: 0, True: 1}),
    ],
)
def test_numbers_categories_and_booleans_are_classes(values, classes):
    """Integers with missing values are read as floats, and are still classes."""
    dataset = rm.PolygonDataset(table([shapely.box(i, 0, i + 1, 1) for i in range(3)], v=values), "v", res=10)
    assert dataset.classes == classes
    expected = [-100 if pd.isna(v) else classes[v] for v in values]
    assert dataset[chip(0, 0, 3, 1)]["mask"][0].tolist() == expected


def test_continuous_labels_are_float_with_nan():
    """NaN outside, and where the value is missing."""
    frame = table([shapely.box(0, 0, 1, 1), shapely.box(1, 0, 2, 1)], height=[2.5, np.nan])
    sample = rm.PolygonDataset(frame, "height", continuous=True, res=10, key="mask_height")[chip(0, 0, 3, 1)]
    assert sample["mask_height"].dtype == torch.float32
    np.testing.assert_array_equal(sample["mask_height"][0].numpy(), [2.5, np.nan, np.nan])
    assert sample["mask_valid"][0, 0].tolist() == [True, False, False]
    filled = rm.PolygonDataset(frame, "height", continuous=True, background=0, res=10)[chip(0, 0, 2, 1)]
    np.testing.assert_array_equal(filled["mask"][0].numpy(), [2.5, np.nan])


def test_a_place_without_polygons():
    """An error by default and outside an extent; inside it background, or unknown."""
    frame = table([shapely.box(0, 0, 5, 5), shapely.box(95, 95, 100, 100)])
    empty = chip(40, 40, 10, 10)
    with pytest.raises(NoOverlapError, match="background="):
        rm.PolygonDataset(frame, res=10)[empty]
    background = rm.PolygonDataset(frame, background=0, res=10)
    sample = background[empty]
    assert (sample["mask"] == 0).all()
    assert sample["mask_valid"].all()
    extent = shapely.box(X, Y - 1000, X + 1000, Y)
    nothing = rm.PolygonDataset(frame, extent=extent, res=10)[empty]
    assert (nothing["mask"] == -100).all()
    assert not nothing["mask_valid"].any()
    edge = background[chip(90, 90, 20, 20)]
    known = np.zeros((20, 20), bool)
    known[:10, :10] = True
    np.testing.assert_array_equal(edge["mask_valid"][0].numpy(), known)
    assert (edge["mask"].numpy()[~known] == -100).all()
    with pytest.raises(NoOverlapError, match="extent"):
        background[chip(300, 300, 10, 10)]


def test_the_index_is_the_polygons_or_the_extent():
    """One row per polygon; with an extent one row per time."""
    shapes = [shapely.box(i, 0, i + 1, 1) for i in range(3)]
    start, end = ["2021-01-01", "2022-01-01", None], ["2021-12-31", "2022-06-30", None]
    frame = table(shapes, start=start, end=end)
    times = ("start", "end")
    rows = rm.PolygonDataset(frame, time=times, res=10).index
    assert rows["polygon"].tolist() == [0, 1, 2]
    assert rows.index.closed == "both"
    assert rows.index.name == "datetime"
    assert rows.index[0].left == pd.Timestamp("2021-01-01")
    assert rows.index[0].right.floor("s") == pd.Timestamp("2021-12-31T23:59:59")
    assert (rows.index[2].left, rows.index[2].right) == (pd.Timestamp.min, pd.Timestamp.max)
    bounded = rm.PolygonDataset(frame, time=times, background=0, res=10).index
    assert len(bounded) == 3
    assert all(geometry.equals(shapely.box(*frame.total_bounds)) for geometry in bounded.geometry)
    assert len(rm.PolygonDataset(frame, background=0, res=10).index) == 1


def test_polygons_are_rasterized_at_their_time():
    """Both ends are included, instants match, time zones become UTC, missing ends are open."""
    shapes = [shapely.box(i, 0, i + 1, 1) for i in range(4)]
    stamps = ["2021-05-01T12:00+02:00", "2021-06-01T00:00Z", None, "2021-07-01"]
    dataset = rm.PolygonDataset(table(shapes, when=stamps), time="when", res=10)

    def valid(start: str, stop: str) -> list[bool]:
        query = (*chip(0, 0, 4, 1), slice(pd.Timestamp(start), pd.Timestamp(stop), 1))
        return dataset[query]["mask_valid"][0, 0].tolist()

    assert valid("2021-05-01T10:00", "2021-05-01T10:00") == [True, False, True, False]
    assert valid("2021-05-01T10:00:01", "2021-06-01") == [False, True, True, False]
    assert valid("2021-06-01", "2021-07-01") == [False, True, True, True]
    assert valid("2000-01-01", "2000-01-02") == [False, False, True, False]
    typed = table(shapes, when=pd.to_datetime(stamps, utc=True, format="ISO8601").tz_localize(None).as_unit("ns"))
    assert rm.PolygonDataset(typed, time="when", res=10).index.index.left.equals(dataset.index.index.left)
    assert dataset.index.index.left.tz is None


@pytest.mark.parametrize("crs", ["EPSG:32632", "EPSG:4326", "EPSG:3035"])
def test_polygons_are_rasterized_on_a_grid_in_another_crs(crs, rng):
    """By pixel centres: those well inside a polygon by an exact transform of the point are labelled, and no others."""
    frame = gpd.GeoDataFrame(
        {"v": [1, 2]}, crs="EPSG:32631",
        geometry=[shapely.Point(430000, 5650000).buffer(800), shapely.box(431000, 5648000, 433000, 5651000)],
    )  # fmt: skip
    middle = Transformer.from_crs("EPSG:32631", crs, always_xy=True).transform(431000, 5650000)
    res = (20 / 70000, 20 / 111000) if crs == "EPSG:4326" else (20.0, 20.0)
    transform = Affine(res[0], 0, middle[0] - 64 * res[0], 0, -res[1], middle[1] + 64 * res[1])
    grid = Grid(crs=crs, transform=transform, shape=(128, 128))
    dataset = rm.PolygonDataset(frame, "v", classes={1: 1, 2: 2}, background=0, extent=(4e5, 56e5, 46e4, 57e5))
    (sample,) = dataset.samples(dataset.requests([(slice(None), slice(None), EVER)], [grid]), []).samples
    cols, rows = np.meshgrid(np.arange(128) + 0.5, np.arange(128) + 0.5)
    x, y = transform @ (cols, rows)
    px, py = Transformer.from_crs(crs, "EPSG:32631", always_xy=True).transform(x, y)
    centres = shapely.points(px, py)
    expected = np.where(shapely.covers(frame.geometry[1], centres), 2, shapely.covers(frame.geometry[0], centres))
    unsure = np.min([shapely.distance(s.boundary, centres) for s in frame.geometry], axis=0) < 0.05  # metres
    assert unsure.mean() < 0.01
    assert set(np.unique(expected)) == {0, 1, 2}
    np.testing.assert_array_equal(sample["mask"].numpy()[~unsure], expected[~unsure])


def test_polygons_at_the_antimeridian_are_found_from_both_sides():
    """Polygons past 180 degrees or in two parts, and a chip across it."""
    for shape in (
        shapely.box(179, 10, 181, 12),
        shapely.MultiPolygon([shapely.box(179, 10, 180, 12), shapely.box(-180, 10, -179, 12)]),
    ):
        dataset = rm.PolygonDataset(gpd.GeoDataFrame(geometry=[shape], crs=4326), res=0.1)
        for west in (178, -182):
            grid = Grid(crs="EPSG:4326", transform=Affine(0.1, 0, west, 0, -0.1, 13), shape=(40, 40))
            (sample,) = dataset.samples(dataset.requests([(slice(None), slice(None), EVER)], [grid]), []).samples
            expected = np.zeros((40, 40), bool)
            expected[10:30, 10:30] = True
            np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), expected)
    utm = Grid(crs="EPSG:32601", transform=Affine(100, 0, 170000, 0, -100, 1217000), shape=(20, 20))
    assert (
        dataset.samples(dataset.requests([(slice(None), slice(None), EVER)], [utm]), []).samples[0]["mask_valid"].any()
    )


def test_a_polygon_with_many_vertices_is_rasterized_exactly():
    """Cutting it to the chip's surroundings changes no pixel."""
    angles = np.linspace(0, 2 * np.pi, 20001)
    radius = 300 + 5 * np.sin(500 * angles)
    shape = shapely.Polygon(np.column_stack([radius * np.cos(angles), radius * np.sin(angles)]))
    frame = table([shape])
    sample = rm.PolygonDataset(frame, res=10)[chip(180, 180, 64, 64)]
    expected = rasterio.features.rasterize(list(frame.geometry), out_shape=(64, 64), transform=transform_of(sample))
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), expected == 1)


def test_a_chip_lies_at_the_requested_bounds():
    """Polygons have no pixels of their own: nothing is rounded but the size."""
    dataset = rm.PolygonDataset(table([shapely.box(-50, -50, 50, 50)]), res=10)
    sample = dataset[slice(X + 3.25, X + 83.25), slice(Y - 47.5, Y + 2.5)]
    assert transform_of(sample) == Affine(10, 0, X + 3.25, 0, -10, Y + 2.5)
    assert sample["mask"].shape == (5, 8)
    fine = dataset[slice(X, X + 80, 5), slice(Y - 50, Y, 5)]
    assert fine["mask"].shape == (10, 16)


def test_an_aoi_in_another_crs_gets_a_chip_in_it():
    """As on native grids: its slices are in its own CRS."""
    dataset = rm.PolygonDataset(table([shapely.box(0, 0, 50, 50)]), res=10)
    x, y = Transformer.from_crs(UTM, "EPSG:32632", always_xy=True).transform(X + 250, Y - 250)
    aoi = AOI((slice(x - 80, x + 80, 10), slice(y - 80, y + 80, 10), EVER), AOIDetails(crs="EPSG:32632", row=7))
    grid = dataset.chip_grid(aoi)
    assert (grid.crs, grid.shape, grid.bounds) == ("EPSG:32632", (16, 16), (x - 80, y - 80, x + 80, y + 80))
    sample = dataset[aoi]
    assert sample["mask_valid"].all()
    assert sample["aoi"].tolist() == [7]


def test_an_own_resolution_is_kept_on_the_left(scenes):
    """Without one the polygons take the images' pixels, corner and all."""
    images = rm.RasteretDataset(scenes.images, ["B02"])
    frame = table([shapely.box(0, 0, 50, 50)])
    assert (rm.PolygonDataset(frame, res=20) & images).res == (20, 20)
    both = rm.PolygonDataset(frame.to_crs(4326)) & images
    assert (both.res, both.crs.to_epsg()) == ((10, 10), 32633)
    assert both[chip(3, 4, 8, 8)]["transform"].tolist()[:6] == [10, 0, X + 30, 0, -10, Y - 40]


def test_workers_rasterize_the_same(scenes):
    """Polygons and images in one batch, read in other processes."""
    images = rm.RasteretDataset(scenes.images, ["B02"])
    frame = table([shapely.box(i, i, i + 40, i + 60) for i in range(0, 240, 30)], v=range(8))
    both = images & rm.PolygonDataset(frame, "v")
    sampler = rm.RandomAOISampler(both, 32, 8, seed=2)
    batches = []
    for workers in (0, 2):
        sampler.set_epoch(0)
        batches.append(list(rm.DataLoader(both, 4, sampler=sampler, num_workers=workers)))
    for one, other in zip(*batches, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[key].nan_to_num(), other[key].nan_to_num()) for key in one if key != "image")
        assert torch.equal(one["image"].int(), other["image"].int())


def test_bow_ties_are_repaired():
    """A polygon without area is named."""
    tie = shapely.Polygon([(0, 0), (4, 4), (4, 0), (0, 4)])
    sample = rm.PolygonDataset(table([tie]), res=10)[chip(0, 0, 4, 4)]
    mended = shapely.make_valid(table([tie]).geometry[0])
    expected = rasterio.features.rasterize([mended], out_shape=(4, 4), transform=transform_of(sample))
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), expected == 1)
    line = shapely.Polygon([(0, 0), (4, 4), (2, 2), (0, 0)])
    with pytest.raises(UsageError, match="Polygon 1 encloses no area"):
        rm.PolygonDataset(table([tie, line]), res=10)


def test_pickles_are_small_and_whole():
    """About 100 bytes per polygon, for any index; splits and other CRSs are kept."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 1000, (5000, 2))
    frame = table(
        shapely.box(corners[:, 0], corners[:, 1], corners[:, 0] + 2, corners[:, 1] + 2), v=rng.integers(0, 4, 5000)
    )
    dataset = rm.PolygonDataset(frame, "v", res=10)
    expected = dataset[chip(100, 100, 200, 200)]
    assert (expected["mask"] >= 0).any()
    assert len(pickle.dumps(dataset)) < 120 * len(frame)
    half = copy.deepcopy(dataset)
    half.index = dataset.index.iloc[:2500]
    for other, same in ((dataset, expected), (half, half[chip(100, 100, 200, 200)])):
        for twin in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
            assert torch.equal(twin[chip(100, 100, 200, 200)]["mask"], same["mask"])
    assert not torch.equal(half[chip(100, 100, 200, 200)]["mask"], expected["mask"])
    moved = pickle.loads(pickle.dumps(dataset))
    moved.crs = "EPSG:32632"
    assert moved.crs.to_epsg() == pickle.loads(pickle.dumps(moved)).crs.to_epsg() == 32632


def test_what_a_split_removes_is_not_rasterized():
    """Whole rows, and parts of a polygon; also after a change of CRS."""
    dataset = rm.PolygonDataset(table([shapely.box(0, 0, 20, 20), shapely.box(20, 0, 40, 20)]), res=10)
    whole = dataset[chip(0, 0, 40, 20)]["mask_valid"][0].numpy()
    assert whole.all()
    left = copy.deepcopy(dataset)
    left.index = gpd.clip(dataset.index, shapely.box(X, Y - 1000, X + 100, Y))
    cut = left[chip(0, 0, 40, 20)]["mask_valid"][0].numpy()
    np.testing.assert_array_equal(cut, np.broadcast_to(np.arange(40) < 10, (20, 40)))
    left.crs = "EPSG:32632"
    grid = Grid(crs=UTM, transform=Affine(10, 0, X, 0, -10, Y), shape=(20, 40))
    (again,) = left.samples(left.requests([(slice(None), slice(None), EVER)], [grid]), []).samples
    assert (again["mask_valid"][0].numpy() != cut).sum() <= 20  # the cut edge went to another CRS and back


def test_samplers_draw_where_labels_are_known():
    """In polygons by default, in the extent with a background."""
    frame = table([shapely.box(0, 0, 30, 30), shapely.box(200, 200, 230, 230)])
    inside = rm.RandomAOISampler(rm.PolygonDataset(frame, res=10), 8, 50)
    samples = rm.PolygonDataset(frame, res=10).__getitems__(list(inside))
    assert all(sample["mask_valid"].all() for sample in samples)
    wide = rm.PolygonDataset(frame, background=0, res=10)
    drawn = wide.__getitems__(list(rm.RandomAOISampler(wide, 8, 50)))
    assert any(not sample["mask"].any() for sample in drawn)


def test_a_table_from_a_file_and_from_arrow(tmp_path: Path):
    """The same labels whichever way the polygons come."""
    frame = table([shapely.box(0, 0, 10, 10), shapely.box(5, 5, 20, 20)], kind=["a", "b"])
    frame.to_parquet(tmp_path / "p.parquet")
    frame.to_file(tmp_path / "p.gpkg")
    expected = rm.PolygonDataset(frame, "kind", res=10)[chip(0, 0, 20, 20)]["mask"]
    for source in (str(tmp_path / "p.parquet"), tmp_path / "p.gpkg", frame.to_arrow()):
        assert torch.equal(rm.PolygonDataset(source, "kind", res=10)[chip(0, 0, 20, 20)]["mask"], expected)


BOXES = [shapely.box(0, 0, 5, 5), shapely.box(5, 0, 9, 5)]


@pytest.mark.parametrize(
    ("columns", "arguments", "error", "text"),
    [
        ({"a": [1, 2]}, {"label": "b"}, UsageError, r"no such column; it has \['a', 'geometry'\]"),
        ({"a": [1, 2]}, {"label": "geometry"}, UsageError, "without an order"),
        ({"a": [1.5, 2]}, {"label": "a"}, UsageError, "continuous=True"),
        ({"a": ["x", 2]}, {"label": "a"}, UsageError, "several types"),
        ({"a": ["x", "y"]}, {"label": "a", "continuous": True}, UsageError, "numbers"),
        ({"a": ["1", "2"]}, {"label": "a", "classes": [1, 2]}, UsageError, "No polygon has any of the classes"),
        ({"a": ["x", "y"]}, {"label": "a", "classes": ["x", "x"]}, UsageError, "different values"),
        ({"a": ["x", "y"]}, {"label": "a", "classes": ["x", "y"], "background": 0}, UsageError, "the class of 'x'"),
        ({"a": ["x", "y"]}, {"label": "a", "background": "z"}, UsageError, "background='z'"),
        ({"a": ["x", "y"]}, {"label": "a", "ignore_index": 1}, UsageError, "ignore_index=1"),
        ({"a": ["x", "y"]}, {"label": "a", "classes": {"x": 0.5}}, UsageError, "'x' is mapped to 0.5"),
        ({"a": ["x", "y"]}, {"label": "a", "classes": {"x": "0"}}, UsageError, "'x' is mapped to '0'"),
        ({"a": [1, np.inf]}, {"label": "a"}, UsageError, "whole numbers"),
        ({"a": [None, None]}, {"label": "a"}, UsageError, "holds nothing"),
        ({"a": [[1], [2]]}, {"label": "a"}, UsageError, "without an order"),
        ({"a": [1.0, 1e300]}, {"label": "a", "continuous": True}, UsageError, r"Polygons \[1\] have a 'a'"),
        ({"a": [1.0, 2.0]}, {"label": "a", "continuous": True, "background": "x"}, UsageError, "must be a number"),
        ({}, {"classes": ["x"]}, UsageError, "label="),
        ({}, {"continuous": True}, UsageError, "label="),
        ({"a": [1, None]}, {"rasterize": {"order": "a"}}, UsageError, "polygon 1 has no value"),
        ({"t": ["yesterday", "now?"]}, {"time": "t"}, UsageError, r"polygons \[0, 1\] must be ISO.*yesterday"),
        ({"t": [2020, 2021]}, {"time": "t"}, UsageError, "years or seconds"),
        ({"s": ["2021"] * 2, "e": ["2022", "2020"]}, {"time": ("s", "e")}, UsageError, r"polygons \[1\] end before"),
        ({"s": ["2021"] * 2}, {"time": ("s",)}, UsageError, "or of two: "),
        ({}, {"key": "labels"}, UsageError, "begin with 'mask'"),
        ({}, {"key": "mask_valid"}, UsageError, "none of"),
        ({}, {"res": -1}, UsageError, "pixel size > 0"),
        ({}, {"polygons_crs": 4326}, GeometryError, "crs must be that of the geometries"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(columns, arguments, error, text):
    """The message names the column or row, and a remedy."""
    with pytest.raises(error, match=text):
        rm.PolygonDataset(table(BOXES, **columns), **({"res": 10} | arguments))


def test_points_and_columnless_geometries_are_refused():
    """With the remedy."""
    with pytest.raises(GeometryError, match="buffer"):
        rm.PolygonDataset([shapely.Point(0, 0)])
    with pytest.raises(UsageError, match="GeoDataFrame"):
        rm.PolygonDataset(BOXES, "kind")
    twice = table(BOXES, a=[1, 2]).assign(b=[3, 4]).rename(columns={"b": "a"})
    with pytest.raises(UsageError, match="2 columns of this name"):
        rm.PolygonDataset(twice, "a")


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (0, "sampler"),
        ((slice(0, 1), 3), "sampler"),
        ((slice(X, X), slice(Y - 10, Y)), "xmin < xmax"),
        ((slice(np.nan, X), slice(Y - 10, Y)), "finite"),
    ],
)
def test_bad_queries_are_refused(query, text):
    """As of rasters."""
    with pytest.raises(UsageError, match=text):
        rm.PolygonDataset(table(BOXES), res=10)[query]
    with pytest.raises(UsageError, match="no pixels"):
        rm.PolygonDataset(table(BOXES))[slice(X, X + 10), slice(Y - 10, Y)]


def test_an_end_that_names_a_day_includes_the_day():
    """As in AOI tables and `subset`."""
    table = gpd.GeoDataFrame(
        {"s": ["2023-01-01", "2023-01-01"], "e": ["2023-01-03", "2023-01-03T06:00"]},
        geometry=[shapely.box(0, 0, 9, 9)] * 2,
        crs="EPSG:32633",
    )
    ends = rm.PolygonDataset(table, time=("s", "e"), res=1.0).index.index.right
    assert [end.floor("s") for end in ends] == [pd.Timestamp("2023-01-03T23:59:59"), pd.Timestamp("2023-01-03T06:00")]
