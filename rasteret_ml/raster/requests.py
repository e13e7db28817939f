"""Requests of the read path: one `ChipRequest` per chip, planned before any byte is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import DataError, FetchError, NoOverlapError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.positions import Resampling
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.raster.raster_info import RasterInfo

if TYPE_CHECKING:
    from rasteret_ml.raster.accessor import RasterAccessor


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipRequest:
    """One chip to read: a grid, the records that may fill it, and the plan of the first round."""

    grid: Grid  #: The chip's grid.
    records: Sequence[RasterAccessor]  #: Best first.
    rules: ChipRules  #: How they fill the chip.
    geometry: BaseGeometry | None = None  #: Polygon in the grid's CRS whose pixels are `inside`; None = all pixels.
    all_touched: bool = False  #: Whether pixels that the polygon touches are inside, not only those whose centre is.
    into: npt.NDArray[Any] | None = None  #: An array `[C, H, W]` that the pixels are read to; None = a new one.
    layers: tuple[Layer, ...] = ()  #: The records up to the first that covers the chip.
    error: DataError | FetchError | None = None  #: Why the request could not be planned.

    @classmethod
    def plan(cls, grid: Grid, records: Sequence[RasterAccessor], rules: ChipRules, **fields: Any) -> ChipRequest:
        """Plan a request; if the data cannot be planned, the error is raised when the request is read.

        Raises NoOverlapError without records, UsageError for bands or arguments that no record can satisfy.
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
        yield Layer(record=record.info, image=image, quality=quality)
        if all(band.covers for band in image.bands):
            return
