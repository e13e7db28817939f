"""The sentence is a pure function of counters: these are made up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasteret_ml.loader.bottleneck import Kind, LoaderSettings, find_bottleneck, time_shares
from rasteret_ml.loader.loader import DataLoader
from rasteret_ml.loader.stats import LoaderStats
from rasteret_ml.telemetry import ReadStats

FIVE = {"batches_read": 10, "chips": 40, "requests": 100, "bytes_fetched": 10_000_000, "tiles_decoded": 80}

counts = st.integers(0, 10**9) | st.sampled_from([0, 1])
seconds = st.floats(0, 1e7, allow_subnormal=True) | st.sampled_from([0.0, 1e-12])
reads = st.builds(
    ReadStats,
    **{field.name: counts if field.type == "int" else seconds for field in dataclasses.fields(ReadStats)},
)
settings_of_loaders = st.builds(
    LoaderSettings,
    num_workers=st.integers(0, 64),
    lookahead=st.none() | st.integers(0, 64),
    lookahead_bytes=st.none() | st.integers(0, 2**40),
    max_concurrent=st.none() | st.integers(1, 1000),
    connections=st.none() | st.integers(1, 1000),
    cache_bytes=st.none() | st.integers(0, 2**40),
    transforms=st.booleans(),
    own_collate=st.booleans(),
    cores=st.integers(1, 256),
)


@given(wait=st.floats(0, 1) | st.just(math.nan), read=reads, settings=settings_of_loaders)
def test_any_counters_give_one_clean_sentence(wait: float, read: ReadStats, settings: LoaderSettings) -> None:
    """One of the kinds, shares that sum to 1, and no figure that is none."""
    shares = time_shares(wait, read)
    found = find_bottleneck(wait, read, settings)
    assert found.kind in get_args(Kind)
    assert str(found) == found.sentence
    assert found.sentence.endswith(".")
    assert "\n" not in found.sentence
    assert not {"nan", "inf", "None"} & set(found.sentence.replace("(", " ").replace(",", " ").split())
    parts = (shares.model, shares.network, shares.decode, shares.collate, shares.other)
    if not math.isnan(sum(parts)):
        assert all(-1e-9 <= part <= 1 + 1e-9 for part in parts)
        assert sum(parts) == pytest.approx(1)
    if found.kind == "unknown":
        assert math.isnan(found.share)
    else:
        assert found.share == getattr(shares, found.kind)
    if found.kind in ("network", "decode", "collate"):
        assert found.share == max(parts[1:])
    elif found.kind == "unknown" and not math.isnan(shares.network):
        assert shares.other == max(parts[1:])


@given(settings=settings_of_loaders, read=reads, wait=st.floats(0.1, 1))
def test_only_settings_that_the_loader_has_are_named(settings: LoaderSettings, read: ReadStats, wait: float) -> None:
    """With what they are now; no worker more than there are cores."""
    sentence = find_bottleneck(wait, read, settings).sentence
    for name in ("lookahead", "lookahead_bytes", "max_concurrent", "connections", "cache_bytes"):
        if getattr(settings, name) is None:
            assert f" {name}=" not in sentence
    if settings.num_workers >= settings.cores:
        assert "num_workers=" not in sentence


def _read(**seconds: float) -> ReadStats:
    return ReadStats(**(FIVE | {"fetch_seconds": 20, "fetching_seconds": 5, "decode_seconds": 8} | seconds))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wait", "read", "kind", "says"),
    [
        (0.04, _read(blocked_seconds=9, blocked_network_seconds=9), "model", "The model waits 4 % of the time: the"),
        (
            0.6,
            _read(blocked_seconds=9, blocked_network_seconds=8),
            "network",
            "(200 ms per request of 100 kB, 4 in flight",
        ),
        (
            0.6,
            _read(blocked_seconds=9, blocked_decode_seconds=8),
            "decode",
            "(100 ms per tile, 2.0 tiles per chip, on 2 ",
        ),
        (0.6, _read(plan_seconds=1, collate_seconds=8, sample_seconds=1), "collate", "(80 % of it in collate_fn"),
        (0.6, _read(sample_seconds=8, collate_seconds=2), "collate", "(80 % of it for validity, labels and masks"),
        (0.6, _read(plan_seconds=9, collate_seconds=1), "collate", "(90 % of it for finding records and tiles"),
        (0.6, _read(blocked_seconds=9, blocked_assemble_seconds=8, plan_seconds=1), "collate", 'grid="native"'),
        (
            0.6,
            _read(blocked_seconds=9, plan_seconds=1),
            "unknown",
            "the readers share 2 cores with other",
        ),
        (
            0.6,
            ReadStats(collate_seconds=1),
            "unknown",
            "does not measure what for: raise num_workers= (now 0, with 2 cores)",
        ),
        (math.nan, ReadStats(), "unknown", "Not enough batches"),
    ],
)
def test_each_limit_has_its_sentence(wait: float, read: ReadStats, kind: str, says: str) -> None:
    """Clear cases."""
    settings = LoaderSettings(
        cores=2, max_concurrent=50, connections=64, lookahead=4, lookahead_bytes=10**9, cache_bytes=0
    )
    found = find_bottleneck(wait, read, settings)
    assert found.kind == kind
    assert says in found.sentence


def test_work_that_late_batches_hide_is_no_limit() -> None:
    """6 s of work and 3 s of waiting for batches that are read ahead and late: reading takes 9 s in any case."""
    read = {"blocked_seconds": 3.0, "blocked_decode_seconds": 3.0, "collate_seconds": 6.0}
    assert find_bottleneck(1.0, _read(**read), LoaderSettings()).kind == "collate"
    late = find_bottleneck(1.0, _read(**read, batches_late=10), LoaderSettings())
    assert (late.kind, late.share) == ("decode", pytest.approx(1))
    some = find_bottleneck(1.0, _read(**read, batches_late=3), LoaderSettings())
    assert (some.kind, some.share) == ("decode", pytest.approx((3 + 0.3 * 6) / 9))
    hardly = _read(blocked_seconds=0.1, blocked_decode_seconds=0.1, collate_seconds=6.0, batches_late=10)
    assert find_bottleneck(1.0, hardly, LoaderSettings()).kind == "collate"


@pytest.mark.parametrize(
    ("read", "settings", "says"),
    [
        ({}, {"lookahead": 0}, ": set lookahead= (now 0)."),
        ({}, {"lookahead": 3}, ": raise lookahead= (now 3)."),
        (
            {"batches_deferred": 1},
            {"lookahead": 3, "lookahead_bytes": 10**9},
            ": raise lookahead_bytes= (now 1 GB, all of it in use)",
        ),
        ({}, {"lookahead": 3, "max_concurrent": 4, "connections": 64}, ": raise max_concurrent= (now 4)."),
        ({}, {"max_concurrent": 64, "connections": 4}, "max_concurrent= (now 64) and connections= of FetchLimits."),
        ({}, {"lookahead": 3, "max_concurrent": 50, "num_workers": 1, "cores": 4}, "num_workers= (now 1, with 4 cores"),
        ({"body_seconds": 15}, {"cache_bytes": 0}, "limited by its bandwidth: let chips share tiles, with "),
        ({"retries": 25}, {"lookahead": 3}, "20 % of them retried"),
        ({"fetch_seconds": 0}, {"cache_bytes": 10**6, "num_workers": 9}, "local files (100 kB per read): raise c"),
        ({"requests": 0}, {"lookahead": 2}, "mostly for the store: raise lookahead= (now 2)."),
    ],
)  # fmt: skip
def test_the_network_has_several_settings(read: dict[str, float], settings: dict[str, Any], says: str) -> None:
    """The one that holds requests back, or what makes them fewer."""
    found = find_bottleneck(
        0.9,
        _read(blocked_seconds=9, blocked_network_seconds=8, **read),
        LoaderSettings(**({"num_workers": 1} | settings)),
    )
    assert found.kind == "network"
    assert says in found.sentence


def _stats(**numbers: Any) -> LoaderStats:
    usual = {"batches": 0, "waiting_seconds": 0.0, "consumer_seconds": 0.0, "first_seconds": 0.0, "workers": ()}
    return LoaderStats(**(usual | numbers))


def test_rates_leave_the_first_batch_out_and_differences_do_not() -> None:
    """Starting is no matter of speed; what came after a moment is all of it."""
    early = _stats(
        batches=1, samples=4, waiting_seconds=9.0, first_seconds=9.0, first_samples=4, first_batches=1,
        first_read=ReadStats(bytes_fetched=50), workers=(ReadStats(bytes_fetched=40), ReadStats(bytes_fetched=10)),
    )  # fmt: skip
    assert math.isnan(early.wait_share)
    assert math.isnan(early.samples_per_second)
    later = dataclasses.replace(
        early, batches=3, samples=12, waiting_seconds=10.0, consumer_seconds=3.0,
        workers=(ReadStats(bytes_fetched=4_000_040), ReadStats(bytes_fetched=10)),
    )  # fmt: skip
    for stats in (later, later.since(early)):
        assert stats.wait_share == pytest.approx(0.25)
        assert stats.samples_per_second == pytest.approx(2)
        assert stats.megabytes_per_second == pytest.approx(1)
    assert later.since(early).batches == 2
    another = dataclasses.replace(later, passes=2)
    assert another.since(early) == another
    whole = later + another
    assert (whole.batches, whole.samples, whole.seconds) == (6, 24, pytest.approx(8))
    assert whole.wait_share == pytest.approx(0.25)
    assert whole.total == later.total + another.total
    assert (later + _stats()).total == later.total


def test_a_stock_dataset_is_timed_as_far_as_it_can_be() -> None:
    """No counters of reading: the wait is known, its reason is not."""
    loader = DataLoader(list(range(40)), 4, collate_fn=None)
    for _ in loader:
        sum(range(20_000))
    stats = loader.stats()
    assert (stats.batches, stats.samples) == (10, 40)
    assert stats.bottleneck.kind in ("unknown", "model")
    assert 0 <= stats.wait_share <= 1
    assert stats.total.collate_seconds > 0
    assert "cache_bytes" not in str(stats.bottleneck)
