"""Traps that a subclass of TorchGeo's GeoDataset inherits: that they do not bite here, one test each."""

from __future__ import annotations

import itertools

import geopandas as gpd
import kornia.augmentation as K
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
import torchgeo.samplers
from torchgeo.datamodules import GeoDataModule
from torchgeo.datasets import RasterDataset, random_grid_cell_assignment, stack_samples, time_series_split

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.transforms.normalize import normalize

BANDS = ("B02", "B03")


class Stock(RasterDataset):
    """TorchGeo's own reader of one of the files."""

    filename_glob = "S_20230801_B02.tif"


@pytest.fixture
def images(scenes):
    return rm.RasteretDataset(scenes.images, BANDS)


@pytest.fixture
def labels(scenes):
    return rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)


def chips(dataset, size: int = 32, length: int = 4, **options):
    return list(rm.RandomAOISampler(dataset, size, length, **options))


def box_of(query) -> shapely.Polygon:
    x, y, _ = query
    return shapely.box(x.start, y.start, x.stop, y.stop)


@pytest.mark.parametrize("stack", [rm.collate, stack_samples])
def test_samples_go_through_the_stock_datamodule(images, labels, stack):
    """It deletes `crs` and `bounds` from each batch, and fails where they are not."""
    both = images & labels
    batch = stack(both.__getitems__(chips(both)))
    moved = GeoDataModule(RasterDataset, 4, 32).transfer_batch_to_device(dict(batch), torch.device("cpu"), 0)
    assert torch.equal(moved["image"], batch["image"])
    assert torch.equal(moved["mask"], batch["mask"])


def test_uint16_images_go_through_the_stock_augmentation(images):
    """After our one step to float, which belongs on the device."""
    batch = rm.collate(images.__getitems__(chips(images)))
    assert batch["image"].dtype == torch.uint16
    stock = K.AugmentationSequential(K.Normalize(mean=0.0, std=255.0), data_keys=None, keepdim=True)
    ready = normalize(batch, mean=[0, 0], std=[1, 1])
    out = stock({"image": ready["image"], "mask_valid": ready["mask_valid"]})
    expected = torch.where(batch["mask_valid"], batch["image"].float() / 255, 0)
    torch.testing.assert_close(out["image"], expected)


def test_instants_match_themselves(images, scenes):
    """Each scene is found by its own interval of the index."""
    pixels = [scenes.new, scenes.east, scenes.old]
    for interval, geometry in zip(images.index.index, images.index.geometry, strict=True):
        xmin, ymin, xmax, ymax = geometry.bounds
        image = images[xmin:xmax, ymin:ymax, interval.left : interval.right]["image"].numpy()
        assert sum(np.array_equal(image, known) for known in pixels) == 1


def test_time_series_split_of_instants(images):
    """Each scene in exactly one part, the first and the last one too."""
    parts = time_series_split(images, [0.5, 0.5])
    rows = [sorted(part.index["rid"].tolist()) for part in parts]
    times = dict(zip(images.index["rid"], images.index.index.left, strict=True))
    middle = min(times.values()) + (max(times.values()) - min(times.values())) / 2
    assert rows == [sorted(r for r in times if times[r] < middle), sorted(r for r in times if times[r] > middle)]
    for part in parts:
        found = {part[query]["record"].item() for query in chips(part, length=20)}
        assert found == set(part.index["rid"])


