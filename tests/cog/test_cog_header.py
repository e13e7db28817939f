"""Headers: as rasterio reads them, however their bytes arrive, and from broken files."""

from __future__ import annotations

import io
import logging
import math
import struct
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from whole_file import header_of, read_bands, read_image

from rasteret_ml.cog.header.gdal_tags import parse_nodata
from rasteret_ml.cog.header.ifd import NeedBytes, SparseFile
from rasteret_ml.cog.header.parse import CogHeader, parse_header
from rasteret_ml.errors import DataError, NotATiffError
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.testing import make_cog

TRANSFORM = Affine(10, 0, 500000, 0, -10, 5000000)


@pytest.fixture(scope="module")
def cog(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three bands with mask, nodata, overviews, descriptions, scale and offset."""
    path = tmp_path_factory.mktemp("cog") / "a.tif"
    rng = np.random.default_rng(0)
    data = rng.integers(0, 9999, (3, 600, 500)).astype(np.uint16)
    mask = rng.random((600, 500)) > 0.3
    make_cog(path, data, blocksize=128, mask=mask, descriptions=("B02", "", "B04"))
    return path.read_bytes()


def _facts(header: CogHeader) -> str:
    """Everything that a Collection stores of every band."""
    with np.printoptions(threshold=10**6):
        return repr(
            [header.band(i).to_struct() | {"crs": header.crs, "band": header.bands[i]} for i in range(header.count)]
        )


def _sample_files(cog: bytes) -> dict[str, bytes]:
    planar, big = io.BytesIO(), io.BytesIO()
    rgb = np.arange(3 * 90 * 70, dtype=np.uint16).reshape(3, 90, 70)
    tifffile.imwrite(planar, rgb, photometric="rgb", planarconfig="separate", tile=(16, 16), bigtiff=True)
    tifffile.imwrite(big, rgb[0], byteorder=">", rowsperstrip=1, compression="deflate")
    return {"cog": cog, "planar-bigtiff": planar.getvalue(), "big-endian-strips": big.getvalue()}


@pytest.mark.parametrize("name", ["cog", "planar-bigtiff", "big-endian-strips"])
@examples(25)
@given(data=st.data())
def test_a_header_does_not_depend_on_how_its_bytes_arrive(name: str, cog: bytes, data: st.DataObject) -> None:
    """The same header from any prefix, any excess around each fetched range and stray extents."""
    content = _sample_files(cog)[name]
    size = len(content)
    file = SparseFile(size)
    for _ in range(data.draw(st.integers(0, 3), label="stray extents")):
        start = data.draw(st.integers(0, size - 1))
        file.add(start, content[start : start + data.draw(st.integers(1, 500))])
    before, after = data.draw(st.integers(0, 300)), data.draw(st.integers(0, 3000))
    for _ in range(2000):
        try:
            header = parse_header(file)
            break
        except NeedBytes as need:
            asked = need.ranges
        for span in asked:
            assert span.stop <= size
            start = max(0, span.start - before)
            file.add(start, content[start : span.stop + after])
    else:
        pytest.fail("the header asks for ever")
    assert _facts(header) == _facts(header_of(content))


def test_a_cog_header_needs_few_requests(cog: bytes) -> None:
    """A first request of 16 KiB contains the whole header of a COG."""
    file = SparseFile(len(cog))
    file.add(0, cog[: 16 * 1024])
    assert parse_header(file).count == 3


def test_facts_equal_rasterio(cog: bytes) -> None:
    """Size, tiles, type, transform, CRS, overviews, mask, descriptions: as rasterio reads the same file."""
    header = header_of(cog)
    with MemoryFile(cog) as memory, memory.open() as dataset:
        assert (header.image.width, header.image.height, header.count) == (dataset.width, dataset.height, dataset.count)
        assert {(header.image.tile_height, header.image.tile_width)} == set(dataset.block_shapes)
        assert header.image.dtype == dataset.dtypes[0]
        assert header.transform == dataset.transform
        assert header.crs == crs_text(dataset.crs)
        levels = len(dataset.overviews(1))
        assert [b.description or None for b in header.bands] == list(dataset.descriptions)
        assert header.mask is not None
        found = read_image(cog, header.mask).values[..., 0]
        assert np.array_equal(found != 0, dataset.read_masks(1) != 0)
    assert levels == len(header.overviews) == len(header.overview_masks) == 3


@pytest.mark.parametrize("level", [0, 1, 2])
def test_masks_of_overviews_lie_with_them(cog: bytes, level: int) -> None:
    """Each overview's pixels and mask equal rasterio's of that level."""
    header = header_of(cog)
    with MemoryFile(cog) as memory, memory.open(overview_level=level) as dataset:
        pixels = read_image(cog, header.overviews[level]).values
        mask = read_image(cog, header.overview_masks[level]).values[..., 0]
        assert np.array_equal(np.moveaxis(pixels, -1, 0), dataset.read())
        assert np.array_equal(mask != 0, dataset.read_masks(1) != 0)


def _write(**facts: Any) -> bytes:
    count, dtype = facts.pop("count", 1), facts.pop("dtype", "uint8")
    profile = {"driver": "GTiff", "width": 40, "height": 30, "count": count, "dtype": dtype, "crs": "EPSG:32633"}
    after = facts.pop("after", None)
    with MemoryFile() as memory:
        with memory.open(**(profile | {"transform": TRANSFORM} | facts)) as dataset:
            dataset.write(np.ones((count, 30, 40), dtype))
            if after is not None:
                after(dataset)
        return memory.read()


def test_scale_and_offset_are_facts_of_each_band() -> None:
    """GDAL's scale and offset per band; None if a band has none."""

    def after(dataset) -> None:
        dataset.scales, dataset.offsets = (0.5, 1.0), (-3.0, 0.0)

    header = header_of(_write(count=2, after=after))
    assert (header.band(0).scale, header.band(0).offset) == (0.5, -3.0)
    assert (header.band(1).scale or 1.0, header.band(1).offset or 0.0) == (1.0, 0.0)
    assert (header_of(_write()).band(0).scale, header_of(_write()).band(0).offset) == (None, None)


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("uint8", 0), ("uint8", 255), ("int16", -32768), ("uint32", 2**32 - 1), ("float32", -9999.0),
        ("float32", float("nan")), ("float64", 1e300), ("float32", float("inf")), ("float32", -3.4028234663852886e38),
        ("int8", -128), ("float64", 0.1),
    ],
)  # fmt: skip
def test_nodata_equals_rasterio(dtype: str, nodata: float) -> None:
    """As a number of the pixels' kind: integers stay integers."""
    content = _write(dtype=dtype, nodata=nodata)
    found = header_of(content).nodata
    with MemoryFile(content) as memory, memory.open() as dataset:
        expected = dataset.nodata
    assert found == expected or (math.isnan(found) and math.isnan(expected))
    assert isinstance(found, int if np.dtype(dtype).kind in "iu" else float)


