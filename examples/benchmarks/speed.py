"""Chips a second: over HTTP at several latencies, from disk, and with several numbers of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench import Bench, say
from readers import Row
from report import Section, middle, number, spread

TORCHGEO = "torchgeo, 2 workers (spawn)"
AHEAD_ROW = "ours, lookahead, 2 workers"
PLAIN_ROW = "ours, no lookahead, 2 workers"
_LONGER = 2
"""Times as many batches are timed where numbers of workers are compared: their ratio is the narrowest of all."""
LIMITS = (
    Row(label="limit, one process", reader="limit", options={"processes": 1}),
    Row(label="limit, two processes", reader="limit", options={"processes": 2}),
)


def remote_rows(cache_mb: int, locality: object) -> list[Row]:
    """Readers of the latency table."""
    near = {"workers": 2, "lookahead": True, "cache_bytes": cache_mb * 2**20, "locality": locality}
    return [
        Row(label="torchgeo, 0 workers", reader="torchgeo", slow=True),
        Row(label=TORCHGEO, reader="torchgeo", options={"workers": 2}, slow=True),
        Row(label=f"{TORCHGEO}, cache", reader="torchgeo", options={"workers": 2}, slow=True, gdal_cache=cache_mb),
        Row(label="rasterio, 16 threads", reader="rasterio", options={"threads": 16}),
        Row(label="async-geotiff", reader="async-geotiff"),
        Row(label=PLAIN_ROW, reader="ours", options={"workers": 2}),
        Row(label=AHEAD_ROW, reader="ours", options={"workers": 2, "lookahead": True}),
        Row(label="ours, lookahead, cache and locality, 2 workers (other chips)", reader="ours", options=near),
        *LIMITS,
    ]


def best_limit(found: Mapping[str, Sequence[float]]) -> float:
    """The better of the two limits' medians."""
    return max(middle(found[row.label]) for row in LIMITS)


def ours_in(found: Mapping[str, Sequence[float]]) -> str:
    """Our best plain row: with lookahead where there is one."""
    return AHEAD_ROW if found.get(AHEAD_ROW) else PLAIN_ROW


def method(bench: Bench, longer: int = 1) -> str:
    """How rates are taken, for the introduction of a table."""
    args, batches = bench.args, bench.args.batches * longer
    return (
        f"Chips a second, median (smallest to largest) of {bench.rounds} rounds; from the arrival of batch {args.warm} "
        f"to that of batch {args.warm} + {batches} ({args.slow_batches} for torchgeo, half of it at 100 ms), with "
        f"more batches behind them, so that nothing runs dry. {bench.layout.scenes} scenes of 4 bands, "
        f"{bench.layout.size} pixels a side, batches of {bench.batch} chips of 256 x 256."
    )


def latency(bench: Bench) -> list[Section]:
    """Readers against delays."""
    delays = [int(d) for d in bench.args.delays]
    rows = remote_rows(bench.args.cache_mb, bench.locality)
    section = Section("Random chips over HTTP", method(bench), ["reader", *(f"{d} ms" for d in delays)])
    rows = bench.available(rows, section)
    bench.check(rows, 0)
    found = {}
    for delay in delays:
        say(f"{delay} ms")
        found[delay] = bench.paired(rows, lambda row, delay=delay: bench.rate(row, delay))  # type: ignore[misc]
    for row in rows:
        section.rows.append([row.label, *(spread(found[d][row.label]) for d in delays)])
    ours = ours_in(found[delays[0]])
    ratios = {d: (middle(found[d][ours]), middle(found[d][TORCHGEO]), best_limit(found[d])) for d in delays}
    section.rows.append([f"{ours} / {TORCHGEO}", *(number(r[0] / r[1]) for r in ratios.values())])
    section.rows.append([f"{ours} / the better limit", *(number(r[0] / r[2]) for r in ratios.values())])
    if 30 in ratios:
        section.target("30 ms, times torchgeo", ratios[30][0] / ratios[30][1], 25)
        section.target("30 ms, of the limit", ratios[30][0] / ratios[30][2], 0.85)
    if 100 in ratios:
        section.target("100 ms, times torchgeo", ratios[100][0] / ratios[100][1], 60)
        if 0 in ratios:
            section.target("100 ms, of our own 0 ms", ratios[100][0] / ratios[0][0], 0.9)
    return [section]


def local(bench: Bench) -> list[Section]:
    """Files on disk, in the page cache; once without tile caches, once with equal ones."""
    cache = bench.args.cache_mb
    rows = [
        Row(label="torchgeo, 2 workers (spawn)", reader="torchgeo", options={"workers": 2}),
        Row(label="rasterio, 2 threads", reader="rasterio", options={"threads": 2}),
        Row(label="async-geotiff", reader="async-geotiff"),
        Row(label=PLAIN_ROW, reader="ours", options={"workers": 2}),
        Row(label=AHEAD_ROW, reader="ours", options={"workers": 2, "lookahead": True}),
        Row(label="torchgeo, cache", reader="torchgeo", options={"workers": 2}, gdal_cache=cache),
        Row(label="rasterio, cache", reader="rasterio", options={"threads": 2}, gdal_cache=2 * cache),
        Row(
            label="ours, cache",
            reader="ours",
            options={"workers": 2, "lookahead": True, "cache_bytes": cache * 2**20},
        ),
        *LIMITS,
    ]
    section = Section("Local files", method(bench), ["reader", "chips/s", "ours / it"])
    section.notes.append(f"cache: {cache} MB of decoded tiles a process ({2 * cache} MB where there is one process)")
    rows = bench.available(rows, section)
    for names in bench.layout.files():
        for name in names:
            (bench.folder / name).read_bytes()
    bench.check(rows, None)
    found = bench.paired(rows, lambda row: bench.rate(row, None))
    ours = middle(found[ours_in(found)])
    for row in rows:
        base = middle(found["ours, cache"]) if row.label.endswith(", cache") else ours
        section.rows.append([row.label, spread(found[row.label]), number(base / middle(found[row.label]))])
    section.target("times torchgeo", ours / middle(found["torchgeo, 2 workers (spawn)"]), 3)
    section.target("times rasterio with 2 threads", ours / middle(found["rasterio, 2 threads"]), 1.15)
    section.target("of bare read + decode", ours / best_limit(found), 0.8)
    return [section]


def workers(bench: Bench) -> list[Section]:
    """Our loader with 0, 1 and 2 workers at 30 ms."""
    section = Section("Workers, 30 ms", method(bench, _LONGER), ["loader", "chips/s", "of 2 workers"])
    ahead = [
        Row(label=f"lookahead, {n} workers", reader="ours", options={"workers": n, "lookahead": True})
        for n in (0, 1, 2)
    ]
    plain = [Row(label=f"no lookahead, {n} workers", reader="ours", options={"workers": n}) for n in (0, 1, 2)]
    rows = bench.available([*plain, *ahead], section)
    bench.check(rows, 0)
    found = bench.paired(rows, lambda row: bench.rate(row, 30, longer=_LONGER))
    for row in rows:
        kind = row.label.partition(",")[0]
        whole = middle(found[f"{kind}, 2 workers"])
        section.rows.append([row.label, spread(found[row.label]), number(middle(found[row.label]) / whole)])
    whole = middle(found["lookahead, 2 workers"])
    for n in (0, 1):
        section.target(f"{n} workers, of 2", middle(found[f"lookahead, {n} workers"]) / whole, 0.7)
    return [section]
