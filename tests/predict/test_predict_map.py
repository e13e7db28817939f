"""`predict_map` from files to files, with rasterio as the judge."""

from __future__ import annotations

import functools

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import rasterio.features
import shapely
import torch
from affine import Affine
from cog_rules import broken_rules
from rasterio.warp import transform as moved_points

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.predict.prediction_map import PredictionMap
from rasteret_ml.testing import make_cog

NAMES = ["water", "wood", "field", "town"]
COLOURS = {0: (0, 0, 255), 1: (0, 100, 0), 2: (200, 200, 0), 3: (255, 0, 0)}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """One scene of 4 bands, 210 x 330 pixels, with a hole; its pixels, and a dataset."""
    folder = tmp_path_factory.mktemp("scene")
    pixels = np.random.default_rng(1).integers(1, 1000, (4, 210, 330), np.uint16)
    pixels[:, 40:90, 100:190] = 0
    make_cog(folder / "S2_20230815.tif", pixels, nodata=0, blocksize=64, descriptions=("a", "b", "c", "d"))
    collection = rm.build(str(folder / "S2_20230815.tif"), folder / "scene.parquet")
    return pixels, rm.RasteretDataset(collection, collection.bands)


def loader_of(dataset, size=64, stride=48, **options):
    """A grid of chips."""
    sampler = rm.GridAOISampler(dataset, size, stride, **options)
    return rm.DataLoader(dataset, batch_size=4, sampler=sampler)


def identity(image):
    """Bands are scores."""
    return image


@pytest.mark.parametrize("merge", ["blend", "centre"])
def test_classes_with_names_and_colours(scene, tmp_path, merge):
    """Each pixel's own, nodata where the scene has none, georeferenced, a COG."""
    pixels, dataset = scene
    path = tmp_path / "deep" / "map.tif"
    written = rm.predict_map(
        identity, loader_of(dataset), path, merge=merge, names=NAMES, colours=COLOURS, block=128, progress=False
    )
    assert written == [str(path)]
    assert broken_rules(path) == []
    assert [p.name for p in path.parent.iterdir()] == ["map.tif"]
    with rasterio.open(path) as file:
        assert (file.count, file.dtypes, file.nodata) == (1, ("uint8",), 255)
        assert (file.crs, file.transform) == (rasterio.CRS.from_epsg(32633), Affine(10, 0, 500000, 0, -10, 5000000))
        assert file.block_shapes == [(128, 128)]
        assert file.overviews(1) == [2, 4]
        assert file.tags()["classes"] == "0: water, 1: wood, 2: field, 3: town"
        assert file.descriptions == ("class",)
        assert {k: v[:3] for k, v in file.colormap(1).items() if k in COLOURS} == COLOURS
        np.testing.assert_array_equal(file.read(1), np.where(pixels[0] > 0, pixels.argmax(0), 255))
    with rasterio.open(path, overview_level=0) as file:
        assert set(np.unique(file.read(1))) <= {0, 1, 2, 3, 255}


@pytest.mark.parametrize("merge", ["blend", "centre"])
def test_scores(scene, tmp_path, merge):
    """A float band for each plane, named, NaN where nothing is."""
    pixels, dataset = scene
    (path,) = rm.predict_map(
        identity, loader_of(dataset), tmp_path / "map.tif", output="scores", merge=merge, names=NAMES, block=128
    )
    assert broken_rules(path) == []
    with rasterio.open(path) as file:
        assert file.dtypes == ("float32",) * 4
        assert np.isnan(file.nodata)
        assert file.descriptions == tuple(NAMES)
        expected = np.where(pixels[0] > 0, pixels, np.nan)
        if merge == "centre":
            np.testing.assert_array_equal(file.read(), expected)
        else:
            np.testing.assert_allclose(file.read(), expected, rtol=1e-5)


