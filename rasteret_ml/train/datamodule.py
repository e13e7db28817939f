"""Images and labels to Lightning loaders: built once, split in space, normalised on the device."""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.errors import UsageError
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.loader.loader import DataLoader
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.raster.worker_loop import close_idle_loop
from rasteret_ml.samplers.grid_sampler import GridAOISampler
from rasteret_ml.samplers.locality import Locality
from rasteret_ml.samplers.random import Placement, RandomAOISampler
from rasteret_ml.samples.collate import collate
from rasteret_ml.samples.plots import plot_from
from rasteret_ml.samples.sample import Sample
from rasteret_ml.train.areas import Polygons, SplitAreas
from rasteret_ml.train.data_handles import DataHandles, class_map
from rasteret_ml.train.sources import Rasters, band_names, is_plain, plain, sources_of
from rasteret_ml.train.stats_config import ChannelStats, StatsConfig
from rasteret_ml.transforms.device import to_device
from rasteret_ml.transforms.flips import random_flip_rot90
from rasteret_ml.transforms.normalize import normalize

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["ExactResume", "FixedEpochSampler", "RasteretDataModule", "fix_epoch_count"]


class FixedEpochSampler(SequentialSampler, DistributedSampler[Any]):
    """The first epoch of a sampler, again and again.

    Lightning takes it for what it asks for when a few batches are to be overfitted: a sampler that does not shuffle (in
    the place of any other it puts one that counts 0, 1, 2 …, which is no chip), and one that deals to ranks by itself.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        self._sampler.set_epoch(0)
        return iter(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the first one."""


class ExactResume(pl.Callback):
    """Lets Lightning resume exactly more than once; `RasteretDataModule` does it by itself.

    Lightning saves a loader's state (`DataLoader.state_dict`) by itself, and gives it back only where it takes an epoch
    to be unfinished. A run that went on from a checkpoint of an epoch's last batch does not count the next epoch as
    begun (seen in Lightning 2.6), so that a second resume would begin that epoch anew. This callback mends the count
    in each checkpoint.
    """

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Mend the count."""
        fix_epoch_count(trainer, checkpoint)


def fix_epoch_count(trainer: Any, checkpoint: dict[str, Any]) -> None:
    """Count the epoch that is being trained as begun, in a checkpoint that is about to be saved."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress")
    if not trainer.training or progress is None:
        return
    for counts in progress.values():  # of this run, and in total
        if counts["completed"] == counts["ready"]:  # while an epoch is trained, one is not completed
            counts["ready"] = counts["started"] = counts["completed"] + 1


_log = logging.getLogger(__name__)


