"""Reading one header takes few, exact requests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from pixel_oracle import run

from rasteret_ml.collection.build.headers import FIRST_BYTES, read_header
from rasteret_ml.errors import CorruptTiffError, FetchError, NotATiffError, RasteretError
from rasteret_ml.testing import MemoryReader, RecordingReader, make_cog


def test_a_small_cog_takes_one_request(tmp_path: Path) -> None:
    """And the header agrees with rasterio."""
    path = make_cog(tmp_path / "a.tif", np.ones((3, 200, 300), np.int16), blocksize=64, nodata=-1)
    reader = RecordingReader(MemoryReader({path: Path(path).read_bytes()}))
    opened = run(read_header(reader, path))
    assert [(span.start, span.length) for _, span in reader.calls] == [(0, FIRST_BYTES)]
    band = opened.band(1)
    with rasterio.open(path) as source:
        assert (band.height, band.width) == source.shape
        assert band.transform == source.transform
        assert band.nodata == source.nodata
        assert band.dtype == source.dtypes[1]
        assert opened.header.count == source.count
    assert opened.size == band.file_size == Path(path).stat().st_size


def test_a_header_at_the_end_of_the_file_is_fetched_and_no_more(tmp_path: Path) -> None:
    """Directories behind the pixels: a second request for them, never the pixels in between."""
    path = tmp_path / "end.tif"
    profile = {"driver": "GTiff", "height": 512, "width": 512, "count": 1, "dtype": "uint16", "crs": "EPSG:32633"}
    with rasterio.open(
        path, "w", tiled=True, **profile, transform=rasterio.Affine(10, 0, 500000, 0, -10, 5000000)
    ) as target:
        target.write(np.random.default_rng(0).integers(0, 65535, (1, 512, 512), dtype=np.uint16))
        target.build_overviews([2, 4])
    reader = RecordingReader(MemoryReader({"end.tif": path.read_bytes()}))
    opened = run(read_header(reader, "end.tif"))
    assert [table.width for table in opened.header.overviews] == [256, 128]
    fetched = sum(span.length for _, span in reader.calls)
    assert 1 < len(reader.calls) <= 6
    assert fetched < 0.25 * path.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b"<?xml version='1.0'?><Error/>", "XML"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"just some words, long enough", "just som"),
    ],
)
def test_a_file_that_is_not_a_tiff_is_described(content: bytes, message: str) -> None:
    """The error names the URL and what the bytes look like."""
    with pytest.raises(NotATiffError, match=rf"mem://a\.tif\?….*{message}") as caught:
        run(read_header(MemoryReader({"mem://a.tif?sig=SECRET": content}), "mem://a.tif?sig=SECRET"))
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("keep", [8, 60, 300, 500])
def test_a_header_cut_short_is_an_error(tmp_path: Path, keep: int) -> None:
    """Wherever in its header the file ends."""
    path = make_cog(tmp_path / "a.tif", np.ones((1, 200, 300), np.int16), blocksize=64)
    content = Path(path).read_bytes()[:keep]
    with pytest.raises((CorruptTiffError, FetchError), match=r"cut\.tif"):
        run(read_header(MemoryReader({"cut.tif": content}), "cut.tif"))


def test_malformed_files_raise_our_errors_after_few_requests(shared_data: Path) -> None:
    """48 broken TIFFs: a header, or a RasteretError that names the file."""
    files = sorted(p for p in (shared_data / "malformed").iterdir() if p.suffix.lower() in (".tif", ".tiff"))
    assert len(files) > 40
    for path in files:
        reader = RecordingReader(MemoryReader({path.name: path.read_bytes()}))
        message = path.name
        try:
            run(read_header(reader, path.name))
        except RasteretError as error:
            message = str(error)
        assert path.name in message
        assert len(reader.calls) <= 65, path.name
