"""What can go wrong, whose fault it is, and what to do.

    RasteretError
    ├── UsageError (ValueError)            you: an argument that cannot work
    │   ├── GeometryError                    a geometry of the wrong kind, or outside every scene
    │   ├── MixedCRSError                    several CRSs and none chosen
    │   ├── ResumeError                      a saved state of another plan
    │   ├── SplitLeakError                   two splits that can read the same ground at the same time
    │   └── UnknownBandError                 a band that the record or Collection does not have
    ├── DataError                          the file or the table
    │   ├── CollectionError                  a Parquet table that is not a Collection
    │   ├── NotATiffError                    an HTML page, a PNG, an empty file …
    │   ├── UnsupportedTiffError             a TIFF whose feature is not handled here
    │   ├── CorruptTiffError                 a header or a tile that cannot be parsed
    │   └── FileChangedError                 not the file that was indexed
    ├── FetchError (OSError)               the wire
    │   ├── FetchNotFoundError               404, 410, no such file
    │   ├── AccessDeniedError                401, 403
    │   ├── RangeNotSupportedError           a server that ignores `Range`
    │   ├── FetchTimeoutError                no answer in time
    │   └── ServerError                      5xx, 429, a broken connection, after all retries
    ├── NoOverlapError (IndexError)        nothing in the dataset matches the query
    ├── ReadError                          one or more bands of a read failed (says which, and why)
    ├── ErrorBudgetError                   more samples failed than a loader's `errors=` allows
    └── ClosedError                        used after close, or from the wrong thread

Every class can be rebuilt from its one message, because torch re-raises a worker's error as
`type(message)`. A message says what happened, where, and what to do; `redact` keeps secrets out of it.
"""

from __future__ import annotations

import re

__all__ = [
    "AccessDeniedError",
    "ClosedError",
    "CollectionError",
    "CorruptTiffError",
    "DataError",
    "ErrorBudgetError",
    "FetchError",
    "FetchNotFoundError",
    "FetchTimeoutError",
    "FileChangedError",
    "GeometryError",
    "MixedCRSError",
    "NoOverlapError",
    "NotATiffError",
    "RangeNotSupportedError",
    "RasteretError",
    "ReadError",
    "ResumeError",
    "ServerError",
    "SplitLeakError",
    "UnknownBandError",
    "UnsupportedTiffError",
    "UsageError",
    "redact",
]


class RasteretError(Exception):
    """Base of every error that this library raises on purpose."""


class UsageError(RasteretError, ValueError):
    """An argument that cannot work; the message names it and what would."""


class GeometryError(UsageError):
    """A geometry of the wrong kind, without a usable CRS, or outside every scene."""


class MixedCRSError(UsageError):
    """Records in several CRSs where one grid is needed and none was chosen."""


class ResumeError(UsageError):
    """A saved state of another plan, or of another version; the message names what differs."""


class SplitLeakError(UsageError):
    """Two splits that can read the same ground at the same time; names them, the place, and how to part them."""


class UnknownBandError(UsageError):
    """A band that no record, or not this record, has; the message lists those that exist."""


class DataError(RasteretError):
    """The file or the table is at fault."""


class CollectionError(DataError):
    """A Parquet table that does not keep the Collection contract."""


class NotATiffError(DataError):
    """The bytes are not a TIFF."""


class UnsupportedTiffError(DataError):
    """A valid TIFF with a feature that is not handled; the message names the feature."""


class CorruptTiffError(DataError):
    """A header or tile that contradicts itself or cannot be decoded."""


class FileChangedError(DataError):
    """The file at this address is not the one that was indexed."""


class FetchError(RasteretError, OSError):
    """The bytes could not be had."""


class FetchNotFoundError(FetchError):
    """There is nothing at this address."""


class AccessDeniedError(FetchError):
    """The server refuses; the address may need signing."""


class RangeNotSupportedError(FetchError):
    """The server answers a range request with the whole object."""


class FetchTimeoutError(FetchError):
    """No answer within the time limit, after all retries."""


class ServerError(FetchError):
    """A transient failure that outlasted the retries."""


class NoOverlapError(RasteretError, IndexError):
    """Nothing in the dataset matches the query (an IndexError, as TorchGeo's unions expect)."""


class ReadError(RasteretError):
    """A read failed; names record, band, address, tile, byte range, attempts and cause."""


class ErrorBudgetError(RasteretError):
    """More samples of a pass failed than a loader's `errors=` allows; sums up what failed, and why."""


class ClosedError(RasteretError):
    """An object used after it was closed, or from a place that would deadlock."""


_QUERY = re.compile(r"\?(?!…(?:[\s,;:]|$))[^\s'\"<>)\]]*")
_FRAGMENT = re.compile(r"(?<=\w)#[^\s'\"<>)\]]*")
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")


def redact(text: str) -> str:
    """`text` with query strings and user names of every URL in it replaced by `…`.

    Signed URLs carry their secret in the query (`?sig=`, `?X-Amz-Signature=`), so nothing after the
    question mark is kept. A lone `#fragment` is dropped with it.

    >>> redact("GET https://me:pw@host/a.tif?sig=abc failed")
    'GET https://…@host/a.tif?… failed'
    """
    if "://" not in text:
        return text
    return _USERINFO.sub("…@", _FRAGMENT.sub("", _QUERY.sub("?…", text)))