class RasteretDataModule(DataHandles, pl.LightningDataModule):
    """Train, validate, test and predict on images with an optional label raster.

    Training draws random chips inside the training area; validation and test cover theirs with a grid, and count
    only pixels inside it; prediction covers everything. Each argument can come from YAML (Hydra, LightningCLI); from
    Python, Collections, tables of polygons and the library's own option objects do as well.

    A checkpoint keeps the bands, mean, std and classes that a model was trained with, and gives them back: what was
    measured then is not measured again to validate, test or predict. What an argument or the statistics file says
    comes first.

    Args:
        images: A Collection (`.parquet` or a folder made by `build`), or GeoTIFFs: a path, glob, URL, `.txt` list,
            or a list of these, from which one is built once.
        labels: The same for a single-band label raster; None = images only.
        bands: Bands along C; default all of the Collection's (but not the one of `quality`).
        label_band: Default the label Collection's only band.
        classes: Stored label value to class; "auto" = the values that occur in the training area, in order, become
            0, 1, 2 …; None = stored values are classes.
        ignore_index: Class of invalid pixels; give the task the same.
        val_side: With `val_fraction`: the side of the area held out for validation; None = none.
        val_fraction: Share of the area's height or width held out.
        val_aois: Polygons held out instead (a path, a lon/lat box, GeoJSON, a table); training stays outside them.
        test_aois: Polygons held out for testing; default those for validation.
        train_aois: Polygons that training chips are centred in, as far as a chip there stays out of the held-out
            area; default everything that is not held out.
        splits: Instead of these four: one table of polygons (or its path) with a column `split` that says "train",
            "val" or "test", such as `split_blocks` and `split_aois` give; other rows are left alone.
        placement: Where training chips lie in their polygons, see `RandomAOISampler`. Default "centre" with
            `train_aois`, else "inside".
        min_valid: Share of valid pixels that a training chip should have.
        buffer: Least distance between splits in CRS units. Whatever made them, splits that leak are refused.
        size: Chip size in pixels.
        length: Training chips in an epoch.
        batch_size: Chips in a batch.
        overlap: Pixels by which neighbouring chips overlap in prediction; default a quarter of `size`.
        crs: Grid CRS, needed where images are in several.
        res: Pixel size, one number or (x, y).
        nodata: Overrides the images' declared nodata.
        order: Which of overlapping images comes first, see `RasteretDataset`.
        harmonize: Bring images of another scale or offset to the first one's.
        quality: A band that tells clear pixels (adds `mask_clear`), see `RasteretDataset`.
        clear_first: With `quality`: clear pixels of later images replace pixels that are valid, but not clear.
        series: Dates of a time series, or a mapping of `TimeSeries`' fields: images `[T, C, H, W]`.
        composite: The dates of `series` as one image, see `RasteretDataset`.
        scaled: Whether mean and std are of what stored pixels stand for, stored * scale + offset as the files say,
            instead of the stored ones.
        mean: Per band; default measured in the training area.
        std: Per band; default measured in the training area.
        statistics_chips: Chips that are read to measure; None = all.
        statistics: A YAML that mean, std and classes are read from; where it is not there yet, it is measured and
            written. Measure anew (delete it) when the splits change.
        augment: In training, True: random flips and quarter turns, by each chip's draw; or what else is done to a
            prepared batch on its device, such as an `Augmentation` (from YAML by `_target_`, or `class_path`).
        locality: Active tile blocks that training chips are drawn from in turn, or a mapping of `Locality`'s fields;
            default uniform order.
        cache_bytes: Decoded tiles kept in each process, in bytes; give some with `locality`.
        seed: Of the training chips' order.
        num_workers: Loader processes.
        multiprocessing_context: "fork", "forkserver" or "spawn"; default torch's.
        prefetch_factor: Batches ahead per worker; default torch's.
        persistent_workers: Keep workers between epochs.
        pin_memory: Default where there is an accelerator.
        lookahead: Batches whose reading is begun before they are asked for, see `DataLoader`.
        lookahead_bytes: Memory that they may take.
        errors: What is done about chips that cannot be read, see `ErrorPolicy`; default raise. "replace" is for
            training alone: where each chip counts once, it becomes "fill".
        cache_dir: Where Collections are built.

    Raises:
        UsageError: arguments that cannot work, or that contradict each other.
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
        val_side: Literal["top", "bottom", "left", "right"] | None = "top",
        val_fraction: float = 0.3,
        val_aois: Polygons | None = None,
        test_aois: Polygons | None = None,
        train_aois: Polygons | None = None,
        splits: Polygons | None = None,
        placement: Placement | None = None,
        min_valid: float = 0.0,
        buffer: float = 0.0,
        size: int = 128,
        length: int = 1000,
        batch_size: int = 16,
        overlap: int | None = None,
        crs: int | str | None = None,
        res: float | list[float] | tuple[float, float] | None = None,
        nodata: float | None = None,
        order: str = "newest",
        harmonize: bool = False,
        quality: str | dict[str, Any] | QualityMask | None = None,
        clear_first: bool = False,
        series: int | dict[str, Any] | TimeSeries | None = None,
        composite: str | dict[str, list[str]] | None = None,
        scaled: bool = False,
        mean: list[float] | tuple[float, ...] | None = None,
        std: list[float] | tuple[float, ...] | None = None,
        statistics_chips: int | None = 64,
        statistics: str | None = None,
        augment: bool | Callable[[Sample], Sample] = True,
        locality: int | dict[str, int] | Locality | None = None,
        cache_bytes: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        multiprocessing_context: Literal["fork", "forkserver", "spawn"] | None = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = True,
        pin_memory: bool | None = None,
        lookahead: int = 4,
        lookahead_bytes: int = 1024**3,
        errors: str | dict[str, Any] | ErrorPolicy | None = None,
        cache_dir: str = "~/.cache/rasteret_ml",
    ) -> None:
        super().__init__()
        images, labels, bands, classes = plain(images), plain(labels), plain(bands), plain(classes)
        val_aois, test_aois, train_aois, splits = plain(val_aois), plain(test_aois), plain(train_aois), plain(splits)
        crs, res, mean, std, statistics = plain(crs), plain(res), plain(mean), plain(std), plain(statistics)
        quality, series, composite, locality = plain(quality), plain(series), plain(composite), plain(locality)
        errors, cache_dir = plain(errors), plain(cache_dir)
        # Not to loggers: TorchGeo's tasks have a `labels=` of their own, and Lightning refuses two of a name.
        self.save_hyperparameters(ignore=[k for k, v in locals().items() if not is_plain(v)], logger=False)
        self.size, self.length, self.batch_size = int(size), int(length), int(batch_size)
        self.overlap = self.size // 4 if overlap is None else int(overlap)
        self.ignore_index = int(ignore_index)
        if not 0 <= self.overlap < self.size:
            raise UsageError(f"overlap lies between 0 and size - 1 = {self.size - 1}, not {overlap}.")
        self._bands = band_names(bands)
        self._quality = None if quality is None else QualityMask.parse(quality)
        self._sources = sources_of(images, labels, self._bands, self._quality, Path(cache_dir))
        self._label_band, self._classes = label_band, class_map(classes)
        self._areas = SplitAreas(
            val_side=val_side,
            val_fraction=float(val_fraction),
            val_aois=val_aois,
            test_aois=test_aois,
            train_aois=train_aois,
            splits=splits,
            buffer=float(buffer),
        )
        self._image_options: dict[str, Any] = {
            "crs": crs,
            "res": tuple(res) if isinstance(res, list) else res,
            "mosaic": {"nodata": nodata, "order": order, "harmonize": harmonize, "clear_first": clear_first},
            "quality": self._quality,
            "series": TimeSeries.of(series),
            "composite": composite,
            "reading": {"cache_bytes": int(cache_bytes)},
        }
        self._draws: dict[str, Any] = {
            "seed": int(seed),
            "placement": placement or ("inside" if train_aois is None else "centre"),
            "min_valid": float(min_valid),
            "locality": _locality(locality, self.batch_size),
        }
        self._loading: dict[str, Any] = {
            "num_workers": int(num_workers),
            "multiprocessing_context": multiprocessing_context if num_workers else None,
            "prefetch_factor": prefetch_factor if num_workers else None,
            "persistent_workers": bool(persistent_workers and num_workers),
            "pin_memory": torch.cuda.is_available() if pin_memory is None else bool(pin_memory),
            "lookahead": int(lookahead),
            "lookahead_bytes": int(lookahead_bytes),
            "errors": errors,
        }
        self._scaled, self._augment = bool(scaled), augment
        self._given = ChannelStats.of(mean, std)
        self._measuring = _measuring(statistics, statistics_chips, self.size, int(seed), bool(scaled))
        self._restored: dict[str, Any] = {}
        self._predict_sampler: Any = None
        self._loaders: list[weakref.ref[DataLoader]] = []

    # Lightning's hooks -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build the Collections that do not exist yet (Lightning calls this on one process a node)."""
        for source in self._sources.values():
            source.open()

    def setup(self, stage: str | None = None) -> None:
        """Open what a stage ("fit", "validate", "test", "predict"; None = all) needs, once; refuse splits that leak.

        Raises:
            SplitLeakError: two splits can read the same ground at the same time.
            UsageError: an area that is empty, statistics of other bands or units, a mean or std of other bands.
        """
        self._given.check(self.images.bands)
        if stage != "predict":
            _ = self.areas
        if stage in (None, "fit"):  # other stages may have a checkpoint to come, which knows what was measured
            _ = self.mean, self.std, self.train_set, self.eval_set

    # Loaders ------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Random chips inside the training area."""
        sampler = RandomAOISampler(self.train_set, self.size, self.length, self.train_area, **self._draws)
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """A grid over the held-out area; nothing where none is held out."""
        return self._held_out(self.val_area)

    def test_dataloader(self) -> DataLoader | list[Any]:
        """A grid over the area held out for testing; where there is none, as validation."""
        return self._held_out(self.val_area if self.test_area is None else self.test_area)

    def _held_out(self, area: Any) -> DataLoader | list[Any]:
        if area is None:
            return []
        return self._loader(self.eval_set, GridAOISampler(self.eval_set, self.size, aois=area), once=True)

    def predict_dataloader(self) -> DataLoader:
        """The chips of `predict_sampler`, images only."""
        return self._loader(self.images, self.predict_sampler, once=True)

    @property
    def predict_sampler(self) -> Any:
        """The chips that are predicted: an overlapping grid over everything, unless others were assigned."""
        if self._predict_sampler is None:
            self._predict_sampler = GridAOISampler(self.images, self.size, self.size - self.overlap)
        return self._predict_sampler

    @predict_sampler.setter
    def predict_sampler(self, sampler: Any) -> None:
        self._predict_sampler = sampler

    def _loader(self, dataset: Any, sampler: Any, *, once: bool = False) -> DataLoader:
        """A loader; `once` where no chip may stand for another."""
        _ = self.mean  # measured now, if it must be, rather than at the first batch
        if self.trainer is not None and self.trainer.overfit_batches:
            sampler = FixedEpochSampler(sampler)
        stack = functools.partial(collate, ignore_index=self.ignore_index)
        options = self._loading | {"batch_size": self.batch_size, "sampler": sampler, "collate_fn": stack}
        errors = ErrorPolicy.of(options["errors"])
        if once and errors.action == "replace":
            options["errors"] = dataclasses.replace(errors, action="fill")
        loader = DataLoader(dataset, **options)
        self._loaders = [ref for ref in self._loaders if ref() is not None] + [weakref.ref(loader)]
        return loader

    def transfer_batch_to_device(self, batch: Sample, device: torch.device, dataloader_idx: int) -> Sample:
        """Native pixels to the device, without waiting; `draw` stays on the host, which reads it."""
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Float, normalised and (in training) augmented, on the device."""
        ready = normalize(batch, self.mean, self.std, self.ignore_index, scaled=self._scaled)
        if self.trainer is None or not self.trainer.training or not self._augment:
            return ready
        return random_flip_rot90(ready, self._draws["seed"]) if self._augment is True else self._augment(ready)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let Lightning go on from the checkpoint exactly, however often (see `ExactResume`)."""
        fix_epoch_count(self.trainer, checkpoint)

    def teardown(self, stage: str | None = None) -> None:
        """End the workers of its loaders and, where nothing else reads, this process's connections.

        What was opened stays open: it can be used, or set up, again.
        """
        for ref in self._loaders:
            loader = ref()
            if loader is not None:
                loader.close()
        self._loaders = []
        close_idle_loop()

    def __str__(self) -> str:
        # Lightning's own makes every loader, and so opens everything.
        return f"RasteretDataModule({', '.join(f'{name}={value!r}' for name, value in self.hparams.items())})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaders": []}

    # Looking ------------------------------------------------------------------------------------------------------

    def plot(self, sample: Sample, item: int = 0, **options: Any) -> Figure:
        """A picture of a sample, or of one `item` of a batch, as it was loaded or as a model gets it.

        A `prediction` among its keys is drawn too; options as for `RasteretDataset.plot`.
        """
        if sample["transform"].ndim > 1:
            sample = {
                key: value[item].cpu() if isinstance(value, torch.Tensor) else value for key, value in sample.items()
            }
        return plot_from([self.images], sample, {"ignore_index": self.ignore_index} | options)


def _measuring(path: str | None, chips: int | None, size: int, seed: int, scaled: bool) -> StatsConfig:
    return StatsConfig(path=path, chips=chips, size=size, seed=seed, scaled=scaled)


def _locality(value: Any, batch_size: int) -> Locality | None:
    if isinstance(value, dict):
        try:
            return Locality(**{"batch_size": batch_size} | value)
        except TypeError as error:
            raise UsageError(f"locality= {value}: {error}.") from None
    return Locality(blocks=value, batch_size=batch_size) if isinstance(value, int) else value
