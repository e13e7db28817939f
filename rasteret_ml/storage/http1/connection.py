"""An HTTP/1.1 connection that receives bodies directly into the memory that tiles are decoded from (RFC 9112).

Why not aiohttp: it copies each body three times while holding the interpreter's lock (from the socket, through its
parser, into one piece), and decode threads wait for that. Here the kernel writes into the body's own buffer without
the lock. Only what object stores send is supported: a response to GET that states its length. Any other response
with content raises `UnsupportedResponseError`, and the caller uses aiohttp.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

_HEAD_END = b"\r\n\r\n"
# Bytes received at once while reading a head; small, because the part of a body that arrives with it is copied.
_CHUNK = 4096
_MAX_HEAD = 64 * 1024
_MAX_DISCARDED = 16 * 1024  # Longest body that is received and discarded to keep the connection usable.
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: (.*))?$")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+$")
_NO_BODY = frozenset({204, 304})
_FILE_STATUSES = frozenset({200, 206})  # Statuses whose body may be the file.


class RemoteProtocolError(ConnectionError):
    """The connection was closed within a response, or the response is not valid HTTP."""


class StaleConnectionError(ConnectionError):
    """A reused connection was closed before any byte of the response arrived: send the request on another one."""


class UnsupportedResponseError(Exception):
    """A response with content that does not state its length."""


class ResponseTimeoutError(TimeoutError):
    """A response took longer than `limit`, the name of a field of `Timeouts`."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers of a response."""

    status: int  #: HTTP status.
    reason: str  #: Reason phrase.
    headers: Mapping[str, str]  #: By name in lower case; repeated headers are joined by commas (RFC 9110, 5.3).
    length: int | None  #: Bytes of the body; None = not stated.
    keep_alive: bool = False  #: Whether the connection can be used again.


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """A response to a GET request."""

    head: ResponseHead  #: Status line and headers.
    body: memoryview | bytes | None  #: Its bytes; None = not accepted by the caller.
    seconds: float  #: Time from the end of the head to the end of the body.


#: Whether to return the body that a head announces; if not, the response has none.
AcceptsBody = Callable[[ResponseHead], bool]


