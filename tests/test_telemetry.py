"""Counters add up, from any thread, and snapshots stand still."""

from __future__ import annotations

import dataclasses
import pickle
import threading

import pytest

from rasteret_ml import telemetry
from rasteret_ml.telemetry import Meter, ReadStats


def test_a_new_meter_is_zero() -> None:
    """Without counts all is zero."""
    assert Meter().snapshot() == ReadStats()


def test_counts_add_up() -> None:
    """Each counter is its own sum; integers stay integers, seconds floats."""
    meter = Meter()
    meter.add(requests=1, bytes_fetched=100, fetch_seconds=0.25)
    meter.add(requests=2, tiles_decoded=3, fetch_seconds=0.5)
    assert meter.snapshot() == ReadStats(requests=3, bytes_fetched=100, tiles_decoded=3, fetch_seconds=0.75)
    assert type(meter.snapshot().requests) is int


def test_a_snapshot_stands_still() -> None:
    """It is frozen, does not follow the meter, and pickles (workers send theirs home)."""
    meter = Meter()
    meter.add(chips=1)
    before = meter.snapshot()
    meter.add(chips=1)
    assert before.chips == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.chips = 5
    assert pickle.loads(pickle.dumps(before)) == before


def test_difference_of_two_snapshots() -> None:
    """What happened between two moments, field by field."""
    names = [f.name for f in dataclasses.fields(ReadStats)]
    meter = Meter()
    meter.add(**{name: i for i, name in enumerate(names)})
    before = meter.snapshot()
    meter.add(**{name: 2 * i + 1 for i, name in enumerate(names)})
    assert meter.snapshot() - before == ReadStats(**{name: 2 * i + 1 for i, name in enumerate(names)})


def test_no_count_is_lost_between_threads() -> None:
    """Eight threads that start together and add at once lose nothing."""
    meter, start = Meter(), threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(2000):
            meter.add(requests=1, bytes_used=3)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (meter.snapshot().requests, meter.snapshot().bytes_used) == (16000, 48000)


def _snapshot_after(**counts: float) -> ReadStats:
    meter = Meter()
    meter.add(**counts)
    return meter.snapshot()


def test_an_unknown_counter_is_refused() -> None:
    """A misspelt counter does not vanish: adding or reading it is an error."""
    with pytest.raises((TypeError, ValueError)):
        _snapshot_after(request=1)


class _Clock:
    """A stand-in for the module `time` that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_waiting_time_is_split_among_what_went_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Second by second: nobody waits, the network alone, half the threads decode, all do, nothing is in flight."""
    clock = _Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    meter = Meter(threads=2)
    steps: list[tuple[str, int, float, float, float, float]] = [
        # activity, change; then the growth of fetching, blocked, blocked_network and blocked_decode seconds
        ("fetch", 1, 1, 0, 0, 0),
        ("fetch", 1, 1, 0, 0, 0),
        ("wait", 1, 1, 1, 1, 0),
        ("decode", 1, 1, 1, 0.5, 0.5),
        ("decode", 1, 1, 1, 0, 1),
        ("assemble", 1, 1, 1, 0, 2 / 3),
        ("fetch", -1, 1, 1, 0, 2 / 3),
        ("fetch", -1, 0, 1, 0, 2 / 3),
        ("assemble", -1, 0, 1, 0, 1),
        ("decode", -1, 0, 1, 0, 1),
        ("decode", -1, 0, 1, 0, 0),
        ("wait", -1, 0, 0, 0, 0),
    ]
    for what, by, *growth in steps:
        meter.change(what, by)  # type: ignore[arg-type]
        before = meter.snapshot()
        clock.now += 1
        grown = meter.snapshot() - before
        names = ("fetching_seconds", "blocked_seconds", "blocked_network_seconds", "blocked_decode_seconds")
        assert [getattr(grown, name) for name in names] == pytest.approx(growth), (what, by)
        rest = growth[1] - growth[2] - growth[3]
        assert grown.blocked_assemble_seconds == pytest.approx(rest if meter._active["assemble"] else 0)


def test_tracking_ends_with_its_block_even_on_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is counted afterwards."""
    clock = _Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    meter = Meter()

    def fail() -> None:
        with meter.track("wait"), meter.track("fetch"):
            clock.now += 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 5
    stats = meter.snapshot()
    assert stats == ReadStats(blocked_seconds=2, blocked_network_seconds=2, fetching_seconds=2)
