"""The data of a training run: images, labels, areas and statistics, each opened or measured on its first use."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from rasteret_ml.collection.collection import Collection
from rasteret_ml.datasets.raster_dataset import RasteretDataset
from rasteret_ml.errors import UsageError
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.samplers.random import RandomAOISampler
from rasteret_ml.samplers.splits.leaks import check_splits
from rasteret_ml.train.areas import SplitAreas
from rasteret_ml.train.sources import RasterSource
from rasteret_ml.train.stats_config import ChannelStats, StatsConfig

__all__ = ["DataHandles", "class_map"]

_log = logging.getLogger(__name__)

Classes = Literal["auto"] | dict[int, int] | None


class DataHandles:
    """What a datamodule reads. Nothing is opened before it is asked for, and everything once.

    Those who extend it set the attributes below.
    """

    size: int
    """Chip size in pixels."""
    length: int
    """Training chips in an epoch."""
    ignore_index: int
    """Class of invalid pixels."""
    _sources: dict[str, RasterSource]
    _bands: tuple[str, ...] | None
    _quality: QualityMask | None
    _label_band: str | None
    _classes: Classes
    _areas: SplitAreas
    _image_options: dict[str, Any]
    _draws: dict[str, Any]
    _given: ChannelStats
    _measuring: StatsConfig
    _restored: dict[str, Any]

    @cached_property
    def collection(self) -> Collection:
        """The images' records."""
        return self._sources["images"].open()

    @cached_property
    def bands(self) -> tuple[str, ...]:
        """Bands along C."""
        own = self._quality.band if self._quality is not None else None
        return self._bands or tuple(band for band in self.collection.bands if band != own)

    @cached_property
    def images(self) -> RasteretDataset:
        """The images."""
        return RasteretDataset(self.collection, self.bands, **self._image_options)

    @cached_property
    def areas(self) -> tuple[Any, Any, Any]:
        """Where to train, validate and test, each None where there is none (train: everywhere)."""
        train, val, test = self._areas.cut(self.images, self.size)
        # Held-out chips reach out of their areas, but only pixels inside count: the areas are what must not be seen.
        found = {name: area for name, area in (("val", val), ("test", test)) if area is not None}
        if found:
            sampler = RandomAOISampler(self.images, self.size, self.length, train, **self._draws)
            check_splits({"train": sampler} | found, buffer=self._areas.buffer)
        return train, val, test

    @property
    def train_area(self) -> Any:
        """Where training chips lie; None = everywhere."""
        return self.areas[0]

    @property
    def val_area(self) -> Any:
        """What is held out for validation; None = nothing."""
        return self.areas[1]

    @property
    def test_area(self) -> Any:
        """What is held out for testing; None = nothing."""
        return self.areas[2]

    @cached_property
    def _stored_labels(self) -> RasteretDataset | None:
        if "labels" not in self._sources:
            return None
        collection = self._sources["labels"].open()
        bands = [self._label_band] if self._label_band else collection.bands
        if len(bands) != 1:
            raise UsageError(f"The labels have several bands {bands}; choose one with label_band=.")
        reading = self._image_options["reading"]
        return RasteretDataset(collection, bands, is_image=False, crs=self.images.crs, reading=reading)

    @cached_property
    def train_set(self) -> Any:
        """Images and labels, as training reads them."""
        return self._with_labels(self.images)

    @cached_property
    def eval_set(self) -> Any:
        """Images and labels with `mask_aoi`, as validation and test read them."""
        return self._with_labels(
            RasteretDataset(self.collection, self.bands, sample={"mask_aoi": True}, **self._image_options)
        )

    def _with_labels(self, images: RasteretDataset) -> Any:
        raw = self._stored_labels
        if raw is None:
            return images
        return images & RasteretDataset(
            raw.collection,
            raw.bands,
            is_image=False,
            crs=self.images.crs,
            labels={"remap": self.class_values or None, "ignore_index": self.ignore_index},
            reading=self._image_options["reading"],
        )

    # What is measured, or known -----------------------------------------------------------------------------------

    @cached_property
    def _normal(self) -> ChannelStats:
        known = self._measuring.known(self.bands)
        normal = self._given.filled(known).filled(
            ChannelStats.of(self._restored.get("mean"), self._restored.get("std"))
        )
        to_be_kept = self._measuring.path is not None and not self._restored
        if known is None and (not normal.is_whole or to_be_kept):
            known = self._measuring.bands(self.images, self.train_area)
        return normal.filled(known)

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each band: as given, else as the statistics file, a restored checkpoint or the training area has it."""
        assert self._normal.mean is not None
        return self._normal.mean

    @property
    def std(self) -> tuple[float, ...]:
        """As `mean`."""
        assert self._normal.std is not None
        return self._normal.std

    @cached_property
    def class_counts(self) -> dict[int, int]:
        """Pixels of each stored label value in the training chips looked at; empty where they were not counted."""
        labels = self._stored_labels
        if labels is None or labels.dtype.kind == "f":
            return {}
        known = self._measuring.known(self.bands)
        if self._classes != "auto":
            return {} if known is None else known.classes
        return self._measuring.classes(self.images & labels, self.bands, self.train_area)

    @cached_property
    def class_values(self) -> dict[int, int]:
        """Stored label value to class; empty without categorical labels, or where stored values are classes."""
        if self._classes != "auto":
            return dict(self._classes or {})
        restored = self._restored.get("class_values")
        found = restored or {value: i for i, value in enumerate(self.class_counts)}
        _log.info("classes: %s", found)
        return found

    @property
    def num_classes(self) -> int:
        """Classes that labels are mapped to."""
        return max(self.class_values.values(), default=-1) + 1

    # What a checkpoint keeps -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a model was trained with, for its checkpoint (Lightning asks): plain values."""
        if "_normal" not in self.__dict__:
            return {}
        return {
            "bands": list(self.bands),
            "scaled": self._measuring.scaled,
            "mean": list(self.mean),
            "std": list(self.std),
            "class_values": dict(self.class_values),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what a model was trained with.

        Raises:
            UsageError: it was trained on other bands, or with another `scaled`.
        """
        for name, own in (("bands", list(self.bands)), ("scaled", self._measuring.scaled)):
            if state_dict[name] != own:
                raise UsageError(f"The checkpoint was trained with {name} {state_dict[name]}, here are {own}.")
        self._restored = state_dict
        self.__dict__.pop("_normal", None)
        before = self.__dict__.pop("class_values", None)
        if before != self.class_values:
            self.__dict__.pop("train_set", None)
            self.__dict__.pop("eval_set", None)


def class_map(classes: Any) -> Classes:
    """Stored label values to classes, or what stands for them.

    Raises:
        UsageError: neither.
    """
    if isinstance(classes, Mapping):
        return {int(value): int(number) for value, number in classes.items()}
    if classes not in ("auto", None):
        raise UsageError(f"classes= is 'auto', None, or a mapping of stored values to classes, not {classes!r}.")
    return classes  # type: ignore[no-any-return]
