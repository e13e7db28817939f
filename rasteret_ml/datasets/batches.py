"""The two halves of reading a batch: queries to a plan, and what was read to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.datasets.index.query import RecordQuery
from rasteret_ml.datasets.index.scene_table import RecordStore
from rasteret_ml.datasets.protocol import Reading
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.loader.failures import Faults
from rasteret_ml.raster.chip import Scaling
from rasteret_ml.raster.execute import Engine
from rasteret_ml.raster.mosaic import Mosaic, MosaicBatch, MosaicRequest, MosaicRule
from rasteret_ml.raster.worker_loop import WorkerLoop
from rasteret_ml.samples.buffers import batch_buffer, torch_dtype
from rasteret_ml.samples.composite import Composite
from rasteret_ml.samples.sample import ChipSeries, Sample, SampleSpec, apply_composite, make_samples, seconds_of
from rasteret_ml.storage.limits import FetchLimits
from rasteret_ml.storage.open import SignHook, SigningReader
from rasteret_ml.storage.reader import as_reader

__all__ = ["BatchReader", "ReadConfig"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadConfig:
    """What a process reads a dataset with; holds nothing that must not travel to a worker.

    Raises:
        UsageError: a bound below its least.
    """

    sign: SignHook | None
    """Called with each href just before it is read."""
    backend: Any
    """Something else to read from; None = the library's own reader."""
    limits: FetchLimits
    """Timeouts, retries and connections."""
    max_concurrent: int
    """Range requests in flight."""
    cache_bytes: int
    """Decoded tiles kept."""

    def __post_init__(self) -> None:
        """Check."""
        if self.max_concurrent < 1 or self.cache_bytes < 0:
            given = f"{self.max_concurrent}, {self.cache_bytes}"
            raise UsageError(f"max_concurrent is at least 1 and cache_bytes 0, not {given}.")

    def engine(self, loop: WorkerLoop) -> Engine:
        """This process's engine."""
        own = self.backend is None
        reader = loop.reader(self.limits) if own else as_reader(self.backend)
        return Engine(
            reader=reader if self.sign is None else SigningReader(reader, self.sign),
            pool=loop.pool,
            stop_early=True,
            slots=loop.slots(self.max_concurrent),
            tiles=loop.tiles(self.cache_bytes, reader if own else self.backend),
            meter=loop.meter,
        )


_USUAL_DATES = 8
"""Dates of a series that takes all there are, for a guess at its memory."""

