"""How soon a loader gives its first batch, and what an index of very many records costs."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import trial
from bench import SIZE, Bench, say
from readers import Row, as_json
from report import Section, middle, number, spread
from synthetic import ORIGIN, Synthetic

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.datasets.raster_dataset import RasteretDataset

_T = TypeVar("_T")
_MEMORY = "A fresh process each time; memory is the growth of its peak over what it held with everything imported."


def startup(bench: Bench) -> list[Section]:
    """First batch; 100,000 records of 4 bands; 1,000,000 records of one."""
    return [_first(bench), _hundred_thousand(bench), _million(bench)]


def _first(bench: Bench) -> Section:
    section = Section(
        "First batch, 30 ms",
        "Seconds from `iter(loader)` to the first batch, nothing read before (the limit: one batch, new connections).",
        ["loader", "seconds"],
    )
    rows = [
        Row(label="2 fork workers, no lookahead", reader="ours", options={"workers": 2}),
        Row(label="2 fork workers, lookahead", reader="ours", options={"workers": 2, "lookahead": True}),
        Row(label="0 workers, lookahead", reader="ours", options={"lookahead": True}),
        Row(
            label="2 spawned workers, lookahead",
            reader="ours",
            options={"workers": 2, "lookahead": True, "start": "spawn"},
        ),
        Row(label="limit, one process", reader="limit"),
    ]
    rows = bench.available(rows, section)
    work = as_json(bench.work(30, bench.batch * 8))

    def measure(row: Row) -> float:
        if row.reader == "limit":
            plan = bench.requests(1)
            times = trial.run(
                "limit:limit_times", {"base": bench.base(30), "batches": plan, "processes": 1, "ahead": 1}
            )
            return float(times[0])
        return float(trial.run("readers:first_batch", {"work": work, "options": row.options}))

    found = bench.paired(rows, measure)
    section.rows += [[row.label, spread(found[row.label])] for row in rows]
    for row in rows[:2]:
        if "fork" in row.label:
            section.target(f"{row.label}, seconds", middle(found[row.label]), 1.0, most=True)
    return section


def _hundred_thousand(bench: Bench) -> Section:
    made = Synthetic(records=int(bench.args.records), bands=4, side=11)
    say(f"writing a Collection of {made.records} records")
    began = time.perf_counter()
    path = made.write(bench.scratch / f"many_{made.records}.parquet")
    section = Section(
        f"{made.records:,} records x {made.bands} bands x {made.side**2} tiles",
        f"Parquet of {path.stat().st_size / 1e6:.0f} MB, written in {time.perf_counter() - began:.0f} s. {_MEMORY}",
        ["what", "figure"],
    )
    runs = [trial.run("startup:open_many", {"path": str(path), "made": asdict(made)}) for _ in range(bench.rounds)]
    found = {key: [run[key] for run in runs] for key in runs[0]}
    section.rows += [[key, spread(values)] for key, values in found.items()]
    for key, wanted in (
        ("RasteretDataset(...), s", 3),
        ("peak memory of it, MB", 300),
        ("planning a query of one date, ms", 1),
        ("pickle, MB", 20),
    ):
        section.target(key, middle(found[key]), wanted, most=True)
    return section


def open_many(path: str, made: dict[str, Any]) -> dict[str, float]:
    """Trial: a dataset over many records, its first and its usual query, its pickle."""
    of, found = Synthetic(**made), {}
    names = [f"B{i + 1}" for i in range(of.bands)]
    trial.forget_peak()
    before = trial.memory_now()["resident"]
    dataset, found["RasteretDataset(...), s"] = _timed(lambda: RasteretDataset(path, names))
    found["peak memory of it, MB"] = trial.memory_now()["peak"] - before
    queries = [_query(of, i, every_date=False) for i in range(400)]
    _, found["first query, s"] = _timed(lambda: dataset.explain(queries[:1]))
    found["peak memory with it, MB"] = trial.memory_now()["peak"] - before
    found["planning a query of one date, ms"] = _usual(dataset, queries[1:201])
    found["the same, of a record that was read before, ms"] = _usual(dataset, queries[1:201])
    found["planning a query of all dates, ms"] = _usual(dataset, [_query(of, i, every_date=True) for i in range(50)])
    found["planning a batch of 16, ms"] = 1000 * _timed(lambda: dataset.explain(queries[201:217]))[1]
    found["peak memory with all of these, MB"] = trial.memory_now()["peak"] - before
    data, found["pickling, s"] = _timed(lambda: pickle.dumps(dataset))
    found["pickle, MB"] = len(data) / 1e6
    _, found["unpickling, s"] = _timed(lambda: pickle.loads(data))
    return found


def _usual(dataset: Any, queries: list[Any]) -> float:
    """Milliseconds that planning a query takes, median."""
    return 1000 * median(_timed(lambda query=query: dataset.explain([query]))[1] for query in queries)  # type: ignore[misc]


def _query(of: Synthetic, number: int, *, every_date: bool) -> tuple[slice, slice, slice]:
    """A chip in a random record's place."""
    rng = np.random.default_rng(number)
    record = int(rng.integers(of.records))
    place = record % of.places
    x = ORIGIN[0] + place % of.across * of.pixels + int(rng.integers(of.pixels - SIZE))
    y = ORIGIN[1] - place // of.across * of.pixels - int(rng.integers(SIZE, of.pixels))
    day = pd.Timestamp("2023-01-01") + pd.Timedelta(days=5 * (record // of.places))
    times = slice(pd.Timestamp("2023-01-01"), pd.Timestamp("2024-01-01")) if every_date else slice(day, day)
    return slice(x, x + SIZE, 1.0), slice(y, y + SIZE, 1.0), times


def _million(bench: Bench) -> Section:
    made = Synthetic(records=10 * int(bench.args.records), bands=1, side=2)
    say(f"writing a Collection of {made.records} records")
    path = made.write(bench.scratch / f"very_many_{made.records}.parquet")
    section = Section(
        f"{made.records:,} records x 1 band x {made.side**2} tiles",
        f"Parquet of {path.stat().st_size / 1e6:.0f} MB. {_MEMORY}",
        ["what", "figure"],
    )
    found = trial.run("startup:open_very_many", {"path": str(path), "made": asdict(made)})
    section.rows += [[key, number(value)] for key, value in found.items()]
    section.target("peak memory, MB", found["peak memory, MB"], 2048, most=True)
    return section


def open_very_many(path: str, made: dict[str, Any]) -> dict[str, float]:
    """Trial: open, filter and sample a very large Collection."""
    of, found = Synthetic(**made), {}
    trial.forget_peak()
    before = trial.memory_now()["resident"]
    collection, found["Collection.open + len, s"] = _timed(lambda: _opened(path))
    bounds = collection.bounds
    assert bounds is not None
    west, south, east, north = bounds
    part = (west, south, west + (east - west) / 10, south + (north - south) / 10)
    few, found["subset(bbox=) of a hundredth + len, s"] = _timed(lambda: _counted(collection.subset(bbox=part)))
    found["records in it"] = len(few)
    clear, found["where(cloud cover < 10) + len, s"] = _timed(
        lambda: _counted(collection.where(pc.field("eo:cloud_cover") < 10))
    )
    found["records that are clear"] = len(clear)
    _, found["RasteretDataset of the hundredth, s"] = _timed(lambda: RasteretDataset(few, ["B1"]))
    found["peak memory so far, MB"] = trial.memory_now()["peak"] - before
    dataset, found["RasteretDataset of all, s"] = _timed(lambda: RasteretDataset(collection, ["B1"]))
    sampler, found["RandomAOISampler, s"] = _timed(lambda: rm.RandomAOISampler(dataset, SIZE, 1024))
    aois, found["1024 AOIs, s"] = _timed(lambda: list(sampler))
    _, found["first query, s"] = _timed(lambda: dataset.explain(aois[:1]))
    found["planning a query, ms"] = _usual(dataset, aois[1:51])
    found["planning a query of one date, ms"] = _usual(dataset, [_query(of, i, every_date=False) for i in range(50)])
    found["peak memory, MB"] = trial.memory_now()["peak"] - before
    return found


def _opened(path: str) -> Collection:
    return _counted(Collection.open(path))


def _counted(collection: Collection) -> Collection:
    len(collection)
    return collection


def _timed(work: Callable[[], _T]) -> tuple[_T, float]:
    began = time.perf_counter()
    answer = work()
    return answer, time.perf_counter() - began
