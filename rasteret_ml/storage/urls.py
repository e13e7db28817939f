"""Addresses and their schemes.

| href | read from |
| --- | --- |
| `https://…`, `http://…` | that URL |
| `s3://bucket/key` | `https://bucket.s3.amazonaws.com/key` (path style if the bucket's name has a dot) |
| `gs://bucket/key` | `https://storage.googleapis.com/bucket/key` |
| `az://container/key`, `abfs(s)://…` | `https://{account}.blob.core.windows.net/container/key` |
| `file:///…`, a path | the file system |

The Azure account is read from `container@account…` or from AZURE_STORAGE_ACCOUNT. These are the public endpoints: a
private object needs a `sign` hook, which may return any https URL.
"""

from __future__ import annotations

import os
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import url2pathname

from rasteret_ml.errors import UsageError, redact

_SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "abfss", "file")


def _scheme(href: str) -> str:
    scheme, separator, _ = href.partition("://")
    return scheme.lower() if separator and scheme.isalnum() else ""


def is_remote(href: str) -> bool:
    """Whether `href` is read over HTTP; UsageError if its scheme is not supported."""
    scheme = _scheme(href)
    if scheme and scheme not in _SCHEMES:
        raise UsageError(f"{redact(href)}: scheme {scheme!r} is not supported; use {', '.join(_SCHEMES)} or a path.")
    return scheme not in ("", "file")


def local_path(href: str) -> str:
    """Return the file system path of a path or `file://` URL."""
    if _scheme(href) == "file":
        return url2pathname(urlsplit(href).path)
    return os.path.expanduser(href)


def public_url(href: str) -> str:
    """Return the http(s) URL of a cloud address, as in the table of this module.

    UsageError if it lacks a bucket, a key or an Azure account.
    """
    scheme = _scheme(href)
    if scheme in ("http", "https"):
        return href
    bucket, _, key = href.split("://", 1)[1].partition("/")
    key = quote(key, safe="/~!$&'()*+,;=:@%")
    if not bucket or not key:
        raise UsageError(f"{redact(href)}: the address must be {scheme}://bucket/key.")
    if scheme == "s3":
        if "." in bucket:  # a dotted bucket does not match S3's wildcard certificate
            return f"https://s3.amazonaws.com/{bucket}/{key}"
        return f"https://{bucket}.s3.amazonaws.com/{key}"
    if scheme == "gs":
        return f"https://storage.googleapis.com/{bucket}/{key}"
    container, _, account = bucket.partition("@")
    account = account.split(".", 1)[0] or os.environ.get("AZURE_STORAGE_ACCOUNT", "")
    if not account:
        raise UsageError(
            f"{redact(href)}: the storage account is missing; write "
            f"{scheme}://container@account.blob.core.windows.net/key or set AZURE_STORAGE_ACCOUNT."
        )
    return f"https://{account}.blob.core.windows.net/{container}/{key}"


def resolve_href(href: str, base: str | None) -> str:
    """Resolve a relative href against `base`, the address of the document that contains it."""
    if _scheme(href) or base is None:
        return href
    if not _scheme(base):
        return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(base)), href))
    # urljoin handles http but not cloud schemes.
    scheme, rest = base.split("://", 1)
    return scheme + urljoin(f"http://{rest.split('?', 1)[0]}", href).removeprefix("http")


def sidecar_href(href: str, suffix: str) -> str:
    """Return `href` with `suffix` appended to its path, before any query."""
    if not _scheme(href):
        return href + suffix
    path, separator, query = href.partition("?")
    return path + suffix + separator + query
