"""HTTP/1.1 connections: responses that arrive in any pieces, and servers that close, redirect or misbehave."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import PATIENT

from rasteret_ml.errors import FetchError, FetchNotFoundError, ServerError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.http import HttpReader
from rasteret_ml.storage.http1.connection import Connection, RemoteProtocolError, Response, UnsupportedResponseError
from rasteret_ml.storage.reader import FetchLimits, RetryPolicy
from rasteret_ml.telemetry import Meter

_SPAN = ByteRange(100, 50)
_BODY = bytes(range(50))
_RANGE = b"Content-Range: bytes 100-149/900\r\n"
_GOOD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 50\r\n" + _RANGE + b"\r\n" + _BODY
_LIMITS = FetchLimits(timeouts=PATIENT, retry=RetryPolicy(attempts=2, base=0.0, cap=0.02))


@dataclass
class Seen:
    """Counters of a server."""

    url: str = ""
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    open_now: int = 0
    most_open: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the last connection is closed."""


Answering = Callable[[int, asyncio.StreamWriter], Awaitable[object]]
"""Called with the number of earlier requests; closes the writer to end the connection."""


@asynccontextmanager
async def serving(answering: Answering, **tls: Any) -> AsyncIterator[Seen]:
    """A server of raw bytes, over connections that stay open until one side closes them."""
    seen = Seen()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.connections += 1
        seen.open_now += 1
        seen.most_open = max(seen.most_open, seen.open_now)
        try:
            while not writer.is_closing():
                request = await reader.readuntil(b"\r\n\r\n")
                seen.requests.append(request)
                await answering(len(seen.requests) - 1, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            seen.open_now -= 1
            if not seen.open_now:
                seen.ended.set()
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0, **tls) as server:
        scheme = "https" if tls else "http"
        seen.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/a.tif"
        yield seen


def always(answer: bytes) -> Answering:
    """Send the same response to every request."""

    async def answering(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return answering


def in_turn(*answers: bytes) -> Answering:
    """Send one response after the other, then repeat the last one."""

    async def answering(before: int, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[min(before, len(answers) - 1)])

    return answering


def reading(
    answering: Answering, times: int = 1, meter: Meter | None = None, address: Callable[[str], str] = str
) -> tuple[Seen, list[bytes]]:
    """Read the same range several times in turn, at the URL that `address` makes from the server's."""

    async def run() -> tuple[Seen, list[bytes]]:
        async with serving(answering) as seen:
            reader = HttpReader(_LIMITS, meter)
            try:
                return seen, [bytes((await reader.read(address(seen.url), _SPAN)).data) for _ in range(times)]
            finally:
                await reader.aclose()

    return asyncio.run(run())


class FedTransport(asyncio.Transport):
    """A transport that a test controls."""

    closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Goes nowhere."""

    def is_closing(self) -> bool:
        """Whether it was aborted."""
        return self.closed

    def abort(self) -> None:
        """As a socket's."""
        self.closed = True


def fed(answer: bytes, cuts: list[int], wanted: bool = True) -> tuple[Response, bool]:
    """Return the response that a connection parses from these pieces, and whether it can be reused."""

    async def run() -> tuple[Response, bool]:
        connection = Connection()
        connection.connection_made(FedTransport())
        waiter = connection.send(b"", lambda _: wanted, 0.0)
        for start, stop in zip([0, *cuts], [*cuts, len(answer)], strict=True):
            piece = answer[start:stop]
            while piece:  # no more than fits in the buffer, as recv_into
                room = connection.get_buffer(-1)
                taken = min(len(room), len(piece))
                room[:taken] = piece[:taken]
                connection.buffer_updated(taken)
                piece = piece[taken:]
        if not waiter.done():
            connection.connection_lost(None)
        return await waiter, connection.is_open

    return asyncio.run(run())


_TOKENS = st.sampled_from(["ETag", "x-amz-id", "Server", "Cache-Control"])
_TEXTS = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30)


