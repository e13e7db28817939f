"""Which of network, decoding, collating and the model is the limit, in a sentence, and which knob to turn.

A pure function of counters. Time goes to the model while it has its batch. The time that it waits is dealt to the
others as the readers spent theirs: the thread that makes batches (of each worker, or of the process itself) either
works, which is planning, making samples and collating, or it waits for a batch to be read; and then either threads
decode, or requests are in flight. Its work counts only where reading is not what holds it up: before a batch that is
late, though it was read ahead, it is done in time that would have been waited for anyway.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

from rasteret_ml.telemetry import ReadStats

__all__ = ["Bottleneck", "LoaderKnobs", "TimeShares", "find_bottleneck", "knobs_of", "time_shares"]

Kind = Literal["network", "decode", "collate", "model", "unknown"]

_LITTLE = 0.1
"""Share of the time that a model may wait and still be the limit."""
_HIDDEN = 4.0
"""Seconds of work that one second of waiting for late batches can hide: waiting must be no accident."""
_NEARLY = 0.8
"""Share of `max_concurrent` from which on it is what holds requests back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderKnobs:
    """How a loader is set; None = it has no such knob, or nobody knows."""

    num_workers: int = 0
    """Processes that read; 0 = the consumer's own."""
    lookahead: int | None = None
    """Batches that each of them is told ahead."""
    lookahead_bytes: int | None = None
    """Memory for them, in all processes together."""
    max_concurrent: int | None = None
    """Requests in flight in each process."""
    connections: int | None = None
    """Open connections in each process."""
    cache_bytes: int | None = None
    """Decoded tiles kept in each process."""
    transforms: bool = False
    """Whether samples go through a caller's function."""
    own_collate: bool = True
    """Whether `collate_fn` is the library's."""
    cores: int = 1
    """Of the machine, as far as this process may use them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeShares:
    """Where the time went; they sum to 1, or all but the first are NaN where it is not known what was waited for."""

    model: float
    """The consumer's own; NaN before the second batch."""
    network: float
    """Waiting for bytes."""
    decode: float
    """Waiting for tiles to be decoded."""
    collate: float
    """Waiting for planning, assembling, the making of samples and `collate_fn`."""
    other: float
    """Waiting while nothing of this went on: threads that could go on had no core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """What limits the samples a second; as text, its sentence."""

    kind: Kind
    """The limit."""
    share: float
    """Its share of the time; NaN where unknown."""
    sentence: str
    """What is waited for, with figures, and what to do about it."""

    def __str__(self) -> str:
        return self.sentence


def time_shares(wait_share: float, read: ReadStats) -> TimeShares:
    """Deal the time out.

    Args:
        wait_share: Waiting over waiting and consuming; NaN = not known.
        read: What the readers did in that time.
    """
    work = read.plan_seconds + read.sample_seconds + read.collate_seconds
    blocked = read.blocked_seconds
    if math.isnan(wait_share) or work + blocked <= 0 or not read.batches_read:
        return TimeShares(model=1 - wait_share, network=math.nan, decode=math.nan, collate=math.nan, other=math.nan)
    network = min(read.blocked_network_seconds, blocked)
    decode = min(read.blocked_decode_seconds, blocked - network)
    assemble = min(read.blocked_assemble_seconds, blocked - network - decode)
    hidden = min(work * min(1.0, read.batches_late / read.batches_read), _HIDDEN * blocked)
    scale = wait_share / (work + blocked) * ((blocked + hidden) / blocked if blocked else 1.0)
    return TimeShares(
        model=1 - wait_share,
        network=network * scale,
        decode=decode * scale,
        collate=wait_share * max(0.0, work - hidden) / (work + blocked) + assemble * scale,
        other=max(0.0, blocked - network - decode - assemble) * scale,
    )


def find_bottleneck(wait_share: float, read: ReadStats, knobs: LoaderKnobs) -> Bottleneck:
    """The limit, and what to do; see the module for how time is dealt out.

    Args:
        wait_share: Waiting over waiting and consuming; NaN = not known.
        read: What the readers did in that time.
        knobs: How the loader is set: only knobs that it has are named.
    """
    shares = time_shares(wait_share, read)
    if math.isnan(shares.model):
        return Bottleneck(kind="unknown", share=math.nan, sentence="Too few batches were handed over to tell.")
    waits = f"The model waits {100 * wait_share:.0f} % of the time"
    if wait_share < _LITTLE:
        advice = "only a faster step brings more (precision=, a smaller model, a larger batch_size=)"
        return Bottleneck(kind="model", share=shares.model, sentence=f"{waits}: the data keep up, and {advice}.")
    if math.isnan(shares.network):
        what = f"{waits}, but this loader's readers do not say for what{_end(_more_workers(knobs))}"
        return Bottleneck(kind="unknown", share=math.nan, sentence=what)
    parts: dict[Kind, float] = {"network": shares.network, "decode": shares.decode, "collate": shares.collate}
    kind = max(parts, key=lambda name: parts[name])
    if shares.other > parts[kind]:
        what = f"{waits}, mostly while nothing is read or made: the readers do not get the {_cores(knobs)} they need."
        return Bottleneck(kind="unknown", share=math.nan, sentence=what)
    said = {"network": _network, "decode": _decode, "collate": _collate}[kind](read, knobs)
    return Bottleneck(kind=kind, share=parts[kind], sentence=f"{waits}, mostly for {said}")


def knobs_of(loader: Any) -> LoaderKnobs:
    """How a loader and the dataset in it are set."""
    knobs = LoaderKnobs(
        num_workers=loader.num_workers,
        lookahead=loader.lookahead,
        lookahead_bytes=loader.lookahead_bytes,
        own_collate=_is_ours(loader.collate_fn),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
    dataset = loader.dataset
    while hasattr(dataset, "dataset"):  # torch's Subset
        dataset = dataset.dataset
    parts = getattr(dataset, "parts", [dataset])
    transforms = any(getattr(part, "transforms", None) is not None for part in (dataset, *parts))
    configs = [part.reading for part in parts if hasattr(part, "reading")]
    if not configs:
        return replace(knobs, transforms=transforms)
    return replace(
        knobs,
        transforms=transforms,
        max_concurrent=min(config.max_concurrent for config in configs),
        connections=min(config.limits.connections for config in configs),
        cache_bytes=min(config.cache_bytes for config in configs),
    )


def _is_ours(function: Any) -> bool:
    return str(getattr(getattr(function, "func", function), "__module__", "")).startswith("rasteret_ml.")


# Sentences --------------------------------------------------------------------------------------------------


def _network(read: ReadStats, knobs: LoaderKnobs) -> str:
    if read.requests and not read.fetch_seconds:
        return f"files to be read ({_size(read.bytes_fetched / read.requests)} a read){_end(_fewer_tiles(read, knobs))}"
    if not read.requests:
        return f"the store{_end(_more_requests(read, knobs))}"
    at_once = read.fetch_seconds / read.fetching_seconds if read.fetching_seconds else 1.0
    each = f"{_time(read.fetch_seconds / read.requests)} a request of {_size(read.bytes_fetched / read.requests)}"
    again = f", {_percent(read.retries, read.requests + read.retries)} tried again" if read.retries else ""
    told = f"the network ({each}, {at_once:.0f} at once{again})"
    if read.body_seconds > read.fetch_seconds / 2:
        return f"{told}, whose bandwidth is the limit{_end(_fewer_tiles(read, knobs))}"
    return f"{told}{_end(_more_requests(read, knobs))}"


def _more_requests(read: ReadStats, knobs: LoaderKnobs) -> list[str]:
    """What brings more requests in flight."""
    if knobs.lookahead == 0:
        return ["set lookahead= (now 0)"]
    wider = []
    at_once = read.fetch_seconds / read.fetching_seconds if read.fetching_seconds else 0.0
    most = knobs.max_concurrent
    if most is not None and at_once >= _NEARLY * min(most, knobs.connections or most):
        also = " and connections= of FetchLimits" if knobs.connections is not None and most >= knobs.connections else ""
        wider.append(f"raise max_concurrent= (now {most}){also}")
    elif read.batches_deferred and knobs.lookahead_bytes is not None:
        wider.append(f"raise lookahead_bytes= (now {_size(knobs.lookahead_bytes)}), which is full")
    elif knobs.lookahead is not None:
        wider.append(f"raise lookahead= (now {knobs.lookahead})")
    return wider + _more_workers(knobs)


def _decode(read: ReadStats, knobs: LoaderKnobs) -> str:
    each = f"{_time(read.decode_seconds / read.tiles_decoded)} a tile" if read.tiles_decoded else ""
    chips = f"{read.tiles_decoded / read.chips:.1f} tiles a chip" if read.chips else ""
    figures = ", ".join(part for part in (each, chips, f"on {_cores(knobs)}") if part)
    return f"tiles to be decoded ({figures}){_end([*_fewer_tiles(read, knobs), 'take a codec that decodes faster'])}"


def _fewer_tiles(read: ReadStats, knobs: LoaderKnobs) -> list[str]:
    """What makes a tile serve more chips."""
    if knobs.cache_bytes is None:
        return ["let chips share tiles"]
    if not knobs.cache_bytes:
        return ["let chips share tiles, with locality= of the sampler and cache_bytes= of the dataset (now 0)"]
    hits = _percent(read.cache_hits, read.cache_hits + read.tiles_decoded)
    return [f"raise cache_bytes= (now {_size(knobs.cache_bytes)}, {hits} of the tiles come from it) or use locality="]


def _collate(read: ReadStats, knobs: LoaderKnobs) -> str:
    parts = {
        "collate_fn": read.collate_seconds,
        "samples": read.sample_seconds,
        "plan": read.plan_seconds,
        "assemble": read.blocked_assemble_seconds,
    }
    most = max(parts, key=lambda name: parts[name])
    figure = f"{_percent(parts[most], sum(parts.values()))} of it"
    more = _more_workers(knobs)
    if most == "collate_fn":
        cheaper = [] if knobs.own_collate else ["use rasteret_ml.collate or a cheaper collate_fn="]
        return f"batches to be collated (collate_fn is {figure}){_end([*more, *cheaper])}"
    if most == "samples":
        cheaper = ["do what transforms= does on the device"] if knobs.transforms else []
        of_whom = "transforms= and the like are" if knobs.transforms else "validity, labels and masks are"
        return f"samples to be made and collated ({of_whom} {figure}){_end([*more, *cheaper])}"
    if most == "plan":
        return f"batches to be planned and collated (finding records and tiles is {figure}){_end(more)}"
    native = ['read on the files\' own pixels (grid="native", or their crs= and res=)']
    return f"chips to be put together and collated (pasting and resampling are {figure}){_end([*more, *native])}"


def _more_workers(knobs: LoaderKnobs) -> list[str]:
    if knobs.num_workers < knobs.cores:
        return [f"raise num_workers= (now {knobs.num_workers}, with {_cores(knobs)})"]
    return []


def _cores(knobs: LoaderKnobs) -> str:
    return f"{knobs.cores} core{'s' if knobs.cores != 1 else ''}"


def _end(advice: list[str]) -> str:
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