def test_a_map_can_be_read_back_by_the_library(scene, tmp_path):
    """As labels of its own images: nodata is what is invalid, sparse blocks included."""
    pixels, dataset = scene
    (path,) = rm.predict_map(identity, loader_of(dataset), tmp_path / "map_20230815.tif", block=128)
    labels = rm.RasteretDataset(rm.build(path, tmp_path / "map.parquet"), ["class"], is_image=False)
    t = dataset.bounds[2]
    found = labels[slice(500000, 503300), slice(4997900, 5000000), slice(t.start, t.stop)]["mask"].numpy()
    np.testing.assert_array_equal(found, np.where(pixels[0] > 0, pixels.argmax(0), -100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_any_type_of_predictions(scene, tmp_path, dtype):
    """Scores of one plane are above a half or not; classes are classes."""
    pixels, dataset = scene

    def model(image):
        return (image[:, 0] > 500).to(dtype)

    (path,) = rm.predict_map(model, loader_of(dataset), tmp_path / "map.tif", merge="centre")
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(1), np.where(pixels[0] > 0, pixels[0] > 500, 255))


def test_scores_that_are_not_finite_do_not_count(scene, tmp_path):
    """Another chip's may."""
    pixels, dataset = scene

    def model(image):
        return torch.where(image[:, :1] > 900, torch.nan, image)

    (path,) = rm.predict_map(model, loader_of(dataset), tmp_path / "map.tif")
    with rasterio.open(path) as file:
        valid = (pixels[0] > 0) & (pixels[0] <= 900)
        np.testing.assert_array_equal(file.read(1), np.where(valid, pixels.argmax(0), 255))


def test_polygons_alone(scene, tmp_path):
    """The map is as large as they are; with `mask_aoi` only what is in them is predicted."""
    pixels, plain = scene
    dataset = rm.RasteretDataset(plain.collection, plain.bands, sample={"mask_aoi": True})
    fields = [shapely.Point(500600, 4999300).buffer(400), shapely.box(502005, 4998205, 502995, 4999005)]
    table = gpd.GeoDataFrame(geometry=fields, crs=32633)
    (path,) = rm.predict_map(identity, loader_of(dataset, aois=table), tmp_path / "map.tif", block=128)
    with rasterio.open(path) as file:
        assert file.bounds == (500200, 4998200, 503000, 4999700)
        inside = rasterio.features.geometry_mask(fields, file.shape, file.transform, invert=True)
        own = pixels[:, 30:180, 20:300]
        np.testing.assert_array_equal(file.read(1), np.where(inside & (own[0] > 0), own.argmax(0), 255))


def test_a_module_is_evaluated_and_put_back(scene, tmp_path):
    """Dropout would make noise; a frozen part stays frozen."""
    pixels, dataset = scene
    model = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.BatchNorm2d(4))
    model[1].eval()
    (path,) = rm.predict_map(
        model, loader_of(dataset), tmp_path / "map.tif", output="scores",
        normalize=functools.partial(rm.normalize, mean=[100] * 4, std=[2] * 4),
    )  # fmt: skip
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    with rasterio.open(path) as file:
        expected = np.where(pixels[0] > 0, (pixels - 100.0) / 2, np.nan)
        np.testing.assert_allclose(file.read(), expected, rtol=1e-4, atol=1e-4)


def test_a_series_counts_where_any_date_is_valid(scene, tmp_path):
    """The model folds time itself."""
    pixels, plain = scene
    dataset = rm.RasteretDataset(plain.collection, plain.bands, series=rm.TimeSeries(length=3))

    def model(image):
        return image.amax(1)

    (path,) = rm.predict_map(model, loader_of(dataset), tmp_path / "map.tif")
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(1), np.where(pixels[0] > 0, pixels.argmax(0), 255))


@pytest.fixture(scope="module")
def zones(tmp_path_factory):
    """Two scenes side by side in two UTM zones, which overlap; classes tell where on the ground they are."""
    folder = tmp_path_factory.mktemp("zones")
    for epsg, left in ((32632, 698000), (32633, 301500)):
        x, y = left + 10 * (np.arange(150) + 0.5), 5300000 - 10 * (np.arange(120) + 0.5)
        columns, rows = np.meshgrid(x, y)
        lon, _ = moved_points(epsg, 4326, columns.reshape(-1).tolist(), rows.reshape(-1).tolist())
        stripes = (np.floor((np.array(lon) - 11.6) / 0.002).reshape(120, 150) % 3 + 1).astype(np.uint16)
        make_cog(
            folder / f"Z{epsg}_20230815.tif", stripes, transform=Affine(10, 0, left, 0, -10, 5300000),
            crs=f"EPSG:{epsg}", nodata=0,
        )  # fmt: skip
    return folder, rm.build(str(folder / "*.tif"), folder / "zones.parquet")


