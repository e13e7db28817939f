"""A pass can be stopped and taken up anywhere, with other workers, on other ranks: the rest is the same bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
import torch
from conftest import BANDS, Scenes

import rasteret_ml as rm
from rasteret_ml.errors import ResumeError
from rasteret_ml.samplers.ranks import Ranks
from rasteret_ml.testing import batch_digest, check_resume, make_cog

SIZE, BATCH = 32, 4


def fields() -> gpd.GeoDataFrame:
    """Seven squares with classes in the scenes."""
    rng = np.random.default_rng(3)
    corners = rng.uniform(0, 2500, (7, 2))
    boxes = [shapely.box(500000 + x, 5000000 - y - 300, 500300 + x, 5000000 - y) for x, y in corners]
    return gpd.GeoDataFrame({"crop": list("abcabca")}, geometry=boxes, crs=32633)


def samplers() -> dict[str, Callable[[Any], Any]]:
    """One of each kind, and of each order."""
    table = rm.AOITable.of(fields(), label="crop")
    return {
        "random": lambda ds: rm.RandomAOISampler(ds, SIZE, 18, seed=5),
        "random, local": lambda ds: rm.RandomAOISampler(ds, SIZE, 18, seed=5, locality=rm.Locality(blocks=3, lanes=2)),
        "balanced, valid": lambda ds: rm.RandomAOISampler(
            ds, SIZE, 18, table, balance=True, min_valid={"min_valid": 0.9, "max_redraws": 2}
        ),
        "grid": lambda ds: rm.GridAOISampler(ds, 150, 140),
        "each": lambda ds: rm.PerAOISampler(ds, SIZE, table, shuffle=True, placement="random", chips=2, seed=2),
        "each, whole": lambda ds: rm.PerAOISampler(ds, None, table, pad=2),
    }


def loader(scenes: Scenes, sampler: str = "random", **options: Any) -> rm.DataLoader:
    """Over images alone."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    return rm.DataLoader(dataset, batch_size=BATCH, sampler=samplers()[sampler](dataset), **options)


@pytest.mark.parametrize("sampler", list(samplers()))
def test_every_sampler_is_taken_up_at_every_step_of_two_epochs(scenes: Scenes, sampler: str) -> None:
    """The law, in one process."""
    assert check_resume(lambda: loader(scenes, sampler)) >= 5


@pytest.mark.parametrize("lookahead", [4, 0], ids=["lookahead", "no lookahead"])
@pytest.mark.parametrize(
    ("workers", "method"),
    [
        (0, None),
        *itertools.product((1, 2), ("fork", "forkserver")),
        *(pytest.param(workers, "spawn", marks=pytest.mark.slow) for workers in (1, 2)),
    ],
    ids=str,
)
def test_workers_start_methods_and_lookahead_do_not_matter(
    scenes: Scenes, workers: int, method: str | None, lookahead: int
) -> None:
    """Stopped three times with each, and taken up with other workers and the other lookahead."""
    count = (workers + 1) % 3
    context = "fork" if count else None
    others = loader(scenes, num_workers=count, lookahead=4 - lookahead, multiprocessing_context=context)
    stopped = loader(scenes, num_workers=workers, lookahead=lookahead, multiprocessing_context=method)
    assert check_resume(lambda: stopped, make_resumed=lambda: others, stops=[2, 5, 8]) == 3


def test_labels_and_combinations_are_taken_up(scenes: Scenes) -> None:
    """The plan covers both sides; label and AOI come along."""

    def make(remap: dict[int, int] | None = None) -> rm.DataLoader:
        labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, labels={"remap": remap})
        both = rm.RasteretDataset(scenes.images, BANDS) & labels
        table = rm.AOITable.of(fields(), label="crop")
        return rm.DataLoader(both, batch_size=3, sampler=rm.RandomAOISampler(both, SIZE, 8, table), lookahead=2)

    assert check_resume(make) == 7
    state = make().state_dict()
    with pytest.raises(ResumeError, match="data"):
        make({1: 0}).load_state_dict(state)


def test_a_larger_batch_goes_on_at_the_same_chip(scenes: Scenes) -> None:
    """A position counts chips, not batches."""
    small, large = loader(scenes), loader(scenes)
    passing = iter(small)
    seen = [next(passing) for _ in range(2)]
    large.load_state_dict(small.state_dict())
    rest = list(large)
    positions = torch.cat([batch["draw"][:, 2] for batch in [*seen, *rest]])
    assert positions.tolist() == list(range(18))


