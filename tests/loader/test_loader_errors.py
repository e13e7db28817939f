"""Samples that cannot be read: which ones, what is done about them, and that all of it is told."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely
import torch
import torch.utils.data
from affine import Affine
from pixel_oracle import PATIENT

import rasteret_ml as rm
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import DataError, ErrorBudgetError, NoOverlapError, ReadError, ServerError, UsageError
from rasteret_ml.loader.failures import BatchWithErrors, FailureBudget, SampleError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.execute import TileError
from rasteret_ml.samplers.ranks import Ranks
from rasteret_ml.samples.collate import blank_sample
from rasteret_ml.storage.reader import RetryPolicy
from rasteret_ml.testing import BrokenBytes, RangeServer, make_cog

BANDS = ("B02", "B03")
ONCE = rm.FetchLimits(retry=RetryPolicy(attempts=1), timeouts=PATIENT)
REMAP = {0: 3, 1: 0, 2: 1}
SECRET = "sig=HUSH"


def sign(href: str) -> str:
    """A signed address."""
    return f"{href}?{SECRET}"


@dataclass(frozen=True)
class Served:
    """Collections of files on a server that breaks on demand."""

    server: RangeServer
    images: rm.Collection
    labels: rm.Collection
    fields: gpd.GeoDataFrame


@pytest.fixture(scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    rng = np.random.default_rng(7)
    place = Affine(10.0, 0.0, 500000.0, 0.0, -10.0, 5000000.0)
    layout = {"transform": place, "nodata": 0, "blocksize": 32, "overviews": "none"}
    for day in ("20230801", "20230811"):
        for band in BANDS:
            pixels = rng.integers(1, 60000, (160, 160), np.uint16)
            if day == "20230811":
                pixels[40:90, 40:70] = 0
            make_cog(folder / f"S_{day}_{band}.tif", pixels, **layout)
    make_cog(folder / "cover.tif", rng.integers(0, 3, (160, 160), np.uint8), **(layout | {"nodata": 255}))
    with RangeServer(folder) as server:
        names = [f"{server.url}/S_{day}_{band}.tif" for day in ("20230801", "20230811") for band in BANDS]
        images = rm.build(names, folder / "images.parquet", bands=BANDS)
        labels = rm.build([f"{server.url}/cover.tif"], folder / "labels.parquet", datetime=None)
        boxes = [shapely.box(500000 + 400 * i, 4998400, 500400 + 400 * i, 5000000) for i in range(4)]
        fields = gpd.GeoDataFrame({"crop": [0, 1, 2, 0]}, geometry=boxes, crs=images.crs[0])
        yield Served(server, images, labels, fields)


@pytest.fixture
def served(_served: Served) -> Iterator[Served]:
    """With nothing broken yet."""
    yield _served
    _served.server.broken.clear()
    _served.server.requests.clear()
    _served.server.error_rate = 0.0


def _images(s: Served, **options: Any) -> rm.RasteretDataset:
    return rm.RasteretDataset(s.images, BANDS, reading={"limits": ONCE, "sign": sign}, **options)


def _day(s: Served, day: int, **reading: Any) -> rm.RasteretDataset:
    chosen = s.images.subset(date_range=(f"2023-08-{day:02}", f"2023-08-{day:02}"))
    return rm.RasteretDataset(chosen, BANDS, reading={"limits": ONCE, "sign": sign} | reading)


def _labels(s: Served, **options: Any) -> rm.RasteretDataset:
    return rm.RasteretDataset(
        s.labels,
        ["B1"],
        is_image=False,
        reading={"limits": ONCE, "sign": sign},
        **({"labels": {"remap": REMAP}} | options),
    )


def _heads(s: Served) -> Any:
    first = _labels(s, sample={"key": "mask_a"})
    return first & _labels(s, sample={"key": "mask_b"}, labels={"remap": REMAP, "ignore_index": 255})


KINDS: dict[str, Callable[[Served], Any]] = {
    "mosaic": _images,
    "one record": partial(_day, day=1),
    "native grid": partial(_images, grid="native", sample={"mask_aoi": True}),
    "series": partial(_images, series=3),
    "composite": partial(_images, composite="median"),
    "images & labels": lambda s: _images(s, sample={"valid_per_band": True}) & _labels(s),
    "series & labels": lambda s: _images(s, series=2) & _labels(s, labels={"remap": REMAP, "ignore_index": -1}),
    "images & polygons": lambda s: _day(s, 11) & rm.PolygonDataset(s.fields, "crop", background=9),
    "two heads": lambda s: _day(s, 1) & _heads(s),
    "one day | another": lambda s: _day(s, 11) | _day(s, 1),
    "labels | labels": lambda s: _labels(s) | _labels(s),
}


def _break(s: Served, share: float, seed: int = 0, times: int = 1 << 30) -> None:
    """Break a share of each file's tiles."""
    rng = np.random.default_rng(seed)
    for collection in (s.images, s.labels):
        for record in collection.iterate_records():
            for band, table in record.band_metadata.items():
                if table is None:
                    continue
                name = band.removesuffix("_metadata")
                path = str(record.assets[name]["href"]).rsplit("/", 1)[1]
                starts, lengths = table["tile_offsets"], table["tile_byte_counts"]
                for tile in rng.permutation(len(starts))[: round(share * len(starts))]:
                    stop = int(starts[tile] + lengths[tile])
                    s.server.broken.append(BrokenBytes(path=path, start=int(starts[tile]), stop=stop, times=times))


