"""HTTP range requests (aiohttp), each answer checked, transient failures tried again."""

from __future__ import annotations

import asyncio
import random
import re
import time
from typing import NamedTuple

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
from rasteret_ml.fetch.environment import Environment
from rasteret_ml.fetch.limits import FetchLimits
from rasteret_ml.fetch.reader import RangeResponse
from rasteret_ml.fetch.urls import public_url
from rasteret_ml.ranges import ByteRange
from rasteret_ml.telemetry import Meter

__all__ = ["HttpReader"]

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)$")
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
        self._sessions: _Sessions | None = None

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
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return f"no connection in time ({timeouts.connect:g} s)"
        if isinstance(error, aiohttp.SocketTimeoutError):
            return f"no answer in time (no byte for {timeouts.read:g} s)"
        return f"no answer in time (at most {timeouts.total:g} s)"

    async def _request(self, address: URL, url: str, span: ByteRange) -> RangeResponse:
        """One request; around the environment where it has nothing to say (see `fetch.environment`)."""
        sessions = self._get_sessions()
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}"}
        scheme, host = address.scheme, address.host or ""
        if not sessions.environment.concerns(scheme, host):
            async with sessions.direct.get(address, headers=headers, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._answer(response, url, span)
            sessions.environment.note(scheme, host)  # where it leads, the environment may have its say
        async with sessions.by_environment.get(address, headers=headers) as response:
            return await self._answer(response, url, span)

    async def _answer(self, response: aiohttp.ClientResponse, url: str, span: ByteRange) -> RangeResponse:
        status, headers = response.status, response.headers
        if status != 206:
            return await self._unusual(response, _place(url, span), span)
        found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        if not found or int(found[1]) != span.start:
            raise RangeNotSupportedError(
                f"{_place(url, span)}: the server answered with Content-Range {headers.get('Content-Range', '')!r}."
            )
        size = None if found[3] == "*" else int(found[3])
        answered = time.perf_counter()
        data = await response.read()
        self._meter.add(body_seconds=time.perf_counter() - answered)
        expected = min(span.length, size - span.start) if size is not None else len(data)
        if len(data) != expected or len(data) > span.length:
            raise _Transient(ServerError(f"{_place(url, span)}: got {len(data)} bytes, {expected} expected."))
        return RangeResponse(data=data, size=size, etag=headers.get("ETag"))

    async def _unusual(self, response: aiohttp.ClientResponse, where: str, span: ByteRange) -> RangeResponse:
        self._check_status(response, where)
        if response.status == 416:  # an empty file has no byte to give
            return RangeResponse(data=b"", size=0, etag=response.headers.get("ETag"))
        return await self._whole_object(response, span, where)

    def _check_status(self, response: aiohttp.ClientResponse, where: str) -> None:
        status = response.status
        if status == 200:
            return
        what = f"{where}: HTTP {status} {response.reason or ''}".rstrip()
        if status in self._limits.retry.statuses:
            raise _Transient(ServerError(f"{what}."), _retry_after(response))
        if status in (404, 410):
            raise FetchNotFoundError(f"{what}; check the address.")
        if status in (401, 403):
            raise AccessDeniedError(f"{what}; a private or expired address needs sign=, called at each read.")
        if status == 416 and response.headers.get("Content-Range", "").strip() == "bytes */0":
            return
        if status == 416:
            raise FetchError(f"{what}; the file ends before this range: it is not the file that was indexed.")
        raise FetchError(f"{what}.")

    async def _whole_object(self, response: aiohttp.ClientResponse, span: ByteRange, where: str) -> RangeResponse:
        """A 200 answer: usable only where the object is no larger than what was asked for."""
        if response.content_type == "text/html":
            raise NotATiffError(f"{where}: the server answered with an HTML page, not a file; check the address.")
        length = response.content_length
        if span.start == 0 and length is not None and length <= span.length:
            data = await response.read()
            return RangeResponse(data=data, size=len(data), etag=response.headers.get("ETag"))
        response.close()  # do not drain what may be gigabytes
        raise RangeNotSupportedError(
            f"{where}: the server ignores range requests (HTTP 200, {length} bytes); "
            "serve the file from a store that supports them, or download it and use its path."
        )

    def _get_sessions(self) -> _Sessions:
        if self._sessions is None:
            limits = self._limits
            connector = aiohttp.TCPConnector(
                limit=limits.connections,
                keepalive_timeout=limits.keepalive,
                ttl_dns_cache=int(limits.dns_ttl),
            )
            timeout = aiohttp.ClientTimeout(
                total=limits.timeouts.total, sock_connect=limits.timeouts.connect, sock_read=limits.timeouts.read
            )
            jar = aiohttp.CookieJar()

            def session(*, trust_env: bool) -> aiohttp.ClientSession:
                return aiohttp.ClientSession(
                    connector=connector,
                    timeout=timeout,
                    headers={"Accept-Encoding": "identity", "User-Agent": "rasteret-ml"},
                    cookie_jar=jar,
                    auto_decompress=False,
                    trust_env=trust_env,
                )

            self._sessions = _Sessions(session(trust_env=False), session(trust_env=True), Environment())
        return self._sessions

    async def aclose(self) -> None:
        """Close the connections."""
        sessions, self._sessions = self._sessions, None
        if sessions is not None:
            await sessions.by_environment.close()
            await sessions.direct.close()


class _Sessions(NamedTuple):
    """Two sessions over the same connections and cookies."""

    direct: aiohttp.ClientSession
    by_environment: aiohttp.ClientSession
    environment: Environment


def _after(error: FetchError, attempts: int) -> FetchError:
    return type(error)(f"{error} ({attempts} attempt{'s' if attempts > 1 else ''})")


def _place(url: str, span: ByteRange) -> str:
    """An address and a range for a message."""
    return f"{redact(url)}, {span}"


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def _encoded(url: str) -> URL:
    # A signed URL must go out exactly as it came; yarl would re-quote it.
    try:
        return URL(url, encoded=url.isascii() and " " not in url)
    except ValueError as error:
        raise UsageError(f"{redact(url)}: not a URL ({error}).") from None
