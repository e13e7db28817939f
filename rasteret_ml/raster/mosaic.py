"""Several records on one chip: the first valid pixel wins, and nothing is fetched that cannot matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import DataError, FetchError, NoOverlapError, RasteretError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.resample.warp import Resampling
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.chip import Chip, Scaling, scaling_of
from rasteret_ml.raster.execute import Engine, TileError, execute
from rasteret_ml.raster.plan import ChipPlan, fill_value
from rasteret_ml.raster.quality import QualityMask

__all__ = ["Mosaic", "MosaicBatch", "MosaicRequest", "MosaicRule"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MosaicRule:
    """How chips are filled; the same for all chips of a dataset."""

    bands: tuple[str, ...]
    """Along C."""
    resampling: Resampling | None = None
    """Kernel for records off the grid; None = as `plan_chip` chooses."""
    nodata: int | float | None = None
    """Overrides the files' nodata."""
    categories: bool = False
    """Whether values are classes, never to be averaged."""
    quality: QualityMask | None = None
    """Tells clear pixels; None = nothing does."""
    clear_first: bool = False
    """Whether clear pixels fill those that are valid, but not clear."""
    harmonize: bool = False
    """Whether records of another scale or offset are brought to the first one's; else they are refused."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MosaicRequest:
    """One chip wanted, and the records that may fill it."""

    grid: Grid
    """The chip's grid."""
    records: Sequence[RasterAccessor]
    """Best first."""
    rule: MosaicRule
    """How they fill it."""
    into: npt.NDArray[Any] | None = None
    """An array `[C, H, W]` that the pixels go to; None = a new one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mosaic:
    """A chip filled from one or more records."""

    data: npt.NDArray[Any]
    """Pixels `[C, H, W]`; the first record's own, or its fill value, where none is valid."""
    valid: npt.NDArray[np.bool_]
    """Validity `[C, H, W]`."""
    clear: npt.NDArray[np.bool_] | None
    """Clear pixels `[H, W]`, by the record that supplied each; None where nothing tells."""
    grid: Grid
    """Where the pixels lie."""
    record: RasterAccessor | None
    """The record that supplied the first pixels; None where none did."""
    scaling: Scaling
    """Scale and offset of each band, as the records used state them."""
    fill: tuple[int | float, ...]
    """What stands where there is no pixel, per band: the first record's nodata, or 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """What one record may give."""

    record: RasterAccessor
    image: ChipPlan
    quality: ChipPlan | None

    @property
    def plans(self) -> tuple[ChipPlan, ...]:
        return (self.image,) if self.quality is None else (self.image, self.quality)

    @property
    def covers(self) -> bool:
        return all(band.covers for band in self.image.bands)


class MosaicBatch:
    """Requests that are read together, planned as far as can be before a byte is there.

    In rounds: each request brings the records up to the first that covers it wholly; those that still have
    pixels wanting then bring the next ones.

    Args:
        requests: What is wanted.
        allow_failures: Whether requests may fail, without loss to the others; `failures` then tells.
    """

    def __init__(self, requests: Sequence[MosaicRequest], *, allow_failures: bool = False) -> None:
        self.failures: dict[int, list[TileError | RasteretError]] = {}
        """Why a request could not be read, by place."""
        self._allow_failures = allow_failures
        self._builders = [_Builder(request) for request in requests]
        self._first = self._next_layers(range(len(self._builders)))

    @property
    def plans(self) -> list[ChipPlan]:
        """What the first round reads."""
        return [plan for _, layer in self._first for plan in layer.plans]

    async def read(self, engine: Engine) -> list[Mosaic | None]:
        """Read all; only once. None where a request failed and that is allowed.

        Raises:
            DataError: records with different scale or offset would meet in one chip.
            ReadError: a tile could not be read.
        """
        layers = self._first
        while layers:
            await self._read_round(engine, layers)
            with engine.meter.track("assemble"):
                pending = [
                    i for i, builder in enumerate(self._builders) if i not in self.failures and builder.wants_more
                ]
                layers = self._next_layers(pending)
        return [None if i in self.failures else builder.build() for i, builder in enumerate(self._builders)]

    async def _read_round(self, engine: Engine, layers: Sequence[tuple[int, _Layer]]) -> None:
        asked = [(i, layer, plan) for i, layer in layers for plan in layer.plans]
        result = await execute(
            [plan for _, _, plan in asked],
            engine,
            into=[self._builders[i].target(layer) if plan is layer.image else None for i, layer, plan in asked],
            allow_failures=self._allow_failures,
            whole=True,
        )
        for failure in result.failures:
            for i in dict.fromkeys(asked[place][0] for place in failure.plans):
                self.failures.setdefault(i, []).append(failure)
        chips = iter(result.chips)
        with engine.meter.track("assemble"):
            for i, layer in layers:
                image, quality = next(chips), None if layer.quality is None else next(chips)
                if i not in self.failures:
                    with self._noting(i):
                        self._builders[i].take(layer, image, quality)

    def _next_layers(self, places: Iterable[int]) -> list[tuple[int, _Layer]]:
        """The next records of these requests."""
        layers: list[tuple[int, _Layer]] = []
        for i in places:
            with self._noting(i):
                layers += [(i, layer) for layer in self._builders[i].next_layers()]
        return layers

    @contextmanager
    def _noting(self, place: int) -> Iterator[None]:
        """What is wrong with a request's data ends that request alone, where it may."""
        try:
            yield
        except (DataError, FetchError) as error:
            if not self._allow_failures:
                raise
            self.failures.setdefault(place, []).append(error)


