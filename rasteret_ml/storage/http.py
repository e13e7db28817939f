"""HTTP range requests, each answer checked, transient failures tried again."""

from __future__ import annotations

import asyncio
import contextlib
import netrc
import os
import random
import re
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from rasteret_ml.errors import (
    AccessDeniedError,
    FetchError,
    FetchNotFoundError,
    FetchTimeoutError,
    NotATiffError,
    RangeNotSupportedError,
    ServerError,
    UsageError,
    redact,
)
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.http1.connection import Response, ResponseHead, ResponseTimeoutError, UnsupportedResponseError
from rasteret_ml.storage.http1.pool import ConnectionPool
from rasteret_ml.storage.limits import FetchLimits
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.storage.urls import public_url
from rasteret_ml.telemetry import Meter

__all__ = ["Environment", "HttpReader"]


class Environment:
    """The proxies and logins as they stand when it is made; answers are kept by scheme and host."""

    def __init__(self) -> None:
        self._proxies = getproxies()
        self._netrc = _netrc()
        self._answers: dict[tuple[str, str], bool] = {}

    def concerns(self, scheme: str, host: str) -> bool:
        """Whether requests to this host may need a proxy or a login from the environment."""
        key = (scheme, host)
        if key not in self._answers:
            proxied = scheme in self._proxies and not proxy_bypass(host)
            self._answers[key] = proxied or (self._netrc is not None and self._netrc.authenticators(host) is not None)
        return self._answers[key]

    def note(self, scheme: str, host: str) -> None:
        """From now on it concerns this host: it sends requests on to others, about which nothing is known here."""
        self._answers[scheme, host] = True


def _netrc() -> netrc.netrc | None:
    """The logins that aiohttp would find; None where there are none."""
    named = os.environ.get("NETRC")
    try:
        return netrc.netrc(named or Path.home() / ("_netrc" if os.name == "nt" else ".netrc"))
    except (OSError, RuntimeError, ValueError, netrc.NetrcParseError):
        return None  # as for aiohttp, which says so in its log