def _equal(sample: Any, other: Any) -> bool:
    """Byte for byte."""
    if set(sample) != set(other):
        return False
    pairs = [(sample[key], other[key]) for key in sample if isinstance(sample[key], torch.Tensor)]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes() for a, b in pairs
    )


def _assert_equal(batches: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert _equal(batch, other)


def _unreadable(dataset: Any, queries: Sequence[Any]) -> list[int]:
    """The slow way: one at a time, strictly."""
    found = []
    for i, query in enumerate(queries):
        try:
            dataset[query]
        except ReadError:
            found.append(i)
    return found


def _mended(action: str, good: list[Any], bad: Sequence[int], dataset: Any, batch_size: int) -> list[Any]:
    """What the batches should be."""
    blank = dataset.ignored_classes
    whole = []
    for i, sample in enumerate(good):
        start = i - i % batch_size
        others = [*range(i + 1, min(start + batch_size, len(good))), *range(start, i)]
        stand_in = next((j for j in others if j not in bad), None)
        if i not in bad:
            whole.append(sample)
        elif action == "fill":
            whole.append(blank_sample(sample, blank))
        else:
            assert stand_in is not None
            whole.append(good[stand_in])
    return [rm.collate(whole[i : i + batch_size]) for i in range(0, len(whole), batch_size)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_is_mended_and_nothing_else_is_touched(served: Served, kind: str) -> None:
    """Against the slow way: which samples fail alone and strictly, and what they are when nothing is broken."""
    dataset = KINDS[kind](served)
    queries = list(rm.RandomAOISampler(dataset, 24, 16, seed=2, aois=served.fields))
    good = dataset.__getitems__(queries)
    _break(served, 0.08, seed=3)
    bad = _unreadable(dataset, queries)
    assert 2 <= len(bad) < 11, "the test has something to tell"
    for action, done in (("replace", "replaced"), ("fill", "filled")):
        served.server.requests.clear()
        errors = rm.ErrorPolicy(action=action, budget=None)
        loader = rm.DataLoader(dataset, 6, sampler=queries, errors=errors)
        _assert_equal(list(loader), _mended(action, good, bad, dataset, 6))
        report = loader.failures
        assert (report.samples, report.failed, report.outcomes) == (16, len(bad), {done: len(bad)})
        assert [6 * failure.batch + failure.position for failure in report.failures] == bad
        assert [failure.draw for failure in report.failures] == [queries[i].draw for i in bad]
        assert [failure.aoi for failure in report.failures] == [queries[i].row for i in bad]
        _assert_complete(served, report)


def test_tiles_that_are_kept_need_no_server(served: Served) -> None:
    """What was decoded before a server broke is there; what was not is as without a cache."""
    dataset = _day(served, 1, cache_bytes=10**7)
    queries = list(rm.GridAOISampler(dataset, 32))
    dataset.__getitems__(queries[:10])
    for tile in (3, 12):
        _broken_tile(served, "B02", tile)
    loader = rm.DataLoader(dataset, 5, sampler=queries, errors="fill")
    list(loader)
    assert [5 * failure.batch + failure.position for failure in loader.failures.failures] == [12]


def _assert_complete(s: Served, report: Any) -> None:
    """What the server refused is what is reported, and the other way round."""
    assert all(failure.more == 0 for failure in report.failures)
    errors = [error for failure in report.failures for error in failure.errors]
    told = {(error.href.rsplit("/", 1)[1].split("?")[0], error.range.start, error.range.stop) for error in errors}
    refused = [(request.path, request.range) for request in s.server.requests if request.failed]
    broken = {(bad.path, bad.start, bad.stop) for bad in s.server.broken}
    met = {b for b in broken for path, (start, stop) in refused if path == b[0] and b[1] < stop and start < b[2]}
    assert told == met
    assert all(type(error.error) is ServerError and "503" in str(error.error) for error in errors)
    assert report.kinds == {"ServerError": sum(len(failure.errors) for failure in report.failures)}
    assert sum(report.files.values()) == report.kinds["ServerError"]
    assert "HUSH" not in f"{report} {report!r}"


@pytest.mark.parametrize(
    ("workers", "context", "lookahead", "action"),
    [
        (0, None, 0, "replace"),
        (0, None, 2, "fill"),
        (1, "fork", 3, "fill"),
        (2, "fork", 0, "fill"),
        (2, "fork", 2, "replace"),
        pytest.param(1, "forkserver", 3, "replace", marks=pytest.mark.slow),
        pytest.param(1, "spawn", 0, "fill", marks=pytest.mark.slow),
    ],
)
def test_workers_and_lookahead_change_nothing(
    served: Served, workers: int, context: str | None, lookahead: int, action: str
) -> None:
    """The same batches, the same report, in the same order, two passes over with the workers kept."""
    _break(served, 0.05, seed=1)
    errors = rm.ErrorPolicy(action=action, retries=0, budget=None)

    def run(**options: Any) -> tuple[list[Any], list[Any]]:
        dataset = KINDS["images & labels"](served)
        sampler = rm.RandomAOISampler(dataset, 24, 20, seed=5)
        loader = rm.DataLoader(dataset, 4, sampler=sampler, errors=errors, **options)
        batches, reports = [], []
        for _ in range(2):
            batches += list(loader)
            reports.append(loader.failures)
        return batches, reports

    expected, told = run()
    assert told[0].failed > 3
    assert told[0] != told[1]
    batches, reports = run(num_workers=workers, multiprocessing_context=context, lookahead=lookahead)
    _assert_equal(batches, expected)
    assert reports == told
    assert [[str(f) for f in report.failures] for report in reports] == [[str(f) for f in r.failures] for r in told]


@pytest.mark.parametrize("workers", [0, 2])
def test_retry_reads_again_until_it_is_right(served: Served, workers: int) -> None:
    """Bytes that come at the third asking, where each request is tried once: two retries suffice, one does not."""
    dataset = KINDS["images & labels"](served)
    queries = list(rm.RandomAOISampler(dataset, 24, 18, seed=2))
    expected = list(rm.DataLoader(dataset, 6, sampler=queries))
    _break(served, 0.04, seed=3)
    bad = _unreadable(dataset, queries)
    assert bad
    served.server.broken.clear()
    # Asked for with others in one request, then alone; and with "retry" once more.
    _break(served, 0.04, seed=3, times=3)
    errors = rm.ErrorPolicy(action="retry", retries=4, budget=None)
    loader = rm.DataLoader(dataset, 6, sampler=queries, errors=errors, num_workers=workers)
    _assert_equal(list(loader), expected)
    report = loader.failures
    assert report.outcomes == {"retried": report.failed}
    assert 0 < report.failed <= len(bad)
    assert {6 * failure.batch + failure.position for failure in report.failures} <= set(bad)
    assert all(1 <= failure.attempts <= 3 for failure in report.failures)


def _broken_tile(s: Served, name: str, tile: int, **options: Any) -> BrokenBytes:
    """Break one tile of a band of the first day."""
    records = {record.id: record for record in s.images.iterate_records()}
    record = records[min(records)]
    table = record.band_metadata[f"{name}_metadata"]
    start, length = int(table["tile_offsets"][tile]), int(table["tile_byte_counts"][tile])
    path = str(record.assets[name]["href"]).rsplit("/", 1)[1]
    s.server.broken.append(BrokenBytes(path=path, start=start, stop=start + length, **options))
    return s.server.broken[-1]


@pytest.mark.parametrize(
    ("workers", "errors"),
    [(0, "raise"), (0, "retry"), (1, "raise"), pytest.param(1, "retry", marks=pytest.mark.slow)],
)
def test_what_is_raised_names_file_band_tile_and_address_without_secrets(
    served: Served, errors: str, workers: int
) -> None:
    """Also out of a worker; and the loader goes on with the batches after it."""
    dataset = _day(served, 1)
    queries = list(rm.GridAOISampler(dataset, 32))[:6]
    expected = list(rm.DataLoader(dataset, 1, sampler=queries))
    bad = _broken_tile(served, "B03", 2)
    iterator = iter(rm.DataLoader(dataset, 1, sampler=queries, errors=errors, num_workers=workers))
    got = [next(iterator), next(iterator)]
    with pytest.raises(ReadError) as caught:
        next(iterator)
    message = str(caught.value)
    for part in (bad.path, f"bytes {bad.start}-{bad.stop - 1}", "tile 2,", "band B03", served.server.url, "503"):
        assert part in message, part
    assert "HUSH" not in message
    assert ("2 attempts failed" in message) == (errors == "retry")
    served.server.broken.clear()
    _assert_equal([*got, *iterator], [expected[0], expected[1], *expected[3:]])


def _spoil(change: str) -> Callable[[Any], Any]:
    """A transform with a mistake in it."""
    errors: dict[str, Exception] = {
        "type": TypeError("mine"),
        "usage": UsageError("mine"),
        "index": NoOverlapError("mine"),
        "import": ImportError("mine"),
        "memory": MemoryError("mine"),
        "os": OSError("mine"),
    }

    def transform(sample: Any) -> Any:
        raise errors[change]

    return transform


@pytest.mark.parametrize("action", ["raise", "retry", "replace", "fill"])
@pytest.mark.parametrize("change", ["type", "usage", "index", "import", "memory", "os"])
def test_mistakes_raise_under_every_policy(served: Served, action: str, change: str) -> None:
    """Nothing but data faults is mended."""
    dataset = _images(served, transforms=_spoil(change))
    queries = list(rm.RandomAOISampler(dataset, 24, 4, seed=2))
    with pytest.raises(Exception, match="mine"):
        list(rm.DataLoader(dataset, 2, sampler=queries, errors=action))


@pytest.mark.parametrize("action", ["raise", "retry", "replace", "fill"])
def test_a_place_without_data_raises_under_every_policy(served: Served, action: str) -> None:
    """A query that the dataset does not have is the sampler's mistake; as is a band that is not there."""
    dataset = _images(served)
    x, y, t = dataset.bounds
    nowhere = (slice(x.start - 9000, x.start - 8000, 10.0), slice(y.start, y.start + 1000, 10.0), t)
    queries = [*rm.RandomAOISampler(dataset, 24, 3, seed=2), nowhere]
    with pytest.raises(NoOverlapError):
        list(rm.DataLoader(dataset, 2, sampler=queries, errors=action))


def test_a_replaced_sample_is_from_a_spare_place_of_its_own_aoi_where_there_is_one(served: Served) -> None:
    """The next spare that can be read and suffices; a good sample whose spares fail stays, and that is told."""
    dataset = _images(served)
    sampler = rm.RandomAOISampler(dataset, 24, 24, seed=4, aois=served.fields, min_valid=0.9)
    queries = list(sampler)
    assert all(len(query.spares) == 3 for query in queries)
    plain = _images(served)
    at = [[_without_spares(query), *(query.spare(k) for k in range(3))] for query in queries]
    good = [plain.__getitems__(places) for places in at]
    _break(served, 0.12, seed=3)
    lost = [set(_unreadable(_images(served), places)) for places in at]
    assert sum(0 in found for found in lost) > 3
    assert any(0 in found and 1 in found for found in lost)
    loader = rm.DataLoader(dataset, 6, sampler=queries, errors=rm.ErrorPolicy(action="replace", budget=None))
    batches = list(loader)
    expected = [next((k for k in range(4) if k not in found), None) for found in lost]
    whole = []
    for i, k in enumerate(expected):
        others = [*range(i + 1, i - i % 6 + 6), *range(i - i % 6, i)]
        j = i if k is not None else next(j for j in others if expected[j] is not None)
        whole.append(good[j][expected[j]])
    _assert_equal(batches, [rm.collate(whole[i : i + 6]) for i in range(0, 24, 6)])
    assert [6 * f.batch + f.position for f in loader.failures.failures] == [i for i in range(24) if 0 in lost[i]]
    for failure in loader.failures.failures:
        k = expected[6 * failure.batch + failure.position]
        assert failure.replacement == ("a spare place of its AOI" if k else failure.replacement)
        assert failure.outcome == "replaced"


def _without_spares(query: Any) -> Any:
    """The same place, asked for without more."""
    return type(query)(tuple(query), query.details._replace(spares=(), min_valid=0.0))


@pytest.mark.parametrize("action", ["retry", "replace", "fill"])
def test_a_spare_that_cannot_be_read_costs_no_sample(served: Served, action: str) -> None:
    """It is passed over and told, and counts for no budget; "retry" raises as without a policy."""
    dataset = _day(served, 11)
    x, y, t = dataset.bounds
    hole = (slice(x.start + 400, x.start + 640, 10.0), slice(y.stop - 640, y.stop - 400, 10.0), t)
    sampler = rm.RandomAOISampler(dataset, 24, 1, seed=4, min_valid={"min_valid": 0.9, "max_redraws": 1})
    (drawn,) = sampler
    bad_corner, good_corner = (x.start, y.stop), (x.start + 960, y.stop - 960)
    query = type(drawn)(hole, drawn.details._replace(spares=(bad_corner, good_corner), min_valid=0.9))
    path = next(r.path for r in _requests_of(served, dataset, drawn) if "B02" in r.path)
    table = next(iter(dataset.collection.iterate_records())).band_metadata["B02_metadata"]
    start = int(table["tile_offsets"][0])
    served.server.broken.append(BrokenBytes(path=path, start=start, stop=start + 1))
    loader = rm.DataLoader(
        dataset,
        2,
        sampler=[query, drawn],
        errors=rm.ErrorPolicy(action=action, budget=0 if action != "retry" else None),
    )
    if action == "retry":
        with pytest.raises(ReadError, match="tile 0"):
            list(loader)
        return
    (batch,) = loader
    assert torch.equal(batch["image"][0], dataset[query.spare(1)]["image"])
    assert loader.failures.outcomes == {"passed over": 1}
    assert loader.failures.failures[0].errors[0].tile == 0


def _requests_of(s: Served, dataset: Any, query: Any) -> list[Any]:
    s.server.requests.clear()
    _ = dataset[_without_spares(query)]
    return list(s.server.requests)


def test_a_batch_without_a_good_sample_is_filled_or_raised(served: Served) -> None:
    """There is nothing to replace with."""
    dataset = _day(served, 1)
    queries = list(rm.GridAOISampler(dataset, 32))[:4]
    for tile in range(4):
        _broken_tile(served, "B02", tile)
    with pytest.raises(ReadError, match="no other sample of its batch"):
        list(rm.DataLoader(dataset, 4, sampler=queries, errors="replace"))
    loader = rm.DataLoader(dataset, 4, sampler=queries, errors={"action": "fill", "budget": 1.0})
    (batch,) = loader
    assert not batch["mask_valid"].any()
    assert not batch["image"].any()
    assert batch["draw"].tolist() == [list(query.draw) for query in queries]
    assert loader.failures.outcomes == {"filled": 4}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_budget_ends_the_pass_at_the_same_batch_whatever_is_read_ahead(served: Served, workers: int) -> None:
    """A count: the batch with the failure beyond it is not handed over, and the error sums up what failed."""
    dataset = _images(served)
    queries = list(rm.RandomAOISampler(dataset, 24, 40, seed=2))
    _break(served, 0.12, seed=3)
    bad = _unreadable(dataset, queries)
    assert len(bad) > 6
    errors = rm.ErrorPolicy(action="fill", retries=0, budget=4)
    loader = rm.DataLoader(dataset, 4, sampler=queries, errors=errors, num_workers=workers)
    got = []
    with pytest.raises(ErrorBudgetError) as caught:
        got.extend(loader)
    assert len(got) == bad[4] // 4
    message = str(caught.value)
    report = loader.failures
    assert f"at most 4 of the samples): {report.failed} of {4 * len(got) + 4} samples" in message
    for part in ("ServerError", "S_202308", "tile ", served.server.url, "errors= a larger budget"):
        assert part in message, part
    assert "HUSH" not in message
    assert type(ErrorBudgetError(message)) is type(caught.value)


def test_each_pass_has_its_own_budget(served: Served) -> None:
    """What an earlier one used up is not missing in a later one."""
    dataset = _day(served, 1)
    queries = list(rm.GridAOISampler(dataset, 32))
    _broken_tile(served, "B02", 3)
    loader = rm.DataLoader(dataset, 5, sampler=queries, errors=rm.ErrorPolicy(action="fill", budget=1))
    for _ in range(3):
        assert len(list(loader)) == 5
        assert loader.failures.failed == 1


@pytest.mark.parametrize(
    ("budget", "failed", "samples", "ended", "allowed"),
    [
        (None, 10**6, 10**6, True, True),
        (0, 0, 10, False, True),
        (0, 1, 10, False, False),
        (3, 3, 10, False, True),
        (3, 4, 10**6, False, False),
        (1, 2, 10, True, False),
        (1.0, 10, 10, True, True),
        (0.0, 1, 10**6, False, False),
        (0.05, 10, 16, False, True),  # of 200, before the end
        (0.05, 11, 16, False, False),
        (0.05, 11, 220, False, True),
        (0.05, 12, 220, False, False),
        (0.05, 2, 39, True, False),
        (0.05, 2, 40, True, True),
        (0.05, 1, 2, True, True),  # one in any case
    ],
)
def test_what_a_budget_allows(budget: Any, failed: int, samples: int, ended: bool, allowed: bool) -> None:
    """Counts and shares."""
    spent = FailureBudget(rm.ErrorPolicy(action="fill", budget=budget))
    spent.report.samples, spent.report.outcomes["filled"] = samples, failed
    if allowed:
        spent._check(ended=ended)
    else:
        with pytest.raises(ErrorBudgetError):
            spent._check(ended=ended)


def test_a_share_is_held_to_at_the_end_of_a_short_pass(served: Served) -> None:
    """What was let pass at the start, as no rate yet, counts then."""
    dataset = _day(served, 1)
    queries = list(rm.GridAOISampler(dataset, 32))
    for tile in (0, 1, 2):
        _broken_tile(served, "B02", tile)
    loader = rm.DataLoader(dataset, 5, sampler=queries, errors={"action": "fill", "budget": 0.1})
    got = []
    with pytest.raises(ErrorBudgetError, match=r"at most 10\.00% of the samples\): 3 of 25 samples"):
        got.extend(loader)
    assert len(got) == 5
    assert len(list(rm.DataLoader(dataset, 5, sampler=queries, errors={"action": "fill", "budget": 0.12}))) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        "ignore",
        "",
        3,
        True,
        ["fill"],
        {"action": "fill", "retry": 3},
        {"action": "fill", "retries": -1},
        {"action": "fill", "retries": True},
        {"action": "retry", "retries": 0},
        {"action": "fill", "budget": -1},
        {"action": "fill", "budget": 1.5},
        {"action": "fill", "budget": float("nan")},
        {"action": "fill", "budget": True},
        {"action": "fill", "budget": "5%"},
        {"action": "raise", "budget": 3},
        {"retries": 3},
    ],
)
def test_policies_that_cannot_be_are_refused_at_the_door(served: Served, wrong: Any) -> None:
    """Before anything is read."""
    with pytest.raises(UsageError, match=r"errors=|retries=|budget="):
        rm.DataLoader(_images(served), 4, sampler=[], errors=wrong)


