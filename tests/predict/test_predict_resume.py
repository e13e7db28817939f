"""A prediction that is ended goes on where it was, and ends with the same file."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

import rasteret_ml as rm
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.predict.prediction_map import PredictionMap
from rasteret_ml.testing import make_cog

CHIPS = 70
"""Of the grid over the scene."""

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import rasteret_ml as rm
from rasteret_ml.predict.rank_shard import load_progress

collection, folder = sys.argv[1:]
rm.RasteretDataset, rm.DataLoader, rm.GridAOISampler, rm.predict_map  # imported once

def run(name, kill_at, options):
    dataset = rm.RasteretDataset(rm.Collection.open(collection), ["a", "b"])
    loader = rm.DataLoader(dataset, batch_size=3, sampler=rm.GridAOISampler(dataset, 64, 40))
    batches = 0

    def model(image):
        nonlocal batches
        batches += 1
        if batches == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(f"{folder}/{name}.seen", "a") as file:
            file.write("x" * len(image))
        return image

    rm.predict_map(model, loader, f"{folder}/{name}.tif", save_seconds=0, block=128, **options)

for name, options in (("blend", {"output": "scores"}), ("centre", {"merge": "centre", "memory_bytes": 1})):
    for kill_at in (4, 7, 8, None):
        child = os.fork()  # nothing has threads yet
        if not child:
            run(name, kill_at, options)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        there = os.path.exists(f"{folder}/{name}.tif")
        progress = None if there else load_progress(Path(f"{folder}/{name}.tif.parts/shard-0"))
        done = None if there else (int(progress.done.sum()), len(progress.done))
        seen = os.path.getsize(f"{folder}/{name}.seen")
        print(repr((name, os.waitstatus_to_exitcode(status), there, seen, done)))
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


def loader_of(dataset, size=64, stride=40):
    """A grid of chips."""
    return rm.DataLoader(dataset, batch_size=3, sampler=rm.GridAOISampler(dataset, size, stride))


class Counting:
    """Bands as scores; how many chips it saw, and when it is to fail."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.chips, self.fail_at = 0, fail_at

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if self.fail_at is not None and self.chips >= self.fail_at:
            raise RuntimeError("the model fails")
        self.chips += len(image)
        return image


def pixels_of(path):
    """What is in a file."""
    with rasterio.open(path) as file:
        return file.read()


