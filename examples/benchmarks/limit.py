"""The limit: fetch (or read) and decode the tiles of the same chips and do nothing else.

A batch reads each tile once and adjacent tiles in one request, as the library does. Nothing is kept between batches,
and several batches are in flight: in one process with a decode thread per core, or in one process per core with a
single thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import imagecodecs
import numpy as np
import tifffile
from scenes import TILE

from rasteret_ml.ranges import ByteRange, CoalesceLimits, coalesce

CONNECTIONS = 50
"""Requests in flight in a process, as many as the library allows by default."""
_buffers = threading.local()


class Request(NamedTuple):
    """A byte range of a file and the tiles in it."""

    path: str
    """Path relative to the base."""
    start: int
    """Offset of the first byte."""
    length: int
    """Number of bytes."""
    tiles: tuple[tuple[int, int], ...]
    """(offset in the range, number of bytes) of each tile."""


class Chip(NamedTuple):
    """A chip that is read from several files."""

    files: tuple[str, ...]
    """Paths relative to the base, one per band."""
    row: int
    """First row."""
    col: int
    """First column."""


class TileIndex:
    """Tile tables of local files, read with tifffile.

    Args:
        folder: Folder of the files.
        size: Rows and columns of a chip.
    """

    def __init__(self, folder: str, size: int) -> None:
        self._folder, self._size = Path(folder), size
        self._tables: dict[str, tuple[list[int], list[int], int]] = {}

    def requests(self, chips: Sequence[Chip], limits: CoalesceLimits | None = None) -> list[Request]:
        """Return the requests of a batch: each tile once, merged as the library merges them."""
        needed: dict[str, set[int]] = {}
        for chip in chips:
            for path in chip.files:
                across = self._table(path)[2]
                rows = range(chip.row // TILE, (chip.row + self._size - 1) // TILE + 1)
                cols = range(chip.col // TILE, (chip.col + self._size - 1) // TILE + 1)
                needed.setdefault(path, set()).update(r * across + c for r in rows for c in cols)
        return [
            request
            for path, tiles in needed.items()
            for request in self._merged(path, sorted(tiles), limits or CoalesceLimits())
        ]

    def _merged(self, path: str, tiles: list[int], limits: CoalesceLimits) -> list[Request]:
        offsets, counts, _ = self._table(path)
        ranges = [ByteRange(offsets[i], counts[i]) for i in tiles]
        return [
            Request(
                path,
                merged.span.start,
                merged.span.length,
                tuple((ranges[i].start - merged.span.start, ranges[i].length) for i in merged.parts),
            )
            for merged in coalesce(ranges, limits)
        ]

    def _table(self, path: str) -> tuple[list[int], list[int], int]:
        if path not in self._tables:
            with tifffile.TiffFile(self._folder / path) as file:
                page: Any = file.pages[0]
                across = -(-page.imagewidth // TILE)
                self._tables[path] = list(page.dataoffsets), list(page.databytecounts), across
        return self._tables[path]


def decode(body: bytes, request: Request) -> None:
    """Decode every tile of a range into a buffer of this thread."""
    if not hasattr(_buffers, "tile"):
        _buffers.tile = np.empty(TILE * TILE * 2, np.uint8)
    view = memoryview(body)
    for offset, length in request.tiles:
        pixels = imagecodecs.deflate_decode(view[offset : offset + length], out=_buffers.tile)
        if len(pixels) != TILE * TILE * 2:
            raise ValueError(f"{request.path}: a tile must have {TILE * TILE * 2} bytes, got {len(pixels)}.")
        values = _buffers.tile.view(np.uint16).reshape(TILE, TILE)
        imagecodecs.delta_decode(values, axis=-1, out=values)


async def _over_http(base: str, batches: list[list[Request]], ahead: int, pool: ThreadPoolExecutor) -> list[float]:
    loop, window, limit = asyncio.get_running_loop(), asyncio.Semaphore(ahead), asyncio.Semaphore(CONNECTIONS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    headers = {"Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(connector=connector, headers=headers, auto_decompress=False) as session:

        async def fetch(request: Request) -> None:
            span = {"Range": f"bytes={request.start}-{request.start + request.length - 1}"}
            async with limit, session.get(f"{base}/{request.path}", headers=span) as response:
                body = await response.read()
                if response.status != 206 or len(body) != request.length:
                    raise ValueError(f"{request.path}: HTTP {response.status}, {len(body)} bytes")
            await loop.run_in_executor(pool, decode, body, request)

        async def batch(requests: list[Request]) -> float:
            async with window:
                await asyncio.gather(*map(fetch, requests))
                return time.monotonic()

        return list(await asyncio.gather(*map(batch, batches)))


def _from_disk(base: str, batches: list[list[Request]], ahead: int, pool: ThreadPoolExecutor) -> list[float]:
    files = {path: os.open(f"{base}/{path}", os.O_RDONLY) for path in {r.path for b in batches for r in b}}

    def read(request: Request) -> float:
        decode(os.pread(files[request.path], request.length, request.start), request)
        return time.monotonic()

    running: list[list[Future[float]]] = []
    times = []
    for requests in batches:
        running.append([pool.submit(read, request) for request in requests])
        if len(running) > ahead:
            times.append(max(done.result() for done in running.pop(0)))
    times += [max(done.result() for done in left) for left in running]
    return times


def _process(base: str, batches: list[list[Request]], ahead: int, threads: int, ready: Any, out: Any) -> None:
    with ThreadPoolExecutor(threads) as pool:
        ready.wait()
        start = time.monotonic()
        if base.startswith("http"):
            times = asyncio.run(_over_http(base, batches, ahead, pool))
        else:
            times = _from_disk(base, batches, ahead, pool)
    out.put((start, times))


def limit_times(base: str, batches: list[list[Any]], processes: int, ahead: int) -> list[float]:
    """Trial: return the seconds from the start to the end of each batch.

    Args:
        base: URL or folder of the files.
        batches: Requests of each batch, as read from JSON.
        processes: Number of processes; they share the cores and take the batches in turn.
        ahead: Batches in flight in each process.
    """
    work = [[Request(p, s, n, tuple((o, c) for o, c in tiles)) for p, s, n, tiles in batch] for batch in batches]
    context = get_context("spawn")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    out, ready = context.Queue(), context.Barrier(processes)
    started = [
        context.Process(target=_process, args=(base, work[i::processes], ahead, threads, ready, out), daemon=True)
        for i in range(processes)
    ]
    for process in started:
        process.start()
    results: list[tuple[float, list[float]]] = []
    while len(results) < processes:
        with contextlib.suppress(queue.Empty):
            results.append(out.get(timeout=1))
        if any(process.exitcode for process in started):
            raise RuntimeError("A process of the limit failed; see its traceback above.")
    first = min(start for start, _ in results)
    return sorted(t - first for _, times in results for t in times)
