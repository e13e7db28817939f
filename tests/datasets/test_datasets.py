"""RasteretDataset: slices, mosaics, validity, grids, and what it refuses."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.warp import reproject

import rasteret_ml as rm
from rasteret_ml.errors import MixedCRSError, NoOverlapError, ReadError, UnknownBandError, UsageError
from rasteret_ml.samples.sample import TENSOR_ONLY
from rasteret_ml.testing import RangeServer, make_cog

BANDS = ("B02", "B03")


def pixel_slices(col: int, row: int, width: int, height: int) -> tuple[slice, slice]:
    """x and y slices of a pixel window of the fixture's grid."""
    x, y = 500000.0 + 10 * col, 5000000.0 - 10 * row
    return slice(x, x + 10 * width), slice(y - 10 * height, y)


def expected_mosaic(scenes, col: int, row: int, width: int, height: int):
    """Newest first, valid first, by hand."""
    canvas = np.zeros((3, 2, 600, 1000), np.uint16)
    canvas[0, :, 100:400, 100:400] = scenes.new
    canvas[1, :, 100:400, 400:700] = scenes.east
    canvas[2, :, 100:400, 100:400] = scenes.old
    part = canvas[:, :, row + 100 : row + 100 + height, col + 100 : col + 100 + width]
    out = part[0].copy()
    for layer in part[1:]:
        take = ~(out != 0).all(0) & (layer != 0).all(0)
        out[:, take] = layer[:, take]
    return out


@examples(30)
@given(st.integers(-60, 560), st.integers(-60, 260), st.integers(1, 200), st.integers(1, 200))
def test_any_window_is_the_mosaic_of_first_valid_pixels(scenes, col, row, width, height):
    """Size is exact everywhere, newer records win, holes are filled from older ones, outside is invalid."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    overlaps = col + width > 0 and col < 600 and row + height > 0 and row < 300
    if not overlaps:
        with pytest.raises(NoOverlapError):
            dataset[pixel_slices(col, row, width, height)]
        return
    sample = dataset[pixel_slices(col, row, width, height)]
    expected = expected_mosaic(scenes, col, row, width, height)
    assert sample["image"].dtype == torch.uint16
    np.testing.assert_array_equal(sample["image"].numpy(), expected)
    np.testing.assert_array_equal(sample["mask_valid"].numpy()[0], (expected != 0).all(0))


def test_sample_keys_types_and_shapes(scenes):
    """The table of the design, no 0-d tensor among them."""
    sample = rm.RasteretDataset(scenes.images, BANDS)[pixel_slices(10, 20, 64, 32)]
    shapes = {k: (v.dtype, tuple(v.shape)) for k, v in sample.items() if isinstance(v, torch.Tensor)}
    assert shapes["image"] == (torch.uint16, (2, 32, 64))
    assert shapes["mask_valid"] == (torch.bool, (1, 32, 64))
    assert shapes["transform"] == (torch.float64, (9,))
    assert shapes["time"] == (torch.float64, (1,))
    assert shapes["record"] == (torch.int64, (1,))
    assert all(v.ndim for v in sample.values() if isinstance(v, torch.Tensor))
    assert sample["time"].item() == pd.Timestamp("2023-08-11", tz="UTC").timestamp()
    if TENSOR_ONLY:
        assert shapes["bounds"] == (torch.float64, (9,))
        assert "crs" not in sample
    else:
        assert sample["bounds"][0] == slice(500100.0, 500740.0, 10.0)
        assert sample["crs"].to_epsg() == 32633


def test_origin_is_rounded_to_the_nearest_pixel_half_up(scenes):
    """And the bounds that come back are the snapped ones."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    for shift, pixel in ((4.9, 10), (5.0, 11), (-5.0, 10), (-5.1, 9)):
        x = slice(500100.0 + shift, 500100.0 + shift + 320)
        sample = dataset[x, slice(4999000.0, 4999320.0)]
        assert sample["image"].shape == (2, 32, 32)
        assert sample["transform"][2].item() == 500000.0 + 10 * pixel


