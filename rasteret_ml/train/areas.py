"""Where a datamodule trains, validates and tests."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.geometries import geometries_from, polygons_from
from rasteret_ml.geo.regions import erode_by_box, polygonal
from rasteret_ml.samplers.aoi.target_grids import spatial_split

__all__ = ["Polygons", "SplitAreas"]

Polygons = str | list[float] | dict[str, Any] | gpd.GeoDataFrame | gpd.GeoSeries | BaseGeometry
"""Polygons: a path, a lon/lat box, GeoJSON, a table, a geometry."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitAreas:
    """How the area is split, as a datamodule is told; see its arguments."""

    val_side: str | None
    """Side held out for validation; None = none."""
    val_fraction: float
    """Share of the height or width that it takes."""
    val_aois: Any
    """Polygons held out for validation instead; None = the side."""
    test_aois: Any
    """Polygons held out for testing; None = none."""
    train_aois: Any
    """Polygons to train in; None = everywhere else."""
    splits: Any
    """One table with a column `split` that says all of this; None = the above."""
    buffer: float
    """Least distance between them, CRS units."""

    def __post_init__(self) -> None:
        """Check."""
        if self.splits is not None and not (self.val_aois is self.test_aois is self.train_aois is None):
            raise UsageError("splits= says all of train, val and test; leave val_aois, test_aois and train_aois out.")

    def cut(self, dataset: Any, size: int) -> tuple[Any, Any, Any]:
        """The areas to train, validate and test in, each None where there is none (train: everywhere).

        Args:
            dataset: The images.
            size: Chip size in pixels, by which `train_aois` keep away from what is held out.

        Raises:
            UsageError: an area that is empty, or a table without `split` or without "train".
        """
        if self.splits is not None:
            return self._from_table()
        train = val = test = None
        if self.val_aois is not None:
            train, val = spatial_split(dataset, self.val_aois)
        elif self.val_side is not None:
            train, val = spatial_split(dataset, side=self.val_side, fraction=self.val_fraction)
        if self.test_aois is not None:
            rest, test = spatial_split(dataset, self.test_aois)
            train = rest if train is None else _common(train, rest)
        if self.train_aois is not None:
            train = self.train_aois if train is None else _within(self.train_aois, train, dataset, size)
        return train, val, test

    def _from_table(self) -> tuple[Any, Any, Any]:
        table = geometries_from(self.splits).table
        if table is None or "split" not in table.columns:
            raise UsageError("splits= is a table of polygons with a column 'split', as split_blocks gives.")
        parts = [table[table["split"] == name] for name in ("train", "val", "test")]
        if not len(parts[0]):
            names = sorted({str(name) for name in table["split"].dropna()})
            raise UsageError(f"No row of splits= is of the split 'train'; there are {names}.")
        train, val, test = (part if len(part) else None for part in parts)
        return train, val, test


def _common(one: gpd.GeoDataFrame, two: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """What both areas, in one CRS, have in common."""
    shape = polygonal(shapely.intersection(one.geometry.union_all(), two.geometry.union_all()))
    if shape.area == 0:
        raise UsageError("val and test leave nothing to train on; hold less out.")
    return gpd.GeoDataFrame({"split": [0]}, geometry=[shape], crs=one.crs)


def _within(aois: Any, area: gpd.GeoDataFrame, dataset: Any, size: int) -> gpd.GeoDataFrame:
    """The parts of `aois` that a chip may be centred in without reaching out of `area`."""
    found = polygons_from(aois)
    crs, (xres, yres) = crs_text(dataset.crs), dataset.res
    roomy = erode_by_box(area.geometry.union_all(), size * xres, size * yres)
    parts = shapely.intersection(transform_geometries(found.geometries, found.crs, crs), roomy)
    kept = shapely.area(parts) > 0
    if not kept.any():
        raise UsageError(f"No chip of {size} pixels fits in train_aois without reaching into the held-out area.")
    if not kept.all():
        _log.warning("%d of %d train_aois lie in the held-out area and are not trained on", np.sum(~kept), len(kept))
    return gpd.GeoDataFrame(geometry=[polygonal(part) for part in parts[kept]], crs=crs)
