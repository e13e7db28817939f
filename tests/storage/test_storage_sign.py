"""The sign hook: called before every read, its result never stored and never shown."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import numpy as np
import pytest
from pixel_oracle import QUICK, assert_chip, rasters, window_by_rasterio

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import AccessDeniedError, ReadError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.open import SigningReader, open_reader
from rasteret_ml.testing import InjectedError, MemoryReader, RangeServer, make_cog


@pytest.fixture
def cog(tmp_path: Path, rng: np.random.Generator) -> str:
    """Four tiles, far enough apart to need more than one request."""
    data = rng.integers(0, 65535, (1, 512, 512), dtype=np.uint16)
    return make_cog(tmp_path / "a.tif", data, compress="none", overviews="none")


def test_every_read_is_signed_anew() -> None:
    """Three reads, three calls, each with the unsigned address."""
    asked: list[str] = []

    def sign(href: str) -> str:
        asked.append(href)
        return "signed"

    async def read() -> None:
        reader = SigningReader(MemoryReader({"signed": b"abc"}), sign)
        for _ in range(3):
            await reader.read("plain", ByteRange(0, 3))

    asyncio.run(read())
    assert asked == ["plain"] * 3


def test_the_hook_may_be_async() -> None:
    """The result of a coroutine is awaited."""

    async def sign(href: str) -> str:
        return href + "?token"

    async def read() -> bytes:
        return bytes((await SigningReader(MemoryReader({"a?token": b"abc"}), sign).read("a", ByteRange(0, 3))).data)

    assert asyncio.run(read()) == b"abc"


def test_a_refused_address_is_signed_once_more(server: RangeServer, cog: str) -> None:
    """A token that expired in between is replaced: one 403 costs one more signature and no error."""
    tokens = itertools.count()
    server.errors["a.tif"] = InjectedError(kind="status", status=403, times=1)

    async def read() -> int:
        async with open_reader(QUICK) as reader:
            signed = SigningReader(reader, lambda href: f"{href}?token={next(tokens)}")
            return len((await signed.read(f"{server.url}/a.tif", ByteRange(0, 16))).data)

    assert asyncio.run(read()) == 16
    assert [request.query for request in server.requests] == ["token=0", "token=1"]


def test_a_refusal_that_stays_is_raised_after_two_tries(server: RangeServer, cog: str) -> None:
    """Signed twice only, and no token in the message."""
    server.errors["a.tif"] = InjectedError(kind="status", status=403)

    async def read() -> None:
        async with open_reader(QUICK) as reader:
            signed = SigningReader(reader, lambda href: f"{href}?token=SECRET")
            await signed.read(f"{server.url}/a.tif", ByteRange(0, 16))

    with pytest.raises(AccessDeniedError, match=r"/a\.tif\?….*403") as caught:
        asyncio.run(read())
    assert len(server.requests) == 2
    assert "SECRET" not in str(caught.value)


def test_other_failures_are_not_signed_again(server: RangeServer) -> None:
    """A missing file costs one signature."""
    asked: list[str] = []

    def sign(href: str) -> str:
        asked.append(href)
        return href

    async def read() -> None:
        async with open_reader(QUICK) as reader:
            await SigningReader(reader, sign).read(f"{server.url}/no.tif", ByteRange(0, 16))

    with pytest.raises(OSError, match="404"):
        asyncio.run(read())
    assert len(asked) == 1


def test_a_signature_is_used_but_never_kept(server: RangeServer, cog: str, tmp_path: Path) -> None:
    """`build` and `load_bands` sign at each request; the Parquet file and the record hold the plain address."""
    tokens = itertools.count()

    def sign(href: str) -> str:
        assert href == "s3://bucket/a.tif"
        return f"{server.url}/a.tif?X-Amz-Signature=SECRET{next(tokens)}"

    collection = build("s3://bucket/a.tif", tmp_path / "c.parquet", sign=sign)
    assert b"SECRET" not in (tmp_path / "c.parquet").read_bytes()
    (raster,) = rasters(collection)
    assert raster.try_get_band_cog_metadata("B1")[1] == "s3://bucket/a.tif"
    built = len(server.requests)
    box = raster.grid("B1").bounds
    (chip,) = asyncio.run(
        raster.load_bands([box], ["B1"], geometry_crs=raster.crs, output="tensor", sign=sign)  # type: ignore[misc]
    )
    assert_chip(chip, *window_by_rasterio(cog, (0, 0, 512, 512)))
    assert len(server.requests) > built
    assert [r.query for r in server.requests] == [f"X-Amz-Signature=SECRET{i}" for i in range(len(server.requests))]
    assert "SECRET" not in repr(raster)


def test_a_failed_read_and_a_failed_build_show_no_secret(
    server: RangeServer, cog: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Messages, the build report and the log name the file, not the token."""

    def sign(href: str) -> str:
        return f"{href}?sig=SECRET"

    make_cog(tmp_path / "b.tif", np.ones((1, 64, 64), np.uint8))
    server.errors["b.tif"] = InjectedError(kind="status", status=403)
    collection = build([f"{server.url}/a.tif", f"{server.url}/b.tif"], tmp_path / "c.parquet", sign=sign, limits=QUICK)
    (failure,) = collection.report.failures  # type: ignore[attr-defined]
    assert "/b.tif" in str(failure)
    server.errors["a.tif"] = InjectedError(kind="status", status=403)
    (raster,) = rasters(collection)
    with pytest.raises(ReadError, match=r"/a\.tif") as caught:
        asyncio.run(raster.load_bands([raster.grid("B1").bounds], ["B1"], geometry_crs=raster.crs, sign=sign))
    assert "SECRET" not in f"{failure} {collection.report} {caught.value} {caplog.text}"
