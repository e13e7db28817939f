"""The seam between pixels and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rasteret_ml.errors import FetchError, UsageError, redact
from rasteret_ml.ranges import ByteRange

__all__ = ["BackendReader", "RangeReader", "RangeResponse", "as_reader"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RangeResponse:
    """What came back for one range."""

    data: bytes | memoryview
    """The bytes; as many as were asked for, fewer only where the file ends inside the range."""
    size: int | None
    """Length of the whole file, None where the source does not say."""
    etag: str | None = None
    """The file's version tag, None where there is none."""


class RangeReader(Protocol):
    """Anything that can read a byte range of an address."""

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """Read `span` of the file at `href`.

        A range that starts past the end of the file is an error; one that reaches past it comes back short.

        Raises:
            FetchError: a subclass says why; the message carries the address without its secrets.
        """

    async def aclose(self) -> None:
        """Release connections; the reader is unusable afterwards."""


class BackendReader:
    """A `RangeReader` over a caller's own store.

    Args:
        backend: An object with async `get_range(url, start, length)` (the protocol that rasteret uses), or an
            obstore store, whose `get_range_async(path, start=, length=)` is called with the path of the URL.
    """

    def __init__(self, backend: Any) -> None:
        if not any(hasattr(backend, name) for name in ("get_range", "get_range_async", "get_ranges")):
            raise UsageError(
                f"backend= needs async get_range(url, start, length); {type(backend).__name__} has no such method."
            )
        self._backend = backend

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        try:
            data = await self._get(href, span)
        except Exception as error:
            # Without the chain: it may spell the address, signature and all.
            what = f"{type(error).__name__}: {redact(str(error))}"
            raise FetchError(f"{redact(href)}: the backend failed to read {span}: {what}") from None
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
        """Does nothing: the caller owns the backend."""


def as_reader(backend: Any) -> RangeReader:
    """`backend` itself where it is a `RangeReader`, else wrapped as one."""
    return backend if hasattr(backend, "read") and hasattr(backend, "aclose") else BackendReader(backend)
