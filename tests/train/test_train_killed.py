"""A training that is killed goes on as if nothing had happened."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from forked import run_script

import rasteret_ml as rm
from rasteret_ml.testing import make_cog

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("kill_script.py")
EPOCHS = 3


def run(folder: Path, name: str, workers: int, batches: int, killed_at: int) -> int:
    """The script's exit status; a signal's number is negative."""
    done = run_script(SCRIPT, folder, name, workers, batches, killed_at, cwd=folder, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


@pytest.mark.parametrize(("batches", "stops"), [(8, (5, 10, 17)), (6, (7, 13, 16))], ids=["whole epochs", "cut short"])
def test_a_run_killed_three_times_ends_with_the_same_samples_and_weights(
    tmp_path: Path, batches: int, stops: tuple[int, ...]
) -> None:
    """Of 8 steps an epoch, or cut to 6, with a checkpoint each 3: from its middle and from its end, other workers."""
    pixels = np.random.default_rng(0).integers(1, 999, (1, 200, 200), np.uint16)
    make_cog(tmp_path / "i.tif", pixels, blocksize=128, nodata=0)
    rm.build([str(tmp_path / "i.tif")], tmp_path / "images.parquet", datetime=None, progress=False)
    assert run(tmp_path, "whole", 1, batches, -1) == 0
    for turn, stop in enumerate(stops):
        assert run(tmp_path, "killed", turn, batches, stop) == -signal.SIGKILL
    assert run(tmp_path, "killed", 1, batches, -1) == 0
    whole, killed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed"))
    assert whole["seen"] == [[9, epoch, position] for epoch in range(EPOCHS) for position in range(3 * batches)]
    assert killed["seen"] == whole["seen"]
    assert killed["weights"] == whole["weights"]
