"""The read path: `read_chips` turns requests into pixels. Datasets and `RasterAccessor` all come through here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from rasteret_ml.errors import DataError, FetchError, RasteretError
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import TileError, execute
from rasteret_ml.raster.mosaic import Mosaic
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

    def part(self, start: int, stop: int) -> ReadResult:
        """Return the result of the requests `start` to `stop` (exclusive)."""
        errors = {i - start: self.errors[i] for i in range(start, stop) if i in self.errors}
        return ReadResult(chips=self.chips[start:stop], errors=errors, on_error=self.on_error)


async def read_chips(requests: Sequence[ChipRequest], engine: Engine, *, on_error: OnError = "raise") -> ReadResult:
    """Read all requests together; each tile is fetched and decoded once, whatever asks for it.

    In rounds: each request brings its records up to the first that covers the chip; requests with pixels still missing
    then bring their next records.

    Args:
        requests: What to read.
        engine: What to run on.
        on_error: What happens to requests whose data cannot be read.

    Raises:
        ReadError: a tile could not be read, and `on_error` is "raise".
        DataError: records with different scale or offset meet in one chip, and `on_error` is not "drop".
    """
    read = _Read(requests, engine, on_error)
    layers = read.first_layers()
    while layers:
        await read.round(layers)
        with engine.meter.track("assemble"):
            layers = read.next_layers()
    return ReadResult(chips=read.finish(), errors=read.errors, on_error=on_error)


def mask_geometry(request: ChipRequest, chip: Chip) -> Chip:
    """Return a chip of a request with the pixels inside its geometry.

    Not part of `read_chips`, whose work runs in threads: GDAL's rasterizer, as rasterio calls it, changes the warning
    filters of the whole process while it runs.
    """
    return chip if request.geometry is None else replace(chip, inside=request.inside_mask())


class _Read:
    """One call of `read_chips`."""

    def __init__(self, requests: Sequence[ChipRequest], engine: Engine, on_error: OnError) -> None:
        self.errors: dict[int, list[TileError | RasteretError]] = {}
        self._engine = engine
        self._on_error = on_error
        self._mosaics = {i: Mosaic(request) for i, request in enumerate(requests) if request.error is None}
        self._requests = requests

    def first_layers(self) -> list[tuple[int, Layer]]:
        """Return the planned layers of all requests."""
        for i, request in enumerate(self._requests):
            with self._errors_of(i):
                if request.error is not None:
                    raise request.error
        return [(i, layer) for i in self._pending() for layer in self._mosaics[i].request.layers]

    def next_layers(self) -> list[tuple[int, Layer]]:
        """Plan the next layers of the requests that have pixels missing."""
        layers: list[tuple[int, Layer]] = []
        for i in self._pending():
            if not self._mosaics[i].is_complete:
                with self._errors_of(i):
                    layers += [(i, layer) for layer in self._mosaics[i].next_layers()]
        return layers

    def _pending(self) -> list[int]:
        return [i for i in self._mosaics if self._on_error == "keep" or i not in self.errors]

    async def round(self, layers: Sequence[tuple[int, Layer]]) -> None:
        """Read layers and add them to their mosaics."""
        plans = [(i, layer, plan) for i, layer in layers for plan in layer.plans]
        result = await execute(
            [plan for _, _, plan in plans],
            self._engine,
            into=[self._mosaics[i].target(layer) if plan is layer.image else None for i, layer, plan in plans],
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
                if self._on_error == "keep" or i not in self.errors:
                    with self._errors_of(i):
                        self._mosaics[i].add(layer, image, quality)

    def finish(self) -> list[Chip | None]:
        """Return the finished chips."""
        pending = set(self._pending())
        return [self._mosaics[i].finish() if i in pending else None for i in range(len(self._requests))]

    @contextmanager
    def _errors_of(self, position: int) -> Iterator[None]:
        """Let an error in a request's data end that request alone, where errors are allowed."""
        try:
            yield
        except (DataError, FetchError) as error:
            if self._on_error != "drop":
                raise
            self.errors.setdefault(position, []).append(error)
