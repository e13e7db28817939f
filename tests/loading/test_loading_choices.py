"""What a dataset can be asked for beyond bands and a grid: orders, units, keys, fills, second tries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import DataError, NoOverlapError, UsageError
from rasteret_ml.loading.retry import valid_share
from rasteret_ml.sampling.aoi import AOIDetails
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
        (pd.Timestamp("2023-05-02T06:00"), 20, 20),
        ("nearest", 20, 50),
    ],
)
def test_the_order_decides_pixel_by_pixel(days, order, left, right):
    """The first valid pixel in the order asked for; invalid ones from the next record."""
    dataset = rm.RasteretDataset(days, ["A"], order=order)
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
    sample = rm.RasteretDataset(Collection(table), ["A", "B"], harmonize=True)[WHOLE]
    assert (sample["image"][:, :, 16:] == 1000).all()
    assert (sample["image"][:, :, :16] == 500).all()  # (2000 * 0.0001 - 0.1) / 0.0002
    assert sample["scale"].tolist() == pytest.approx([0.0002, 0.0002])


def test_keys_tell_heads_apart(days, scenes):
    """Two label datasets in one sample, each with its own name; reserved names are refused."""
    heads = [rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, key=key) for key in (None, "mask_again")]
    both = rm.RasteretDataset(scenes.images, ["B02"]) & heads[0] & heads[1]
    sample = both[slice(500000.0, 500320.0), slice(4999680.0, 5000000.0)]
    torch.testing.assert_close(sample["mask"], sample["mask_again"])
    for key, is_image in (("mask_valid", False), ("label", False), ("mask", True)):
        with pytest.raises(UsageError, match="key="):
            rm.RasteretDataset(days, ["A"], is_image=is_image, key=key)


def triangle(dataset: rm.RasteretDataset) -> rm.AOI:
    """A chip with a polygon in it."""
    import shapely

    polygon = shapely.Polygon([(500000, 5000000), (500320, 5000000), (500000, 4999680)])
    t = dataset.bounds[2]
    details = AOIDetails(geometry=shapely.to_wkb(polygon), crs="EPSG:32633", row=3, label=2)
    return rm.AOI((slice(500000.0, 500320.0, 10.0), slice(4999680.0, 5000000.0, 10.0), t), details)


def test_outside_the_polygon_is_filled_where_asked(days, scenes):
    """With nodata or 0, of labels with `ignore_index`; validity is not touched."""
    plain = rm.RasteretDataset(days, ["A"], mask_aoi=True)
    inside = plain[triangle(plain)]["mask_aoi"][0]
    assert 0.4 < inside.float().mean() < 0.6
    filled = rm.RasteretDataset(days, ["A"], mask_outside=True)
    sample = filled[triangle(filled)]
    assert (sample["image"][0][~inside] == 0).all()
    assert (sample["image"][0][inside] == 80).all()
    assert sample["mask_valid"].all()
    assert sample["label"].tolist() == [2]
    assert sample["aoi"].tolist() == [3]
    labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, mask_outside=True, ignore_index=250)
    assert (labels[triangle(labels)]["mask"][~inside] == 250).all()


def test_series_need_dates_and_images(days, scenes):
    """What cannot be is refused at construction."""
    with pytest.raises(UsageError, match="has no date"):
        rm.RasteretDataset(scenes.labels, ["B1"], series=3)
    with pytest.raises(UsageError, match="labels"):
        rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, series=3)
    with pytest.raises(UsageError, match="quality="):
        rm.RasteretDataset(days, ["A"], clear_first=True)
    with pytest.raises(NoOverlapError, match="least=5"):
        rm.RasteretDataset(days, ["A"], series=rm.TimeSeries(length=6, least=5))[WHOLE]


def test_too_few_valid_pixels_are_drawn_again(days):
    """From the AOI's spare places, the first that suffices, else the best; the same in any batch."""
    odd = rm.RasteretDataset(days, ["A"])
    odd.index = odd.index[odd.index.rid == 0]  # the left half is empty

    def asked(min_valid: float, *spares: float) -> rm.AOI:
        x, t = 500000.0, odd.bounds[2]
        places = tuple((500000.0 + pixel * 10, 5000000.0) for pixel in spares)
        details = AOIDetails(crs="EPSG:32633", position=1, min_valid=min_valid, spares=places)
        return rm.AOI((slice(x, x + 80, 10.0), slice(4999920.0, 5000000.0, 10.0), t), details)

    enough, best, none = asked(0.7, 4, 14, 20, 24), asked(1.0, 12, 14, 4), asked(0.5)
    batch = odd.__getitems__([enough, best, none])
    assert [valid_share(sample) for sample in batch] == [0.75, 0.75, 0.0]
    assert [sample["transform"][2].item() for sample in batch] == [500140.0, 500140.0, 500000.0]
    alone = odd[enough]
    torch.testing.assert_close(alone["image"], batch[0]["image"])
    assert rm.collate(batch)["image"].shape == (3, 1, 8, 8)
