"""Addresses and their schemes."""

from __future__ import annotations

import pytest

from rasteret_ml.errors import UsageError
from rasteret_ml.storage.urls import is_remote, local_path, public_url, resolve_href


@pytest.mark.parametrize(
    ("href", "url"),
    [
        ("https://host/a.tif?x=1", "https://host/a.tif?x=1"),
        ("http://host/a.tif", "http://host/a.tif"),
        ("HTTPS://host/a.tif", "HTTPS://host/a.tif"),
        ("s3://bucket/a/b.tif", "https://bucket.s3.amazonaws.com/a/b.tif"),
        ("s3://dotted.bucket/a/b.tif", "https://s3.amazonaws.com/dotted.bucket/a/b.tif"),
        ("s3://bucket/a b#1.tif", "https://bucket.s3.amazonaws.com/a%20b%231.tif"),
        ("gs://bucket/a/b.tif", "https://storage.googleapis.com/bucket/a/b.tif"),
        ("az://container@account/a/b.tif", "https://account.blob.core.windows.net/container/a/b.tif"),
        (
            "abfs://container@account.dfs.core.windows.net/a.tif",
            "https://account.blob.core.windows.net/container/a.tif",
        ),
        ("abfss://c@account.blob.core.windows.net/a.tif", "https://account.blob.core.windows.net/c/a.tif"),
    ],
)
def test_cloud_addresses_map_to_their_public_endpoints(href: str, url: str) -> None:
    """Each scheme of the table in `storage.urls`."""
    assert public_url(href) == url
    assert is_remote(href)


def test_the_azure_account_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """AZURE_STORAGE_ACCOUNT applies if the address has no account; without both, the message asks for it."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "mine")
    assert public_url("az://container/a.tif") == "https://mine.blob.core.windows.net/container/a.tif"
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT")
    with pytest.raises(UsageError, match=r"az://container/a\.tif.*AZURE_STORAGE_ACCOUNT"):
        public_url("az://container/a.tif")


@pytest.mark.parametrize("href", ["s3://bucket", "s3:///key", "gs://bucket/", "az://@/x"])
def test_an_address_without_bucket_or_key_is_refused(href: str) -> None:
    """The message shows the required form."""
    with pytest.raises(UsageError, match="://"):
        public_url(href)


def test_an_unknown_scheme_is_refused_by_name() -> None:
    """The message lists the supported schemes; a secret in the address is redacted."""
    with pytest.raises(UsageError, match=r"'ftp'.*https") as caught:
        is_remote("ftp://me:pw@host/a.tif?token=SECRET")
    assert "SECRET" not in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("href", "path"),
    [
        ("/a/b.tif", "/a/b.tif"),
        ("a/b.tif", "a/b.tif"),
        ("file:///a/b.tif", "/a/b.tif"),
        ("file:///a%20b/c.tif", "/a b/c.tif"),
        ("file://localhost/a/b.tif", "/a/b.tif"),
        ("/odd/50%20off.tif", "/odd/50%20off.tif"),
    ],
)
def test_files_are_local(href: str, path: str) -> None:
    """Paths are used unchanged, `file://` URLs are decoded once."""
    assert not is_remote(href)
    assert local_path(href) == path


def test_a_file_url_is_decoded_once() -> None:
    """A percent sign in a file's name survives the URL: `a%20b` is written `a%2520b`."""
    assert local_path("file:///a%2520b.tif") == "/a%20b.tif"


def test_a_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` means the user's folder."""
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path("~/a.tif") == "/home/me/a.tif"


@pytest.mark.parametrize(
    ("href", "base", "expected"),
    [
        ("./B02.tif", "/data/item/item.json", "/data/item/B02.tif"),
        ("B02.tif", "/data/item/item.json", "/data/item/B02.tif"),
        ("../B02.tif", "/data/item/item.json", "/data/B02.tif"),
        ("./B02.tif", "https://host/item/item.json?x=1", "https://host/item/B02.tif"),
        ("../other/B02.tif", "https://host/a/b/item.json", "https://host/a/other/B02.tif"),
        ("./../B02.tif", "https://host/a/b/item.json", "https://host/a/B02.tif"),
        ("s3://bucket/a.tif", "https://host/item.json", "s3://bucket/a.tif"),
        ("/abs/B02.tif", "/data/item/item.json", "/abs/B02.tif"),
        ("B02.tif", None, "B02.tif"),
    ],
)
def test_relative_hrefs_start_at_their_document(href: str, base: str | None, expected: str) -> None:
    """STAC's rule: relative to the item's own address."""
    assert resolve_href(href, base) == expected


def test_a_rooted_href_starts_at_the_documents_host() -> None:
    """RFC 3986: `/path` against https://host/… is https://host/path, not a path on this machine."""
    assert resolve_href("/data/B02.tif", "https://host/items/item.json") == "https://host/data/B02.tif"
