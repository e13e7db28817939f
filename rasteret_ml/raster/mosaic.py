"""Several records on one chip: the first valid pixel wins, and nothing is fetched that cannot matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import DataError, NoOverlapError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.warp import Resampling
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.execute import Engine, execute
from rasteret_ml.raster.plan import ChipPlan

__all__ = ["Mosaic", "MosaicBatch", "MosaicRequest"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MosaicRequest:
    """One chip wanted, and the records that may fill it."""

    grid: Grid
    """The chip's grid."""
    records: Sequence[RasterAccessor]
    """Best first."""
    bands: tuple[str, ...]
    """Along C."""
    resampling: Resampling | None
    """Kernel for records off the grid; None = as `plan_chip` chooses."""
    nodata: int | float | None = None
    """Overrides the files' nodata."""
    categories: bool = False
    """Whether values are classes, never to be averaged."""
    into: npt.NDArray[Any] | None = None
    """An array `[C, H, W]` that the pixels go to; None = a new one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mosaic:
    """A chip filled from one or more records."""

    data: npt.NDArray[Any]
    """Pixels `[C, H, W]`; the first record's own, or its fill value, where none is valid."""
    valid: npt.NDArray[np.bool_]
    """Validity `[C, H, W]`."""
    grid: Grid
    """Where the pixels lie."""
    record: RasterAccessor | None
    """The record that supplied the first pixels; None where none did."""
    scale: tuple[float | None, ...]
    """Scale of each band, as the records used state it."""
    offset: tuple[float | None, ...]
    """Offset of each band."""


class MosaicBatch:
    """Requests that are read together, planned as far as can be before a byte is there.

    In rounds: each request brings the records up to the first that covers it wholly; those that still have
    invalid pixels then bring the next ones.
    """

    def __init__(self, requests: Sequence[MosaicRequest]) -> None:
        self._builders = [_Builder(request) for request in requests]
        self._first = [(builder, plan) for builder in self._builders for plan in builder.next_plans()]

    @property
    def plans(self) -> list[ChipPlan]:
        """What the first round reads."""
        return [plan for _, plan in self._first]

    async def read(self, engine: Engine) -> list[Mosaic]:
        """Read all; only once.

        Raises:
            DataError: records with different scale or offset would meet in one chip.
            ReadError: a tile could not be read.
        """
        plans = self._first
        while plans:
            targets = [builder.target(plan) for builder, plan in plans]
            result = await execute([plan for _, plan in plans], engine, into=targets)
            for (builder, plan), chip in zip(plans, result.chips, strict=True):
                builder.take(plan, chip)
            pending = [builder for builder in self._builders if builder.wants_more]
            plans = [(builder, plan) for builder in pending for plan in builder.next_plans()]
        return [builder.build() for builder in self._builders]


class _Builder:
    """The state of one mosaic between rounds."""

    def __init__(self, request: MosaicRequest) -> None:
        if not request.records:
            raise NoOverlapError("No record matches this place and time.")
        self._request = request
        self._next = 0
        self._chip: Chip | None = None
        self._covered = np.zeros(request.grid.shape, bool)
        self._valid_all = np.zeros(request.grid.shape, bool)
        self._used: list[tuple[RasterAccessor, ChipPlan]] = []
        self._queue: list[RasterAccessor] = []
        self._first: ChipPlan | None = None

    @property
    def wants_more(self) -> bool:
        return self._next < len(self._request.records) and not self._valid_all.all()

    def next_plans(self) -> list[ChipPlan]:
        """Plans of the next records, up to the first that covers the chip."""
        plans, request = [], self._request
        while self._next < len(request.records):
            record = request.records[self._next]
            self._next += 1
            plan = record.plan(
                request.grid,
                request.bands,
                resampling=request.resampling,
                nodata=request.nodata,
                categories=request.categories,
            )
            self._first = self._first or plan
            self._queue.append(record)
            plans.append(plan)
            if all(band.covers for band in plan.bands):
                break
        return plans

    def target(self, plan: ChipPlan) -> npt.NDArray[Any] | None:
        """Where the chip of a plan is read to: the first record's pixels go where the mosaic is wanted."""
        return self._request.into if plan is self._first else None

    def take(self, plan: ChipPlan, chip: Chip) -> None:
        """Use a record's chip where earlier ones left gaps."""
        record = self._queue.pop(0)
        if self._chip is None:
            self._chip = chip
            self._covered, self._valid_all = chip.covered.copy(), chip.valid_all
            if self._covered.any():
                self._used.append((record, plan))
            return
        # A valid pixel fills an invalid one; where nothing is valid, what a file holds beats the fill value.
        better = chip.valid_all & ~self._valid_all
        better |= chip.covered & ~self._covered
        if better.any():
            self._used.append((record, plan))
            np.copyto(self._chip.data, chip.data, where=better)
            np.copyto(self._chip.valid, chip.valid, where=better)
            self._covered |= chip.covered
            self._valid_all |= chip.valid_all

    def build(self) -> Mosaic:
        """The finished mosaic."""
        assert self._chip is not None
        facts = [_scaling(plan) for _, plan in self._used]
        if len(set(facts)) > 1:
            names = ", ".join(record.id for record, _ in self._used)
            raise DataError(
                f"Records {names} meet in one chip, but state different scale or offset ({facts}); "
                "split the Collection by them, for example with where()."
            )
        nothing = ((None,) * len(self._request.bands),) * 2
        scale, offset = facts[0] if facts else nothing
        return Mosaic(
            data=self._chip.data,
            valid=self._chip.valid,
            grid=self._request.grid,
            record=self._used[0][0] if self._used else None,
            scale=scale,
            offset=offset,
        )


def _scaling(plan: ChipPlan) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    found = [band.source.metadata for band in plan.bands]
    return tuple(m.scale for m in found), tuple(m.offset for m in found)
