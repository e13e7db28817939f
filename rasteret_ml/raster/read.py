"""The read path: `read_chips` turns requests into pixels. Datasets and `RasterAccessor` all come through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy.typing as npt

from rasteret_ml.errors import DataError, FetchError, RasteretError
from rasteret_ml.geo.geometries import polygon_mask
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import TileError, execute
from rasteret_ml.raster.mosaic import Mosaic
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.requests import ChipRequest, Layer

#: What happens to a request whose data cannot be read: "raise" ends the read; "drop" gives no chip for it, "keep" a
#: chip in which the missing tiles are invalid, and both list the errors. "keep" is for requests of one record.
OnError = Literal["raise", "drop", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadResult:
    """Chips in the order of their requests, and what could not be read."""

    chips: list[Chip | None]  #: One per request; None where it failed and `on_error` is "drop".
    errors: dict[int, list[TileError | RasteretError]]  #: Why requests failed, by position.
    on_error: OnError  #: The policy of the read.


async def read_chips(requests: Sequence[ChipRequest], engine: Engine, *, on_error: OnError = "raise") -> ReadResult:
    """Read all requests together; each tile is fetched and decoded once, whatever asks for it.

    In rounds: each request brings its records up to the first that covers the chip; requests with pixels still missing
    then bring their next records.

    A tile that cannot be read raises ReadError if `on_error` is "raise"; data that cannot be planned, or records of
    different scale or offset that meet in one chip, raise DataError or FetchError unless it is "drop".
    """
    read = _Read(requests, engine, on_error)
    while layers := read.next_layers():
        await read.round(layers)
    return ReadResult(chips=read.finish(), errors=read.errors, on_error=on_error)


def mask_geometry(request: ChipRequest, chip: Chip) -> Chip:
    """Return a chip of a request with the pixels inside its geometry.

    Not part of `read_chips`, whose work runs in threads: GDAL's rasterizer, as rasterio calls it, changes the warning
    filters of the whole process while it runs.
    """
    if request.geometry is None:
        return chip
    return replace(chip, inside=polygon_mask(request.geometry, request.grid, all_touched=request.all_touched))


class _Read:
    """One call of `read_chips`."""

    def __init__(self, requests: Sequence[ChipRequest], engine: Engine, on_error: OnError) -> None:
        self.errors: dict[int, list[TileError | RasteretError]] = {}
        self._engine = engine
        self._on_error = on_error
        self._mosaics = [Mosaic(request) for request in requests]

    def next_layers(self) -> list[tuple[int, Layer]]:
        """Return the next layers, by position, of the requests that have pixels missing."""
        layers: list[tuple[int, Layer]] = []
        with self._engine.meter.track("assemble"):
            for i, mosaic in enumerate(self._mosaics):
                if self._is_read(i):
                    with self._errors_of(i):
                        layers += [(i, layer) for layer in mosaic.next_layers()]
        return layers

    def _is_read(self, position: int) -> bool:
        return self._on_error == "keep" or position not in self.errors

    async def round(self, layers: Sequence[tuple[int, Layer]]) -> None:
        """Read layers and add them to their mosaics."""
        plans = [(i, layer, plan) for i, layer in layers for plan in layer.plans]
        result = await execute(
            [plan for _, _, plan in plans],
            self._engine,
            into=[self._target(i, plan) for i, _, plan in plans],
            allow_errors=self._on_error != "raise",
            drop_incomplete=self._on_error == "drop",
        )
        for error in result.errors:
            error = replace(error, positions=tuple(dict.fromkeys(plans[k][0] for k in error.positions)))
            for i in error.positions:
                self.errors.setdefault(i, []).append(error)
        chips = iter(result.chips)
        with self._engine.meter.track("assemble"):
            for i, layer in layers:
                image, quality = next(chips), None if layer.quality is None else next(chips)
                if self._is_read(i):
                    with self._errors_of(i):
                        self._mosaics[i].add(layer, image, quality)

    def _target(self, position: int, plan: ChipPlan) -> npt.NDArray[Any] | None:
        """Return the request's own array for the first record, None = a new one for others and for quality bands."""
        request = self._mosaics[position].request
        return request.into if plan is request.layers[0].image else None

    def finish(self) -> list[Chip | None]:
        """Return the finished chips."""
        return [mosaic.finish() if self._is_read(i) else None for i, mosaic in enumerate(self._mosaics)]

    @contextmanager
    def _errors_of(self, position: int) -> Iterator[None]:
        """Let an error in a request's data end that request alone, where errors are allowed."""
        try:
            yield
        except (DataError, FetchError) as error:
            if self._on_error != "drop":
                raise
            self.errors.setdefault(position, []).append(error)
