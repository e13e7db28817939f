"""The datamodule: options from Python and YAML, building, stages, checkpoints, teardown."""

from __future__ import annotations

import dataclasses
import multiprocessing
import pickle
import warnings
from pathlib import Path

import geopandas as gpd
import jsonargparse
import lightning.pytorch as pl
import numpy as np
import pytest
import rasterio
import shapely
import torch
import yaml
from affine import Affine
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

import rasteret_ml as rm
from rasteret_ml.errors import CollectionError, DataError, UsageError
from rasteret_ml.raster import worker_loop
from rasteret_ml.train import data_handles, datamodule, datamodule_config
from rasteret_ml.train.datamodule import FixedEpochSampler

BANDS = ("B02", "B03")
CLASSES = {1: 0, 2: 1, 3: 2, 4: 3}
KNOWN = {"mean": [2500, 2500], "std": [1400, 1400]}
UNKNOWN = {"normalization": {"max_chips": 8}, "classes": "auto"}


def module(scenes, *, sampling=None, loading=None, normalization=KNOWN, **options):
    """A datamodule over the fixture, which measures nothing unless UNKNOWN."""
    settings = {"bands": BANDS, "classes": CLASSES, "normalization": normalization}
    settings |= {"sampling": {"size": 64, "length": 16, "overlap": 0} | (sampling or {})}
    settings |= {"loading": {"batch_size": 4} | (loading or {})}
    return rm.RasteretDataModule(
        str(scenes.folder / "images.parquet"), str(scenes.folder / "labels.parquet"), **(settings | options)
    )


def trainer(tmp_path, **options):
    settings = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    settings |= {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**(settings | options))


