"""Normalisation and the datamodule."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.transforms.normalize import normalize

BANDS = ("B02", "B03")


def test_normalize():
    """Float32, per band; invalid pixels and NaN become the mean; labels outside the AOI are ignored."""
    batch = {
        "image": torch.tensor([[[[10.0, float("nan")]], [[100.0, 300.0]]]]),
        "mask_valid": torch.tensor([[[[True, False]]]]),
        "mask": torch.tensor([[[1, 2]]]),
        "mask_aoi": torch.tensor([[[[False, True]]]]),
    }
    ready = normalize(batch, mean=(8, 50), std=(2, 100))
    assert ready["image"].tolist() == [[[[1.0, 0.0]], [[0.5, 0.0]]]]
    assert ready["mask"].tolist() == [[[-100, 2]]]
    native = {
        "image": torch.full((1, 2, 1, 1), 58, dtype=torch.uint16),
        "mask_valid": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }
    assert normalize(native, (8, 50), (2, 8))["image"].flatten().tolist() == [25.0, 1.0]


def module(scenes, *, loading=None, **options):
    """A datamodule over the fixture."""
    settings = {"sampling": {"size": 32, "length": 16, "overlap": 8}, "loading": {"batch_size": 4} | (loading or {})}
    settings |= {"normalization": {"max_chips": 8}, "bands": BANDS}
    return rm.RasteretDataModule(
        str(scenes.folder / "images.parquet"), str(scenes.folder / "labels.parquet"), **(settings | options)
    )


def test_splits_do_not_leak(scenes):
    """No pixel that training may see counts in validation."""
    data = module(scenes, split={"val_side": "top", "val_fraction": 0.3})
    data.prepare_data()
    data.setup("fit")
    line = 5000000 - 0.3 * 3000
    for batch in data.train_dataloader():
        assert (batch["bounds"][:, 4] <= line + 5).all()
    counted = 0
    for batch in data.val_dataloader():
        ready = normalize(batch, data.mean, data.std)
        for mask, t in zip(ready["mask"], batch["transform"], strict=True):
            rows = t[5].item() - 10 * (np.arange(32) + 0.5)
            assert (mask.numpy()[rows < line] == -100).all()
            counted += int((mask != -100).sum())
    stored = scenes.cover[:90, 1:601]
    assert counted == (stored != 0).sum()


def test_training_polygons_do_not_reach_into_the_held_out_area(scenes):
    """Of a field across the line only chips on the training side are used."""
    import geopandas as gpd
    import shapely

    line = 5000000 - 0.3 * 3000
    fields = gpd.GeoDataFrame(
        geometry=[
            shapely.box(500500, line - 1000, 502500, line + 500),
            shapely.box(503000, line + 100, 503500, line + 700),
        ],
        crs=32633,
    )
    data = module(scenes, split={"train_aois": fields})
    data.setup()
    assert len(data.train_area) == 1
    for batch in data.train_dataloader():
        assert (batch["bounds"][:, 4] <= line + 5).all()
        assert (batch["bounds"][:, 0] >= 500500 - 165).all()


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_classes_are_found_in_the_training_area(scenes, ignore_index):
    """Stored values in order become 0, 1, 2, ...; the value to ignore is not one of them."""
    data = module(scenes, ignore_index=ignore_index)
    data.setup()
    assert data.class_values == {1: 0, 2: 1, 3: 2, 4: 3}
    assert data.num_classes == 4


def test_collections_are_built_once(scenes, tmp_path):
    """From a glob, into the cache, and found there again."""
    options = {
        "images": str(scenes.folder / "E_*.tif"),
        "bands": BANDS,
        "cache_dir": tmp_path,
        "split": {"val_side": None},
        "sampling": {"size": 32, "overlap": 0},
    }
    first = rm.RasteretDataModule(**options)
    first.prepare_data()
    (path,) = tmp_path.glob("*.parquet")
    stamp = path.stat().st_mtime_ns
    second = rm.RasteretDataModule(**options)
    second.prepare_data()
    second.setup()
    assert path.stat().st_mtime_ns == stamp
    assert len(second.predict_dataloader()) > 0
    assert second.val_dataloader() == []


def test_impossible_overlap_is_refused():
    """A stride of 0 would never advance."""
    with pytest.raises(UsageError, match="overlap"):
        rm.RasteretDataModule("x.parquet", sampling={"size": 32, "overlap": 32})


class Tiny(pl.LightningModule):
    """One convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(2, 4, 1)
        self.seen: list[float] = []

    def training_step(self, batch, index):
        assert batch["image"].dtype == torch.float32
        self.seen.append(float(batch["bounds"][0, 0]))
        return torch.nn.functional.cross_entropy(self.layer(batch["image"]), batch["mask"], ignore_index=-100)

    def validation_step(self, batch, index):
        self.log(
            "val_loss", torch.nn.functional.cross_entropy(self.layer(batch["image"]), batch["mask"], ignore_index=-100)
        )

    def predict_step(self, batch, index):
        return self.layer(batch["image"]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_lightning_fits_validates_and_predicts(scenes, tmp_path, workers):
    """Two epochs with different chips, then every stage."""
    model, data = Tiny(), module(scenes, loading={"num_workers": workers})
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert len(model.seen) == 8
    assert model.seen[:4] != model.seen[4:]
    assert torch.isfinite(trainer.validate(model, datamodule=data, verbose=False)[0]["val_loss"] * torch.ones(1)).all()
    assert sum(len(p) for p in trainer.predict(model, datamodule=data)) == len(data.predict_dataloader().sampler)