def test_native_grids_give_a_map_for_each_zone(zones, tmp_path):
    """Pixels as they are in the files; together they cover everything once."""
    folder, collection = zones
    dataset = rm.RasteretDataset(collection, collection.bands, grid="native")

    def model(image):
        return image[:, 0].long() - 1

    paths = rm.predict_map(model, loader_of(dataset, 32, 24), tmp_path / "map.tif", merge="centre", block=128)
    assert paths == [str(tmp_path / f"map_{epsg}.tif") for epsg in (32632, 32633)]
    covered = shapely.Polygon()
    for path, epsg in zip(paths, (32632, 32633), strict=True):
        assert broken_rules(path) == []
        with rasterio.open(path) as file, rasterio.open(folder / f"Z{epsg}_20230815.tif") as scene:
            assert file.crs == scene.crs
            own = scene.read(1, window=scene.window(*file.bounds), boundless=True, fill_value=0)
            found = file.read(1)
            known = found != 255
            np.testing.assert_array_equal(found[known], own[known] - 1)
            ground = gpd.GeoSeries([shapely.box(*scene.bounds)], crs=epsg)
            left = ground.difference(gpd.GeoSeries([covered], crs=32632).to_crs(epsg)).buffer(-15)
            assert known[rasterio.features.geometry_mask(left, file.shape, file.transform, invert=True)].all()
            assert left.area[0] > 0.3 * ground.area[0]
            covered = covered.union(ground.to_crs(32632)[0])


def test_two_maps_of_one_zone_have_their_own_names(tmp_path):
    """10 m and 20 m pixels of the same CRS."""
    for size, res in ((60, 10), (40, 20)):
        make_cog(
            tmp_path / f"R{res}_20230815.tif", np.full((size, size), res, np.uint16),
            transform=Affine(res, 0, 500000 + 1000 * (res - 10), 0, -res, 5000000), nodata=0,
        )  # fmt: skip
    collection = rm.build(str(tmp_path / "R*.tif"), tmp_path / "r.parquet")
    dataset = rm.RasteretDataset(collection, collection.bands, grid="native")
    paths = rm.predict_map(lambda image: image[:, 0], loader_of(dataset, 32, 24), tmp_path / "m.tif", output="scores")
    assert sorted(p.rsplit("/", 1)[1] for p in paths) == ["m_32633.tif", "m_32633_2.tif"]
    for path in paths:
        with rasterio.open(path) as file:
            np.testing.assert_allclose(file.read(1), file.res[0], rtol=1e-6)


def test_what_cannot_work_is_said_at_once(scene, tmp_path):
    """And nothing is left behind."""
    _, dataset = scene
    good = loader_of(dataset)
    path = tmp_path / "map.tif"
    random = rm.DataLoader(dataset, batch_size=4, sampler=rm.RandomAOISampler(dataset, 64, 4))
    for data, options, message in (
        (good, {"merge": "mean"}, "merge must be"),
        (good, {"output": "class"}, "output must be"),
        (good, {"block": 100}, "multiple of 16"),
        (good, {"nodata": 0, "output": "scores"}, "NaN"),
        (good, {"nodata": -1}, "65535"),
        (good, {"colours": {0: (0, 0, 300)}}, "0 to 255"),
        (good, {"colours": {0: (0, 0, 0)}, "output": "scores"}, "has no colours"),
        (random, {}, "GridAOISampler, got a RandomAOISampler"),
        (rm.DataLoader(dataset, batch_size=None, sampler=good.sampler), {}, "batch_size"),
        (dataset, {}, "got a RasteretDataset"),
    ):
        with pytest.raises(UsageError, match=message):
            rm.predict_map(identity, data, path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda image: image[..., ::2, ::2], r"\[4, K, 64, 64\], got \[4, 4, 32, 32\]"),
        (lambda image: image[:1], "must have shape"),
        (lambda image: {"out": image}, "got a dict"),
        (lambda image: image.long(), "class indices"),
        (lambda image: image[:, 0].long(), "centre"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(scene, tmp_path, model, message):
    """By what they are and what they should be."""
    with pytest.raises(UsageError, match=message):
        rm.predict_map(model, loader_of(scene[1]), tmp_path / "map.tif")


def test_scores_and_names_are_as_many(scene, tmp_path):
    """A name too many has no band."""
    with pytest.raises(UsageError, match="4 scores, got 2 names"):
        rm.predict_map(identity, loader_of(scene[1]), tmp_path / "map.tif", output="scores", names=["a", "b"])


def test_batches_that_do_not_say_where_they_lie_are_refused(scene, tmp_path):
    """Made by hand."""
    _, dataset = scene
    sampler, images = rm.GridAOISampler(dataset, 64), torch.zeros(1, 4, 64, 64)
    with PredictionMap(tmp_path / "map.tif", sampler) as found, pytest.raises(UsageError, match="draw"):
        found.add({"image": images}, images)


def test_replaced_chips_are_refused(scene, tmp_path):
    """They would leave holes; found out before anything is predicted."""
    _, dataset = scene
    loader = rm.DataLoader(dataset, 4, sampler=rm.GridAOISampler(dataset, 64), errors="replace")
    with pytest.raises(UsageError, match="'fill'"):
        rm.predict_map(identity, loader, tmp_path / "map.tif", progress=False)
    assert list(tmp_path.iterdir()) == []
