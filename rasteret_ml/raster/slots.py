"""How much is in flight at once, counted in requests and in bytes, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Slots"]


class Slots:
    """A semaphore over two things at once; used on one loop.

    Args:
        requests: Requests in flight.
        held_bytes: Bytes asked for or waiting to be decoded. A single request that is larger runs alone.
    """

    def __init__(self, requests: int = 50, held_bytes: int = 128 * 1024 * 1024) -> None:
        self._free = requests
        self._free_bytes = self._limit = held_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Wait for room for a request of `size` bytes, and keep it inside the block."""
        size = min(size, self._limit)
        if self._waiting or not self._fits(size):
            await self._turn(size)
        else:
            self._take(size)
        try:
            yield
        finally:
            self._give(size)

    async def _turn(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._give(size)  # it was granted in the same step as it was cancelled
            else:
                self._wake()
            raise

    def _fits(self, size: int) -> bool:
        return self._free > 0 and self._free_bytes >= size

    def _take(self, size: int) -> None:
        self._free -= 1
        self._free_bytes -= size

    def _give(self, size: int) -> None:
        self._free += 1
        self._free_bytes += size
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            size, turn = self._waiting[0]
            if turn.done():  # cancelled
                self._waiting.popleft()
                continue
            if not self._fits(size):
                return
            self._waiting.popleft()
            self._take(size)
            turn.set_result(None)
