"""`trainer.predict` writes a map, on one device and on two, and goes on where it was."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from pathlib import Path

import jsonargparse
import lightning.pytorch as pl
import numpy as np
import pytest
import rasterio
import torch
from torch.nn.functional import one_hot

import rasteret_ml as rm
from rasteret_ml.errors import ResumeError, UsageError

BANDS = ["B02", "B03"]


class Odd(pl.LightningModule):
    """Pixels of odd numbers are class 1; a weight, so that it has some."""

    def __init__(self, form: str = "scores", stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.form, self.stop_at, self.chips = form, stop_at, 0

    def predict_step(self, batch, index):
        if self.stop_at is not None and index >= self.stop_at:
            raise RuntimeError("stopped")
        self.chips += len(batch["image"])
        odd = batch["image"][:, 0].round().long() % 2
        scores = one_hot(odd, 2).movedim(-1, 1).float()
        return {"scores": scores, "classes": odd, "dict": {"probabilities": scores}}[self.form]


def module(scenes, size=64, workers=0):
    """Pixels as they are."""
    return rm.RasteretDataModule(
        str(scenes.folder / "images.parquet"),
        bands=BANDS,
        split={"val_side": None},
        sampling={"size": size, "overlap": 16},
        loading={"batch_size": 4, "num_workers": workers},
        normalization={"mean": [0, 0], "std": [1, 1]},
    )


def trainer(folder, writer, **options):
    """Quiet, on the CPU."""
    return pl.Trainer(
        accelerator="cpu", callbacks=[writer], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def expected(scenes):
    """The newest valid scene, then the other; all is valid."""
    west = np.where(scenes.new[0] > 0, scenes.new[0], scenes.old[0])
    return np.concatenate([west, scenes.east[0]], axis=1) % 2


def pixels_of(path):
    """What is in a file."""
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.mark.parametrize(
    ("form", "options"),
    [("scores", {}), ("classes", {"merge": "centre"}), ("dict", {"key": "probabilities", "merge": "centre"})],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_is_written(scenes, tmp_path, form, options, workers):
    """It covers the whole area; predictions are not kept in memory; the datamodule's sampler is restored."""
    writer, data, model = rm.MapWriter(tmp_path / "map.tif", **options), module(scenes, workers=workers), Odd(form)
    assert trainer(tmp_path, writer).predict(model, datamodule=data) is None
    assert writer.paths == [str(tmp_path / "map.tif")]
    np.testing.assert_array_equal(pixels_of(writer.paths[0]), expected(scenes))
    assert isinstance(data.predict_sampler, rm.GridAOISampler)
    assert model.chips == len(data.predict_sampler)


def test_an_interrupted_run_resumes(scenes, tmp_path):
    """An error saves the predictions; the next run reads and predicts only the rest."""
    path, data = tmp_path / "map.tif", module(scenes)
    first = Odd(stop_at=5)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, rm.MapWriter(path)).predict(first, datamodule=data)
    assert isinstance(data.predict_sampler, rm.GridAOISampler)
    assert not path.exists()
    rest = Odd()
    trainer(tmp_path, rm.MapWriter(path)).predict(rest, datamodule=data)
    assert (first.chips, rest.chips) == (20, len(data.predict_sampler) - 20)
    np.testing.assert_array_equal(pixels_of(path), expected(scenes))


def test_limited_batches_write_no_map(scenes, tmp_path, caplog):
    """Predictions are kept, with a warning; the map is written when all are there."""
    path, data = tmp_path / "map.tif", module(scenes)
    writer = rm.MapWriter(path)
    trainer(tmp_path, writer, limit_predict_batches=3).predict(Odd(), datamodule=data)
    left = len(data.predict_sampler) - 12
    assert f"skipped {left} chips" in caplog.text
    assert (writer.paths, path.exists()) == ([], False)
    rest = Odd()
    trainer(tmp_path, writer, limit_predict_batches=1000).predict(rest, datamodule=data)
    assert rest.chips == left
    np.testing.assert_array_equal(pixels_of(path), expected(scenes))


def test_other_weights_do_not_resume_a_map(scenes, tmp_path):
    """Weights identify the map."""
    data, model = module(scenes), Odd(stop_at=2)
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, rm.MapWriter(tmp_path / "map.tif")).predict(model, datamodule=data)
    model.weight.data += 1
    with pytest.raises(UsageError, match="version"):
        trainer(tmp_path, rm.MapWriter(tmp_path / "map.tif")).predict(model, datamodule=data)