class Tiny(pl.LightningModule):
    """One convolution that notes which chips it saw, by (epoch, position). TorchGeo's tasks have a `labels`, too."""

    def __init__(self, labels: tuple[str, ...] = ("water",)) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Conv2d(2, 4, 1)
        self.seen: list[tuple[int, int]] = []
        self.corners: list[float] = []
        self.images: list[torch.Tensor] = []

    def training_step(self, batch, index):
        self.seen += [(epoch, position) for _, epoch, position in batch["draw"].tolist()]
        self.corners += batch["bounds"][:, 0].tolist()
        self.images.append(batch["image"])
        return torch.nn.functional.cross_entropy(self.layer(batch["image"]), batch["mask"], ignore_index=-100)

    def validation_step(self, batch, index):
        self.log("val_loss", self.layer(batch["image"]).mean(), batch_size=len(batch["image"]))

    test_step = validation_step

    def predict_step(self, batch, index):
        return self.layer(batch["image"]).argmax(1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


# Values --------------------------------------------------------------------------------------------------------

GIVEN = {
    "images": ["a.tif", "b.tif"],
    "labels": "labels.tif",
    "bands": ["B02", "B03"],
    "classes": {1: 0, 2: 1},
    "dataset": {
        "crs": "EPSG:32633",
        "res": [10.0, 10.0],
        "quality": {"band": "SCL", "clear": [4, 5]},
        "series": {"length": 3, "months": [5, 6]},
        "composite": {"max_index": ["B02", "B03"]},
    },
    "split": {"val_aois": [14.9, 45.1, 15.0, 45.2]},
    "sampling": {"locality": {"blocks": 4, "tiles": 2}},
    "loading": {"errors": {"action": "fill"}, "multiprocessing_context": "spawn"},
    "normalization": {"mean": [1.0, 2.0], "std": [3.0, 4.0]},
}
GROUPS = {
    "split": datamodule_config.SplitConfig,
    "sampling": datamodule_config.SamplingConfig,
    "loading": datamodule_config.LoadingConfig,
    "normalization": datamodule_config.NormalizationConfig,
}


def kept(data) -> dict:
    """The hyperparameters that are in GIVEN, of groups their fields."""
    found = {name: data.hparams[name] for name in GIVEN}
    return found | {name: {field: found[name][field] for field in GIVEN[name]} for name in GROUPS}


def from_yaml(path, *arguments):
    """As LightningCLI reads it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(rm.RasteretDataModule, "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of jsonargparse that come and go
        return parser.instantiate_classes(parser.parse_args([f"--config={path}", *arguments])).data


def test_values_come_from_python_hydra_and_lightning_alike(tmp_path):
    """Hydra's own containers and jsonargparse's namespace become the same plain values, which a checkpoint can hold."""
    python = rm.RasteretDataModule(**GIVEN)
    hydra = rm.RasteretDataModule(**{name: OmegaConf.create({"v": value}).v for name, value in GIVEN.items()})
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": GIVEN}))
    parsed = from_yaml(tmp_path / "data.yaml")
    assert kept(python) == kept(hydra) == kept(parsed) == GIVEN
    assert python.hparams == hydra.hparams == parsed.hparams
    for name, group in GROUPS.items():  # with the defaults, as a record of the run
        assert set(python.hparams[name]) == {field.name for field in dataclasses.fields(group)}
    assert {type(value) for value in hydra.hparams.values()} <= {bool, int, float, str, list, dict, type(None)}
    torch.save(dict(hydra.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True) == dict(hydra.hparams)


@pytest.mark.parametrize(
    ("argument", "value", "kept"),
    [
        ("images", "a.tif", "a.tif"),
        ("classes", "auto", "auto"),
        ("dataset.crs", "32633", 32633),
        ("dataset.series", "6", 6),
        ("dataset.quality", "sentinel-2-scl", "sentinel-2-scl"),
        ("split.val_aois", "fields.gpkg", "fields.gpkg"),
        ("split.table", '{"type": "Point", "coordinates": [0, 1]}', {"type": "Point", "coordinates": [0, 1]}),
        ("split.val_side", "null", None),
        ("sampling.size", "64", 64),
        ("sampling.locality", "16", 16),
        ("loading.errors", "replace", "replace"),
        ("normalization.mean", "[1, 2]", (1.0, 2.0)),
    ],
)
def test_command_line(argument, value, kept):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(rm.RasteretDataModule, "data")
    arguments = [f"--data.{argument}={value}", *(() if argument == "images" else ("--data.images=x.tif",))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of jsonargparse that come and go
        data = parser.instantiate_classes(parser.parse_args(arguments)).data
    group, _, field = argument.rpartition(".")
    if group == "dataset":
        found = data.hparams["dataset"][field]
    else:
        found = getattr(getattr(data, group), field) if group else data.hparams[field]
    assert found == kept


def test_a_command_line_overrides_yaml(tmp_path):
    """An option of the command line changes one field of a group."""
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"images": "x", "sampling": {"size": 64, "seed": 3}}}))
    sampling = from_yaml(tmp_path / "data.yaml", "--data.sampling.size=32").sampling
    assert (sampling.size, sampling.seed, sampling.length) == (32, 3, datamodule_config.SamplingConfig().length)


def test_objects_are_accepted_and_not_saved(scenes):
    """Collections, tables of polygons and config objects, from Python."""
    table = gpd.GeoDataFrame(geometry=[shapely.box(500000, 4997000, 502000, 4998000)], crs=32633)
    data = rm.RasteretDataModule(
        scenes.images,
        scenes.labels,
        bands=BANDS,
        split=datamodule_config.SplitConfig(val_aois=table),
        sampling=datamodule_config.SamplingConfig(locality=rm.Locality(blocks=2), size=32, length=8),
    )
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["image"]) == 8
    assert not {"images", "labels"} & set(data.hparams)
    assert "val_aois" not in data.hparams["split"]
    assert "locality" not in data.hparams["sampling"]


def test_invalid_values_are_refused():
    for wrong, match in (
        ({"sampling": {"overlap": 32, "size": 32}}, "overlap must be >= 0 and < size = 32, got 32"),
        ({"sampling": {"size": 0}}, "size must be > 0, got 0"),
        ({"sampling": {"sizes": 4}}, "sampling must have only the fields size, length, .*; got sizes"),
        ({"sampling": 64}, "sampling must be of type SamplingConfig or a mapping of size, .*, got 64"),
        ({"classes": "some"}, "'auto'"),
        ({"sampling": {"locality": {"block": 4}}}, "locality must have only the fields .*; got block"),
        ({"dataset": {"quality": "cloudy"}}, "cloudy"),
        ({"dataset": {"colour": 3}}, "dataset must have only the fields .*crs.*; got colour"),
        ({"dataset": {"is_image": False}}, "got is_image"),
        ({"bands": "B02"}, r"a list of names, got 'B02'; write \['B02'\]"),
        ({"normalization": {"mean": 500.0}}, "a number for each band"),
        ({"normalization": {"std": [1, 0]}}, "std must be > 0"),
        ({"split": {"table": "a.gpkg", "val_aois": "b.gpkg"}}, "leave val_aois"),
    ):
        with pytest.raises(UsageError, match=match):
            rm.RasteretDataModule("x.tif", **wrong)


def test_means_of_other_bands_are_refused_before_anything_is_trained(scenes):
    data = rm.RasteretDataModule(scenes.images, bands=BANDS, normalization={"mean": [1, 2, 3], "std": [1, 2, 3]})
    with pytest.raises(UsageError, match=r"mean must have a number for each of the bands \['B02', 'B03'\], got 3"):
        data.setup("fit")


def test_printing_opens_nothing():
    assert "images='nothing-there.tif'" in str(rm.RasteretDataModule("nothing-there.tif"))


def test_loader_options(scenes, monkeypatch):
    """All options reach the loader; an error policy only if one is given."""
    made = []

    class Loader(rm.DataLoader):
        def __init__(self, dataset, errors=None, **options):
            made.append(options | {"errors": errors})
            super().__init__(dataset, **options)

    monkeypatch.setattr(datamodule, "DataLoader", Loader)
    knobs = {"num_workers": 2, "multiprocessing_context": "spawn", "prefetch_factor": 3, "pin_memory": False}
    knobs |= {"persistent_workers": False, "lookahead": 1, "lookahead_bytes": 4096}
    data = module(scenes, loading=knobs | {"errors": {"action": "fill"}})
    data.predict_dataloader()
    assert {name: made[-1][name] for name in knobs} == knobs
    assert made[-1]["errors"] == {"action": "fill"}
    module(scenes).predict_dataloader()
    assert made[-1]["errors"] is None
    assert not {"lookahead", "lookahead_bytes", "prefetch_factor"} & set(made[-1])  # the loader has its own defaults
    assert not made[-1]["persistent_workers"]


def test_lightning_may_change_the_batch_size(scenes):
    """By an attribute, as its `BatchSizeFinder` does."""
    data = module(scenes)
    data.batch_size = 2
    assert data.train_dataloader().batch_size == 2


# Building ------------------------------------------------------------------------------------------------------


def build_beside_another(folder, name, building, coming):
    """What two processes do at once; `name` says which."""
    own = data_handles.build

    def noted(*arguments, **options):
        (folder / f"built-{name}").touch()
        building.set()
        assert coming.wait(60)
        return own(*arguments, **options)

    data_handles.build = noted
    if name == "second":
        assert building.wait(60)  # the first one holds the lock
        coming.set()
    data = rm.RasteretDataModule(str(folder / "*.tif"), bands=["B02"], cache_dir=str(folder / "cache"))
    data.prepare_data()
    (folder / f"records-{name}").write_text(str(len(data.collection)))


def test_of_two_processes_one_builds_and_the_other_waits(scenes, tmp_path):
    """The file is neither built twice nor read half-written."""
    for path in scenes.folder.glob("*_B02.tif"):
        (tmp_path / path.name).symlink_to(path)
    context = multiprocessing.get_context("fork")
    building, coming = context.Event(), context.Event()
    both = [
        context.Process(target=build_beside_another, args=(tmp_path, name, building, coming))
        for name in ("first", "second")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("built-*")) == ["built-first"]
    assert (tmp_path / "records-first").read_text() == (tmp_path / "records-second").read_text() == "3"


def test_a_file_that_cannot_be_read_stops_the_building(scenes, tmp_path):
    """Otherwise it would be missing in training; nothing is left that a later run would use."""
    (tmp_path / "bad.tif").write_text("no TIFF")
    (tmp_path / "good.tif").symlink_to(scenes.folder / "cover.tif")
    data = rm.RasteretDataModule(str(tmp_path / "*.tif"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"bad\.tif"):
        data.prepare_data()
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_damaged_collection_is_built_again(scenes, tmp_path):
    options = {"images": str(scenes.folder / "E_*_B02.tif"), "bands": ["B02"], "cache_dir": str(tmp_path)}
    rm.RasteretDataModule(**options).prepare_data()
    (path,) = tmp_path.glob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CollectionError):
        rm.Collection.open(path)
    assert len(rm.RasteretDataModule(**options).collection) == 1


# Stages --------------------------------------------------------------------------------------------------------


def test_each_stage_opens_what_it_needs(scenes, monkeypatch):
    """Prediction needs neither labels nor a split nor, with mean and std, any pixels; training needs no other grid."""
    measured = []
    own = data_handles.dataset_statistics
    monkeypatch.setattr(
        data_handles, "dataset_statistics", lambda *a, **k: measured.append(k["max_chips"]) or own(*a, **k)
    )
    images = str(scenes.folder / "images.parquet")
    data = rm.RasteretDataModule(images, "nowhere.parquet", bands=BANDS, normalization={"mean": [1, 1], "std": [1, 1]})
    data.setup("predict")
    assert len(data.predict_dataloader().dataset.bands) == 2
    assert not {"areas", "_label_collection", "train_set", "eval_set"} & set(data.__dict__)
    assert measured == []
    data = module(scenes, **UNKNOWN)
    data.setup("test")
    assert measured == []  # a checkpoint may know
    data.setup("fit")
    images, train = data.images, data.train_set
    assert len(measured) == 2
    assert "predict_sampler" not in data.__dict__
    data.setup("fit")
    data.setup()
    assert data.images is images
    assert data.train_set is train
    assert len(measured) == 2


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_order_of_calls_works(scenes, tmp_path, workers):
    """Validate before fit, rebuild loaders each epoch, test and predict, and fit again; no worker is left."""
    model, data = Tiny(), module(scenes, loading={"num_workers": workers})
    one = trainer(tmp_path, reload_dataloaders_every_n_epochs=1)
    one.validate(model, datamodule=data, verbose=False)
    assert not multiprocessing.active_children()
    one.fit(model, datamodule=data)
    assert sorted(model.seen) == [(epoch, position) for epoch in range(2) for position in range(16)]
    assert model.corners[:16] != model.corners[16:]
    assert not multiprocessing.active_children()
    assert worker_loop._process.loop is None or worker_loop._process.loop._closed
    one.test(model, datamodule=data, verbose=False)
    assert len(one.predict(model, datamodule=data)) == len(data.predict_dataloader())
    data.teardown()
    again = Tiny()
    trainer(tmp_path, max_epochs=1).fit(again, datamodule=data)
    assert again.corners == model.corners[:16]
    assert not multiprocessing.active_children()


def test_a_loop_that_reads_is_left_open():
    """A loop in use is not closed."""
    loop = worker_loop.current_loop()
    held = loop.start(worker_loop.asyncio.sleep(3600))
    worker_loop.close_idle_loop()
    assert worker_loop.current_loop() is loop
    held.cancel()
    while not loop.is_idle():
        pass
    worker_loop.close_idle_loop()
    assert worker_loop.current_loop() is not loop


def test_overfitting_shows_the_same_chips_each_epoch(scenes, tmp_path):
    """`overfit_batches` needs samplers that do not shuffle."""
    model, data = Tiny(), module(scenes)
    trainer(tmp_path, overfit_batches=2).fit(model, datamodule=data)
    assert model.seen == [(0, position) for position in range(8)] * 2
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, FixedEpochSampler)
    assert [aoi.position for aoi in sampler] == list(range(16))


def test_augmentation_is_for_training_alone(scenes, tmp_path):
    """Any function of a normalised batch."""
    calls = []

    def zero(batch):
        calls.append(len(batch["image"]))
        return batch | {"image": batch["image"] * 0}

    model, data = Tiny(), module(scenes, augment=zero)
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert calls == [4] * 4
    assert all(not image.any() for image in model.images)
    plain = Tiny()
    trainer(tmp_path, max_epochs=1).fit(plain, datamodule=module(scenes, augment=False))
    assert all(image.any() for image in plain.images)


def test_augmentation_from_yaml(scenes, tmp_path):
    """Hydra's `_target_` and Lightning's `class_path` build the same object with its modules."""
    erasing = {"p": 1.0, "scale": [0.2, 0.2]}
    target = {"_target_": "kornia.augmentation.RandomErasing", **erasing}
    hydra = instantiate(
        {"_target_": "rasteret_ml.RasteretDataModule", "_convert_": "all", "images": "a.tif"}
        | {"augment": {"_target_": "rasteret_ml.Augmentation", "transforms": [target], "turns": False}}
    )
    named = {"class_path": "kornia.augmentation.RandomErasing", "init_args": erasing}
    given = {"class_path": "rasteret_ml.Augmentation", "init_args": {"transforms": [named], "turns": False}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({"data": {"images": "a.tif", "augment": given}}))
    parsed = from_yaml(tmp_path / "data.yaml")
    batch = next(iter(module(scenes).train_dataloader()))
    ready = module(scenes).on_after_batch_transfer(batch, 0)
    one, other = hydra._augment(ready), parsed._augment(ready)
    assert torch.equal(one["image"], other["image"])
    assert 0.15 < 1 - one["mask_valid"].float().mean() / ready["mask_valid"].float().mean() < 0.25


# Checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_what_was_measured(scenes, tmp_path, monkeypatch):
    """A later test measures nothing, prediction uses the same mean, other bands are refused, and training resumes."""
    model, data = Tiny(), module(scenes, **UNKNOWN)
    first = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path))
    first.fit(model, datamodule=data)
    path = tmp_path / "model.ckpt"
    first.save_checkpoint(path)
    with monkeypatch.context() as patch:
        patch.setattr(data_handles, "dataset_statistics", None)
        for stage in ("test", "predict"):
            later = module(scenes, **UNKNOWN)
            getattr(trainer(tmp_path), stage)(Tiny(), datamodule=later, ckpt_path=path)
            assert (later.mean, later.std) == (data.mean, data.std)
            assert later.class_values == data.class_values == {1: 0, 2: 1, 3: 2, 4: 3}
        loaded = rm.RasteretDataModule.load_from_checkpoint(path)
        assert (loaded.mean, loaded.sampling.size) == (data.mean, 64)
        given = module(scenes, normalization={"mean": [5, 6]}, classes={1: 0, 4: 1})
        trainer(tmp_path).test(Tiny(), datamodule=given, ckpt_path=path, verbose=False)
        assert (given.mean, given.std, given.class_values) == ((5, 6), data.std, {1: 0, 4: 1})
    with pytest.raises(UsageError, match=r"bands must be .*\['B02', 'B03'\], got \['B03', 'B02'\]"):
        trainer(tmp_path).test(Tiny(), datamodule=module(scenes, bands=("B03", "B02")), ckpt_path=path)
    further = Tiny()
    trainer(tmp_path).fit(further, datamodule=module(scenes, **UNKNOWN), ckpt_path=path)
    assert {epoch for epoch, _ in further.seen} == {1}
    assert len(further.seen) == 16


def test_it_pickles_after_it_was_used(scenes):
    """As `ddp_spawn` needs."""
    data = module(scenes)
    data.setup()
    loader = data.train_dataloader()
    again = pickle.loads(pickle.dumps(data))
    assert again.mean == data.mean
    one, other = next(iter(loader)), next(iter(again.train_dataloader()))
    assert torch.equal(one["bounds"], other["bounds"])


# Pixels --------------------------------------------------------------------------------------------------------


def test_scaled_pixels(tmp_path, rng):
    """Mean and std of reflectance are measured, given and stored; the model sees the same as with stored pixels."""
    stored = rng.integers(1000, 9000, (2, 128, 128), np.uint16)
    place = {"transform": Affine(10, 0, 5e5, 0, -10, 5e6), "crs": "EPSG:32633", "count": 2, "dtype": "uint16"}
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="GTiff",
        width=128,
        height=128,
        tiled=True,
        blockxsize=64,
        blockysize=64,
        **place,
    ) as file:
        file.write(stored)
        file.scales, file.offsets = (0.0001, 0.0002), (-0.1, 0.5)
    rm.build(str(tmp_path / "a.tif"), tmp_path / "a.parquet", datetime=None)
    options = {"images": str(tmp_path / "a.parquet"), "split": {"val_side": None}}
    options |= {"sampling": {"size": 64, "length": 4, "overlap": 0}}

    def with_scaled(scaled, **statistics):
        return rm.RasteretDataModule(**options, normalization={"scaled": scaled} | statistics)

    plain, scaled = with_scaled(False), with_scaled(True)
    np.testing.assert_allclose(scaled.mean, np.array(plain.mean) * (0.0001, 0.0002) + (-0.1, 0.5), rtol=1e-5)
    np.testing.assert_allclose(scaled.std, np.array(plain.std) * (0.0001, 0.0002), rtol=1e-5)
    one, other = (
        data.on_after_batch_transfer(next(iter(data.predict_dataloader())), 0)["image"] for data in (plain, scaled)
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    path = tmp_path / "statistics.yaml"
    with_scaled(True, statistics=str(path)).setup("fit")
    assert with_scaled(True, statistics=str(path)).mean == scaled.mean
    with pytest.raises(UsageError, match=r"scaled of .* must be False, got True"):
        with_scaled(False, statistics=str(path)).setup("fit")


def test_scaled_needs_stated_scales(scenes):
    with pytest.raises(UsageError, match="scaled=True needs"):
        module(scenes, normalization={"scaled": True, "max_chips": 8}, classes="auto").setup("fit")


def test_series_with_a_quality_band(tmp_path, rng):
    """Files of a quality band are built into the records, and are not a band of the image."""
    for day in ("20230801", "20230811"):
        for band in ("B02", "SCL"):
            pixels = rng.integers(1, 9, (96, 96)).astype(np.uint16 if band == "B02" else np.uint8)
            rm.testing.make_cog(tmp_path / "scenes" / f"T_{day}_{band}.tif", pixels, nodata=0, blocksize=64)
    data = rm.RasteretDataModule(
        str(tmp_path / "scenes" / "*.tif"),
        bands=["B02"],
        dataset={"quality": "sentinel-2-scl", "series": 2},
        split={"val_side": None},
        sampling={"size": 32, "overlap": 0, "length": 4},
        cache_dir=str(tmp_path / "cache"),
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 2, 1, 32, 32)
    assert batch["mask_clear"].shape == (4, 2, 1, 32, 32)


def test_plots_of_batches_and_samples(scenes):
    """Stored and normalised pixels, from a batch or a sample."""
    data = module(scenes)
    batch = next(iter(data.train_dataloader()))
    ready = data.on_after_batch_transfer(batch, 0)
    sample = data.train_set[next(iter(data.train_dataloader().sampler))]
    for given in (batch, ready | {"prediction": ready["mask"]}, sample):
        figure = data.plot(given, 3, title="three")
        assert len(figure.axes) >= 2
        assert "three" in [text.get_text() for text in figure.texts] + [axes.get_title() for axes in figure.axes] + [
            figure.get_suptitle()
        ]


def test_nothing_in_the_library_imports_hydra():
    for path in Path(rm.__file__).parent.rglob("*.py"):
        assert not {"import hydra", "from hydra", "omegaconf"} & set(path.read_text(encoding="utf-8").split("\n"))
        assert "omegaconf" not in path.read_text(encoding="utf-8")


def test_chips_are_replaced_only_in_training(scenes):
    """In the other stages each chip counts once, and what cannot be read is filled."""
    data = module(scenes, loading={"errors": {"action": "replace", "budget": 7}})
    data.setup()
    assert data.train_dataloader().errors.action == "replace"
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert (loader.errors.action, loader.errors.budget) == ("fill", 7)
