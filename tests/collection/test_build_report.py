"""Requests that a build makes, and how it reports files that cannot be read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pixel_oracle import HASTY, QUICK, rasters
from rasterio.windows import Window

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import (
    AccessDeniedError,
    CorruptTiffError,
    DataError,
    FetchError,
    FetchNotFoundError,
    FetchTimeoutError,
    NotATiffError,
    RangeNotSupportedError,
    RasteretError,
    ServerError,
    UnsupportedTiffError,
)
from rasteret_ml.testing import InjectedError, RangeServer, make_cog


@pytest.mark.parametrize("folder", ["multidate", "naip"])
def test_a_header_costs_at_most_1_2_requests(shared_data: Path, tmp_path: Path, folder: str) -> None:
    """Counted at the server and in the report."""
    files = sorted((shared_data / folder).rglob("*.tif"))
    assert len(files) >= 3
    with RangeServer(shared_data / folder) as server:
        hrefs = [f"{server.url}/{path.relative_to(shared_data / folder)}" for path in files]
        collection = build(hrefs, tmp_path / "c.parquet", strict=True)
        assert len(server.requests) <= 1.2 * len(files)
        assert collection.report.requests == len(server.requests)  # type: ignore[attr-defined]
        assert collection.report.files == len(files)  # type: ignore[attr-defined]
        assert {request.path for request in server.requests} == {h.removeprefix(server.url + "/") for h in hrefs}
        assert sum(r.sent for r in server.requests) <= 1.2 * 32768 * len(files)


def test_stac_items_cost_their_headers_only(shared_data: Path, tmp_path: Path) -> None:
    """Items from a server's folder: one request per asset."""
    with RangeServer(shared_data / "multidate") as server:
        items = []
        for path in sorted((shared_data / "multidate").glob("*/*.json")):
            item = json.loads(path.read_text())
            for asset in item["assets"].values():
                asset["href"] = f"{server.url}/{path.parent.name}/{asset['href']}"
            items.append(item)
        build(items, tmp_path / "c.parquet", strict=True)
        assert len(server.requests) <= 1.2 * 50


def _good(folder: Path, name: str = "good.tif") -> str:
    return make_cog(folder / name, np.ones((1, 32, 32), np.uint8))