def test_weights_of_a_checkpoint(scenes, tmp_path):
    """They identify the map, not those that the module was created with."""
    path, data = tmp_path / "map.tif", module(scenes)

    for name, weight in (("a", 2.0), ("b", 3.0)):
        model = Odd()
        model.weight.data[:] = weight
        saver = trainer(tmp_path, pl.Callback())
        saver.strategy.connect(model)
        saver.save_checkpoint(tmp_path / f"{name}.ckpt")
    stopped, other, rest = Odd(stop_at=5), Odd(), Odd()
    for made, weight in ((stopped, 5.0), (other, 6.0), (rest, 7.0)):
        made.weight.data[:] = weight
    with pytest.raises(RuntimeError, match="stopped"):
        trainer(tmp_path, rm.MapWriter(path)).predict(stopped, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    with pytest.raises(ResumeError, match="version"):
        trainer(tmp_path, rm.MapWriter(path)).predict(other, datamodule=data, ckpt_path=tmp_path / "b.ckpt")
    assert isinstance(data.predict_sampler, rm.GridAOISampler)
    trainer(tmp_path, rm.MapWriter(path)).predict(rest, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    assert (other.chips, rest.chips) == (0, len(data.predict_sampler) - 20)
    np.testing.assert_array_equal(pixels_of(path), expected(scenes))


def test_without_a_datamodule(scenes, tmp_path):
    """The sampler must be given."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    sampler = rm.GridAOISampler(dataset, 64, 48)
    loader = rm.DataLoader(dataset, batch_size=4, sampler=sampler)
    with pytest.raises(UsageError, match="sampler="):
        trainer(tmp_path, rm.MapWriter(tmp_path / "map.tif")).predict(Odd(), dataloaders=loader)
    writer = rm.MapWriter(tmp_path / "map.tif", sampler=sampler)
    trainer(tmp_path, writer).predict(Odd(), dataloaders=loader)
    np.testing.assert_array_equal(pixels_of(tmp_path / "map.tif"), expected(scenes))


def test_a_dictionary_has_a_key(scenes, tmp_path):
    """The key of TorchGeo 0.10, unless another is given."""
    trainer(tmp_path, rm.MapWriter(tmp_path / "map.tif")).predict(Odd("dict"), datamodule=module(scenes))
    np.testing.assert_array_equal(pixels_of(tmp_path / "map.tif"), expected(scenes))
    writer = rm.MapWriter(tmp_path / "other.tif", key="scores")
    with pytest.raises(UsageError, match=r"\['probabilities'\]; choose one with key="):
        trainer(tmp_path, writer).predict(Odd("dict"), datamodule=module(scenes))


def test_from_yaml(tmp_path):
    """LightningCLI's parser knows every argument."""
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(rm.MapWriter, "writer", skip={"sampler"})
    text = (
        "writer:\n  class_path: rasteret_ml.train.map_writer.MapWriter\n  init_args:\n    path: map.tif\n"
        "    merge: centre\n    names: [water, wood]\n    colours: {0: [0, 0, 255], 1: [0, 99, 0]}\n    block: 512\n"
    )
    made = getattr(parser, "instantiate", parser.instantiate_classes)(parser.parse_string(text)).writer
    assert isinstance(made, rm.MapWriter)
    assert made.path == "map.tif"


SCRIPT = """
import os, sys, warnings
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_map_writer as t
import rasteret_ml as rm
from types import SimpleNamespace

scenes, folder = SimpleNamespace(folder=Path(sys.argv[2])), sys.argv[3]
rm.RasteretDataModule, rm.MapWriter  # imported once
for run, (name, shares, stop_at, size) in enumerate([
    ("true", True, None, 64), ("false", False, None, 64), ("again", True, 4, 64), ("again", False, None, 64),
    ("few", True, None, 608),
]):
    for rank in (0, 1):
        if os.fork():
            continue
        os.environ |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[4 + run]}
        model, writer = t.Odd(stop_at=stop_at), rm.MapWriter(f"{folder}/{name}.tif", merge="centre", save_seconds=0)
        trainer = t.trainer(folder, writer, devices=2, strategy="ddp", use_distributed_sampler=shares)
        try:
            trainer.predict(model, datamodule=t.module(scenes, size=size))
        except RuntimeError as error:
            assert "stopped" in str(error)
        with open(f"{folder}/runs.txt", "a") as file:
            file.write(repr((run, rank, model.chips, writer.paths)) + "\\n")
        os._exit(0)
    for rank in (0, 1):
        assert os.wait()[1] == 0
"""


def free_ports(count):
    """Ports that nobody uses."""
    with_sockets = [socket.socket() for _ in range(count)]
    for one in with_sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in with_sockets]
    for one in with_sockets:
        one.close()
    return ports


@pytest.mark.dist
def test_two_devices_share_the_map(scenes, tmp_path):
    """Whatever `use_distributed_sampler` is; stopped, gone on with, and with fewer chips than devices."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, Path(__file__).parent, scenes.folder, tmp_path, *free_ports(5)],
        env=os.environ | {"PYTHONPATH": str(Path(rm.__file__).parents[1])},
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(ast.literal_eval(line) for line in (tmp_path / "runs.txt").read_text().splitlines())
    chips = [[n for run, _, n, _ in lines if run == at] for at in range(5)]
    assert chips == [[39, 39], [39, 39], [16, 16], [23, 23], [1, 1]]
    for name, at in (("true", 0), ("false", 1), ("again", 3), ("few", 4)):
        path = str(tmp_path / f"{name}.tif")
        assert [paths for run, _, _, paths in lines if run == at] == [[path]] * 2
        np.testing.assert_array_equal(pixels_of(path), expected(scenes))