@pytest.mark.parametrize(
    ("text", "dtype", "value"),
    [
        ("-9223372036854775808", "int64", -(2**63)),
        ("18446744073709551615", "uint64", 2**64 - 1),
        ("9007199254740993", "int64", 2**53 + 1),
        (" 5\0", "uint8", 5),
        ("5.0", "uint8", 5),
        ("1e3", "int16", 1000),
        ("2.5", "uint8", 2),
        ("-inf", "float32", -math.inf),
        ("nan", "uint8", None),
        ("", "uint8", None),
        (None, "uint8", None),
        ("none", "float32", None),
        ("n/a", "int16", None),
    ],
)
def test_parse_nodata(text: str | None, dtype: str, value: float | None) -> None:
    """Exact for 64-bit integers, None if it is not a number."""
    found = parse_nodata(text, np.dtype(dtype))
    assert type(found) is type(value)
    assert found == value or (isinstance(found, float) and math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1.#INF", -math.inf),
        ("1.#INF", math.inf),
        ("1.#QNAN", math.nan),
        ("-1.#QNAN", math.nan),
        ("-1.#IND", math.nan),
    ],
)
def test_nodata_of_old_windows_writers(text: str, value: float) -> None:
    """Microsoft's spelling of infinity and NaN, which GDAL reads (`CPLStrtod`) and its Windows builds once wrote."""
    found = parse_nodata(text, np.dtype(np.float32))
    assert found is not None
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\n <html>", "HTML"),
        (b"<?xml version='1.0'?><Error>", "XML"),
        (b"<Error><Code>AccessDenied", "XML"),
        (b'{"detail": "no"}', "JSON"),
        (b"\x89PNG\r\n\x1a\n0000", "PNG"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
        (b"PK\x03\x04", "ZIP"),
        (b"hello", "hello"),
        (b"II*", "II"),
    ],
)
def test_what_is_no_tiff_is_named(content: bytes, word: str) -> None:
    """An error page, an image, an empty file: the message says what it looks like."""
    with pytest.raises(NotATiffError, match=word):
        header_of(content)


