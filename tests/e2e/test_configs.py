"""Every YAML composes and instantiates; an interrupted run resumes; the examples' scores."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import rasterio
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index

import rasteret_ml as rm

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FILES = ["data.images=[a.tif]", "data.labels=l.tif"]


def apply_composite(*overrides: str, name: str = "train"):
    """The configuration that a command line gives."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose(name, [*overrides, "paths.output_dir=out", "paths.log_dir=logs"], return_hydra_config=False)
    OmegaConf.resolve(config)
    return config


def members(group: str) -> list:
    """The files of a group, as parameters."""
    return [pytest.param(path.stem, id=path.stem) for path in sorted((CONFIGS / group).glob("*.yaml"))]


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Scripts import one another by plain names; `experiment` tells Hydra the defaults. One thread for tiny models."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    importlib.import_module("experiment")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in [n for n, m in sys.modules.items() if str(ROOT / "examples") in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def build_trainer(config) -> pl.Trainer:
    """The configured trainer, on the CPU where there is nothing else."""
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        config.trainer.accelerator = "cpu"
    trainer = instantiate(config.trainer)
    assert isinstance(trainer, pl.Trainer)
    return trainer


@pytest.mark.parametrize("data", members("data"))
def test_data(data: str) -> None:
    """With no argument missing or unknown; Hydra knows each argument and each field of a group, with its default."""
    config = apply_composite(f"data={data}", *(FILES if data == "files" else []))
    module = instantiate(config.data)
    assert isinstance(module, rm.RasteretDataModule)
    assert set(config.data) == {"_target_", "_convert_", *module.hparams}
    for group in ("dataset", "split", "sampling", "loading", "normalization"):
        assert OmegaConf.to_container(config.data[group]) == module.hparams[group]


def test_fields_of_groups_from_a_command_line() -> None:
    """One field changes, the others keep their defaults; a misspelt one is refused."""
    config = apply_composite(
        "data=files", *FILES, "data.sampling.size=64", "data.dataset.crs=32633", "data.split.val_side=null"
    )
    module = instantiate(config.data)
    assert (module.sampling.size, module.sampling.length) == (64, rm.RasteretDataModule("a.tif").sampling.length)
    assert module.split.val_side is None
    assert module.hparams["dataset"]["crs"] == 32633
    with pytest.raises(ConfigCompositionException):
        apply_composite("data=files", *FILES, "data.sampling.sizes=64")


def test_files_hold_only_what_differs_from_the_defaults() -> None:
    """A value in a file that is the default would have two owners."""
    from experiment import datamodule_defaults

    defaults = datamodule_defaults()
    for path in sorted((CONFIGS / "data").glob("*.yaml")):
        for name, value in OmegaConf.to_container(OmegaConf.load(path)).items():
            fields = value if isinstance(defaults.get(name), dict) else {None: value}
            for field, stated in fields.items():
                assert name == "defaults" or stated != (defaults[name][field] if field else defaults.get(name)), path


