"""What a dataset can be asked for beyond bands and a grid: orders, units, keys, fills, and retries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rasterio
import torch
from affine import Affine

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import DataError, NoOverlapError, UsageError
from rasteret_ml.samplers.aoi.aoi import AOI, AOIDetails
from rasteret_ml.samples.min_valid import valid_share
from rasteret_ml.testing import make_cog

WHOLE = slice(500000.0, 500320.0), slice(4999680.0, 5000000.0)


def day(number: int, value: int, folder: Path, dtype: type = np.uint16, **options) -> np.ndarray:
    """A scene of one value a day; its left half has no data on odd days."""
    pixels = np.full((2, 32, 32), value, dtype)
    if number % 2:
        pixels[:, :, :16] = 0
    for band, channel in zip(("A", "B"), pixels, strict=True):
        make_cog(folder / f"s_202305{number:02d}_{band}.tif", channel, nodata=0, blocksize=128, **options)
    return pixels


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> rm.Collection:
    """Four days in May with their cloud cover."""
    folder = tmp_path_factory.mktemp("days")
    for number in (1, 2, 5, 8):
        day(number, number * 10, folder)
    table = rm.build(str(folder / "*.tif"), folder / "c.parquet", bands=["A", "B"]).to_table()
    table = table.append_column("eo:cloud_cover", pa.array([50.0, None, 10.0, 30.0]))
    return Collection(table)


@pytest.mark.parametrize(
    ("order", "left", "right"),
    [
        ("newest", 80, 80),
        ("oldest", 20, 10),
        ("clearest", 80, 50),
        ("2023-05-04", 20, 50),
        ("2023-05", 80, 80),
        (pd.Timestamp("2023-05-02T06:00"), 20, 20),
        ("nearest", 20, 50),
    ],
)
def test_the_order_decides_pixel_by_pixel(days, order, left, right):
    """The first valid pixel in the order asked for; invalid ones from the next record."""
    dataset = rm.RasteretDataset(days, ["A"], mosaic={"order": order})
    t = slice(pd.Timestamp("2023-05-01"), pd.Timestamp("2023-05-08"))
    image = dataset[(*WHOLE, t)]["image"][0]
    assert (image[:, :16] == left).all()
    assert (image[:, 16:] == right).all()


def test_records_of_another_scale_are_refused_or_brought_to_one(tmp_path):
    """In stored units of the first; rounded for integers."""
    day(2, 2000, tmp_path)
    day(3, 1000, tmp_path)
    table = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A", "B"]).to_table()
    structs = {}
    for band in ("A", "B"):
        rows = table[f"{band}_metadata"].to_pylist()
        rows[0] |= {"scale": 0.0001, "offset": -0.1}
        rows[1] |= {"scale": 0.0002, "offset": 0.0}
        structs[band] = pa.array(rows, table[f"{band}_metadata"].type)
    for band, column in structs.items():
        table = table.set_column(table.schema.get_field_index(f"{band}_metadata"), f"{band}_metadata", column)
    with pytest.raises(DataError, match=r"scale.*harmonize=True"):
        rm.RasteretDataset(Collection(table), ["A", "B"])[WHOLE]
    sample = rm.RasteretDataset(Collection(table), ["A", "B"], mosaic={"harmonize": True})[WHOLE]
    assert (sample["image"][:, :, 16:] == 1000).all()
    assert (sample["image"][:, :, :16] == 500).all()  # (2000 * 0.0001 - 0.1) / 0.0002
    assert sample["scale"].tolist() == pytest.approx([0.0002, 0.0002])


def scaled(table: pa.Table, band: str, facts: list[dict[str, float]]) -> pa.Table:
    """The table with scale and offset stated for a band of each record."""
    name = f"{band}_metadata"
    rows = [row | fact for row, fact in zip(table[name].to_pylist(), facts, strict=True)]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(rows, table[name].type))


def test_an_index_is_made_of_values_not_of_stored_numbers(tmp_path):
    """With an offset the other date has the larger NDVI: (3000, 1500) beats (5000, 2400) at offset -0.1."""
    for day_number, (red, nir) in ((2, (2400, 5000)), (4, (1500, 3000))):
        for band, value in (("B04", red), ("B08", nir)):
            pixels = np.full((8, 8), value, np.uint16)
            make_cog(tmp_path / f"s_202305{day_number:02d}_{band}.tif", pixels, blocksize=128)
    table = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["B04", "B08"]).to_table()
    stated = [{"scale": 0.0001, "offset": -0.1}] * 2
    for band in ("B04", "B08"):
        table = scaled(table, band, stated)
    best = rm.RasteretDataset(Collection(table), ["B04", "B08"], composite="max_ndvi")
    x, y, t = best.bounds
    assert best[x, y, t]["image"][:, 0, 0].tolist() == [1500, 3000]


def test_composites_of_two_scalings(tmp_path):
    """Refused by name, or brought to the first one's; what is not stated is 1 and 0."""
    for number, value in ((2, 100), (4, 300)):
        day(number, value, tmp_path)
    table = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A", "B"]).to_table()
    two = Collection(scaled(table, "A", [{"scale": 1.0, "offset": 0.0}, {"scale": 0.5, "offset": 0.0}]))
    with pytest.raises(DataError, match="harmonize=True"):
        rm.RasteretDataset(two, ["A"], composite="mean")[WHOLE]
    mean = rm.RasteretDataset(two, ["A"], composite="mean", mosaic={"harmonize": True})[WHOLE]
    assert (mean["image"] == 125).all()  # 100 and 300 * 0.5
    alike = Collection(scaled(table, "A", [{"scale": 1.0, "offset": 0.0}, {}]))
    assert (rm.RasteretDataset(alike, ["A"], composite="mean")[WHOLE]["image"] == 200).all()


