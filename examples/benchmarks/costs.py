"""The cost of reading: requests and bytes, memory over time, headers, a time series."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import trial
from bench import SIZE, Bench, dataset_of, log
from limit import Chip, TileIndex
from rasterio.windows import Window
from readers import Row, Work, as_json, ours_loader
from report import Section, middle, number, spread
from scenes import BANDS, HEADER_FILES, ORIGIN, RES, TILE

import rasteret_ml as rm


def requests(bench: Bench) -> list[Section]:
    """Compare requests and bytes of an epoch: counted by nginx, predicted by `explain`, and of the tiles alone."""
    count = int(bench.args.batches)
    chips = count * bench.batch
    section = Section(
        "Requests and bytes",
        f"An epoch of {chips} chips at 0 ms, counted by nginx.",
        ["reader", "requests per chip", "bytes / bytes of tiles"],
    )
    rows = [
        Row(label="ours, 0 workers", reader="ours"),
        Row(label="ours, lookahead, 0 workers", reader="ours", options={"lookahead": True}),
        Row(label="ours, lookahead, 2 workers", reader="ours", options={"lookahead": True, "workers": 2}),
        Row(label="rasterio, 16 threads", reader="rasterio", options={"threads": 16}),
        Row(label="torchgeo, 0 workers", reader="torchgeo"),
        Row(label="async-geotiff", reader="async-geotiff"),
    ]
    rows = bench.available(rows, section)
    work = replace(bench.work(0, chips), epoch=chips)
    dataset = dataset_of(work.collection, BANDS)
    aois = list(rm.RandomAOISampler(dataset, SIZE, chips, seed=work.seed))
    plans = [dataset.explain(aois[i : i + bench.batch]) for i in range(0, chips, bench.batch)]
    predicted = sum(p.requests for p in plans), sum(p.bytes_fetched for p in plans)
    tiles = sum(n for batch in bench.requests(count) for request in batch for _, n in request.tiles)
    for row in rows:
        before = bench.server.served()
        task = {"work": as_json(work), "reader": row.reader, "options": row.options, "batches": count}
        trial.run("readers:read_times", task, env=row.env)
        served = bench.server.served() - before
        section.rows.append([row.label, number(served.requests / chips), f"{served.body_bytes / tiles:.4f}"])
        if row.reader == "ours":
            counted = (served.requests, served.body_bytes)
            ahead = bool(row.options.get("lookahead"))  # batches that are read at the same time share tiles
            met = all(c <= p for c, p in zip(counted, predicted, strict=True)) if ahead else counted == predicted
            section.notes.append(
                f"{'met' if met else '**missed**'}: {row.label}: explain() of each batch predicts {predicted[0]:,} "
                f"requests and {predicted[1]:,} bytes, nginx counts {served.requests:,} and {served.body_bytes:,}"
                + (" (batches read at the same time share tiles)" if ahead else "")
            )
            section.target(f"{row.label}: bytes / bytes of tiles", served.body_bytes / tiles, 1.05, maximum=True)
    return [section]


def memory(bench: Bench) -> list[Section]:
    """Measure the memory of a worker over a long epoch."""
    total = int(bench.args.memory_batches)
    marks = sorted({max(1, total * share // 20) for share in (1, 2, 5, 10, 15, 20)})
    section = Section(
        "Memory of a worker",
        "One forked worker at 0 ms, MB: resident (with shared batches) / private.",
        ["loader", *(f"batch {mark}" for mark in marks)],
    )
    cache = bench.args.cache_mb * 2**20
    ahead = {"workers": 1, "lookahead": True}
    rows = [
        Row(label="lookahead", reader="ours", options=ahead),
        Row(
            label="lookahead, cache and locality",
            reader="ours",
            options={**ahead, "cache_bytes": cache, "locality": bench.locality},
        ),
    ]
    work = replace(bench.work(0, bench.batch), epoch=(total + 64) * bench.batch)
    for row in bench.available(rows, section):
        found = trial.run("costs:worker_memory", {"work": as_json(work), "options": row.options, "marks": marks})
        cells = [f"{number(m['resident'])} / {number(m['private'])}" for m in found]
        section.rows.append([row.label, *cells])
        growth = found[-1]["private"] - found[0]["private"]
        section.target(f"{row.label}: growth of private memory, MB", growth, 0.05 * found[0]["private"], maximum=True)
    return [section]


def worker_memory(work: dict[str, Any], options: dict[str, Any], marks: Sequence[int]) -> list[dict[str, float]]:
    """Trial: return the worker's memory at the arrival of each of the batches `marks`."""
    found = []
    for i, _ in enumerate(ours_loader(Work(**work), options), 1):
        if i in marks:
            children = [trial.memory_now(child.pid or 0) for child in multiprocessing.active_children()]
            found.append(max(children, key=lambda memory: memory["resident"]))
            log(f"  batch {i}: {found[-1]}")
        if i == max(marks):
            break
    return found


