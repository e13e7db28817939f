"""Addresses: which scheme goes where.

| href | read from |
| --- | --- |
| `https://…`, `http://…` | as it is |
| `s3://bucket/key` | `https://bucket.s3.amazonaws.com/key` (path style where the bucket's name has a dot) |
| `gs://bucket/key` | `https://storage.googleapis.com/bucket/key` |
| `az://container/key`, `abfs(s)://…` | `https://{account}.blob.core.windows.net/container/key` |
| `file:///…`, a path | the file system |

The Azure account comes from `container@account…` or from AZURE_STORAGE_ACCOUNT.

These are the public endpoints: a private object needs a `sign` hook, which may return any https URL.
"""

from __future__ import annotations

import os
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import url2pathname

from rasteret_ml.errors import UsageError, redact

__all__ = ["is_remote", "local_path", "public_url", "resolve_href", "sidecar_href"]

_SCHEMES = ("http", "https", "s3", "gs", "az", "abfs", "abfss", "file")


def _scheme(href: str) -> str:
    head, mark, _ = href.partition("://")
    return head.lower() if mark and head.isalnum() else ""


def is_remote(href: str) -> bool:
    """Whether `href` is read over HTTP.

    Raises:
        UsageError: a scheme that is not known.
    """
    scheme = _scheme(href)
    if scheme and scheme not in _SCHEMES:
        raise UsageError(f"{redact(href)}: scheme {scheme!r} is not known; use one of {', '.join(_SCHEMES)} or a path.")
    return scheme not in ("", "file")


def local_path(href: str) -> str:
    """The file system path of a path or `file://` URL."""
    if _scheme(href) == "file":
        return url2pathname(urlsplit(href).path)
    return os.path.expanduser(href)


def public_url(href: str) -> str:
    """The http(s) URL behind a cloud address (see the module's table)."""
    scheme = _scheme(href)
    if scheme in ("http", "https"):
        return href
    bucket, _, key = href.split("://", 1)[1].partition("/")
    key = quote(key, safe="/~!$&'()*+,;=:@%")
    if not bucket or not key:
        raise UsageError(f"{redact(href)}: a {scheme}:// address is {scheme}://bucket/key.")
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
            f"{redact(href)}: which storage account? Write {scheme}://container@account.blob.core.windows.net/key, "
            "or set AZURE_STORAGE_ACCOUNT."
        )
    return f"https://{account}.blob.core.windows.net/{container}/{key}"


def resolve_href(href: str, base: str | None) -> str:
    """A relative href made absolute against the address of the document that holds it."""
    if _scheme(href) or base is None:
        return href
    if not _scheme(base):
        return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(base)), href))
    # urljoin knows http and file alone: lend it to the other schemes.
    scheme, rest = base.split("://", 1)
    return scheme + urljoin(f"http://{rest.split('?', 1)[0]}", href).removeprefix("http")


def sidecar_href(href: str, suffix: str) -> str:
    """The address of a file beside `href`: its path with `suffix`, a query kept behind it."""
    if not _scheme(href):
        return href + suffix
    path, mark, query = href.partition("?")
    return path + suffix + mark + query
