"""The data of a training run: images, labels, areas and statistics, each opened, built or measured on first use."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.read_source import expand_paths
from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.write import check_output_path
from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.datasets.raster_dataset import RasteretDataset
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.samplers.random import RandomAOISampler
from rasteret_ml.samplers.splits.leaks import check_splits
from rasteret_ml.train.datamodule_config import (
    LoadingConfig,
    NormalizationConfig,
    SamplingConfig,
    SplitConfig,
    to_builtin,
)
from rasteret_ml.transforms.statistics import DatasetStatistics, dataset_statistics

_log = logging.getLogger(__name__)

#: A Collection or its path, or GeoTIFFs: a path, glob, folder, URL, `.txt` list, STAC item, or a list of these.
Rasters = str | list[str] | os.PathLike[str] | Collection

#: Stored label value to class; "auto" = number the values of the training area; None = stored values are classes.
Classes = Literal["auto"] | dict[int, int] | None

_CLASS_CHIPS = 256  # Chips to read for counting classes: more than for means, to find rare ones.


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterSource:
    """Rasters as the user gave them, and how to get their Collection."""

    #: What they are; labels get no date, because they apply to every image of their place.
    role: Literal["images", "labels"]
    given: Rasters  #: What the user gave.
    #: Band names, by which files of one band each are grouped; None = each file is a record.
    bands: tuple[str, ...] | None
    folder: Path  #: Where to build a Collection.

    def open(self) -> Collection:
        """Open the Collection, or build it; of several processes one builds and the others wait.

        The first file that cannot be read is an error; a Collection made with `build` skips it.
        """
        if isinstance(self.given, Collection):
            return self.given
        paths = [self.given] if isinstance(self.given, (str, os.PathLike)) else self.given
        texts = [os.fspath(path) for path in paths]
        if not texts:
            raise UsageError(f"{self.role} must not be empty; give at least one path.")
        if len(texts) == 1 and (texts[0].endswith(".parquet") or _is_collection_folder(texts[0])):
            return Collection.open(texts[0])
        return self._built(expand_paths(texts))

    def _built(self, files: Sequence[str]) -> Collection:
        identity = [self.role, [_version(file) for file in files], self.bands]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = check_output_path(self.folder / f"{self.role}-{key}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # the system releases it if its holder dies
            if path.exists():
                try:
                    return Collection.open(path)
                except CollectionError:
                    _log.warning("%s is not readable and is built again", path)
            datetime = "filename" if self.role == "images" else None
            return build(files, path, bands=self.bands, datetime=datetime, strict=True)


def _version(path: str) -> list[Any]:
    """Return what identifies a state of a file (path, size, time of change); of a URL, the URL."""
    if not os.path.exists(path):
        return [path]
    stat = os.stat(path)
    return [path, stat.st_size, stat.st_mtime_ns]


def _is_collection_folder(path: str) -> bool:
    folder = Path(path)
    return folder.is_dir() and any(folder.rglob("*.parquet")) and not any(folder.rglob("*.tif*"))


class DatasetOptions:
    """The checked keyword arguments of `RasteretDataset` for the images, without those that the datamodule sets."""

    _OWN = ("collection", "bands", "is_image", "labels")

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self.given: dict[str, Any] = to_builtin(options or {})
        known = self.defaults()
        unknown = sorted(set(self.given) - set(known))
        if unknown:
            raise UsageError(f"dataset must have only the fields {', '.join(known)}; got {', '.join(unknown)}.")
        TimeSeries.of(self.given.get("series"))
        quality = self.given.get("quality")
        #: Band that tells clear pixels, to build into the records beside the image's bands.
        self.quality_band = None if quality is None else QualityMask.parse(quality).band

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Return the keyword arguments that may be given, with their defaults."""
        parameters = inspect.signature(RasteretDataset).parameters
        return {name: parameter.default for name, parameter in parameters.items() if name not in cls._OWN}


