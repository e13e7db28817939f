"""The loop that reads: made on first use in each process, shared by everything in it.

Rules. A process has at most one; a forked child forgets its parent's (the threads are not there, the sockets
are not its own) and makes its own; a spawned one starts without. The thread is a daemon and an exit hook
closes the session, so that a forgotten loop lets the interpreter end. Calling it from its own thread would wait
for itself: refused.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from rasteret_ml.errors import ClosedError
from rasteret_ml.raster.execute import RequestLimiter
from rasteret_ml.raster.tile_cache import TileStore
from rasteret_ml.storage.limits import FetchLimits
from rasteret_ml.storage.open import SchemeReader, open_reader
from rasteret_ml.telemetry import Meter

__all__ = ["WorkerLoop", "close_idle_loop", "current_loop", "current_meter", "decode_threads", "relax_gc", "relaxed_gc"]

_ALLOCATIONS = 10_000
"""New objects between two searches; Python's own 700 cost a fifth of the time that headers take, and a tenth of what
batches take in a worker."""


def relax_gc() -> None:
    """Search less often from now on, where anybody searches at all."""
    first, *others = gc.get_threshold()
    if first:  # 0 = turned off
        gc.set_threshold(max(first, _ALLOCATIONS), *others)


@contextmanager
def relaxed_gc() -> Iterator[None]:
    """The same for a while; then as it was."""
    before = gc.get_threshold()
    relax_gc()
    try:
        yield
    finally:
        gc.set_threshold(*before)


_T = TypeVar("_T")


def decode_threads(workers: int = 1) -> int:
    """Decode threads of one of `workers` processes that share this machine: cores shared out, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, workers))


class WorkerLoop:
    """A thread that runs an asyncio loop, with a reader per set of limits and a decode pool.

    Use `run`; `close` is idempotent and also happens at exit.
    """

    def __init__(self, threads: int, meter: Meter | None = None) -> None:
        """Start the thread; `threads` decode."""
        self.meter = meter or Meter()
        self.meter.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="rasteret-decode")
        self._pid = os.getpid()
        self._readers: dict[FetchLimits, SchemeReader] = {}
        self._slots: dict[int, RequestLimiter] = {}
        self._tiles: dict[tuple[int, int], tuple[object, TileStore]] = {}
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="rasteret-loop", daemon=True)
        self._thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def reader(self, limits: FetchLimits) -> SchemeReader:
        """The process's reader with these limits; connections are kept between runs."""
        if limits not in self._readers:
            self._readers[limits] = open_reader(limits, self.meter)
        return self._readers[limits]

    def slots(self, max_concurrent: int) -> RequestLimiter:
        """The process's requests in flight: one count for all that runs with this bound."""
        return self._slots.setdefault(max_concurrent, RequestLimiter(max_concurrent))

    def tiles(self, cache_bytes: int, origin: object) -> TileStore:
        """The process's tiles that come from `origin`, so many decoded bytes of them kept."""
        # The origin is held, so that its identity stays its own.
        return self._tiles.setdefault((cache_bytes, id(origin)), (origin, TileStore(cache_bytes)))[1]

    def run(self, work: Callable[[WorkerLoop], Coroutine[Any, Any, _T]]) -> _T:
        """Run `work(self)` on the loop and wait for its result.

        Raises:
            ClosedError: the loop is closed, belongs to another process, or this is its own thread.
        """
        return self.wait(self.start(work))

    def start(self, work: Callable[[WorkerLoop], Coroutine[Any, Any, _T]]) -> concurrent.futures.Future[_T]:
        """Start `work(self)` on the loop; cancelling the future cancels the work.

        Raises:
            ClosedError: as `run`.
        """
        if self._closed or self._pid != os.getpid():
            raise ClosedError("This worker loop is closed, or was made in another process; ask current_loop() again.")
        if threading.current_thread() is self._thread:
            raise ClosedError("A worker loop cannot wait for itself: call the dataset from another thread.")
        return asyncio.run_coroutine_threadsafe(work(self), self._loop)

    def wait(self, future: concurrent.futures.Future[_T]) -> _T:
        """The result of what was started."""
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClosedError("The worker loop was closed while it was reading.") from None
        except BaseException:
            future.cancel()  # Ctrl-C in the caller: do not leave requests running
            raise

    def close(self) -> None:
        """Cancel what runs, close the sessions, end the thread."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def is_idle(self) -> bool:
        """Whether nothing runs on it."""
        return bool(asyncio.run_coroutine_threadsafe(self._runs_alone(), self._loop).result(10))

    async def _runs_alone(self) -> bool:
        return len(asyncio.all_tasks()) == 1

    async def _shutdown(self) -> None:
        running = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for reader in self._readers.values():
            await reader.aclose()
        await self._loop.shutdown_default_executor()


class _Process:
    """What this process holds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.meter = Meter()
        self.loop: WorkerLoop | None = None
        self.inherited: list[WorkerLoop] = []

    def after_fork(self) -> None:
        # The parent's loop is kept, untouched: collecting it here would close sockets that the parent uses.
        if self.loop is not None:
            self.inherited.append(self.loop)
        self.lock, self.meter, self.loop = threading.Lock(), Meter(), None


_process = _Process()


def current_loop(workers: int = 1) -> WorkerLoop:
    """This process's loop, made now if need be.

    Args:
        workers: How many processes share the machine; decides the decode threads of a loop made now.
    """
    with _process.lock:
        if _process.loop is None or _process.loop._closed:
            _process.loop = WorkerLoop(decode_threads(workers), _process.meter)
        return _process.loop


def close_idle_loop() -> None:
    """Close this process's loop, its connections and tiles, unless something runs on it; the next use makes another."""
    with _process.lock:
        loop = _process.loop
        if loop is not None and not loop._closed and loop.is_idle():
            loop.close()


def current_meter() -> Meter:
    """This process's counters; asking for them makes no loop."""
    return _process.meter


def _close_at_exit() -> None:
    if _process.loop is not None:
        _process.loop.close()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork)
