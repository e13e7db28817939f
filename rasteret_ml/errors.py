"""The exceptions of this library.

    RasteretError
    ├── UsageError (ValueError)            an argument that cannot work
    │   ├── GeometryError                    a geometry of the wrong kind, or outside every scene
    │   ├── MixedCRSError                    records in several CRSs, and no target CRS
    │   ├── ResumeError                      a saved state of another loader, sampler or map
    │   ├── SplitLeakError                   splits that share pixels at the same time
    │   └── UnknownBandError                 a band that the record or Collection does not have
    ├── DataError                          a bad file or table
    │   ├── CollectionError                  a Parquet table that is not a Collection
    │   ├── NotATiffError                    an HTML page, a PNG, an empty file …
    │   ├── UnsupportedTiffError             a TIFF with an unsupported feature
    │   ├── CorruptTiffError                 a header or a tile that cannot be parsed
    │   └── FileChangedError                 a file that has changed since it was indexed
    ├── FetchError (OSError)               bytes that could not be read
    │   ├── FetchNotFoundError               404, 410, no such file
    │   ├── AccessDeniedError                401, 403
    │   ├── RangeNotSupportedError           a server that ignores `Range`
    │   ├── FetchTimeoutError                no response in time
    │   └── ServerError                      5xx, 429, a broken connection, after all retries
    ├── NoOverlapError (IndexError)        nothing in the dataset matches the query
    ├── ReadError                          a read of which one or more bands failed
    ├── ErrorBudgetError                   more failed samples than a loader's `errors=` allows
    └── ClosedError                        use after close, or from the wrong thread

Every class can be rebuilt from one string, because torch re-raises a worker's error as `type(message)`. A message says
what happened, where, and what to do; `redact` keeps secrets out of it.
"""

from __future__ import annotations

import re


class RasteretError(Exception):
    """Base class of every error that this library raises on purpose."""


class UsageError(RasteretError, ValueError):
    """An argument that cannot work; the message names it and says what would."""


class GeometryError(UsageError):
    """A geometry of the wrong kind, without a usable CRS, or outside every scene."""


class MixedCRSError(UsageError):
    """Records in several CRSs where one grid is needed and no CRS was given."""


class ResumeError(UsageError):
    """A saved state of another loader, sampler or map, or of another version; the message names what differs."""


class SplitLeakError(UsageError):
    """Two splits that share pixels at the same time; the message names them, the place and the remedy."""


class UnknownBandError(UsageError):
    """A band that the record, or every record, lacks; the message lists those that exist."""


class DataError(RasteretError):
    """A bad file or table."""


class CollectionError(DataError):
    """A Parquet table that is not a Collection: columns are missing or have other types."""


class NotATiffError(DataError):
    """The bytes are not a TIFF."""


class UnsupportedTiffError(DataError):
    """A valid TIFF with an unsupported feature, which the message names."""


class CorruptTiffError(DataError):
    """A header or tile that is inconsistent or cannot be decoded."""


class FileChangedError(DataError):
    """The file at this address has changed since it was indexed."""


class FetchError(RasteretError, OSError):
    """Bytes that could not be read."""


class FetchNotFoundError(FetchError):
    """No file at this address."""


class AccessDeniedError(FetchError):
    """The server denies access; the address may need signing."""


class RangeNotSupportedError(FetchError):
    """The server responds to a range request with the whole file."""


class FetchTimeoutError(FetchError):
    """No response within the time limit, after all retries."""


class ServerError(FetchError):
    """A transient failure that persisted through all retries."""


class NoOverlapError(RasteretError, IndexError):
    """Nothing in the dataset matches the query (an IndexError, as TorchGeo's unions expect)."""


class ReadError(RasteretError):
    """A failed read; the message names record, band, address, tile, byte range, attempts and cause."""


class ErrorBudgetError(RasteretError):
    """More samples of an epoch failed than a loader's `errors=` allows; the message sums up what failed and why."""


class ClosedError(RasteretError):
    """An object used after it was closed, or from a thread where it would deadlock."""


_QUERY = re.compile(r"\?(?!…(?:[\s,;:]|$))[^\s'\"<>)\]]*")
_FRAGMENT = re.compile(r"(?<=\w)#[^\s'\"<>)\]]*")
_USERINFO = re.compile(r"(?<=://)[^/\s]*@")


def redact(text: str) -> str:
    """Replace the query string and the user name of every URL in a text by `…`.

    Signed URLs carry their secret in the query (`?sig=`, `?X-Amz-Signature=`), so nothing after the question mark is
    kept. A `#fragment` is dropped too.

    >>> redact("GET https://me:pw@host/a.tif?sig=abc failed")
    'GET https://…@host/a.tif?… failed'
    """
    if "://" not in text:
        return text
    return _USERINFO.sub("…@", _FRAGMENT.sub("", _QUERY.sub("?…", text)))
