"""The default reader: choose by scheme, sign addresses."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

from rasteret_ml.errors import AccessDeniedError, UsageError, redact
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.http import HttpReader
from rasteret_ml.storage.local import LocalReader
from rasteret_ml.storage.reader import FetchLimits, RangeReader, RangeResponse
from rasteret_ml.storage.urls import is_remote
from rasteret_ml.telemetry import Meter

#: Turns a stored href into one that can be read now. Called before each read; its result is never stored.
SignHook = Callable[[str], str | Awaitable[str]]


class SchemeReader:
    """Reads local paths from the file system, everything else by HTTP."""

    def __init__(self, limits: FetchLimits, meter: Meter | None = None) -> None:
        self._local = LocalReader(meter)
        self._http = HttpReader(limits, meter)

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        return await (self._http if is_remote(href) else self._local).read(href, span)

    async def aclose(self) -> None:
        """Close the HTTP session."""
        await self._http.aclose()

    async def __aenter__(self) -> SchemeReader:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class SigningReader:
    """A reader that signs every address just before reading it.

    If access is denied, it signs and reads once more, because a token may have expired in between.
    """

    def __init__(self, reader: RangeReader, sign: SignHook) -> None:
        self._reader = reader
        self._sign = sign

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        try:
            return await self._reader.read(await self._signed(href), span)
        except AccessDeniedError:
            return await self._reader.read(await self._signed(href), span)

    async def _signed(self, href: str) -> str:
        try:
            result = self._sign(href)
            signed = await result if inspect.isawaitable(result) else result
        except Exception as error:  # without the original exception, whose text may contain a signed address
            reason = f"{type(error).__name__}: {redact(str(error))}"
            raise AccessDeniedError(f"{redact(href)}: sign= raised {reason}") from None
        if not isinstance(signed, str) or not signed:
            raise UsageError(f"{redact(href)}: sign= must return an address, got {type(signed).__name__}.")
        return signed

    async def aclose(self) -> None:
        """Close the wrapped reader."""
        await self._reader.aclose()


def open_reader(limits: FetchLimits | None = None, meter: Meter | None = None) -> SchemeReader:
    """Return a reader for paths and URLs; `async with` closes it.

    Pass one reader to many `load_bands` calls, so that they share connections:

        async with rm.open_reader() as reader:
            chips = await record.load_bands(geometries, ["B04"], backend=reader, output="tensor")
    """
    return SchemeReader(limits or FetchLimits(), meter)
