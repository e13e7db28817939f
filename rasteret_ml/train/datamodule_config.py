"""Settings of a datamodule in four groups: splits, sampling, loading, normalization. Each default is stated here."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import geopandas as gpd
import numpy as np
import shapely
import torch
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.geometries import geometries_from, polygons_from
from rasteret_ml.geo.regions import erode_by_box, polygonal
from rasteret_ml.loader.failures import ErrorPolicy
from rasteret_ml.samplers.aoi.target_grids import spatial_split
from rasteret_ml.samplers.locality import Locality
from rasteret_ml.samplers.random import Placement
from rasteret_ml.samplers.sampler import config_from
from rasteret_ml.transforms.normalize import per_band_numbers

#: Polygons: a path, a lon/lat box, GeoJSON, a table, a geometry.
Polygons: TypeAlias = str | list[float] | dict[str, Any] | gpd.GeoDataFrame | gpd.GeoSeries | BaseGeometry
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitConfig:
    """Where to train, validate and test.

    Raises:
        UsageError: `table` together with other polygons.
    """

    #: Side of the area to hold out for validation; None = hold nothing out.
    val_side: Literal["top", "bottom", "left", "right"] | None = "top"
    val_fraction: float = 0.3  #: Share of the area's height or width that `val_side` takes.
    val_aois: Polygons | None = None  #: Polygons to hold out for validation, instead of a side.
    test_aois: Polygons | None = None  #: Polygons to hold out for testing; None = test where validation is done.
    #: Polygons to centre training chips in, where a chip stays out of the held-out areas; None = everywhere else.
    train_aois: Polygons | None = None
    #: Instead of all of the above: a table of polygons (or its path) with a column `split` of "train", "val" or "test",
    #: as `split_blocks` and `split_aois` return; other rows are ignored.
    table: Polygons | None = None
    buffer: float = 0.0  #: Minimum distance between splits, in CRS units.

    def __post_init__(self) -> None:
        if self.table is not None and not (self.val_aois is self.test_aois is self.train_aois is None):
            raise UsageError("split.table must be the only polygons; leave val_aois, test_aois and train_aois out.")

    def areas(self, dataset: Any, size: int) -> tuple[Any, Any, Any]:
        """Compute the training, validation and test area of images; None = no such area, for training: everywhere.

        Chips of `size` pixels that are centred in `train_aois` stay out of the held-out areas. Raises UsageError
        if an area is empty, or the table has no column `split` or no training rows.
        """
        if self.table is not None:
            return _areas_of_table(self.table)
        train = val = test = None
        if self.val_aois is not None:
            train, val = spatial_split(dataset, self.val_aois)
        elif self.val_side is not None:
            train, val = spatial_split(dataset, side=self.val_side, fraction=self.val_fraction)
        if self.test_aois is not None:
            rest, test = spatial_split(dataset, self.test_aois)
            if train is not None:
                shape = polygonal(shapely.intersection(train.geometry.union_all(), rest.geometry.union_all()))
                if shape.area == 0:
                    raise UsageError("The validation and test areas leave nothing to train on; hold less out.")
                rest = gpd.GeoDataFrame({"split": [0]}, geometry=[shape], crs=train.crs)
            train = rest
        if self.train_aois is not None:
            train = self.train_aois if train is None else _clip_aois(self.train_aois, train, dataset, size)
        return train, val, test


def _areas_of_table(polygons: Any) -> tuple[Any, Any, Any]:
    table = geometries_from(polygons).table
    if table is None or "split" not in table.columns:
        raise UsageError("split.table must have a column 'split', as split_blocks and split_aois return it.")
    train, val, test = (table[table["split"] == name] for name in ("train", "val", "test"))
    if train.empty:
        names = sorted({str(name) for name in table["split"].dropna()})
        raise UsageError(f"split.table must have rows with split 'train', got only {names}.")
    return train, None if val.empty else val, None if test.empty else test


def _clip_aois(aois: Any, area: gpd.GeoDataFrame, dataset: Any, size: int) -> gpd.GeoDataFrame:
    """Clip polygons to where a chip can be centred without reaching out of `area`."""
    found = polygons_from(aois)
    crs, (xres, yres) = crs_text(dataset.crs), dataset.res
    centres = erode_by_box(area.geometry.union_all(), size * xres, size * yres)
    shapes = shapely.intersection(transform_geometries(found.geometries, found.crs, crs), centres)
    kept = shapely.area(shapes) > 0
    if not kept.any():
        raise UsageError(f"No chip of {size} pixels fits in train_aois without reaching into the held-out area.")
    if not kept.all():
        _log.warning("%d of %d train_aois are skipped: they lie in the held-out area", np.sum(~kept), len(kept))
    return gpd.GeoDataFrame(geometry=[polygonal(shape) for shape in shapes[kept]], crs=crs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Which chips to train on and to predict.

    Raises:
        UsageError: an empty chip, or an overlap that is not smaller than a chip.
    """

    size: int = 128  #: Chip size in pixels.
    length: int = 1000  #: Training chips in an epoch.
    overlap: int | None = None  #: Pixels by which neighbouring chips overlap in prediction; None = a quarter of `size`.
    #: Where training chips lie in their polygons, see `RandomAOISampler`; None = "centre" with
    #: `SplitConfig.train_aois`, else "inside".
    placement: Placement | None = None
    min_valid: float = 0.0  #: Minimum share of valid pixels in a training chip.
    #: Number of active tile blocks to draw training chips from in turn, or the fields of `Locality`; None = uniform
    #: order.
    locality: int | dict[str, int] | Locality | None = None
    seed: int = 0  #: Seed of the training chips, their order and their augmentation.

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"size must be > 0, got {self.size}.")
        if not 0 < self.stride <= self.size:
            raise UsageError(f"overlap must be >= 0 and < size = {self.size}, got {self.overlap}.")

    @property
    def stride(self) -> int:
        """Pixels between the origins of neighbouring chips in prediction."""
        return self.size - (self.size // 4 if self.overlap is None else self.overlap)

    def locality_for(self, batch_size: int) -> Locality | None:
        """Return the local order of training chips in batches of `batch_size`."""
        if isinstance(self.locality, Mapping):
            return config_from(Locality, {"batch_size": batch_size} | dict(self.locality), "locality")
        if isinstance(self.locality, int):
            return Locality(blocks=self.locality, batch_size=batch_size)
        return self.locality


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingConfig:
    """How to load batches, see `DataLoader`."""

    batch_size: int = 16  #: Chips in a batch.
    num_workers: int = 0  #: Loader processes; 0 = load in this one.
    #: How workers start; None = torch's default.
    multiprocessing_context: Literal["fork", "forkserver", "spawn"] | None = None
    prefetch_factor: int | None = None  #: Batches to prepare ahead in each worker; None = torch's default.
    persistent_workers: bool = True  #: Keep workers between epochs.
    pin_memory: bool | None = None  #: Pin batches in memory; None = where there is a GPU.
    lookahead: int | None = None  #: Batches to start reading ahead; None = the default of `DataLoader`.
    lookahead_bytes: int | None = None  #: Memory for them, in bytes; None = the default of `DataLoader`.
    #: What to do about chips that cannot be read, see `ErrorPolicy`; None = raise. "replace" is for training: where
    #: each chip counts once, it becomes "fill".
    errors: str | dict[str, Any] | ErrorPolicy | None = None

    def loader_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `DataLoader` that are set and apply to this number of workers."""
        options = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.num_workers:
            options |= {"multiprocessing_context": None, "prefetch_factor": None, "persistent_workers": False}
        if self.pin_memory is None:
            options["pin_memory"] = torch.cuda.is_available()
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizationConfig:
    """Mean and std to normalise images with, `(x - mean) / std`.

    Raises:
        UsageError: one number for all bands, or a std that is not positive.
    """

    mean: Sequence[float] | None = None  #: Mean of each band `[C]`; None = measure it in the training area.
    #: Standard deviation of each band `[C]`; None = measure it in the training area.
    std: Sequence[float] | None = None
    #: Whether mean and std are those of scaled pixels, stored * scale + offset as the files state them.
    scaled: bool = False
    #: YAML file to read mean, std and classes from; if missing, it is written after they are measured. Delete it when
    #: the splits change.
    statistics: str | os.PathLike[str] | None = None
    max_chips: int | None = 64  #: Chips to read for measuring; None = all.

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, per_band_numbers(name, values))


def builtin_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a config that YAML can hold, with their values."""
    values = {field.name: to_builtin(getattr(config, field.name)) for field in fields(config)}
    return {name: value for name, value in values.items() if is_builtin(value)}


def to_builtin(value: Any) -> Any:
    """Convert mappings, sequences and paths of any type, such as Hydra's, to dict, list and str; keep the rest."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: to_builtin(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [to_builtin(item) for item in value]
    return value


def is_builtin(value: Any) -> bool:
    """Whether YAML can hold a value that `to_builtin` returned."""
    if isinstance(value, dict):
        return all(is_builtin(item) for pair in value.items() for item in pair)
    if isinstance(value, list):
        return all(map(is_builtin, value))
    return value is None or type(value) in (bool, int, float, str)
