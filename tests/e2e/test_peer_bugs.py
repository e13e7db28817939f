"""Bugs of rasteret (`reference/rasteret.md`, section 5, numbers 1-12 and 16): each has a test that it would fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import torch
from affine import Affine
from peer_files import GRID, X, Y, assert_equals_rasterio, dataset_of, gtiff, noise, slices
from pixel_oracle import assert_chip, build_one, cause_of, rasters, run, window_by_rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

import rasteret_ml as rm
from rasteret_ml.errors import FileChangedError, ReadError
from rasteret_ml.raster.execute import TileError
from rasteret_ml.testing import RangeServer, make_cog

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.mark.parametrize(
    ("dtype", "nodata", "value"),
    [("float32", -9999, 5), ("uint8", 255, 3), ("float64", float("nan"), 5), ("int16", -32768, 0)],
)
def test_nodata_stays_what_it_is(tmp_path: Path, dtype: str, nodata: float, value: int) -> None:
    """rasteret 5.1: nodata became 0 in every TorchGeo sample, so that ignored pixels turned into class 0."""
    data = np.full((1, 40, 40), value, dtype)
    data[0, 10:20, 5:30] = nodata
    dataset = dataset_of(make_cog(tmp_path / "a.tif", data, nodata=nodata, blocksize=128), tmp_path)
    sample = dataset[slices(-4, -4, 48, 48)]
    expected = np.full((1, 48, 48), nodata, dtype)
    expected[:, 4:44, 4:44] = data
    valid = np.zeros((1, 48, 48), bool)
    valid[:, 4:44, 4:44] = ~np.isnan(data) & (data != nodata)
    np.testing.assert_array_equal(sample["image"].numpy(), expected)
    np.testing.assert_array_equal(sample["mask_valid"].numpy(), valid)


def test_label_nodata_is_never_class_0(tmp_path: Path) -> None:
    """rasteret 5.1: labels {0, 3} with nodata 255 came out as {0, 3} only, the unlabelled half as class 0."""
    labels = np.full((1, 32, 32), 255, np.uint8)
    labels[0, :8], labels[0, 8:16] = 0, 3
    dataset = dataset_of(make_cog(tmp_path / "l.tif", labels, nodata=255), tmp_path, is_image=False)
    mask = dataset[slices(0, 0, 40, 32)]["mask"].numpy()
    expected = np.full((32, 40), -100)
    expected[:8, :32], expected[8:16, :32] = 0, 3
    np.testing.assert_array_equal(mask, expected)


def test_nan_and_infinity_without_nodata_are_kept(tmp_path: Path) -> None:
    """rasteret 5.1: NaN and infinity became 0 where the file declares no nodata."""
    data = np.arange(1, 257, dtype=np.float32).reshape(1, 16, 16)
    data[0, 3, :4], data[0, 4, 5], data[0, 5, 5] = np.nan, np.inf, -np.inf
    sample = dataset_of(make_cog(tmp_path / "a.tif", data), tmp_path)[slices(0, 0, 16, 16)]
    np.testing.assert_array_equal(sample["image"].numpy(), data)
    np.testing.assert_array_equal(sample["mask_valid"].numpy(), ~np.isnan(data))


def test_bands_stay_with_their_record_after_partial_failures(tmp_path: Path) -> None:
    """rasteret 5.2: with A missing on r0 and B on r1 it gave [[A of r1, B of r0]] and a warning."""
    value = {(r, b): 10 * r + i + 1 for r in (0, 1) for i, b in enumerate("AB")}
    paths = {
        (r, b): make_cog(tmp_path / f"r{r}_{b}.tif", np.full((1, 32, 32), v, np.uint8)) for (r, b), v in value.items()
    }
    collection = rm.build(list(paths.values()), tmp_path / "c.parquet", bands=["A", "B"])
    missing = {0: "A", 1: "B"}
    for r, b in missing.items():
        os.remove(paths[r, b])
    box = shapely.box(X, Y - 320, X + 320, Y)
    for r, record in enumerate(rasters(collection)):
        failures: list[TileError] = []
        (chip,) = run(record.load_bands([box], ["A", "B"], geometry_crs=32633, output="tensor", failures=failures))
        assert {(f.record, f.band) for f in failures} == {(f"r{r}", missing[r])}
        for channel, b in enumerate("AB"):
            lost = b == missing[r]
            assert set(np.unique(chip.data[channel])) == {0 if lost else value[r, b]}
            assert set(np.unique(chip.valid[channel])) == {not lost}
        with pytest.raises(ReadError, match=rf"record r{r}, band {missing[r]}"):
            run(record.load_bands([box], ["A", "B"], geometry_crs=32633))


@pytest.mark.parametrize(("dtype", "predictor"), [("uint16", 2), ("int32", 1), ("float32", 3), ("float64", 2)])
def test_big_endian_pixels_are_right(tmp_path: Path, dtype: str, predictor: int) -> None:
    """rasteret 5.3: big-endian files parsed well and came out as byte-swapped garbage."""
    data = noise(dtype, (2, 70, 90))
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 16}
    path = gtiff(tmp_path / "b.tif", data, endianness="big", compress="deflate", predictor=predictor, **layout)
    assert Path(path).read_bytes()[:2] == b"MM"
    assert_equals_rasterio(path, tmp_path)
    sample = dataset_of(path, tmp_path)[slices(0, 0, 90, 70)]
    np.testing.assert_array_equal(sample["image"].numpy(), data)


def test_categories_are_never_blended(tmp_path: Path) -> None:
    """rasteret 5.4: labels {0, 10} through another CRS came back as 4,096 distinct float32 values."""
    labels = np.where(noise("uint8", (1, 60, 60)) > 127, 10, 0).astype(np.uint8)
    path = make_cog(tmp_path / "l.tif", labels, nodata=255)
    dataset = dataset_of(path, tmp_path, is_image=False, crs=3035, res=10)
    x, y, _ = dataset.bounds
    sample = dataset[x, y]
    mask, grid = sample["mask"].numpy(), Affine(*sample["transform"][:6].tolist())
    assert mask.dtype == np.int64
    assert set(np.unique(mask)) == {-100, 0, 10}
    expected = np.full(mask.shape, 255, np.uint8)
    with rasterio.open(path) as source:
        band = rasterio.band(source, 1)
        reproject(band, expected, dst_transform=grid, dst_crs=3035, dst_nodata=255, resampling=Resampling.nearest)
    assert (np.where(expected == 255, -100, expected.astype(int)) == mask).mean() > 0.97
    box = shapely.box(X + 50, Y - 550, X + 550, Y - 50)
    asked = {"geometry_crs": 32633, "target_crs": 3035, "output": "tensor", "resampling": "nearest"}
    (chip,) = run(build_one(path, tmp_path).load_bands([box], ["B1"], **asked))
    assert chip.data.dtype == torch.uint8
    assert set(np.unique(chip.data[chip.valid])) == {0, 10}


@pytest.mark.parametrize(
    ("hole", "options"),
    [(0, {"nodata": 0}), (65535, {"nodata": 65535}), (40000, {"mask": True})],
    ids=["0", "65535", "internal mask"],
)
@pytest.mark.parametrize("grid", [{"crs": 3035}, {"res": 7}, {"res": 31}], ids=str)
def test_nodata_never_bleeds(tmp_path: Path, hole: int, options: dict[str, Any], grid: dict[str, Any]) -> None:
    """rasteret 5.5: bilinear reprojection blended nodata into its valid neighbours."""
    data = np.full((1, 64, 64), 1000, np.uint16)
    data[0, 20:44:3, 20:40] = hole
    options = {"mask": data[0] != hole} if "mask" in options else options
    path = make_cog(tmp_path / "a.tif", data, overviews="none", **options)
    dataset = dataset_of(path, tmp_path, mosaic={"resampling": "bilinear"}, **grid)
    x, y, _ = dataset.bounds
    sample = dataset[x, y]
    valid = sample["mask_valid"].numpy()
    assert set(np.unique(sample["image"].numpy()[valid])) == {1000}
    assert valid.mean() > 0.4
    assert not valid.all()


def test_a_time_series_loses_no_step(tmp_path: Path) -> None:
    """rasteret 5.6: steps that could not be read were dropped, and no dates told which were left."""
    days = ["2023-08-01", "2023-08-02", "2023-08-03"]
    for i, day in enumerate(days):
        make_cog(tmp_path / f"s_{day}.tif", np.full((1, 16, 16), i + 1, np.uint8), nodata=0)
    dataset = rm.RasteretDataset(rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet"), ["B1"])
    x, y = slices(0, 0, 16, 16)
    os.remove(tmp_path / "s_2023-08-02.tif")
    queries = [(x, y, slice(np.datetime64(day), np.datetime64(day))) for day in days]
    with pytest.raises(ReadError, match=r"record s_2023-08-02, band B1"):
        dataset.__getitems__(queries)
    first, last = dataset.__getitems__([queries[0], queries[2]])
    for sample, day, value in ((first, days[0], 1), (last, days[2], 3)):
        assert sample["time"].item() == np.datetime64(day).astype("datetime64[s]").astype(int)
        assert set(sample["image"].unique().tolist()) == {value}


@pytest.mark.parametrize("out", ["c", "c.parquet"])
def test_a_rebuild_leaves_no_old_rows(tmp_path: Path, out: str) -> None:
    """rasteret 5.7: 3 rows, then a forced rebuild of 1 row, were loaded again as 3 rows."""
    days = ["2023-01-01", "2023-05-05", "2024-06-07"]
    paths = [make_cog(tmp_path / f"s_{day}.tif", np.ones((1, 8, 8), np.uint8)) for day in days]
    assert len(rm.build(paths, tmp_path / out)) == 3
    assert len(rm.build(paths[1], tmp_path / out)) == 1
    again = rm.Collection.open(tmp_path / out)
    assert [record.id for record in rasters(again)] == ["s_2023-05-05"]


def test_another_question_never_gets_the_old_index(tmp_path: Path) -> None:
    """rasteret 5.8: the cache key left out bbox, query and bands, so another AOI of that name got the old rows."""
    for name, value, col in (("west", 1, 0), ("east", 2, 10000)):
        grid = GRID @ Affine.translation(col, 0)
        make_cog(tmp_path / f"{name}.tif", np.full((2, 8, 8), value, np.uint8), transform=grid)
    out = tmp_path / "same.parquet"
    found = []
    for name, bands in (("west", None), ("east", None), ("east", ["red", "nir"])):
        collection = rm.build(str(tmp_path / f"{name}.tif"), out, bands=bands)
        (record,) = rasters(collection)
        chip = run(record.read_window((0, 0, 8, 8), collection.bands))
        found.append((record.id, collection.bands, int(chip.data.max())))
    assert found == [("west", ["B1", "B2"], 1), ("east", ["B1", "B2"], 2), ("east", ["red", "nir"], 2)]
    both = rm.build(str(tmp_path / "*st.tif"), out)
    boxes = {record.id: record.bbox for record in rasters(both)}
    for name, box in boxes.items():
        assert [record.id for record in rasters(both.subset(bbox=box))] == [name]


def _item(name: str, href: str, **properties: Any) -> dict[str, Any]:
    outline = shapely.box(15.0, 45.1, 15.1, 45.2)
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "x", "links": [],
        "bbox": list(outline.bounds), "geometry": shapely.geometry.mapping(outline),
        "properties": {"datetime": "2024-05-06T07:08:09Z"} | properties,
        "assets": {"red": {"href": href, "type": "image/tiff; application=geotiff"}},
    }  # fmt: skip


def test_unknown_clouds_are_not_a_clear_sky(tmp_path: Path) -> None:
    """rasteret 5.9: an item without `eo:cloud_cover` was given 0, which means clear."""
    path = make_cog(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8))
    covers = {"unknown": {}, "null": {"eo:cloud_cover": None}, "clear": {"eo:cloud_cover": 0}}
    covers |= {"cloudy": {"eo:cloud_cover": 80.5}}
    collection = rm.build([_item(name, path, **more) for name, more in covers.items()], tmp_path / "c.parquet")
    found = {record.id: record.cloud_cover for record in rasters(collection)}
    assert found == {"unknown": None, "null": None, "clear": 0, "cloudy": 80.5}
    assert [record.id for record in rasters(collection.subset(cloud_cover_lt=20))] == ["clear"]


def test_equal_tile_numbers_of_two_files_never_mix(tmp_path: Path) -> None:
    """rasteret 5.10: merged tiles were keyed by (row, col, band) without the URL, and overwrote each other."""
    data = {(s, b): noise("uint16", (1, 64, 64), seed=2 * s + b) for s in (0, 1) for b in (0, 1)}
    for (s, b), pixels in data.items():
        grid = GRID @ Affine.translation(64 * s, 0)
        make_cog(tmp_path / f"s{s}_B{b}.tif", pixels, transform=grid, blocksize=128)
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["B0", "B1"])
    dataset = rm.RasteretDataset(collection, ["B0", "B1"])
    expected = np.concatenate([np.concatenate([data[s, b] for s in (0, 1)], axis=2) for b in (0, 1)])
    queries = [(0, 0, 128, 64), (0, 0, 64, 64), (64, 0, 64, 64), (50, 7, 40, 20)]
    samples = dataset.__getitems__([slices(*query) for query in queries])
    for (col, row, width, height), sample in zip(queries, samples, strict=True):
        part = expected[:, row : row + height, col : col + width]
        np.testing.assert_array_equal(sample["image"].numpy(), part)


@pytest.mark.parametrize("remote", [True, False], ids=["http", "local"])
def test_a_rewritten_file_of_the_same_size_is_noticed(server: RangeServer, tmp_path: Path, remote: bool) -> None:
    """rasteret 5.11: no size, no ETag was kept, so stale offsets decoded whatever stood there now."""
    options: dict[str, Any] = {"compress": "none", "overviews": "none"}
    path = make_cog(tmp_path / "a.tif", np.ones((1, 64, 64), np.uint8), **options)
    size = os.path.getsize(path)
    href = f"{server.url}/a.tif" if remote else path
    (record,) = rasters(rm.build(href, tmp_path / "c.parquet"))
    make_cog(path, np.full((1, 64, 64), 2, np.uint8), **options)
    os.utime(path, ns=(10**18, 10**18))
    assert os.path.getsize(path) == size
    with pytest.raises(ReadError, match=r"record a, band B1, .*build the Collection again") as caught:
        run(record.read_window((0, 0, 8, 8), ["B1"]))
    assert isinstance(cause_of(caught.value), FileChangedError)


def test_a_rewritten_file_of_another_size_is_noticed(tmp_path: Path) -> None:
    """rasteret 5.11, through the dataset."""
    path = make_cog(tmp_path / "a.tif", np.ones((1, 64, 64), np.uint8))
    dataset = dataset_of(path, tmp_path)
    make_cog(path, noise("uint8", (2, 64, 64)))
    with pytest.raises(
        ReadError, match=rf"the file has {os.path.getsize(path)} bytes, but had \d+ when it was indexed"
    ):
        dataset[slices(0, 0, 8, 8)]


def test_a_rewritten_file_is_noticed_by_its_block_leader(tmp_path: Path) -> None:
    """rasteret 5.11, where the backend tells neither size nor ETag: the bytes before a tile repeat its size."""

    class Store:
        async def get_range(self, url: str, start: int, length: int) -> bytes:
            return Path(url).read_bytes()[start : start + length]

    path = make_cog(tmp_path / "a.tif", noise("uint16", (1, 64, 64)) // 16, overviews="none")
    (record,) = rasters(rm.build(path, tmp_path / "c.parquet", backend=Store()))
    assert_chip(run(record.read_window((0, 0, 8, 8), ["B1"], backend=Store())), *window_by_rasterio(path, (0, 0, 8, 8)))
    make_cog(path, noise("uint16", (1, 64, 64)), overviews="none")
    with pytest.raises(ReadError, match="block leader") as caught:
        run(record.read_window((0, 0, 8, 8), ["B1"], backend=Store()))
    assert isinstance(cause_of(caught.value), FileChangedError)


@pytest.mark.parametrize("nodata", [None, 0, 9])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_sparse_tiles_are_nodata(tmp_path: Path, nodata: int | None, interleave: str) -> None:
    """rasteret 5.12: one tile that is not stored failed the whole band (ZlibError: Z_BUF_ERROR)."""
    data = np.zeros((2, 96, 96), np.uint16)
    data[:, 32:64, 32:64] = noise("uint16", (2, 32, 32))
    data[data == 0] = nodata or 0
    layout = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": interleave}
    path = gtiff(tmp_path / "s.tif", data, nodata=nodata, sparse_ok=True, compress="deflate", **layout)
    record = assert_equals_rasterio(path, tmp_path)
    assert (record.source("B2").metadata.tile_byte_counts == 0).sum() == 8
    sample = dataset_of(path, tmp_path)[slices(0, 0, 32, 32)]
    assert set(sample["image"].unique().tolist()) == {nodata or 0}
    assert sample["mask_valid"].all() == (nodata is None)