@pytest.mark.parametrize("model", members("model"))
def test_models(model: str) -> None:
    """Lightning modules whose output has the size of the image."""
    task = instantiate(apply_composite(f"model={model}").model, in_channels=4, num_classes=3)
    assert task.eval()(torch.zeros(1, 4, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("trainer", members("trainer"))
def test_trainers(trainer: str) -> None:
    made = build_trainer(apply_composite(f"trainer={trainer}"))
    assert made.num_devices == {"ddp": 4, "ddp_sim": 2}.get(trainer, 1)


@pytest.mark.parametrize("callbacks", members("callbacks"))
def test_callbacks(callbacks: str) -> None:
    from experiment import instantiate_all

    made = instantiate_all(apply_composite(f"callbacks={callbacks}").callbacks)
    assert all(isinstance(callback, pl.Callback) for callback in made)
    assert len(made) == {"none": 0, "default": 2, "early_stopping": 3}.get(callbacks, 1)


@pytest.mark.parametrize("logger", members("logger"))
def test_loggers(logger: str) -> None:
    from experiment import instantiate_all

    made = instantiate_all(apply_composite(f"logger={logger}").logger)
    assert all(isinstance(logger, Logger) for logger in made)
    assert len(made) == {"none": 0, "many": 2}.get(logger, 1)


@pytest.mark.parametrize("experiment", members("experiment"))
def test_experiments(experiment: str) -> None:
    """They choose among the groups; the command line takes precedence."""
    config = apply_composite(f"experiment={experiment}", *FILES, "trainer.max_epochs=7")
    assert isinstance(instantiate(config.data), rm.RasteretDataModule)
    assert build_trainer(config).max_epochs == 7


@pytest.mark.parametrize("debug", members("debug"))
def test_debug(debug: str) -> None:
    """On the CPU, in one process, without loggers; with any experiment."""
    from experiment import instantiate_all

    config = apply_composite(f"debug={debug}", "experiment=landcover", "trainer=gpu")
    assert (config.task_name, config.trainer.accelerator, config.data.loading.num_workers) == ("debug", "cpu", 0)
    assert instantiate_all(config.callbacks) == instantiate_all(config.logger) == []
    trainer = build_trainer(config)
    assert trainer.fast_dev_run == (1 if debug == "fdr" else False)
    assert trainer.overfit_batches == (3 if debug == "overfit" else 0)


@pytest.mark.parametrize("search", members("hparams_search"))
def test_searches(search: str) -> None:
    """Their keys exist, and Hydra's own sweeper runs them."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose("train", [f"hparams_search={search}"], return_hydra_config=True)
    assert config.hydra.mode.name == "MULTIRUN"
    assert config.hydra.sweeper._target_.endswith("BasicSweeper")
    for key in config.hydra.sweeper.params:
        assert OmegaConf.select(config, key) is not None


@pytest.mark.parametrize("name", ["train", "eval", "predict"])
def test_tasks(name: str) -> None:
    """Each finds its groups; prediction reads no labels."""
    needed = [] if name == "train" else ["ckpt_path=model.ckpt"]
    config = apply_composite("data=landcover", *needed, name=name)
    assert config.task_name == name
    assert build_trainer(config) is not None
    assert (config.data.labels is None) == (name == "predict")
    assert (instantiate(config.data).hparams["labels"] is None) == (name == "predict")


@pytest.mark.parametrize("name", members("cli"))
def test_lightning_cli(name: str) -> None:
    """Everything in the YAML is instantiated, with one `ignore_index`."""
    from cli import main

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jsonargparse's coming names
        cli = main([f"--config={CONFIGS / 'cli' / name}.yaml", "--data.ignore_index=9"], run=False)
    assert isinstance(cli.datamodule, rm.RasteretDataModule)
    assert cli.model.hparams["ignore_index"] == 9
    assert cli.datamodule.class_values == {1: 0, 2: 1, 3: 2, 4: 3}
    assert [type(callback).__name__ for callback in cli.trainer.callbacks].count("ModelCheckpoint") == 1


def test_every_file_is_tested() -> None:
    """A new folder of configs needs a test here; `paths` and `hydra` are in every composition."""
    tested = {"data", "model", "trainer", "callbacks", "logger", "experiment", "debug", "hparams_search", "cli"}
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == tested | {"paths", "hydra"}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"train", "eval", "predict"}
    for group in ("paths", "hydra"):
        assert [path.stem for path in (CONFIGS / group).iterdir()] == ["default"]


def run_train(folder: Path, scenes, *overrides: str):
    """A short run over the fixture's scenes."""
    from train import run

    common = ["model=fcn", "logger=none", "draw=false", "data=files", "data.sampling.size=64"]
    common += ["data.sampling.length=8", "data.loading.batch_size=4", "trainer.enable_progress_bar=false"]
    common += ["data.normalization.mean=[2500,2500]", "data.normalization.std=[1400,1400]"]
    common += ["data.classes={1: 0, 2: 1, 3: 2, 4: 3}", "data.split.val_fraction=0.2"]
    common += [f"data.images={scenes.folder / 'images.parquet'}", f"data.labels={scenes.folder / 'labels.parquet'}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        config = compose("train", [*common, *overrides, f"paths.output_dir={folder}"])
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    return run(config)


def test_an_interrupted_run_resumes(scenes, tmp_path) -> None:
    """`ckpt_path=`: the weights after two epochs are those of a run that was not stopped."""
    every = ["callbacks.model_checkpoint.save_top_k=-1", "trainer.max_epochs=2"]
    whole = run_train(tmp_path / "whole", scenes, *every)
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"epoch_000.ckpt", "epoch_001.ckpt", "last.ckpt"}
    resumed = run_train(tmp_path / "resumed", scenes, *every, f"ckpt_path={checkpoints / 'epoch_000.ckpt'}")
    for name, weights in whole["task"].state_dict().items():
        torch.testing.assert_close(resumed["task"].state_dict()[name], weights)


def test_overfitting_and_no_validation(scenes, tmp_path) -> None:
    """Debug presets run; without a held-out area there is nothing to validate or to stop early by."""
    found = run_train(tmp_path / "a", scenes, "debug=overfit", "trainer.max_epochs=2")
    assert "train_loss" in found["metrics"]
    found = run_train(tmp_path / "b", scenes, "data.split.val_side=null", "callbacks=none", "trainer.max_epochs=1")
    assert "miou" not in found


@pytest.mark.dist
def test_two_processes_train_and_map_together(scenes, tmp_path) -> None:
    """`trainer=ddp_sim`: one result, said once; each process has its part of the chips."""
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "trainer=ddp_sim", "trainer.max_epochs=1"]
    command += ["model=fcn", "data=files", "data.sampling={size: 64, length: 8, overlap: 0}"]
    command += ["data.normalization={mean: [2500, 2500], std: [1400, 1400]}", "data.split.val_fraction=0.2"]
    command += ["data.loading.batch_size=4"]
    command += ["data.classes={1: 0, 2: 1, 3: 2, 4: 3}", "trainer.enable_progress_bar=false", "hydra.run.dir=run"]
    command += [f"data.images={scenes.folder / 'images.parquet'}", f"data.labels={scenes.folder / 'labels.parquet'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("validation mIoU") == done.stdout.count("whole run") == 1
    assert "MEMBER: 2/2" in done.stdout + done.stderr
    with rasterio.open(tmp_path / "run" / "prediction.tif") as found:
        assert found.shape == (300, 600)
        assert (found.read(1) != 255).mean() > 0.95


# Scores ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_iou_is_torchmetrics(pairs) -> None:
    """Per class, over the classes that occur."""
    from experiment import class_iou, mean_iou

    target, predicted = (torch.tensor(v) for v in zip(*pairs, strict=True))
    confusion = multiclass_confusion_matrix(predicted, target, 4).numpy()
    iou = class_iou(confusion)
    present = sorted(set(target.tolist()) | set(predicted.tolist()))
    oracle = multiclass_jaccard_index(predicted, target, 4, average="none")
    np.testing.assert_allclose(iou[present], oracle.numpy()[present], rtol=1e-6)
    assert np.isnan(np.delete(iou, present)).all()
    assert mean_iou(confusion) == pytest.approx(iou[present].mean())


def test_ignored_targets_do_not_count_and_the_baseline_is_the_majoritys() -> None:
    """A label of -100 is not counted."""
    from experiment import ClassScores, majority_iou

    class Model(pl.LightningModule):
        """Predicts its input."""

        def forward(self, image):
            return image

    scores, module = ClassScores(), Model()
    module.save_hyperparameters({"ignore_index": -100})
    target, predicted = torch.tensor([[0, 0, 0, 1, -100]]), torch.tensor([[0, 1, 0, 1, 0]])
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    scores.on_test_start(trainer, module)
    batch = {"image": torch.nn.functional.one_hot(predicted, 2).movedim(-1, 1).float(), "mask": target}
    scores.on_test_batch_end(trainer, module, None, batch, 0)
    scores.on_test_end(trainer, module)
    assert scores.confusion.tolist() == [[2, 1], [0, 1]]
    assert majority_iou(scores.confusion) == pytest.approx((3 / 4 + 0) / 2)
