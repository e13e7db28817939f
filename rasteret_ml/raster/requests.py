"""Requests of the read path: one `ChipRequest` per chip, planned before any byte is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import DataError, FetchError, NoOverlapError
from rasteret_ml.geo.geometries import polygon_mask
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import Resampling
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.raster.raster_info import RasterInfo


class PlannableRecord(Protocol):
    """A record that can plan the read of a grid, such as a `RasterAccessor`."""

    info: RasterInfo  #: The row.

    def plan(
        self,
        grid: Grid,
        band_codes: Sequence[str],
        *,
        resampling: Resampling | None = None,
        nodata: int | float | None = None,
        wrap: bool = True,
        categories: bool = False,
        level: int | None = None,
    ) -> ChipPlan:
        """See `plan_chip`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipRules:
    """How chips are filled; the same for all chips of a dataset."""

    bands: tuple[str, ...]  #: Along C.
    resampling: Resampling | None = None  #: Kernel for records on other grids; None = as `plan_chip` chooses.
    nodata: int | float | None = None  #: Overrides the files' nodata.
    categories: bool = False  #: Whether values are classes, which are never averaged.
    quality: QualityMask | None = None  #: Identifies clear pixels; None = treat all pixels equally.
    clear_first: bool = False  #: Whether clear pixels of later records replace valid pixels that are not clear.
    #: Whether records with another scale or offset are converted to the first one's; else they are refused.
    harmonize: bool = False
    wrap: bool = True  #: Whether a chip that crosses the edge of a global raster continues at the opposite edge.
    level: int | None = None  #: Read from this overview; None = the coarsest one that is fine enough.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """The plans of what one record contributes to a chip."""

    record: RasterInfo  #: The record.
    image: ChipPlan  #: Its bands.
    quality: ChipPlan | None  #: Its quality band, where the rules have one.

    @property
    def plans(self) -> tuple[ChipPlan, ...]:
        """Everything that is read of the record."""
        return (self.image,) if self.quality is None else (self.image, self.quality)

    @property
    def covers(self) -> bool:
        """Whether the record's raster holds every pixel of the chip."""
        return all(band.covers for band in self.image.bands)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipRequest:
    """One chip to read: a grid, the records that may fill it, and the plan of the first round."""

    grid: Grid  #: The chip's grid.
    records: Sequence[PlannableRecord]  #: Best first.
    rules: ChipRules  #: How they fill the chip.
    geometry: BaseGeometry | None = None  #: Polygon in the grid's CRS whose pixels are `inside`; None = all pixels.
    all_touched: bool = False  #: Whether pixels that the polygon touches are inside, not only those whose centre is.
    into: npt.NDArray[Any] | None = None  #: An array `[C, H, W]` that the pixels are read to; None = a new one.
    layers: tuple[Layer, ...] = ()  #: The records up to the first that covers the chip.
    error: DataError | FetchError | None = None  #: Why the request could not be planned.

    @classmethod
    def plan(cls, grid: Grid, records: Sequence[PlannableRecord], rules: ChipRules, **fields: Any) -> ChipRequest:
        """Plan a request (pure); data that cannot be planned fails when the request is read.

        Raises:
            NoOverlapError: no records.
            UsageError: bands or arguments that no record can satisfy.
        """
        if not records:
            raise NoOverlapError("No record matches this place and time.")
        request = cls(grid=grid, records=records, rules=rules, **fields)
        try:
            return replace(request, layers=tuple(next_layers(request, 0)))
        except (DataError, FetchError) as error:
            return replace(request, error=error)

    @property
    def plans(self) -> list[ChipPlan]:
        """What the first round reads."""
        return [plan for layer in self.layers for plan in layer.plans]

    def inside_mask(self) -> npt.NDArray[np.bool_]:
        """Return the pixels inside the geometry, bool `[H, W]`."""
        if self.geometry is None:
            return np.ones(self.grid.shape, bool)
        return polygon_mask(self.geometry, self.grid, all_touched=self.all_touched)


def next_layers(request: ChipRequest, start: int) -> Iterator[Layer]:
    """Plan the records of a request from number `start` on, up to the first that covers the chip."""
    rules = request.rules
    for record in request.records[start:]:
        image = record.plan(
            request.grid,
            rules.bands,
            resampling=rules.resampling,
            nodata=rules.nodata,
            categories=rules.categories,
            wrap=rules.wrap,
            level=rules.level,
        )
        quality = None
        if rules.quality is not None:
            quality = record.plan(
                request.grid,
                [rules.quality.band],
                resampling="nearest",
                nodata=rules.quality.stored_nodata,
                categories=rules.quality.below is None,
            )
        layer = Layer(record=record.info, image=image, quality=quality)
        yield layer
        if layer.covers:
            return
