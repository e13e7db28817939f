"""Several processes make one map, whichever of them did what."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio

import rasteret_ml as rm
from rasteret_ml.testing import make_cog

pytestmark = pytest.mark.dist

SCRIPT = """
import os, sys
import torch
import rasteret_ml as rm

torch.set_num_threads(1)
collection, folder = sys.argv[1:]
rm.RasteretDataset, rm.DataLoader, rm.GridAOISampler, rm.predict_map, rm.Collection  # imported once
runs = 0

def rank_of(run, rank, count, name, size, fail, options):
    meeting = f"file://{folder}/store-{run}"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    dataset = rm.RasteretDataset(rm.Collection.open(collection), ["a", "b"])
    loader = rm.DataLoader(dataset, batch_size=3, sampler=rm.GridAOISampler(dataset, size, size * 5 // 8))
    seen = []

    def model(image):
        seen.append(len(image))
        if fail is not None and rank == fail[0] and len(seen) == fail[1]:
            raise RuntimeError("no memory")
        return image

    try:
        found = [os.path.basename(p) for p in rm.predict_map(model, loader, f"{folder}/{name}.tif", **options)]
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    with open(f"{folder}/runs.txt", "a") as file:  # gloo prints to stdout
        file.write(repr((name, count, rank, sum(seen), found)) + "\\n")
    torch.distributed.destroy_process_group()

def run(count, name, size=64, fail=None, **options):
    global runs
    runs += 1
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            rank_of(runs, rank, count, name, size, fail, options)
            os._exit(0)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert status == 0, status

run(2, "centre", merge="centre")
run(3, "blend", output="scores", memory_bytes=1)
run(2, "again", fail=(1, 4), output="scores")
run(3, "again", fail=(0, 3), output="scores", save_seconds=0)
run(1, "again", output="scores")
run(2, "one", size=512)
run(2, "other", fail=(0, 2))
run(2, "other", output="scores")
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two bands of 300 x 420 pixels with a hole."""
    folder = tmp_path_factory.mktemp("scene")
    pixels = np.random.default_rng(1).integers(1, 1000, (2, 300, 420), np.uint16)
    pixels[:, 40:90, 100:190] = 0
    make_cog(folder / "S2_20230815.tif", pixels, nodata=0, blocksize=64, descriptions=("a", "b"))
    collection = rm.build(str(folder / "S2_20230815.tif"), folder / "scene.parquet")
    return rm.RasteretDataset(collection, ["a", "b"])


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    """What each rank of each run says, and where the maps are."""
    folder = tmp_path_factory.mktemp("maps")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, dataset.collection.path, folder],
        env=os.environ | {"PYTHONPATH": str(Path(rm.__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, [ast.literal_eval(line) for line in (folder / "runs.txt").read_text().splitlines()]


def chips_and_ends(runs, name, count):
    """Chips that each rank saw, and how it ended."""
    own = sorted((rank, chips, end) for n, c, rank, chips, end in runs[1] if (n, c) == (name, count))
    assert [rank for rank, *_ in own] == list(range(count))
    return [chips for _, chips, _ in own], [end for *_, end in own]


def whole(dataset, path, size=64, **options):
    """The same by one process."""
    loader = rm.DataLoader(dataset, batch_size=3, sampler=rm.GridAOISampler(dataset, size, size * 5 // 8))
    (written,) = rm.predict_map(lambda image: image, loader, path, **options)
    return pixels_of(written)


def pixels_of(path):
    """What is in a file."""
    with rasterio.open(path) as file:
        return file.read()


def test_two_ranks_share_the_chips(runs, dataset, tmp_path):
    """Each its half; the nearest chip does not depend on them."""
    assert chips_and_ends(runs, "centre", 2) == ([35, 35], [["centre.tif"]] * 2)
    np.testing.assert_array_equal(
        pixels_of(runs[0] / "centre.tif"), whole(dataset, tmp_path / "map.tif", merge="centre")
    )


def test_sums_of_three_ranks(runs, dataset, tmp_path):
    """Within float32, with a block in memory at a time."""
    assert chips_and_ends(runs, "blend", 3) == ([24, 23, 23], [["blend.tif"]] * 3)
    np.testing.assert_allclose(
        pixels_of(runs[0] / "blend.tif"), whole(dataset, tmp_path / "map.tif", output="scores"), rtol=1e-5
    )


def test_a_rank_that_fails_and_others_that_go_on(runs, dataset, tmp_path):
    """All ranks fail, no chip is lost, and another number of ranks finishes the map."""
    chips, ends = chips_and_ends(runs, "again", 2)
    assert chips == [35, 12]
    assert "rank 1: RuntimeError: no memory" in ends[0]
    assert ends[1] == "RuntimeError: no memory"
    # 26 are left: all of the first rank's are there, and three batches of the second's.
    chips, ends = chips_and_ends(runs, "again", 3)
    assert chips == [9, 9, 8]
    assert ends[0] == "RuntimeError: no memory"
    assert all("rank 0: RuntimeError: no memory" in end for end in ends[1:])
    assert chips_and_ends(runs, "again", 1) == ([3], [["again.tif"]])
    np.testing.assert_allclose(
        pixels_of(runs[0] / "again.tif"), whole(dataset, tmp_path / "map.tif", output="scores"), rtol=1e-5
    )
    assert not (runs[0] / "again.tif.parts").exists()


def test_more_ranks_than_chips(runs, dataset, tmp_path):
    """The others wait."""
    assert chips_and_ends(runs, "one", 2) == ([1, 0], [["one.tif"]] * 2)
    np.testing.assert_array_equal(pixels_of(runs[0] / "one.tif"), whole(dataset, tmp_path / "map.tif", 512))


def test_another_plan_is_refused_on_all_ranks(runs):
    """With the same words."""
    ends = [end for name, *_, end in runs[1] if name == "other"][2:]
    assert len(ends) == 2
    assert all("output: classes then, scores now" in end for end in ends)