class _Builder:
    """The state of one mosaic between rounds."""

    def __init__(self, request: MosaicRequest) -> None:
        if not request.records:
            raise NoOverlapError("No record matches this place and time.")
        self._request = request
        self._next = 0
        self._first: _Layer | None = None
        self._chip: Chip | None = None
        self._clear: npt.NDArray[np.bool_] | None = None
        self._rank = np.zeros(request.grid.shape, np.uint8)
        self._owner: _Layer | None = None
        self._there: _Layer | None = None

    @property
    def wants_more(self) -> bool:
        best = 3 if self._request.rule.clear_first else 2
        return self._next < len(self._request.records) and not (self._rank == best).all()

    def next_layers(self) -> list[_Layer]:
        """The next records, up to the first that covers the chip."""
        layers, request, rule = [], self._request, self._request.rule
        while self._next < len(request.records):
            record = request.records[self._next]
            self._next += 1
            image = record.plan(
                request.grid,
                rule.bands,
                resampling=rule.resampling,
                nodata=rule.nodata,
                categories=rule.categories,
            )
            quality = None
            if rule.quality is not None:
                categories = rule.quality.below is None
                quality = record.plan(
                    request.grid,
                    [rule.quality.band],
                    resampling="nearest",
                    nodata=rule.quality.stored_nodata,
                    categories=categories,
                )
            layers.append(_Layer(record=record, image=image, quality=quality))
            self._first = self._first or layers[-1]
            if layers[-1].covers:
                break
        return layers

    def target(self, layer: _Layer) -> npt.NDArray[Any] | None:
        """Where a record's pixels are read to: the first record's go where the mosaic is wanted."""
        return self._request.into if layer is self._first else None

    def take(self, layer: _Layer, chip: Chip, quality: Chip | None) -> None:
        """Use a record's pixels where earlier ones left gaps."""
        valid, clear = chip.valid_all, None
        # What a file holds beats the fill value, a valid pixel an invalid one and, if asked for, a clear one the rest.
        rank = chip.covered.astype(np.uint8) + valid
        if quality is not None:
            assert self._request.rule.quality is not None
            clear = self._request.rule.quality.apply(quality.data[0], quality.valid[0]) & valid
            if self._request.rule.clear_first:
                rank += clear
        if self._chip is None:
            self._chip, self._clear, self._rank = chip, clear, rank
            self._note(layer, chip, valid)
            return
        better = rank > self._rank
        if not better.any():
            return
        data = self._in_our_units(layer, chip)
        self._note(layer, chip, valid & better)
        np.copyto(self._chip.data, data, where=better)
        np.copyto(self._chip.valid, chip.valid, where=better)
        np.copyto(self._rank, rank, where=better)
        if clear is not None:
            assert self._clear is not None
            np.copyto(self._clear, clear, where=better)

    def _note(self, layer: _Layer, chip: Chip, taken: npt.NDArray[np.bool_]) -> None:
        """Whose the mosaic is: the first record's that gave a valid pixel, else the first one's that lies there."""
        if self._owner is None and taken.any():
            self._owner = layer
        if self._there is None and chip.covered.any():
            self._there = layer

    def _in_our_units(self, layer: _Layer, chip: Chip) -> npt.NDArray[Any]:
        """A record's pixels in the stored units of the first one that gave valid ones."""
        if self._owner is None:
            return np.asarray(chip.data)
        own, its = scaling_of(self._owner.image), scaling_of(layer.image)
        if own.numbers == its.numbers:
            return np.asarray(chip.data)
        if not self._request.rule.harmonize:
            raise DataError(
                f"Records {self._owner.record.id} and {layer.record.id} meet in one chip, but state different scale or "
                f"offset ({own}; {its}); bring them to one with harmonize=True, or split the Collection by them, for "
                "example with where()."
            )
        nodata = [band.source.nodata for band in self._owner.image.bands]
        return own.restore(its.values(chip.data), chip.data, np.asarray(chip.valid), nodata)

    def build(self) -> Mosaic:
        """The finished mosaic."""
        assert self._chip is not None
        assert self._first is not None
        first, owner = self._first.image, self._owner or self._there
        bands = len(self._request.rule.bands)
        return Mosaic(
            data=self._chip.data,
            valid=self._chip.valid,
            clear=self._clear,
            grid=self._request.grid,
            record=None if owner is None else owner.record,
            scaling=Scaling.none(bands) if owner is None else scaling_of(owner.image),
            fill=tuple(fill_value(band.source.nodata, first.dtype) for band in first.bands),
        )
