"""What limits a loader: network, decoding, collating or the model, in one sentence with the option to change.

A pure function of counters. Time goes to the model while it has its batch. The time that it waits is divided among the
others as the readers spent theirs: the thread that makes batches (of each worker, or of the process itself) either
works (planning, making samples, collating), or waits for a batch to be read; meanwhile threads decode, or requests are
in flight. Its work counts only where reading is not the limit: work done before a batch that was prefetched and is
still late takes time that would have been spent waiting anyway.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal

from rasteret_ml.telemetry import ReadStats

Kind = Literal["network", "decode", "collate", "model", "unknown"]

_MODEL_BOUND = 0.1  # Share of the time that a model may wait and still be the limit.
# Seconds of work that one second of waiting for late batches can hide; limits the effect of a chance wait.
_MAX_HIDDEN = 4.0
_NEAR_LIMIT = 0.8  # Share of `max_concurrent` from which on it is what limits the requests in flight.


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderSettings:
    """The options of a loader that affect speed; None = it has no such option, or its value is not known."""

    num_workers: int = 0  #: Processes that read; 0 = the consumer's own.
    lookahead: int | None = None  #: Batches that each of them prefetches.
    lookahead_bytes: int | None = None  #: Memory for prefetched batches, in all processes together.
    max_concurrent: int | None = None  #: Requests in flight in each process.
    connections: int | None = None  #: Open connections in each process.
    cache_bytes: int | None = None  #: Memory for decoded tiles in each process.
    transforms: bool = False  #: Whether samples go through a caller's function.
    own_collate: bool = True  #: Whether `collate_fn` is the library's.
    cores: int = 1  #: Cores that this process may use.


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeShares:
    """Shares of the time; their sum is 1, or all but `model` are NaN where the reason for waiting is not known."""

    model: float  #: The consumer's own time; NaN before the second batch.
    network: float  #: Waiting for bytes.
    decode: float  #: Waiting for tiles to be decoded.
    collate: float  #: Waiting for planning, assembling of chips, making of samples and `collate_fn`.
    other: float  #: Waiting while none of these was in progress: runnable threads had no core.


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What limits the samples per second; as text, its sentence."""

    kind: Kind  #: The limit.
    share: float  #: Its share of the time; NaN where unknown.
    sentence: str  #: What the model waits for, with figures, and what to do about it.

    def __str__(self) -> str:
        return self.sentence


def time_shares(wait_share: float, read: ReadStats) -> TimeShares:
    """Divide the time among the model and what it waits for (see the module), given what the readers did in that time.

    `wait_share` is waiting over waiting and consuming; NaN = not known.
    """
    work = read.plan_seconds + read.sample_seconds + read.collate_seconds
    blocked = read.blocked_seconds
    if math.isnan(wait_share) or work + blocked <= 0 or not read.batches_read:
        return TimeShares(model=1 - wait_share, network=math.nan, decode=math.nan, collate=math.nan, other=math.nan)
    network = min(read.blocked_network_seconds, blocked)
    decode = min(read.blocked_decode_seconds, blocked - network)
    assemble = min(read.blocked_assemble_seconds, blocked - network - decode)
    hidden = min(work * min(1.0, read.batches_late / read.batches_read), _MAX_HIDDEN * blocked)
    scale = wait_share / (work + blocked) * ((blocked + hidden) / blocked if blocked else 1.0)
    return TimeShares(
        model=1 - wait_share,
        network=network * scale,
        decode=decode * scale,
        collate=wait_share * max(0.0, work - hidden) / (work + blocked) + assemble * scale,
        other=max(0.0, blocked - network - decode - assemble) * scale,
    )


def find_bottleneck(wait_share: float, read: ReadStats, settings: LoaderSettings) -> Bottleneck:
    """Return the limit, and what to do about it; see `time_shares`. The sentence names only options that there are."""
    shares = time_shares(wait_share, read)
    if math.isnan(shares.model):
        return _unknown("Not enough batches yet to find the bottleneck.")
    waits = f"The model waits {100 * wait_share:.0f} % of the time"
    if wait_share < _MODEL_BOUND:
        advice = "only a faster training step helps (precision=, a smaller model, a larger batch_size=)"
        return Bottleneck(kind="model", share=shares.model, sentence=f"{waits}: the data keep up, and {advice}.")
    if math.isnan(shares.network):
        return _unknown(f"{waits}, but this loader does not measure what for{_advice(_more_workers(settings))}")
    parts: dict[Kind, float] = {"network": shares.network, "decode": shares.decode, "collate": shares.collate}
    kind = max(parts, key=lambda name: parts[name])
    if shares.other > parts[kind]:
        return _unknown(
            f"{waits}, mostly while nothing is read or decoded: the readers share {_cores(settings)} with other "
            "threads or processes, and need more."
        )
    reason = {"network": _network, "decode": _decode, "collate": _collate}[kind](read, settings)
    return Bottleneck(kind=kind, share=parts[kind], sentence=f"{waits}, mostly for {reason}")


