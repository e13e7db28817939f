"""TorchGeo's own tasks and ours on our batches, through Lightning, with labels that are not there."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import rasteret_ml as rm
from rasteret_ml.train import task

SMALL = {"in_channels": 2, "lr": 1e-2}
PIXELS = {"model": "fcn", "num_filters": 4, **SMALL}
"""TorchGeo's own five convolutions."""
CHIPS = {"model": "resnet10t", **SMALL}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small for two."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


class Batches(pl.LightningDataModule):
    """Two batches made beforehand for each stage."""

    def __init__(self, *batches: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.batches = list(batches)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    val_dataloader = train_dataloader
    test_dataloader = train_dataloader
    predict_dataloader = train_dataloader


def trained(module: pl.LightningModule, *batches: dict[str, torch.Tensor]) -> dict[str, float]:
    """What is logged after an epoch of training and one of validation; then a test and a prediction run as well."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    data = Batches(*batches)
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    trainer.test(module, datamodule=data, verbose=False)
    assert len(trainer.predict(module, datamodule=data)) == len(batches)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    return logged


@pytest.fixture
def batch(scenes) -> dict[str, torch.Tensor]:
    """Ours, prepared and augmented, with labels -100 outside the scenes and where the raster is 0."""
    images = rm.RasteretDataset(scenes.images, ("B02", "B03"))
    rule = {"is_image": False, "crs": images.crs, "labels": {"remap": {1: 0, 2: 1, 3: 2, 4: 3}}}
    joined = images & rm.RasteretDataset(scenes.labels, scenes.labels.bands, **rule)
    loader = rm.DataLoader(joined, 4, sampler=rm.RandomAOISampler(joined, 32, 4, seed=1))
    ready = rm.Augmentation()(rm.normalize(next(iter(loader)), (2500, 2500), (1400, 1400)))
    assert (ready["mask"] == -100).any()
    return ready


def test_torchgeos_own_tasks_take_our_batches(batch):
    """As they are, in either version's names."""
    theirs = task.SemanticSegmentation(**PIXELS, num_classes=4, ignore_index=-100)
    assert np.isfinite(trained(theirs, batch)["val_loss"])
    known = batch | {"label": torch.tensor([0, 1, 2, 1])}
    theirs = task.Classification(**CHIPS, num_classes=3)
    assert np.isfinite(trained(theirs, known)["val_loss"])
    heights = batch | {"mask": torch.where(batch["mask"] == -100, 0, batch["mask"]).float()}
    assert np.isfinite(trained(task.PixelwiseRegression(**PIXELS), heights)["val_loss"])


@pytest.mark.parametrize(("loss", "ignore_index"), [("ce", None), ("jaccard", None), ("focal", -100)])
def test_segmentation_leaves_unknown_labels_out(batch, loss, ignore_index):
    """With a batch in which none is known; scores against numpy's."""
    empty = batch | {"mask": torch.full_like(batch["mask"], -100)}
    ours = rm.SegmentationTask(**PIXELS, num_classes=4, loss=loss, ignore_index=ignore_index)
    logged = trained(ours, batch, empty)
    assert np.isfinite([logged["train_loss"], logged["val_loss"]]).all()
    with torch.no_grad():
        found = ours.eval()(batch["image"]).argmax(1)
    known = batch["mask"] != -100
    accuracy = float((found == batch["mask"])[known].float().mean())
    name = "val_MulticlassAccuracy" if "val_MulticlassAccuracy" in logged else "val_OverallAccuracy"
    assert logged[name] == pytest.approx(accuracy, abs=1e-6)


def test_binary_segmentation_leaves_unknown_labels_out(batch):
    """With BCE, which by itself takes -100 for a label."""
    labels = torch.where(batch["mask"] == -100, -100, batch["mask"] % 2)
    ours = rm.SegmentationTask(**PIXELS, task="binary", num_classes=1, loss="bce")
    logged = trained(ours, batch | {"mask": labels})
    with torch.no_grad():
        found = ours.eval()(batch["image"])[:, 0]
    known = labels != -100
    expected = torch.nn.functional.binary_cross_entropy_with_logits(found[known], labels[known].float())
    assert logged["val_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_segmentation_of_a_series_folds_its_dates(batch):
    """`[B, T, C, H, W]`, with T * C channels, in either version."""
    series = batch | {"image": torch.stack([batch["image"]] * 3, 1)}
    ours = rm.SegmentationTask(**(PIXELS | {"in_channels": 6}), num_classes=4)
    assert np.isfinite(trained(ours, series)["val_loss"])


def test_pixelwise_regression_leaves_nan_out(batch):
    """Errors against numpy's, with a batch in which nothing is known."""
    heights = torch.where(batch["mask"] == -100, float("nan"), batch["mask"].float())
    empty = torch.full_like(heights, float("nan"))
    ours = rm.PixelwiseRegressionTask(**PIXELS)
    logged = trained(ours, batch | {"mask": heights}, batch | {"mask": empty})
    with torch.no_grad():
        errors = (ours.eval()(batch["image"])[:, 0] - heights).numpy()
    assert logged["val_MSE"] == pytest.approx(float(np.nanmean(errors**2)), rel=1e-4)
    assert logged["val_loss"] == pytest.approx(float(np.nanmean(errors**2)), rel=1e-4)  # the empty batch counts nothing
    assert logged["val_MAE"] == pytest.approx(float(np.nanmean(np.abs(errors))), rel=1e-4)


def test_classification_and_regression_of_chips_leave_unknown_ones_out(batch):
    """-100 and NaN are what chips without a label carry."""
    ours = rm.ClassificationTask(**CHIPS, num_classes=3)
    labels = torch.tensor([0, 1, -100, 1])
    logged = trained(ours, batch | {"label": labels}, batch | {"label": torch.full((4,), -100)})
    with torch.no_grad():
        found = ours.eval()(batch["image"]).argmax(1)
    assert logged["val_OverallAccuracy"] == pytest.approx(float((found == labels).sum()) / 3)
    assert np.isfinite(logged["val_loss"])

    ours = rm.RegressionTask(**CHIPS)
    values = torch.tensor([0.5, float("nan"), -100.0, 2.0])
    logged = trained(ours, batch | {"label": values})
    with torch.no_grad():
        errors = (ours.eval()(batch["image"])[:, 0] - values).numpy()
    assert logged["val_MSE"] == pytest.approx(float(np.nanmean(errors**2)), rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6's calls of jsonargparse 4.53
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SegmentationTask", PIXELS | {"num_classes": 4}),
        ("PixelwiseRegressionTask", PIXELS),
        ("RegressionTask", CHIPS),
        ("ClassificationTask", CHIPS | {"num_classes": 3}),
    ],
)
def test_lightning_cli_makes_each(tmp_path, monkeypatch, name, options):
    """From YAML, and the checkpoint's arguments make it again."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": f"rasteret_ml.{name}", "init_args": options}}))
    cli = LightningCLI(
        pl.LightningModule, Batches, subclass_mode_model=True, run=False, args=["--config", str(path)],
        save_config_callback=None, seed_everything_default=False,
        trainer_defaults={"logger": False, "accelerator": "cpu"},
    )  # fmt: skip
    assert type(cli.model).__name__ == name
    assert cli.model.hparams["lr"] == 1e-2
    given = {key: value for key, value in cli.model.hparams.items() if not key.startswith("_")}
    assert dict(type(cli.model)(**given).hparams) == given
