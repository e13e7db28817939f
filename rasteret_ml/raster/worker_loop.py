"""The event loop that reads: one per process, made on first use and shared by everything in the process.

A forked child forgets its parent's loop (the threads do not exist there, and the sockets are not its own) and makes its
own; a spawned one starts without. The thread is a daemon and an exit hook closes the session, so that a forgotten loop
lets the interpreter exit. Waiting for the loop on its own thread would deadlock and is refused.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import gc
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from rasteret_ml.errors import ClosedError
from rasteret_ml.raster.engine import Engine, ReadConfig, RequestLimiter, gather_or_cancel
from rasteret_ml.raster.read import OnError, ReadResult, read_chips
from rasteret_ml.raster.requests import ChipRequest
from rasteret_ml.raster.tile_cache import TileCache
from rasteret_ml.storage.open import SchemeReader, open_reader
from rasteret_ml.storage.reader import FetchLimits
from rasteret_ml.telemetry import Meter

_T = TypeVar("_T")

Reads = Sequence[tuple[ReadConfig, Sequence[ChipRequest]]]  #: Requests, and how each group of them is read.

# Allocations between two collections of the youngest generation; with Python's default of 700, collections take a fifth
# of the time of reading headers and a tenth of that of reading batches in a worker.
_GC_THRESHOLD = 10_000


def relax_gc() -> None:
    """Collect garbage less often from now on; does nothing where collection is disabled."""
    first, *others = gc.get_threshold()
    if first:
        gc.set_threshold(max(first, _GC_THRESHOLD), *others)


@contextmanager
def relaxed_gc() -> Iterator[None]:
    """Collect garbage less often inside the block."""
    before = gc.get_threshold()
    relax_gc()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def decode_threads(workers: int = 1) -> int:
    """Return the decode threads of one of `workers` processes that share this machine's cores; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, workers))


class WorkerLoop:
    """A thread that runs an asyncio loop, with a reader per set of limits and a pool of `threads` that decode."""

    def __init__(self, threads: int, meter: Meter | None = None) -> None:
        self.meter = meter or Meter()
        self.meter.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="rasteret-decode")
        self._pid = os.getpid()
        self._readers: dict[FetchLimits, SchemeReader] = {}
        self._limiters: dict[int, RequestLimiter] = {}
        self._tiles: dict[tuple[int, int], tuple[object, TileCache]] = {}
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="rasteret-loop", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether the loop is closed or belongs to another process."""
        return self._closed or self._pid != os.getpid()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the loop."""
        return threading.current_thread() is self._thread

    def engine(self, config: ReadConfig, progress: Callable[[int], object] | None = None) -> Engine:
        """Return this process's engine for a config: connections, limiter and tile cache are shared between calls."""
        if config.limits not in self._readers:
            self._readers[config.limits] = open_reader(config.limits, self.meter)
        own = self._readers[config.limits]
        origin: object = own if config.backend is None else config.backend
        # The origin is kept alive, so that its id stays unique.
        key = config.cache_bytes, id(origin)
        _, tiles = self._tiles.setdefault(key, (origin, TileCache(config.cache_bytes)))
        return Engine(
            reader=config.reader(own),
            pool=self.pool,
            stop_early=True,
            limiter=self._limiters.setdefault(config.max_concurrent, RequestLimiter(config.max_concurrent)),
            tiles=tiles,
            meter=self.meter,
            progress=progress,
        )

    async def read(self, reads: Reads, on_error: OnError = "raise") -> list[ReadResult]:
        """Read groups of requests on the loop, with a result per group; those of one config share one `read_chips`."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (config, _) in enumerate(reads):
            groups.setdefault(config.key, []).append(i)

        results: dict[int, ReadResult] = {}

        async def read_group(members: list[int]) -> None:
            requests = [request for i in members for request in reads[i][1]]
            whole = await read_chips(requests, self.engine(reads[members[0]][0]), on_error=on_error)
            start = 0
            for i in members:
                stop = start + len(reads[i][1])
                errors = {k - start: whole.errors[k] for k in range(start, stop) if k in whole.errors}
                results[i] = ReadResult(chips=whole.chips[start:stop], errors=errors, on_error=on_error)
                start = stop

        await gather_or_cancel(map(read_group, groups.values()))
        return [results[i] for i in range(len(reads))]

    def start(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Start a coroutine on the loop; cancelling the future cancels it.

        ClosedError if the loop is closed or belongs to another process, or the caller runs on its thread.
        """
        if self.is_closed or self.is_own_thread:
            work.close()
            closed = "This worker loop is closed or belongs to another process; call current_loop() again."
            own = "A worker loop cannot wait for itself: use the dataset from another thread."
            raise ClosedError(closed if self.is_closed else own)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, future: concurrent.futures.Future[_T]) -> _T:
        """Return the result of a started coroutine."""
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise ClosedError("The worker loop was closed while it was reading.") from None
        except BaseException:
            future.cancel()  # Ctrl-C in the caller: leave no requests running
            raise

    def close(self) -> None:
        """Cancel what runs, close the sessions and end the thread; idempotent, and also called at exit."""
        if self.is_closed:
            return
        self._closed = True
        if self._thread.is_alive() and not self.is_own_thread:
            asyncio.run_coroutine_threadsafe(self._shutdown(), self._loop).result(10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def is_idle(self) -> bool:
        """Return whether nothing runs on the loop."""
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
        # The parent's loop is kept untouched: collecting it here would close sockets that the parent uses.
        if self.loop is not None:
            self.inherited.append(self.loop)
        self.lock, self.meter, self.loop = threading.Lock(), Meter(), None

    def at_exit(self) -> None:
        if self.loop is not None:
            self.loop.close()


_process = _Process()


def current_loop(workers: int = 1) -> WorkerLoop:
    """Return this process's loop; a new one has the decode threads of one of `workers` processes on this machine."""
    with _process.lock:
        if _process.loop is None or _process.loop.is_closed:
            _process.loop = WorkerLoop(decode_threads(workers), _process.meter)
        return _process.loop


async def read_in_process(
    requests: Sequence[ChipRequest],
    config: ReadConfig,
    *,
    on_error: OnError = "raise",
    progress: Callable[[int], object] | None = None,
) -> ReadResult:
    """Read requests on this process's worker loop if it has one, else on an engine that is closed afterwards.

    A backend belongs to the caller's event loop, so with one the read stays there.
    """
    loop = _process.loop
    if loop is None or loop.is_closed or (config.backend is not None and not loop.is_own_thread):
        limiter, tiles = RequestLimiter(config.max_concurrent), TileCache(config.cache_bytes)
        async with open_reader(config.limits) as own:
            engine = Engine(reader=config.reader(own), limiter=limiter, tiles=tiles, progress=progress)
            return await read_chips(requests, engine, on_error=on_error)

    async def read() -> ReadResult:
        return await read_chips(requests, loop.engine(config, progress), on_error=on_error)

    return await read() if loop.is_own_thread else await asyncio.wrap_future(loop.start(read()))


def close_idle_loop() -> None:
    """Close this process's loop, its connections and tiles, unless something runs on it; the next use makes another."""
    with _process.lock:
        loop = _process.loop
        if loop is not None and not loop.is_closed and loop.is_idle():
            loop.close()


def current_meter() -> Meter:
    """Return this process's counters without making a loop."""
    return _process.meter


atexit.register(_process.at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.after_fork)
