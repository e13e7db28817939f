"""What the README shows runs; every YAML composes and instantiates; the demo trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import rasterio
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import rasteret_ml as rm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path) -> None:
    """Fifteen lines, in an empty folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["torch.uint16 (16, 4, 256, 256) 1.0"] * 4


def composed(*overrides: str):
    """The configuration that a command line gives."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose("train", [*overrides, "paths.output_dir=out", "paths.log_dir=logs"], return_hydra_config=False)
    OmegaConf.resolve(config)
    return config


FILES = ["data=files", "data.images=[a.tif]", "data.labels=l.tif"]


@pytest.mark.parametrize("data", [["data=demo"], FILES], ids=["demo", "files"])
def test_data_configs_instantiate(data: list[str]) -> None:
    """With no argument missing or unknown."""
    module = instantiate(composed(*data).data)
    assert isinstance(module, rm.RasteretDataModule)
    assert isinstance(module.batch_size, int)


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_model_configs_instantiate(path: Path) -> None:
    """Into a Lightning module that answers in the image's size."""
    import torch

    task = instantiate(composed(f"model={path.stem}").model, in_channels=4, num_classes=3)
    assert task.eval()(torch.zeros(1, 4, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("path", sorted((CONFIGS / "trainer").glob("*.yaml")), ids=lambda p: p.stem)
def test_trainer_configs_instantiate(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gpu one on the CPU here, where there is no other."""
    import torch

    config = composed(f"trainer={path.stem}")
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        config.trainer.accelerator = "cpu"
    assert isinstance(instantiate(config.trainer), pl.Trainer)


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_experiments_compose(path: Path) -> None:
    """They choose among the groups."""
    config = composed(f"experiment={path.stem}", "data.images=[a.tif]", "data.labels=l.tif")
    assert isinstance(instantiate(config.data), rm.RasteretDataModule)


def test_every_group_is_tested() -> None:
    """A new folder of configs needs a test here."""
    assert {p.name for p in CONFIGS.iterdir() if p.is_dir()} == {"data", "experiment", "model", "paths", "trainer"}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_demo_trains_and_writes_a_map(tmp_path: Path, workers: int) -> None:
    """Small and short: it still says what it measured, and the map is georeferenced where the scenes are."""
    command = [sys.executable, str(ROOT / "examples" / "train.py"), f"hydra.run.dir={tmp_path / 'run'}"]
    command += [f"paths.cache_dir={tmp_path / 'cache'}", "data.size=64", "data.length=32", "data.batch_size=8"]
    command += ["trainer.max_epochs=1", "data.statistics_chips=4", "trainer.enable_progress_bar=false"]
    command += [f"data.num_workers={workers}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"validation mIoU +0\.\d+ .*majority class: 0\.\d+", done.stdout)
    assert re.search(r"patches per second +\d", done.stdout)
    assert re.search(r"wait share +\d", done.stdout)
    with rasterio.open(tmp_path / "run" / "prediction.tif") as found:
        assert found.crs.to_epsg() == 32633
        assert found.transform[:6] == (10.0, 0.0, 499980.0, 0.0, -10.0, 5100000.0)
        assert found.shape == (1024, 1024)
        classes = found.read(1)
        assert set(np.unique(classes)) <= {0, 1, 2, 3, 255}
        assert (classes[:512, :12] == 255).all()  # no data there
        assert found.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG"
        assert found.colormap(1)[0] == (38, 110, 180, 255)
    assert (tmp_path / "run" / "prediction.png").stat().st_size > 10_000