def test_time_series_split_of_polygons():
    """Instants of a table, likewise."""
    days = pd.date_range("2021-01-01", periods=5)
    frame = gpd.GeoDataFrame({"day": days}, geometry=[shapely.box(i, 0, i + 1, 1) for i in range(5)], crs=32633)
    parts = time_series_split(rm.PolygonDataset(frame, time="day", res=0.5), [0.6, 0.4])
    assert [part.index["polygon"].tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    shown = [part[0:5, 0:1]["mask_valid"][0, 0, ::2].tolist() for part in parts]
    assert shown == [[True, True, True, False, False], [False, False, False, True, True]]


def test_random_grid_cell_assignment(images):
    """It loses the CRS and the names of columns; the parts cover all, overlap nowhere and can be read."""
    parts = random_grid_cell_assignment(images, [0.5, 0.5], grid_size=4, generator=torch.Generator().manual_seed(0))
    check_cells(images, parts, "rid")
    for part in parts:
        records = {sample["record"].item() for sample in part.__getitems__(chips(part, 8, 20))}
        assert len(records) > 1
        assert records <= set(part.index["rid"])


def test_random_grid_cell_assignment_of_polygons():
    """And what is cut away is not painted."""
    frame = gpd.GeoDataFrame({"v": [0, 1]}, geometry=[shapely.box(0, 0, 8, 8), shapely.box(8, 0, 16, 8)], crs=32633)
    whole = rm.PolygonDataset(frame, "v", res=1)
    parts = random_grid_cell_assignment(whole, [0.5, 0.5], grid_size=4, generator=torch.Generator().manual_seed(0))
    check_cells(whole, parts, "polygon")
    x, y, t = whole.bounds
    known = torch.stack([part[x, y, t]["mask_valid"] for part in parts]).int()
    assert (known.sum(0) == 1).all()
    assert known.sum((1, 2, 3)).tolist() == [64, 64]


def check_cells(whole, parts, column: str) -> None:
    """Rows of known columns in a known CRS that share the whole out."""
    assert all(part.index.crs == whole.index.crs for part in parts)
    assert all(part.index[column].dtype == whole.index[column].dtype for part in parts)
    for row, shape in zip(whole.index[column], whole.index.geometry, strict=True):
        cells = [part.index.geometry[(part.index[column] == row).to_numpy()] for part in parts]
        assert sum(c.area.sum() for c in cells) == pytest.approx(shape.area)
        assert shapely.union_all(np.concatenate(cells)).symmetric_difference(shape).area < 1e-6 * shape.area


def test_the_order_does_not_depend_on_the_global_seed(images):
    """The stock sampler chooses its tile without the generator that it is given."""
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        drawn.append([tuple(query) for query in chips(images, length=50, seed=9)])
    assert drawn[0] == drawn[1]
    assert drawn[0] != [tuple(query) for query in chips(images, length=50, seed=8)]


def test_no_chip_misses_an_l_shaped_region(images):
    """The stock sampler draws from its bounding box: 1678 of 2000 chips did not touch it."""
    x, y, _ = images.bounds
    region = shapely.union(
        shapely.box(x.start, y.start, x.start + 150, y.stop), shapely.box(x.start, y.start, x.stop, y.start + 150)
    )
    queries = chips(images, 8, 2000, aois=[region], aois_crs=images.crs)
    assert all(region.intersects(box_of(query)) for query in queries)
    assert all(
        region.covers(box_of(q)) for q in chips(images, 8, 500, aois=[region], aois_crs=images.crs, placement="inside")
    )


def test_scenes_smaller_than_the_chip_are_not_dropped(images):
    """The stock samplers pass over them in silence."""
    with pytest.raises(UsageError, match="placement='centre'"):
        rm.RandomAOISampler(images, 400, 3)
    for sampler in (rm.RandomAOISampler(images, 400, 3, placement="centre"), rm.GridAOISampler(images, 700)):
        for query in sampler:
            sample = images[query]
            assert sample["image"].shape == (2, *sampler.size)
            assert 0 < sample["mask_valid"].float().mean() < 1


def test_a_grid_has_one_chip_a_place_and_pads_with_invalid_pixels(images):
    """The stock one has one a date, and zeros past the edge."""
    queries = list(rm.GridAOISampler(images, 128))
    assert len(queries) == len({tuple(box_of(query).bounds) for query in queries}) == 3 * 5
    valid = sum(int(images[query]["mask_valid"].sum()) for query in queries)
    assert valid == 300 * 600


def test_times_have_no_zone(images, scenes):
    """A zone in the index raises with every stock dataset."""
    assert images.index.index.left.tz is None
    stock = Stock(str(scenes.folder))
    for combined in (images & stock, images | stock, stock & images, stock | images):
        assert combined.index.index.left.tz is None
    interval = pd.Interval(pd.Timestamp("2023-08-01"), pd.Timestamp("2023-08-03"), closed="both")
    for times in (interval, ("2023-08-01T00:00+02:00", "2023-08-03T00:00+02:00")):
        (query,) = chips(
            images, length=1, time=times, aois=[shapely.box(500500, 4997500, 502500, 4999500)], aois_crs=32633
        )
        assert images[query]["time"].item() == pd.Timestamp("2023-08-01", tz="UTC").timestamp()


def test_a_batch_whose_samples_differ_in_keys_is_refused(images):
    """The stock one makes a shorter tensor of them."""
    samples = images.__getitems__(chips(images, length=2))
    samples[1]["label"] = torch.tensor([1])
    with pytest.raises(UsageError, match="label"):
        rm.collate(samples)


def test_the_loader_needs_no_collate_of_torchgeos(images):
    """torch's own fails on the CRS in a sample of 0.8; what comes out is tensors."""
    (batch,) = rm.DataLoader(images, 4, sampler=rm.RandomAOISampler(images, 32, 4))
    assert all(isinstance(value, torch.Tensor) and len(value) == 4 for value in batch.values())
    assert batch["bounds"].dtype == torch.float64


def test_a_query_looks_at_no_row_that_it_does_not_need(images, monkeypatch):
    """TorchGeo compares every interval and slices the frame, for every query: 145 ms of a million rows."""

    def refuse(*args, **kwargs):
        raise AssertionError("looked at the whole index")

    queries = chips(images)
    monkeypatch.setattr(gpd.GeoDataFrame, "cx", property(refuse))
    monkeypatch.setattr(pd.IntervalIndex, "overlaps", refuse)
    monkeypatch.setattr(gpd.GeoDataFrame, "total_bounds", property(refuse))
    assert len(images.__getitems__(queries)) == 4


def test_a_sampler_is_made_without_a_loop_over_rows(images, monkeypatch):
    """TorchGeo takes 10 s for 100,000 rows, one at a time."""

    def refuse(*args, **kwargs):
        raise AssertionError("went through the rows")

    for name in ("iterrows", "itertuples", "__iter__", "apply"):
        monkeypatch.setattr(gpd.GeoDataFrame, name, refuse)
    monkeypatch.setattr(gpd.GeoSeries, "iloc", property(refuse))
    monkeypatch.setattr(pd.IntervalIndex, "__getitem__", refuse)
    assert len(list(rm.RandomAOISampler(images, 32, 5))) == 5
    assert len(list(rm.GridAOISampler(images, 100))) == 18


def test_combinations_read_a_batch_at_once(images, labels, monkeypatch):
    """Without `__getitems__`, a loader falls back to sample by sample."""
    begun = []
    requests = rm.RasteretDataset.requests

    def counted(self, queries, grids=None):
        begun.append(len(queries))
        return requests(self, queries, grids)

    monkeypatch.setattr(rm.RasteretDataset, "requests", counted)
    frame = gpd.GeoDataFrame(geometry=[images.index.geometry.union_all()], crs=images.crs)
    for combined in (images & labels, images | images, (images & labels) & rm.PolygonDataset(frame, key="mask_field")):
        begun.clear()
        loader = rm.DataLoader(combined, 6, sampler=rm.RandomAOISampler(combined, 16, 6))
        assert len(list(loader)) == 1
        assert begun == [6, 6]


@pytest.mark.filterwarnings("ignore:Use .* instead:DeprecationWarning")
def test_stock_samplers_take_our_dataset(images):
    """All of them, old and new, with every dataset of ours."""
    make = {
        "RandomGeoSampler": lambda s: s(images, 64, length=3),
        "GridGeoSampler": lambda s: itertools.islice(s(images, 100), 3),
        "RandomBatchGeoSampler": lambda s: itertools.chain(*s(images, 64, 3, length=3)),
        "PreChippedGeoSampler": lambda s: s(images),
        "RandomPatchSampler": lambda s: s(images, size=64, length=3),
        "GriddedPatchSampler": lambda s: itertools.islice(s(images, size=100), 3),
    }
    found = {name: make[name](getattr(torchgeo.samplers, name)) for name in make if hasattr(torchgeo.samplers, name)}
    assert len(found) >= 4
    for name, sampler in found.items():
        samples = images.__getitems__(list(sampler))
        assert len(samples) == 3, name
        assert all(sample["mask_valid"].any() for sample in samples), name