def test_policies_that_have_nothing_to_work_on_are_refused(served: Served) -> None:
    """No batch, or no other sample in it."""
    dataset = _images(served)
    with pytest.raises(UsageError, match="batch_size="):
        rm.DataLoader(dataset, None, sampler=[], errors="fill")
    with pytest.raises(UsageError, match="batch_size=1 has none"):
        rm.DataLoader(dataset, sampler=[], errors="replace")


@pytest.mark.parametrize("given", ["fill", {"action": "fill"}, rm.ErrorPolicy(action="fill")])
def test_a_policy_is_a_word_a_mapping_or_itself(served: Served, given: Any) -> None:
    """And the loader can be rebuilt from its attributes, as Lightning does."""
    loader = rm.DataLoader(_images(served), 4, sampler=[], errors=given)
    again = rm.DataLoader(loader.dataset, 4, sampler=[], errors=loader.errors)
    assert again.errors == loader.errors == rm.ErrorPolicy(action="fill", retries=1, budget=0.05)
    assert rm.DataLoader(_images(served), 4, sampler=[]).errors == rm.ErrorPolicy()


def test_a_pass_ends_with_a_report_in_the_log_and_is_never_silent(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """The first failure at once, the sum at the end, or when the pass is left; nothing where nothing failed."""
    caplog.set_level(logging.INFO, logger="rasteret_ml.loader")
    dataset = _day(served, 1)
    queries = list(rm.GridAOISampler(dataset, 32))
    loader = rm.DataLoader(dataset, 5, sampler=queries, errors={"action": "fill", "budget": 3})
    assert loader.failures.failed == loader.failures.samples == 0
    list(loader)
    assert not caplog.records
    assert str(loader.failures) == "all 25 samples were read"
    _broken_tile(served, "B02", 7)
    _broken_tile(served, "B03", 7)
    _broken_tile(served, "B03", 20)
    iterator = iter(loader)
    next(iterator)
    assert not caplog.records
    next(iterator)
    (first,) = caplog.messages
    assert "batch 1, sample 2 " in first
    assert "was filled" in first
    list(iterator)
    assert caplog.messages[1:] == [str(loader.failures)]
    for part in ("2 of 25 samples", "8.00%", "filled 2", "ServerError 3", "_B03.tif 2", "position 7"):
        assert part in caplog.messages[1], part
    assert "HUSH" not in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    caplog.clear()
    for number, _ in enumerate(loader):
        if number == 2:
            break
    assert len(caplog.messages) == 2
    assert "1 of 15 samples" in caplog.messages[1]
    assert loader.failures.failed == 1


def test_two_bands_of_one_sample_are_one_failure_with_two_faults(served: Served) -> None:
    """And a sample that failed by many tiles tells the first of them."""
    dataset = _day(served, 1)
    _broken_tile(served, "B02", 0)
    _broken_tile(served, "B03", 0)
    loader = rm.DataLoader(dataset, 2, sampler=list(rm.GridAOISampler(dataset, 32))[:2], errors="fill")
    list(loader)
    (failure,) = loader.failures.failures
    assert {error.band for error in failure.errors} == set(BANDS)
    assert failure.attempts == 2
    for tile in range(1, 25):
        _broken_tile(served, "B02", tile)
    loader = rm.DataLoader(dataset, 2, sampler=list(rm.GridAOISampler(dataset, 160)), errors="fill")
    list(loader)
    (failure,) = loader.failures.failures
    assert len(failure.errors) + failure.more == 26
    assert len(failure.errors) == 16


@pytest.mark.parametrize("action", ["replace", "fill"])
def test_a_users_collate_function_and_a_wrapping_dataset_lose_nothing(served: Served, action: str) -> None:
    """Whatever a batch is made into, and whoever passes the samples on."""

    class Wrapped(torch.utils.data.Dataset[Any]):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getitems__(self, queries: Any) -> list[Any]:
            return [dict(sample) for sample in self.inner.__getitems__(queries)]

    dataset = _images(served)
    queries = list(rm.RandomAOISampler(dataset, 24, 20, seed=2))
    _break(served, 0.05, seed=3)
    bad = _unreadable(dataset, queries)
    errors = rm.ErrorPolicy(action=action, budget=None)
    expected = list(rm.DataLoader(dataset, 5, sampler=queries, errors=errors))
    loader = rm.DataLoader(Wrapped(dataset), 5, sampler=queries, errors=errors, collate_fn=tuple, num_workers=2)
    batches = list(loader)
    assert [type(batch) for batch in batches] == [tuple] * 4
    _assert_equal([rm.collate(batch) for batch in batches], expected)
    assert [5 * failure.batch + failure.position for failure in loader.failures.failures] == bad


def test_torch_own_loader_and_plain_reading_raise_as_ever(served: Served) -> None:
    """A policy is the loader's, not the dataset's."""
    dataset = _day(served, 1)
    queries = list(rm.GridAOISampler(dataset, 32))[:3]
    _broken_tile(served, "B02", 1)
    list(rm.DataLoader(dataset, 3, sampler=queries, errors="fill"))
    with pytest.raises(ReadError, match="HTTP 503"):
        dataset.__getitems__(queries)
    with pytest.raises(ReadError, match="HTTP 503"):
        list(torch.utils.data.DataLoader(dataset, 3, sampler=queries, collate_fn=rm.collate))


def test_pinning_keeps_what_is_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's pinning thread asks an object that it does not know to pin itself."""
    from torch.utils.data._utils.pin_memory import pin_memory

    import rasteret_ml.loader.failures as failures

    monkeypatch.setattr(failures, "pin_memory", lambda batch: {key: value + 1 for key, value in batch.items()})
    carried = BatchWithErrors(batch={"a": torch.zeros(1)}, samples=3, errors=())
    pinned = pin_memory(carried)
    assert pinned.batch["a"].tolist() == [1]
    assert (pinned.samples, pinned.errors) == (3, ())


@pytest.mark.parametrize("composite", [None, "median"])
def test_what_cannot_be_decoded_and_what_does_not_go_together_are_faults_as_well(
    tmp_path: Path, composite: str | None
) -> None:
    """A spoilt tile, and records of different scales, each cost only the samples that meet them."""
    rng = np.random.default_rng(1)
    for day, col in (("20230801", 0), ("20230805", 32)):
        pixels = rng.integers(1, 9000, (1, 96, 96 - col), np.uint16)
        if col:
            pixels[:, :, :16] = 0
        place = Affine(10.0, 0.0, 500000.0 + 10 * col, 0.0, -10.0, 5000000.0)
        path = Path(make_cog(tmp_path / f"S_{day}_A.tif", pixels, transform=place, nodata=0, blocksize=32))
    path = tmp_path / "S_20230801_A.tif"
    table = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A"]).to_table()
    rows = table["A_metadata"].to_pylist()
    start = rows[0]["tile_offsets"][3]
    rows[1] |= {"scale": 0.5, "offset": 0.0}
    column = pa.array(rows, table["A_metadata"].type)
    collection = Collection(table.set_column(table.schema.get_field_index("A_metadata"), "A_metadata", column))

    def make() -> rm.RasteretDataset:
        return rm.RasteretDataset(collection, ["A"], composite=composite)

    queries = list(rm.GridAOISampler(make(), 32))
    strict: list[Any] = []
    stamp, content = path.stat(), bytearray(path.read_bytes())
    content[start : start + 20] = bytes(20)
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    for query in queries:
        try:
            strict.append(make()[query])
        except (ReadError, DataError) as error:
            strict.append(error)
    bad = [i for i, found in enumerate(strict) if isinstance(found, Exception)]
    assert bad == ([1, 3, 4, 7] if composite is None else [1, 2, 3, 4, 5, 7, 8])
    loader = rm.DataLoader(make(), 9, sampler=queries, errors={"action": "fill", "budget": None})
    (batch,) = loader
    for i, found in enumerate(strict):
        image, valid = batch["image"][i], batch["mask_valid"][i]
        if i in bad:
            assert not image.any()
            assert not valid.any()
            (error,) = loader.failures.failures[bad.index(i)].errors
            reason = error.error if isinstance(error, TileError) else error
            assert str(reason) in str(found)
            assert type(reason).__name__ == ("CorruptTiffError" if i == 3 else "DataError")
        else:
            assert torch.equal(image, found["image"])
            assert torch.equal(valid, found["mask_valid"])
    assert loader.failures.kinds == {"DataError": len(bad) - 1, "CorruptTiffError": 1}
    assert loader.failures.files == {str(path): 1}


def test_a_side_of_a_union_that_failed_states_nothing_that_contradicts_the_other(served: Served) -> None:
    """Both state the same scale; a blank that states none must not be refused as another one."""
    table = served.images.to_table()
    for band in BANDS:
        name = f"{band}_metadata"
        rows = [row | {"scale": 0.5, "offset": 1.0} for row in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(rows, table[name].type))
    scaled = Collection(table)
    sides = [
        rm.RasteretDataset(scaled.subset(date_range=(day, day)), BANDS, reading={"limits": ONCE})
        for day in ("2023-08-01", "2023-08-11")
    ]
    dataset = sides[0] | sides[1]
    queries = list(rm.GridAOISampler(dataset, 32))[:5]
    good = dataset.__getitems__(queries)
    _broken_tile(served, "B02", 3)
    (batch,) = rm.DataLoader(dataset, 5, sampler=queries, errors="fill")
    assert _equal(batch, _mended("fill", good, [3], dataset, 5)[0])
    assert batch["scale"].tolist() == [[0.5, 0.5]] * 3 + [[1.0, 1.0]] + [[0.5, 0.5]]


@pytest.mark.parametrize("action", ["replace", "fill"])
def test_a_server_that_fails_one_range_in_twenty(served: Served, action: str) -> None:
    """Acceptance 8: the budget is kept, the report is complete, each of two ranks has its count of samples."""
    dataset = _images(served)
    whole = list(rm.RandomAOISampler(dataset, 24, 80, seed=2))
    expected = {query.draw: dataset[query] for query in whole}
    served.server.error_rate = 0.05
    for rank in range(2):
        served.server.requests.clear()
        errors = rm.ErrorPolicy(action=action, retries=0, budget=0.5)
        loader = rm.DataLoader(dataset, 8, sampler=whole[rank::2], errors=errors, num_workers=2)
        batches = list(loader)
        report = loader.failures
        assert [len(batch["image"]) for batch in batches] == [8] * 5
        assert report.samples == 40
        assert 0 < report.failed <= 20
        refused = {request.path for request in served.server.requests if request.failed}
        assert {name.rsplit("/", 1)[1].split("?")[0] for name in report.files} <= refused
        asked = [query.draw for query in whole[rank::2]]
        failed = {8 * failure.batch + failure.position for failure in report.failures}
        assert {failure.draw for failure in report.failures} == {asked[i] for i in failed}
        for i, draw in enumerate(asked):
            batch = {key: value[i % 8] for key, value in batches[i // 8].items()}
            if i in failed and action == "fill":
                assert tuple(batch["draw"].tolist()) == draw
                assert not batch["mask_valid"].any()
            else:
                assert (tuple(batch["draw"].tolist()) == draw) == (i not in failed)
                good = rm.collate([expected[tuple(batch["draw"].tolist())]])
                assert _equal(batch, {key: value[0] for key, value in good.items()})


@pytest.mark.parametrize("action", ["replace", "fill"])
def test_ranks_stay_even_and_what_evens_them_out_neither_fails_nor_stands_in(served: Served, action: str) -> None:
    """25 chips on 2 ranks are 13 each, the last one blank: its ground is broken, and nobody minds."""
    dataset = _day(served, 1)
    _broken_tile(served, "B02", 0)
    _broken_tile(served, "B03", 23)
    for rank in range(2):
        sampler = rm.GridAOISampler(dataset, 32)
        sampler.ranks = Ranks(count=2, rank=rank)
        asked = [tuple(query) for query in sampler]
        blank = [query.blank for query in sampler]
        loader = rm.DataLoader(dataset, 13, sampler=sampler, errors={"action": action, "budget": None})
        (batch,) = loader
        assert len(batch["image"]) == len(asked) == 13
        assert blank == [False] * 12 + [rank == 1]
        lost = {0: 0, 1: 11}[rank]
        assert [failure.position for failure in loader.failures.failures] == [lost]
        assert loader.failures.failures[0].replacement == (None if action == "fill" else f"sample {(lost + 1) % 12}")
        empty = {i for i, valid in enumerate(batch["mask_valid"]) if not valid.any()}
        assert empty == ({lost} if action == "fill" else set()) | ({12} if rank == 1 else set())


def test_a_pass_that_its_budget_ended_is_taken_up_at_the_batch_that_was_not_handed_over(served: Served) -> None:
    """So that nothing is lost once what was at fault is mended."""
    dataset = _day(served, 1)
    sampler = rm.RandomAOISampler(dataset, 32, 20, seed=1)
    expected = list(rm.DataLoader(dataset, 4, sampler=sampler))
    _break(served, 0.04, seed=1)
    loader = rm.DataLoader(dataset, 4, sampler=sampler, errors={"action": "fill", "budget": 2})
    sampler.set_epoch(0)
    got = []
    with pytest.raises(ErrorBudgetError):
        got.extend(loader)
    assert 0 < len(got) < 5, "the test has something to tell"
    state = loader.state_dict()
    served.server.broken.clear()
    fresh = rm.RandomAOISampler(dataset, 32, 20, seed=1)
    again = rm.DataLoader(dataset, 4, sampler=fresh)
    again.load_state_dict(state)
    _assert_equal(list(again), expected[len(got) :])


def test_the_failing_server_fails_the_same_ranges_in_every_run(tmp_path: Path) -> None:
    """A function of seed, path, range and attempt; about the requested share."""
    (tmp_path / "a.bin").write_bytes(bytes(400_000))

    async def read_all(url: str) -> list[bool]:
        refused = []
        async with rm.open_reader(ONCE) as reader:
            for _ in range(2):
                for start in range(0, 400_000, 1000):
                    try:
                        await reader.read(f"{url}/a.bin", ByteRange(start, 1000))
                        refused.append(False)
                    except ServerError:
                        refused.append(True)
        return refused

    runs = []
    for seed in (0, 0, 1):
        with RangeServer(tmp_path, error_rate=0.05, seed=seed) as server:
            runs.append(asyncio.run(read_all(server.url)))
            assert [request.failed for request in server.requests] == runs[-1]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][:400] != runs[0][400:]
    assert 20 <= sum(runs[0]) <= 60


def test_counts_stay_bounded_however_much_fails() -> None:
    """A thousand failures are kept and as many files named; all are counted."""
    budget = FailureBudget(rm.ErrorPolicy(action="fill", budget=None))
    for batch in range(1500):
        error = TileError(
            record="r",
            band="B1",
            href=f"https://h/{batch}.tif",
            image="full resolution",
            tile=0,
            range=ByteRange(0, 1),
            error=ServerError("no"),
        )
        failure = SampleError(
            batch=batch,
            position=0,
            draw=None,
            aoi=None,
            outcome="filled",
            replacement=None,
            attempts=1,
            errors=(error,),
            more=0,
        )
        budget.receive(BatchWithErrors(batch=None, samples=2, errors=(failure,)))
    report = budget.report
    assert (report.samples, report.failed) == (3000, 1500)
    assert [failure.batch for failure in report.failures] == list(range(1000))
    assert len(report.files) == 1001
    assert report.files["others"] == 500
    assert "1500 of 3000 samples" in str(report)
    assert len(str(report)) < 1000
