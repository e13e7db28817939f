"""Tiles of one process: those being read, and those kept decoded. No tile is read twice at the same time.

A batch that needs a tile which another batch is reading adds its copies to that tile. Only the loop's thread schedules
and ends tiles; decode threads take the copies of a tile and keep decoded tiles.
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


@dataclass(frozen=True, slots=True, eq=False)
class DecodedTile:
    """A decoded tile; read-only."""

    pixels: npt.NDArray[Any]  #: `[rows, columns, samples]`.
    valid: npt.NDArray[np.bool_] | None  #: Validity that the codec states (LERC), same shape; None = it states none.

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.pixels.nbytes + (0 if self.valid is None else self.valid.nbytes)


class InFlightTile:
    """A tile being fetched and decoded, and where its pixels go."""

    __slots__ = ("copies", "ended", "job", "key", "taken")

    def __init__(self, job: TileJob, key: Hashable) -> None:
        self.job = job
        self.key = key
        self.copies: list[TileCopy] = job.copies
        self.taken = False
        #: None once the pixels are in place; an error where the tile failed; cancelled where its batch gave up.
        self.ended: asyncio.Future[RasteretError | None] = asyncio.get_running_loop().create_future()


class TileCache:
    """The tiles in flight in one process, and a least-recently-used cache of `max_bytes` of decoded ones (0 = none)."""

    def __init__(self, max_bytes: int = 0) -> None:
        self.max_bytes = int(max_bytes)
        self.nbytes = 0
        self._cached: OrderedDict[Hashable, DecodedTile] = OrderedDict()
        self._in_flight: dict[Hashable, InFlightTile] = {}
        self._lock = threading.Lock()

    def schedule(
        self, jobs: Iterable[TileJob]
    ) -> tuple[list[InFlightTile], list[tuple[TileJob, InFlightTile]], list[tuple[TileJob, DecodedTile]]]:
        """Sort jobs into tiles to read, tiles that another batch is reading, and cached tiles."""
        own, joined, cached = [], [], []
        with self._lock:
            for job in jobs:
                key = job.key
                decoded, tile = self._cached.get(key), self._in_flight.get(key)
                if decoded is not None:
                    self._cached.move_to_end(key)
                    cached.append((job, decoded))
                elif tile is not None and not tile.taken:
                    tile.copies.extend(job.copies)
                    joined.append((job, tile))
                else:
                    self._in_flight[key] = tile = InFlightTile(job, key)
                    own.append(tile)
        return own, joined, cached

    def take(self, tile: InFlightTile) -> list[TileCopy] | None:
        """Return the copies of a tile about to be decoded, to which none is added any more; None if abandoned."""
        with self._lock:
            tile.taken = True
            return None if tile.ended.cancelled() else tile.copies

    def keep(self, tile: InFlightTile, decoded: DecodedTile) -> None:
        """Cache a decoded tile, dropping the least recently used ones."""
        if decoded.nbytes > self.max_bytes:
            return
        with self._lock:
            if tile.key not in self._cached:
                self._cached[tile.key] = decoded
                self.nbytes += decoded.nbytes
            while self.nbytes > self.max_bytes:
                _, dropped = self._cached.popitem(last=False)
                self.nbytes -= dropped.nbytes

    def end(self, tile: InFlightTile, error: RasteretError | None = None) -> None:
        """Mark a tile as in place, or as failed."""
        if not tile.ended.done():
            tile.ended.set_result(error)
        self._remove(tile)

    def abandon(self, tiles: Iterable[InFlightTile], *, taken: bool = False) -> None:
        """Give up the tiles that have not ended: batches that joined them have to read them.

        A tile that a thread is decoding is not given up (unless `taken`, after that thread has failed): the thread
        writes to the buffers of the batches that joined, so they wait for it.
        """
        for tile in tiles:
            with self._lock:  # against `take`
                if tile.ended.done() or (tile.taken and not taken):
                    continue
                tile.ended.cancel()
            self._remove(tile)

    def _remove(self, tile: InFlightTile) -> None:
        with self._lock:
            if self._in_flight.get(tile.key) is tile:
                del self._in_flight[tile.key]