def test_another_plan_is_refused_and_each_difference_is_named(scenes: Scenes, tmp_path: Path) -> None:
    """Sampler, size, seed, chips, records and bands."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    state = rm.DataLoader(dataset, sampler=rm.RandomAOISampler(dataset, SIZE, 18, seed=5)).state_dict()
    other = rm.RandomAOISampler(dataset, 48, 20, seed=6, placement="centre", locality=4)
    with pytest.raises(ResumeError) as caught:
        rm.DataLoader(dataset, sampler=other).load_state_dict(state)
    for name in ("chips: 18 then, 20 now", "seed: 5 then, 6 now", "size: [32, 32]", "locality", "options"):
        assert name in str(caught.value)
    with pytest.raises(ResumeError, match="GridAOISampler"):
        rm.DataLoader(dataset, sampler=rm.GridAOISampler(dataset, SIZE)).load_state_dict(state)
    fewer = rm.RasteretDataset(scenes.images.subset(date_range="2023-08-01/2023-08-05"), BANDS)
    one_band = rm.RasteretDataset(scenes.images, BANDS[:1])
    aois = rm.RandomAOISampler(dataset, SIZE, 18, fields(), seed=5)
    for data, sampler, name in (
        (fewer, rm.RandomAOISampler(dataset, SIZE, 18, seed=5), "data"),
        (one_band, rm.RandomAOISampler(dataset, SIZE, 18, seed=5), "data"),
        (dataset, aois, "coverage"),
    ):
        with pytest.raises(ResumeError, match=f"{name}:"):
            rm.DataLoader(data, sampler=sampler).load_state_dict(state)
    with pytest.raises(ResumeError, match="version"):
        rm.DataLoader(dataset, sampler=aois).load_state_dict(state | {"version": 0})


@pytest.mark.parametrize("kept", [(), ("epoch",), ("version", "plan", "epoch")])
def test_half_a_state_is_refused(scenes: Scenes, kept: tuple[str, ...]) -> None:
    """It is no reason to begin anew."""
    found = loader(scenes)
    state = found.state_dict()
    with pytest.raises(ResumeError, match="state"):
        found.load_state_dict({key: state[key] for key in kept})
    with pytest.raises(ResumeError, match="state"):
        found.load_state_dict(None)  # type: ignore[arg-type]


def test_a_collection_that_was_moved_is_the_same_plan(tmp_path: Path) -> None:
    """Records are told by id and time, not by where their files are."""
    states = []
    for name in ("here", "there"):
        made = make_cog(tmp_path / name / "S_20230801.tif", np.ones((1, 64, 64), np.uint8), blocksize=32)
        dataset = rm.RasteretDataset(rm.build([made], tmp_path / name / "c.parquet", progress=False), ["B1"])
        states.append(rm.DataLoader(dataset, sampler=rm.RandomAOISampler(dataset, 8, 4)).state_dict())
    assert states[0] == states[1]


def test_a_chosen_epoch_wins_over_the_position_in_another_one(scenes: Scenes) -> None:
    """Lightning chooses the epoch after the iterator is made: what was left of an epoch that it ended is not read."""
    first = loader(scenes)
    next(iter(first))
    state = first.state_dict()
    for epoch, start in ((0, BATCH), (1, 0)):
        again = loader(scenes)
        again.load_state_dict(state)
        passing = iter(again)
        again.sampler.set_epoch(epoch)
        assert next(passing)["draw"][0].tolist() == [5, epoch, start]


def test_a_sampler_that_cannot_be_taken_up_says_so(scenes: Scenes) -> None:
    """Never in silence."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    plain = rm.DataLoader(dataset, sampler=list(rm.GridAOISampler(dataset, 200)))
    state = json.loads(json.dumps(plain.state_dict()))
    with pytest.warns(UserWarning, match="starts anew"):
        plain.load_state_dict(state)
    assert len(list(plain)) == len(plain)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdata_takes_samplers_up(scenes: Scenes) -> None:
    """Under StatefulDataLoader, which asks the sampler itself."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    dataset = rm.RasteretDataset(scenes.images, BANDS)

    def make(workers: int) -> Any:
        sampler = rm.RandomAOISampler(dataset, SIZE, 18, seed=5)
        return stateful(dataset, batch_size=BATCH, sampler=sampler, collate_fn=rm.collate, num_workers=workers)

    whole = [batch_digest(batch) for batch in make(0)]
    for workers, stop in itertools.product((0, 2), (1, 3, 5)):
        stopped = make(workers)
        passing = iter(stopped)
        seen = [batch_digest(next(passing)) for _ in range(stop)]
        again = make(workers)
        again.load_state_dict(stopped.state_dict())
        assert seen + [batch_digest(batch) for batch in again] == whole


def test_ranks_may_change_at_any_global_batch(scenes: Scenes) -> None:
    """2, then 1, then 4 ranks: the global batches are those of one rank throughout."""
    alone = [batch["draw"][:, 2].tolist() for batch in loader(scenes)]
    seen: list[list[int]] = []
    state = None
    for count, steps in ((2, 2), (1, 1), (4, 1)):
        loaders = []
        for rank in range(count):
            dataset = rm.RasteretDataset(scenes.images, BANDS)
            sampler = samplers()["random"](dataset)
            sampler.ranks = Ranks(count=count, rank=rank)
            loaders.append(rm.DataLoader(dataset, batch_size=BATCH // count, sampler=sampler))
            if state is not None:
                loaders[-1].load_state_dict(state)
        passes = [iter(one) for one in loaders]
        for _ in range(steps):
            seen.append(sorted(p for one in passes for p in next(one)["draw"][:, 2].tolist()))
        states = [one.state_dict() for one in loaders]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert seen == alone[:4]