@examples(60)
@given(data=st.data())
def test_a_truncated_file_is_an_error_or_whole(cog: bytes, data: st.DataObject) -> None:
    """A file truncated anywhere gives the whole file's header or our error; nothing is requested past its end."""
    whole = _sample_files(cog)[data.draw(st.sampled_from(["cog", "big-endian-strips", "planar-bigtiff"]))]
    content = whole[: data.draw(st.integers(0, min(len(whole), 20_000)))]
    try:
        header = header_of(content)
    except DataError:
        return
    assert _facts(header) == _facts(header_of(whole))


@examples(150)
@given(data=st.data())
def test_a_damaged_header_is_an_error_of_ours(cog: bytes, data: st.DataObject) -> None:
    """Bytes of the directories changed at random: pixels, or a DataError, never another exception."""
    name = data.draw(st.sampled_from(["cog", "planar-bigtiff", "big-endian-strips"]))
    content = bytearray(_sample_files(cog)[name])
    head = 1500 if name == "cog" else len(content)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(4, head - 1))] = data.draw(st.integers(0, 255))
    try:
        header = header_of(bytes(content))
        if header.image.width * header.image.height * header.count < 2_000_000:
            read_bands(bytes(content))
    except DataError:
        return


@pytest.mark.parametrize("count", [1, 3])
def test_a_directory_that_points_at_itself_ends(count: int) -> None:
    """Circular image directories are read once."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for _ in range(count):
            writer.write(np.zeros((8, 8), np.uint8), metadata=None)
    content = bytearray(file.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(content))) as tiff:
        last = tiff.pages[-1]
        after = last.offset + 2 + 12 * struct.unpack_from("<H", content, last.offset)[0]
        struct.pack_into("<I", content, after, tiff.pages[0].offset)
    header = header_of(bytes(content))
    assert (header.image.width, header.overviews) == (8, ())


def test_other_pages_are_no_overviews() -> None:
    """Pages that are not marked as reduced (a stack of images) are ignored; the first is the image."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for size in (32, 16, 48):
            writer.write(np.full((size, size), size, np.uint8), metadata=None)
    header = header_of(file.getvalue())
    assert header.image.width == 32
    assert header.overviews == ()
    assert header.mask is None


def test_bands_of_different_types_are_refused() -> None:
    """TIFF allows it, but one array cannot hold them; the message says so."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((16, 16, 3), np.uint8), photometric="rgb", metadata=None)
    old, new = struct.pack("<HHH", 8, 8, 8), struct.pack("<HHH", 8, 16, 8)
    assert file.getvalue().count(old) == 1
    with pytest.raises(DataError, match="different types"):
        header_of(file.getvalue().replace(old, new))


def test_nothing_is_logged_while_parsing(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged for odd tags, and loggers of other libraries keep working."""
    content = _write().replace(b"\x01\x01\x03\x00\x01\x00\x00\x00", b"\x01\x01\x63\x00\x01\x00\x00\x00", 1)
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(DataError):
            header_of(content)
        assert not [r for r in caplog.records if r.name.startswith("tifffile")]
        logging.getLogger("tifffile").error("of somebody else")
    assert "of somebody else" in caplog.text


def test_planar_bands_keep_their_own_tiles() -> None:
    """Each band of a planar file gets its own plane of offsets; together they are all offsets."""
    content = _write(count=3, interleave="band", tiled=True, blockxsize=16, blockysize=16)
    header = header_of(content)
    planes = [header.band(i).image for i in range(3)]
    assert all(len(p.tile_offsets) == p.tiles_across * p.tiles_down == 6 for p in planes)
    assert np.array_equal(np.concatenate([p.tile_offsets for p in planes]), header.image.tile_offsets)


def test_sparse_files() -> None:
    """SPARSE_OK stores no empty tiles: they are known to be sparse, and stored tiles are correct."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=64, height=64, count=1, dtype="uint8", crs="EPSG:32633", transform=TRANSFORM,
            tiled=True, blockxsize=16, blockysize=16, sparse_ok=True,
        ) as dataset:  # fmt: skip
            dataset.write(np.full((16, 32), 7, np.uint8), 1, window=rasterio.windows.Window(16, 32, 32, 16))
        found = read_bands(memory.read())
    assert found.stored.sum() == 16 * 32
    assert (found.values[32:48, 16:48, 0] == 7).all()


def test_overviews_of_a_plain_geotiff() -> None:
    """Overviews that gdaladdo appends after the image are found and sorted, largest first."""

    def after(dataset) -> None:
        dataset.build_overviews([2, 4], Resampling.nearest)

    header = header_of(_write(after=after))
    assert [(t.width, t.height) for t in header.overviews] == [(20, 15), (10, 8)]