class Connection(asyncio.BufferedProtocol):
    """A connection with one request at a time; asyncio calls it when bytes arrive."""

    def __init__(self) -> None:
        self.last_used = 0.0  #: Loop time of the last activity.
        self.started = 0.0  #: Loop time when the current request started.
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._accepts_body: AcceptsBody = bool
        self._body_accepted = False
        self._reused = False
        self._buffer = memoryview(bytearray(_CHUNK))
        self._filled = 0
        self._head: ResponseHead | None = None
        self._head_time = 0.0

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, accepts_body: AcceptsBody, started: float) -> asyncio.Future[Response]:
        """Send a request; `started` is the loop time from which `Timeouts.total` counts.

        The future fails with RemoteProtocolError, StaleConnectionError, UnsupportedResponseError or the error passed to
        `fail`.
        """
        loop = asyncio.get_running_loop()
        if self._transport is None:
            raise StaleConnectionError("closed")
        self._waiter, self._accepts_body = loop.create_future(), accepts_body
        self.started, self.last_used = started, loop.time()
        self._transport.write(request)
        return self._waiter

    def fail(self, error: Exception) -> None:
        """Fail the request with this error and close the connection."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        self.close()

    def close(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BufferedProtocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._transport = None
        if self._waiter is None:
            return
        reason = "the server closed the connection" if exc is None else f"the connection was lost ({exc})"
        if self._head is None and not self._filled:
            self.fail((StaleConnectionError if self._reused else RemoteProtocolError)(reason))
        elif self._head is None:
            self.fail(RemoteProtocolError(f"{reason} within the headers"))
        else:
            self.fail(RemoteProtocolError(f"{reason}: got {self._filled} bytes, {self._head.length} expected"))

    def get_buffer(self, sizehint: int) -> memoryview:
        """See `asyncio.BufferedProtocol`."""
        if self._filled == len(self._buffer):  # a long head
            longer = memoryview(bytearray(self._filled + _CHUNK))
            longer[: self._filled] = self._buffer
            self._buffer = longer
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See `asyncio.BufferedProtocol`."""
        self._filled += nbytes
        if self._waiter is None:  # bytes without a request
            self.close()
            return
        self.last_used = time.monotonic()
        if self._head is None:
            try:
                self._read_head(max(0, self._filled - nbytes - len(_HEAD_END) + 1))
            except (RemoteProtocolError, UnsupportedResponseError) as error:
                self.fail(error)
        if self._head is not None and self._filled == self._head.length:
            self._finish(keep_alive=self._head.keep_alive)

    def _read_head(self, searched: int) -> None:
        """Look for the end of the head from byte `searched` on, and begin the body with the bytes after it."""
        raw = bytes(self._buffer[: self._filled])
        end = raw.find(_HEAD_END, searched)
        if end < 0:
            if self._filled > _MAX_HEAD:
                raise RemoteProtocolError(f"headers of more than {_MAX_HEAD} bytes")
            return
        head, rest = _parse_head(raw[:end]), raw[end + len(_HEAD_END) :]
        if head.status < 200:  # an interim response; the final one follows (RFC 9110, 15.2)
            if head.status == 101:
                raise RemoteProtocolError("HTTP 101 without a request to switch protocols")
            self._buffer[: len(rest)] = rest
            self._filled = len(rest)
            self._read_head(0)
        else:
            self._begin_body(head, rest)

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        length = head.length
        if length is None and head.status in _FILE_STATUSES:
            raise UnsupportedResponseError
        if length is not None and len(rest) > length:
            raise RemoteProtocolError(f"{len(rest)} bytes of a body of {length}")
        self._head_time, self._head = time.perf_counter(), head
        self._body_accepted = self._accepts_body(head)
        if length is None or (length > _MAX_DISCARDED and not self._body_accepted):
            self._finish(keep_alive=False)  # a long or chunked error page, or a whole file
            return
        self._buffer, self._filled = memoryview(np.empty(length, np.uint8).data), len(rest)
        self._buffer[: len(rest)] = rest

    def _finish(self, *, keep_alive: bool) -> None:
        """Return the response, and prepare for another request or close the connection."""
        head, waiter = self._head, self._waiter
        assert head is not None
        assert waiter is not None
        if not waiter.done():  # it is done if the caller was cancelled
            body = self._buffer if self._body_accepted and head.length is not None else None
            waiter.set_result(Response(head, body, time.perf_counter() - self._head_time))
        self._waiter, self._head, self._reused = None, None, True
        self._buffer, self._filled = memoryview(bytearray(_CHUNK)), 0
        if not keep_alive:
            self.close()


def _parse_head(raw: bytes) -> ResponseHead:
    """Parse a head, given without the empty line at its end; RemoteProtocolError if it is not valid HTTP/1."""
    status_line, *lines = raw.decode("latin-1").split("\r\n")
    match = _STATUS_LINE.match(status_line)
    if match is None:
        raise RemoteProtocolError(f"not an HTTP/1 response: {status_line[:40]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, separator, value = line.partition(":")
        if not separator or not _HEADER_NAME.match(name):
            raise RemoteProtocolError("invalid header line")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    status = int(match[2])
    options = {option.strip() for option in headers.get("connection", "").lower().split(",")}
    keep_alive = "close" not in options and (match[1] == "1" or "keep-alive" in options)
    return ResponseHead(status, match[3] or "", headers, _body_length(status, headers), keep_alive)


def _body_length(status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of a body (RFC 9112, 6.3); None if it is chunked or ends with the connection."""
    if status < 200 or status in _NO_BODY:
        return 0
    if "transfer-encoding" in headers or "content-length" not in headers:
        return None
    values = {value.strip() for value in headers["content-length"].split(",")}  # equal values may be repeated
    length = values.pop()
    if values or not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise RemoteProtocolError("invalid Content-Length")
    return int(length)
