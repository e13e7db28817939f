"""Splits separate places and times, and a check reports leaks."""

from __future__ import annotations

import datetime as dt
import logging
import pickle

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.features import geometry_mask

import rasteret_ml as rm
from rasteret_ml.errors import SplitLeakError, UsageError
from rasteret_ml.samplers.splits.blocks import assign, connected_components
from rasteret_ml.samplers.splits.records import _by_time
from rasteret_ml.testing import make_cog

CRS = "EPSG:32633"
THREE = {"train": 0.7, "val": 0.15, "test": 0.15}


class Plane:
    """A minimal dataset for samplers and splits."""

    res = (10.0, 10.0)

    def __init__(self, *shapes: shapely.Geometry, days: tuple[str, str] = ("2023-01-01", "2023-01-01")) -> None:
        left, right = ([pd.Timestamp(day)] * len(shapes) for day in days)
        index = pd.IntervalIndex.from_arrays(left, right, closed="both", name="datetime")
        self.index = gpd.GeoDataFrame(geometry=list(shapes), crs=CRS, index=index)
        self.crs = self.index.crs

    @property
    def bounds(self):
        xmin, ymin, xmax, ymax = self.index.total_bounds
        times = self.index.index
        return slice(xmin, xmax, 10.0), slice(ymin, ymax, 10.0), slice(times.left.min(), times.right.max(), 1)


SQUARE = shapely.box(0, 0, 10000, 10000)
L_SHAPE = shapely.Polygon([(0, 0), (9000, 0), (9000, 3000), (3000, 3000), (3000, 9000), (0, 9000)])


def pixels_of(sampler, shape=(1000, 1000)) -> np.ndarray:
    """Pixels of 10 m, down from (0, 10000), that any chip contains after rounding to pixels."""
    seen = np.zeros(shape, bool)
    for x, y, _ in sampler:
        row, col = int(np.floor((10000 - y.stop) / 10 + 0.5)), int(np.floor(x.start / 10 + 0.5))
        height, width = round((y.stop - y.start) / 10), round((x.stop - x.start) / 10)
        seen[max(row, 0) : row + height, max(col, 0) : col + width] = True
    return seen


def rim_of(seen: np.ndarray) -> np.ndarray:
    """The pixels of a mask that have a neighbour outside it."""
    padded = np.pad(seen, 1)
    return seen & ~(padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2])


# Blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("area", [SQUARE, L_SHAPE], ids=["square", "L"])
def test_no_pixel_of_any_chip_is_in_two_splits(area):
    """Rasterize thousands of chips of each split and measure the distance between them in pixels."""
    plane = Plane(area)
    blocks = rm.split_blocks(plane, 1500, THREE, buffer=200, seed=3)
    seen = {}
    for name in THREE:
        own = blocks[blocks["split"] == name]
        sampler = rm.RandomAOISampler(plane, 32, 4000, own, placement="inside", seed=1)
        seen[name] = pixels_of(sampler)
        assert seen[name].any()
        assert not (
            seen[name] & geometry_mask([own.geometry.union_all()], (1000, 1000), Affine(10, 0, 0, 0, -10, 10000))
        ).any()
    centres = {name: shapely.points(np.argwhere(rim_of(found)) * 10.0) for name, found in seen.items()}
    for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not (seen[one] & seen[two]).any()
        nearest = shapely.STRtree(centres[one]).query_nearest(centres[two], return_distance=True, all_matches=False)[1]
        # Centres of pixels whose edges are the buffer apart, less half a pixel by which each chip may be rounded.
        assert 200 <= nearest.min() < 400


