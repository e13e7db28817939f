"""How soon a loader yields its first batch, and the cost of datasets over very many records."""

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
from bench import SIZE, Bench, log
from readers import Row, as_json
from report import Section, middle, number, spread
from synthetic import ORIGIN, Synthetic

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.datasets.raster_dataset import RasteretDataset

_T = TypeVar("_T")
_MEMORY = "Each round is a fresh process; memory is the growth of its peak after all imports."


def startup(bench: Bench) -> list[Section]:
    """Measure the first batch, 100,000 records of 4 bands and 1,000,000 records of one band."""
    return [_first(bench), _hundred_thousand(bench), _million(bench)]


def _first(bench: Bench) -> Section:
    section = Section(
        "First batch, 30 ms",
        "Seconds from `iter(loader)` to the first batch in a fresh process (the limit: one batch, new connections).",
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

    figures = bench.paired(rows, measure)
    section.rows += [[row.label, spread(figures[row.label])] for row in rows]
    for row in rows[:2]:
        if "fork" in row.label:
            section.target(f"{row.label}, seconds", middle(figures[row.label]), 1.0, maximum=True)
    return section


def _hundred_thousand(bench: Bench) -> Section:
    made = Synthetic(records=int(bench.args.records), bands=4, side=11)
    log(f"writing a Collection of {made.records} records")
    start = time.perf_counter()
    path = made.write(bench.scratch / f"many_{made.records}.parquet")
    section = Section(
        f"{made.records:,} records x {made.bands} bands x {made.side**2} tiles",
        f"Parquet of {path.stat().st_size / 1e6:.0f} MB, written in {time.perf_counter() - start:.0f} s. {_MEMORY}",
        ["quantity", "value"],
    )
    runs = [trial.run("startup:open_many", {"path": str(path), "made": asdict(made)}) for _ in range(bench.rounds)]
    figures = {key: [run[key] for run in runs] for key in runs[0]}
    section.rows += [[key, spread(values)] for key, values in figures.items()]
    for key, target in (
        ("RasteretDataset(...), s", 3),
        ("peak memory with the dataset, MB", 300),
        ("planning a query for one date, ms", 1),
        ("pickle, MB", 20),
    ):
        section.target(key, middle(figures[key]), target, maximum=True)
    return section


def open_many(path: str, made: dict[str, Any]) -> dict[str, float]:
    """Trial: open a dataset over many records, plan queries, pickle it."""
    synthetic, figures = Synthetic(**made), {}
    names = [f"B{i + 1}" for i in range(synthetic.bands)]
    trial.reset_peak()
    before = trial.memory_now()["resident"]
    dataset, figures["RasteretDataset(...), s"] = _timed(lambda: RasteretDataset(path, names))
    figures["peak memory with the dataset, MB"] = trial.memory_now()["peak"] - before
    queries = [_query(synthetic, i, every_date=False) for i in range(400)]
    _, figures["first query, s"] = _timed(lambda: dataset.explain(queries[:1]))
    figures["peak memory after the first query, MB"] = trial.memory_now()["peak"] - before
    figures["planning a query for one date, ms"] = _plan_time(dataset, queries[1:201])
    figures["planning the same query again, ms"] = _plan_time(dataset, queries[1:201])
    all_dates = [_query(synthetic, i, every_date=True) for i in range(50)]
    figures["planning a query for all dates, ms"] = _plan_time(dataset, all_dates)
    figures["planning a batch of 16, ms"] = 1000 * _timed(lambda: dataset.explain(queries[201:217]))[1]
    figures["peak memory after planning, MB"] = trial.memory_now()["peak"] - before
    data, figures["pickling, s"] = _timed(lambda: pickle.dumps(dataset))
    figures["pickle, MB"] = len(data) / 1e6
    _, figures["unpickling, s"] = _timed(lambda: pickle.loads(data))
    return figures


def _plan_time(dataset: Any, queries: list[Any]) -> float:
    """Return the median time of planning a query, in milliseconds."""
    return 1000 * median(_timed(lambda query=query: dataset.explain([query]))[1] for query in queries)  # type: ignore[misc]


def _query(synthetic: Synthetic, seed: int, *, every_date: bool) -> tuple[slice, slice, slice]:
    """Return a query for a chip in a random record, on its date or on all dates."""
    rng = np.random.default_rng(seed)
    record = int(rng.integers(synthetic.records))
    row, column = divmod(record % synthetic.locations, synthetic.across)
    pixels = synthetic.pixels
    x = ORIGIN[0] + column * pixels + int(rng.integers(pixels - SIZE))
    y = ORIGIN[1] - row * pixels - int(rng.integers(SIZE, pixels))
    day = pd.Timestamp("2023-01-01") + pd.Timedelta(days=5 * (record // synthetic.locations))
    times = slice(pd.Timestamp("2023-01-01"), pd.Timestamp("2024-01-01")) if every_date else slice(day, day)
    return slice(x, x + SIZE, 1.0), slice(y, y + SIZE, 1.0), times


def _million(bench: Bench) -> Section:
    made = Synthetic(records=10 * int(bench.args.records), bands=1, side=2)
    log(f"writing a Collection of {made.records} records")
    path = made.write(bench.scratch / f"very_many_{made.records}.parquet")
    section = Section(
        f"{made.records:,} records x 1 band x {made.side**2} tiles",
        f"Parquet of {path.stat().st_size / 1e6:.0f} MB. {_MEMORY}",
        ["quantity", "value"],
    )
    figures = trial.run("startup:open_very_many", {"path": str(path), "made": asdict(made)})
    section.rows += [[key, number(value)] for key, value in figures.items()]
    section.target("peak memory, MB", figures["peak memory, MB"], 2048, maximum=True)
    return section


def open_very_many(path: str, made: dict[str, Any]) -> dict[str, float]:
    """Trial: open, filter and sample a very large Collection."""
    synthetic, figures = Synthetic(**made), {}
    trial.reset_peak()
    before = trial.memory_now()["resident"]
    collection, figures["Collection.open + len, s"] = _timed(lambda: _counted(Collection.open(path)))
    bounds = collection.bounds
    assert bounds is not None
    west, south, east, north = bounds
    box = (west, south, west + (east - west) / 10, south + (north - south) / 10)
    subset, figures["subset(bbox=) of 1 % of the area + len, s"] = _timed(lambda: _counted(collection.subset(bbox=box)))
    figures["records in the subset"] = len(subset)
    clear, figures["where(cloud cover < 10) + len, s"] = _timed(
        lambda: _counted(collection.where(pc.field("eo:cloud_cover") < 10))
    )
    figures["records with cloud cover < 10"] = len(clear)
    _, figures["RasteretDataset of the subset, s"] = _timed(lambda: RasteretDataset(subset, ["B1"]))
    figures["peak memory so far, MB"] = trial.memory_now()["peak"] - before
    dataset, figures["RasteretDataset of all records, s"] = _timed(lambda: RasteretDataset(collection, ["B1"]))
    sampler, figures["RandomAOISampler, s"] = _timed(lambda: rm.RandomAOISampler(dataset, SIZE, 1024))
    aois, figures["1024 AOIs, s"] = _timed(lambda: list(sampler))
    _, figures["first query, s"] = _timed(lambda: dataset.explain(aois[:1]))
    figures["planning a query for all dates, ms"] = _plan_time(dataset, aois[1:51])
    one_date = [_query(synthetic, i, every_date=False) for i in range(50)]
    figures["planning a query for one date, ms"] = _plan_time(dataset, one_date)
    figures["peak memory, MB"] = trial.memory_now()["peak"] - before
    return figures


def _counted(collection: Collection) -> Collection:
    """Return a Collection after counting its records."""
    len(collection)
    return collection


def _timed(call: Callable[[], _T]) -> tuple[_T, float]:
    """Call something; return its result and the seconds that it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start
