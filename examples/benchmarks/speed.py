"""Chips per second: over HTTP with several latencies, from disk, and with several numbers of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench import Bench, log
from readers import Row
from report import Section, middle, number, spread

TORCHGEO = "torchgeo, 2 workers (spawn)"
LOOKAHEAD_ROW = "ours, lookahead, 2 workers"
PLAIN_ROW = "ours, no lookahead, 2 workers"
_LONGER = 2
"""Factor on the number of timed batches where numbers of workers are compared, whose ratios are close to 1."""
LIMITS = (
    Row(label="limit, one process", reader="limit", options={"processes": 1}),
    Row(label="limit, two processes", reader="limit", options={"processes": 2}),
)


def remote_rows(cache_mb: int, locality: object) -> list[Row]:
    """Return the rows of the latency table."""
    cached = {"workers": 2, "lookahead": True, "cache_bytes": cache_mb * 2**20, "locality": locality}
    return [
        Row(label="torchgeo, 0 workers", reader="torchgeo", slow=True),
        Row(label=TORCHGEO, reader="torchgeo", options={"workers": 2}, slow=True),
        Row(label=f"{TORCHGEO}, cache", reader="torchgeo", options={"workers": 2}, slow=True, gdal_cache=cache_mb),
        Row(label="rasterio, 16 threads", reader="rasterio", options={"threads": 16}),
        Row(label="async-geotiff", reader="async-geotiff"),
        Row(label=PLAIN_ROW, reader="ours", options={"workers": 2}),
        Row(label=LOOKAHEAD_ROW, reader="ours", options={"workers": 2, "lookahead": True}),
        Row(label="ours, lookahead, cache and locality, 2 workers (other chips)", reader="ours", options=cached),
        *LIMITS,
    ]


def best_limit(rates: Mapping[str, Sequence[float]]) -> float:
    """Return the larger of the two limits' medians; NaN if neither was measured."""
    return max((middle(rates[row.label]) for row in LIMITS if rates[row.label]), default=float("nan"))


def ours_in(rates: Mapping[str, Sequence[float]]) -> str:
    """Return the label of the library's fastest measured row without a cache."""
    return LOOKAHEAD_ROW if rates.get(LOOKAHEAD_ROW) else PLAIN_ROW


def method(bench: Bench, longer: int = 1, *, torchgeo: bool = False) -> str:
    """Describe how rates are measured, for the introduction of a table."""
    args, layout = bench.args, bench.layout
    batches = f"{args.batches * longer} batches"
    if torchgeo:
        batches += f" (torchgeo: {args.slow_batches}, half of that at 100 ms)"
    return (
        f"Chips per second, median (minimum to maximum) of {bench.rounds} rounds, over {batches} after the first "
        f"{args.warm}, with more batches queued so that no pipeline runs empty. {layout.scenes} scenes of 4 bands, "
        f"{layout.size} x {layout.size} pixels, batches of {bench.batch} chips of 256 x 256."
    )


def latency(bench: Bench) -> list[Section]:
    """Measure all readers with several delays."""
    delays = [int(d) for d in bench.args.delays]
    rows = remote_rows(bench.args.cache_mb, bench.locality)
    section = Section("Random chips over HTTP", method(bench, torchgeo=True), ["reader", *(f"{d} ms" for d in delays)])
    rows = bench.available(rows, section)
    bench.check(rows, 0)
    rates = {}
    for delay in delays:
        log(f"{delay} ms")
        rates[delay] = bench.paired(rows, lambda row, delay=delay: bench.rate(row, delay))  # type: ignore[misc]
    for row in rows:
        section.rows.append([row.label, *(spread(rates[d][row.label]) for d in delays)])
    ours = ours_in(rates[delays[0]])
    ratios = {d: (middle(rates[d][ours]), middle(rates[d][TORCHGEO]), best_limit(rates[d])) for d in delays}
    section.rows.append([f"{ours} / {TORCHGEO}", *(number(r[0] / r[1]) for r in ratios.values())])
    section.rows.append([f"{ours} / the better limit", *(number(r[0] / r[2]) for r in ratios.values())])
    if 30 in ratios:
        section.target("ratio to torchgeo at 30 ms", ratios[30][0] / ratios[30][1], 25)
        section.target("ratio to the limit at 30 ms", ratios[30][0] / ratios[30][2], 0.85)
    if 100 in ratios:
        section.target("ratio to torchgeo at 100 ms", ratios[100][0] / ratios[100][1], 60)
        if 0 in ratios:
            section.target("ours at 100 ms / ours at 0 ms", ratios[100][0] / ratios[0][0], 0.9)
    return [section]


