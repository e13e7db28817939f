"""Images and labels to Lightning loaders: built once, split in space, normalised on the device."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.fetch.urls import is_remote
from rasteret_ml.ingest.build import build
from rasteret_ml.ingest.files import expand_paths
from rasteret_ml.loading.collate import collate
from rasteret_ml.loading.dataset import RasteretDataset
from rasteret_ml.loading.loader import DataLoader
from rasteret_ml.loading.sample import Sample
from rasteret_ml.sampling.locality import Locality
from rasteret_ml.sampling.samplers import GridAOISampler, Placement, RandomAOISampler
from rasteret_ml.splitting.leaks import check_splits
from rasteret_ml.train.areas import SplitAreas
from rasteret_ml.train.prepare import prepare
from rasteret_ml.train.statistics import DatasetStatistics, dataset_statistics
from rasteret_ml.train.turning import flip_and_turn

__all__ = ["RasteretDataModule"]

_log = logging.getLogger(__name__)
_CLASS_CHIPS = 256
"""Chips looked at for classes: more than for means, so that rare ones are found."""


class RasteretDataModule(pl.LightningDataModule):
    """Train, validate, test and predict on images with an optional label raster.

    Training draws random chips inside the training area; validation and test cover theirs with a grid, and count
    only pixels inside it; prediction covers everything. All arguments can come from YAML.

    Args:
        images: A Collection (`.parquet` or a folder made by `build`), or GeoTIFFs: a path, glob, URL, `.txt` list,
            or a list of these, from which one is built once.
        labels: The same for a single-band label raster; None = images only.
        bands: Bands along C; default all of the Collection's.
        label_band: Default the label Collection's only band.
        classes: Stored label value to class; "auto" = the values that occur in the training area, in order, become
            0, 1, 2 …; None = stored values are classes.
        ignore_index: Class of invalid pixels; give the task the same.
        val_side: With `val_fraction`: the side of the area held out for validation.
        val_fraction: Share of the area's height or width held out.
        val_aois: Polygons held out instead (path, geometries); training stays outside them.
        test_aois: Polygons held out for testing; default those for validation.
        train_aois: Polygons that training chips are centred in, as far as a chip there stays out of the held-out
            area; default everything that is not held out.
        splits: Instead of these four: one table of polygons (or its path) with a column `split` that says "train",
            "val" or "test", such as `split_blocks` and `split_aois` give; other rows are left alone.
        placement: Where training chips lie in their polygons, see `RandomAOISampler`. Default "centre" with
            `train_aois`, else "inside".
        buffer: Least distance between splits in CRS units. Whatever made them, splits that leak are refused.
        size: Chip size in pixels.
        length: Training chips in an epoch.
        batch_size: Chips in a batch.
        overlap: Pixels by which neighbouring chips overlap in prediction.
        crs: Grid CRS, needed where images are in several.
        res: Pixel size.
        nodata: Overrides the images' declared nodata.
        mean: Per band; default measured in the training area.
        std: Per band; default measured in the training area.
        statistics_chips: Chips that are read to measure; None = all.
        statistics: A YAML that mean, std and classes are read from; where it is not there yet, it is measured and
            written. Measure anew (delete it) when the splits change.
        augment: Random flips and quarter turns in training.
        locality: Active tile blocks that training chips are drawn from in turn (see `Locality`); default uniform order.
        cache_bytes: Decoded tiles kept in each process, in bytes; give some with `locality`.
        seed: Of the training chips' order.
        num_workers: Loader processes.
        multiprocessing_context: "fork", "forkserver" or "spawn"; default torch's.
        prefetch_factor: Batches ahead per worker; default torch's.
        pin_memory: Default where there is an accelerator.
        cache_dir: Where Collections are built.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        *,
        bands: Sequence[str] | None = None,
        label_band: str | None = None,
        classes: Mapping[int, int] | Literal["auto"] | None = "auto",
        ignore_index: int = -100,
        val_side: str | None = "top",
        val_fraction: float = 0.3,
        val_aois: Any = None,
        test_aois: Any = None,
        train_aois: Any = None,
        splits: Any = None,
        placement: Placement | None = None,
        buffer: float = 0.0,
        size: int = 128,
        length: int = 1000,
        batch_size: int = 16,
        overlap: int = 32,
        crs: Any = None,
        res: float | None = None,
        nodata: float | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        statistics_chips: int | None = 64,
        statistics: str | os.PathLike[str] | None = None,
        augment: bool = True,
        locality: int | None = None,
        cache_bytes: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        multiprocessing_context: str | None = None,
        prefetch_factor: int | None = None,
        pin_memory: bool | None = None,
        cache_dir: str | os.PathLike[str] = "~/.cache/rasteret_ml",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images", "labels", "val_aois", "test_aois", "train_aois", "splits"])
        self._sources = {"images": _plain(images), "labels": _plain(labels)}
        self._bands = None if bands is None else [str(b) for b in bands]
        self._label_band = label_band
        self._classes = {int(k): int(v) for k, v in classes.items()} if isinstance(classes, Mapping) else classes
        self.ignore_index = int(ignore_index)
        if splits is not None and not (val_aois is test_aois is train_aois is None):
            raise UsageError("splits= says all of train, val and test; leave val_aois, test_aois and train_aois out.")
        self._areas = SplitAreas(
            val_side=val_side,
            val_fraction=float(val_fraction),
            val_aois=val_aois,
            test_aois=test_aois,
            train_aois=train_aois,
            splits=splits,
        )
        self._placement: Placement = placement or ("inside" if train_aois is None else "centre")
        self._buffer = float(buffer)
        self.size, self.length, self.batch_size, self.overlap = int(size), int(length), int(batch_size), int(overlap)
        if not 0 <= self.overlap < self.size:
            raise UsageError(f"overlap lies between 0 and size - 1 = {self.size - 1}, not {overlap}.")
        self._grid = {"crs": crs, "res": res}
        self._nodata, self._cache_bytes = nodata, int(cache_bytes)
        self._locality = None if locality is None else Locality(blocks=int(locality), batch_size=self.batch_size)
        self.mean = None if mean is None else tuple(float(v) for v in mean)
        self.std = None if std is None else tuple(float(v) for v in std)
        self._statistics_chips, self._statistics = statistics_chips, statistics
        self._augment, self._seed = bool(augment), int(seed)
        self._loader: dict[str, Any] = {
            "num_workers": int(num_workers),
            "multiprocessing_context": multiprocessing_context if num_workers else None,
            "prefetch_factor": prefetch_factor if num_workers else None,
            "pin_memory": torch.cuda.is_available() if pin_memory is None else bool(pin_memory),
        }
        self._cache = Path(cache_dir).expanduser()
        self._ready = False
        self._predict_sampler: Any = None

    # Building ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Build the Collections that do not exist yet (Lightning calls this on one process a node)."""
        for role, source in self._sources.items():
            if source is not None:
                self._open(role, source)

    def _open(self, role: str, source: Any) -> Collection:
        if isinstance(source, Collection):
            return source
        texts = [source] if isinstance(source, str) else list(source)
        if len(texts) == 1 and (texts[0].endswith(".parquet") or _is_collection_folder(texts[0])):
            return Collection.open(texts[0])
        files = expand_paths(texts)
        named = self._bands if role == "images" else None
        key = hashlib.sha256(json.dumps([role, [_version(f) for f in files], named]).encode()).hexdigest()[:16]
        path = self._cache / f"{role}-{key}.parquet"
        if path.exists():
            try:
                return Collection.open(path)
            except CollectionError:
                _log.warning("%s is not readable and is built again", path)
        # A label raster has no date of its own: it is true for every image of its place.
        return build(files, path, bands=named, datetime="filename" if role == "images" else None)

    def setup(self, stage: str | None = None) -> None:
        """Open datasets, split them, measure what was not given; only once."""
        if self._ready:
            return
        self.collection = self._open("images", self._sources["images"])
        self.bands = tuple(self._bands or self.collection.bands)
        options: dict[str, Any] = self._grid | {"nodata": self._nodata, "cache_bytes": self._cache_bytes}
        self.images = RasteretDataset(self.collection, self.bands, **options)
        self.train_area, self.val_area, self.test_area = self._areas.cut(self.images, self.size)
        # Held-out chips reach out of their areas, but only pixels inside count: the areas are what must not be seen.
        held_out = {"val": self.val_area, "test": self.test_area}
        found = {name: area for name, area in held_out.items() if area is not None}
        if found:
            check_splits({"train": self._train_sampler(self.images)} | found, buffer=self._buffer)
        known = self._known_statistics()
        labels = None if self._sources["labels"] is None else self._open_labels()
        self._measure(known, labels)
        self._join_labels(options, labels)
        self._ready = True

    def _known_statistics(self) -> DatasetStatistics | None:
        """Those of the YAML, where there is one."""
        if self._statistics is None or not Path(self._statistics).expanduser().exists():
            return None
        known = DatasetStatistics.load(self._statistics)
        if tuple(known.bands) != self.bands:
            raise UsageError(
                f"{os.fspath(self._statistics)} is of bands {list(known.bands)}, the data are of {list(self.bands)}; "
                "delete it, and it is measured again, or choose another path with statistics=."
            )
        return known

    def _open_labels(self) -> RasteretDataset:
        """The labels as they are stored."""
        collection = self._open("labels", self._sources["labels"])
        bands = [self._label_band] if self._label_band else collection.bands
        if len(bands) != 1:
            raise UsageError(f"The labels have several bands {bands}; choose one with label_band=.")
        cached: dict[str, Any] = {"cache_bytes": self._cache_bytes}
        return RasteretDataset(collection, bands, is_image=False, crs=self.images.crs, **cached)

    def _measure(self, known: DatasetStatistics | None, labels: RasteretDataset | None) -> None:
        """Mean, std and classes, as far as they were not given, of the training area; kept where a path was given."""
        options: dict[str, Any] = {"aois": self.train_area, "size": self.size, "seed": self._seed}
        writing = self._statistics is not None
        found = known
        if found is None and (writing or self.mean is None or self.std is None):
            found = dataset_statistics(self.images, max_chips=self._statistics_chips, **options)
        if found is not None:
            self.mean, self.std = self.mean or found.mean, self.std or found.std
        classes = {} if known is None else known.classes
        if self._classes == "auto" and labels is not None and labels.dtype.kind != "f" and not classes:
            classes = dataset_statistics(self.images & labels, max_chips=_CLASS_CHIPS, **options).classes
        self.class_counts: dict[int, int] = classes
        """Pixels of each stored label value in the training chips looked at; empty where they were not counted."""
        if found is not None and self._statistics is not None and (known is None or classes != known.classes):
            dataclasses.replace(found, classes=classes).save(self._statistics)

    def _join_labels(self, options: dict[str, Any], raw: RasteretDataset | None) -> None:
        self.class_values: dict[int, int] = {}
        self.train_set: Any = self.images
        self.eval_set: Any = RasteretDataset(self.collection, self.bands, mask_aoi=True, **options)
        if raw is None:
            return
        remap = self._classes
        if remap == "auto":
            remap = {value: i for i, value in enumerate(self.class_counts)}
            _log.info("classes found in the training area: %s", remap)
        self.class_values = dict(remap or {})
        labels = RasteretDataset(
            raw.collection,
            raw.bands,
            is_image=False,
            crs=self.images.crs,
            remap=dict(remap or {}) or None,
            ignore_index=self.ignore_index,
            cache_bytes=self._cache_bytes,
        )
        self.train_set = self.images & labels
        self.eval_set = self.eval_set & labels

    @property
    def num_classes(self) -> int:
        """Classes that labels are mapped to (after `setup`)."""
        return max(self.class_values.values(), default=-1) + 1

    # Loaders ----------------------------------------------------------------------------------------------

    def _make(self, dataset: Any, sampler: Any) -> DataLoader:
        stack = functools.partial(collate, ignore_index=self.ignore_index)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=sampler, collate_fn=stack, **self._loader)

    def train_dataloader(self) -> DataLoader:
        """Random chips inside the training area."""
        return self._make(self.train_set, self._train_sampler(self.train_set))

    def _train_sampler(self, dataset: Any) -> RandomAOISampler:
        return RandomAOISampler(
            dataset,
            self.size,
            self.length,
            self.train_area,
            seed=self._seed,
            placement=self._placement,
            locality=self._locality,
        )

    def val_dataloader(self) -> DataLoader | list[Any]:
        """A grid over the held-out area; nothing where none is held out."""
        return self._held_out(self.val_area)

    def test_dataloader(self) -> DataLoader | list[Any]:
        """A grid over the area held out for testing; where there is none, as validation."""
        return self._held_out(self.val_area if self.test_area is None else self.test_area)

    def _held_out(self, area: Any) -> DataLoader | list[Any]:
        if area is None:
            return []
        return self._make(self.eval_set, GridAOISampler(self.eval_set, self.size, aois=area))

    def predict_dataloader(self) -> DataLoader:
        """An overlapping grid over everything, images only."""
        return self._make(self.images, self.predict_sampler)

    @property
    def predict_sampler(self) -> Any:
        """What is predicted (after `setup`): an overlapping grid over everything, until another sampler is assigned."""
        if self._predict_sampler is None:
            self._predict_sampler = GridAOISampler(self.images, self.size, self.size - self.overlap)
        return self._predict_sampler

    @predict_sampler.setter
    def predict_sampler(self, sampler: Any) -> None:
        self._predict_sampler = sampler

    def on_after_batch_transfer(self, batch: Sample, dataloader_idx: int) -> Sample:
        """Float, normalised and (in training) augmented, on the device."""
        assert self.mean is not None
        assert self.std is not None
        ready = prepare(batch, self.mean, self.std, self.ignore_index)
        training = self.trainer is not None and self.trainer.training
        return flip_and_turn(ready) if training and self._augment else ready


def _plain(source: Any) -> Any:
    """Hydra's lists and paths as plain values."""
    if source is None or isinstance(source, (str, Collection)):
        return source
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    return [str(item) for item in source]


def _version(path: str) -> list[Any]:
    """What tells one state of a file from another; of a URL, the URL."""
    if is_remote(path) or not os.path.exists(path):
        return [path]
    stat = os.stat(path)
    return [path, stat.st_size, stat.st_mtime_ns]


def _is_collection_folder(path: str) -> bool:
    folder = Path(path)
    return folder.is_dir() and any(folder.rglob("*.parquet")) and not any(folder.rglob("*.tif*"))
