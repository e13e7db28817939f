"""Five real dates on two tiles half a pixel apart: series, day mosaics, clouds and composites, against rasterio."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
import rasterio
import torch
from rasterio.warp import Resampling, reproject

import rasteret_ml as rm
from rasteret_ml.geo.grid import Grid

BANDS = ("B02", "B03", "B04", "B08")
CLEAR = (2, 4, 5, 6, 7, 11)
DAYS = ("2023-08-10", "2023-08-13", "2023-08-15", "2023-08-18", "2023-08-20")
SIZE = 200


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> rm.Collection:
    """All ten items, SCL among their bands."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "multidate"
    if not shared.is_dir():
        pytest.skip(f"no real data at {shared}")
    out = tmp_path_factory.mktemp("multidate") / "m.parquet"
    return rm.build(sorted(str(p) for p in shared.glob("*/*.json")), out, bands=[*BANDS, "SCL"])


def on_the_seam(dataset: rm.RasteretDataset, size: int = SIZE) -> tuple[slice, slice]:
    """A chip over the edge between the two tiles."""
    xmin, ymin, xmax, ymax = dataset.index.total_bounds
    middle_x, middle_y, half = (xmin + xmax) / 2, (ymin + ymax) / 2, size * dataset.res[0] / 2
    return slice(middle_x - half, middle_x + half), slice(middle_y - half, middle_y + half)


