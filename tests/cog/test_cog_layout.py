"""Tile tables from tags: as tifffile reads them; split strips keep their bytes; false claims cost nothing."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.io import MemoryFile

from rasteret_ml.cog.header.ifd import Directory, NeedBytes, SparseFile, read_directories
from rasteret_ml.cog.header.tile_layout import missing_ranges, read_tile_table
from rasteret_ml.cog.tile_table import TileTable, plan_tiles
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError
from rasteret_ml.geo.grid import Window

_SPLIT_ABOVE, _SPLIT_TO = 2**20, 2**18


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """tifffile warns about odd files."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _pages(data: bytes, size: int | None = None) -> list[Directory]:
    file = SparseFile(len(data) if size is None else size)
    file.add(0, data)
    return read_directories(file)[0]


def _tables(data: bytes) -> list[TileTable]:
    return [read_tile_table(page) for page in _pages(data)]


def _header(*, order: str = "<", **tags: int | list[int]) -> bytes:
    """A BigTIFF of one directory, tags by number (`t256=7`), all LONG8, values after the table."""
    fields = {int(name[1:]): np.atleast_1d(value) for name, value in tags.items()}
    place = 16 + 8 + 20 * len(fields) + 8
    table, extra = b"", b""
    for code, values in sorted(fields.items()):
        packed = values.astype(order + "u8").tobytes()
        inside = packed if len(packed) == 8 else struct.pack(order + "Q", place + len(extra))
        extra += b"" if len(packed) == 8 else packed
        table += struct.pack(order + "HHQ", code, 16, len(values)) + inside
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HHHQ", 43, 8, 0, 16)
    return head + struct.pack(order + "Q", len(fields)) + table + bytes(8) + extra


_GREY = {"t258": 8, "t262": 1, "t277": 1}