@examples(30)
@given(st.integers(0, 1000), st.sampled_from([700.0, 1000.0, 1300.0]), st.sampled_from([0.0, 50.0, 200.0]))
def test_blocks_partition_the_coverage_except_for_the_buffer(seed, side, buffer):
    """Splits are `buffer` apart and cover the rest of the dataset, its outer edge included."""
    coverage = L_SHAPE
    table = rm.split_blocks(Plane(coverage), side, THREE, buffer=buffer, seed=seed)
    parts = [table[table["split"] == name].geometry.union_all() for name in THREE]
    for i in range(3):
        for j in range(i):
            assert parts[i].intersection(parts[j]).area < 1e-6
            assert parts[i].distance(parts[j]) >= buffer * (1 - 1e-8)
    whole = shapely.union_all(parts)
    assert whole.difference(coverage).area < 1e-3
    if buffer == 0:
        assert whole.area == pytest.approx(coverage.area)
    # Only places within half the buffer of two splits are lost: grown by it, splits cover everything.
    assert coverage.difference(shapely.buffer(whole, buffer * 1.01 + 1, join_style="mitre")).area < 1e-3
    rim = shapely.intersection(coverage.exterior, shapely.buffer(whole, 0.01)).length
    assert rim >= coverage.exterior.length * (1 - (buffer + 1) * len(table) * 4 / coverage.exterior.length)


@pytest.mark.parametrize("side", [1700.0, 3000.0, 4400.0])
def test_last_blocks_are_not_narrow_strips(side):
    """If the side does not divide the area, no block is narrower than half a side, and no area is lost."""
    blocks = rm.split_blocks(Plane(SQUARE), side, {"a": 0.5, "b": 0.5})
    assert shapely.union_all(blocks.geometry.to_numpy()).equals(SQUARE)
    edges = np.unique(shapely.get_coordinates(blocks.geometry.to_numpy())[:, 0])
    assert np.diff(edges).min() >= side / 2


def test_shares_of_blocks_are_as_close_as_possible():
    """100 equal blocks are assigned exactly, and differently for each seed."""
    plane = Plane(SQUARE)
    tables = [rm.split_blocks(plane, 1000, THREE, seed=seed) for seed in (0, 0, 1)]
    areas = [table.dissolve("split").area / SQUARE.area for table in tables]
    for area in areas:
        assert area.to_dict() == pytest.approx(THREE)
    assert tables[0].geometry.geom_equals(tables[1].geometry).all()
    assert not tables[0].geometry.union_all(method="coverage").equals(shapely.Polygon())
    train = [table[table["split"] == "train"].geometry.union_all() for table in tables]
    assert train[0].symmetric_difference(train[2]).area > 1e6


def test_islands_across_a_narrow_gap_are_a_buffer_apart():
    """To trim half the buffer would not be enough for blocks that do not touch."""
    plane = Plane(shapely.box(0, 0, 1000, 1000), shapely.box(1120, 0, 2120, 1000))
    for seed in range(4):
        table = rm.split_blocks(plane, 1060, {"a": 0.5, "b": 0.5}, buffer=200, seed=seed)
        a, b = (table[table["split"] == name].geometry.union_all() for name in "ab")
        assert a.distance(b) == pytest.approx(200)


def test_impossible_blocks_are_refused():
    """Each message contains a remedy."""
    plane = Plane(SQUARE)
    with pytest.raises(UsageError, match="smaller side"):
        rm.split_blocks(plane, 10000, THREE)
    with pytest.raises(UsageError, match=r"buffer of 20000 leaves nothing of split '\w+'"):
        rm.split_blocks(plane, 5000, {"train": 0.5, "val": 0.5}, buffer=20000)
    with pytest.raises(UsageError, match="sum to 1"):
        rm.split_blocks(plane, 1000, {"train": 0.7, "val": 0.2})
    with pytest.raises(UsageError, match="side must be a finite length > 0, got 0"):
        rm.split_blocks(plane, 0, THREE)


# Assignment -----------------------------------------------------------------------------------------------


