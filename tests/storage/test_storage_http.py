"""HTTP range requests: every response is checked, only transient failures are retried."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pixel_oracle import PATIENT

from rasteret_ml.errors import (
    AccessDeniedError,
    FetchError,
    FetchNotFoundError,
    FetchTimeoutError,
    NotATiffError,
    RangeNotSupportedError,
    RasteretError,
    ServerError,
    UsageError,
)
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.http import HttpReader
from rasteret_ml.storage.reader import FetchLimits, RangeResponse, RetryPolicy, Timeouts
from rasteret_ml.telemetry import Meter
from rasteret_ml.testing import InjectedError, RangeServer

_SPAN = ByteRange(100, 50)
_LIMITS = FetchLimits(retry=RetryPolicy(attempts=3, base=0.0, cap=0.02))
_CONTENT = bytes(range(256)) * 4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file on the server."""
    path = tmp_path / "a.tif"
    path.write_bytes(_CONTENT)
    return path


def fetch(
    url: str, span: ByteRange = _SPAN, limits: FetchLimits = _LIMITS, meter: Meter | None = None
) -> RangeResponse:
    """Read once with a new reader."""

    async def read() -> RangeResponse:
        reader = HttpReader(limits, meter)
        try:
            return await reader.read(url, span)
        finally:
            await reader.aclose()

    return asyncio.run(read())


def test_a_range_comes_with_size_and_tag(server: RangeServer, file: Path) -> None:
    """One request; the exact bytes, the size and the ETag of the file."""
    response = fetch(f"{server.url}/a.tif")
    assert response.data == _CONTENT[100:150]
    assert response.size == len(_CONTENT)
    assert response.etag
    assert [(r.range, r.sent) for r in server.requests] == [((100, 150), 50)]


@pytest.mark.parametrize(("status", "kind"), [(404, FetchNotFoundError), (410, FetchNotFoundError)])
def test_what_is_not_there_is_not_asked_for_again(
    server: RangeServer, file: Path, status: int, kind: type[FetchError]
) -> None:
    """404 and 410: at once, with the address, range and status in the message."""
    server.errors["a.tif"] = InjectedError(kind="status", status=status)
    with pytest.raises(kind, match=rf"/a\.tif\?…, bytes 100-149: HTTP {status}") as caught:
        fetch(f"{server.url}/a.tif?sig=SECRET")
    assert len(server.requests) == 1
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_points_to_signing(server: RangeServer, file: Path, status: int) -> None:
    """The remedy is in the message, the secret is not."""
    server.errors["a.tif"] = InjectedError(kind="status", status=status)
    with pytest.raises(AccessDeniedError, match=rf"HTTP {status}.*sign=") as caught:
        fetch(f"{server.url}/a.tif?sig=SECRET")
    assert len(server.requests) == 1
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 405, 501])
def test_other_client_errors_are_final(server: RangeServer, file: Path, status: int) -> None:
    """Other statuses are reported after one request."""
    server.errors["a.tif"] = InjectedError(kind="status", status=status)
    with pytest.raises(FetchError, match=f"HTTP {status}"):
        fetch(f"{server.url}/a.tif")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_statuses_are_retried_then_reported(server: RangeServer, file: Path, status: int) -> None:
    """All attempts are used, and the message counts them."""
    server.errors["a.tif"] = InjectedError(kind="status", status=status)
    with pytest.raises(ServerError, match=rf"/a\.tif, bytes 100-149: HTTP {status}.*\(3 attempts\)"):
        fetch(f"{server.url}/a.tif")
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_two_failures_are_survived(server: RangeServer, file: Path, status: int) -> None:
    """The third attempt succeeds; the meter counts one request and two retries."""
    server.errors["a.tif"] = InjectedError(kind="status", status=status, times=2)
    meter = Meter()
    assert fetch(f"{server.url}/a.tif", meter=meter).data == _CONTENT[100:150]
    assert (meter.snapshot().requests, meter.snapshot().retries) == (1, 2)


def _pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    asked: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float, *rest: Any) -> None:
        asked.append(seconds)
        await real(0)

    monkeypatch.setattr("rasteret_ml.storage.http.asyncio.sleep", sleep)
    return asked


