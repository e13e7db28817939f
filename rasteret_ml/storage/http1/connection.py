"""One HTTP/1.1 connection whose bodies are received straight into the memory that tiles are decoded from.

aiohttp copies each body three times while it holds the interpreter's lock (off the socket, through its parser, joined),
which keeps decode threads waiting. Here the kernel writes into the body's own buffer, without that lock. Only
what object stores answer is supported: a GET, and a response that states its length (RFC 9112). Any other response
raises `UnsupportedResponseError`, and aiohttp reads it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

__all__ = [
    "Connection",
    "RemoteProtocolError",
    "Response",
    "ResponseHead",
    "ResponseTimeoutError",
    "StaleConnectionError",
    "UnsupportedResponseError",
]

_END = b"\r\n\r\n"
_PIECE = 4096
"""Bytes received at once while a head is read: what of a body comes with it is copied, so not many."""
_LONGEST_HEAD = 64 * 1024
_DRAINED = 16 * 1024
"""Longest body that is read and dropped, so that the connection can be used again."""
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5][0-9]{2})(?: (.*))?$")
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+$")
_NO_BODY = frozenset({204, 304})
_CONTENT = frozenset({200, 206})
"""Statuses whose body may be the file's."""


class RemoteProtocolError(ConnectionError):
    """The connection ended too early, or what came over it is not HTTP."""


class StaleConnectionError(ConnectionError):
    """A connection that had been idle was closed before any byte of an answer came: ask on another one."""


class UnsupportedResponseError(Exception):
    """Bytes of a file that do not say how many they are."""


class ResponseTimeoutError(TimeoutError):
    """A limit of `Timeouts` was passed: the one of that name."""

    def __init__(self, limit: str) -> None:
        super().__init__(limit)
        self.limit = limit


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """Status line and headers of an answer."""

    status: int
    """HTTP status."""
    reason: str
    """The server's words for it."""
    headers: Mapping[str, str]
    """By name in lower case; what came more than once is joined by commas (RFC 9110, 5.3)."""
    length: int | None
    """Bytes of the body, None where the head does not say."""
    keeps: bool = False
    """Whether the connection may be used again."""


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """An answer to a GET."""

    head: ResponseHead
    """What it says of itself."""
    body: memoryview | bytes | None
    """Its bytes; None where they were not wanted."""
    seconds: float
    """From the end of the head to the end of the body."""


