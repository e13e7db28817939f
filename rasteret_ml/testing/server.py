"""A range server on loopback, with latency and faults on request, that counts what it is asked.

As a program: `python -m rasteret_ml.testing FOLDER --latency 0.03` serves until it is stopped.
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

__all__ = ["BrokenBytes", "Fault", "RangeServer", "ServedRequest", "main"]

_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


@dataclass(slots=True, kw_only=True)
class Fault:
    """What a path does wrong, for its next `times` requests."""

    kind: Literal["status", "ignore_range", "hang", "cut", "html"]
    """Answer with a status; the whole file with 200; nothing until the server stops; half the body; an HTML
    page with 200."""
    status: int = 500
    """For `status`."""
    times: int = 1 << 30
    """Requests that meet it; later ones are served well."""
    headers: tuple[tuple[str, str], ...] = ()
    """Extra headers of a `status` answer."""


@dataclass(slots=True, kw_only=True)
class BrokenBytes:
    """Bytes that a server cannot give: any request for one of them is answered with an error status."""

    path: str
    """Of the file, without the leading slash."""
    start: int
    """First byte."""
    stop: int
    """One past the last."""
    status: int = 503
    """Of the answer."""
    times: int = 1 << 30
    """Requests that meet it; later ones are served well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRequest:
    """One request as the server saw it."""

    path: str
    """Path, without the leading slash."""
    query: str
    """Query string."""
    range: tuple[int, int] | None
    """First byte and one past the last asked for; None = no range."""
    sent: int
    """Body bytes."""
    failed: bool = False
    """Whether it was refused because its bytes are broken, or by `failing`."""


class RangeServer:
    """Serves a folder over HTTP with range requests; a context manager with a thread of its own.

    Args:
        root: The folder.
        latency: Seconds that each answer waits first.
        port: To listen at; 0 = a free one.
        failing: Share of range requests, 0 to 1, that are answered with status 503. Which ones is a function of `seed`,
            the path, the range, and how often that range was asked for before: the same requests fail in every run.
        seed: Of that choice.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        latency: float = 0.0,
        port: int = 0,
        failing: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.root = os.path.abspath(os.fspath(root))
        self.latency = latency
        self.faults: dict[str, Fault] = {}
        """By path (without the leading slash)."""
        self.broken: list[BrokenBytes] = []
        """Bytes that cannot be had."""
        self.failing = failing
        self.seed = seed
        self._asked: Counter[tuple[str, int, int]] = Counter()
        self.requests: list[ServedRequest] = []
        """Everything asked so far."""
        self.port = port
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stop: asyncio.Event | None = None

    @property
    def url(self) -> str:
        """Address of the folder, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> RangeServer:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        if not ready.wait(30):
            raise RuntimeError("the range server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(30)

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_route("GET", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if self.latency:
            await asyncio.sleep(self.latency)
        path = request.match_info["path"]
        fault = self.faults.get(path)
        if fault is not None and fault.times > 0:
            fault.times -= 1
        else:
            fault = None
        if fault is not None and fault.kind == "hang":
            assert self._stop is not None
            self._note(request, None, 0)
            await self._stop.wait()
        if fault is not None and fault.kind == "status":
            self._note(request, None, 0)
            return web.Response(status=fault.status, headers=dict(fault.headers))
        if fault is not None and fault.kind == "html":
            self._note(request, None, 0)
            return web.Response(text="<!doctype html><title>Sign in</title>", content_type="text/html")
        return await self._file(request, path, fault)

    async def _file(self, request: web.Request, path: str, fault: Fault | None) -> web.Response:
        full = os.path.abspath(os.path.join(self.root, path))
        if not full.startswith(self.root + os.sep) or not os.path.isfile(full):
            self._note(request, None, 0)
            return web.Response(status=404)
        size = os.path.getsize(full)
        found = _RANGE.match(request.headers.get("Range", ""))
        tag = {"ETag": f'"{os.stat(full).st_mtime_ns:x}"', "Accept-Ranges": "bytes"}
        if found is None or (fault is not None and fault.kind == "ignore_range"):
            body = _part(full, 0, size)
            self._note(request, None, len(body))
            return web.Response(body=body, headers=tag, content_type="image/tiff")
        start, stop = int(found[1]), min(int(found[2] or size - 1) + 1, size)
        if start >= size:
            self._note(request, (start, stop), 0)
            return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
        status = self._refusal(path, start, stop)
        if status is not None:
            self._note(request, (start, stop), 0, failed=True)
            return web.Response(status=status)
        body = _part(full, start, stop - start)
        if fault is not None and fault.kind == "cut":
            body = body[: len(body) // 2]
        self._note(request, (start, stop), len(body))
        headers = tag | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return web.Response(status=206, body=body, headers=headers, content_type="image/tiff")

    def _refusal(self, path: str, start: int, stop: int) -> int | None:
        """The status that a range is refused with; None = it is served."""
        for bad in self.broken:
            if bad.times > 0 and bad.path == path and bad.start < stop and start < bad.stop:
                bad.times -= 1
                return bad.status
        if not self.failing:
            return None
        asked = self._asked[path, start, stop]
        self._asked[path, start, stop] += 1
        words = f"{self.seed} {path} {start} {stop} {asked}".encode()
        drawn = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") / 2**64
        return 503 if drawn < self.failing else None

    def _note(self, request: web.Request, span: tuple[int, int] | None, sent: int, *, failed: bool = False) -> None:
        path, query = request.match_info["path"], request.query_string
        self.requests.append(ServedRequest(path=path, query=query, range=span, sent=sent, failed=failed))


def _part(path: str, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)


def main() -> None:
    """Serve a folder until interrupted; prints the address first."""
    parser = argparse.ArgumentParser(description="Serve a folder with HTTP range requests on loopback.")
    parser.add_argument("folder")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--failing", type=float, default=0.0, help="share of range requests answered with 503")
    options = parser.parse_args()
    with RangeServer(options.folder, latency=options.latency, port=options.port, failing=options.failing) as server:
        print(server.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
