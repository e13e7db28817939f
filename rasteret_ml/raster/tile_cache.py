"""Tiles of one process: those being read now, and those kept decoded. No tile is read twice at a time.

A batch that wants a tile which another one is reading adds its wishes to that flight. Only the loop's thread boards
and ends flights; the decode threads take the wishes of a flight, and keep tiles.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import RasteretError
from rasteret_ml.raster.jobs import TileCopy, TileJob

__all__ = ["DecodedTile", "InFlightTile", "TileSchedule", "TileStore"]


@dataclass(frozen=True, slots=True, eq=False)
class DecodedTile:
    """A tile's pixels, read-only, for whoever wants a part of them."""

    pixels: npt.NDArray[Any]
    """`[rows, columns, samples]`."""
    valid: npt.NDArray[np.bool_] | None
    """What the codec says of them (LERC), same shape."""

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.pixels.nbytes + (0 if self.valid is None else self.valid.nbytes)


class InFlightTile:
    """A tile on its way: fetched, decoded, pasted for all who boarded before it is decoded."""

    __slots__ = ("dead", "ended", "job", "key", "pastes", "taken")

    def __init__(self, job: TileJob, key: Hashable) -> None:
        self.job = job
        self.key = key
        self.pastes: list[TileCopy] = job.pastes
        self.taken = False
        self.dead = False
        self.ended: asyncio.Future[RasteretError | None] = asyncio.get_running_loop().create_future()
        """None once the pixels are in place; the error where there are none; cancelled where the reader gave up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSchedule:
    """How the tiles of a batch will come."""

    own: list[InFlightTile]
    """To be read now."""
    joined: list[tuple[TileJob, InFlightTile]]
    """Being read by another batch."""
    kept: list[tuple[TileJob, DecodedTile]]
    """In the cache."""


class TileStore:
    """What one process reads and keeps.

    Args:
        cache_bytes: Decoded bytes kept, the least recently used dropped first; 0 = none.
    """

    def __init__(self, cache_bytes: int = 0) -> None:
        self.cache_bytes = int(cache_bytes)
        self.kept_bytes = 0
        self._kept: OrderedDict[Hashable, DecodedTile] = OrderedDict()
        self._flying: dict[Hashable, InFlightTile] = {}
        self._lock = threading.Lock()

    def schedule(self, jobs: Iterable[TileJob]) -> TileSchedule:
        """Sort jobs into those to read, those that another batch reads, and those that are kept."""
        own, joined, kept = [], [], []
        with self._lock:
            for job in jobs:
                key = job.key
                tile, flight = self._kept.get(key), self._flying.get(key)
                if tile is not None:
                    self._kept.move_to_end(key)
                    kept.append((job, tile))
                elif flight is not None and not flight.taken:
                    flight.pastes.extend(job.pastes)
                    joined.append((job, flight))
                else:
                    self._flying[key] = flight = InFlightTile(job, key)
                    own.append(flight)
        return TileSchedule(own=own, joined=joined, kept=kept)

    def take(self, flight: InFlightTile) -> list[TileCopy] | None:
        """All wishes for a tile that is about to be decoded; nobody boards after this. None: it was abandoned."""
        with self._lock:
            flight.taken = True
            return None if flight.dead else flight.pastes

    def keep(self, flight: InFlightTile, tile: DecodedTile) -> None:
        """Keep a decoded tile, dropping the least recently used ones."""
        if tile.nbytes > self.cache_bytes:
            return
        with self._lock:
            if flight.key not in self._kept:
                self._kept[flight.key] = tile
                self.kept_bytes += tile.nbytes
            while self.kept_bytes > self.cache_bytes:
                _, dropped = self._kept.popitem(last=False)
                self.kept_bytes -= dropped.nbytes

    def end(self, flight: InFlightTile, error: RasteretError | None = None) -> None:
        """The tile is in place, or cannot be had."""
        if not flight.ended.done():
            flight.ended.set_result(error)
        self._forget(flight)

    def abandon(self, flights: Iterable[InFlightTile], *, taken: bool = False) -> None:
        """Their batch gave up: whoever joined those that have not ended has to read them.

        What a thread is decoding goes on (unless `taken`, after that thread has failed): it would paste into the
        buffers of those who joined, so they wait for it.
        """
        for flight in flights:
            with self._lock:
                over = flight.ended.done() or (flight.taken and not taken)
                flight.dead = flight.dead or not over
            if not over:
                flight.ended.cancel()
                self._forget(flight)

    def _forget(self, flight: InFlightTile) -> None:
        with self._lock:
            if self._flying.get(flight.key) is flight:
                del self._flying[flight.key]