class Connection(asyncio.BufferedProtocol):
    """One request at a time; the transport calls it as bytes come."""

    def __init__(self) -> None:
        self.used = 0.0
        """When it last had something to do (loop time)."""
        self.began = 0.0
        """When what it is doing began."""
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Response] | None = None
        self._wants: Callable[[ResponseHead], bool] = bool
        self._is_wanted = False
        self._reused = False
        self._buffer = memoryview(bytearray(_PIECE))
        self._filled = 0
        self._head: ResponseHead | None = None
        self._headed = 0.0

    @property
    def is_open(self) -> bool:
        """Whether it may be asked."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, wanted: Callable[[ResponseHead], bool], began: float) -> asyncio.Future[Response]:
        """Send a request.

        Args:
            request: Its bytes.
            wanted: Whether the body that an answer announces is wanted; if not, the answer ends with its head.
            began: Loop time from which `Timeouts.total` counts.

        Returns:
            The answer. Errors: BrokenAnswerError, StaleError, NotPlainError, and whatever `fail` is called with.
        """
        loop = asyncio.get_running_loop()
        if self._transport is None:
            raise StaleConnectionError("closed")
        self._waiter, self._wants = loop.create_future(), wanted
        self.began, self.used = began, loop.time()
        self._transport.write(request)
        return self._waiter

    def fail(self, error: Exception) -> None:
        """End the request with this error, and the connection."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)
        self.close()

    def close(self) -> None:
        """End it at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._transport = None
        if self._waiter is None:
            return
        what = "the server closed the connection" if exc is None else f"the connection was lost ({exc})"
        if self._head is None and not self._filled:
            self.fail((StaleConnectionError if self._reused else RemoteProtocolError)(what))
        elif self._head is None:
            self.fail(RemoteProtocolError(f"{what} within the headers"))
        else:
            self.fail(RemoteProtocolError(f"{what}: got {self._filled} bytes, {self._head.length} expected"))

    def get_buffer(self, sizehint: int) -> memoryview:
        """See asyncio."""
        if self._filled == len(self._buffer):  # a long head
            longer = memoryview(bytearray(self._filled + _PIECE))
            longer[: self._filled] = self._buffer
            self._buffer = longer
        return self._buffer[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """See asyncio."""
        self._filled += nbytes
        if self._waiter is None:  # nobody asked
            self.close()
            return
        self.used = time.monotonic()
        if self._head is None:
            try:
                self._read_head(max(0, self._filled - nbytes - len(_END) + 1))
            except (RemoteProtocolError, UnsupportedResponseError) as error:
                self.fail(error)
        if self._head is not None and self._filled == self._head.length:
            self._end(keeps=self._head.keeps)

    def _read_head(self, searched: int) -> None:
        """Look for the end of the head; what is behind it begins the body."""
        raw = bytes(self._buffer[: self._filled])
        end = raw.find(_END, searched)
        if end < 0:
            if self._filled > _LONGEST_HEAD:
                raise RemoteProtocolError(f"headers of more than {_LONGEST_HEAD} bytes")
            return
        head, rest = _parsed(raw[:end]), raw[end + len(_END) :]
        if head.status < 200:  # an interim answer; the one that counts follows (RFC 9110, 15.2)
            if head.status == 101:
                raise RemoteProtocolError("HTTP 101 to a plain request")
            self._buffer[: len(rest)] = rest
            self._filled = len(rest)
            self._read_head(0)
        else:
            self._begin_body(head, rest)

    def _begin_body(self, head: ResponseHead, rest: bytes) -> None:
        length = head.length
        if length is None and head.status in _CONTENT:
            raise UnsupportedResponseError
        if length is not None and len(rest) > length:
            raise RemoteProtocolError(f"{len(rest)} bytes came for {length}")
        self._headed, self._head = time.perf_counter(), head
        self._is_wanted = self._wants(head)
        if length is None or (length > _DRAINED and not self._is_wanted):
            self._end(keeps=False)  # an error's page, in chunks or long; or a whole file
            return
        self._buffer, self._filled = memoryview(np.empty(length, np.uint8).data), len(rest)
        self._buffer[: len(rest)] = rest

    def _end(self, *, keeps: bool) -> None:
        """Hand over the answer, and be ready for another request where the server is."""
        head, waiter = self._head, self._waiter
        assert head is not None
        assert waiter is not None
        if not waiter.done():  # cancelled
            body = self._buffer if self._is_wanted and head.length is not None else None
            waiter.set_result(Response(head, body, time.perf_counter() - self._headed))
        self._waiter, self._head, self._reused = None, None, True
        self._buffer, self._filled = memoryview(bytearray(_PIECE)), 0
        if not keeps:
            self.close()


def _parsed(raw: bytes) -> ResponseHead:
    """A head without the empty line at its end.

    Raises:
        BrokenAnswerError: it is none.
    """
    first, *lines = raw.decode("latin-1").split("\r\n")
    line = _STATUS_LINE.match(first)
    if line is None:
        raise RemoteProtocolError(f"not an answer of HTTP/1: {first[:40]!r}")
    headers: dict[str, str] = {}
    for one in lines:
        name, mark, value = one.partition(":")
        if not mark or not _NAME.match(name):
            raise RemoteProtocolError("a header that is none")
        name, value = name.lower(), value.strip(" \t")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    status = int(line[2])
    options = {option.strip() for option in headers.get("connection", "").lower().split(",")}
    keeps = "close" not in options and (line[1] == "1" or "keep-alive" in options)
    return ResponseHead(status, line[3] or "", headers, _length(status, headers), keeps)


def _length(status: int, headers: Mapping[str, str]) -> int | None:
    """Bytes of a body (RFC 9112, 6.3); None where it ends by chunks or by the end of the connection."""
    if status < 200 or status in _NO_BODY:
        return 0
    if "transfer-encoding" in headers or "content-length" not in headers:
        return None
    said = {part.strip() for part in headers["content-length"].split(",")}  # the same twice is once
    length = said.pop()
    if said or not (length.isascii() and length.isdigit()) or len(length) > 18:
        raise RemoteProtocolError("a Content-Length that is none")
    return int(length)
