"""Grouped options of datasets, and the checks that they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from rasteret_ml.collection.collection import Collection, shorten
from rasteret_ml.collection.column_arrays import dtypes_and_nodata
from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.datasets.index.scene_table import SceneTable, band_column
from rasteret_ml.datasets.index.search import RecordOrder, parse_order
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.geo.resample.positions import Resampling
from rasteret_ml.raster.quality import QualityMask

GridKind = Literal["common", "native"]  #: Whether all chips lie on one grid, or each on that of its own scene.

MASK_KEYS = ("mask_valid", "mask_aoi", "mask_clear")  #: Keys of masks that are not labels.


@dataclass(frozen=True, slots=True, kw_only=True)
class MosaicConfig:
    """How overlapping records fill a chip.

    Raises:
        UsageError: an unknown order.
    """

    #: Which record comes first: "newest", "oldest", "clearest" (least cloud), "nearest" (to the middle of the query's
    #: time), or a date: nearest to it.
    order: RecordOrder = "newest"
    #: Kernel for records or bands on other grids; None = nearest for labels, colour tables and bits, else bilinear.
    resampling: Resampling | None = None
    nodata: int | float | None = None  #: Overrides the files' nodata.
    #: Whether records with another scale or offset are converted to the first one's; else such records in one chip are
    #: refused.
    harmonize: bool = False
    #: With `quality=`: whether clear pixels of later records replace valid pixels that are not clear.
    clear_first: bool = False

    def __post_init__(self) -> None:
        """Check."""
        parse_order(self.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """How stored values become classes (`is_image=False`)."""

    #: Stored value to class; values that are not listed become `ignore_index`. None = values are classes.
    remap: Mapping[int, int] | None = None
    ignore_index: int = -100  #: Class of invalid pixels.


@dataclass(frozen=True, slots=True, kw_only=True)
class RasterizeConfig:
    """How polygons become pixels."""

    #: Which of overlapping polygons is on top: None = the later one in the table, "area" = the smaller one, or a
    #: column: the one with the larger value.
    order: Literal["area"] | str | None = None
    all_touched: bool = False  #: Whether pixels that a polygon touches are inside, not only those whose centre is.


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleConfig:
    """What samples hold beside the pixels and their validity."""

    #: Key of the pixels, beginning with "image" or "mask"; None = exactly that. For several label heads in an `&`.
    key: str | None = None
    mask_aoi: bool = False  #: Whether `mask_aoi`, the AOI's own polygon, is in each sample.
    #: For the polygon: whether pixels that it touches are inside, not only those whose centre is.
    all_touched: bool = False
    #: Whether pixels outside the polygon are filled: with nodata or 0, of labels with `ignore_index` or NaN.
    mask_outside: bool = False
    valid_per_band: bool = False  #: Whether `mask_valid` is `[C, H, W]` instead of its AND `[1, H, W]`.


def label_key(key: str | None, kind: Literal["image", "mask"]) -> str:
    """Return the key of a dataset's pixels; it begins with its kind, by which Kornia and `collate` know it."""
    if key is None:
        return kind
    if not key.startswith(kind) or key in MASK_KEYS:
        raise UsageError(f"key must begin with {kind!r} and be none of {', '.join(MASK_KEYS)}, got {key!r}.")
    return key


def check_grid(grid: str, crs: Any, res: Any) -> None:
    """Refuse an unknown kind of grid, or a CRS or pixel size for native grids."""
    if grid not in get_args(GridKind):
        raise UsageError(f"grid must be 'common' or 'native', got {grid!r}.")
    if grid == "native" and (crs is not None or res is not None):
        raise UsageError("grid='native' keeps each scene's own CRS and pixels: leave out crs= and res=.")


def check_quality(collection: Collection, quality: QualityMask | None, mosaic: MosaicConfig) -> None:
    """Refuse a quality band whose values cannot be decoded, or `clear_first` without one."""
    if mosaic.clear_first and quality is None:
        raise UsageError("clear_first= needs quality=, the band that says which pixels are clear.")
    if quality is not None:
        for kind, nodata in dtypes_and_nodata(collection, band_column(collection, quality.band)):
            quality.check(None if kind is None else np.dtype(kind), nodata)


def resolve_series(series: Any, composite: Any, scenes: SceneTable) -> TimeSeries | None:
    """Return how dates are chosen, which needs all records dated; None = records are not separated by date."""
    dates = TimeSeries.of(series) or (None if composite is None else TimeSeries())
    undated = np.isnat(scenes.times)
    if dates is not None and undated.any():
        raise UsageError(
            f"Record {scenes.id_of(int(np.argmax(undated)))} has no date, so it cannot be in a series "
            f"({int(undated.sum())} records have none); leave such records out, for example with where()."
        )
    return dates


def describe_grid(dataset: Any) -> str:
    """Describe the pixels that chips lie on, such as "EPSG:32633, 10 x 10 per pixel"."""
    crs = shorten([crs_text(dataset.crs)])
    if getattr(dataset, "is_native", False):
        return f"native (index in {crs})"
    xres, yres = dataset.res
    return f"{crs}, {xres:g} x {yres:g} per pixel" if xres and yres else f"{crs}, no pixels of its own"