Dates = list[npt.NDArray[np.int64]]
"""Rows of the Collection for each date of a chip, best first."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Read:
    """What was read of a batch, per query."""

    grids: Sequence[Grid]
    """Where chips lie."""
    dates: Sequence[Dates]
    """The records of each date."""
    seconds: Sequence[tuple[float, ...] | None]
    """The time of each date, in a series."""
    images: torch.Tensor | None
    """The buffer that pixels were read to, where there is one."""
    mosaics: Sequence[Mosaic | None]
    """Of all dates of all queries; None where one failed."""
    faults: Faults | None
    """Takes what fails; None = that is raised."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchReader:
    """How a dataset reads, whatever its index and grid are."""

    store: RecordStore
    """The records."""
    rule: MosaicRule
    """How chips are filled."""
    series: TimeSeries | None
    """How dates are chosen; None = they are not told apart."""
    composite: Composite | None
    """Makes one of them; None = they stay apart."""
    form: SampleSpec
    """What samples hold."""
    origin: ReadConfig
    """Where bytes come from."""
    dtype: np.dtype[Any]
    """Type of the stored pixels."""

    def bytes(self, grids: Sequence[Grid]) -> int:
        """Memory of a batch's pixels and validity while it is read."""
        pixels = sum(grid.height * grid.width for grid in grids)
        dates = 1 if self.series is None else self.series.length or _USUAL_DATES
        return pixels * dates * len(self.rule.bands) * (self.dtype.itemsize + 1)

    def batch(
        self,
        grids: Sequence[Grid],
        dates: Sequence[Dates],
        images: torch.Tensor | None,
        *,
        allow_failures: bool = False,
    ) -> MosaicBatch:
        """The plan of a batch, its pixels going to `images` where there is such a buffer."""
        requests = []
        for i, (grid, found) in enumerate(zip(grids, dates, strict=True)):
            targets: list[Any] = [None] * len(found)
            if images is not None:
                whole = images[i].numpy()
                targets = list(whole[: len(found)]) if self.form.series else [whole]
            requests += [
                MosaicRequest(grid=grid, records=self.store.records(rows), rule=self.rule, into=target)
                for rows, target in zip(found, targets, strict=True)
            ]
        return MosaicBatch(requests, allow_failures=allow_failures)

    def begin(
        self,
        finder: RecordQuery,
        queries: Sequence[Any],
        grids: Sequence[Grid],
        times: Sequence[slice],
        faults: Faults | None = None,
    ) -> Reading:
        """Plan; the work that is left has to happen on the loop, and its result is for `finish`."""
        dates = [finder.dates(*asked) for asked in zip(grids, queries, times, strict=True)]
        images = self._buffer(grids, [self._length(found) for found in dates])
        batch = self.batch(grids, dates, images, allow_failures=faults is not None)
        seconds = [None if self.series is None else finder.seconds(found) for found in dates]
        owners = [i for i, found in enumerate(dates) for _ in found]

        async def read(loop: WorkerLoop) -> Any:
            mosaics = await batch.read(self.origin.engine(loop))
            if faults is not None:
                for request, reasons in batch.failures.items():
                    for why in reasons:
                        faults.note(owners[request], why)
            return _Read(grids=grids, dates=dates, seconds=seconds, images=images, mosaics=mosaics, faults=faults)

        return read

    def finish(self, queries: Sequence[Any], times: Sequence[slice], raw: Any) -> list[Sample]:
        """Samples from what `begin`'s work gave."""
        read: _Read = raw
        rest = iter(read.mosaics)
        readings = [self._reading(read, i, list(islice(rest, len(found)))) for i, found in enumerate(read.dates)]
        return make_samples(self.form, queries, times, readings, read.images)

    def _reading(self, read: _Read, place: int, mosaics: list[Mosaic | None]) -> ChipSeries:
        """The dates of a query, of nothing where it failed."""
        there = [mosaic for mosaic in mosaics if mosaic is not None]
        if len(there) == len(mosaics):
            try:
                return self._series(read, place, there)
            except DataError as error:  # of records that do not go together
                if read.faults is None:
                    raise
                read.faults.note(place, error)
        if read.images is not None:
            read.images[place] = 0
        return self._series(read, place, [self._nothing(read.grids[place])] * len(mosaics))

    def _series(self, read: _Read, place: int, mosaics: Sequence[Mosaic]) -> ChipSeries:
        seconds = read.seconds[place] or (seconds_of(mosaics[0]),)
        reading = ChipSeries(mosaics=tuple(mosaics), seconds=seconds, length=self._length(read.dates[place]))
        return reading if self.composite is None else apply_composite(self.composite, reading, self.rule.harmonize)

    def _nothing(self, grid: Grid) -> Mosaic:
        """A chip without a valid pixel."""
        shape = (len(self.rule.bands), *grid.shape)
        return Mosaic(
            data=np.zeros(shape, self.dtype),
            valid=np.zeros(shape, bool),
            clear=None if self.rule.quality is None else np.zeros(grid.shape, bool),
            grid=grid,
            record=None,
            scaling=Scaling.none(shape[0]),
            fill=(0,) * shape[0],
        )

    def _buffer(self, grids: Sequence[Grid], lengths: Sequence[int]) -> torch.Tensor | None:
        """Where all pixels of a batch are read to, if they are all of one shape and are not worked on further."""
        worked_on = self.form.rule is not None or self.composite is not None
        if worked_on or len({grid.shape for grid in grids}) > 1 or len(set(lengths)) > 1:
            return None
        dates = (lengths[0],) if self.form.series else ()
        return batch_buffer((len(grids), *dates, len(self.rule.bands), *grids[0].shape), torch_dtype(self.dtype))

    def _length(self, dates: Dates) -> int:
        """T, with padding."""
        fixed = None if self.series is None or self.composite is not None else self.series.length
        return fixed or len(dates)