@given(
    body=st.binary(max_size=9000),
    headers=st.lists(st.tuples(_TOKENS, _TEXTS), max_size=5),
    padding=st.sampled_from([0, 0, 5000]),
    interim=st.booleans(),
    data=st.data(),
)
def test_an_answer_is_the_same_however_it_is_cut(
    body: bytes, headers: list[tuple[str, str]], padding: int, interim: bool, data: st.DataObject
) -> None:
    """Pieces may end anywhere, even within a line end; heads may be longer than a piece."""
    lines = [f"{name}: {value}" for name, value in headers] + [f"x-long: {'a' * padding}"]
    head = "\r\n".join(["HTTP/1.1 206 Partial Content", *lines, f"content-LENGTH:{len(body)}"]) + "\r\n\r\n"
    raw = (b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" if interim else b"") + head.encode() + body
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    answer, usable = fed(raw, cuts)
    assert (answer.head.status, answer.head.reason, usable) == (206, "Partial Content", True)
    assert answer.body is not None
    assert bytes(answer.body) == body
    for name in {name for name, _ in headers}:
        assert answer.head.headers[name.lower()] == ", ".join(value for other, value in headers if other == name)


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"HTTP/1.1 206 X\r\n", True),
        (b"HTTP/1.1 206 X\r\nConnection: Close\r\n", False),
        (b"HTTP/1.1 206\r\nConnection: x, close\r\n", False),
        (b"HTTP/1.0 206 X\r\n", False),
        (b"HTTP/1.0 206 X\r\nConnection: Keep-Alive\r\n", True),
    ],
)
def test_whether_a_connection_is_kept_is_the_servers_say(head: bytes, keeps: bool) -> None:
    """RFC 9112, 9.3."""
    assert fed(head + b"Content-Length: 50\r\n\r\n" + _BODY, [])[1] is keeps


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"HTTP/2 206 X\r\nContent-Length: 50\r\n\r\n",
        b"HTTP/1.1 206 X\r\nContent-Length: 50\r\nno header\r\n\r\n" + _BODY,
        b"HTTP/1.1 206 X\r\nContent-Length: 50\r\n folded: 1\r\n\r\n" + _BODY,
        b"HTTP/1.1 206 X\r\nContent-Length: 5, 6\r\n\r\n" + _BODY,
        b"HTTP/1.1 206 X\r\nContent-Length: -5\r\n\r\n" + _BODY,
        b"HTTP/1.1 206 X\r\nContent-Length: 49\r\n\r\n" + _BODY,
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 206 X\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 206 X\r\nContent-Le",
        _GOOD[:-1],
        b"",
    ],
)
def test_what_is_no_answer_is_an_error(answer: bytes) -> None:
    """Invalid responses raise; bytes of another response are never returned."""
    with pytest.raises(RemoteProtocolError):
        fed(answer, [])


@pytest.mark.parametrize("head", [b"Transfer-Encoding: chunked\r\nContent-Length: 50\r\n", b""])
def test_a_body_of_no_known_length_is_not_plain(head: bytes) -> None:
    """Chunked bodies, and bodies that end with the connection."""
    with pytest.raises(UnsupportedResponseError):
        fed(b"HTTP/1.1 206 X\r\n" + head + b"\r\n", [])


