"""`|` where one side has something and the other has not, and what the loader pads labels with."""

from __future__ import annotations

import functools
import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from affine import Affine
from torchgeo.datasets import RasterDataset, UnionDataset

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.samplers.aoi.target_grids import target_grids_of
from rasteret_ml.testing import make_cog

N = 32
LEFT = slice(500000.0, 500160.0), slice(4999840.0, 5000000.0)
RIGHT = slice(500320.0, 500480.0), slice(4999840.0, 5000000.0)
"""A chip of the western scene alone, and one of the eastern."""


def corner(col: float = 0, res: float = 10.0) -> Affine:
    return Affine(res, 0, 500000.0 + res * col, 0, -res, 5000000.0)


def write(folder, name: str, value, transform: Affine | None = None, band: str = "A", dtype=np.uint16, **options):
    pixels = np.broadcast_to(np.asarray(value, dtype), (N, N)).copy()
    folder.mkdir(exist_ok=True)
    make_cog(
        folder / f"{name}_{band}.tif",
        pixels,
        blocksize=128,
        nodata=0,
        transform=transform or corner(),
        **options,
    )


def collected(folder, bands=("A",), scale: float | None = None) -> Collection:
    found = rm.build(str(folder / "*.tif"), folder / "c.parquet", bands=bands)
    if scale is None:
        return found
    table = found.to_table()
    rows = [row | {"scale": scale, "offset": -1.0} for row in table["A_metadata"].to_pylist()]
    i = table.schema.get_field_index("A_metadata")
    return Collection(table.set_column(i, "A_metadata", pa.array(rows, table["A_metadata"].type)))


@pytest.fixture
def west(tmp_path):
    write(tmp_path / "w", "w_20230501", 50)
    return tmp_path / "w"


@pytest.fixture
def east(tmp_path):
    write(tmp_path / "e", "e_20230501", 7, corner(N))
    return tmp_path / "e"


class Stock(RasterDataset):
    """TorchGeo's own reader."""

    filename_glob = "*_A.tif"
    filename_regex = r"\w_(?P<date>\d{8})"


class StockLabels(Stock):
    """As labels."""

    is_image = False


def batch_of(union, queries=(LEFT, RIGHT)):
    return rm.collate(union.__getitems__(list(queries)))


def test_a_side_without_the_dates_leaves_a_chip_to_the_other(tmp_path, west, east):
    """It has records there, but of no month or number that is asked for."""
    write(tmp_path / "o", "o_20230801", 9)
    for series, wide in (
        (rm.TimeSeries(months=(8,), length=1), "months"),
        (rm.TimeSeries(min_dates=2, length=2), "min_dates"),
    ):
        if wide == "min_dates":
            write(tmp_path / "o", "p_20230802", 9)
        left = rm.RasteretDataset(collected(west), ["A"], series=series)
        right = rm.RasteretDataset(collected(tmp_path / "o"), ["A"], series=series)
        for union in (left | right, (left | right) | left, left | (left | right)):
            assert union[LEFT]["image"].unique().tolist() == [9]
        with pytest.raises(NoOverlapError, match="Neither"):
            (left | left)[LEFT]
        both = rm.RasteretDataset(collected(west), ["A"], sample={"key": "image_b"}) & left
        assert not both.has((*LEFT, both.bounds[2]), both.chip_grid(LEFT))


def test_a_batch_of_the_left_and_of_the_right_alone(west, east, tmp_path):
    """All keys of both sides, neutral where a side knows nothing."""
    write(east, "e_20230501", 4, corner(N), "SCL", np.uint8)
    plain = rm.RasteretDataset(collected(west), ["A"])
    told = rm.RasteretDataset(
        collected(east, ("A", "SCL"), scale=0.5), ["A"], quality=rm.QualityMask(band="SCL", clear=(4,))
    )
    batch = batch_of(plain | told)
    assert batch["scale"].tolist() == [[1], [0.5]]
    assert batch["offset"].tolist() == [[0], [-1]]
    assert batch["mask_clear"].flatten(1).all(1).tolist() == [False, True]
    assert batch["image"][:, 0, 0, 0].tolist() == [50, 7]
    batch = batch_of(told | plain)
    assert batch["scale"].tolist() == [[1], [0.5]]
    assert batch["mask_clear"].flatten(1).all(1).tolist() == [False, True]
    native = batch_of(rm.RasteretDataset(collected(west), ["A"], grid="native") | told)
    assert native["epsg"].tolist() == [32633, 32633]
    joined = batch_of(
        (rm.RasteretDataset(collected(west), ["A"], sample={"key": "image_b"}) & plain)
        | (told_as("image_b", east) & told)
    )
    assert joined["scale_image_b"].tolist() == [[1], [0.5]]
    assert joined["scale"].tolist() == [[1], [0.5]]


