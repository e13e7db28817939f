"""The plain loop, Hydra and LightningCLI train one job from the same values to the same weights."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def examples(monkeypatch):
    """Scripts import one another, and `train` is a common name. One thread: the models are tiny."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for name in [n for n, m in sys.modules.items() if str(ROOT / "examples") in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.usefixtures("examples")
def test_three_doors_give_one_result(shared_data, tmp_path, monkeypatch, capsys):
    """Land cover of Wales: same seed, same batches, same weights, same counts of right and wrong pixels."""
    import cli
    import plain_loop
    import train

    monkeypatch.chdir(tmp_path)
    folder = shared_data / "landcover"
    images, labels = str(folder / "images" / "*.tif"), str(folder / "labels" / "*.tif")

    values = {"--images": images, "--labels": labels, "--model": "fcn", "--lr": 0.01, "--size": 128, "--length": 12}
    values |= {"--batch-size": 4, "--epochs": 2, "--workers": 0, "--seed": 3, "--collections": tmp_path / "index"}
    model, confusion = plain_loop.train(plain_loop.parse([str(v) for pair in values.items() for v in pair]))

    same = {"sampling.length": 12, "loading.batch_size": 4, "loading.num_workers": 0}
    overrides = ["experiment=landcover", "model=fcn", "logger=none", "callbacks=none", "draw=false", "seed=3"]
    overrides += [f"data.{name}={value}" for name, value in same.items()] + ["trainer.max_epochs=2"]
    overrides += [f"paths.data_dir={shared_data}", f"paths.output_dir={tmp_path / 'hydra'}"]
    overrides += [f"paths.cache_dir={tmp_path / 'cache'}", "trainer.enable_progress_bar=false", "task_name=doors"]
    overrides += ["++trainer.enable_checkpointing=false"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "configs")):
        config = compose("train", overrides)
    OmegaConf.resolve(config)
    by_hydra = train.run(config)

    arguments = ["fit", f"--config={ROOT / 'configs' / 'cli' / 'landcover.yaml'}", f"--data.images={images}"]
    arguments += [f"--data.labels={labels}", "--model.init_args.model=fcn", "--model.init_args.num_filters=16"]
    arguments += [
        "--model.init_args.lr=0.01",
        "--seed_everything=3",
        "--data.sampling.seed=3",
        "--trainer.max_epochs=2",
    ]
    arguments += [f"--data.{name}={str(value).lower()}" for name, value in same.items()]
    arguments += [f"--data.cache_dir={tmp_path / 'cache'}", "--trainer.enable_progress_bar=false"]
    arguments += ["--trainer.logger=false", "--trainer.callbacks=null", "--trainer.enable_checkpointing=false"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jsonargparse's coming names
        by_cli = cli.main(arguments)

    own = model.state_dict()
    for door in (by_hydra["task"], by_cli.model):
        theirs = door.model.state_dict()  # of a step more or less, or another chip, none would be near
        assert theirs.keys() == own.keys()
        for name, weights in own.items():
            torch.testing.assert_close(theirs[name], weights, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(by_hydra["confusion"], confusion.numpy(), atol=float(confusion.sum()) * 1e-4)
    assert confusion.sum() > 200_000
    assert float(by_cli.trainer.callback_metrics["val_loss"]) == pytest.approx(
        by_hydra["metrics"]["val_loss"], rel=1e-4
    )
    assert "validation mIoU" in capsys.readouterr().out
    before = plain_loop.build_model("fcn", 10, 4).state_dict()
    assert not all(torch.equal(before[name], weights) for name, weights in own.items())
