"""What a dataset was asked for, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.facts import band_kinds
from rasteret_ml.errors import UsageError
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.scenes.dates import TimeSeries
from rasteret_ml.scenes.facts import SceneFacts, band_column

__all__ = ["RESERVED", "check_together", "checked_dates", "checked_key", "is_native"]

RESERVED = ("mask_valid", "mask_aoi", "mask_clear")
"""Keys of masks that are no labels."""


def checked_key(key: str | None, is_image: bool) -> str:
    """The name of a sample's pixels.

    Raises:
        UsageError: it does not begin as its kind does, by which Kornia and `collate` know it, or is another's.
    """
    kind = "image" if is_image else "mask"
    if key is None:
        return kind
    if not key.startswith(kind) or key in RESERVED:
        raise UsageError(f"key= begins with {kind!r} and is none of {', '.join(RESERVED)}, not {key!r}.")
    return key


def is_native(grid: str, crs: Any, res: Any) -> bool:
    """Whether chips lie on their own scenes' grids.

    Raises:
        UsageError: no such kind of grid, or a CRS or pixel size for grids that have their own.
    """
    if grid not in ("common", "native"):
        raise UsageError(f"grid= is 'common' or 'native', not {grid!r}.")
    if grid == "native" and (crs is not None or res is not None):
        raise UsageError("grid='native' keeps each scene's own CRS and pixels: leave out crs= and res=.")
    return grid == "native"


def check_together(
    collection: Collection,
    is_image: bool,
    dates: bool,
    quality: QualityMask | None,
    clear_first: bool,
    remap: Mapping[int, int] | None,
) -> None:
    """Refuse options that contradict each other, or what the files say of their quality band.

    Raises:
        UsageError: the message says which.
    """
    if not is_image and (dates or quality is not None):
        raise UsageError("series=, composite= and quality= are for images: labels are read as they are.")
    if is_image and remap is not None:
        raise UsageError("remap= is for labels: say is_image=False.")
    if clear_first and quality is None:
        raise UsageError("clear_first= needs quality=, the band that tells what is clear.")
    if quality is not None:
        for kind, nodata in band_kinds(collection, band_column(collection, quality.band)):
            quality.check(None if kind is None else np.dtype(kind), nodata)


def checked_dates(series: Any, composite: Any, facts: SceneFacts) -> TimeSeries | None:
    """How dates are chosen; None = records are not told apart by date.

    Raises:
        UsageError: a record without a date.
    """
    dates = TimeSeries.of(series) or (None if composite is None else TimeSeries())
    undated = np.isnat(facts.times)
    if dates is not None and undated.any():
        raise UsageError(
            f"Record {facts.id_of(int(np.argmax(undated)))} has no date, so it has no place in a series "
            f"({int(undated.sum())} have none); leave such records out, for example with where()."
        )
    return dates