class DataHandles:
    """What a datamodule reads; each part is opened once, on first use. Subclasses set the attributes below."""

    ignore_index: int  #: Class of invalid pixels.
    split: SplitConfig  #: Where to train, validate and test.
    sampling: SamplingConfig  #: Which chips to train on and to predict.
    loading: LoadingConfig  #: How batches are loaded.
    normalization: NormalizationConfig  #: What images are normalised with.
    _sources: dict[str, RasterSource]
    _bands: tuple[str, ...] | None
    _label_band: str | None
    _classes: Classes
    _dataset: DatasetOptions
    _restored: dict[str, Any]

    @cached_property
    def collection(self) -> Collection:
        """The images' records."""
        return self._sources["images"].open()

    @cached_property
    def bands(self) -> tuple[str, ...]:
        """Bands along C."""
        return self._bands or tuple(band for band in self.collection.bands if band != self._dataset.quality_band)

    @cached_property
    def images(self) -> RasteretDataset:
        """The images."""
        return RasteretDataset(self.collection, self.bands, **self._dataset.given)

    @cached_property
    def areas(self) -> tuple[Any, Any, Any]:
        """The training, validation and test area; None = no such area, for training: everywhere."""
        train, val, test = self.split.areas(self.images, self.sampling.size)
        # Held-out chips may reach out of their area, but only pixels inside count: the areas are what must not be seen.
        held_out = {name: area for name, area in (("val", val), ("test", test)) if area is not None}
        if held_out:
            check_splits({"train": self._train_sampler(self.images, train)} | held_out, buffer=self.split.buffer)
        return train, val, test

    def _train_sampler(self, dataset: Any, area: Any) -> RandomAOISampler:
        config = self.sampling
        return RandomAOISampler(
            dataset,
            config.size,
            config.length,
            area,
            seed=config.seed,
            placement=config.placement or ("inside" if self.split.train_aois is None else "centre"),
            min_valid=config.min_valid,
            locality=config.locality_for(self.loading.batch_size),
        )

    @property
    def train_area(self) -> Any:
        """Where training chips lie; None = everywhere."""
        return self.areas[0]

    @property
    def val_area(self) -> Any:
        """The area held out for validation; None = none."""
        return self.areas[1]

    @property
    def test_area(self) -> Any:
        """The area held out for testing; None = none."""
        return self.areas[2]

    @cached_property
    def _label_collection(self) -> Collection:
        return self._sources["labels"].open()

    def _labels(self, remap: dict[int, int] | None = None, ignore_index: int = -100) -> RasteretDataset:
        """Open the labels with the images' options of reading, on a grid in the images' CRS."""
        bands = (self._label_band,) if self._label_band else tuple(self._label_collection.bands)
        if len(bands) != 1:
            raise UsageError(f"labels must have one band, got {list(bands)}; choose one with label_band=.")
        labels, reading = {"remap": remap or None, "ignore_index": ignore_index}, self._dataset.given.get("reading")
        crs = self.images.crs
        return RasteretDataset(self._label_collection, bands, is_image=False, crs=crs, labels=labels, reading=reading)

    @cached_property
    def train_set(self) -> Any:
        """Images and labels for training."""
        return self._with_labels(self.images)

    @cached_property
    def eval_set(self) -> Any:
        """Images and labels with `mask_aoi`, for validation and testing."""
        given = self._dataset.given
        options = given | {"sample": {**(given.get("sample") or {}), "mask_aoi": True}}
        return self._with_labels(RasteretDataset(self.collection, self.bands, **options))

    def _with_labels(self, images: RasteretDataset) -> Any:
        if "labels" not in self._sources:
            return images
        return images & self._labels(self.class_values, self.ignore_index)

    # Statistics ---------------------------------------------------------------------------------------------------

    @property
    def _statistics_path(self) -> Path | None:
        path = self.normalization.statistics
        return None if path is None else Path(path).expanduser()

    def _stored_statistics(self) -> DatasetStatistics | None:
        """Read the file, if there is one; raises UsageError for statistics of other bands or units."""
        path = self._statistics_path
        if path is None or not path.exists():
            return None
        found = DatasetStatistics.load(path)
        for name, expected, stored in (
            ("bands", list(self.bands), list(found.bands)),
            ("scaled", self.normalization.scaled, bool(found.made.get("scaled", False))),
        ):
            if stored != expected:
                raise UsageError(
                    f"{name} of {path} must be {expected}, got {stored}; delete the file to measure again, or choose "
                    "another with normalization.statistics."
                )
        return found

    def _measured(self, dataset: Any, max_chips: int | None, *, scaled: bool = False) -> DatasetStatistics:
        area, size, seed = self.train_area, self.sampling.size, self.sampling.seed
        return dataset_statistics(dataset, aois=area, size=size, seed=seed, max_chips=max_chips, scaled=scaled)

    def _statistics_lock(self) -> contextlib.AbstractContextManager[Any]:
        """Let one process (rank) measure while the others wait for what it writes to the file."""
        path = self._statistics_path
        if path is None:
            return contextlib.nullcontext()
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_name(f".{path.name}.lock"))

    @cached_property
    def _mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        given, stored, restored = self.normalization, self._stored_statistics(), self._restored
        mean, std = (
            getattr(given, name) or getattr(stored, name, None) or restored.get(name) for name in ("mean", "std")
        )
        to_write = given.statistics is not None and not restored
        if stored is None and (mean is None or std is None or to_write):
            with self._statistics_lock():
                measured = self._stored_statistics()
                if measured is None:
                    measured = self._measured(self.images, given.max_chips, scaled=given.scaled)
                    if given.statistics is not None:
                        measured.save(given.statistics)
            mean, std = mean or measured.mean, std or measured.std
        return tuple(mean or ()), tuple(std or ())

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each band `[C]`: as given, else from the statistics file, a checkpoint or the training area."""
        return self._mean_std[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each band `[C]`, from the same source as `mean`."""
        return self._mean_std[1]

    @cached_property
    def class_counts(self) -> dict[int, int]:
        """Pixels of each stored label value in the training chips that were read; empty if they were not counted."""
        labels = self._labels() if "labels" in self._sources else None
        if labels is None or labels.dtype.kind == "f":
            return {}
        if self._classes != "auto":
            known = self._stored_statistics()
            return {} if known is None else known.classes
        with self._statistics_lock():
            stored = self._stored_statistics()
            if stored is not None and stored.classes:
                return stored.classes
            counts = self._measured(self.images & labels, _CLASS_CHIPS).classes
            if stored is not None and self._statistics_path is not None:
                dataclasses.replace(stored, classes=counts).save(self._statistics_path)
        return counts

    @cached_property
    def class_values(self) -> dict[int, int]:
        """Stored label value to class; empty without categorical labels, or where stored values are classes."""
        if self._classes != "auto":
            return dict(self._classes or {})
        values: dict[int, int] = self._restored.get("class_values") or {
            value: i for i, value in enumerate(self.class_counts)
        }
        _log.info("classes: %s", values)
        return values

    @property
    def num_classes(self) -> int:
        """Number of classes that labels are mapped to."""
        return max(self.class_values.values(), default=-1) + 1

    # Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Bands, mean, std and classes of the training, for a checkpoint (Lightning's hook); builtin values only."""
        if "_mean_std" not in self.__dict__:
            return {}
        return {
            "bands": list(self.bands),
            "scaled": self.normalization.scaled,
            "mean": list(self.mean),
            "std": list(self.std),
            "class_values": dict(self.class_values),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore mean, std and classes from a checkpoint; raises UsageError if its bands or `scaled` differ."""
        for name, own in (("bands", list(self.bands)), ("scaled", self.normalization.scaled)):
            if state_dict[name] != own:
                raise UsageError(f"{name} must be the checkpoint's, {state_dict[name]}, got {own}.")
        self._restored = state_dict
        self.__dict__.pop("_mean_std", None)
        before = self.__dict__.pop("class_values", None)
        if before != self.class_values:
            self.__dict__.pop("train_set", None)
            self.__dict__.pop("eval_set", None)


def class_map(classes: Any) -> Classes:
    """Check `classes`, and convert the keys and values of a mapping to integers."""
    if isinstance(classes, Mapping):
        return {int(value): int(number) for value, number in classes.items()}
    if classes not in ("auto", None):
        raise UsageError(f"classes must be 'auto', None or a mapping of stored values to classes, got {classes!r}.")
    return classes  # type: ignore[no-any-return]
