"""Proxies, netrc and redirects: respected, and without cost for hosts that need none."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.http import HttpReader
from rasteret_ml.storage.reader import FetchLimits, RetryPolicy

_SPAN = ByteRange(100, 50)
_LIMITS = FetchLimits(retry=RetryPolicy(attempts=2, base=0.0, cap=0.02))
_GOOD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\nContent-Range: bytes 100-149/900\r\n\r\n" + bytes(50)


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxies and no logins, whatever the machine has."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def serving(answer: Callable[[bytes], bytes], check: Callable[[int, list[bytes]], Awaitable[None]]) -> None:
    """Run `check(port, requests)` with a server that responds with `answer(request)` and keeps connections open."""
    seen: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                seen.append(request)
                writer.write(answer(request))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def both() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            await check(server.sockets[0].getsockname()[1], seen)

    asyncio.run(both())


async def read(url: str, times: int = 1) -> int:
    """Return the number of bytes read."""
    reader = HttpReader(_LIMITS)
    try:
        return [len((await reader.read(url, _SPAN)).data) for _ in range(times)][-1]
    finally:
        await reader.aclose()


def test_a_plain_host_costs_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """aiohttp would look up proxies and netrc on other threads, twice per request."""

    async def check(port: int, seen: list[bytes]) -> None:
        loop = asyncio.get_running_loop()
        hops: list[object] = []
        inner = loop.run_in_executor
        monkeypatch.setattr(loop, "run_in_executor", lambda *args: (hops.append(args), inner(*args))[1])
        assert await read(f"http://127.0.0.1:{port}/a.tif", times=3) == 50
        assert hops == []
        assert len(seen) == 3

    serving(lambda _: _GOOD, check)


def test_a_proxy_is_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request arrives at the proxy in absolute form, with the proxy's login."""

    async def check(port: int, seen: list[bytes]) -> None:
        monkeypatch.setenv("http_proxy", f"http://me:pw@127.0.0.1:{port}")
        assert await read("http://nowhere.invalid/a.tif") == 50
        assert seen[0].startswith(b"GET http://nowhere.invalid/a.tif HTTP/1.1\r\n")
        assert base64.b64encode(b"me:pw") in seen[0]

    serving(lambda _: _GOOD, check)


def test_no_proxy_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host in no_proxy is contacted directly."""

    async def check(port: int, seen: list[bytes]) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert await read(f"http://127.0.0.1:{port}/a.tif") == 50
        assert seen[0].startswith(b"GET /a.tif ")

    serving(lambda _: _GOOD, check)


def test_a_login_in_netrc_is_sent_to_its_host_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As NASA Earthdata requires."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    async def check(port: int, seen: list[bytes]) -> None:
        await read(f"http://127.0.0.1:{port}/a.tif")
        await read(f"http://localhost:{port}/a.tif")
        assert b"Authorization: Basic " + base64.b64encode(b"me:pw") in seen[0]
        assert b"Authorization" not in seen[1]

    serving(lambda _: _GOOD, check)


def test_a_redirect_is_followed_by_way_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host redirects to one behind a proxy; the second read costs no extra request."""

    def answer(request: bytes) -> bytes:
        if request.startswith(b"GET /a.tif"):
            return b"HTTP/1.1 302 Found\r\nLocation: http://nowhere.invalid/b.tif\r\nContent-Length: 0\r\n\r\n"
        return _GOOD

    async def check(port: int, seen: list[bytes]) -> None:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert await read(f"http://127.0.0.1:{port}/a.tif", times=2) == 50
        first = [request.split(b" ", 2)[1] for request in seen]
        assert first == [
            b"/a.tif",
            b"/a.tif",
            b"http://nowhere.invalid/b.tif",
            b"/a.tif",
            b"http://nowhere.invalid/b.tif",
        ]

    serving(answer, check)


@pytest.mark.parametrize("content", ["machine", "\udcff"], ids=["broken", "undecodable"])
def test_a_netrc_that_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    """Requests are sent without a login."""
    (tmp_path / "netrc").write_bytes(content.encode("utf-8", "surrogateescape"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    async def check(port: int, seen: list[bytes]) -> None:
        assert await read(f"http://127.0.0.1:{port}/a.tif") == 50

    serving(lambda _: _GOOD, check)
