"""A range server on loopback with injected latency and errors, which records its requests.

As a program: `python -m rasteret_ml.testing FOLDER --latency 0.03` serves until it is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import re
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


@dataclass(slots=True, kw_only=True)
class InjectedError:
    """How the server fails the next `times` requests of a path."""

    #: Respond with a status; the whole file with 200; nothing until the server stops; half the body; an HTML page.
    kind: Literal["status", "ignore_range", "hang", "cut", "html"]
    status: int = 500  #: Status of the kind `status`.
    times: int = 1 << 30  #: Requests that fail; later ones succeed.
    headers: tuple[tuple[str, str], ...] = ()  #: Extra headers of the kind `status`.


@dataclass(slots=True, kw_only=True)
class BrokenBytes:
    """Bytes that the server cannot read: a request for any of them fails with a status."""

    path: str  #: Path of the file, without the leading slash.
    start: int  #: First byte.
    stop: int  #: One past the last byte.
    status: int = 503  #: Status of the response.
    times: int = 1 << 30  #: Requests that fail; later ones succeed.


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """One request as the server saw it."""

    path: str  #: Path, without the leading slash.
    query: str  #: Query string.
    range: tuple[int, int] | None  #: First requested byte and one past the last; None = no range.
    sent: int  #: Body bytes of the response.
    failed: bool = False  #: Whether it failed because of `broken` or `error_rate`.


class RangeServer:
    """Serve a folder over HTTP with range requests, in a thread; a context manager.

    Args:
        root: The folder.
        latency: Seconds before each response.
        port: Port to listen on; 0 = any free one.
        error_rate: Share of range requests, 0 to 1, that fail with status 503. Which ones is a function of `seed`, the
            path, the range and how often that range was requested before, so the same requests fail in every run.
        seed: Seed of that choice.

    Example:
        >>> with RangeServer("scenes", latency=0.03) as server:  # doctest: +SKIP
        ...     collection = rasteret_ml.build([f"{server.url}/a.tif"], "scenes.parquet", bands=["B04"])
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        latency: float = 0.0,
        port: int = 0,
        error_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.root = os.path.abspath(os.fspath(root))
        self.latency = latency
        self.errors: dict[str, InjectedError] = {}  #: Injected errors by path (without the leading slash).
        self.broken: list[BrokenBytes] = []  #: Bytes that cannot be read.
        self.error_rate = error_rate
        self.seed = seed
        self._counts: Counter[tuple[str, int, int]] = Counter()
        self.requests: list[ServedRequest] = []  #: All requests so far.
        self.port = port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """URL of the folder, without a trailing slash."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RangeServer:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        if not ready.wait(30):
            raise RuntimeError("The range server did not start within 30 seconds.")
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(30)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route("GET", "/{path:.*}", self._respond)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self.port = runner.addresses[0][1]
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _respond(self, request: web.Request) -> web.Response:
        if self.latency:
            await asyncio.sleep(self.latency)
        error = self.errors.get(request.match_info["path"])
        if error is None or error.times <= 0:
            return self._file(request)
        error.times -= 1
        if error.kind in ("cut", "ignore_range"):
            return self._file(request, error.kind)
        self._record(request, None, 0)
        if error.kind == "html":
            return web.Response(text="<!doctype html><title>Sign in</title>", content_type="text/html")
        if error.kind == "hang":
            assert self._stop is not None
            await self._stop.wait()
        return web.Response(status=error.status, headers=dict(error.headers))

    def _file(self, request: web.Request, kind: str = "") -> web.Response:
        path = request.match_info["path"]
        full = os.path.abspath(os.path.join(self.root, path))
        if not full.startswith(self.root + os.sep) or not os.path.isfile(full):
            self._record(request, None, 0)
            return web.Response(status=404)
        size = os.path.getsize(full)
        found = None if kind == "ignore_range" else _RANGE.match(request.headers.get("Range", ""))
        headers = {"ETag": f'"{os.stat(full).st_mtime_ns:x}"', "Accept-Ranges": "bytes"}
        start, stop = (0, size) if found is None else (int(found[1]), min(int(found[2] or size - 1) + 1, size))
        span = None if found is None else (start, stop)
        if found is not None and start >= size:
            self._record(request, span, 0)
            return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
        status = None if found is None else self._failure(path, start, stop)
        if status is not None:
            self._record(request, span, 0, failed=True)
            return web.Response(status=status)
        with open(full, "rb") as file:
            file.seek(start)
            body = file.read(stop - start)
        if found is not None:
            body = body[: len(body) // 2] if kind == "cut" else body
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._record(request, span, len(body))
        return web.Response(status=200 if found is None else 206, body=body, headers=headers, content_type="image/tiff")

    def _failure(self, path: str, start: int, stop: int) -> int | None:
        """Return the status that a range request fails with; None = it succeeds."""
        for bad in self.broken:
            if bad.times > 0 and bad.path == path and bad.start < stop and start < bad.stop:
                bad.times -= 1
                return bad.status
        if not self.error_rate:
            return None
        count = self._counts[path, start, stop]
        self._counts[path, start, stop] += 1
        key = f"{self.seed} {path} {start} {stop} {count}".encode()
        drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
        return 503 if drawn < self.error_rate else None

    def _record(self, request: web.Request, span: tuple[int, int] | None, sent: int, *, failed: bool = False) -> None:
        path, query = request.match_info["path"], request.query_string
        self.requests.append(ServedRequest(path=path, query=query, range=span, sent=sent, failed=failed))


def main() -> None:
    """Print the URL and serve a folder until interrupted."""
    parser = argparse.ArgumentParser(description="Serve a folder with HTTP range requests on loopback.")
    parser.add_argument("root", metavar="folder")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each response")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--error-rate", type=float, default=0.0, help="share of range requests that fail with 503")
    options = parser.parse_args()
    with RangeServer(**vars(options)) as server:
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