def test_retry_after_is_obeyed(server: RangeServer, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After replaces the random pause."""
    pauses = _pauses(monkeypatch)
    server.errors["a.tif"] = InjectedError(kind="status", status=429, times=1, headers=(("Retry-After", "7"),))
    limits = FetchLimits(retry=RetryPolicy(attempts=3, base=0.0, cap=8.0))
    assert fetch(f"{server.url}/a.tif", limits=limits).data == _CONTENT[100:150]
    assert 7.0 in pauses


def test_a_long_retry_after_is_not_waited_for(server: RangeServer, file: Path) -> None:
    """A longer pause than the cap is an error after one request."""
    server.errors["a.tif"] = InjectedError(kind="status", status=503, headers=(("Retry-After", "3600"),))
    with pytest.raises(ServerError, match="HTTP 503"):
        fetch(f"{server.url}/a.tif")
    assert len(server.requests) == 1


def test_pauses_are_jittered_within_the_policy(
    server: RangeServer, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backoff lies between base and cap."""
    pauses = _pauses(monkeypatch)
    server.errors["a.tif"] = InjectedError(kind="status", status=500)
    with pytest.raises(ServerError):
        fetch(f"{server.url}/a.tif", limits=FetchLimits(retry=RetryPolicy(attempts=6, base=0.5, cap=2.0)))
    backoffs = [p for p in pauses if p > 0]
    assert len(backoffs) == 5
    assert all(0.5 <= p <= 2.0 for p in backoffs)
    assert len(set(backoffs)) > 1


def test_a_server_that_ignores_range_is_named(server: RangeServer, file: Path) -> None:
    """The whole file with 200 is not silently downloaded; the message says what to do."""
    server.errors["a.tif"] = InjectedError(kind="ignore_range")
    with pytest.raises(RangeNotSupportedError, match=r"/a\.tif.*ignores range requests.*download it"):
        fetch(f"{server.url}/a.tif")
    assert len(server.requests) == 1


def test_a_200_with_a_small_whole_file_is_good(server: RangeServer, file: Path) -> None:
    """A 200 response to a first range as large as the file is accepted."""
    server.errors["a.tif"] = InjectedError(kind="ignore_range")
    response = fetch(f"{server.url}/a.tif", ByteRange(0, 32768))
    assert response.data == _CONTENT
    assert response.size == len(_CONTENT)


def test_an_html_page_is_not_a_file(server: RangeServer, file: Path) -> None:
    """A login page with 200 is recognised although it is small enough to be taken for the file."""
    server.errors["a.tif"] = InjectedError(kind="html")
    with pytest.raises(NotATiffError, match=r"/a\.tif.*HTML page"):
        fetch(f"{server.url}/a.tif", ByteRange(0, 32768))
    assert len(server.requests) == 1


def test_a_server_that_hangs_is_a_timeout(server: RangeServer, file: Path) -> None:
    """Each attempt times out, and all attempts are used."""
    server.errors["a.tif"] = InjectedError(kind="hang")
    limits = FetchLimits(timeouts=Timeouts(read=0.5), retry=RetryPolicy(attempts=2, base=0.0, cap=0.01))
    with pytest.raises(FetchTimeoutError, match=r"/a\.tif, bytes 100-149: no data received for.*2 attempts"):
        fetch(f"{server.url}/a.tif", limits=limits)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("connect", r"no connection within 0\.2 s"),
        ("read", r"no data received for 0\.2 s"),
        ("total", r"no complete response within 0\.2 s"),
    ],
)
def test_a_timeout_says_which_one_it_was(name: str, said: str) -> None:
    """A port that listens but never responds; with a full queue it does not even connect."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, ExitStack() as waiting:
        address = listening.getsockname()
        if name == "connect":
            for _ in range(4):  # more than fit in the queue
                client = waiting.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(address)
        limits = FetchLimits(timeouts=replace(PATIENT, **{name: 0.2}), retry=RetryPolicy(attempts=1))
        with pytest.raises(FetchTimeoutError, match=said):
            fetch(f"http://127.0.0.1:{address[1]}/a.tif", limits=limits)


def test_a_cut_body_is_retried(server: RangeServer, file: Path) -> None:
    """A truncated body is retried; the final error states the number of bytes."""
    server.errors["a.tif"] = InjectedError(kind="cut", times=1)
    assert fetch(f"{server.url}/a.tif").data == _CONTENT[100:150]
    server.errors["a.tif"] = InjectedError(kind="cut")
    with pytest.raises(ServerError, match=r"got 25 bytes, 50 expected.*3 attempts"):
        fetch(f"{server.url}/a.tif")


def test_a_range_past_the_end_says_that_the_file_is_another(server: RangeServer, file: Path) -> None:
    """416 is not retried."""
    with pytest.raises(FetchError, match=r"HTTP 416.*not the file that was indexed"):
        fetch(f"{server.url}/a.tif", ByteRange(5000, 10))
    assert len(server.requests) == 1


def test_a_dead_server_is_a_server_error() -> None:
    """A refused connection is retried, and the error names the address."""
    with RangeServer(".") as gone:
        url = gone.url
    with pytest.raises(ServerError, match=r"127\.0\.0\.1.*3 attempts"):
        fetch(f"{url}/a.tif")


def _against(answer: bytes, check: Callable[[str], Coroutine[Any, Any, None]], seen: list[bytes] | None = None) -> None:
    """Run `check(url)` against a server that sends the same bytes to every request."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            if seen is not None:
                seen.append(request)
            writer.write(answer)
            await writer.drain()
        finally:
            writer.close()

    async def both() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            await check(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.tif")

    asyncio.run(both())


@pytest.mark.parametrize(
    "header", [b"Content-Range: bytes 0-49/1000\r\n", b"Content-Range: nonsense\r\n", b""], ids=["other", "odd", "none"]
)
def test_a_206_for_another_range_is_refused(header: bytes) -> None:
    """A 206 response must state the requested range, or wrong bytes would be decoded."""
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\n" + header + b"\r\n" + bytes(50)

    async def check(url: str) -> None:
        reader = HttpReader(_LIMITS)
        with pytest.raises(RangeNotSupportedError, match="Content-Range"):
            await reader.read(url, _SPAN)
        await reader.aclose()

    _against(answer, check)


def test_a_size_that_the_server_does_not_know_is_none() -> None:
    """`bytes 100-149/*` is accepted."""
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\nContent-Range: bytes 100-149/*\r\n\r\n" + bytes(50)

    async def check(url: str) -> None:
        reader = HttpReader(_LIMITS)
        response = await reader.read(url, _SPAN)
        await reader.aclose()
        assert (len(response.data), response.size, response.etag) == (50, None, None)

    _against(answer, check)


def test_a_signed_query_goes_out_as_it_came() -> None:
    """Escapes in a signature are part of it: nothing is quoted or unquoted."""
    seen: list[bytes] = []
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\nContent-Range: bytes 100-149/900\r\n\r\n" + bytes(
        50
    )

    async def check(url: str) -> None:
        reader = HttpReader(_LIMITS)
        await reader.read(f"{url}?sig=a%2Fb%3D&x=a+b", _SPAN)
        await reader.aclose()

    _against(answer, check, seen)
    assert seen[0].startswith(b"GET /a.tif?sig=a%2Fb%3D&x=a+b HTTP/1.1\r\n")
    assert b"Range: bytes=100-149\r\n" in seen[0]


def test_bodies_are_never_compressed_on_the_way() -> None:
    """A range of a gzip stream is not a range of the file, so requests ask for identity."""
    seen: list[bytes] = []
    answer = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\nContent-Range: bytes 100-149/900\r\n\r\n" + bytes(
        50
    )

    async def check(url: str) -> None:
        reader = HttpReader(_LIMITS)
        await reader.read(url, _SPAN)
        await reader.aclose()

    _against(answer, check, seen)
    assert b"Accept-Encoding: identity\r\n" in seen[0]


def test_connections_are_reused() -> None:
    """Ten reads in turn use one connection."""
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(
                    b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\nContent-Range: bytes 100-149/900\r\n\r\n"
                    + bytes(50)
                )
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def check() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            reader = HttpReader(_LIMITS)
            for _ in range(10):
                await reader.read(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.tif", _SPAN)
            await reader.aclose()

    asyncio.run(check())
    assert connections == 1


@pytest.mark.parametrize("url", ["http://[::1/a.tif?sig=SECRET", "http:///a.tif?sig=SECRET", "https://?sig=SECRET"])
def test_an_address_that_is_none_is_our_error(url: str) -> None:
    """A malformed URL raises an error of this library, without its query in message or traceback."""
    with pytest.raises(RasteretError) as caught:
        fetch(url)
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_a_redirect_loop_is_final_and_keeps_the_secret() -> None:
    """Endless redirects raise one error, without the query in message or traceback."""
    seen: list[bytes] = []
    answer = b"HTTP/1.1 302 Found\r\nLocation: /a.tif?sig=SECRET\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    async def check(url: str) -> None:
        reader, signed = HttpReader(_LIMITS), f"{url}?sig=SECRET"
        with pytest.raises(FetchError, match="TooManyRedirects") as caught:
            await reader.read(signed, _SPAN)
        await reader.aclose()
        assert "SECRET" not in str(caught.value)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))

    _against(answer, check, seen)


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"base": -1.0}, {"base": 2.0, "cap": 1.0}])
def test_a_policy_that_cannot_work_is_refused(bad: dict[str, float]) -> None:
    """When it is constructed."""
    with pytest.raises(UsageError, match="retry policy"):
        RetryPolicy(**bad)  # type: ignore[arg-type]


def test_timeouts_are_positive() -> None:
    """Zero is refused when they are constructed."""
    with pytest.raises(UsageError, match="positive"):
        Timeouts(read=0.0)
