"""The two halves of reading a batch: queries to a plan, and what was read to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.geo.grid import Grid
from rasteret_ml.loading.buffers import batch_buffer, torch_dtype
from rasteret_ml.loading.composite import Composite
from rasteret_ml.loading.finding import Finder
from rasteret_ml.loading.origin import Origin
from rasteret_ml.loading.reading import Reading
from rasteret_ml.loading.sample import ChipSeries, Sample, SampleForm, composed, make_samples, seconds_of
from rasteret_ml.raster.mosaic import Mosaic, MosaicBatch, MosaicRequest, MosaicRule
from rasteret_ml.runtime.worker_loop import WorkerLoop
from rasteret_ml.scenes.dates import TimeSeries
from rasteret_ml.scenes.facts import RecordStore

__all__ = ["BatchReader"]

_USUAL_DATES = 8
"""Dates of a series that takes all there are, for a guess at its memory."""

Dates = list[npt.NDArray[np.int64]]
"""Rows of the Collection for each date of a chip, best first."""


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
    form: SampleForm
    """What samples hold."""
    origin: Origin
    """Where bytes come from."""
    dtype: np.dtype[Any]
    """Type of the stored pixels."""

    def bytes(self, grids: Sequence[Grid]) -> int:
        """Memory of a batch's pixels and validity while it is read."""
        pixels = sum(grid.height * grid.width for grid in grids)
        dates = 1 if self.series is None else self.series.length or _USUAL_DATES
        return pixels * dates * len(self.rule.bands) * (self.dtype.itemsize + 1)

    def batch(self, grids: Sequence[Grid], dates: Sequence[Dates], images: torch.Tensor | None) -> MosaicBatch:
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
        return MosaicBatch(requests)

    def begin(self, finder: Finder, queries: Sequence[Any], grids: Sequence[Grid], times: Sequence[slice]) -> Reading:
        """Plan; the work that is left has to happen on the loop, and its result is for `finish`."""
        dates = [finder.dates(*asked) for asked in zip(grids, queries, times, strict=True)]
        images = self._buffer(grids, [self._length(found) for found in dates])
        batch = self.batch(grids, dates, images)
        seconds = [None if self.series is None else finder.seconds(found) for found in dates]

        async def read(loop: WorkerLoop) -> Any:
            return images, dates, seconds, await batch.read(self.origin.engine(loop))

        return read

    def finish(self, queries: Sequence[Any], times: Sequence[slice], raw: Any) -> list[Sample]:
        """Samples from what `begin`'s work gave."""
        images, dates, seconds, mosaics = raw
        rest, readings = iter(mosaics), []
        for found, when in zip(dates, seconds, strict=True):
            own: tuple[Mosaic, ...] = tuple(islice(rest, len(found)))
            reading = ChipSeries(mosaics=own, seconds=when or (seconds_of(own[0]),), length=self._length(found))
            readings.append(
                reading if self.composite is None else composed(self.composite, reading, self.rule.harmonize)
            )
        return make_samples(self.form, queries, times, readings, images)

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