def test_slices_may_be_partial_open_or_strided(scenes):
    """As TorchGeo's: a missing y or t means all of it, t.step strides over the records."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    x, y = pixel_slices(0, 0, 50, 300)
    np.testing.assert_array_equal(dataset[x]["image"].numpy(), dataset[x, y]["image"].numpy())
    old = dataset[x, y, slice(pd.Timestamp("2023-08-01"), pd.Timestamp("2023-08-01"))]
    np.testing.assert_array_equal(old["image"].numpy(), scenes.old[:, :, :50])
    assert dataset[dataset.bounds]["image"].shape == (2, 300, 600)
    with pytest.raises(NoOverlapError):
        dataset[x, y, slice(pd.Timestamp("2020-01-01"), pd.Timestamp("2020-02-01"))]


def test_a_time_in_between_finds_the_record_of_that_instant(scenes):
    """Instants match themselves (a closed interval)."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    when = pd.Timestamp("2023-08-05")
    sample = dataset[(*pixel_slices(310, 10, 20, 20), slice(when, when))]
    np.testing.assert_array_equal(sample["image"].numpy(), scenes.east[:, 10:30, 10:30])


def test_labels_are_remapped_and_invalid_ones_ignored(scenes):
    """Listed values become classes; nodata and the rest become ignore_index."""
    dataset = rm.RasteretDataset(
        scenes.labels, ["B1"], is_image=False, labels={"remap": {1: 0, 2: 1, 3: 7}, "ignore_index": -1}
    )
    mask = dataset[pixel_slices(0, 0, 100, 80)]["mask"]
    stored = scenes.cover[:80, 1:101]
    expected = np.select([stored == 1, stored == 2, stored == 3], [0, 1, 7], -1)
    assert mask.dtype == torch.int64
    np.testing.assert_array_equal(mask.numpy(), expected)


def test_continuous_labels_are_float_with_nan(tmp_path):
    """A float raster is a regression target."""
    values = np.arange(10000, dtype=np.float32).reshape(100, 100) / 7
    values[:10] = -9999
    make_cog(tmp_path / "height.tif", values, nodata=-9999)
    labels = rm.build(str(tmp_path / "height.tif"), tmp_path / "l.parquet", datetime=None)
    mask = rm.RasteretDataset(labels, ["B1"], is_image=False)[pixel_slices(0, 0, 100, 100)]["mask"]
    assert mask.dtype == torch.float32
    np.testing.assert_array_equal(mask.numpy(), np.where(values == -9999, np.nan, values))


def test_other_grid_is_warped_as_gdal_warps(scenes):
    """A record off the dataset's grid: bilinear imagery within a level of GDAL, nearest labels equal."""
    newest = scenes.images.where(pc.field("id") == "S_20230801")
    dataset = rm.RasteretDataset(newest, ["B02"], crs="EPSG:32632", res=10)
    x, y, _ = dataset.bounds
    query = (slice(x.start + 500, x.start + 1500), slice(y.start + 900, y.start + 1900))
    sample = dataset[query]
    transform = Affine(*sample["transform"][:6].tolist())
    expected = np.zeros((1, 100, 100), np.uint16)
    with rasterio.open(scenes.folder / "S_20230801_B02.tif") as source:
        reproject(
            rasterio.band(source, 1),
            expected,
            dst_transform=transform,
            dst_crs="EPSG:32632",
            resampling=rasterio.enums.Resampling.bilinear,
            XSCALE=1,
            YSCALE=1,
        )
    both = sample["mask_valid"].numpy() & (expected != 0)
    assert both.mean() > 0.9
    difference = np.abs(sample["image"].numpy().astype(int) - expected.astype(int))[both]
    assert difference.max() <= 1


