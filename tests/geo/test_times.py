"""Times as people write them: what names a day is all of it, everywhere alike; far future and past are open."""

from __future__ import annotations

import datetime as dt

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely

import rasteret_ml as rm
from rasteret_ml.collection.filters import parse_date_range
from rasteret_ml.datasets.index.search import parse_order, preference
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.times import clamp_ns, midpoint, parse_time, parse_windows

NS = "datetime64[ns]"


def named(at):
    return f"rows {at.tolist()}"


def frame(**columns):
    shapes = [shapely.box(i, 0, i + 1, 1) for i in range(len(next(iter(columns.values()))))]
    return gpd.GeoDataFrame(columns, geometry=shapes, crs="EPSG:32633")


@pytest.mark.parametrize(
    ("value", "first", "last"),
    [
        ("2023", "2023-01-01", "2023-12-31T23:59:59.999999"),
        ("2024-02", "2024-02-01", "2024-02-29T23:59:59.999999"),
        (" 2023-05-01 ", "2023-05-01", "2023-05-01T23:59:59.999999"),
        ("20230501", "2023-05-01", "2023-05-01T23:59:59.999999"),
        (dt.date(2023, 5, 1), "2023-05-01", "2023-05-01T23:59:59.999999"),
        (np.datetime64("2023-05"), "2023-05-01", "2023-05-31T23:59:59.999999"),
        (pd.Period("2023-05"), "2023-05-01", "2023-05-31T23:59:59.999999"),
        ("2023-05-01T10:30:00Z", "2023-05-01T10:30", "2023-05-01T10:30"),
        ("2023-05-01T10:30:00+02:00", "2023-05-01T08:30", "2023-05-01T08:30"),
        (dt.datetime(2023, 5, 1), "2023-05-01", "2023-05-01"),
        (pd.Timestamp("2023-05-01", tz="Europe/Berlin"), "2023-04-30T22:00", "2023-04-30T22:00"),
        (np.datetime64("2023-05-01T00:00:00"), "2023-05-01", "2023-05-01"),
        (None, None, None),
        ("..", None, None),
        (pd.NaT, None, None),
    ],
)
def test_what_a_value_names(value, first, last):
    """As a scalar, in a column of text or objects, as a date range and in the order of records: one rule."""
    wanted = tuple(None if text is None else pd.Timestamp(text) for text in (first, last))
    assert (parse_time(value), parse_time(value, last=True)) == wanted
    start, stop = parse_windows(pd.Series([value, "2000-01-01T00:00Z"], dtype=object), None, named)
    assert start[0] == np.datetime64(first, "ns") or (first is None and np.isnat(start[0]))
    assert stop[0] == np.datetime64(last, "ns") or (last is None and np.isnat(stop[0]))
    if first is not None:
        assert parse_date_range((value, value)) == (wanted[0].to_pydatetime(), wanted[1].to_pydatetime())
        assert abs(midpoint(value) - wanted[0] - (wanted[1] - wanted[0]) / 2) <= pd.Timedelta(1, "us")


@pytest.mark.parametrize(
    "value", ["soon", "now", "2023-13", "05/01/2023", "2023-W05", 2023, 20230501.0, True, b"2023", []]
)
def test_what_is_no_time(value):
    """Numbers could be years or seconds; other text could be anything."""
    with pytest.raises(UsageError, match="A time must be a date or time"):
        parse_time(value)
    with pytest.raises(UsageError, match=r"rows \[1\]"):
        parse_windows(pd.Series(["2023", value], dtype=object), None, named)


@pytest.mark.parametrize(
    "kind",
    [
        lambda texts: pd.Series(pd.Categorical(texts)),
        lambda texts: pd.Series(texts, dtype="string"),
        lambda texts: pd.Series(texts, dtype=pd.ArrowDtype(pa.string())),
        lambda texts: pd.Series([None if t is None else dt.date.fromisoformat(t) for t in texts], dtype=object),
        lambda texts: pd.Series(
            [None if t is None else dt.date.fromisoformat(t) for t in texts], dtype=pd.ArrowDtype(pa.date32())
        ),
        lambda texts: pd.Series(pd.Categorical([None if t is None else dt.date.fromisoformat(t) for t in texts])),
        lambda texts: pd.Series(pd.PeriodIndex(texts, freq="D")),
    ],
    ids=["categories", "string", "arrow", "dates", "arrow dates", "categories of dates", "periods"],
)
def test_columns_of_days(kind):
    """Whatever pandas calls them; categories of text ended at midnight."""
    first, last = kind(["2023-05-01", None, "0001-01-01"]), kind(["2023-05-02", None, "9999-12-31"])
    start, stop = parse_windows(first, last, named)
    assert start[0] == np.datetime64("2023-05-01", "ns")
    assert stop[0] == np.datetime64("2023-05-02T23:59:59.999999", "ns")
    assert np.isnat(start[1:]).all()
    assert np.isnat(stop[1:]).all()