@examples(60)
@given(st.lists(st.floats(0.5, 2.0), min_size=12, max_size=60), st.integers(0, 50))
def test_shares_differ_by_at_most_one_group(weights, seed):
    """For groups of any weight, and no split is empty."""
    fractions = {"train": 0.6, "val": 0.25, "test": 0.15}
    shares = np.array(list(fractions.values()))
    index = assign(np.arange(len(weights)), np.array(weights), None, fractions, seed, "groups", "use fewer")
    found = np.bincount(index, weights, 3)
    assert (np.abs(found - shares * sum(weights)) <= max(weights) + 1e-9).all()
    assert (np.bincount(index, minlength=3) > 0).all()


@examples(60)
@given(st.data())
def test_connected_components(data):
    """Compare with a walk over the graph."""
    count = data.draw(st.integers(1, 30))
    pairs = data.draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=40))
    label = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            label[a] = label[b] = min(label[a], label[b])
    a, b = (np.array([pair[k] for pair in pairs], np.int64) for k in (0, 1))
    assert connected_components(count, a, b).tolist() == np.unique(label, return_inverse=True)[1].tolist()


# AOIs -----------------------------------------------------------------------------------------------------


def fields(count=300, seed=0, side=100.0) -> gpd.GeoDataFrame:
    """Square fields at random places with a crop and a farm."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0, 20000, (2, count))
    columns = {
        "crop": rng.choice(["wheat", "maize", "rape"], count, p=[0.7, 0.25, 0.05]),
        "farm": rng.integers(0, 40, count),
    }
    return gpd.GeoDataFrame(columns, geometry=shapely.box(x, y, x + side, y + side), crs=CRS)


def assert_apart(table: gpd.GeoDataFrame, buffer: float) -> None:
    """Brute force: every pair of AOIs of different splits."""
    kept = table[table["split"].notna()]
    shapes, split = np.asarray(kept.geometry, dtype=object), kept["split"].to_numpy()
    distances = shapely.distance(shapes[:, None], shapes[None, :])
    apart = split[:, None] != split[None, :]
    assert distances[apart].min() >= buffer * (1 - 1e-8)
    shared = shapely.area(shapely.intersection(shapes[:, None], shapes[None, :]))
    assert shared[apart].max() == 0


@pytest.mark.parametrize("by", [None, "block", "farm"])
def test_aois_are_assigned_in_whole_groups(by, caplog):
    """Groups and overlapping AOIs stay together, and AOIs within the buffer are left out and counted."""
    table = fields()
    with caplog.at_level(logging.WARNING):
        found = rm.split_aois(table, THREE, by=by, side=2500 if by == "block" else None, buffer=150, seed=5)
    assert_apart(found, 150)
    plain = rm.split_aois(table, THREE, by=by, side=2500 if by == "block" else None, seed=5)
    assert_apart(plain, 0)
    assert plain["split"].notna().all()
    lost = int(found["split"].isna().sum())
    assert lost == sum(record.args[0] for record in caplog.records)
    assert (found["split"] == plain["split"])[found["split"].notna()].all()
    shares = plain["split"].value_counts(normalize=True)
    assert all(abs(shares[name] - share) < 0.06 for name, share in THREE.items())
    if by == "farm":
        assert (plain.groupby("farm")["split"].nunique() == 1).all()
    pd.testing.assert_frame_equal(pd.DataFrame(plain.drop(columns="split")), pd.DataFrame(table))


def test_stratified_classes_keep_their_shares():
    """Each class has the shares of the whole, up to one field, and the seed decides the result."""
    x, y = np.divmod(np.arange(1000.0), 40)
    table = fields(1000, seed=2).set_geometry(shapely.box(x * 200, y * 200, x * 200 + 100, y * 200 + 100))
    found = rm.split_aois(table, THREE, stratify="crop", seed=4)
    counts = pd.crosstab(found["crop"], found["split"])
    for name, share in THREE.items():
        assert (abs(counts[name] - share * counts.sum(axis=1)) <= 1).all()
    again = rm.split_aois(table, THREE, stratify="crop", seed=4)
    assert (again["split"] == found["split"]).all()
    assert (rm.split_aois(table, THREE, stratify="crop", seed=5)["split"] != found["split"]).any()


def test_aois_that_cannot_be_split_are_refused():
    """Each message contains the cause and a remedy."""
    table = fields(30)
    with pytest.raises(UsageError, match=r"estimate_utm_crs"):
        rm.split_aois(table.to_crs(4326), THREE, buffer=100)
    with pytest.raises(UsageError, match="by='parish': the table has no such column"):
        rm.split_aois(table, THREE, by="parish")
    with pytest.raises(UsageError, match="AOI 7 has no value in column 'crop'"):
        rm.split_aois(table.assign(crop=table["crop"].where(table.index != 7)), THREE, stratify="crop")
    with pytest.raises(UsageError, match="needs side="):
        rm.split_aois(table, THREE, by="block")
    with pytest.raises(UsageError, match="to numbers"):
        rm.split_aois(table, {"a": "most", "b": 0.2})
    chain = gpd.GeoDataFrame(geometry=[shapely.box(i * 90, 0, i * 90 + 100, 100) for i in range(9)], crs=CRS)
    with pytest.raises(UsageError, match="1 groups of AOIs that belong together for 3"):
        rm.split_aois(chain, THREE)
    touching = gpd.GeoDataFrame(geometry=[shapely.box(i * 100, 0, i * 100 + 100, 100) for i in range(8)], crs=CRS)
    with pytest.raises(UsageError, match="All 4 AOIs of split"):
        rm.split_aois(touching, {"a": 0.5, "b": 0.5}, buffer=500)


def test_aois_on_both_sides_of_the_antimeridian_stay_together():
    """AOIs that overlap across 180 degrees stay together, those that only touch do not; `check_splits` agrees."""
    east = [shapely.box(179.0 + 0.1 * i, i, 180.2 + 0.1 * i, i + 0.5) for i in range(20)]
    west = [shapely.box(-180.0, i + 0.1, -179.9 + 0.1 * i, i + 0.4) for i in range(20)]
    apart = [shapely.box(179.0, 30 + i, 180.0, 30.9 + i) for i in range(20)]
    touching = [shapely.box(-180.0, 30 + i, -179.0, 30.9 + i) for i in range(20)]
    for shapes in ([*east, *west], [*west, *east]):
        table = rm.split_aois(shapes, {"a": 0.5, "b": 0.5}, seed=3)
        assert (table["split"][:20].to_numpy() == table["split"][20:].to_numpy()).all()
        rm.check_splits(table)
    table = rm.split_aois([*apart, *touching], {"a": 0.5, "b": 0.5}, seed=3)
    assert (table["split"][:20].to_numpy() != table["split"][20:].to_numpy()).any()
    rm.check_splits(table)


@pytest.mark.slow
def test_a_hundred_thousand_aois_are_split():
    """Stratified, in blocks, with a buffer, without a loop over pairs."""
    x, y = np.divmod(np.arange(100_000.0), 400)
    shapes = shapely.box(x * 100, y * 100, x * 100 + 80, y * 100 + 80)
    table = gpd.GeoDataFrame({"crop": np.arange(100_000) % 7}, geometry=shapes, crs=CRS)
    found = rm.split_aois(table, THREE, by="block", side=2000, buffer=100, stratify="crop")
    assert found["split"].notna().mean() > 0.8
    rm.check_splits(found, buffer=20)


# Records --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> rm.Collection:
    """Eight places a degree apart, each with two overlapping tiles and five dates."""
    folder = tmp_path_factory.mktemp("records")
    href = make_cog(
        folder / "one.tif", np.ones((1, 16, 16), np.uint8), transform=Affine(10, 0, 500000, 0, -10, 5000000)
    )
    rows = []
    for place in range(8):
        for tile in range(2):
            for date in range(5):
                x = place + 0.08 * tile
                when = dt.datetime(2023, 1, 1, 10, 0, tile) + dt.timedelta(days=10 * date)
                shape = shapely.box(x, 40 + 0.01 * date, x + 0.1, 40.1)
                rows.append(
                    {
                        "id": f"{place}-{tile}-{date}",
                        "datetime": when,
                        "tile": f"T{place}",
                        "geometry": shape,
                        "B1": href,
                    }
                )
    return rm.build(gpd.GeoDataFrame(rows, crs=4326), folder / "records.parquet", bands=["B1"])


def splits_of(collection: rm.Collection) -> pd.DataFrame:
    return collection.to_table(["id", "datetime", "tile", "split"]).to_pandas()


HALVES = {"train": 0.5, "val": 0.25, "test": 0.25}


@pytest.mark.parametrize("by", ["scene", "tile"])
def test_records_of_a_place_stay_together(records, tmp_path, by):
    """Both tiles and all dates; the column is written and read by `subset`."""
    found = rm.split_records(records, HALVES, by=by, seed=2)
    table = splits_of(found)
    assert (table.groupby("tile")["split"].nunique() == 1).all()
    assert table["split"].value_counts().to_dict() == {"train": 40, "val": 20, "test": 20}
    opened = found.write(tmp_path / "split.parquet")
    assert [len(opened.subset(split=name)) for name in HALVES] == [40, 20, 20]
    assert splits_of(opened)["split"].tolist() == table["split"].tolist()
    assert splits_of(rm.split_records(records, HALVES, by=by, seed=2))["split"].tolist() == table["split"].tolist()


def test_splits_can_be_written_directly(records, tmp_path):
    """The file equals the Collection in memory."""
    kept = rm.split_records(records, THREE, by="time")
    written = rm.split_records(records, THREE, by="time", out=tmp_path / "splits.parquet")
    assert written.path == str(tmp_path / "splits.parquet")
    assert written.to_table().equals(kept.to_table())


def test_scenes_closer_than_the_buffer_stay_together(records):
    """0.82 degrees of longitude at 40 north are 69.8 km."""
    assert rm.split_records(records, HALVES, buffer=69_000) is not None
    with pytest.raises(UsageError, match=r"are connected.*split_blocks"):
        rm.split_records(records, HALVES, buffer=70_500)


def test_time_is_cut_between_days_with_a_buffer(records, caplog):
    """Periods have the shares of the records; records within the buffer of another split are left out."""
    table = splits_of(rm.split_records(records, {"train": 0.6, "val": 0.4}, by="time"))
    days = table.groupby("split")["datetime"].agg(["min", "max"])
    assert days.loc["train", "max"] < pd.Timestamp("2023-01-22") < days.loc["val", "min"]
    assert table["split"].value_counts().to_dict() == {"train": 48, "val": 32}
    table = splits_of(rm.split_records(records, {"train": 0.6, "val": 0.4}, by="time", buffer=dt.timedelta(days=15)))
    days = table.groupby("split")["datetime"].agg(["min", "max"])
    assert days.loc["val", "min"] - days.loc["train", "max"] >= pd.Timedelta(days=15)
    assert f"{int(table['split'].isna().sum())} of 80 records are in no split" in caplog.text


@examples(150)
@given(st.lists(st.integers(1, 30), min_size=30, max_size=60), st.integers(0, 100), st.integers(2, 3))
def test_periods_are_a_buffer_apart(steps, buffer, count):
    """For any dates; without a buffer, every record is in a split."""
    times = np.datetime64("2023-01-01", "ns") + np.cumsum(steps) * np.timedelta64(1, "h")
    shares = dict(zip("abc", {2: (0.7, 0.3), 3: (0.5, 0.3, 0.2)}[count], strict=False))
    try:
        _, index = _by_time(times, shares, None, dt.timedelta(hours=buffer))
    except UsageError:
        return
    assert (np.diff(index[index >= 0]) >= 0).all()
    assert (index >= 0).all() or buffer
    for split in range(1, count):
        gap = times[index == split].min() - times[index == split - 1].max()
        assert gap >= np.timedelta64(buffer, "h")
    # Only records within half the buffer of a midnight between two splits are left out.
    lost = times[index < 0]
    midnights = np.unique(times.astype("datetime64[D]")).astype("datetime64[ns]")
    assert all(
        (abs(time - midnights) <= np.timedelta64(buffer, "h") / 2 + np.timedelta64(1, "us")).any() for time in lost
    )


def test_time_by_boundaries(records):
    """Both ends are inclusive; other records are null."""
    ranges = {"val": "2023-02-01/2023-02-28", "train": ("2023-01-01", "2023-01-11")}
    table = splits_of(rm.split_records(records, by="time", boundaries=ranges))
    expected = table["datetime"].dt.strftime("%m-%d").map({"01-01": "train", "01-11": "train", "02-10": "val"})
    pd.testing.assert_series_equal(table["split"], expected, check_names=False, check_dtype=False)
    table = splits_of(rm.split_records(records, by="time", boundaries=ranges, buffer="24 days"))
    assert sorted(table["split"].dropna().unique()) == ["train", "val"]
    with pytest.raises(UsageError, match="has no record between"):
        rm.split_records(records, by="time", boundaries=ranges, buffer="60 days")
    for start, stop in (("..", ".."), ("0001-01-01", "9999-12-31"), (None, None)):
        ends = {"train": (start, "2023-01-31"), "val": ("2023-02-01", stop)}
        table = splits_of(rm.split_records(records, by="time", boundaries=ends))
        assert table["split"].notna().all()


def test_records_that_cannot_be_split_are_refused(records):
    """Each message contains the cause and a remedy."""
    with pytest.raises(UsageError, match="dates of splits 'a' and 'b' overlap"):
        rm.split_records(records, by="time", boundaries={"a": "2023-01-01/2023-01-31", "b": "2023-01-31/2023-02-20"})
    with pytest.raises(UsageError, match="timedelta"):
        rm.split_records(records, HALVES, by="time", buffer=3)
    with pytest.raises(UsageError, match="buffer= needs"):
        rm.split_records(records, HALVES, by="tile", buffer=3)
    with pytest.raises(UsageError, match="'scene', 'time' or a column"):
        rm.split_records(records, HALVES, by="orbit")
    with pytest.raises(UsageError, match="8 places"):
        rm.split_records(records, {f"s{i}": 0.1 for i in range(10)})
    one = records.where(pc.field("tile") == "T0")
    with pytest.raises(UsageError, match="are connected"):
        rm.split_records(one, HALVES)


# The check ------------------------------------------------------------------------------------------------


class Reaching:
    """The part of a sampler that the check uses."""

    def __init__(self, *shapes, days=("2023-01-01", "2023-12-31"), crs=CRS) -> None:
        self._found = [(crs, shapely.union_all(shapes))]
        self.times = tuple(pd.Timestamp(day) for day in days)

    def reach(self):
        return self._found


def test_splits_leak_in_place_and_time():
    """Both must overlap."""
    a, b = shapely.box(0, 0, 100, 100), shapely.box(100, 0, 200, 100)
    rm.check_splits({"train": Reaching(a), "val": Reaching(b)})
    with pytest.raises(
        SplitLeakError, match=r"'train' and 'val' leak: .* area of 1,000 square units of EPSG:32633.*95"
    ):
        rm.check_splits({"train": Reaching(a), "val": Reaching(b.buffer(0), shapely.box(90, 0, 200, 100))})
    later = ("2024-01-01", "2024-12-31")
    rm.check_splits({"train": Reaching(a), "val": Reaching(a, days=later)})
    rm.check_splits({"train": Reaching(a), "val": Reaching(a, days=later)}, buffer=1000)
    with pytest.raises(SplitLeakError, match="leak"):
        rm.check_splits({"train": Reaching(a), "val": Reaching(a, days=("2023-12-31", "2024-12-31"))})
    with pytest.raises(SplitLeakError, match=r"are 0 apart .* less than the buffer of 5"):
        rm.check_splits({"train": Reaching(a), "val": Reaching(b)}, buffer=5)
    c = shapely.box(110, 0, 200, 100)
    rm.check_splits({"train": Reaching(a), "val": Reaching(c)}, buffer=10)
    with pytest.raises(SplitLeakError, match=r"are 10 apart at x, y = 105, "):
        rm.check_splits({"train": Reaching(a), "val": Reaching(c)}, buffer=10.1)


def test_tables_datasets_and_crss_can_be_compared():
    """A longitude/latitude polygon, a dataset, and a table with a column `split`."""
    field = gpd.GeoDataFrame(geometry=[shapely.box(400000, 5000000, 401000, 5001000)], crs=CRS)
    plane = Plane(shapely.box(400500, 5000000, 402000, 5001000))
    with pytest.raises(SplitLeakError, match="'a' and 'b'"):
        rm.check_splits({"a": field.to_crs(4326), "b": plane})
    with pytest.raises(SplitLeakError, match="about 5,000 pixels"):
        rm.check_splits({"a": plane, "b": field.to_crs(32634)})
    rm.check_splits({"a": field.to_crs(4326), "b": Plane(shapely.box(401001, 5000000, 402000, 5001000))})
    table = pd.concat([field, field.translate(500).to_frame("geometry")], ignore_index=True)
    with pytest.raises(SplitLeakError, match="500,000"):
        rm.check_splits(gpd.GeoDataFrame(table, crs=CRS).assign(split=["x", "y"]))
    rm.check_splits(gpd.GeoDataFrame(table, crs=CRS).assign(split=["x", None]))
    with pytest.raises(UsageError, match="Split 'b' must be a sampler"):
        rm.check_splits({"a": field, "b": 3})
    with pytest.raises(UsageError, match="no column 'split'"):
        rm.check_splits(field)


def test_samplers_leak_where_their_chips_overlap():
    """Chips centred in blocks extend past them, chips inside do not; pixels confirm the check."""
    plane = Plane(SQUARE)
    blocks = rm.split_blocks(plane, 2500, {"train": 0.5, "val": 0.5}, seed=1)
    own = {name: blocks[blocks["split"] == name] for name in ("train", "val")}
    inside = {name: rm.RandomAOISampler(plane, 32, 3000, part, placement="inside") for name, part in own.items()}
    rm.check_splits(inside)
    assert not (pixels_of(inside["train"]) & pixels_of(inside["val"])).any()
    centred = inside | {"val": rm.RandomAOISampler(plane, 32, 3000, own["val"], placement="centre")}
    assert (pixels_of(centred["train"]) & pixels_of(centred["val"])).any()
    with pytest.raises(SplitLeakError, match="placement='inside'"):
        rm.check_splits(centred)
    buffered = rm.split_blocks(plane, 2500, {"train": 0.5, "val": 0.5}, seed=1, buffer=330)
    own = {name: buffered[buffered["split"] == name] for name in ("train", "val")}
    centred = {name: rm.RandomAOISampler(plane, 32, 3000, part, placement="centre") for name, part in own.items()}
    rm.check_splits(centred)
    assert not (pixels_of(centred["train"]) & pixels_of(centred["val"])).any()


def test_the_error_can_be_pickled():
    """It consists of its message."""
    error = SplitLeakError("what, where, remedy")
    assert str(pickle.loads(pickle.dumps(error))) == "what, where, remedy"
    assert isinstance(error, ValueError)