def test_mixed_crs_needs_a_choice(tmp_path):
    """The error lists them; with a choice, both are read."""
    pixels = np.full((50, 50), 9, np.uint8)
    make_cog(tmp_path / "a.tif", pixels, crs="EPSG:32633", transform=Affine(10, 0, 166021, 0, -10, 10000))
    make_cog(tmp_path / "b.tif", pixels, crs="EPSG:32632", transform=Affine(10, 0, 833478, 0, -10, 10000))
    both = rm.build([str(tmp_path / n) for n in ("a.tif", "b.tif")], tmp_path / "c.parquet")
    with pytest.raises(MixedCRSError, match=r"EPSG:32632 \(1 records\).*EPSG:32633|EPSG:32633.*EPSG:32632"):
        rm.RasteretDataset(both, ["B1"])
    dataset = rm.RasteretDataset(both, ["B1"], crs=32633)
    x, y, _ = dataset.bounds
    sample = dataset[x, y]
    valid = sample["mask_valid"][0].numpy()
    assert set(np.unique(sample["image"][0].numpy()[valid])) == {9}
    assert valid.mean() > 0.5


def test_records_already_in_the_chosen_crs_keep_their_pixels(shared_data: Path, tmp_path):
    """`crs=` warps the others onto the grid of the first record that is in it."""
    collection = rm.build(str(shared_data / "utm_pair" / "*.tif"), tmp_path / "u.parquet")
    for code, name in ((26917, "m_3607824_se_17"), (26918, "m_3607717_sw_18")):
        dataset = rm.RasteretDataset(collection, collection.bands, crs=code)
        (path,) = (shared_data / "utm_pair").glob(f"{name}*")
        with rasterio.open(path) as file:
            left, bottom, right, top = file.bounds
            only = dataset.collection.where(pc.field("proj:epsg") == code)
            sample = rm.RasteretDataset(only, collection.bands, crs=code)[left:right, bottom:top]
            np.testing.assert_array_equal(sample["image"].numpy(), file.read())
        assert dataset.res == (1.0, 1.0)
        assert (left - dataset.grid.transform.c) % 1 == 0


def test_a_warped_stack_reads_older_records_only_where_it_must(tmp_path):
    """The newest covers the chip and is valid: the older ones cost nothing, off the grid as on it."""
    rng = np.random.default_rng(0)
    for day in range(1, 6):
        make_cog(tmp_path / f"s_2023080{day}.tif", rng.integers(1, 99, (300, 300), np.uint16), nodata=0, blocksize=128)
    collection = rm.build(str(tmp_path), tmp_path / "c.parquet")
    dataset = rm.RasteretDataset(collection, ["B1"], res=7)
    query = (slice(501000, 501350), slice(4998500, 4998850))
    assert dataset.explain([query]).files == 1
    assert dataset[query]["record"].item() == 4


@pytest.mark.parametrize("query", [0, None, "abc", (0, 1), ()])
def test_what_is_no_place_is_refused_with_a_hint(scenes, query):
    """Everybody tries ds[0] first."""
    with pytest.raises(UsageError, match="RandomAOISampler"):
        rm.RasteretDataset(scenes.images, BANDS)[query]


def test_a_rotated_record_needs_a_grid_and_is_then_read_north_up(tmp_path):
    """Its own grid has no x and y slices; the pixels are GDAL's nearest ones."""
    turned = Affine.translation(500000, 5000000) @ Affine.rotation(30) @ Affine.scale(10, -10)
    pixels = np.random.default_rng(3).integers(1, 200, (80, 90), np.uint8)
    with rasterio.open(
        tmp_path / "r.tif", "w", driver="GTiff", width=90, height=80, count=1, dtype="uint8", crs="EPSG:32633",
        transform=turned, tiled=True, blockxsize=32, blockysize=32,
    ) as file:  # fmt: skip
        file.write(pixels, 1)
    collection = rm.build(str(tmp_path / "r.tif"), tmp_path / "c.parquet")
    with pytest.raises(UsageError, match="Record r is rotated"):
        rm.RasteretDataset(collection, ["B1"])
    dataset = rm.RasteretDataset(collection, ["B1"], res=10, mosaic={"resampling": "nearest"})
    x, y, _ = dataset.bounds
    sample = dataset[x, y]
    expected = np.zeros(sample["image"].shape[1:], np.uint8)
    reproject(
        pixels, expected, src_transform=turned, src_crs="EPSG:32633", dst_crs="EPSG:32633",
        dst_transform=Affine(*sample["transform"][:6].tolist()), resampling=rasterio.enums.Resampling.nearest,
    )  # fmt: skip
    np.testing.assert_array_equal(sample["image"][0].numpy(), expected)
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), expected != 0)


