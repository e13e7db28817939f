"""A pool of HTTP/1.1 connections: opened on demand, reused, closed on timeouts and after long idleness.

It keeps no cookies: object stores need none, and aiohttp handles servers that redirect to a login.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import aiohappyeyeballs
from yarl import URL

from rasteret_ml.storage.http1.connection import (
    AcceptsBody,
    Connection,
    Response,
    ResponseTimeoutError,
    StaleConnectionError,
)
from rasteret_ml.storage.reader import FetchLimits

_NEXT_ADDRESS_DELAY = 0.25  # Seconds before the next address of a host is tried in parallel (RFC 8305).
_Origin = tuple[bool, str, int]  # (TLS or not, host, port)


class ConnectionPool:
    """The connections of one event loop."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.connections)
        self._active = 0  # Requests that have a connection or are about to open one.
        self._busy: set[Connection] = set()
        self._idle: defaultdict[_Origin, list[Connection]] = defaultdict(list)
        self._resolver = _Resolver(limits.dns_ttl)
        self._timer: asyncio.TimerHandle | None = None
        timeouts = limits.timeouts
        self._interval = min(1.0, timeouts.read / 4, timeouts.total / 4, limits.keepalive / 4)

    async def get(self, url: URL, headers: Mapping[str, str], accepts_body: AcceptsBody) -> Response:
        """Send a GET request to an absolute URL, quoted as it is to be sent, with these headers and Host.

        ResponseTimeoutError if a limit of `Timeouts` is exceeded, UnsupportedResponseError if the response does not
        state its length, OSError if the connection fails.
        """
        tls = url.scheme == "https"
        origin = tls, url.raw_host or "", url.port or (443 if tls else 80)
        fields = {"Host": _host_header(url), **headers}
        lines = [f"GET {url.raw_path_qs} HTTP/1.1", *map(": ".join, fields.items()), "", ""]
        request = "\r\n".join(lines).encode("ascii")
        async with self._slots:
            self._active += 1
            try:
                return await self._get(origin, request, accepts_body)
            finally:
                self._active -= 1

    async def _get(self, origin: _Origin, request: bytes, accepts_body: AcceptsBody) -> Response:
        started = asyncio.get_running_loop().time()
        while (connection := self._pop_idle(origin)) is not None:
            with contextlib.suppress(StaleConnectionError):
                return await self._send(origin, connection, request, accepts_body, started)
        return await self._send(origin, await self._connect(origin), request, accepts_body, started)

    async def aclose(self) -> None:
        """Close all connections."""
        for connection in [*self._busy, *(connection for idle in self._idle.values() for connection in idle)]:
            connection.close()
        self._idle.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await asyncio.sleep(0)  # sockets are closed in the loop's next iteration

    async def _send(
        self, origin: _Origin, connection: Connection, request: bytes, accepts_body: AcceptsBody, started: float
    ) -> Response:
        self._busy.add(connection)
        try:
            response = await connection.send(request, accepts_body, started)
        except BaseException:  # after a cancellation, the response may still arrive
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        if connection.is_open:
            self._idle[origin].append(connection)
        return response

    def _pop_idle(self, origin: _Origin) -> Connection | None:
        idle = self._idle[origin]
        while idle:
            if (connection := idle.pop()).is_open:
                return connection
        return None

    async def _connect(self, origin: _Origin) -> Connection:
        tls, host, port = origin
        self._close_surplus()
        timeouts = self._limits.timeouts
        try:
            async with asyncio.timeout(min(timeouts.connect, timeouts.total)):
                return await self._open(tls, host, port)
        except OSError as error:
            self._resolver.forget(host, port)
            if isinstance(error, TimeoutError):
                raise ResponseTimeoutError("connect") from error
            raise

    async def _open(self, tls: bool, host: str, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        addresses = await self._resolver.resolve(host, port)
        sock = await aiohappyeyeballs.start_connection(
            addresses, happy_eyeballs_delay=_NEXT_ADDRESS_DELAY, interleave=1
        )
        try:
            context, name = (self._tls, host) if tls else (None, None)
            _, connection = await loop.create_connection(Connection, sock=sock, ssl=context, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        if self._timer is None:
            self._timer = loop.call_later(self._interval, self._check_timeouts)
        return connection

    def _close_surplus(self) -> None:
        """Close the longest idle connections, so that one more can be opened within the limit."""
        idle = [connection for group in self._idle.values() for connection in group if connection.is_open]
        surplus = len(idle) + self._active - self._limits.connections
        for connection in sorted(idle, key=lambda connection: connection.last_used)[: max(0, surplus)]:
            connection.close()  # `_pop_idle` and `_check_timeouts` skip it

    def _check_timeouts(self) -> None:
        """Fail requests that exceed a timeout and close idle connections; one timer for all of them."""
        loop, timeouts = asyncio.get_running_loop(), self._limits.timeouts
        now = loop.time()
        for connection in list(self._busy):
            if now - connection.started > timeouts.total:
                connection.fail(ResponseTimeoutError("total"))
            elif now - connection.last_used > timeouts.read:
                connection.fail(ResponseTimeoutError("read"))
        for origin, idle in list(self._idle.items()):
            for connection in idle:
                if now - connection.last_used > self._limits.keepalive:
                    connection.close()
            self._idle[origin] = [connection for connection in idle if connection.is_open]
            if not self._idle[origin]:
                del self._idle[origin]
        any_open = self._busy or self._idle
        self._timer = loop.call_later(self._interval, self._check_timeouts) if any_open else None

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()


class _Resolver:
    """Resolves host names, each once at a time, and caches the addresses for `ttl` seconds."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._cache: dict[tuple[str, int], tuple[float, asyncio.Task[list[Any]]]] = {}
        self._calls = 0

    async def resolve(self, host: str, port: int) -> list[Any]:
        """Return the addresses of `getaddrinfo`; each call starts with the next one, so that all are used."""
        if (literal := _ip_address(host, port)) is not None:
            return [literal]
        loop, key = asyncio.get_running_loop(), (host, port)
        cached_at, task = self._cache.get(key, (0.0, None))
        if task is None or loop.time() - cached_at > self._ttl:
            look_up = loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
            task = loop.create_task(look_up)
            self._cache[key] = loop.time(), task
        addresses = await asyncio.shield(task)
        self._calls += 1
        first = self._calls % len(addresses)
        return addresses[first:] + addresses[:first]

    def forget(self, host: str, port: int) -> None:
        """Remove a host from the cache."""
        self._cache.pop((host, port), None)


def _ip_address(host: str, port: int) -> Any:
    """What `getaddrinfo` returns for an IP address, without a thread; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if "%" in host:  # a zone, whose number only the system knows
        return None
    if address.version == 4:
        return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)
    return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, 0)


def _host_header(url: URL) -> str:
    """The Host header (RFC 9110, 7.2)."""
    host = url.raw_host or ""
    host = f"[{host}]" if ":" in host else host
    return host if url.is_default_port() else f"{host}:{url.port}"
