"""The limit: the tiles of the same chips fetched (or read) and decoded with nothing else done.

Unique within a batch, touching ones in one request as in our own reader, nothing kept between batches, several
batches in flight; as one process with a decode thread a core, or as a process a core with one thread each.
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
"""Requests in flight in a process: what a dataset of ours allows by default."""
_scratch = threading.local()


class Request(NamedTuple):
    """One range of one file and the tiles in it."""

    path: str
    """Below the base."""
    start: int
    """Offset of the first byte."""
    length: int
    """Bytes."""
    tiles: tuple[tuple[int, int], ...]
    """(offset in the range, bytes) of each tile."""


class Chip(NamedTuple):
    """A chip of some files."""

    files: tuple[str, ...]
    """Paths below the base, one a band."""
    row: int
    """Its first row."""
    col: int
    """Its first column."""


class TileIndex:
    """Tile tables of local files, read with tifffile."""

    def __init__(self, folder: str, size: int) -> None:
        """`size` is a chip's."""
        self._folder, self._size = Path(folder), size
        self._known: dict[str, tuple[list[int], list[int], int]] = {}

    def requests(self, chips: Sequence[Chip], limits: CoalesceLimits | None = None) -> list[Request]:
        """What a batch needs: each tile once, merged as our reader merges."""
        wanted: dict[str, set[int]] = {}
        for chip in chips:
            for path in chip.files:
                across = self._table(path)[2]
                rows = range(chip.row // TILE, (chip.row + self._size - 1) // TILE + 1)
                cols = range(chip.col // TILE, (chip.col + self._size - 1) // TILE + 1)
                wanted.setdefault(path, set()).update(r * across + c for r in rows for c in cols)
        return [
            request
            for path, tiles in wanted.items()
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
        if path not in self._known:
            with tifffile.TiffFile(self._folder / path) as file:
                page: Any = file.pages[0]
                across = -(-page.imagewidth // TILE)
                self._known[path] = list(page.dataoffsets), list(page.databytecounts), across
        return self._known[path]


def decode(body: bytes, request: Request) -> None:
    """Decode every tile of a range into this thread's scratch."""
    if not hasattr(_scratch, "tile"):
        _scratch.tile = np.empty(TILE * TILE * 2, np.uint8)
    held = memoryview(body)
    for offset, length in request.tiles:
        pixels = imagecodecs.deflate_decode(held[offset : offset + length], out=_scratch.tile)
        if len(pixels) != TILE * TILE * 2:
            raise ValueError(f"{request.path}: a tile of {len(pixels)} bytes")
        values = _scratch.tile.view(np.uint16).reshape(TILE, TILE)
        imagecodecs.delta_decode(values, axis=-1, out=values)


async def _over_http(base: str, batches: list[list[Request]], ahead: int, pool: ThreadPoolExecutor) -> list[float]:
    loop, window, limit = asyncio.get_running_loop(), asyncio.Semaphore(ahead), asyncio.Semaphore(CONNECTIONS)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    headers = {"Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(connector=connector, headers=headers, auto_decompress=False) as session:

        async def one(request: Request) -> None:
            span = {"Range": f"bytes={request.start}-{request.start + request.length - 1}"}
            async with limit, session.get(f"{base}/{request.path}", headers=span) as response:
                body = await response.read()
                if response.status != 206 or len(body) != request.length:
                    raise ValueError(f"{request.path}: HTTP {response.status}, {len(body)} bytes")
            await loop.run_in_executor(pool, decode, body, request)

        async def batch(requests: list[Request]) -> float:
            async with window:
                await asyncio.gather(*map(one, requests))
                return time.monotonic()

        return list(await asyncio.gather(*map(batch, batches)))


def _from_disk(base: str, batches: list[list[Request]], ahead: int, pool: ThreadPoolExecutor) -> list[float]:
    files = {path: os.open(f"{base}/{path}", os.O_RDONLY) for path in {r.path for b in batches for r in b}}

    def one(request: Request) -> float:
        decode(os.pread(files[request.path], request.length, request.start), request)
        return time.monotonic()

    running: list[list[Future[float]]] = []
    times = []
    for requests in batches:
        running.append([pool.submit(one, request) for request in requests])
        if len(running) > ahead:
            times.append(max(done.result() for done in running.pop(0)))
    times += [max(done.result() for done in left) for left in running]
    return times


def _process(base: str, batches: list[list[Request]], ahead: int, threads: int, ready: Any, out: Any) -> None:
    with ThreadPoolExecutor(threads) as pool:
        ready.wait()
        began = time.monotonic()
        if base.startswith("http"):
            times = asyncio.run(_over_http(base, batches, ahead, pool))
        else:
            times = _from_disk(base, batches, ahead, pool)
    out.put((began, times))


def limit_times(base: str, batches: list[list[Any]], processes: int, ahead: int) -> list[float]:
    """Trial: seconds from the start to the end of each batch.

    Args:
        base: Address or folder.
        batches: `Request`s, as JSON makes them.
        processes: Processes; they share the cores and take the batches in turn.
        ahead: Batches in flight in each.
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
    answers: list[tuple[float, list[float]]] = []
    while len(answers) < processes:
        with contextlib.suppress(queue.Empty):
            answers.append(out.get(timeout=1))
        if any(process.exitcode for process in started):
            raise RuntimeError("a process of the limit failed; see above")
    began = min(start for start, _ in answers)
    return sorted(t - began for _, times in answers for t in times)