def headers(bench: Bench) -> list[Section]:
    """Measure how many headers are read per second at 30 ms."""
    count = int(bench.args.headers)
    section = Section(
        "Header building, 30 ms",
        f"Files per second: {count} URLs of COGs of 10,980 x 10,980 pixels with overviews.",
        ["reader", "files/s"],
    )
    urls = [f"{bench.base(30)}/many/S_{i:05d}_{i % HEADER_FILES}.tif" for i in range(count)]
    out = bench.scratch / "headers.parquet"
    ours, theirs = "rasteret_ml.build", "rasterio.open, 16 threads"
    rows = [Row(label=ours, reader="build"), Row(label=theirs, reader="open")]
    few = [url.replace("/30/", "/0/") for url in urls[: 2 * HEADER_FILES]]
    built = trial.run("costs:build_headers", {"urls": few, "out": str(out)})["headers"]
    opened = trial.run("costs:open_headers", {"urls": few, "threads": 16}, env=rows[1].env)["headers"]
    if built != opened:
        raise SystemExit(f"build must read the same headers as rasterio: {opened[0]}, got {built[0]}.")

    counted: list[int] = []

    def measure(row: Row) -> float:
        if row.reader == "build":
            before = bench.server.served()
            result = trial.run("costs:build_headers", {"urls": urls, "out": str(out)})
            counted.append((bench.server.served() - before).requests)
        else:
            result = trial.run("costs:open_headers", {"urls": urls, "threads": 16}, env=row.env)
        return count / float(result["seconds"])

    found = bench.paired(rows, measure)
    section.rows += [[row.label, spread(found[row.label])] for row in rows]
    section.notes.append(f"requests per file of build: {number(middle(counted) / count)}")
    section.target("files/s", middle(found[ours]), 250)
    section.target("ratio to rasterio.open", middle(found[ours]) / middle(found[theirs]), 4)
    return [section]


def build_headers(urls: list[str], out: str) -> dict[str, Any]:
    """Trial: return the seconds that `build` takes and the headers it read."""
    import rasteret_ml.collection.build.build  # noqa: F401 - imports are not timed

    Path(out).unlink(missing_ok=True)
    start = time.perf_counter()
    collection = rm.build(urls, out, progress=False)
    seconds = time.perf_counter() - start
    if len(collection) != len(urls):
        raise ValueError(f"build must make {len(urls)} records, got {len(collection)}.")
    found = [
        [m["image_width"], m["image_height"], m["transform"], m["tile_width"], len(m["overviews"])]
        for m in collection.to_table(["B1_metadata"])["B1_metadata"].to_pylist()
    ]
    return {"seconds": seconds, "headers": sorted(found)}


def open_headers(urls: list[str], threads: int) -> dict[str, Any]:
    """Trial: return the same with rasterio."""

    def read(url: str) -> list[Any]:
        with rasterio.open(f"/vsicurl/{url}") as file:
            t = file.transform
            return [file.width, file.height, [t.a, t.c, t.e, t.f], file.block_shapes[0][1], len(file.overviews(1))]

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(read, urls))
    return {"seconds": time.perf_counter() - start, "headers": sorted(found)}


def series(bench: Bench) -> list[Section]:
    """Measure the first batch of two series of many dates and one band at 30 ms, with new connections."""
    dates = int(bench.args.dates)
    section = Section(
        "Time series, 30 ms",
        f"Seconds to the first batch `[2, T, 1, 256, 256]` of a dataset with `series=` in a fresh process: 2 "
        f"locations, {dates} dates, 1 band.",
        ["reader", "seconds"],
    )
    size = min(bench.layout.size, 4 * TILE)
    rng = np.random.default_rng(bench.args.seed)
    corners = rng.integers(0, size - SIZE, (2, 2)).tolist()
    names = [bench.layout.series_name(date) for date in range(dates)]
    chips = [Chip((name,), *corner) for corner in corners for name in names]
    plan = TileIndex(str(bench.folder), SIZE).requests(chips)
    expected = _digest([_read_with_rasterio(bench.folder / chip.files[0], chip) for chip in chips])
    collection = bench.collection(30, "series")

    def ours(_: Row) -> float:
        seconds, digest = trial.run("costs:first_series", {"collection": collection, "corners": corners})
        if digest != expected:
            raise SystemExit("The pixels of the time series must equal GDAL's.")
        return float(seconds)

    def limit(row: Row) -> float:
        arguments = {"base": bench.base(30), "batches": [plan], "processes": 1, "ahead": 1}
        return float(trial.run("limit:limit_times", arguments)[0])

    rows = [Row(label="ours", reader="ours"), Row(label="limit", reader="limit")]
    found = bench.paired(rows, lambda row: ours(row) if row.reader == "ours" else limit(row))
    section.rows += [[row.label, spread(found[row.label])] for row in rows]
    section.target("ratio to the limit", middle(found["ours"]) / middle(found["limit"]), 1.3, maximum=True)
    return [section]


def first_series(collection: str, corners: list[list[int]]) -> tuple[float, str]:
    """Trial: return the seconds to the first batch of a new dataset and the digest of its pixels."""
    dataset = rm.RasteretDataset(collection, ["B1"], series=rm.TimeSeries())
    _, _, t = dataset.bounds
    queries = []
    for row, col in corners:
        left, top, side = ORIGIN[0] + col * RES, ORIGIN[1] - row * RES, SIZE * RES
        queries.append((slice(left, left + side, RES), slice(top - side, top, RES), t))
    start = time.perf_counter()
    batch = rm.collate(dataset.__getitems__(queries))
    seconds = time.perf_counter() - start
    return seconds, _digest(list(batch["image"].flatten(0, 2).numpy()))


def _read_with_rasterio(path: Path, chip: Chip) -> Any:
    with rasterio.open(path) as file:
        return file.read(1, window=Window(chip.col, chip.row, SIZE, SIZE))


def _digest(chips: Sequence[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.stack(chips), np.uint16).tobytes()).hexdigest()