def test_nodata_override(scenes):
    """The caller's nodata counts, whatever the file says."""
    value = int(scenes.old[0, 5, 5])
    oldest = scenes.images.where(pc.field("id") == "S_20230801")
    sample = rm.RasteretDataset(oldest, ["B02"], mosaic={"nodata": value})[pixel_slices(0, 0, 20, 20)]
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), scenes.old[0, :20, :20] != value)


def test_scale_and_offset_are_facts(tmp_path):
    """They come along where records state them, pixels untouched."""
    item = {
        "type": "Feature",
        "id": "s",
        "geometry": None,
        "collection": "x",
        "properties": {"datetime": "2023-01-01T10:00:00Z"},
        "assets": {
            "b": {"href": str(tmp_path / "b.tif"), "type": "image/tiff", "raster:bands": [{"scale": 0.5, "offset": -3}]}
        },
    }
    pixels = np.arange(2500, dtype=np.uint16).reshape(50, 50)
    make_cog(tmp_path / "b.tif", pixels)
    dataset = rm.RasteretDataset(rm.build(item, tmp_path / "c.parquet"), ["b"])
    sample = dataset[pixel_slices(0, 0, 50, 50)]
    assert (sample["scale"].tolist(), sample["offset"].tolist()) == ([0.5], [-3.0])
    np.testing.assert_array_equal(sample["image"][0].numpy(), pixels)


def test_a_batch_fetches_each_tile_once(scenes):
    """Two queries of the same place cost one read; explain() knows it beforehand."""
    with RangeServer(scenes.folder) as server:
        urls = [f"{server.url}/E_20230805_{band}.tif" for band in BANDS]
        collection = rm.build(urls, scenes.folder / "served.parquet", bands=BANDS)
        dataset = rm.RasteretDataset(collection, BANDS)
        query = pixel_slices(320, 20, 64, 64)
        estimate = dataset.explain([query, query])
        server.requests.clear()
        first, second = dataset.__getitems__([query, query])
        assert torch.equal(first["image"], second["image"])
        assert len(server.requests) == estimate.requests == 2
        assert sum(r.sent for r in server.requests) == estimate.bytes_fetched
        assert all(r.range is not None and r.range[0] > 0 for r in server.requests)  # no header


def test_pickle_and_deepcopy_keep_reading(scenes):
    """Spawned workers and TorchGeo's splitters need it."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    query = pixel_slices(250, 100, 100, 50)
    expected = dataset[query]["image"]
    for other in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset)):
        assert torch.equal(other[query]["image"], expected)
    view = rm.RasteretDataset(scenes.images.subset(date_range=("2023-08-02", "2023-08-06")), BANDS)
    assert len(pickle.loads(pickle.dumps(view))) == len(view) == 1


def test_a_failed_tile_raises_with_all_its_names(tmp_path):
    """Record, band, file, tile and range are in the message, and the error survives its own text."""
    rng = np.random.default_rng(0)
    make_cog(tmp_path / "s.tif", rng.integers(0, 999, (1, 300, 300), np.uint16), blocksize=128)
    collection = rm.build(str(tmp_path / "s.tif"), tmp_path / "c.parquet")
    content = bytearray((tmp_path / "s.tif").read_bytes())
    content[-4000:-2000] = bytes(2000)
    before = (tmp_path / "s.tif").stat()
    (tmp_path / "s.tif").write_bytes(content)
    os.utime(tmp_path / "s.tif", ns=(before.st_atime_ns, before.st_mtime_ns))  # decayed, not rewritten
    dataset = rm.RasteretDataset(collection, ["B1"])
    with pytest.raises(ReadError, match=r"record s, band B1, .*s\.tif, .*tile \d+, bytes \d+-\d+: CorruptTiffError"):
        dataset[pixel_slices(0, 0, 300, 300)]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda s: rm.RasteretDataset(s.images, ["B99"]), UnknownBandError, "B02, B03"),
        (lambda s: rm.RasteretDataset(s.images, []), UsageError, "non-empty list"),
        (lambda s: rm.RasteretDataset(s.images, "B02"), UsageError, "'B02'"),
        (lambda s: rm.RasteretDataset(s.images.subset(bbox=(0, 0, 1, 1)), BANDS), UsageError, "empty"),
        (lambda s: rm.RasteretDataset(s.images, BANDS, labels={"remap": {1: 0}}), UsageError, "is_image=False"),
        (lambda s: rm.RasteretDataset(s.images, BANDS, is_image=False), UsageError, "one band"),
        (lambda s: rm.RasteretDataset(s.images, BANDS, res=0), UsageError, "pixel size > 0"),
        (lambda s: rm.RasteretDataset(s.images, BANDS, crs="nonsense"), UsageError, "nonsense"),
    ],
)
def test_bad_arguments_are_refused_at_construction(scenes, make, error, text):
    """Each with the thing's name in the message."""
    with pytest.raises(error, match=text):
        make(scenes)


