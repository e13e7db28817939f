"""Which dates a series takes, and which record is preferred: against the plain way."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.datasets.index.dates import TimeSeries, choose_dates
from rasteret_ml.datasets.index.search import parse_order, preference
from rasteret_ml.errors import NoOverlapError, UsageError

HOUR = 3_600_000_000_000
DAY = 24 * HOUR


def at(*texts: str) -> np.ndarray:
    """Times as the Collection holds them."""
    return np.array(texts, "datetime64[ns]")


def clouds(*values: float) -> np.ndarray:
    """Percentages."""
    return np.array(values, np.float32)


moments = st.lists(st.integers(0, 40 * 24), min_size=1, max_size=25).map(
    lambda hours: np.array(hours, np.int64) * HOUR + pd.Timestamp("2021-01-15").value
)


@examples(100)
@given(moments, st.integers(1, 8), st.sampled_from(["latest", "earliest", "even", "clearest", "random"]))
def test_dates_are_days_each_once_ascending_and_never_more_than_asked_for(stamps, length, choose):
    """Every record of a chosen day is in it, in the order given; days are those of pandas."""
    times = stamps.astype("datetime64[ns]")
    cover = np.linspace(0, 100, len(times)).astype(np.float32)
    groups = choose_dates(TimeSeries(length=length, choose=choose), times, cover)
    days = pd.DatetimeIndex(times).floor("D")
    assert len(groups) == min(length, len(set(days)))
    found = [days[group[0]] for group in groups]
    assert found == sorted(set(found))
    for group, day in zip(groups, found, strict=True):
        assert group.tolist() == np.flatnonzero(days == day).tolist()
    ordered = sorted(set(days))
    if choose == "latest":
        assert found == ordered[-length:]
    if choose == "earliest":
        assert found == ordered[:length]
    if choose == "even" and length > 1:
        assert {found[0], found[-1]} == {ordered[0], ordered[-1]}
    if choose == "clearest":
        mean = {day: cover[days == day].mean() for day in ordered}
        assert max(mean[day] for day in found) <= min([mean[d] for d in ordered if d not in found], default=101)


@examples(60)
@given(moments, st.integers(1, 30))
def test_a_duration_groups_what_follows_within_it(stamps, hours):
    """As a walk through the sorted times says."""
    times = stamps.astype("datetime64[ns]")
    groups = choose_dates(TimeSeries(group=f"{hours}h"), times, np.zeros(len(times)))
    expected, last = [], None
    for i in sorted(range(len(stamps)), key=lambda i: stamps[i]):
        if last is None or stamps[i] - last > hours * HOUR:
            expected.append(set())
        expected[-1].add(i)
        last = stamps[i]
    assert [set(group.tolist()) for group in groups] == expected


def test_instants_and_passes_over_midnight():
    """One pass over midnight UTC is two days, one 6-hour group, two instants."""
    times = at("2021-06-01T23:59:50", "2021-06-02T00:00:05")
    for group, count in (("day", 2), ("6h", 1), ("instant", 2)):
        assert len(choose_dates(TimeSeries(group=group), times, clouds(0, 0))) == count


def test_months_clouds_and_too_few_dates():
    """Filters come before the choice; what is unknown is not clear; too few dates are said."""
    times = at("2021-01-05", "2021-06-05", "2021-07-05", "2022-06-05")
    cover = clouds(0, 50, np.nan, 10)
    only = TimeSeries(months=(6, 7))
    assert [g.tolist() for g in choose_dates(only, times, cover)] == [[1], [2], [3]]
    assert [g.tolist() for g in choose_dates(TimeSeries(max_cloud=20), times, cover)] == [[0], [3]]
    with pytest.raises(NoOverlapError, match="min_dates=3"):
        choose_dates(TimeSeries(max_cloud=20, min_dates=3), times, cover)


def test_random_dates_depend_on_seed_epoch_and_position_alone():
    """And are drawn evenly."""
    times = at(*(f"2021-01-{day:02d}" for day in range(1, 11)))
    series = TimeSeries(length=3, choose="random")

    def draw(*key: int) -> tuple[int, ...]:
        return tuple(int(g[0]) for g in choose_dates(series, times, np.zeros(10), key))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, p) for p in range(50)}) > 20
    assert draw(1, 2, 3) != draw(2, 2, 3) or draw(1, 3, 3) != draw(1, 2, 3)
    counts = np.bincount([day for p in range(1000) for day in draw(0, 0, p)], minlength=10)
    assert ((counts - 300) ** 2 / (300 * 0.7)).sum() < 27.9  # chi-squared with 9 degrees, p = 0.001


@pytest.mark.parametrize(
    "wrong",
    [{"length": 0}, {"months": (13,)}, {"choose": "best"}, {"group": "fortnight"}, {"min_dates": 5, "length": 3}],
)
def test_series_that_cannot_be(wrong):
    """Refused when they are made."""
    with pytest.raises(UsageError):
        TimeSeries(**wrong)


def test_series_from_yaml():
    """A number, a mapping with lists, or itself."""
    assert TimeSeries.of(6) == TimeSeries(length=6)
    assert TimeSeries.of({"length": 4, "months": [5, 6]}) == TimeSeries(length=4, months=(5, 6))
    with pytest.raises(UsageError, match="lenght"):
        TimeSeries.of({"lenght": 4})


@examples(80)
@given(st.data())
def test_orders_are_those_of_a_plain_sort(data):
    """Newest, oldest, clearest, nearest: each against Python's sort by the stated keys."""
    count = data.draw(st.integers(1, 12))
    times = np.array(data.draw(st.lists(st.integers(0, 30), min_size=count, max_size=count))) * DAY
    undated = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    times[undated] = np.iinfo(np.int64).min
    cover = np.array(data.draw(st.lists(st.sampled_from([0.0, 20.0, np.nan]), min_size=count, max_size=count)))
    ids = np.array(data.draw(st.permutations(range(count))))
    found = np.arange(count)
    start, stop = 4 * DAY, 20 * DAY

    def newest(i):
        return (undated[i], 0 if undated[i] else -times[i], ids[i])

    keys = {
        "newest": newest,
        "oldest": lambda i: (undated[i], 0 if undated[i] else times[i], ids[i]),
        "clearest": lambda i: (np.isnan(cover[i]), 0 if np.isnan(cover[i]) else cover[i], *newest(i)),
        "nearest": lambda i: (undated[i], 0 if undated[i] else abs(times[i] - 12 * DAY), *newest(i)),
        "1970-01-09": lambda i: (undated[i], 0 if undated[i] else abs(times[i] - 8 * DAY - DAY // 2), *newest(i)),
        "1970-01-09T00:00": lambda i: (undated[i], 0 if undated[i] else abs(times[i] - 8 * DAY), *newest(i)),
    }
    for order, key in keys.items():
        sort = preference(parse_order(order), times, cover, ids)
        assert sort(found, start, stop).tolist() == sorted(range(count), key=key), order


def test_an_order_that_is_none():
    """Names those that are."""
    with pytest.raises(UsageError, match="newest, oldest"):
        parse_order("best")
    assert parse_order("2021-05-01T00:00:00Z") == pd.Timestamp("2021-05-01")
