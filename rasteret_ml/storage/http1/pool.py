"""Connections to hosts: made when they are needed, used again, given up when they are late or idle for long.

No cookies are kept: stores of files need none, and a server that logs in by redirects is spoken to by aiohttp.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import aiohappyeyeballs
from yarl import URL

from rasteret_ml.storage.http1.connection import (
    Connection,
    Response,
    ResponseHead,
    ResponseTimeoutError,
    StaleConnectionError,
)
from rasteret_ml.storage.limits import FetchLimits

__all__ = ["ConnectionPool"]

_EYEBALLS = 0.25
"""Seconds before the next address of a host is tried beside the last one (RFC 8305)."""
_Origin = tuple[bool, str, int]
"""Whether by TLS, host, port."""


class ConnectionPool:
    """What one loop has open; `get` asks, `aclose` ends it."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._room = asyncio.Semaphore(limits.connections)
        self._asking = 0
        """Requests that have a connection or are about to."""
        self._busy: set[Connection] = set()
        self._idle: defaultdict[_Origin, list[Connection]] = defaultdict(list)
        self._addresses = _Addresses(limits.dns_ttl)
        self._tls: ssl.SSLContext | None = None
        self._watch: asyncio.TimerHandle | None = None
        timeouts = limits.timeouts
        self._tick = min(1.0, timeouts.read / 4, timeouts.total / 4, limits.keepalive / 4)

    async def get(self, url: URL, headers: Mapping[str, str], wanted: Callable[[ResponseHead], bool]) -> Response:
        """The answer to a GET.

        Args:
            url: Absolute, as it shall go out.
            headers: All but Host.
            wanted: See `Connection.send`.

        Raises:
            LateAnswerError: a limit of `Timeouts` was passed.
            NotPlainError: the answer does not say how long it is.
            OSError: no connection, or it broke.
        """
        origin = _origin(url)
        lines = [f"GET {url.raw_path_qs} HTTP/1.1", f"Host: {_host(url)}", *map(": ".join, headers.items()), "", ""]
        request = "\r\n".join(lines).encode("ascii")
        async with self._room:
            self._asking += 1
            try:
                return await self._get(origin, request, wanted)
            finally:
                self._asking -= 1

    async def _get(self, origin: _Origin, request: bytes, wanted: Callable[[ResponseHead], bool]) -> Response:
        began = asyncio.get_running_loop().time()
        while (connection := self._idle_one(origin)) is not None:
            try:
                return await self._ask(origin, connection, request, wanted, began)
            except StaleConnectionError:
                continue
        return await self._ask(origin, await self._connect(origin), request, wanted, began)

    async def aclose(self) -> None:
        """Close all connections."""
        for connection in [*self._busy, *(one for idle in self._idle.values() for one in idle)]:
            connection.close()
        self._idle.clear()
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        await asyncio.sleep(0)  # sockets close in the loop's next step

    async def _ask(
        self,
        origin: _Origin,
        connection: Connection,
        request: bytes,
        wanted: Callable[[ResponseHead], bool],
        began: float,
    ) -> Response:
        self._busy.add(connection)
        try:
            answer = await connection.send(request, wanted, began)
        except BaseException:  # cancelled, say: an answer may still be on its way
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        if connection.is_open:
            self._idle[origin].append(connection)
        return answer

    def _idle_one(self, origin: _Origin) -> Connection | None:
        idle = self._idle[origin]
        while idle:
            if (connection := idle.pop()).is_open:
                return connection
        return None

    async def _connect(self, origin: _Origin) -> Connection:
        by_tls, host, port = origin
        self._make_room()
        timeouts = self._limits.timeouts
        try:
            async with asyncio.timeout(min(timeouts.connect, timeouts.total)):
                return await self._connected(by_tls, host, port)
        except TimeoutError as error:
            self._addresses.forget(host, port)
            raise ResponseTimeoutError("connect") from error
        except OSError:
            self._addresses.forget(host, port)
            raise

    async def _connected(self, by_tls: bool, host: str, port: int) -> Connection:
        loop = asyncio.get_running_loop()
        found = await self._addresses.of(host, port)
        sock = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=_EYEBALLS, interleave=1)
        try:
            tls, name = (self._tls_context(), host) if by_tls else (None, None)
            _, connection = await loop.create_connection(Connection, sock=sock, ssl=tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        if self._watch is None:
            self._watch = loop.call_later(self._tick, self._look)
        return connection

    def _make_room(self) -> None:
        """Close what is idle for longest where there would be more than may be, the one about to be made included."""
        idle = [one for many in self._idle.values() for one in many if one.is_open]
        over = len(idle) + self._asking - self._limits.connections
        for connection in sorted(idle, key=lambda one: one.used)[: max(0, over)]:
            connection.close()  # `_idle_one` and `_look` pass over it

    def _look(self) -> None:
        """One timer for all: give up what is late, close what is idle for long, come back while there is any."""
        loop, timeouts = asyncio.get_running_loop(), self._limits.timeouts
        now = loop.time()
        for connection in list(self._busy):
            if now - connection.began > timeouts.total:
                connection.fail(ResponseTimeoutError("total"))
            elif now - connection.used > timeouts.read:
                connection.fail(ResponseTimeoutError("read"))
        for origin, idle in list(self._idle.items()):
            for connection in idle:
                if now - connection.used > self._limits.keepalive:
                    connection.close()
            self._idle[origin] = [one for one in idle if one.is_open]
            if not self._idle[origin]:
                del self._idle[origin]
        open_ones = self._busy or self._idle
        self._watch = loop.call_later(self._tick, self._look) if open_ones else None

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


class _Addresses:
    """Resolved names, each asked for once at a time and trusted for `ttl` seconds."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._known: dict[tuple[str, int], tuple[float, asyncio.Task[list[Any]]]] = {}
        self._turn = 0

    async def of(self, host: str, port: int) -> list[Any]:
        """What `getaddrinfo` says; each call begins with the next of the addresses, so that all are used."""
        if (literal := _literal(host, port)) is not None:
            return [literal]
        loop, key = asyncio.get_running_loop(), (host, port)
        asked, task = self._known.get(key, (0.0, None))
        if task is None or loop.time() - asked > self._ttl:
            task = loop.create_task(self._resolve(host, port))
            self._known[key] = loop.time(), task
        found = await asyncio.shield(task)
        self._turn += 1
        start = self._turn % len(found)
        return found[start:] + found[:start]

    def forget(self, host: str, port: int) -> None:
        """Ask anew next time."""
        self._known.pop((host, port), None)

    @staticmethod
    async def _resolve(host: str, port: int) -> list[Any]:
        loop = asyncio.get_running_loop()
        return list(await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG))


def _literal(host: str, port: int) -> Any:
    """What `getaddrinfo` would say of an address, without a thread; None for a name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if "%" in host:  # a zone, which has a number that the system knows
        return None
    if address.version == 4:
        return socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port)
    return socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port, 0, 0)


def _origin(url: URL) -> _Origin:
    by_tls = url.scheme == "https"
    return by_tls, url.raw_host or "", url.port or (443 if by_tls else 80)


def _host(url: URL) -> str:
    """The Host header (RFC 9110, 7.2)."""
    host = url.raw_host or ""
    host = f"[{host}]" if ":" in host else host
    return host if url.is_default_port() else f"{host}:{url.port}"
