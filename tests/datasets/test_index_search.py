"""Search over an index against brute force; arrays and indexes that travel light."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from torchgeo.datasets import GeoDataset, roi_split

import rasteret_ml as rm
from rasteret_ml.datasets.index.scene_index import pack_index, unpack_index
from rasteret_ml.datasets.index.scene_table import dump_compressed, load_compressed
from rasteret_ml.datasets.index.search import SceneSearch
from rasteret_ml.errors import UsageError

BANDS = ("B02", "B03")


def _day(day: int | None, *, end: bool = False) -> pd.Timestamp:
    if day is None:
        return pd.Timestamp.max if end else pd.Timestamp.min
    return pd.Timestamp("2024-01-01") + pd.Timedelta(days=day)


def _shape(kind: str, x: int, y: int) -> shapely.Geometry:
    box = shapely.box(x, y, x + 4, y + 3)
    if kind == "box":
        return box
    if kind == "triangle":
        return shapely.Polygon([(x, y), (x + 4, y), (x, y + 4)])
    if kind == "bow":  # all its points at the corners of its bounds, but no rectangle
        return shapely.Polygon([(x, y), (x + 4, y + 3), (x + 4, y), (x, y)])
    if kind == "two":
        return shapely.MultiPolygon([shapely.box(x, y, x + 1, y + 1), shapely.box(x + 3, y + 2, x + 4, y + 3)])
    return box.difference(shapely.box(x + 1, y + 1, x + 2, y + 2))


SCENES = st.tuples(
    st.sampled_from(["box", "box", "triangle", "bow", "two", "hole"]),
    st.integers(-12, 12),
    st.integers(-12, 12),
    st.none() | st.integers(0, 5),
    st.integers(0, 3),
)


def _index(scenes: list[Any], order: list[int]) -> gpd.GeoDataFrame:
    days = [scenes[i][3] for i in order]
    left, right = pd.DatetimeIndex([_day(d) for d in days]), pd.DatetimeIndex([_day(d, end=True) for d in days])
    times = pd.IntervalIndex.from_arrays(left, right, closed="both", name="datetime")
    shapes = [_shape(*scenes[i][:3]) for i in order]
    return gpd.GeoDataFrame({"rid": [3 * i for i in order]}, geometry=shapes, crs="EPSG:32633", index=times)


class _Facts(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.rows)


def _by_hand(index: gpd.GeoDataFrame, scenes: list[Any], chip: Any, t: slice, turn: float | None) -> list[int]:
    chips = [shapely.affinity.translate(chip, k) for k in ((0,) if turn is None else (0, -turn, turn))]
    found = []
    for (rid, shape), left, right in zip(
        zip(index["rid"], index.geometry, strict=True), index.index.left, index.index.right, strict=True
    ):
        if left <= t.stop and right >= t.start and any(shape.intersection(c).area > 0 for c in chips):
            day = scenes[rid // 3][3]
            found.append((-np.inf if day is None else day, -scenes[rid // 3][4], -len(found), rid))
    ranked = [rid for *_, rid in sorted(found, reverse=True)][:: t.step or 1]
    return list(dict.fromkeys(ranked))


@examples(200)
@given(
    st.lists(SCENES, min_size=1, max_size=12),
    st.lists(st.integers(0, 11), max_size=14),
    st.tuples(st.integers(-13, 13), st.integers(-13, 13), st.sampled_from([1, 2, 5])),
    st.tuples(st.integers(-1, 6), st.integers(0, 3), st.sampled_from([None, 1, 2])),
    st.sampled_from([None, 24.0]),
)
def test_rows_are_those_a_loop_would_find(scenes: Any, order: Any, place: Any, time: Any, turn: Any) -> None:
    """Any index: rows left out, twice, in any order; any shape; touching is not enough; best first."""
    order = [i for i in order if i < len(scenes)] or list(range(len(scenes)))
    index = _index(scenes, order)
    facts = _Facts(rows=3 * np.arange(len(scenes)), id_ranks=np.array([s[4] for s in scenes], np.int32))
    x, y, size = place
    chip = shapely.box(x, y, x + size, y + size)
    t = slice(_day(time[0]), _day(time[0] + time[1]), time[2])
    found = SceneSearch(index, facts, turn).rows(chip, t).tolist()
    assert found == _by_hand(index, scenes, chip, t, turn)


def test_an_index_without_its_rows_is_refused() -> None:
    """With what to do."""
    index = _index([("box", 0, 0, 1, 0)], [0]).drop(columns="rid")
    with pytest.raises(UsageError, match="'rid'"):
        SceneSearch(index, _Facts(rows=np.arange(1), id_ranks=np.zeros(1, np.int32)), None)


def test_nanoseconds_count() -> None:
    """Two dates a nanosecond apart are in order, though as floats they are one."""
    index = _index([("box", 0, 0, 1, 0), ("box", 0, 0, 1, 1)], [0, 1])
    start = pd.Timestamp("2024-06-01").value
    times = pd.to_datetime([start + 1, start])
    index.index = pd.IntervalIndex.from_arrays(times, times, closed="both", name="datetime")
    facts = _Facts(rows=np.array([0, 3]), id_ranks=np.array([1, 0], np.int32))
    t = slice(pd.Timestamp("2024-01-01"), pd.Timestamp("2025-01-01"))
    assert SceneSearch(index, facts, None).rows(shapely.box(0, 0, 1, 1), t).tolist() == [0, 3]


def test_a_splitters_index_is_searched_anew(scenes: Any) -> None:
    """A dataset's chips come from the index that it has now, and its copies keep theirs."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    x, y = slice(500000.0 + 100, 500000.0 + 740), slice(4999000.0, 4999640.0)
    assert len(dataset.explain([(x, y)]).levels) == 2
    far = shapely.box(503100, 4997000, 506000, 5000000)
    near, other = roi_split(dataset, [shapely.box(500000, 4997000, 502900, 5000000), far])
    assert near[x, y]["record"].item() >= 0
    with pytest.raises(IndexError, match="No record"):
        other[x, y]
    assert dataset[x, y]["record"].item() >= 0
    dataset.index = other.index
    with pytest.raises(IndexError, match="No record"):
        dataset[x, y]