@pytest.mark.slow
def test_killed_three_times(dataset, tmp_path):
    """The same file, bit for bit, as one run's; each chip is predicted once, but for the batch that was not saved."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, dataset.collection.path, tmp_path],
        env=os.environ | {"PYTHONPATH": str(Path(rm.__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    runs = [ast.literal_eval(line) for line in process.stdout.splitlines()]
    assert [code for _, code, *_ in runs] == [-signal.SIGKILL] * 3 + [0] + [-signal.SIGKILL] * 3 + [0]
    for _, code, there, seen, done in runs:
        assert there == (code == 0)
        if not there:
            assert done == (seen, CHIPS)
        else:
            assert seen == CHIPS
    for name, options in (("blend", {"output": "scores"}), ("centre", {"merge": "centre"})):
        (whole,) = rm.predict_map(Counting(), loader_of(dataset), tmp_path / "whole.tif", block=128, **options)
        np.testing.assert_array_equal(pixels_of(tmp_path / f"{name}.tif"), pixels_of(whole))
        assert not (tmp_path / f"{name}.tif.parts").exists()


def test_an_error_loses_nothing(dataset, tmp_path):
    """What came before it is kept, though nothing was saved on the way."""
    path = tmp_path / "map.tif"
    with pytest.raises(RuntimeError, match="the model fails"):
        rm.predict_map(Counting(30), loader_of(dataset), path, version="1")
    rest = Counting()
    rm.predict_map(rest, loader_of(dataset), path, version="1")
    assert rest.chips == CHIPS - 30
    (whole,) = rm.predict_map(Counting(), loader_of(dataset), tmp_path / "whole.tif")
    np.testing.assert_array_equal(pixels_of(path), pixels_of(whole))


def test_what_is_interrupted_in_the_middle_of_a_chip_is_predicted_again(dataset, tmp_path, monkeypatch):
    """Ctrl-C while blocks are changed: half a chip counts as none."""
    path = tmp_path / "map.tif"
    (whole,) = rm.predict_map(Counting(), loader_of(dataset), tmp_path / "whole.tif", output="scores")
    from rasteret_ml.predict.blend import Blend

    added, plain = [], Blend.add

    def broken(self, *parts):
        added.append(1)
        plain(self, *parts)
        if len(added) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(Blend, "add", broken)
    with pytest.raises(KeyboardInterrupt):
        rm.predict_map(Counting(), loader_of(dataset), path, output="scores", save_seconds=0)
    monkeypatch.undo()
    rm.predict_map(Counting(), loader_of(dataset), path, output="scores")
    np.testing.assert_array_equal(pixels_of(path), pixels_of(whole))


def begun(dataset, path, **options):
    """A map of which 30 chips are predicted."""
    with pytest.raises(RuntimeError, match="the model fails"):
        rm.predict_map(Counting(30), loader_of(dataset), path, **options)


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({"output": "scores"}, (64, 40), "output: classes then, scores now"),
        ({"merge": "centre"}, (64, 40), "merge: blend then, centre now"),
        ({"version": "2"}, (64, 40), "version: 1 then, 2 now"),
        ({"nodata": 9}, (64, 40), "nodata: None then, 9 now"),
        ({"block": 128}, (64, 40), "block: 256 then, 128 now"),
        ({}, (64, 32), "chips: 70 of 64 x 64 pixels then, 117 of 64 x 64 pixels now; places"),
    ],
)
def test_another_plan_is_refused_by_what_differs(dataset, tmp_path, options, grid, message):
    """And nothing is lost."""
    path = tmp_path / "map.tif"
    begun(dataset, path, version="1")
    with pytest.raises(UsageError, match=message):
        rm.predict_map(Counting(), loader_of(dataset, *grid), path, **({"version": "1"} | options))
    rest = Counting()
    rm.predict_map(rest, loader_of(dataset), path, version="1")
    assert rest.chips == CHIPS - 30


def test_other_weights_are_another_plan(dataset, tmp_path):
    """A module is known by what it has learnt, or by the version that is given."""
    path, model = tmp_path / "map.tif", torch.nn.Conv2d(2, 3, 1)
    hook = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        rm.predict_map(model, loader_of(dataset), path)
    hook.remove()
    with pytest.raises(UsageError, match="version"):
        rm.predict_map(torch.nn.Conv2d(2, 3, 1), loader_of(dataset), path)
    rm.predict_map(model, loader_of(dataset), path)


def test_an_older_format_is_refused(dataset, tmp_path):
    """Both files that say their version: of the run, and of a shard."""
    path = tmp_path / "map.tif"
    begun(dataset, path)
    progress = path.with_name("map.tif.parts") / "shard-0" / "progress.npz"
    with np.load(progress) as file:
        fields = {name: file[name] for name in file.files}
    np.savez(progress, **(fields | {"fields": str(fields["fields"]).replace('"version": 2', '"version": 1')}))
    with pytest.raises(DataError, match="version 1, not 2"):
        rm.predict_map(Counting(), loader_of(dataset), path)
    plan = path.with_name("map.tif.parts") / "plan.json"
    plan.write_text(plan.read_text().replace('"format": "2"', '"format": "1"'))
    with pytest.raises(UsageError, match=r"format: 1 then, 2 now.*resume=False"):
        rm.predict_map(Counting(), loader_of(dataset), path)


def test_other_images_are_another_plan(dataset, tmp_path):
    """The same place is not enough."""
    path = tmp_path / "map.tif"
    begun(dataset, path)
    other = rm.RasteretDataset(dataset.collection, ["b", "a"])
    with pytest.raises(UsageError, match="another run: data: "):
        rm.predict_map(Counting(), loader_of(other), path)


def test_beginning_anew(dataset, tmp_path):
    """Is said, and forgets all."""
    path = tmp_path / "map.tif"
    begun(dataset, path, version="1")
    whole = Counting()
    rm.predict_map(whole, loader_of(dataset), path, version="2", resume=False)
    assert whole.chips == CHIPS


def test_a_finished_map_is_replaced(dataset, tmp_path):
    """At the end, in one step."""
    path = tmp_path / "map.tif"
    rm.predict_map(Counting(), loader_of(dataset), path)
    before = path.read_bytes()
    begun(dataset, path)
    assert path.read_bytes() == before
    rm.predict_map(lambda image: image.flip(1), loader_of(dataset), tmp_path / "other.tif")
    assert (tmp_path / "other.tif").read_bytes() != before


def test_another_number_of_planes_is_refused(dataset, tmp_path):
    """A function has no weights to be known by, but what it gives must stay the same."""
    path = tmp_path / "map.tif"
    begun(dataset, path)
    with pytest.raises(UsageError, match=r"channels=2.*channels=1"):
        rm.predict_map(lambda image: image[:, :1], loader_of(dataset), path)


def test_one_writer_at_a_time(dataset, tmp_path):
    """A second one is told, and the first goes on."""
    path, sampler = tmp_path / "map.tif", rm.GridAOISampler(dataset, 64, 40)
    with PredictionMap(path, sampler) as first:
        for batch in rm.DataLoader(dataset, batch_size=3, sampler=first.sampler):
            first.add(batch, batch["image"].float())
            if first.count_missing() == CHIPS - 3:
                with PredictionMap(path, sampler) as second, pytest.raises(UsageError, match="Another process"):
                    second.add(batch, batch["image"].float())
        assert first.count_missing() == 0
        first.finish()
    assert path.exists()


def test_missing_chips(dataset, tmp_path):
    """Are an error and kept, unless a partial map is asked for."""
    path, sampler = tmp_path / "map.tif", rm.GridAOISampler(dataset, 64, 40)
    with PredictionMap(path, sampler) as found:
        batch = next(iter(rm.DataLoader(dataset, batch_size=3, sampler=found.sampler)))
        with pytest.raises(UsageError, match=r"70 of 70 chips.*\(positions 0, 1, 2, 3, 4 …\)"):
            found.finish(allow_missing=True)
    with PredictionMap(path, sampler) as found:
        found.add(batch, batch["image"].float())
        with pytest.raises(UsageError, match=r"67 of 70 chips.*\(positions 3, 4, 5, 6, 7 …\)"):
            found.finish()
    with PredictionMap(path, sampler) as found:
        assert found.chip_count == 67
        assert found.finish(allow_missing=True) == [str(path)]
    known = pixels_of(path)[0] != 255
    assert known[:64, :144].sum() == known.sum() > 60 * 100


def test_a_broken_state_is_named(dataset, tmp_path):
    """Not taken for an empty one."""
    path = tmp_path / "map.tif"
    begun(dataset, path)
    (tmp_path / "map.tif.parts" / "shard-0" / "progress.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-0.*delete"):
        rm.predict_map(Counting(), loader_of(dataset), path)