def told_as(key: str, folder):
    return rm.RasteretDataset(collected(folder, ("A", "SCL"), scale=0.5), ["A"], sample={"key": key})


def test_a_batch_of_ours_and_of_a_stock_side_alone(west, east):
    """In our type; undated, of no record, in the chip's own place."""
    union = rm.RasteretDataset(collected(west), ["A"]) | Stock(str(east))
    batch = batch_of(union)
    assert batch["image"].dtype == torch.uint16
    assert batch["image"][:, 0, 0, 0].tolist() == [50, 7]
    assert batch["record"].tolist() == [[0], [-1]]
    assert batch["time"].isnan().flatten().tolist() == [False, True]
    assert batch["transform"].dtype == torch.float64
    assert batch["transform"][:, 2].tolist() == [LEFT[0].start, RIGHT[0].start]
    assert batch["bounds"].dtype == torch.float64
    assert batch["bounds"][:, 0].tolist() == [LEFT[0].start, RIGHT[0].start]
    alone = batch_of(union, [RIGHT])
    assert alone["image"].dtype == torch.uint16
    assert set(alone) == set(batch)
    sampler = rm.GridAOISampler(union, 16)
    batches = list(rm.DataLoader(union, 4, sampler=sampler))
    assert {frozenset(b) for b in batches} == {frozenset(batches[0])}
    assert torch.cat([b["image"].flatten() for b in batches]).int().bincount()[[7, 50]].tolist() == [N * N, N * N]


def test_aois_are_named_in_all_samples_of_a_batch(west, east):
    """Also where a stock dataset, which knows none, is alone; and in none where one has no label."""
    import geopandas as gpd
    import shapely

    union = rm.RasteretDataset(collected(west), ["A"]) | Stock(str(east))
    boxes = [shapely.box(x.start, y.start, x.stop, y.stop) for x, y in (LEFT, RIGHT)]
    table = rm.AOITable.of(
        gpd.GeoDataFrame({"kind": [3, 4]}, geometry=boxes, crs=32633), label="kind", classes=[1, 2, 3, 4]
    )
    batch = batch_of(union, list(rm.PerAOISampler(union, 16, aois=table)))
    assert batch["aoi"].tolist() == [0, 1]
    assert batch["label"].tolist() == [2, 3]
    assert batch["image"][:, 0, 0, 0].tolist() == [50, 7]


def test_invalid_labels_of_a_stock_side_alone_are_ignored(west, east):
    """Their 0 is no class."""
    half = np.full((N, N), 3)
    half[:8] = 0
    write(east, "e_20230501", half, corner(N))
    labels = rm.RasteretDataset(collected(west), ["A"], is_image=False, labels={"ignore_index": 255})
    batch = batch_of(labels | StockLabels(str(east)))
    assert batch["mask"].dtype == torch.int64
    assert batch["mask"][1, :, 0].tolist() == [255] * 8 + [3] * 8
    assert batch["mask_valid"][1, 0, :, 0].tolist() == [False] * 8 + [True] * 8


def test_sides_with_other_pixels_are_refused_where_only_the_right_has_any(west, east):
    """They could not be batched."""
    left = rm.RasteretDataset(collected(west), ["A"])
    for right in (rm.RasteretDataset(collected(east), ["A"], sample={"key": "image_x"}), StockLabels(str(east))):
        with pytest.raises(UsageError, match=r"different pixels, \['image'\]"):
            (left | right)[RIGHT]
    series = rm.RasteretDataset(collected(west), ["A"], series=2)
    with pytest.raises(UsageError, match="time series, the other single"):
        (series | rm.RasteretDataset(collected(east), ["A"]))[RIGHT]


