"""Queries of a Collection to chip requests, and chips to samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from shapely.geometry.base import BaseGeometry

from rasteret_ml.datasets.batches import BatchRequest, SampleBatch
from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.datasets.index.scene_table import RecordStore
from rasteret_ml.datasets.index.search import RecordQuery
from rasteret_ml.errors import DataError
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.chip import Chip, Scaling
from rasteret_ml.raster.engine import ReadConfig
from rasteret_ml.raster.read import ReadResult, mask_geometry
from rasteret_ml.raster.requests import ChipRequest, ChipRules
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.buffers import batch_buffer, torch_dtype
from rasteret_ml.samples.composite import Composite
from rasteret_ml.samples.sample import ChipSeries, SampleSpec, apply_composite, make_samples, seconds_of

_TYPICAL_DATES = 8  # Dates assumed for a series without a fixed length, to estimate its memory.

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RasterBatch(BatchRequest):
    """A batch of chips of a Collection."""

    times: Sequence[slice]  #: The time slice of each query.
    dates: Sequence[Sequence[Rows]]  #: Per query, the rows of the records of each date, best first.
    seconds: Sequence[tuple[float, ...] | None]  #: Per query, the time of each date of a series.
    #: The buffer `[B, C, H, W]` or `[B, T, C, H, W]` that the pixels are read to, where there is one.
    images: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipReader:
    """Plans the chip requests of a dataset and assembles its samples, whatever its index and grid."""

    store: RecordStore  #: The records.
    rules: ChipRules  #: How chips are filled.
    series: TimeSeries | None  #: How dates are chosen; None = ignore dates: all records fill one chip.
    composite: Composite | None  #: Makes one image of the dates; None = they stay separate.
    spec: SampleSpec  #: What samples hold.
    reading: ReadConfig  #: How bytes are read.
    dtype: np.dtype[Any]  #: Type of the stored pixels.

    def requests(
        self, search: RecordQuery, queries: Sequence[Any], grids: Sequence[Grid], times: Sequence[slice]
    ) -> RasterBatch:
        """Plan a batch, one chip request per query and date; NoOverlapError if a query has none, or too few dates."""
        dates = [search.dates(*chip) for chip in zip(grids, queries, times, strict=True)]
        images = self._buffer(grids, [self._length(found) for found in dates])
        requests = []
        for i, (query, grid, found) in enumerate(zip(queries, grids, dates, strict=True)):
            geometry = self._geometry(query, grid)
            for rows, target in zip(found, self._targets(images, i, len(found)), strict=True):
                options = {"geometry": geometry, "all_touched": self.spec.all_touched, "into": target}
                requests.append(ChipRequest.plan(grid, self.store.records(rows), self.rules, **options))
                geometry = None  # the first date's mask serves all dates
        return RasterBatch(
            queries=queries,
            grids=grids,
            reads=[(self.reading, requests)],
            nbytes=self._nbytes(grids),
            times=times,
            dates=dates,
            seconds=[None if self.series is None else search.seconds(found) for found in dates],
            images=images,
        )

    def samples(self, batch: RasterBatch, result: ReadResult) -> SampleBatch:
        """Assemble the samples of a batch from its chips."""
        errors: dict[int, list[Any]] = {}
        ((_, requests),) = batch.reads
        pairs = zip(requests, result.chips, strict=True)
        chips = [None if chip is None else mask_geometry(request, chip) for request, chip in pairs]
        readings, start = [], 0
        for i, dates in enumerate(batch.dates):
            stop = start + len(dates)
            failed = [error for k in range(start, stop) for error in result.errors.get(k, ())]
            if failed:
                errors[i] = failed
            readings.append(self._reading(batch, i, chips[start:stop], errors, result.on_error == "raise"))
            start = stop
        samples = make_samples(self.spec, batch.queries, batch.times, readings, batch.images)
        return SampleBatch(samples=samples, errors=errors)

    def _nbytes(self, grids: Sequence[Grid]) -> int:
        """Return the memory of a batch's pixels and validity while it is read, roughly."""
        pixels = sum(grid.height * grid.width for grid in grids)
        dates = 1 if self.series is None else self.series.length or _TYPICAL_DATES
        return pixels * dates * len(self.rules.bands) * (self.dtype.itemsize + 1)

    def _reading(
        self, batch: RasterBatch, position: int, chips: Sequence[Chip | None], errors: dict[int, Any], raises: bool
    ) -> ChipSeries:
        """Return the dates of a query; without a valid pixel where it failed."""
        read = [chip for chip in chips if chip is not None]
        if len(read) == len(chips):
            try:
                return self._series(batch, position, read)
            except DataError as error:  # records that cannot be combined
                if raises:
                    raise
                errors.setdefault(position, []).append(error)
        if batch.images is not None:
            batch.images[position] = 0
        return self._series(batch, position, [self._empty_chip(batch.grids[position])] * len(chips))

    def _series(self, batch: RasterBatch, position: int, chips: Sequence[Chip]) -> ChipSeries:
        seconds = batch.seconds[position] or (seconds_of(chips[0]),)
        series = ChipSeries(chips=tuple(chips), seconds=seconds, length=self._length(batch.dates[position]))
        return series if self.composite is None else apply_composite(self.composite, series, self.rules.harmonize)

    def _empty_chip(self, grid: Grid) -> Chip:
        """Return a chip without a valid pixel."""
        bands = self.rules.bands
        shape = (len(bands), *grid.shape)
        return Chip(
            data=np.zeros(shape, self.dtype),
            valid=np.zeros(shape, bool),
            inside=np.ones(grid.shape, bool),
            grid=grid,
            bands=bands,
            nodata=(None,) * len(bands),
            covered=np.zeros(grid.shape, bool),
            clear=None if self.rules.quality is None else np.zeros(grid.shape, bool),
            scaling=Scaling.none(len(bands)),
            fill=(0,) * len(bands),
        )

    def _geometry(self, query: Any, grid: Grid) -> BaseGeometry | None:
        """Return the AOI's polygon in the grid's CRS, where samples need it."""
        geometry = query.geometry if isinstance(query, AOI) and self.spec.uses_aoi else None
        if geometry is None or query.crs is None or query.crs == grid.crs:
            return geometry
        shapes = np.array([geometry], dtype=object)
        moved: BaseGeometry = transform_geometries(shapes, query.crs, crs_text(grid.crs), near=grid.bounds)[0]
        return moved

    def _targets(
        self, images: torch.Tensor | None, position: int, count: int
    ) -> Iterator[npt.NDArray[Any]] | list[None]:
        """Return the arrays that the dates of a query are read to."""
        if images is None:
            return [None] * count
        image = images[position].numpy()
        return iter(image[:count]) if self.spec.series else iter([image])

    def _buffer(self, grids: Sequence[Grid], lengths: Sequence[int]) -> torch.Tensor | None:
        """Return a buffer for all pixels of a batch, if its chips have one shape and are used as they are read."""
        processed = self.spec.rule is not None or self.composite is not None
        if processed or len({grid.shape for grid in grids}) > 1 or len(set(lengths)) > 1:
            return None
        dates = (lengths[0],) if self.spec.series else ()
        return batch_buffer((len(grids), *dates, len(self.rules.bands), *grids[0].shape), torch_dtype(self.dtype))

    def _length(self, dates: Sequence[Rows]) -> int:
        """Return T, padding included."""
        fixed = None if self.series is None or self.composite is not None else self.series.length
        return fixed or len(dates)