def test_a_record_without_a_valid_pixel_decides_nothing(tmp_path):
    """Neither the units, nor `record` and `time`."""
    day(2, 40, tmp_path)
    for band in ("A", "B"):
        make_cog(tmp_path / f"s_20230504_{band}.tif", np.zeros((32, 32), np.uint16), nodata=0, blocksize=128)
    table = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A", "B"]).to_table()
    table = scaled(table, "A", [{"scale": 0.1, "offset": 0.0}, {"scale": 0.2, "offset": 0.0}])
    sample = rm.RasteretDataset(Collection(table), ["A"])[WHOLE]
    assert (sample["image"] == 40).all()
    assert sample["scale"].tolist() == pytest.approx([0.1])
    assert sample["record"].tolist() == [0]


def test_keys_tell_heads_apart(days, scenes):
    """Two label datasets in one sample, each with its own name; reserved names are refused."""
    heads = [
        rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, sample={"key": key}) for key in (None, "mask_again")
    ]
    both = rm.RasteretDataset(scenes.images, ["B02"]) & heads[0] & heads[1]
    sample = both[slice(500000.0, 500320.0), slice(4999680.0, 5000000.0)]
    torch.testing.assert_close(sample["mask"], sample["mask_again"])
    for key, is_image in (("mask_valid", False), ("label", False), ("mask", True)):
        with pytest.raises(UsageError, match="key must"):
            rm.RasteretDataset(days, ["A"], is_image=is_image, sample={"key": key})


def triangle(dataset: rm.RasteretDataset) -> AOI:
    """A chip with a polygon in it."""
    import shapely

    polygon = shapely.Polygon([(500000, 5000000), (500320, 5000000), (500000, 4999680)])
    t = dataset.bounds[2]
    details = AOIDetails(geometry=shapely.to_wkb(polygon), crs="EPSG:32633", row=3, label=2)
    return AOI((slice(500000.0, 500320.0, 10.0), slice(4999680.0, 5000000.0, 10.0), t), details)


def test_outside_the_polygon_is_filled_where_asked(days, scenes):
    """With nodata or 0, of labels with `ignore_index`; validity is not touched."""
    plain = rm.RasteretDataset(days, ["A"], sample={"mask_aoi": True})
    inside = plain[triangle(plain)]["mask_aoi"][0]
    assert 0.4 < inside.float().mean() < 0.6
    filled = rm.RasteretDataset(days, ["A"], sample={"mask_outside": True})
    sample = filled[triangle(filled)]
    assert (sample["image"][0][~inside] == 0).all()
    assert (sample["image"][0][inside] == 80).all()
    assert sample["mask_valid"].all()
    assert sample["label"].tolist() == [2]
    assert sample["aoi"].tolist() == [3]
    labels = rm.RasteretDataset(
        scenes.labels, ["B1"], is_image=False, sample={"mask_outside": True}, labels={"ignore_index": 250}
    )
    assert (labels[triangle(labels)]["mask"][~inside] == 250).all()


def test_a_bit_mask_whose_file_declares_its_clear_value_as_nodata(tmp_path):
    """Custom cloud masks often do: refused at the door, and right either way once it is said what 0 means."""
    flags = np.zeros((32, 32), np.uint8)
    flags[:, :8] = 2
    make_cog(tmp_path / "s_20230501_A.tif", np.full((32, 32), 500, np.uint16), nodata=0, blocksize=128)
    make_cog(tmp_path / "s_20230501_Q.tif", flags, nodata=0, blocksize=128)
    records = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A", "Q"])

    def clear(**mask) -> np.ndarray:
        sample = rm.RasteretDataset(records, ["A"], quality={"band": "Q", **mask})[WHOLE]
        assert sample["mask_valid"].all()
        return sample["mask_clear"][0].numpy()

    with pytest.raises(UsageError, match=r"'Q'.*nodata='ignore'"):
        clear(bits=[1])
    assert np.array_equal(clear(bits=[1], nodata="ignore"), flags == 0)
    assert not clear(bits=[1], nodata=0).any()
    assert np.array_equal(clear(cloudy=[0], nodata="ignore"), flags != 0)
    assert np.array_equal(clear(cloudy=[2], nodata=255), flags == 0)
    with pytest.raises(UsageError, match=r"'Q' is uint8: bits must be from 0 to 7, got \[8, 9\]"):
        clear(bits=[1, 8], fields={"8-9": [3]}, nodata="ignore")