def test_columns_of_instants_and_intervals():
    """Zones, units, nanoseconds, intervals, mixtures; an empty column and one without any value."""
    zoned = pd.Series(pd.to_datetime(["2023-03-01T01:00"]).tz_localize("Europe/Berlin"))
    assert parse_windows(zoned, None, named)[1][0] == np.datetime64("2023-03-01T00:00", "ns")
    exact = pd.Series(pd.to_datetime(["2023-03-01T01:00:00.123456789"]).as_unit("ns"))
    assert parse_windows(exact, None, named)[0][0] == np.datetime64("2023-03-01T01:00:00.123456789", "ns")
    far = pd.Series(np.array(["2023-03-01", "9999-12-31"], "datetime64[us]"))
    assert np.isnat(parse_windows(pd.Series(["2023", "2023"]), far, named)[1]).tolist() == [False, True]
    spans = pd.Series(pd.IntervalIndex.from_arrays(zoned.dt.tz_localize(None), exact), dtype=object)
    mixed = pd.concat([spans, pd.Series(["2023-05/2023-06", dt.date(2023, 7, 1), zoned[0]], dtype=object)])
    start, stop = parse_windows(mixed, None, named)
    assert start.astype("datetime64[D]").astype(str).tolist() == [
        "2023-03-01",
        "2023-05-01",
        "2023-07-01",
        "2023-03-01",
    ]
    assert stop.astype("datetime64[D]").astype(str).tolist() == ["2023-03-01", "2023-06-30", "2023-07-01", "2023-03-01"]
    for nothing in (pd.Series([], dtype=object), pd.Series([np.nan, np.nan]), pd.Series([None], dtype="string")):
        start, stop = parse_windows(nothing, None, named)
        assert start.dtype == stop.dtype == NS
        assert len(start) == len(nothing)
        assert np.isnat(start).all()


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        (["2023", "9999-12-31"], None, r"rows \[1\] must be within 1677-09-21 to 2262-04-11"),
        (["2023", "1500"], ["2024", "1600"], r"rows \[1\] must be within"),
        ([2023, 2024], None, r"rows \[0, 1\] must be .*a number could be"),
        (["2023-05-02", "2023"], ["2023-05-01", "2023"], r"rows \[0\] end before they start"),
        (["a/b", "2023"], None, r"rows \[0\] must be ISO"),
    ],
)
def test_windows_that_cannot_be(first, last, text):
    """Named by row; what lies wholly beyond nanoseconds is refused, not moved."""
    with pytest.raises(UsageError, match=text):
        parse_windows(pd.Series(first), None if last is None else pd.Series(last), named)


def test_nearest_to_a_day_is_within_it():
    """Eleven in the evening before is nearer to midnight, and yet of another day."""
    stamps = pd.to_datetime(["2023-05-03T23:00", "2023-05-04T11:00", "2023-05-04T20:00", "2023-05-05T01:00"])
    times = stamps.as_unit("ns").to_numpy().astype(np.int64)
    sort = preference(parse_order("2023-05-04"), times, np.zeros(4), np.arange(4))
    assert sort(np.arange(4), 0, 0).tolist() == [1, 2, 3, 0]  # as far away: the newest
    sort = preference(parse_order(dt.datetime(2023, 5, 4)), times, np.zeros(4), np.arange(4))
    assert sort(np.arange(4), 0, 0).tolist() == [0, 1, 2, 3]


def test_open_and_far_ends_everywhere():
    """AOI tables, painted polygons, times of interest, ranges of dates and splits take "9999-12-31" for open."""
    table = frame(a=["2023-01-01", "0001-01-01"], b=["9999-12-31", "2023-06"])
    windows = rm.AOITable.of(table, time=("a", "b"))
    assert np.isnat(windows.start).tolist() == [False, True]
    assert np.isnat(windows.stop).tolist() == [True, False]
    index = rm.PolygonDataset(table, time=("a", "b"), res=1.0).index.index
    assert index.right[0] == pd.Timestamp.max
    assert index.left[1] == pd.Timestamp.min
    assert parse_time("9999-12-31", last=True) == pd.Timestamp.max == clamp_ns(dt.datetime(9999, 12, 31))
    assert parse_time("9999-12-31T23:00:00-05:00", last=True) == pd.Timestamp.max
    with pytest.raises(UsageError, match="must be within 1677"):
        parse_time("9999-12-31")
    assert parse_date_range("../2023") == (dt.datetime.min, dt.datetime(2023, 12, 31, 23, 59, 59, 999999))
    assert parse_date_range(("2023", None))[1] == dt.datetime.max


def test_painted_polygons_take_days_and_intervals():
    """As AOI tables do; a chip of another hour of the day finds the polygon, and one of a far future does not fail."""
    table = frame(day=pd.Categorical(["2021-05-27", "2021-05-28"]), span=["2021-05", "2021-06-01/.."])
    of_days = rm.PolygonDataset(table, time="day", res=1.0)
    morning = slice(pd.Timestamp("2021-05-27T10:30"), pd.Timestamp("2021-05-27T10:30"))
    assert of_days[0:2, 0:1, morning]["mask_valid"].tolist() == [[[True, False]]]
    of_spans = rm.PolygonDataset(table, time="span", res=1.0)
    assert of_spans[0:2, 0:1, morning]["mask_valid"].tolist() == [[[True, False]]]
    late = slice(pd.Timestamp("2030-01-01"), pd.Timestamp("9999-12-31").as_unit("us"))
    assert of_spans[0:2, 0:1, late]["mask_valid"].tolist() == [[[False, True]]]
    with pytest.raises(UsageError, match=r"polygons \[1\] must be ISO"):
        rm.PolygonDataset(frame(when=["2021", "then"]), time="when")
