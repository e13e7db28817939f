"""The `RangeReader` protocol, through which the other packages read bytes; its limits; an adapter for other stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rasteret_ml.errors import FetchError, UsageError, redact
from rasteret_ml.ranges import ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for a server, in seconds."""

    connect: float = 5.0  #: For a connection, TLS included.
    read: float = 15.0  #: For the first bytes of a response, and between any two pieces of it.
    total: float = 60.0  #: For one attempt as a whole.

    def __post_init__(self) -> None:
        if min(self.connect, self.read, self.total) <= 0:
            raise UsageError(f"Timeouts must be positive seconds, got {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Which failures are retried, and how often.

    Pauses follow decorrelated jitter (AWS Architecture Blog, "Exponential Backoff And Jitter", 2015), unless the
    server sends Retry-After.
    """

    attempts: int = 6  #: Attempts in total, including the first.
    base: float = 0.1  #: Shortest pause in seconds.
    cap: float = 8.0  #: Longest pause in seconds; a longer Retry-After ends the retries.
    statuses: frozenset[int] = frozenset({408, 425, 429, 500, 502, 503, 504})  #: HTTP statuses that are retried.

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.base < 0 or self.cap < self.base:
            raise UsageError(f"A retry policy must have attempts >= 1 and 0 <= base <= cap, got {self}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """Settings of a reader, shared by all requests of a process.

    >>> FetchLimits(retry=RetryPolicy(attempts=2), timeouts=Timeouts(total=20.0)).connections
    64
    """

    timeouts: Timeouts = Timeouts()  #: How long to wait for a server.
    retry: RetryPolicy = RetryPolicy()  #: Which failures are retried.
    #: Open connections of a process, to all hosts together; those through a proxy or with a netrc login count apart.
    connections: int = 64
    #: Seconds that an idle connection is kept open, since a worker may idle while the model trains.
    keepalive: float = 60.0
    dns_ttl: float = 120.0  #: Seconds that a resolved address is cached.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeResponse:
    """The bytes of one range."""

    data: bytes | memoryview  #: As many bytes as requested; fewer only if the file ends inside the range.
    size: int | None  #: Length of the whole file in bytes; None = unknown.
    etag: str | None = None  #: The file's ETag; None = unknown.


class RangeReader(Protocol):
    """Reads byte ranges of files by address."""

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """Read `span` of the file at `href`.

        A range that starts past the end of the file is an error; one that extends past it is returned short. Failures
        raise a subclass of FetchError, whose message shows the address without its secrets.
        """

    async def aclose(self) -> None:
        """Release connections; the reader cannot be used afterwards."""


class BackendReader:
    """A `RangeReader` over a store of the caller.

    It has async `get_range(url, start, length)` (as rasteret's backends) or `get_ranges(url, [(start, length)])`, or is
    an obstore store, whose `get_range_async(path, start=, length=)` receives the path of the URL.
    """

    def __init__(self, backend: Any) -> None:
        if not any(hasattr(backend, name) for name in ("get_range", "get_range_async", "get_ranges")):
            raise UsageError(f"backend must have async get_range(url, start, length), got {type(backend).__name__}.")
        self._backend = backend

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        try:
            data = await self._get(href, span)
        except Exception as error:
            # Without the original exception, whose text may contain the signed address.
            reason = f"{type(error).__name__}: {redact(str(error))}"
            raise FetchError(f"{redact(href)}: the backend failed to read {span}: {reason}") from None
        if not len(data) and span.start:
            raise FetchError(f"{redact(href)}: the backend has no bytes at {span}.")
        if len(data) > span.length:
            raise FetchError(f"{redact(href)}: the backend gave {len(data)} bytes for {span}.")
        return RangeResponse(data=data, size=None)

    async def _get(self, href: str, span: ByteRange) -> memoryview:
        if hasattr(self._backend, "get_range_async"):
            path = href.split("://", 1)[1].split("/", 1)[-1].split("?", 1)[0] if "://" in href else href
            return memoryview(await self._backend.get_range_async(path, start=span.start, length=span.length))
        if hasattr(self._backend, "get_range"):
            return memoryview(await self._backend.get_range(href, span.start, span.length))
        return memoryview((await self._backend.get_ranges(href, [(span.start, span.length)]))[0])

    async def aclose(self) -> None:
        """Do nothing: the caller owns the backend."""


def as_reader(backend: Any) -> RangeReader:
    """Return `backend` itself if it is a `RangeReader`, else a `BackendReader` over it."""
    return backend if hasattr(backend, "read") and hasattr(backend, "aclose") else BackendReader(backend)
