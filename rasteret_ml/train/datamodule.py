"""Images and labels for Lightning: indexed once, split in space, normalised on the device."""

from __future__ import annotations

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from rasteret_ml.errors import UsageError
from rasteret_ml.loader.failures import ErrorPolicy
from rasteret_ml.loader.loader import DataLoader
from rasteret_ml.raster.worker_loop import close_idle_loop
from rasteret_ml.samplers.grid_sampler import GridAOISampler
from rasteret_ml.samplers.sampler import config_from
from rasteret_ml.samples.collate import collate
from rasteret_ml.samples.plots import plot_from
from rasteret_ml.samples.sample import Sample
from rasteret_ml.train.data_handles import DataHandles, DatasetOptions, Rasters, RasterSource, class_map
from rasteret_ml.train.datamodule_config import (
    LoadingConfig,
    NormalizationConfig,
    SamplingConfig,
    SplitConfig,
    builtin_fields,
    is_builtin,
    to_builtin,
)
from rasteret_ml.transforms.augment import random_flip_rot90
from rasteret_ml.transforms.device import to_device
from rasteret_ml.transforms.normalize import normalize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FixedEpochSampler(SequentialSampler, DistributedSampler[Any]):
    """The first epoch of a sampler, again and again, for Lightning's `overfit_batches`.

    Lightning replaces a sampler that shuffles by one that counts 0, 1, 2, ..., which are not chips, and one that does
    not distribute by one that does. Both base classes tell it to keep this one.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        self._sampler.set_epoch(0)
        return iter(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Keep the first epoch."""