def test_series_need_dates_and_images(days, scenes):
    """What cannot be is refused at construction."""
    with pytest.raises(UsageError, match="has no date"):
        rm.RasteretDataset(scenes.labels, ["B1"], series=3)
    with pytest.raises(UsageError, match="labels"):
        rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, series=3)
    with pytest.raises(UsageError, match="quality="):
        rm.RasteretDataset(days, ["A"], mosaic={"clear_first": True})
    with pytest.raises(NoOverlapError, match="min_dates=5"):
        rm.RasteretDataset(days, ["A"], series=rm.TimeSeries(length=6, min_dates=5))[WHOLE]


def test_too_few_valid_pixels_are_drawn_again(days):
    """From the AOI's spare places, the first that suffices, else the best; the same in any batch."""
    odd = rm.RasteretDataset(days, ["A"])
    odd.index = odd.index[odd.index.rid == 0]  # the left half is empty

    def asked(min_valid: float, *spares: float) -> AOI:
        x, t = 500000.0, odd.bounds[2]
        places = tuple((500000.0 + pixel * 10, 5000000.0) for pixel in spares)
        details = AOIDetails(crs="EPSG:32633", position=1, min_valid=min_valid, spares=places)
        return AOI((slice(x, x + 80, 10.0), slice(4999920.0, 5000000.0, 10.0), t), details)

    enough, best, none = asked(0.7, 4, 14, 20, 24), asked(1.0, 12, 14, 4), asked(0.5)
    batch = odd.__getitems__([enough, best, none])
    assert [valid_share(sample) for sample in batch] == [0.75, 0.75, 0.0]
    assert [sample["transform"][2].item() for sample in batch] == [500140.0, 500140.0, 500000.0]
    # A spare where nothing is costs nothing.
    nowhere = odd.__getitems__([asked(0.9, 4000, 14), best])
    assert [valid_share(sample) for sample in nowhere] == [0.75, 0.75]
    alone = odd[enough]
    torch.testing.assert_close(alone["image"], batch[0]["image"])
    assert rm.collate(batch)["image"].shape == (3, 1, 8, 8)


def test_padding_is_no_lack_of_valid_pixels(days):
    """The share of a series is that of its dates."""
    dataset = rm.RasteretDataset(days, ["A"], series=6)
    sample = dataset[WHOLE]
    assert sample["length"].tolist() == [4]
    assert valid_share(sample) == pytest.approx(0.75)  # two of four dates have half of it


def test_native_chips_find_their_record_at_every_place(tmp_path, rng):
    """Tiles half a pixel apart, and two pixel sizes: no grid chip misses, every pixel is its file's own."""
    pixels = {}
    for name, res, col, row in (("p", 10.0, 0.0, 0.0), ("q", 10.0, 64.5, 0.5), ("r", 20.0, 0.0, -40.0)):
        transform = Affine(res, 0, 500000 + col * 10, 0, -res, 5000000 + row * 10)
        pixels[name] = rng.integers(1, 999, (64, 64), np.uint16)
        make_cog(tmp_path / f"{name}_A.tif", pixels[name], transform=transform, blocksize=128, overviews="none")
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A"], datetime=None)
    dataset = rm.RasteretDataset(collection, ["A"], grid="native")
    assert sorted({frame.res for frame in dataset.target_grids()}) == [(10.0, 10.0), (20.0, 20.0)]
    for sampler in (rm.GridAOISampler(dataset, 16), rm.RandomAOISampler(dataset, 16, 64)):
        seen = set()
        for aoi in sampler:
            sample = dataset[aoi]
            name = collection.to_table(["id"])["id"][sample["record"].item()].as_py()
            seen.add(name)
            with rasterio.open(tmp_path / f"{name}_A.tif") as file:
                here = Affine(*sample["transform"][:6].tolist())
                assert here.a == file.transform.a
                col, row = (round(v) for v in ~file.transform @ (here.c, here.f))
                wanted = file.read(1, window=((row, row + 16), (col, col + 16)), boundless=True, fill_value=0)
            inside = wanted > 0
            np.testing.assert_array_equal(sample["image"][0].numpy()[inside], wanted[inside])
        assert seen == {"p", "q", "r"}
    for change in ({"crs": 3857}, {"res": 30.0}):
        with pytest.raises(UsageError, match="grid='common'"):
            [setattr(dataset, key, value) for key, value in change.items()]