def test_span_is_torchgeos_bounds(scenes: Any) -> None:
    """Both ends of x, y and time, with the resolution as step."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    assert GeoDataset.bounds.fget(dataset) == dataset.bounds


ARRAYS = st.one_of(
    st.lists(st.floats(width=64), max_size=9).map(lambda v: np.array(v, np.float64)),
    st.lists(st.integers(-(2**31) - 5, 2**31 + 5), max_size=9).map(lambda v: np.array(v, np.float64)),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda v: np.array(v, np.int64)),
    st.tuples(st.integers(-9, 9), st.integers(-3, 3), st.integers(0, 9)).map(
        lambda v: (v[0] + v[1] * np.arange(v[2])).astype(np.int32)
    ),
    st.lists(st.integers(0, 2**62) | st.just(-(2**63)), max_size=9).map(
        lambda v: np.array(v, np.int64).view("datetime64[ns]")
    ),
    st.lists(st.sampled_from([0.0, -0.0, np.nan, np.inf, 7.0]), min_size=6, max_size=6).map(
        lambda v: np.array(v).reshape(3, 2)
    ),
    st.just(np.array(["a", "b"], dtype=object)),
    st.just(np.ones((4, 2), np.int32)),
    st.just(np.arange(3, dtype=np.uint8)),
)


@examples(300)
@given(ARRAYS)
def test_any_array_comes_back_bit_for_bit(array: Any) -> None:
    """Minus zero, NaN and NaT included."""
    found = load_compressed(pickle.loads(pickle.dumps(dump_compressed(array))))
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    if array.dtype == object:
        assert found.tolist() == array.tolist()
    else:
        assert found.tobytes() == array.tobytes()


@examples(60)
@given(st.lists(SCENES, min_size=1, max_size=8))
def test_any_index_comes_back(scenes: Any) -> None:
    """Geometries vertex by vertex, times, rows, CRS, the order of columns."""
    index = _index(scenes, list(range(len(scenes))))
    found = unpack_index(pickle.loads(pickle.dumps(pack_index(index))))
    assert shapely.equals_exact(found.geometry.to_numpy(), index.geometry.to_numpy()).all()
    assert found.crs == index.crs
    assert list(found.columns) == list(index.columns)
    pd.testing.assert_index_equal(found.index, index.index)
    assert found["rid"].tolist() == index["rid"].tolist()


def test_unusual_indexes_come_back_too() -> None:
    """Text columns, other names, no rows, no intervals: as they are."""
    index = _index([("box", 0, 0, 1, 0), ("hole", 1, 1, None, 1)], [0, 1])
    for other in (
        index.assign(name=["a", "b"]),
        index.rename_geometry("place"),
        index[["geometry", "rid"]],
        index.iloc[:0],
        index.reset_index(drop=True),
        index.set_crs(None, allow_override=True),
    ):
        found = unpack_index(pickle.loads(pickle.dumps(pack_index(other))))
        assert list(found.columns) == list(other.columns)
        assert found.geometry.name == other.geometry.name
        assert found.crs == other.crs
        assert len(found) == len(other)
        assert shapely.equals_exact(found.geometry.to_numpy(), other.geometry.to_numpy()).all()


def test_a_packed_index_of_boxes_is_small() -> None:
    """A box on whole metres and a date take under 26 bytes, not the 150 of plain WKB and objects."""
    count = 5000
    x = 500000.0 + 10 * np.random.default_rng(0).integers(0, 100000, count)
    times = pd.to_datetime(
        pd.Timestamp("2024-01-01").value + 10**9 * np.random.default_rng(1).integers(0, 10**7, count)
    )
    index = gpd.GeoDataFrame(
        {"rid": np.arange(count)},
        geometry=shapely.box(x, x + 1, x + 1000, x + 2000),
        crs="EPSG:32633",
        index=pd.IntervalIndex.from_arrays(times, times, closed="both", name="datetime"),
    )
    assert len(pickle.dumps(pack_index(index))) < 26 * count
    assert copy.deepcopy(unpack_index(pack_index(index))).equals(index)
