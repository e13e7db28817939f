"""HTTP range requests: every response is checked, transient failures are retried.

Most requests go through the connections of `http1`. aiohttp handles the rest: hosts that need a proxy or a netrc login,
redirects, and responses that do not state their length.
"""

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
from rasteret_ml.storage.reader import FetchLimits, RangeResponse, Timeouts
from rasteret_ml.storage.urls import public_url
from rasteret_ml.telemetry import Meter

# Identity, because a range of a compressed response is not a range of the file.
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "rasteret-ml"}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


class _TransientError(Exception):
    """A failed attempt that may be retried, with the error to raise after the last one."""

    def __init__(self, error: FetchError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after


class HttpReader:
    """Reads byte ranges over connections that are opened on first use and closed by `aclose`."""

    def __init__(self, limits: FetchLimits, meter: Meter | None = None) -> None:
        self._limits = limits
        self._meter = meter or Meter()
        self._transports: tuple[ConnectionPool, aiohttp.ClientSession, _NeedsAiohttp] | None = None

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`; only ServerError and FetchTimeoutError are retried."""
        url, policy = public_url(href), self._limits.retry
        pause, start = policy.base, time.perf_counter()
        for attempt in range(1, policy.attempts + 1):
            try:
                response = await self._attempt(url, span)
            except _TransientError as failure:
                if attempt == policy.attempts or (failure.retry_after or 0) > policy.cap:
                    attempts = f"{attempt} attempt{'s' if attempt > 1 else ''}"
                    raise type(failure.error)(f"{failure.error} ({attempts})") from None
                pause = min(policy.cap, random.uniform(policy.base, max(policy.base, 3 * pause)))
                await asyncio.sleep(pause if failure.retry_after is None else failure.retry_after)
                self._meter.add(retries=1)
            else:
                self._meter.add(requests=1, bytes_fetched=len(response.data), fetch_seconds=time.perf_counter() - start)
                return response
        raise AssertionError("unreachable")

    async def _attempt(self, url: str, span: ByteRange) -> RangeResponse:
        # aiohttp's errors become ours without the original exception, whose text may contain the signed address.
        try:
            return await self._request(_parse_url(url), url, span)
        except (_TransientError, FetchError, NotATiffError, UsageError):
            raise
        except (TimeoutError, aiohttp.ServerTimeoutError) as error:
            message = f"{_describe(url, span)}: {_describe_timeout(error, self._limits.timeouts)}."
            raise _TransientError(FetchTimeoutError(message)) from None
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, ValueError) as error:
            raise FetchError(f"{_describe(url, span)}: {type(error).__name__}: {redact(str(error))}") from None
        except (aiohttp.ClientError, OSError) as error:
            message = f"{_describe(url, span)}: {type(error).__name__}: {redact(str(error))}"
            raise _TransientError(ServerError(message)) from None

    async def _request(self, address: URL, url: str, span: ByteRange) -> RangeResponse:
        pool, session, needs_aiohttp = self._get_transports()
        headers = {**_HEADERS, "Range": f"bytes={span.start}-{span.stop - 1}"}
        origin = address.scheme, address.host or ""
        if address.user is None and not needs_aiohttp[origin]:
            with contextlib.suppress(UnsupportedResponseError):
                response = await pool.get(address, headers, partial(_accepts_body, span))
                if response.head.status not in _REDIRECTS:
                    return self._check_response(response, url, span)
            needs_aiohttp[origin] = True  # a redirect may lead to a host that needs a proxy or a login
        async with session.get(address, headers=headers) as aiohttp_response:
            return self._check_response(await _read_aiohttp(aiohttp_response, span), url, span)

    def _check_response(self, response: Response, url: str, span: ByteRange) -> RangeResponse:
        """Return the bytes of a response, or raise if the status or the length is wrong."""
        head, data = response.head, response.body
        if head.status != 206:
            return self._check_status(response, _describe(url, span))
        content_range = head.headers.get("content-range", "")
        match = _CONTENT_RANGE.match(content_range)
        if not match or int(match[1]) != span.start:
            where = _describe(url, span)
            raise RangeNotSupportedError(f"{where}: the server responded with Content-Range {content_range!r}.")
        size = None if match[3] == "*" else int(match[3])
        length = head.length if data is None else len(data)
        expected = min(span.length, size - span.start) if size is not None else length
        if data is None or length != expected or len(data) > span.length:
            raise _TransientError(ServerError(f"{_describe(url, span)}: got {length} bytes, {expected} expected."))
        self._meter.add(body_seconds=response.seconds)
        return RangeResponse(data=data, size=size, etag=head.headers.get("etag"))

    def _check_status(self, response: Response, where: str) -> RangeResponse:
        """Return the bytes of a response other than 206 if it has any, else raise."""
        head, status = response.head, response.head.status
        if status == 200:
            return _check_whole_file(response, where)
        message = f"{where}: HTTP {status} {head.reason}".rstrip()
        if status in self._limits.retry.statuses:
            raise _TransientError(ServerError(f"{message}."), _retry_after(head))
        if status in (404, 410):
            raise FetchNotFoundError(f"{message}; check the address.")
        if status in (401, 403):
            raise AccessDeniedError(f"{message}; a private or expired address needs sign=, called at each read.")
        if status == 416 and head.headers.get("content-range", "").strip() == "bytes */0":
            return RangeResponse(data=b"", size=0, etag=head.headers.get("etag"))  # the file is empty
        if status == 416:
            raise FetchError(f"{message}; the file ends before this range: it is not the file that was indexed.")
        raise FetchError(f"{message}.")

    def _get_transports(self) -> tuple[ConnectionPool, aiohttp.ClientSession, _NeedsAiohttp]:
        if self._transports is None:
            limits, timeouts = self._limits, self._limits.timeouts
            connector = aiohttp.TCPConnector(
                limit=limits.connections, keepalive_timeout=limits.keepalive, ttl_dns_cache=int(limits.dns_ttl)
            )
            timeout = aiohttp.ClientTimeout(
                total=timeouts.total, sock_connect=timeouts.connect, sock_read=timeouts.read
            )
            session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False, trust_env=True)
            self._transports = ConnectionPool(limits), session, _NeedsAiohttp()
        return self._transports

    async def aclose(self) -> None:
        """Close the connections."""
        transports, self._transports = self._transports, None
        if transports is not None:
            pool, session, _ = transports
            await session.close()
            await pool.aclose()


class _NeedsAiohttp(dict[tuple[str, str], bool]):
    """By (scheme, host): whether requests need a proxy or a login, or may be redirected to a host that does.

    Proxies and netrc logins are read once: aiohttp looks them up on other threads twice per request, which costs more
    than the request itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._proxies = getproxies()
        self._netrc: netrc.netrc | None = None  # also where the file is invalid, which aiohttp logs
        name = "_netrc" if os.name == "nt" else ".netrc"
        with contextlib.suppress(OSError, RuntimeError, ValueError, netrc.NetrcParseError):
            self._netrc = netrc.netrc(os.environ.get("NETRC") or Path.home() / name)

    def __missing__(self, origin: tuple[str, str]) -> bool:
        scheme, host = origin
        proxied = scheme in self._proxies and not proxy_bypass(host)
        self[origin] = proxied or (self._netrc is not None and self._netrc.authenticators(host) is not None)
        return self[origin]


def _accepts_body(span: ByteRange, head: ResponseHead) -> bool:
    """Whether to receive the body: not an error page, nor a file of gigabytes."""
    if head.length is None or head.length > span.length:
        return False
    return head.status == 206 or (head.status == 200 and span.start == 0 and not _is_html(head))


def _is_html(head: ResponseHead) -> bool:
    return head.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/html"


async def _read_aiohttp(response: aiohttp.ClientResponse, span: ByteRange) -> Response:
    """Receive a response of aiohttp."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    head = ResponseHead(response.status, response.reason or "", headers, response.content_length)
    start = time.perf_counter()
    # The length of a chunked 206 is known only after it was received.
    body = await response.read() if head.status == 206 or _accepts_body(span, head) else None
    return Response(head, body, time.perf_counter() - start)


def _check_whole_file(response: Response, where: str) -> RangeResponse:
    """Return the body of a 200 response, which is usable only if the file is no larger than the range."""
    head, data = response.head, response.body
    if _is_html(head):
        raise NotATiffError(f"{where}: the server responded with an HTML page, not a file; check the address.")
    if data is not None:
        return RangeResponse(data=data, size=len(data), etag=head.headers.get("etag"))
    raise RangeNotSupportedError(
        f"{where}: the server ignores range requests (HTTP 200, {head.length} bytes); "
        "serve the file from a store that supports them, or download it and use its path."
    )


def _describe(url: str, span: ByteRange) -> str:
    """An address without secrets, and a range, for a message."""
    return f"{redact(url)}, {span}"


def _describe_timeout(error: Exception, timeouts: Timeouts) -> str:
    limit = error.limit if isinstance(error, ResponseTimeoutError) else "total"
    if limit == "connect" or isinstance(error, aiohttp.ConnectionTimeoutError):
        return f"no connection within {timeouts.connect:g} s"
    if limit == "read" or isinstance(error, aiohttp.SocketTimeoutError):
        return f"no data received for {timeouts.read:g} s"
    return f"no complete response within {timeouts.total:g} s"


def _retry_after(head: ResponseHead) -> float | None:
    try:
        return max(0.0, float(head.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _parse_url(url: str) -> URL:
    # A signed URL must be sent exactly as it is; yarl would quote it again.
    try:
        address = URL(url, encoded=url.isascii() and url.isprintable() and " " not in url)
    except ValueError as error:
        raise UsageError(f"{redact(url)}: not a URL ({error}).") from None
    if not address.host:
        raise UsageError(f"{redact(url)}: not a URL, it has no host.")
    return address
