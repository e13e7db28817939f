"""`&` and `|` with TorchGeo's own raster and vector datasets, both orders, pixel for pixel; and its splitters."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow.compute as pc
import pytest
import rasterio
import rasterio.features
import shapely
import torch
from affine import Affine
from rasterio.warp import Resampling, reproject
from rasterio.windows import Window
from torchgeo.datasets import (
    RasterDataset,
    VectorDataset,
    random_bbox_assignment,
    random_bbox_splitting,
    roi_split,
)

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid

SIZE = 48


class OldScene(RasterDataset):
    """A band of a scene, by TorchGeo."""

    filename_glob = "S_20230801_B02.tif"


class Fields(VectorDataset):
    """Polygons of two classes, by TorchGeo."""

    filename_glob = "fields.gpkg"


@pytest.fixture(scope="module")
def fields(scenes, tmp_path_factory) -> Path:
    """Two overlapping polygons over the western scenes."""
    folder = tmp_path_factory.mktemp("fields")
    west = shapely.Point(501000, 4998500).buffer(900)
    east = shapely.box(501300, 4997200, 502900, 4998700)
    gpd.GeoDataFrame({"cls": [1, 2]}, geometry=[west, east], crs=32633).to_file(folder / "fields.gpkg")
    return folder


@pytest.fixture
def raster(scenes):
    return OldScene(str(scenes.folder))


@pytest.fixture
def vector(fields):
    return Fields(str(fields), res=10, label_name="cls")


def images_of(scenes, name: str = "S_20230811", **options):
    return rm.RasteretDataset(scenes.images.where(pc.field("id") == name), ["B02"], **options)


def floats(sample):
    return sample | {"image": sample["image"].float()}


def queries_of(dataset, count: int = 5):
    """Chips on whole pixels of the scenes: a stock dataset reads where it is asked, ours on its pixels."""
    found = []
    for aoi in rm.RandomAOISampler(dataset, SIZE, count, seed=3):
        x, y, t = aoi
        left, top = 500000 + 10 * round((x.start - 500000) / 10), 5000000 - 10 * round((5000000 - y.stop) / 10)
        found.append((slice(left, left + 10 * SIZE, 10), slice(top - 10 * SIZE, top, 10), t))
    return found


def window_of(query) -> Window:
    x, y, _ = query
    return Window((x.start - 500000) / 10, (5000000 - y.stop) / 10, SIZE, SIZE)


def pixels(scenes, name: str, query) -> np.ndarray:
    with rasterio.open(scenes.folder / name) as file:
        return file.read(1, window=window_of(query), boundless=True)


def painted(fields: Path, query, fill: int = 0) -> np.ndarray:
    frame = gpd.read_file(fields / "fields.gpkg")
    x, y, _ = query
    return rasterio.features.rasterize(
        zip(frame.geometry, frame["cls"], strict=True), out_shape=(SIZE, SIZE), fill=fill, dtype="int32",
        transform=Affine(10, 0, x.start, 0, -10, y.stop),
    )  # fmt: skip


def test_ours_and_a_raster(scenes, raster):
    """Channels of both; ours as float, because theirs are."""
    both = images_of(scenes, transforms=floats) & raster
    queries = queries_of(both)
    for query, sample in zip(queries, both.__getitems__(queries), strict=True):
        ours, theirs = pixels(scenes, "S_20230811_B02.tif", query), pixels(scenes, "S_20230801_B02.tif", query)
        np.testing.assert_array_equal(sample["image"].numpy(), np.stack([ours, theirs]).astype(np.float32))
        np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), ours != 0)
    rm.collate(both.__getitems__(queries))
    with pytest.raises(UsageError, match="transforms="):
        (images_of(scenes) & raster)[queries[0]]


def test_a_raster_and_ours(scenes, raster):
    """TorchGeo's own join: theirs first."""
    both = raster & images_of(scenes, transforms=floats)
    for query in queries_of(both):
        sample = both[query]
        ours, theirs = pixels(scenes, "S_20230811_B02.tif", query), pixels(scenes, "S_20230801_B02.tif", query)
        np.testing.assert_array_equal(sample["image"].numpy(), np.stack([theirs, ours]).astype(np.float32))
        np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), ours != 0)


@pytest.mark.parametrize("ours_first", [True, False])
def test_ours_and_a_vector(scenes, vector, fields, ours_first):
    """Images and labels, in both orders."""
    images = images_of(scenes)
    both = images & vector if ours_first else vector & images
    seen = set()
    for query in queries_of(both, 8):
        sample = both[query]
        np.testing.assert_array_equal(sample["image"][0].numpy(), pixels(scenes, "S_20230811_B02.tif", query))
        np.testing.assert_array_equal(sample["mask"].numpy(), painted(fields, query))
        seen |= set(sample["mask"].unique().tolist())
    assert seen == {0, 1, 2}