def loader_settings(loader: Any) -> LoaderSettings:
    """Return the options of a loader and of the dataset in it."""
    dataset = loader.dataset
    while hasattr(dataset, "dataset"):  # torch's Subset
        dataset = dataset.dataset
    parts = getattr(dataset, "parts", [dataset])
    configs = [part.reading for part in parts if hasattr(part, "reading")]
    collate = getattr(loader.collate_fn, "func", loader.collate_fn)
    return LoaderSettings(
        num_workers=loader.num_workers,
        lookahead=loader.lookahead,
        lookahead_bytes=loader.lookahead_bytes,
        max_concurrent=min((config.max_concurrent for config in configs), default=None),
        connections=min((config.limits.connections for config in configs), default=None),
        cache_bytes=min((config.cache_bytes for config in configs), default=None),
        transforms=any(getattr(part, "transforms", None) is not None for part in (dataset, *parts)),
        own_collate=str(getattr(collate, "__module__", "")).startswith("rasteret_ml."),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _unknown(sentence: str) -> Bottleneck:
    return Bottleneck(kind="unknown", share=math.nan, sentence=sentence)


# Reasons and advice ---------------------------------------------------------------------------------------


def _network(read: ReadStats, settings: LoaderSettings) -> str:
    if not read.requests:
        return f"the store{_advice(_more_requests(read, settings))}"
    size = _size(read.bytes_fetched / read.requests)
    if not read.fetch_seconds:
        return f"local files ({size} per read){_advice(_fewer_tiles(read, settings))}"
    figures = f"{_time(read.fetch_seconds / read.requests)} per request of {size}, {_in_flight(read):.0f} in flight"
    if read.retries:
        figures += f", {_percent(read.retries, read.requests + read.retries)} of them retried"
    if read.body_seconds > read.fetch_seconds / 2:
        return f"the network ({figures}), limited by its bandwidth{_advice(_fewer_tiles(read, settings))}"
    return f"the network ({figures}){_advice(_more_requests(read, settings))}"


def _in_flight(read: ReadStats) -> float:
    return read.fetch_seconds / read.fetching_seconds if read.fetching_seconds else 0.0


def _more_requests(read: ReadStats, settings: LoaderSettings) -> list[str]:
    """Return advice to have more requests in flight."""
    if settings.lookahead == 0:
        return ["set lookahead= (now 0)"]
    advice = []
    limit = settings.max_concurrent
    if limit is not None and _in_flight(read) >= _NEAR_LIMIT * min(limit, settings.connections or limit):
        also = settings.connections is not None and limit >= settings.connections
        advice.append(f"raise max_concurrent= (now {limit}){' and connections= of FetchLimits' if also else ''}")
    elif read.batches_deferred and settings.lookahead_bytes is not None:
        advice.append(f"raise lookahead_bytes= (now {_size(settings.lookahead_bytes)}, all of it in use)")
    elif settings.lookahead is not None:
        advice.append(f"raise lookahead= (now {settings.lookahead})")
    return advice + _more_workers(settings)


def _decode(read: ReadStats, settings: LoaderSettings) -> str:
    time = f"{_time(read.decode_seconds / read.tiles_decoded)} per tile" if read.tiles_decoded else ""
    tiles = f"{read.tiles_decoded / read.chips:.1f} tiles per chip" if read.chips else ""
    figures = ", ".join(part for part in (time, tiles, f"on {_cores(settings)}") if part)
    advice = [*_fewer_tiles(read, settings), "use a codec that decodes faster"]
    return f"decoding ({figures}){_advice(advice)}"


def _fewer_tiles(read: ReadStats, settings: LoaderSettings) -> list[str]:
    """Return advice to let more chips share a tile."""
    if settings.cache_bytes is None:
        return ["let chips share tiles"]
    if not settings.cache_bytes:
        return ["let chips share tiles, with locality= of the sampler and cache_bytes= of the dataset (now 0)"]
    hits = _percent(read.cache_hits, read.cache_hits + read.tiles_decoded)
    return [f"raise cache_bytes= (now {_size(settings.cache_bytes)}, {hits} of the tiles found in it) or use locality="]


def _collate(read: ReadStats, settings: LoaderSettings) -> str:
    cheaper = [] if settings.own_collate else ["use rasteret_ml.collate or a cheaper collate_fn="]
    called = "transforms=, " if settings.transforms else ""
    elsewhere = ["move the work of transforms= to the device"] if settings.transforms else []
    native = ['read on the files\' own pixels (grid="native", or their crs= and res=)']
    steps: list[tuple[float, str, str, list[str]]] = [
        (read.collate_seconds, "collating", "in collate_fn", cheaper),
        (read.sample_seconds, "making samples", f"for {called}validity, labels and masks", elsewhere),
        (read.plan_seconds, "planning batches", "for finding records and tiles", []),
        (read.blocked_assemble_seconds, "assembling chips", "for copying and resampling", native),
    ]
    longest, doing, part, advice = max(steps, key=lambda step: step[0])
    figure = _percent(longest, sum(step[0] for step in steps))
    return f"{doing} ({figure} of it {part}){_advice(_more_workers(settings) + advice)}"


def _more_workers(settings: LoaderSettings) -> list[str]:
    if settings.num_workers < settings.cores:
        return [f"raise num_workers= (now {settings.num_workers}, with {_cores(settings)})"]
    return []


def _cores(settings: LoaderSettings) -> str:
    return f"{settings.cores} core{'s' if settings.cores != 1 else ''}"


def _advice(advice: list[str]) -> str:
    return f": {', or '.join(advice)}." if advice else "."


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