def _giant(path: Path) -> None:
    """A striped file whose one strip decodes to 256 MiB."""
    profile = {
        "driver": "GTiff", "height": 16384, "width": 16384, "count": 1, "dtype": "uint8", "blockysize": 16384,
        "compress": "deflate", "crs": "EPSG:32633",
        "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5000000),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(np.ones((1, 1, 16384), np.uint8), window=Window(0, 0, 16384, 1))


def _bad(folder: Path, kind: str) -> Path:
    """A file that cannot be read, for the reason `kind`."""
    path = folder / f"{kind.replace(' ', '_')}.tif"
    if kind == "giant":
        _giant(path)
    elif kind == "truncated":
        path.write_bytes(Path(_good(folder, "whole.tif")).read_bytes()[:200])
    elif kind == "jpeg2000":
        content = bytearray(Path(_good(folder, "whole.tif")).read_bytes())
        path.write_bytes(
            content.replace(b"\x03\x01\x03\x00\x01\x00\x00\x00\x08\x00", b"\x03\x01\x03\x00\x01\x00\x00\x00\xb2\x87")
        )
    elif kind != "missing":
        path.write_bytes(
            {"html": b"<!DOCTYPE html><html>", "png": b"\x89PNG\r\n\x1a\n" + bytes(50), "empty": b"", "text": b"hello"}[
                kind
            ]
        )
    return path


_LOCAL: dict[str, tuple[type[RasteretError], str]] = {
    "html": (NotATiffError, "HTML page"),
    "png": (NotATiffError, "PNG"),
    "text": (NotATiffError, "not a TIFF"),
    "empty": (NotATiffError, "empty"),
    "truncated": (CorruptTiffError, "past the end of the file"),
    "giant": (UnsupportedTiffError, r"256 MiB.*gdal_translate -of COG"),
    "jpeg2000": (UnsupportedTiffError, "34738|34712|compression"),
    "missing": (FetchNotFoundError, "no such file"),
}


@pytest.mark.parametrize("kind", sorted(_LOCAL))
def test_a_bad_file_is_listed_and_the_rest_is_built(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Report and log have the record, the href and the reason; the good file is built."""
    expected, message = _LOCAL[kind]
    good, bad = _good(tmp_path), _bad(tmp_path, kind)
    with caplog.at_level(logging.WARNING):
        collection = build([str(bad), good], tmp_path / "c.parquet")
    assert [record.id for record in rasters(collection)] == ["good"]
    report: Any = collection.report
    (failure,) = report.failures
    assert isinstance(failure.error, expected)
    assert failure.record == bad.stem
    assert failure.href == str(bad)
    assert bad.name in str(failure)
    assert (report.records, report.files) == (1, 2)
    assert str(failure) in str(report)
    assert bad.name in caplog.text
    with pytest.raises(expected, match=rf"(?s){bad.name}.*({message})"):
        build([good, str(bad)], tmp_path / "strict.parquet", strict=True)
    assert not (tmp_path / "strict.parquet").exists()


_FAULTS: dict[str, tuple[InjectedError, type[RasteretError], str]] = {
    "404": (InjectedError(kind="status", status=404), FetchNotFoundError, "HTTP 404"),
    "403": (InjectedError(kind="status", status=403), AccessDeniedError, r"HTTP 403.*sign="),
    "500": (InjectedError(kind="status", status=500), ServerError, r"HTTP 500.*2 attempts"),
    "429": (InjectedError(kind="status", status=429), ServerError, "HTTP 429"),
    "html": (InjectedError(kind="html"), NotATiffError, "HTML page"),
    "hang": (InjectedError(kind="hang"), FetchTimeoutError, "no data received for"),
    "cut": (InjectedError(kind="cut"), ServerError, "expected"),
    "ignores range": (InjectedError(kind="ignore_range"), RangeNotSupportedError, "ignores range requests"),
}


@pytest.mark.parametrize("kind", sorted(_FAULTS))
def test_a_failing_server_is_named(server: RangeServer, tmp_path: Path, kind: str) -> None:
    """Each class of failure has the URL and the remedy; the other file is built; strict raises it."""
    fault, expected, message = _FAULTS[kind]
    _good(tmp_path)
    data = np.random.default_rng(0).integers(0, 255, (1, 512, 512), dtype=np.uint8)
    make_cog(tmp_path / "bad.tif", data)
    server.errors["bad.tif"] = fault
    hrefs = [f"{server.url}/good.tif", f"{server.url}/bad.tif"]
    limits = HASTY if fault.kind == "hang" else QUICK
    collection = build(hrefs, tmp_path / "c.parquet", limits=limits)
    assert [record.id for record in rasters(collection)] == ["good"]
    (failure,) = collection.report.failures  # type: ignore[attr-defined]
    assert isinstance(failure.error, expected)
    assert hrefs[1] in str(failure)
    with pytest.raises(expected, match=rf"(?s){hrefs[1]}.*{message}"):
        build(hrefs, tmp_path / "c2.parquet", limits=limits, strict=True)


def test_a_server_that_recovers_costs_only_retries(server: RangeServer, tmp_path: Path) -> None:
    """One 503: no failure in the report."""
    _good(tmp_path)
    server.errors["good.tif"] = InjectedError(kind="status", status=503, times=1)
    collection = build(f"{server.url}/good.tif", tmp_path / "c.parquet", limits=QUICK)
    assert collection.report.failures == ()  # type: ignore[attr-defined]
    assert len(server.requests) == 2


def test_an_empty_file_on_a_server_is_an_empty_file(server: RangeServer, tmp_path: Path) -> None:
    """Servers answer 416 to any range of it; "not the file that was indexed" would be misleading here."""
    (tmp_path / "empty.tif").write_bytes(b"")
    _good(tmp_path)
    collection = build([f"{server.url}/empty.tif", f"{server.url}/good.tif"], tmp_path / "c.parquet")
    (failure,) = collection.report.failures  # type: ignore[attr-defined]
    assert "empty.tif" in str(failure)
    assert "indexed" not in str(failure)


def test_nothing_readable_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    """Every file is named with its reason, and no Collection is written."""
    files = [str(_bad(tmp_path, kind)) for kind in ("html", "png", "missing")]
    with pytest.raises(DataError, match=r"(?s)None of the 3 files.*html\.tif.*HTML.*png\.tif.*PNG.*missing\.tif"):
        build(files, tmp_path / "c.parquet")
    assert not (tmp_path / "c.parquet").exists()


def test_a_failed_build_leaves_the_old_collection(tmp_path: Path) -> None:
    """Strict or not."""
    build(_good(tmp_path), tmp_path / "c.parquet")
    for strict in (False, True):
        with pytest.raises((DataError, FetchError)):
            build(str(tmp_path / "missing.tif"), tmp_path / "c.parquet", strict=strict)
    assert len(Collection.open(tmp_path / "c.parquet")) == 1


def test_a_record_keeps_the_bands_that_can_be_read(tmp_path: Path) -> None:
    """One of two band files is broken: the record has the other."""
    _good(tmp_path, "s_B04.tif")
    (tmp_path / "s_B08.tif").write_bytes(b"hello")
    files = [str(tmp_path / f"s_{band}.tif") for band in ("B04", "B08")]
    collection = build(files, tmp_path / "c.parquet", bands=["B04", "B08"])
    (record,) = rasters(collection)
    assert record.available_bands == ["B04"]
    (failure,) = collection.report.failures  # type: ignore[attr-defined]
    assert (failure.record, failure.band) == ("s", "B08")


def test_malformed_files_never_stop_a_build(shared_data: Path, tmp_path: Path) -> None:
    """48 broken TIFFs and a good one: unreadable files are reported by name, with our errors."""
    files = [str(p) for p in sorted((shared_data / "malformed").iterdir()) if p.suffix.lower() in (".tif", ".tiff")]
    collection = build([*files, _good(tmp_path)], tmp_path / "c.parquet")
    report: Any = collection.report
    assert "good" in {record.id.rsplit("/", 1)[-1] for record in rasters(collection)}
    assert report.records + len({failure.record for failure in report.failures}) == len(files) + 1
    assert report.failures
    assert all(isinstance(failure.error, RasteretError) for failure in report.failures)
    corrupt = [failure for failure in report.failures if isinstance(failure.error, CorruptTiffError)]
    assert corrupt
    assert all(Path(failure.href).name in str(failure) for failure in report.failures)