def test_ours_or_a_raster(scenes, raster):
    """Our gaps filled by their pixels, ours untouched elsewhere, in our type."""
    either = images_of(scenes) | raster
    hole = (slice(500600, 500600 + 10 * SIZE, 10), slice(4998800, 4998800 + 10 * SIZE, 10), either.bounds[2])
    assert (pixels(scenes, "S_20230811_B02.tif", hole) == 0).any()
    for query in [hole, *queries_of(either)]:
        sample = either[query]
        ours, theirs = pixels(scenes, "S_20230811_B02.tif", query), pixels(scenes, "S_20230801_B02.tif", query)
        assert sample["image"].dtype == torch.uint16
        np.testing.assert_array_equal(sample["image"][0].numpy(), np.where(ours != 0, ours, theirs))
        np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), (ours != 0) | (theirs != 0))


def test_a_raster_or_ours(scenes, raster):
    """TorchGeo's own merge: the maximum, whatever is valid."""
    either = raster | images_of(scenes, transforms=floats)
    for query in queries_of(either, 3):
        ours, theirs = pixels(scenes, "S_20230811_B02.tif", query), pixels(scenes, "S_20230801_B02.tif", query)
        np.testing.assert_array_equal(either[query]["image"][0].numpy(), np.maximum(ours, theirs))


def test_ours_or_a_vector(scenes, vector, fields):
    """A label raster's gaps filled from polygons; what is 0 there is nothing."""
    labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    either = labels | vector
    for query in queries_of(either):
        cover = pixels_of_cover(scenes, query)
        drawn = painted(fields, query)
        sample = either[query]
        expected = np.where(cover != 0, cover, np.where(drawn != 0, drawn, -100))
        np.testing.assert_array_equal(sample["mask"].numpy(), expected)
        np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), expected != -100)


def test_a_vector_or_ours(scenes, vector, fields):
    """The maximum: their background, 0, is more than our ignore_index."""
    either = vector | rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    for x, y, _ in queries_of(vector & images_of(scenes), 3):
        query = (x, y, either.bounds[2])
        cover = pixels_of_cover(scenes, query)
        expected = np.maximum(np.where(cover != 0, cover, -100), painted(fields, query))
        np.testing.assert_array_equal(either[query]["mask"].numpy(), expected)


def pixels_of_cover(scenes, query) -> np.ndarray:
    window = window_of(query)
    with rasterio.open(scenes.folder / "cover.tif") as file:  # a column more in the west
        shifted = Window(window.col_off + 1, window.row_off, SIZE, SIZE)
        return file.read(1, window=shifted, boundless=True).astype(int)


@pytest.mark.parametrize("ours_first", [True, False])
def test_polygons_and_a_raster(scenes, raster, fields, ours_first):
    """Polygons on the left take the raster's pixels; on the right they lie where it does."""
    polygons = rm.PolygonDataset(fields / "fields.gpkg", "cls", classes={1: 1, 2: 2}, background=0)
    both = polygons & raster if ours_first else raster & polygons
    assert both.res == (10, 10)
    for query in queries_of(both):
        sample = both[query]
        np.testing.assert_array_equal(sample["image"][0].numpy(), pixels(scenes, "S_20230801_B02.tif", query))
        known = sample["mask_valid"][0].numpy()
        np.testing.assert_array_equal(sample["mask"].numpy(), np.where(known, painted(fields, query), -100))
        assert known.any()


@pytest.mark.parametrize("images_first", [True, False])
def test_polygons_and_our_images(scenes, fields, images_first):
    """The same chip and pixels in both orders, in one batch."""
    polygons = rm.PolygonDataset(fields / "fields.gpkg", "cls", classes={1: 1, 2: 2})
    images = images_of(scenes)
    both = images & polygons if images_first else polygons & images
    samples = both.__getitems__(list(rm.RandomAOISampler(both, SIZE, 6, placement="centre")))
    for sample in samples:
        left, top = sample["transform"][2].item(), sample["transform"][5].item()
        assert (left % 10, top % 10) == (0, 0)
        query = (slice(left, left + 10 * SIZE, 10), slice(top - 10 * SIZE, top, 10), None)
        ours = pixels(scenes, "S_20230811_B02.tif", query)
        np.testing.assert_array_equal(sample["image"][0].numpy(), ours)
        np.testing.assert_array_equal(sample["mask"].numpy(), painted(fields, query, -100))
        valid = (ours != 0) & (painted(fields, query) != 0)
        np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), valid)
    assert rm.collate(samples)["mask"].shape == (6, SIZE, SIZE)


def test_gaps_of_a_label_raster_are_filled_from_polygons(scenes, fields):
    """Ours on both sides."""
    labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    either = labels | rm.PolygonDataset(fields / "fields.gpkg", "cls", classes={1: 1, 2: 2})
    for query in queries_of(either):
        cover, drawn = pixels_of_cover(scenes, query), painted(fields, query)
        expected = np.where(cover != 0, cover, np.where(drawn != 0, drawn, -100))
        np.testing.assert_array_equal(either[query]["mask"].numpy(), expected)