_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "rasteret-ml"}
"""Of each request; a range of a compressed stream would not be a range of the file."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class _Transient(Exception):  # noqa: N818 - a signal between two functions, never seen outside
    """An attempt that may be repeated; carries the error to raise when patience ends."""

    def __init__(self, error: FetchError, pause: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause = pause


class HttpReader:
    """Range reads over connections that are made on first use and closed by `aclose`."""

    def __init__(self, limits: FetchLimits, meter: Meter | None = None) -> None:
        self._limits = limits
        self._meter = meter or Meter()
        self._lines: _Transports | None = None

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`.

        Raises:
            FetchNotFoundError, AccessDeniedError, RangeNotSupportedError: at once.
            ServerError, FetchTimeoutError: after all attempts.
        """
        url, policy = public_url(href), self._limits.retry
        pause, began = policy.base, time.perf_counter()
        for attempt in range(1, policy.attempts + 1):
            try:
                response = await self._attempt(url, span)
            except _Transient as failure:
                if attempt == policy.attempts or (failure.pause or 0) > policy.cap:
                    raise _after(failure.error, attempt) from None
                pause = min(policy.cap, random.uniform(policy.base, max(policy.base, 3 * pause)))
                await asyncio.sleep(failure.pause if failure.pause is not None else pause)
                self._meter.add(retries=1)
            else:
                self._meter.add(requests=1, bytes_fetched=len(response.data), fetch_seconds=time.perf_counter() - began)
                return response
        raise AssertionError("unreachable")

    async def _attempt(self, url: str, span: ByteRange) -> RangeResponse:
        # The plain way first: an exception costs what it must, a request that goes well pays for no wrapper.
        try:
            return await self._request(_encoded(url), url, span)
        except (_Transient, FetchError, NotATiffError, UsageError):
            raise
        except (TimeoutError, aiohttp.ServerTimeoutError) as error:
            late = FetchTimeoutError(f"{_place(url, span)}: {self._what_is_late(error)}.")
            raise _Transient(late) from None
        # Aiohttp's failures as ours, without their chain: it spells the address, signature and all.
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, ValueError) as error:
            raise FetchError(f"{_place(url, span)}: {type(error).__name__}: {redact(str(error))}") from None
        except (aiohttp.ClientError, OSError) as error:
            what = f"{_place(url, span)}: {type(error).__name__}: {redact(str(error))}"
            raise _Transient(ServerError(what)) from None

    def _what_is_late(self, error: Exception) -> str:
        timeouts = self._limits.timeouts
        limit = error.limit if isinstance(error, ResponseTimeoutError) else "total"
        if limit == "connect" or isinstance(error, aiohttp.ConnectionTimeoutError):
            return f"no connection in time ({timeouts.connect:g} s)"
        if limit == "read" or isinstance(error, aiohttp.SocketTimeoutError):
            return f"no answer in time (no byte for {timeouts.read:g} s)"
        return f"no answer in time (at most {timeouts.total:g} s)"

    async def _request(self, address: URL, url: str, span: ByteRange) -> RangeResponse:
        """One request; by aiohttp where the environment has a say, or the server answers in a way of its own."""
        lines = self._get_transports()
        headers = {**_HEADERS, "Range": f"bytes={span.start}-{span.stop - 1}"}
        scheme, host = address.scheme, address.host or ""
        if address.user is None and not lines.environment.concerns(scheme, host):
            with contextlib.suppress(UnsupportedResponseError):
                answer = await lines.pool.get(address, headers, partial(_wanted, span))
                if answer.head.status not in _REDIRECTS:
                    return self._answer(answer, url, span)
            lines.environment.note(scheme, host)  # where it leads, the environment may have its say
        async with lines.session.get(address, headers=headers) as response:
            return self._answer(await _by_aiohttp(response, span), url, span)

    def _answer(self, answer: Response, url: str, span: ByteRange) -> RangeResponse:
        head, data = answer.head, answer.body
        if head.status != 206:
            return self._unusual(answer, _place(url, span), span)
        said = head.headers.get("content-range", "")
        found = _CONTENT_RANGE.match(said)
        if not found or int(found[1]) != span.start:
            raise RangeNotSupportedError(f"{_place(url, span)}: the server answered with Content-Range {said!r}.")
        size = None if found[3] == "*" else int(found[3])
        length = head.length if data is None else len(data)
        expected = min(span.length, size - span.start) if size is not None else length
        if data is None or length != expected or len(data) > span.length:
            raise _Transient(ServerError(f"{_place(url, span)}: got {length} bytes, {expected} expected."))
        self._meter.add(body_seconds=answer.seconds)
        return RangeResponse(data=data, size=size, etag=head.headers.get("etag"))

    def _unusual(self, answer: Response, where: str, span: ByteRange) -> RangeResponse:
        head = answer.head
        self._check_status(head, where)
        if head.status == 416:  # an empty file has no byte to give
            return RangeResponse(data=b"", size=0, etag=head.headers.get("etag"))
        return self._whole_object(answer, where)

    def _check_status(self, head: ResponseHead, where: str) -> None:
        status = head.status
        if status == 200:
            return
        what = f"{where}: HTTP {status} {head.reason}".rstrip()
        if status in self._limits.retry.statuses:
            raise _Transient(ServerError(f"{what}."), _retry_after(head))
        if status in (404, 410):
            raise FetchNotFoundError(f"{what}; check the address.")
        if status in (401, 403):
            raise AccessDeniedError(f"{what}; a private or expired address needs sign=, called at each read.")
        if status == 416 and head.headers.get("content-range", "").strip() == "bytes */0":
            return
        if status == 416:
            raise FetchError(f"{what}; the file ends before this range: it is not the file that was indexed.")
        raise FetchError(f"{what}.")

    def _whole_object(self, answer: Response, where: str) -> RangeResponse:
        """A 200 answer: usable only where the object is no larger than what was asked for."""
        head, data = answer.head, answer.body
        if _is_page(head):
            raise NotATiffError(f"{where}: the server answered with an HTML page, not a file; check the address.")
        if data is not None:
            return RangeResponse(data=data, size=len(data), etag=head.headers.get("etag"))
        raise RangeNotSupportedError(
            f"{where}: the server ignores range requests (HTTP 200, {head.length} bytes); "
            "serve the file from a store that supports them, or download it and use its path."
        )

    def _get_transports(self) -> _Transports:
        if self._lines is None:
            limits = self._limits
            connector = aiohttp.TCPConnector(
                limit=limits.connections,
                keepalive_timeout=limits.keepalive,
                ttl_dns_cache=int(limits.dns_ttl),
            )
            session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(
                    total=limits.timeouts.total, sock_connect=limits.timeouts.connect, sock_read=limits.timeouts.read
                ),
                auto_decompress=False,
                trust_env=True,
            )
            self._lines = _Transports(ConnectionPool(limits), session, Environment())
        return self._lines

    async def aclose(self) -> None:
        """Close the connections."""
        lines, self._lines = self._lines, None
        if lines is not None:
            await lines.session.close()
            await lines.pool.aclose()


class _Transports(NamedTuple):
    """The two ways to a host, and what says which."""

    pool: ConnectionPool
    session: aiohttp.ClientSession
    environment: Environment


def _wanted(span: ByteRange, head: ResponseHead) -> bool:
    """Whether a body is what was asked for, and not an error's page or a file of gigabytes."""
    if head.length is None or head.length > span.length:
        return False
    return head.status == 206 or (head.status == 200 and span.start == 0 and not _is_page(head))


def _is_page(head: ResponseHead) -> bool:
    return head.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/html"


async def _by_aiohttp(response: aiohttp.ClientResponse, span: ByteRange) -> Response:
    """What aiohttp received, as an answer."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    head, began = (
        ResponseHead(response.status, response.reason or "", headers, response.content_length),
        time.perf_counter(),
    )
    # A part may come in chunks: its length is seen when it is there.
    taken = await response.read() if head.status == 206 or _wanted(span, head) else None
    return Response(head, taken, time.perf_counter() - began)


def _after(error: FetchError, attempts: int) -> FetchError:
    return type(error)(f"{error} ({attempts} attempt{'s' if attempts > 1 else ''})")


def _place(url: str, span: ByteRange) -> str:
    """An address and a range for a message."""
    return f"{redact(url)}, {span}"


def _retry_after(head: ResponseHead) -> float | None:
    try:
        return max(0.0, float(head.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _encoded(url: str) -> URL:
    # A signed URL must go out exactly as it came; yarl would re-quote it.
    try:
        address = URL(url, encoded=url.isascii() and url.isprintable() and " " not in url)
    except ValueError as error:
        raise UsageError(f"{redact(url)}: not a URL ({error}).") from None
    if not address.host:
        raise UsageError(f"{redact(url)}: not a URL (it names no host).")
    return address