def read(shared: Path, name: str, band: str, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """A file on a grid by GDAL's nearest, and which pixels it has."""
    with rasterio.open(shared / "multidate" / name / f"{band}.tif") as file:
        out = np.zeros(grid.shape, file.dtypes[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reproject(
                rasterio.band(file, 1), out, dst_transform=grid.transform, dst_crs=grid.crs,
                resampling=Resampling.nearest, src_nodata=0, dst_nodata=0,
            )  # fmt: skip
    return out, out != 0


def day_mosaic(shared: Path, items: rm.Collection, day: str, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, validity and SCL of a day by hand: the newest record first, the next where its pixels are not valid."""
    table = items.to_table(["id", "datetime"]).to_pandas().sort_values("datetime", ascending=False)
    pixels, valid = np.zeros((4, *grid.shape), np.uint16), np.zeros(grid.shape, bool)
    scl = np.zeros(grid.shape, np.uint8)
    for name in table.loc[table.datetime.dt.strftime("%Y-%m-%d") == day, "id"]:
        bands = [read(shared, name, band, grid) for band in BANDS]
        its = np.all([known for _, known in bands], axis=0)
        take = its & ~valid
        pixels[:, take] = np.stack([data for data, _ in bands])[:, take]
        scl[take] = read(shared, name, "SCL", grid)[0][take]
        valid |= its
    return pixels, valid, scl


def test_a_series_of_day_mosaics_with_scl_and_padding(shared_data: Path, items: rm.Collection) -> None:
    """Dates, pixels, validity and clear share of each day are those of a mosaic by rasterio; T is as asked for."""
    series = rm.TimeSeries(length=7)
    dataset = rm.RasteretDataset(
        items, BANDS, series=series, quality="sentinel-2-scl", mosaic={"resampling": "nearest"}
    )
    place = on_the_seam(dataset)
    sample = dataset[place]
    grid = dataset.chip_grid(place)
    assert sample["image"].shape == (7, 4, SIZE, SIZE)
    assert sample["image"].dtype == torch.uint16
    assert sample["mask_valid"].shape == sample["mask_clear"].shape == (7, 1, SIZE, SIZE)
    assert sample["time_valid"].tolist() == [True] * 5 + [False] * 2
    assert sample["length"].tolist() == [5]
    times = [pd.Timestamp(t, unit="s").strftime("%Y-%m-%d") for t in sample["time"][:5].tolist()]
    assert times == list(DAYS)
    assert torch.isnan(sample["time"][5:]).all()
    for t, day in enumerate(DAYS):
        pixels, valid, scl = day_mosaic(shared_data, items, day, grid)
        assert valid.mean() > 0.9
        np.testing.assert_array_equal(sample["mask_valid"][t, 0].numpy(), valid)
        np.testing.assert_array_equal(np.where(valid, sample["image"][t].numpy(), 0), np.where(valid, pixels, 0))
        clear = valid & np.isin(scl, CLEAR)
        np.testing.assert_array_equal(sample["mask_clear"][t, 0].numpy(), clear)
    assert not sample["mask_valid"][5:].any()
    assert not sample["mask_clear"][5:].any()
    assert (sample["image"][5:] == 0).all()
    ids = items.to_table(["id"])["id"].to_pylist()
    days = [ids[row].split("_")[2] for row in sample["record"][:5].tolist()]
    assert days == [day.replace("-", "") for day in DAYS]
    assert sample["record"][5:].tolist() == [-1, -1]


def test_shares_of_each_date_are_those_that_scl_says(shared_data: Path, items: rm.Collection) -> None:
    """Read from SCL alone: how much of the place each day shows at all, and how much of that is clear."""
    dataset = rm.RasteretDataset(items, BANDS, series=5, quality="sentinel-2-scl", mosaic={"resampling": "nearest"})
    place = on_the_seam(dataset, 400)
    sample, grid = dataset[place], dataset.chip_grid(place)
    newest_first = items.to_table(["id", "datetime"]).to_pandas().sort_values("datetime", ascending=False)["id"]
    shares = []
    for t, day in enumerate(DAYS):
        classes = np.zeros(grid.shape, np.uint8)
        for name in (n for n in newest_first if n.split("_")[2] == day.replace("-", "")):
            scl, known = read(shared_data, name, "SCL", grid)
            classes = np.where(classes == 0, np.where(known, scl, 0), classes)
        shown, clear = (classes != 0).mean(), np.isin(classes, CLEAR).mean()
        # The bands say by themselves where there is data: to a pixel of SCL, 20 m, along the edge of a swath.
        assert sample["mask_valid"][t].float().mean().item() == pytest.approx(shown, abs=2e-3)
        assert sample["mask_clear"][t].float().mean().item() == pytest.approx(clear, abs=2e-3)
        shares.append(clear)
    assert max(shares) - min(shares) > 0.3


def test_which_dates(items: rm.Collection) -> None:
    """Latest, clearest, few clouds: always T of them, ascending."""
    for series, days in (
        ({"length": 2}, DAYS[-2:]),
        ({"length": 2, "choose": "clearest"}, (DAYS[1], DAYS[2])),
        ({"length": 3, "max_cloud": 10}, (DAYS[1], DAYS[2], DAYS[4])),
        ({"length": 3, "choose": "even"}, (DAYS[0], DAYS[2], DAYS[4])),
        (4, DAYS[1:]),
    ):
        dataset = rm.RasteretDataset(items, ["B04"], series=series)
        sample = dataset[on_the_seam(dataset, 16)]
        found = [pd.Timestamp(t, unit="s").strftime("%Y-%m-%d") for t in sample["time"].tolist()]
        assert found == list(days)
        assert sample["image"].shape[0] == len(days)


def test_batches_of_series_are_one_read(items: rm.Collection) -> None:
    """A loader's batch equals its samples one by one, in workers as well; a batch of unequal lengths is padded."""
    dataset = rm.RasteretDataset(items, BANDS, series=3, quality="sentinel-2-scl")
    sampler = rm.RandomAOISampler(dataset, 64, 6, seed=1)
    for workers in (0, 2):
        loader = rm.DataLoader(dataset, batch_size=3, sampler=sampler, num_workers=workers)
        sampler.set_epoch(0)
        for number, batch in enumerate(loader):
            assert batch["image"].shape == (3, 3, 4, 64, 64)
            for i in range(3):
                one = dataset[sampler.at(3 * number + i)]
                for key in ("image", "mask_valid", "mask_clear", "time", "record", "scale"):
                    torch.testing.assert_close(batch[key][i], one[key], rtol=0, atol=0, equal_nan=True)
    every = rm.RasteretDataset(items, ["B04"], series=rm.TimeSeries(max_cloud=8.0))
    tiles = {name: every.index[every.index.rid.isin(rows)] for name, rows in _rows_by_tile(items).items()}
    places = [_inside(part, every.res[0]) for part in tiles.values()]
    batch = rm.collate(every.__getitems__(places))
    assert sorted(batch["length"].tolist()) == [2, 3]
    short = int(batch["length"].argmin())
    assert batch["image"].shape[:2] == (2, 3)
    assert batch["time_valid"][short].tolist() == [True, True, False]
    assert not batch["mask_valid"][short, 2].any()


def _rows_by_tile(items: rm.Collection) -> dict[str, list[int]]:
    ids = items.to_table(["id"])["id"].to_pylist()
    return {tile: [i for i, name in enumerate(ids) if tile in name] for tile in ("33TWL", "33TWM")}


def _inside(part, res: float) -> tuple[slice, slice]:
    xmin, ymin, xmax, ymax = part.geometry.iloc[0].bounds
    x, y = (xmin + xmax) / 2, (ymin + ymax) / 2
    return slice(x, x + 8 * res), slice(y, y + 8 * res)


def test_clear_pixels_of_other_dates_replace_clouds(shared_data: Path, items: rm.Collection) -> None:
    """The least cloudy date first, then clear pixels of the next ones: pixel by pixel as by hand."""
    dataset = rm.RasteretDataset(
        items,
        BANDS,
        mosaic={"order": "clearest", "clear_first": True, "resampling": "nearest"},
        quality="sentinel-2-scl",
    )
    place = on_the_seam(dataset)
    sample, grid = dataset[place], dataset.chip_grid(place)
    table = items.to_table(["id", "datetime", "eo:cloud_cover"]).to_pandas()
    table = table.sort_values(["eo:cloud_cover", "datetime"], ascending=[True, False])
    pixels, rank = np.zeros((4, *grid.shape), np.uint16), np.zeros(grid.shape, np.uint8)
    for name in table["id"]:
        bands = [read(shared_data, name, band, grid) for band in BANDS]
        valid = np.all([known for _, known in bands], axis=0)
        its = valid.astype(np.uint8) + (valid & np.isin(read(shared_data, name, "SCL", grid)[0], CLEAR))
        take = its > rank
        pixels[:, take] = np.stack([data for data, _ in bands])[:, take]
        rank[take] = its[take]
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), rank > 0)
    np.testing.assert_array_equal(sample["mask_clear"][0].numpy(), rank > 1)
    np.testing.assert_array_equal(np.where(rank > 0, sample["image"].numpy(), 0), pixels)
    assert sample["mask_clear"].float().mean() > 0.97


def test_a_median_over_clear_dates(shared_data: Path, items: rm.Collection) -> None:
    """Each pixel's median over its clear dates equals numpy's."""
    options = {"quality": "sentinel-2-scl", "mosaic": {"resampling": "nearest"}}
    dataset = rm.RasteretDataset(items, BANDS, composite="median", **options)
    place = on_the_seam(dataset, 96)
    sample, series = dataset[place], rm.RasteretDataset(items, BANDS, series=5, **options)[place]
    good = (series["mask_valid"] & series["mask_clear"]).numpy()
    values = np.where(good, series["image"].numpy(), np.nan)
    some = good.any(axis=0)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = np.nanmedian(values, axis=0)
    assert sample["image"].shape == (4, 96, 96)
    assert sample["image"].dtype == torch.float32
    np.testing.assert_allclose(sample["image"].numpy()[:, some], expected[:, some])
    np.testing.assert_array_equal(sample["mask_clear"][0].numpy(), some)
    one_day = rm.RasteretDataset(items.where(pc.field("eo:cloud_cover") < 50), BANDS, composite="max_ndvi", **options)
    assert one_day[place]["image"].dtype == torch.uint16