def test_a_body_that_nobody_wants_is_dropped() -> None:
    """A short body is discarded and the connection reused; a long one closes the connection."""
    short, usable = fed(_GOOD, [70], wanted=False)
    assert (short.body, short.head.length, usable) == (None, 50, True)
    long, usable = fed(b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\nabc", [], wanted=False)
    assert (long.body, long.head.length, usable) == (None, 999_999, False)


def test_chunks_are_read_by_aiohttp() -> None:
    """The first request costs a second one through aiohttp; later requests go to aiohttp at once."""
    answer = b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n" + _RANGE + b"\r\n32\r\n" + _BODY + b"\r\n0\r\n\r\n"
    seen, bodies = reading(always(answer), times=3)
    assert bodies == [_BODY] * 3
    assert len(seen.requests) == 4


def test_a_refusal_keeps_the_connection() -> None:
    """The short page of a 503 is discarded, and the next attempt uses the same connection."""
    busy = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 5\r\n\r\n<xml>"
    seen, bodies = reading(in_turn(busy, _GOOD))
    assert (bodies, seen.connections, len(seen.requests)) == ([_BODY], 1, 2)


def test_a_refusal_in_chunks_is_understood() -> None:
    """As S3 sends errors: the page and the connection are dropped, and later requests still use the pool."""
    page = b"Transfer-Encoding: chunked\r\n\r\n5\r\n<xml>\r\n0\r\n\r\n"
    seen, bodies = reading(in_turn(b"HTTP/1.1 503 Slow Down\r\n" + page, _GOOD), times=2)
    assert (bodies, seen.connections, len(seen.requests)) == ([_BODY] * 2, 2, 3)
    with pytest.raises(FetchNotFoundError):
        reading(always(b"HTTP/1.1 404 Not Found\r\n" + page))


def test_a_connection_that_was_closed_meanwhile_is_no_failure() -> None:
    """The server closes idle connections: the next read opens a new one, without counting a retry."""

    async def answering(_: int, writer: asyncio.StreamWriter) -> None:
        writer.write(_GOOD)
        writer.close()

    meter = Meter()
    seen, bodies = reading(answering, times=3, meter=meter)
    assert (bodies, seen.connections) == ([_BODY] * 3, 3)
    assert meter.snapshot().retries == 0


def test_a_request_that_meets_the_end_of_its_connection_is_sent_again() -> None:
    """The server closes the connection while the second request is sent."""

    async def answering(before: int, writer: asyncio.StreamWriter) -> None:
        if before == 1:
            writer.close()
        else:
            writer.write(_GOOD)

    meter = Meter()
    seen, bodies = reading(answering, times=2, meter=meter)
    assert (bodies, seen.connections, len(seen.requests)) == ([_BODY] * 2, 2, 3)
    assert meter.snapshot().retries == 0


def test_a_server_that_never_answers_is_not_asked_for_ever() -> None:
    """A new connection that closes without a response is a failed attempt."""

    async def answering(_: int, writer: asyncio.StreamWriter) -> None:
        writer.close()

    with pytest.raises(ServerError, match=r"closed the connection.*2 attempts"):
        reading(answering)


def test_bytes_that_nobody_asked_for_end_a_connection() -> None:
    """They must not be taken for the next response."""
    seen, bodies = reading(in_turn(_GOOD + b"HTTP/1.1 206 X\r\n", _GOOD))
    assert (bodies, seen.connections) == ([_BODY], 2)


def test_a_cancelled_read_takes_its_connection_with_it() -> None:
    """Its connection is closed, so that its response reaches no other request; the reader still works."""

    async def run() -> None:
        asked = asyncio.Event()

        async def answering(before: int, writer: asyncio.StreamWriter) -> None:
            asked.set()
            if before:
                writer.write(_GOOD)

        async with serving(answering) as seen:
            reader = HttpReader(_LIMITS)
            first = asyncio.create_task(reader.read(seen.url, _SPAN))
            await asked.wait()
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert (await reader.read(seen.url, _SPAN)).data == _BODY
            assert seen.connections == 2
            await reader.aclose()

    asyncio.run(run())


def test_no_more_connections_than_allowed() -> None:
    """Concurrent reads share them; an idle one is closed to open one to another host."""

    async def run() -> None:
        limits = FetchLimits(timeouts=PATIENT, connections=2)
        async with serving(always(_GOOD)) as one, serving(always(_GOOD)) as other:
            reader = HttpReader(limits)
            answers = await asyncio.gather(*(reader.read(one.url, _SPAN) for _ in range(20)))
            assert [answer.data for answer in answers] == [_BODY] * 20
            assert one.most_open <= 2
            assert (await reader.read(other.url, _SPAN)).data == _BODY
            assert (await reader.read(other.url, _SPAN)).data == _BODY
            assert other.connections == 1
            await reader.aclose()

    asyncio.run(run())


def test_idle_connections_end() -> None:
    """After `keepalive` seconds, without another read."""

    async def run() -> None:
        async with serving(always(_GOOD)) as seen:
            reader = HttpReader(FetchLimits(timeouts=PATIENT, keepalive=0.05))
            await reader.read(seen.url, _SPAN)
            await asyncio.wait_for(seen.ended.wait(), 60)
            await reader.aclose()

    asyncio.run(run())


def test_a_name_is_resolved() -> None:
    """By the address that accepts connections: the server listens on IPv4 only."""
    seen, bodies = reading(always(_GOOD), times=3, address=lambda url: url.replace("127.0.0.1", "localhost"))
    assert (bodies, seen.connections) == ([_BODY] * 3, 1)
    assert b"\r\nHost: localhost:" in seen.requests[0]


def test_a_name_that_does_not_exist_is_a_server_error() -> None:
    """Retried, because name servers fail too."""

    async def run() -> None:
        reader = HttpReader(_LIMITS)
        with pytest.raises(ServerError, match=r"nowhere\.invalid.*2 attempts"):
            await reader.read("http://nowhere.invalid/a.tif", _SPAN)
        await reader.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("trusted", [True, False])
def test_tls_is_spoken_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    """A large body over a reused connection; an untrusted certificate is refused."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (authority if trusted else trustme.CA()).issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    body = bytes(range(256)) * 4000
    span = ByteRange(0, len(body))
    head = (
        f"HTTP/1.1 206 X\r\nContent-Length: {len(body)}\r\nContent-Range: bytes 0-{len(body) - 1}/{len(body)}\r\n\r\n"
    )

    async def run() -> None:
        async with serving(always(head.encode() + body), ssl=context) as seen:
            reader = HttpReader(_LIMITS)
            try:
                for _ in range(2):
                    assert (await reader.read(seen.url, span)).data == body
                assert seen.connections == 1
            finally:
                await reader.aclose()

    if trusted:
        asyncio.run(run())
    else:
        with pytest.raises(FetchError, match="certificate"):
            asyncio.run(run())


def test_a_line_end_in_an_address_starts_no_header() -> None:
    """Fragments are removed, other characters are quoted."""
    seen, _ = reading(always(_GOOD), address=lambda url: f"{url}?a=1\r\nX-Evil: 1")
    assert b"X-Evil: 1" not in seen.requests[0].split(b"\r\n", 1)[1]