def test_bands_of_two_types_are_not_promoted(tmp_path):
    """The error names both types and the way out."""
    make_cog(tmp_path / "x_A.tif", np.zeros((9, 9), np.uint8))
    make_cog(tmp_path / "x_B.tif", np.zeros((9, 9), np.uint16))
    collection = rm.build(str(tmp_path / "x_*.tif"), tmp_path / "c.parquet", bands=["A", "B"])
    with pytest.raises(UsageError, match=r"uint8.*uint16.*&"):
        rm.RasteretDataset(collection, ["A", "B"])


def test_every_multidate_chip_equals_rasterio_on_its_own_grid(shared_data: Path, tmp_path):
    """All bands of all ten real scenes, inside and over every edge; the two tiles' grids differ by half a pixel."""
    items = sorted(str(p) for p in (shared_data / "multidate").glob("*/*.json"))
    collection = rm.build(items, tmp_path / "m.parquet", bands=["B02", "B03", "B04", "B08", "SCL"])
    assert len(collection) == 10
    ids = collection.to_table(["id"])["id"].to_pylist()
    assert len({name[4:9] for name in ids}) == 2
    rng = np.random.default_rng(1)
    for name in ids:
        one = collection.where(pc.field("id") == name)
        for bands in (["B02", "B03", "B04", "B08"], ["SCL"]):
            dataset = rm.RasteretDataset(one, bands)
            files = [rasterio.open(shared_data / "multidate" / name / f"{band}.tif") for band in bands]
            for row, col in [(-40, -40), (350, 350), (*rng.integers(0, 256, 2),)]:
                x, y = files[0].transform @ (col, row)
                size = 128 * files[0].transform.a
                sample = dataset[x : x + size, y - size : y]
                expected = np.stack(
                    [f.read(1, window=((row, row + 128), (col, col + 128)), boundless=True) for f in files]
                )
                assert sample["image"].shape == (len(bands), 128, 128)
                np.testing.assert_array_equal(sample["image"].numpy(), expected)
                np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), (expected != 0).all(0))
            for file in files:
                file.close()


def test_half_a_pixel_apart_is_resampled_not_shifted(shared_data: Path, tmp_path):
    """Both tiles in one dataset: the first one's grid copied, the other one's resampled onto it."""
    items = sorted(str(p) for p in (shared_data / "multidate").glob("*20230815*/*.json"))
    collection = rm.build(items, tmp_path / "m.parquet", bands=["B08"])
    dataset = rm.RasteretDataset(collection, ["B08"])
    x, _, _ = dataset.bounds
    sample = dataset[x.start + 1200 : x.start + 1200 + 128 * 120, 5100000 - 64 * 120 : 5100000 + 64 * 120]
    assert sample["image"].shape == (1, 128, 128)
    assert sample["mask_valid"].float().mean() > 0.95