class ExactResume(pl.Callback):
    """Lets Lightning resume exactly more than once; `RasteretDataModule` does so without this callback.

    Lightning saves the state of a loader (`DataLoader.state_dict`), but restores it only if it considers the epoch
    unfinished. A run that was resumed from a checkpoint of an epoch's last batch does not count the next epoch as
    started (seen in Lightning 2.6), so a second resume would restart that epoch. This callback fixes the count in each
    checkpoint.

        pl.Trainer(callbacks=[rm.ExactResume()])
    """

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Count the current training epoch as started."""
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
        if not trainer.training or progress is None:
            return
        for counts in progress.values():  # of this run, and in total
            if counts["completed"] == counts["ready"]:  # an epoch in training is not completed
                counts["ready"] = counts["started"] = counts["completed"] + 1


class RasteretDataModule(DataHandles, pl.LightningDataModule):
    """Train, validate, test and predict on images with an optional label raster.

    Training draws random chips inside the training area. Validation and testing cover their areas with a grid of chips
    and count only pixels inside. Prediction covers everything.

    All arguments can come from YAML (Hydra, LightningCLI), the groups as mappings of their fields. In Python,
    Collections, tables of polygons and the config classes can be passed as well:

        data = rm.RasteretDataModule(
            "scenes/*.tif", "labels.tif", sampling={"size": 256}, loading={"batch_size": 8, "num_workers": 4}
        )
        trainer.fit(task, datamodule=data)

    A checkpoint stores the bands, mean, std and classes of the training and restores them, so that nothing is measured
    again to validate, test or predict. Arguments and the statistics file take precedence.

    Args:
        images: A Collection (`.parquet` or a folder made by `build`), or GeoTIFFs to build one from, once: a path,
            glob, URL, `.txt` list, or a list of these.
        labels: The same for a label raster with one band; None = images only.
        bands: Bands along C; default all of the Collection's but that of `dataset.quality`.
        label_band: Default the only band of the label Collection.
        classes: Mapping of stored label values to classes; "auto" = number the values in the training area in order,
            from 0; None = stored values are classes.
        ignore_index: Class of invalid pixels; pass the same to the task.
        dataset: Keyword arguments of `RasteretDataset` for the images; its options of reading apply to the labels too.
        split: Where to train, validate and test, see `SplitConfig`. Splits that leak are refused.
        sampling: Which chips to train on and to predict, see `SamplingConfig`.
        loading: How batches are loaded, see `LoadingConfig`.
        normalization: What images are normalised with, see `NormalizationConfig`.
        augment: In training, True = random flips and quarter turns; or a function of a normalised batch on the device,
            such as an `Augmentation` (in YAML `_target_` or `class_path`).
        cache_dir: Folder for the Collections that are built.

    Raises:
        UsageError: unknown fields, or arguments that are invalid or contradict each other.
    """

    def __init__(
        self,
        images: Rasters,
        labels: Rasters | None = None,
        *,
        bands: list[str] | tuple[str, ...] | None = None,
        label_band: str | None = None,
        classes: Literal["auto"] | dict[int, int] | None = "auto",
        ignore_index: int = -100,
        dataset: Mapping[str, Any] | None = None,
        split: SplitConfig | Mapping[str, Any] | None = None,
        sampling: SamplingConfig | Mapping[str, Any] | None = None,
        loading: LoadingConfig | Mapping[str, Any] | None = None,
        normalization: NormalizationConfig | Mapping[str, Any] | None = None,
        augment: bool | Callable[[Sample], Sample] = True,
        cache_dir: str | os.PathLike[str] = "~/.cache/rasteret_ml",
    ) -> None:
        super().__init__()
        images, labels, bands, cache_dir = map(to_builtin, (images, labels, bands, cache_dir))
        if isinstance(bands, str):
            raise UsageError(f"bands must be a list of names, got {bands!r}; write [{bands!r}].")
        self.split = config_from(SplitConfig, to_builtin(split), "split")
        self.sampling = config_from(SamplingConfig, to_builtin(sampling), "sampling")
        self.loading = config_from(LoadingConfig, to_builtin(loading), "loading")
        self.normalization = config_from(NormalizationConfig, to_builtin(normalization), "normalization")
        self.sampling.locality_for(self.loading.batch_size)
        self._dataset = DatasetOptions(dataset)
        self._bands = None if bands is None else tuple(str(band) for band in bands)
        self._label_band, self._classes, self._augment = label_band, class_map(classes), augment
        self.ignore_index = int(ignore_index)
        self.batch_size = self.loading.batch_size  #: Chips in a batch; Lightning's `BatchSizeFinder` changes it.
        quality, folder = self._dataset.quality_band, Path(cache_dir).expanduser()
        stored = self._bands if self._bands is None or quality is None else (*self._bands, quality)
        self._sources = {"images": RasterSource(role="images", given=images, bands=stored, folder=folder)}
        if labels is not None:
            self._sources["labels"] = RasterSource(role="labels", given=labels, bands=None, folder=folder)
        self._restored: dict[str, Any] = {}
        self._loaders: list[weakref.ref[DataLoader]] = []
        classes, dataset = to_builtin(classes), {k: v for k, v in self._dataset.given.items() if is_builtin(v)}
        groups = (self.split, self.sampling, self.loading, self.normalization)
        split, sampling, loading, normalization = map(builtin_fields, groups)
        # Lightning reads the arguments from these local variables. They are not for loggers: TorchGeo's tasks have a
        # `labels` too, and Lightning refuses two hyperparameters of one name.
        self.save_hyperparameters(ignore=[k for k, v in locals().items() if not is_builtin(v)], logger=False)

    # Lightning's hooks --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build the Collections that do not exist yet (Lightning calls this in one process per node)."""
        for source in self._sources.values():
            source.open()

    def setup(self, stage: str | None = None) -> None:
        """Open what a stage ("fit", "validate", "test", "predict"; None = all) needs, and refuse splits that leak.

        Raises:
            SplitLeakError: two splits can read the same place at the same time.
            UsageError: an empty area, or statistics, a mean or a std of other bands or units.
        """
        bands = self.images.bands
        for name in ("mean", "std"):
            values = getattr(self.normalization, name)
            if values is not None and len(values) != len(bands):
                raise UsageError(f"{name} must have a number for each of the bands {list(bands)}, got {len(values)}.")
        if stage != "predict":
            _ = self.areas
        if stage in (None, "fit"):  # the other stages may restore a checkpoint, which has the statistics
            _ = self.mean, self.std, self.train_set, self.eval_set

    def train_dataloader(self) -> DataLoader:
        """Load random chips inside the training area."""
        return self._loader(self.train_set, self._train_sampler(self.train_set, self.train_area))

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Load a grid of chips over the validation area; an empty list if there is none."""
        return self._held_out(self.val_area)

    def test_dataloader(self) -> DataLoader | list[Any]:
        """Load a grid of chips over the test area, or over the validation area if there is none."""
        return self._held_out(self.val_area if self.test_area is None else self.test_area)

    def _held_out(self, area: Any) -> DataLoader | list[Any]:
        if area is None:
            return []
        return self._loader(self.eval_set, GridAOISampler(self.eval_set, self.sampling.size, aois=area), once=True)

    def predict_dataloader(self) -> DataLoader:
        """Load the chips of `predict_sampler`, images only."""
        return self._loader(self.images, self.predict_sampler, once=True)

    @functools.cached_property
    def predict_sampler(self) -> Any:
        """Chips to predict, which can be assigned; default an overlapping grid over everything."""
        return GridAOISampler(self.images, self.sampling.size, self.sampling.stride)

    def _loader(self, dataset: Any, sampler: Any, *, once: bool = False) -> DataLoader:
        """Build a loader; with `once` no chip may replace another."""
        _ = self.mean  # measure now, if necessary, instead of at the first batch
        if self.trainer is not None and self.trainer.overfit_batches:
            sampler = FixedEpochSampler(sampler)
        stack = functools.partial(collate, ignore_index=self.ignore_index)
        options = self.loading.loader_options() | {"batch_size": self.batch_size}
        options |= {"sampler": sampler, "collate_fn": stack}
        errors = ErrorPolicy.of(self.loading.errors)
        if once and errors.action == "replace":
            options["errors"] = dataclasses.replace(errors, action="fill")
        loader = DataLoader(dataset, **options)
        self._loaders = [ref for ref in self._loaders if ref() is not None] + [weakref.ref(loader)]
        return loader

    def transfer_batch_to_device(self, batch: Sample, device: torch.device, dataloader_idx: int) -> Sample:
        """Move stored pixels to the device without waiting; what the host reads, such as `draw`, stays there."""
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Normalise and (in training) augment a batch on the device."""
        ready = normalize(batch, self.mean, self.std, self.ignore_index, scaled=self.normalization.scaled)
        if self.trainer is None or not self.trainer.training or not self._augment:
            return ready
        return random_flip_rot90(ready, self.sampling.seed) if self._augment is True else self._augment(ready)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let Lightning resume exactly from the checkpoint, see `ExactResume`."""
        ExactResume().on_save_checkpoint(self.trainer, None, checkpoint)

    def teardown(self, stage: str | None = None) -> None:
        """Stop the loaders' workers and, if nothing else reads, close this process's connections.

        The data stay open and can be used, or set up, again.
        """
        for ref in self._loaders:
            loader = ref()
            if loader is not None:
                loader.close()
        self._loaders = []
        close_idle_loop()

    def __str__(self) -> str:
        # Lightning's own builds every loader, which opens everything.
        return f"RasteretDataModule({', '.join(f'{name}={value!r}' for name, value in self.hparams.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaders": []}

    def plot(self, sample: Sample, item: int = 0, **options: Any) -> Figure:
        """Plot a sample, or one `item` of a batch, with stored or normalised pixels.

        A `prediction` in the sample is drawn too; options as for `RasteretDataset.plot`.
        """
        if sample["transform"].ndim > 1:
            sample = {
                key: value[item].cpu() if isinstance(value, torch.Tensor) else value for key, value in sample.items()
            }
        return plot_from([self.images], sample, {"ignore_index": self.ignore_index} | options)