@pytest.mark.parametrize("options", [{}, {"grid": "native"}])
def test_a_native_union_reads_the_right_where_the_left_has_nothing(west, tmp_path, options):
    """On the right's own pixels, which samplers are offered, each place once."""
    write(tmp_path / "x", "x_20230501", 7, corner(16.5))
    left = rm.RasteretDataset(collected(west), ["A"], grid="native")
    right = rm.RasteretDataset(collected(tmp_path / "x"), ["A"], **options)
    union = left | right
    frames = target_grids_of(union)
    assert [frame.origin[0] for frame in frames] == [500000, 500165]
    assert [sum(s.area for s in frame.shapes) for frame in frames] == [N * N * 100, N * 16.5 * 100]
    samples = union.__getitems__(list(rm.GridAOISampler(union, 8)))
    batch = rm.collate(samples)
    assert set(batch["image"].flatten().tolist()) == {50, 7, 0}
    lattices = {(round(s["transform"][2].item() - 500000) % 10, int(s["image"].int().max())) for s in samples}
    assert lattices >= {(0, 50), (5, 7)}
    assert N * N <= (batch["image"] == 50).sum() <= N * N + N  # half a pixel at the edge belongs to both
    drawn = union.__getitems__(list(rm.RandomAOISampler(union, 8, 24, seed=1)))
    assert {int(s["image"].int().max()) for s in drawn} == {50, 7}


def test_a_native_union_with_a_stock_side_says_what_it_cannot(west, east):
    """A stock dataset has no pixels of its own to read on, and samplers are not sent there."""
    left = rm.RasteretDataset(collected(west), ["A"], grid="native")
    union = left | Stock(str(east))
    with pytest.raises(NoOverlapError, match=r"Stock.*common grid"):
        union[RIGHT]
    assert len(union.__getitems__(list(rm.GridAOISampler(union, 16)))) == 4


def test_the_sides_of_a_batch_are_those_it_was_begun_with(west, east):
    """Whatever has become of a part's index since; what is begun later has the new one."""
    union = rm.RasteretDataset(collected(west), ["A"]) | rm.RasteretDataset(collected(east), ["A"])
    query = (*LEFT, union.bounds[2])
    batches = iter(rm.DataLoader(union, 1, sampler=[query, query], lookahead=1))
    assert next(batches)["image"].unique().tolist() == [50]
    union.datasets[0].index = union.datasets[0].index[0:0]
    assert next(batches)["image"].unique().tolist() == [50]
    with pytest.raises(NoOverlapError, match="Neither"):
        union[query]


@pytest.mark.parametrize("kind", ["alone", "right of &", "left of |", "TorchGeo's", "images"])
def test_the_loader_pads_labels_with_the_datasets_class(west, kind):
    """Not with one that the loss counts."""
    labels = rm.RasteretDataset(collected(west), ["A"], is_image=False, labels={"ignore_index": 255})
    images = rm.RasteretDataset(collected(west), ["A"])
    dataset = {
        "alone": labels,
        "right of &": images & labels,
        "left of |": (labels | labels) & images,
        "TorchGeo's": UnionDataset(labels, labels),
        "images": images,
    }[kind]
    loader = rm.DataLoader(dataset, 2)
    again = pickle.loads(pickle.dumps(loader.collate_fn))  # as spawned workers get it
    ragged = [{"mask": torch.zeros(2, 2, dtype=torch.int64)}, {"mask": torch.zeros(2, 3, dtype=torch.int64)}]
    assert again(ragged)["mask"][0, :, 2].tolist() == [-100 if kind == "images" else 255] * 2
    own = functools.partial(rm.collate, ignore_index=7)
    assert rm.DataLoader(dataset, 2, collate_fn=own).collate_fn is own


def test_series_that_differ_in_a_date_are_named(tmp_path, west):
    """As read: the day of each side."""
    write(west, "w_20230502", 51)
    write(tmp_path / "b", "b_20230502", 60)
    left = rm.RasteretDataset(collected(west), ["A"], series=2)
    right = rm.RasteretDataset(collected(tmp_path / "b"), ["A"], series=2)
    times = slice(pd.Timestamp("2023-05-01"), pd.Timestamp("2023-05-09"))
    for both in (left & right, left | right):
        with pytest.raises(UsageError, match="2023-05-01 00:00 and 2023-05-02 00:00"):
            both[(*LEFT, times)]