@st.composite
def _written(draw: st.DrawFn) -> bytes:
    """A file written by tifffile, with several pages of all kinds."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=draw(st.sampled_from("<>")), bigtiff=draw(st.booleans())) as writer:
        for _ in range(draw(st.integers(1, 3))):
            dtype = draw(st.sampled_from(["u1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "c8", "c16"]))
            height, width, samples = (
                draw(st.integers(1, 70)),
                draw(st.integers(1, 70)),
                draw(st.sampled_from([1, 3, 5])),
            )
            planar = draw(st.sampled_from(["contig", "separate"])) if samples > 1 else None
            shape = (height, width) if samples == 1 else (height, width, samples)
            shape = (samples, height, width) if planar == "separate" else shape
            codec = draw(st.sampled_from([None, "zlib", "zstd", "packbits", "lzma"]))
            options: dict[str, Any] = {"compression": codec, "photometric": "minisblack", "planarconfig": planar}
            if codec in ("zlib", "zstd") and dtype[0] in "ui":
                options["predictor"] = draw(st.sampled_from([None, 2]))
            if draw(st.booleans()):
                options["tile"] = (draw(st.sampled_from([16, 48])), draw(st.sampled_from([16, 32])))
            else:
                options["rowsperstrip"] = draw(st.integers(1, height + 5))
            options |= {"subfiletype": draw(st.sampled_from([0, 1])), "metadata": None}
            writer.write(np.random.default_rng(0).integers(0, 9, shape).astype(dtype), **options)
    return file.getvalue()


@examples(100)
@given(content=_written())
def test_tables_are_as_tifffile_reads_them(content: bytes) -> None:
    """Sizes, types, planes, codec, predictor, arrays; classic and BigTIFF, both byte orders, every page."""
    with tifffile.TiffFile(io.BytesIO(content)) as oracle:
        for table, page in zip(_tables(content), oracle.pages, strict=True):
            assert (table.width, table.height) == (page.imagewidth, page.imagelength)
            rows = min(page.rowsperstrip, page.imagelength) if not page.is_tiled else page.tilelength
            assert (table.tile_width, table.tile_height) == (page.tilewidth or page.imagewidth, rows)
            assert table.striped == (not page.is_tiled)
            assert table.dtype == page.dtype
            assert table.bits == page.bitspersample
            assert table.bits_per_sample == 0
            assert table.big_endian == (oracle.byteorder == ">")
            assert (table.compression, table.predictor) == (int(page.compression), int(page.predictor))
            assert table.samples_per_pixel == page.samplesperpixel
            assert table.planar_configuration == (int(page.planarconfig) if page.samplesperpixel > 1 else 1)
            assert table.photometric == int(page.photometric)
            assert table.extra_samples == tuple(int(v) for v in page.extrasamples)
            assert table.tile_offsets.tolist() == list(page.dataoffsets)
            assert table.tile_byte_counts.tolist() == list(page.databytecounts)
            planes = table.samples_per_pixel if table.planar_configuration == 2 else 1
            assert len(table.tile_offsets) == table.tiles_across * table.tiles_down * planes


@pytest.mark.parametrize("bits", range(1, 32))
def test_packed_samples_as_gdal_writes_them(bits: int) -> None:
    """NBITS in the smallest unsigned type that holds it; 8 and 16 bits are not packed."""
    dtype = "uint8" if bits <= 8 else "uint16" if bits <= 16 else "uint32"
    profile = {"driver": "GTiff", "width": 13, "height": 5, "count": 1, "dtype": dtype, "nbits": bits}
    with MemoryFile() as memory:
        with memory.open(**profile, crs="EPSG:32633", transform=rasterio.Affine(1, 0, 1, 0, -1, 1)) as target:
            target.write(np.ones((1, 5, 13), dtype))
        (table,) = _tables(memory.read())
    assert table.dtype == dtype
    assert table.bits == bits
    assert table.bits_per_sample == (0 if bits in (8, 16) else bits)
    assert table.row_bytes == -(-13 * bits // 8)
    assert table.tile_byte_counts.sum() == 5 * table.row_bytes


@pytest.mark.parametrize(
    ("bits", "kind", "expected"),
    [
        ([8], None, "u1"), ([8, 8], [1, 1], "u1"), ([8], [4], "u1"), ([16], [2], "i2"), ([64], [2], "i8"),
        ([16], [3], "f2"), ([24], [3], "f4"), ([32], [3], "f4"), ([64], [6], "c8"), ([128], [6], "c16"),
        ([32], [5], "c8"), ([64], [5], "c16"), (None, None, "u1"), ([12], [1], "u2"), ([24], [1], "u4"),
        ([8, 8], [4, 1], "u1"), ([16, 16], [4, 2], "i2"),
    ],
)  # fmt: skip
def test_sample_types(bits: list[int] | None, kind: list[int] | None, expected: str) -> None:
    """Samples are unsigned without SampleFormat, and have one bit without BitsPerSample."""
    samples = len(bits or [1])
    tags: dict[str, Any] = {"t256": 4, "t257": 4, "t277": samples, "t273": 4000, "t279": 4 * 4 * 16 * samples}
    tags |= ({"t258": bits} if bits else {}) | ({"t339": kind} if kind else {})
    (table,) = _tables(_header(**tags))
    assert table.dtype == np.dtype(expected)
    assert table.bits == (bits or [1])[0]


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"t258": [8, 16], "t277": 2}, "bands of different types"),
        ({"t339": [1, 3], "t277": 2}, "bands of different types"),
        ({"t258": 24, "t339": 2}, "24-bit signed samples"),
        ({"t258": 8, "t339": 3}, "8-bit float samples"),
        ({"t258": 40}, "40-bit unsigned samples"),
        ({"t258": 8, "t339": 9}, "8-bit format 9 samples"),
        ({"t32997": 3}, "an image with depth"),
        ({"t32998": 2}, "an image with depth"),
        ({"t256": 2**23, "t257": 2**23, "t322": 16, "t323": 16}, r"\d+ tiles \(limit 4194304\)"),
    ],
)
def test_what_is_not_handled(tags: dict[str, Any], words: str) -> None:
    """The message names the feature."""
    plain = {"t256": 4, "t257": 4, "t273": 4000, "t279": 16, "t324": 4000, "t325": 16} | _GREY
    with pytest.raises(UnsupportedTiffError, match=words):
        _tables(_header(**(plain | tags)))


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"t256": 0}, "the image is 0 x 4 pixels"),
        ({"t257": 2**31}, f"the image is 4 x {2**31} pixels"),
        ({"t322": 0, "t323": 16}, "the tiles are 0 x 16 pixels"),
        ({"t322": 16, "t323": 2**40}, f"the tiles are 16 x {2**40} pixels"),
        ({"t277": 0}, "0 samples"),
        ({"t277": 70000}, "70000 samples"),
        ({"t277": 3, "t284": 3}, "planar configuration 3"),
        ({"t278": 1}, "4 tiles are expected, but the header lists 1 offsets and 1 byte counts"),
        ({"t277": 3, "t284": 2}, "3 tiles are expected, but the header lists 1 offsets"),
        ({"t278": 1, "t273": [9, 9, 9, 9], "t259": 8}, "lists 4 offsets and 1 byte counts"),
    ],
)
def test_what_contradicts_itself(tags: dict[str, Any], words: str) -> None:
    """Sizes, planes and arrays."""
    with pytest.raises(CorruptTiffError, match=words):
        _tables(_header(**({"t256": 4, "t257": 4, "t273": 4000, "t279": 16} | _GREY | tags)))


def test_missing_facts_of_plain_strips() -> None:
    """Missing byte counts of uncompressed strips follow from their sizes."""
    (table,) = _tables(_header(t256=10, t257=25, t278=10, t273=[1000, 2000, 3000], **_GREY))
    assert table.tile_byte_counts.tolist() == [100, 100, 50]
    (whole,) = _tables(_header(t256=10, t257=25, t273=1000, **_GREY))
    assert (whole.tile_height, whole.tile_byte_counts.tolist()) == (25, [250])
    (wide,) = _tables(_header(t256=10, t257=25, t273=1000, t278=2**32 - 1, **_GREY))
    assert wide.tile_height == 25


def test_tiles_under_the_strip_tags() -> None:
    """Some writers store tiles under the strip tags."""
    tags = {"t256": 20, "t257": 20, "t322": 16, "t323": 16, "t273": [1, 2, 3, 4], "t279": [256] * 4}
    (table,) = _tables(_header(**tags, **_GREY))
    assert not table.striped
    assert table.tile_offsets.tolist() == [1, 2, 3, 4]


def test_arrays_longer_than_needed_are_cut() -> None:
    """Further values are ignored."""
    (table,) = _tables(_header(t256=4, t257=4, t273=[100, 0, 0], t279=[16, 5, 5], **_GREY))
    assert table.tile_offsets.tolist() == [100]
    assert table.tile_byte_counts.tolist() == [16]


@pytest.mark.parametrize("order", ["<", ">"])
def test_everything_missing_is_known_at_once(order: str) -> None:
    """Both arrays and all other values at once, to the byte, and no more values than there are tiles."""
    tags = {"t256": 100, "t257": 100, "t278": 1, "t258": [8, 8, 8], "t277": 3, "t273": [9] * 500, "t279": [300] * 500}
    content = _header(order=order, **tags)
    (page,) = _pages(content[: 16 + 8 + 20 * 7 + 8], len(content))
    wanted = missing_ranges(page)
    assert sorted(span.length for span in wanted) == [24, 800, 800]
    file = SparseFile(len(content))
    file.add(0, content[: 16 + 8 + 20 * 7 + 8])
    for span in wanted:
        file.add(span.start, content[span.start : span.stop])
    (page,), _ = read_directories(file)
    assert missing_ranges(page) == []
    assert len(read_tile_table(page).tile_offsets) == 100


@pytest.mark.parametrize(
    ("tags", "error"),
    [
        ({"t256": 2**30, "t257": 2**30, "t278": 1}, UnsupportedTiffError),
        ({"t256": 2**31, "t257": 1}, CorruptTiffError),
        ({"t256": 2**20, "t257": 2**20, "t278": 1, "t277": 60000, "t284": 2}, UnsupportedTiffError),
    ],
)
def test_absurd_claims_are_refused_before_their_arrays_are_asked_for(
    tags: dict[str, Any], error: type[Exception]
) -> None:
    """By the sizes in the directory, before anything is fetched for the arrays."""
    content = _header(**({"t273": [1] * 9, "t279": [1] * 9} | _GREY | tags))
    (page,) = _pages(content[:-144], 2**50)
    with pytest.raises(error):
        missing_ranges(page)


def test_an_array_of_gigabytes_is_never_read() -> None:
    """With a count of 2^60 and an image of one strip, eight bytes are requested."""
    content = bytearray(_header(t256=4, t257=4, t273=[100] * 9, t279=[16] * 9, **_GREY))
    for at in range(24, len(content), 20):
        if struct.unpack_from("<H", content, at)[0] in (273, 279):
            struct.pack_into("<Q", content, at + 4, 2**58)
    (page,) = _pages(bytes(content[:-144]), 2**62)
    assert [span.length for span in missing_ranges(page)] == [8, 8]
    with pytest.raises(NeedBytes):
        read_tile_table(page)
    (page,) = _pages(bytes(content), 2**62)
    assert read_tile_table(page).tile_offsets.tolist() == [100]


# --- huge plain strips ----------------------------------------------------------------------------------------------


@st.composite
def _strips(draw: st.DrawFn) -> dict[str, Any]:
    """An uncompressed image in strips, some sparse, of sizes around the limit for splitting."""
    width, samples = draw(st.integers(1, 400_000)), draw(st.sampled_from([1, 1, 3]))
    bits, planar = draw(st.sampled_from([1, 8, 16, 12, 64])), draw(st.sampled_from([1, 2]))
    row = -(-width * bits * (samples if planar == 1 else 1) // 8)
    high = max(1, min(5000, 3 * 2**21 // row))
    height = draw(st.integers(1, high))
    rows = draw(st.one_of(st.just(height), st.integers(1, height)))
    down = -(-height // rows)
    total = down * (samples if planar == 2 else 1)
    sparse = draw(st.sets(st.integers(0, total - 1), max_size=min(3, total)))
    starts = np.cumsum([8 if i in sparse else 8 + row * rows for i in range(total)]) + 10**6
    sizes = [row * min(rows, height - i % down * rows) for i in range(total)]
    return {
        "t256": width, "t257": height, "t258": [bits] * samples, "t262": 1, "t277": samples, "t278": rows,
        "t284": planar, "t273": [0 if i in sparse else int(starts[i]) for i in range(total)],
        "t279": [0 if i in sparse else sizes[i] for i in range(total)],
    }  # fmt: skip


@examples(200)
@given(tags=_strips())
def test_dividing_strips_covers_the_same_bytes_exactly_once(tags: dict[str, Any]) -> None:
    """Every row keeps its bytes, sparse strips stay sparse, and new strips are small or a single row."""
    (table,) = _tables(_header(**tags))
    height, rows = tags["t257"], tags["t278"]
    planes = table.samples_per_pixel if table.planar_configuration == 2 else 1
    divided = table.row_bytes * rows > _SPLIT_ABOVE
    assert (table.tile_height == rows) or divided
    if divided:
        assert table.tile_height * table.row_bytes <= max(_SPLIT_TO, table.row_bytes)
    assert table.tiles_across == 1
    offsets = table.tile_offsets.reshape(planes, -1)
    counts = table.tile_byte_counts.reshape(planes, -1)
    assert offsets.shape[1] == table.tiles_down
    was = np.array(tags["t273"]).reshape(planes, -1)
    row = np.arange(height)
    ours = np.where(counts > 0, offsets, 0)[:, row // table.tile_height]
    ours = np.where(ours > 0, ours + row % table.tile_height * table.row_bytes, 0)
    theirs = was[:, row // rows]
    theirs = np.where(theirs > 0, theirs + row % rows * table.row_bytes, 0)
    np.testing.assert_array_equal(ours, theirs)
    assert counts.sum() == np.sum(tags["t279"])
    part = [table.stored_rows(i) * table.row_bytes for i in range(table.tiles_down)]
    assert ((counts == part) | (counts == 0)).all()


def test_a_divided_strip_is_read_by_the_rows_asked_for() -> None:
    """Ten rows of a strip of 20 000."""
    (table,) = _tables(_header(t256=60_000, t257=20_000, t273=1000, t279=60_000 * 20_000, **_GREY))
    reads = plan_tiles(table, Window(row=9_998, col=0, height=10, width=100))
    assert sum(read.range.length for read in reads if read.range) <= 16 * 60_000
    assert reads[0].range is not None
    assert reads[0].range.start == 1000 + 60_000 * (9_998 // table.tile_height * table.tile_height)


@pytest.mark.parametrize(
    "tags",
    [{"t259": 8}, {"t259": 32773}, {"t262": 6, "t277": 3}, {"t322": 2048, "t323": 1024}],
    ids=["deflate", "packbits", "YCbCr", "a tile"],
)
def test_what_stays_whole(tags: dict[str, Any]) -> None:
    """Only complete uncompressed strips are split."""
    plain = {"t256": 2048, "t257": 1024, "t273": 1000, "t279": 2**21, "t324": 1000, "t325": 2**21}
    (table,) = _tables(_header(**(plain | _GREY | tags)))
    assert table.tile_height == 1024
    assert len(table.tile_offsets) == 1


@pytest.mark.parametrize("count", [0, 100, 2**21 - 1])
def test_a_lone_plain_strip_needs_no_byte_count(count: int) -> None:
    """As libtiff, a count that is missing or too small is replaced by the known size."""
    (table,) = _tables(_header(t256=2048, t257=1024, t273=1000, t279=count, **_GREY))
    assert int(table.tile_byte_counts.sum()) == 2**21