def test_a_stock_dataset_on_the_right_is_read_in_the_chips_own_crs(scenes, raster, vector, fields):
    """Native grids hand it chips in any CRS: pixels as GDAL warps them, polygons where they lie."""
    whole = shapely.box(400000, 4900000, 600000, 5100000)
    left = rm.PolygonDataset(gpd.GeoDataFrame(geometry=[whole], crs=32633), key="mask_left")
    scene = images_of(scenes, crs=32632).index.geometry.iloc[0]
    left_edge, _, _, top = scene.bounds
    grid = Grid(crs="EPSG:32632", transform=Affine(10, 0, round(left_edge), 0, -10, round(top)), shape=(300, 300))
    query = (slice(None), slice(None), raster.bounds[2])
    both = left & raster & vector
    (sample,) = both.samples(both.requests([query], [grid]), []).samples
    expected = np.zeros(grid.shape, np.float32)
    with rasterio.open(scenes.folder / OldScene.filename_glob) as file:
        reproject(
            rasterio.band(file, 1), expected, dst_transform=grid.transform, dst_crs=grid.crs, dst_nodata=0,
            resampling=Resampling.bilinear,
        )  # fmt: skip
    inside = shapely.contains_xy(scene.buffer(-100), *centres(grid))
    assert inside.mean() > 0.2
    # TorchGeo warps to a grid of its own, then to the chip: twice bilinear. The place must be the same.
    got = sample["image"][0].numpy()[inside]
    assert np.corrcoef(got, expected[inside])[0, 1] > 0.7
    frame = gpd.read_file(fields / "fields.gpkg").to_crs(grid.crs)
    drawn = rasterio.features.rasterize(
        zip(frame.geometry, frame["cls"], strict=True), out_shape=grid.shape, transform=grid.transform
    )
    assert (sample["mask"].numpy() == drawn).mean() > 0.999
    assert (drawn != 0).mean() > 0.05


def centres(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    cols, rows = np.meshgrid(np.arange(grid.width) + 0.5, np.arange(grid.height) + 0.5)
    return grid.transform @ (cols, rows)


def test_the_right_side_stays_as_it_was(scenes, raster):
    """TorchGeo reprojects the right operand in place, its index and all."""
    before = raster.index.copy()
    images_of(scenes, crs=32632) & raster
    images_of(scenes, crs=32632) | (raster & OldScene(str(scenes.folder)))
    assert raster.crs == before.crs
    assert raster.index.geometry.geom_equals_exact(before.geometry, 0).all()
    assert raster.res == (10, 10)


def test_splitters_share_the_scenes_out(scenes):
    """By scene, by halves of a scene, by region: nothing lost, nothing twice, and each part can be read."""
    images = rm.RasteretDataset(scenes.images, ["B02"])
    x, y, _ = images.bounds
    generator = torch.Generator().manual_seed(1)
    by_scene = random_bbox_assignment(images, [2 / 3, 1 / 3], generator=generator)
    assert sorted(row for part in by_scene for row in part.index["rid"]) == sorted(images.index["rid"])
    halves = random_bbox_splitting(images, [0.75, 0.25], generator=generator)
    shares = [part.index.geometry.area.sum() for part in halves]
    assert shares == pytest.approx([0.75 * 5.4e7 / 2, 0.25 * 5.4e7 / 2])
    middle = (x.start + x.stop) / 2
    regions = roi_split(
        images, [shapely.box(x.start, y.start, middle, y.stop), shapely.box(middle, y.start, x.stop, y.stop)]
    )
    assert [part.bounds[0].stop for part in regions] == [middle, x.stop]
    for part in (*by_scene, *halves, *regions):
        queries = list(rm.RandomAOISampler(part, 16, 8))
        area = part.index.geometry.union_all()
        assert all(area.buffer(1).covers(shapely.box(q[0].start, q[1].start, q[0].stop, q[1].stop)) for q in queries)
        records = {sample["record"].item() for sample in part.__getitems__(queries)}
        assert records <= set(part.index["rid"])


def test_splitters_share_polygons_out():
    """A label belongs to the part that its polygon, or its piece of it, is in."""
    shapes = [shapely.box(10 * i, 0, 10 * i + 10, 10) for i in range(6)]
    whole = rm.PolygonDataset(gpd.GeoDataFrame({"v": range(6)}, geometry=shapes, crs=32633), "v", res=1)
    generator = torch.Generator().manual_seed(1)
    x, y, t = whole.bounds
    everything = whole[x, y, t]["mask"]
    for parts in (
        random_bbox_assignment(whole, [0.5, 0.5], generator=generator),
        random_bbox_splitting(whole, [0.5, 0.5], generator=generator),
        roi_split(whole, [shapely.box(0, 0, 25, 10), shapely.box(25, 0, 60, 10)]),
    ):
        masks = torch.stack([part[x, y, t]["mask"] for part in parts])
        assert torch.equal((masks != -100).sum(0), torch.ones(10, 60, dtype=torch.int64))
        assert torch.equal(masks.max(0).values, everything)
