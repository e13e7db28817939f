"""Several ranks: what each is dealt, through Lightning and without, over gloo on this machine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from forked import run_script

import rasteret_ml as rm
from rasteret_ml.testing import make_cog

pytestmark = pytest.mark.dist

SCRIPT = Path(__file__).with_name("ranks_script.py")
LENGTH, SIDE = 22, 170
LIMIT = 240
"""Seconds after which a run hangs."""


def run(task: str, folder: Path, *arguments: Any, fails: bool = False) -> str:
    """The script, within the limit; what it wrote to standard error."""
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    done = run_script(SCRIPT, task, folder, *arguments, cwd=folder, env=environment, timeout=LIMIT)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """170 x 170 pixels: 4 x 4 chips of 50, so that two ranks divide them, and three do not."""
    rng = np.random.default_rng(0)
    make_cog(tmp_path / "i.tif", rng.integers(1, 999, (1, SIDE, SIDE), np.uint16), blocksize=128, nodata=0)
    make_cog(tmp_path / "l.tif", rng.integers(0, 3, (1, SIDE, SIDE), np.uint8), blocksize=128, nodata=255)
    rm.build([str(tmp_path / "i.tif")], tmp_path / "images.parquet", datetime=None, progress=False)
    rm.build([str(tmp_path / "l.tif")], tmp_path / "labels.parquet", datetime=None, progress=False)
    return tmp_path


def lines(folder: Path, stage: str, ranks: int) -> list[list[Any]]:
    """What each rank saw."""
    files = [folder / f"{stage}_{rank}.jsonl" for rank in range(ranks)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(("ranks", "wrapped", "loader"), [(2, True, "ours"), (3, False, "ours"), (2, True, "torch")])
def test_lightning_deals_disjoint_equal_shares(folder: Path, ranks: int, wrapped: bool, loader: str) -> None:
    """Whether Lightning is to make samplers distributed or not; epochs differ; validation counts each pixel once."""
    run("fit", folder, ranks, wrapped, loader)
    train = lines(folder, "train", ranks)
    for epoch in (0, 1):
        dealt = [[tuple(d) for line in rank if line["epoch"] == epoch for d in line["draws"]] for rank in train]
        assert {len(share) for share in dealt} == {LENGTH // ranks}
        together = [draw for share in dealt for draw in share]
        assert sorted(together) == [(7, epoch, position) for position in range(LENGTH // ranks * ranks)]
    for epoch in (0, 1):
        seen: Counter[int] = Counter()
        batches = [[line for line in rank if line["epoch"] == epoch] for rank in lines(folder, "val", ranks)]
        assert len({sum(len(line["draws"]) for line in rank) for rank in batches}) == 1
        for line in (line for rank in batches for line in rank):
            for (_, _, position), counted in zip(line["draws"], line["counted"], strict=True):
                seen[position] += counted
        assert sum(seen.values()) == SIDE**2
        assert all((counted > 0) == (position < 16) for position, counted in seen.items())


def test_ranks_change_between_global_batches(folder: Path) -> None:
    """2, then 1, then 4 ranks over gloo see the batches that one rank sees, each chip once."""
    state, seen = "", []
    for ranks, steps in ((2, 2), (1, 1), (4, 2)):
        run("deal", folder, ranks, steps, state)
        found = [json.loads((folder / f"dealt_{ranks}_{rank}.json").read_text()) for rank in range(ranks)]
        for step in range(steps):
            seen.append(sorted(p for one in found for _, _, p in one["draws"][step]))
        assert all(one["state"] == found[0]["state"] for one in found)
        assert {one["length"] for one in found} == {-(-(LENGTH // ranks) // (4 // ranks))}
        state = json.dumps(found[0]["state"])
    assert seen == [list(range(4 * step, 4 * step + 4)) for step in range(5)]


@pytest.mark.parametrize("action", ["raise", "retry", "replace", "fill"])
def test_data_that_fail_on_some_ranks_leave_no_rank_waiting(folder: Path, action: str) -> None:
    """A tile that cannot be decoded: the run ends with the error, or goes on with as many samples on each rank."""
    image = folder / "i.tif"
    with tifffile.TiffFile(image) as file:
        start = file.pages[0].dataoffsets[3]
    data = bytearray(image.read_bytes())
    data[start : start + 64] = bytes(64)
    image.write_bytes(data)
    (folder / "images.parquet").unlink()
    rm.build([str(image)], folder / "images.parquet", datetime=None, progress=False)
    errors = run("fit", folder, 2, True, "ours", action, fails=action in ("raise", "retry"))
    if action in ("raise", "retry"):
        assert "i.tif" in errors
        assert "tile 3" in errors
        return
    dealt = [sum(len(line["draws"]) for line in rank) for rank in lines(folder, "train", 2)]
    assert dealt == [2 * (LENGTH // 2)] * 2
    validated = [line for rank in lines(folder, "val", 2) for line in rank]
    counted = sum(sum(line["counted"]) for line in validated if line["epoch"] == 0)
    assert counted < SIDE**2 if action == "fill" else counted > 0