def local(bench: Bench) -> list[Section]:
    """Measure files on disk with a warm page cache, without tile caches and with equal ones."""
    cache = bench.args.cache_mb
    cached = {"workers": 2, "lookahead": True, "cache_bytes": cache * 2**20}
    rows = [
        Row(label=TORCHGEO, reader="torchgeo", options={"workers": 2}),
        Row(label="rasterio, 2 threads", reader="rasterio", options={"threads": 2}),
        Row(label="async-geotiff", reader="async-geotiff"),
        Row(label=PLAIN_ROW, reader="ours", options={"workers": 2}),
        Row(label=LOOKAHEAD_ROW, reader="ours", options={"workers": 2, "lookahead": True}),
        Row(label="torchgeo, cache", reader="torchgeo", options={"workers": 2}, gdal_cache=cache),
        Row(label="rasterio, cache", reader="rasterio", options={"threads": 2}, gdal_cache=2 * cache),
        Row(label="ours, cache", reader="ours", options=cached),
        *LIMITS,
    ]
    section = Section("Local files", method(bench), ["reader", "chips/s", "ours / this"])
    section.notes.append(f"cache: {cache} MB of decoded tiles per process ({2 * cache} MB for readers of one process)")
    rows = bench.available(rows, section)
    for names in bench.layout.files():
        for name in names:
            (bench.folder / name).read_bytes()
    bench.check(rows, None)
    rates = bench.paired(rows, lambda row: bench.rate(row, None))
    ours = middle(rates[ours_in(rates)])
    for row in rows:
        base = middle(rates["ours, cache"]) if row.label.endswith(", cache") else ours
        section.rows.append([row.label, spread(rates[row.label]), number(base / middle(rates[row.label]))])
    section.target("ratio to torchgeo", ours / middle(rates[TORCHGEO]), 3)
    section.target("ratio to rasterio with 2 threads", ours / middle(rates["rasterio, 2 threads"]), 1.15)
    section.target("ratio to the limit", ours / best_limit(rates), 0.8)
    return [section]


def workers(bench: Bench) -> list[Section]:
    """Measure the library's loader with 0, 1 and 2 workers at 30 ms."""
    section = Section("Workers, 30 ms", method(bench, _LONGER), ["loader", "chips/s", "relative to 2 workers"])
    rows = [
        Row(label=f"{kind}, {n} workers", reader="ours", options={"workers": n, "lookahead": kind == "lookahead"})
        for kind in ("no lookahead", "lookahead")
        for n in (0, 1, 2)
    ]
    rows = bench.available(rows, section)
    bench.check(rows, 0)
    rates = bench.paired(rows, lambda row: bench.rate(row, 30, longer=_LONGER))
    for row in rows:
        kind = row.label.partition(",")[0]
        two = middle(rates[f"{kind}, 2 workers"])
        section.rows.append([row.label, spread(rates[row.label]), number(middle(rates[row.label]) / two)])
    two = middle(rates["lookahead, 2 workers"])
    for n in (0, 1):
        section.target(f"lookahead, {n} workers relative to 2", middle(rates[f"lookahead, {n} workers"]) / two, 0.7)
    return [section]
