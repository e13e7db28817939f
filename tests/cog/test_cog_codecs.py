"""Every codec, layout and type against GDAL's pixels (written and read back by rasterio), bit for bit."""

from __future__ import annotations

import io
import itertools
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.shutil import copy as gdal_copy
from whole_file import header_of, read_band, read_bands

from rasteret_ml.cog.codecs import decode_tile
from rasteret_ml.cog.metadata import TileTable
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError

TRANSFORM = Affine(10, 0, 500000, 0, -10, 5000000)
INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
FLOATS = ["float32", "float64"]
COMPLEX = ["complex64", "complex128"]
WITH_PREDICTOR = ["deflate", "lzw", "zstd"]


def _pixels(dtype: str, count: int = 3, shape: tuple[int, int] = (37, 45), seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth with noise, over the type's whole range, so that predictors wrap around."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind in "iu":
        limits = np.iinfo(dtype)
        noise = rng.integers(limits.min, limits.max, (count, *shape), dtype=dtype, endpoint=True)
        ramp = np.broadcast_to(np.arange(shape[1]), noise.shape).astype(dtype)
        return np.where(rng.random(noise.shape) < 0.5, noise, ramp)
    values = rng.normal(0, 1e3, (count, *shape)).astype(dtype)
    return values + 1j * values[:, ::-1].astype(dtype) if kind == "c" else values


def _gtiff(data: np.ndarray[Any, Any], **creation: Any) -> tuple[bytes, np.ndarray[Any, Any]]:
    """A GeoTIFF of `data` as GDAL writes it, and GDAL's pixels of it `[h, w, bands]`."""
    profile = {"driver": "GTiff", "count": len(data), "height": data.shape[1], "width": data.shape[2]}
    profile |= {"dtype": data.dtype.name, "crs": "EPSG:32633", "transform": TRANSFORM}
    with MemoryFile() as memory:
        with memory.open(**(profile | creation)) as dataset:
            dataset.write(data)
        with memory.open() as dataset:
            return memory.read(), np.moveaxis(dataset.read(), 0, -1)


def _assert_same(content: bytes, expected: np.ndarray[Any, Any]) -> None:
    """All bands at once, and each band by its own metadata, equal `expected`."""
    found = read_bands(content)
    assert found.stored.all()
    assert found.values.dtype == expected.dtype
    assert np.array_equal(found.values, expected, equal_nan=expected.dtype.kind in "fc")
    header = header_of(content)
    assert header.count == expected.shape[-1]
    last = read_band(content, header, header.count - 1).values[..., 0]
    assert np.array_equal(last, expected[..., -1], equal_nan=expected.dtype.kind in "fc")


LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": 16, "blockysize": 16},
    "striped": {"tiled": False, "blockysize": 8},
}
MATRIX = [
    (codec, predictor, dtype)
    for codec in ("none", "lzma", "packbits", *WITH_PREDICTOR)
    for predictor in ((1, 2, 3) if codec in WITH_PREDICTOR else (1,))
    for dtype in (INTEGERS + FLOATS + COMPLEX if predictor == 1 else INTEGERS + FLOATS if predictor == 2 else FLOATS)
]


@pytest.mark.parametrize(("codec", "predictor", "dtype"), MATRIX)
def test_lossless_codecs(codec: str, predictor: int, dtype: str) -> None:
    """Tiled and striped, pixel- and band-interleaved, sizes that no tile divides."""
    data = _pixels(dtype)
    for layout, interleave in itertools.product(LAYOUTS.values(), ("pixel", "band")):
        creation = layout | {"interleave": interleave}
        if codec != "none":
            creation["compress"] = codec
        if predictor > 1:
            creation["predictor"] = predictor
        content, expected = _gtiff(data, **creation)
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
        _assert_same(content, expected)


@pytest.mark.parametrize("codec", ["lerc", "lerc_deflate", "lerc_zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_lerc(codec: str, dtype: str) -> None:
    """Lossless LERC, with or without a second codec around it."""
    for layout, interleave in itertools.product(LAYOUTS.values(), ("pixel", "band")):
        content, expected = _gtiff(_pixels(dtype), compress=codec, max_z_error=0, interleave=interleave, **layout)
        _assert_same(content, expected)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_lossy_lerc_equals_gdal(dtype: str) -> None:
    """What the encoder lost is lost for both: the decoded pixels are the same."""
    content, expected = _gtiff(_pixels(dtype), compress="lerc", max_z_error=2, **LAYOUTS["tiled"])
    _assert_same(content, expected)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_lerc_says_where_nan_was(interleave: str) -> None:
    """LERC stores NaN as a mask: a pixel is valid exactly where GDAL gives a number."""
    data = _pixels("float32", count=2)
    data[:, 5:9, 3:30] = np.nan
    content, expected = _gtiff(data, compress="lerc", max_z_error=0, interleave=interleave, **LAYOUTS["tiled"])
    header = header_of(content)
    for band in range(2):
        found = read_band(content, header, band)
        holes = np.isnan(expected[..., band])
        assert holes.sum() == 4 * 27
        assert np.array_equal(found.valid[..., 0] & ~np.isnan(found.values[..., 0]), ~holes)
        assert np.array_equal(found.values[..., 0][~holes], expected[..., band][~holes])


def test_lerc_bands_may_differ_in_where_they_are_nan() -> None:
    """A hole in one interleaved band is not a hole in the other, and never a made-up number."""
    data = _pixels("float32", count=2)
    data[0, 2:6, 2:6] = np.nan
    data[1, 10:12, 20:30] = np.nan
    content, expected = _gtiff(data, compress="lerc", max_z_error=0, interleave="pixel", **LAYOUTS["tiled"])
    header = header_of(content)
    for band in range(2):
        found, holes = read_band(content, header, band), np.isnan(expected[..., band])
        usable = found.valid[..., 0] & ~np.isnan(found.values[..., 0])
        assert np.array_equal(usable, ~holes)
        assert np.array_equal(found.values[..., 0][usable], expected[..., band][usable])


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5, 7, 9, 10, 12, 15, 17, 24, 31])
@pytest.mark.parametrize("compress", [{}, {"compress": "deflate"}], ids=["none", "deflate"])
def test_odd_bit_widths(nbits: int, compress: dict[str, str]) -> None:
    """Samples of 1 to 31 bits, rows padded to a byte, in every layout."""
    dtype = "uint8" if nbits <= 8 else "uint16" if nbits <= 16 else "uint32"
    data = np.random.default_rng(nbits).integers(0, 2**nbits, (3, 37, 45)).astype(dtype)
    for layout, interleave in itertools.product(LAYOUTS.values(), ("pixel", "band")):
        content, expected = _gtiff(data, nbits=nbits, interleave=interleave, **layout, **compress)
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
        _assert_same(content, expected)


def test_reversed_bit_order() -> None:
    """Fill order 2 (old scanners): bits of every byte reversed before anything else."""
    data = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, data, rowsperstrip=8, metadata=None, extratags=[(65000, "H", 1, 2, True)])
    content = file.getvalue().replace(struct.pack("<HHIH", 65000, 3, 1, 2), struct.pack("<HHIH", 266, 3, 1, 2))
    assert header_of(content).image.fill_order == 2
    assert np.array_equal(read_bands(content).values[..., 0], imagecodecs.bitorder_decode(data))


BIG = [
    (codec, predictor, dtype)
    for codec, predictor in itertools.product([None, "deflate", "zstd", "lzw", "packbits", "lzma"], [1, 2, 3])
    for dtype in ("uint8", "uint16", "int16", "uint32", "int64", "float16", "float32", "float64", "complex64")
    if predictor == 1 or (codec in WITH_PREDICTOR and predictor == {"f": 3, "c": 0}.get(np.dtype(dtype).kind, 2))
]


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(("codec", "predictor", "dtype"), BIG)
def test_both_byte_orders(codec: str | None, predictor: int, dtype: str, byteorder: str) -> None:
    """Files of tifffile in either byte order (float16 too), chunky and planar, equal the array written."""
    data = np.moveaxis(_pixels(dtype), 0, -1)
    for planar, tile in itertools.product(("contig", "separate"), ((16, 32), None)):
        stored = data if planar == "contig" else np.moveaxis(data, -1, 0)
        file = io.BytesIO()
        tifffile.imwrite(
            file, stored, byteorder=byteorder, bigtiff=tile is None, photometric="minisblack", planarconfig=planar,
            tile=tile, rowsperstrip=None if tile else 10, compression=codec, predictor=predictor > 1 and predictor,
            metadata=None,
        )  # fmt: skip
        table = header_of(file.getvalue()).image
        assert (table.big_endian, table.predictor) == (byteorder == ">", predictor)
        assert table.planar_configuration == (1 if planar == "contig" else 2)
        _assert_same(file.getvalue(), data)


@pytest.mark.parametrize("endianness", ["LITTLE", "BIG"])
@pytest.mark.parametrize(
    ("dtype", "predictor"),
    [("uint16", 1), ("int16", 2), ("uint32", 2), ("int64", 2), ("float32", 2), ("float64", 2), ("float32", 3),
     ("float64", 3), ("complex64", 1)],
)  # fmt: skip
def test_gdal_writes_both_byte_orders(endianness: str, dtype: str, predictor: int) -> None:
    """The same from GDAL's writer, which also takes differences of floats' bits (predictor 2)."""
    content, expected = _gtiff(
        _pixels(dtype), endianness=endianness, compress="deflate", predictor=predictor, **LAYOUTS["tiled"]
    )
    assert header_of(content).image.big_endian == (endianness == "BIG")
    _assert_same(content, expected)


def _photo(count: int) -> np.ndarray[Any, Any]:
    """Smooth colours, so that lossy codecs lose little."""
    y, x = np.mgrid[0:70, 0:90]
    bands = [127 + 90 * np.sin(x / (9 + 3 * k)) * np.cos(y / (11 + 2 * k)) for k in range(count)]
    return np.stack(bands).astype(np.uint8)


@pytest.mark.parametrize(
    ("count", "creation"),
    [
        (1, {}),
        (3, {"photometric": "RGB"}),
        (3, {"photometric": "YCBCR"}),
        (3, {"photometric": "RGB", "interleave": "band"}),
        (3, {"photometric": "MINISBLACK"}),
        (4, {"photometric": "RGB"}),
        (2, {}),
    ],
    ids=["gray", "rgb", "ycbcr", "planar", "three-gray", "rgba", "two"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tables", [0, 1, 3])
def test_jpeg(count: int, creation: dict[str, str], layout: str, tables: int) -> None:
    """Tables in the header or in each tile. Equal to GDAL; converted colours to imagecodecs (libjpegs differ there)."""
    block = {"tiled": True, "blockxsize": 32, "blockysize": 32} if layout == "tiled" else {"blockysize": 16}
    content, expected = _gtiff(_photo(count), compress="jpeg", jpegtablesmode=tables, quality=90, **block, **creation)
    found = read_bands(content)
    assert (header_of(content).image.jpeg_tables is not None) == (tables > 0)
    if creation.get("photometric") != "YCBCR":
        assert np.array_equal(found.values, expected)
    else:
        assert np.abs(found.values.astype(int) - expected).max() <= 30
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            assert np.array_equal(found.values, tiff.asarray())


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("lossless", [True, False])
def test_webp(count: int, lossless: bool) -> None:
    """RGB and RGBA tiles equal GDAL's; lossless ones equal what was written."""
    data = _photo(count)
    content, expected = _gtiff(
        data, compress="webp", webp_lossless=lossless, tiled=True, blockxsize=32, blockysize=32, interleave="pixel",
        photometric="RGB",
    )  # fmt: skip
    if lossless and count == 3:
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
    _assert_same(content, expected)


def test_webp_opaque_alpha_comes_back() -> None:
    """The encoder drops an alpha band that is 255 everywhere; it is there again after decoding."""
    data = _photo(4)
    data[3] = 255
    content, expected = _gtiff(
        data, compress="webp", webp_lossless=True, tiled=True, blockxsize=32, blockysize=32, interleave="pixel"
    )
    assert (expected[..., 3] == 255).all()
    _assert_same(content, expected)


COG_CODECS = ["none", "deflate", "lzw", "zstd", "lzma", "lerc", "lerc_deflate", "lerc_zstd", "jpeg", "webp"]


@pytest.mark.parametrize("codec", COG_CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_the_cog_driver(codec: str, dtype: str, tmp_path) -> None:
    """GDAL's COG driver (overviews, leaders, predictors by type): full resolution and every overview."""
    if codec in ("jpeg", "webp") and dtype != "uint8":
        return
    data = _photo(3) if codec in ("jpeg", "webp") else _pixels(dtype, shape=(300, 280))
    options = {"blocksize": 128, "compress": codec}
    if codec in WITH_PREDICTOR:
        options["predictor"] = "yes"
    path = tmp_path / "a.tif"
    profile = {"driver": "GTiff", "count": 3, "dtype": dtype, "height": data.shape[1], "width": data.shape[2]}
    with MemoryFile() as memory:
        with memory.open(**profile, crs="EPSG:32633", transform=TRANSFORM) as dataset:
            dataset.write(data)
        with memory.open() as dataset:
            gdal_copy(dataset, str(path), driver="COG", **options)
    content = path.read_bytes()
    header = header_of(content)
    with rasterio.open(path) as dataset:
        levels = len(dataset.overviews(1))
        full = np.moveaxis(dataset.read(), 0, -1)
    assert len(header.overviews) == levels
    assert levels > 0 or codec in ("jpeg", "webp")
    limit = 30 if codec == "jpeg" else 0
    assert np.abs(read_bands(content).values.astype(float) - full).max() <= limit
    for level in range(levels):
        with rasterio.open(path, overview_level=level) as dataset:
            expected = dataset.read(2)
        found = read_band(content, _Level(header, level), 1).values[..., 0]
        assert np.array_equal(found, expected)


class _Level:
    """An overview where `read_band` expects a header."""

    def __init__(self, header: Any, level: int) -> None:
        self._header, self._level = header, level

    def band(self, index: int) -> Any:
        class Band:
            image = self._header.band(index).overviews[self._level]

        return Band


def _encoded(codec: str, data: np.ndarray[Any, Any]) -> bytes:
    encode = {
        "deflate": imagecodecs.zlib_encode,
        "zstd": imagecodecs.zstd_encode,
        "lzw": imagecodecs.lzw_encode,
        "packbits": imagecodecs.packbits_encode,
        "lzma": imagecodecs.lzma_encode,
        "none": bytes,
    }
    return bytes(encode[codec](data.tobytes()))


@pytest.mark.parametrize("codec", ["deflate", "zstd", "lzw", "packbits", "lzma"])
@pytest.mark.parametrize("rows", [20, 17, 31])
def test_a_last_strip_that_is_padded_to_full_height(codec: str, rows: int) -> None:
    """Some writers store a whole strip where the image needs a part of one; GDAL reads these, so do we.

    20 rows in strips of 16: the last one holds 16 rows, 4 of the image (as `utmsmall_near.tiff` of GDAL's tests).
    """
    data = np.random.default_rng(0).integers(0, 9, (32, 50)).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(
        file, iter([_encoded(codec, data[:16]), _encoded(codec, data[16:])]), shape=(rows, 50), dtype="u1",
        rowsperstrip=16, compression=codec, metadata=None,
    )  # fmt: skip
    with warnings.catch_warnings(), MemoryFile(file.getvalue()) as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open() as dataset:
            assert np.array_equal(dataset.read(1), data[:rows])
    assert np.array_equal(read_bands(file.getvalue()).values[..., 0], data[:rows])


def _table(dtype: str, shape: tuple[int, int], samples: int = 1, **facts: Any) -> TileTable:
    one = np.array([8], np.int64)
    return TileTable(
        width=shape[1], height=shape[0], tile_width=shape[1], tile_height=shape[0], dtype=np.dtype(dtype),
        tile_offsets=one, tile_byte_counts=one, samples_per_pixel=samples, **facts,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    samples=st.integers(1, 4),
    big_endian=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float_predictor_equals_imagecodecs(dtype, rows, width, samples, big_endian: bool, seed: int) -> None:
    """The fast path gives what `floatpred_decode` gives on arbitrary bits, NaN payloads included."""
    item = np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width, samples * item)).astype(np.uint8)
    order = ">" if big_endian else "<"
    encoded = raw.view(f"{order}f{item}").reshape(rows, width, samples)
    expected = imagecodecs.floatpred_decode(encoded, axis=-2).astype(dtype)
    table = _table(dtype, (rows, width), samples, predictor=3, big_endian=big_endian)
    found, valid = decode_tile(raw.tobytes(), table, rows)
    assert valid is None
    assert found.dtype == dtype
    assert np.array_equal(found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float32"]),
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    samples=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_horizontal_predictor_is_a_running_sum(dtype, rows, width, samples, seed: int) -> None:
    """Differences along a row, sample by sample, wrapping in the sample's width (TIFF 6.0, section 14)."""
    unsigned = f"u{np.dtype(dtype).itemsize}"
    limits = np.iinfo(unsigned)
    deltas = np.random.default_rng(seed).integers(0, limits.max, (rows, width, samples), unsigned, endpoint=True)
    expected = np.cumsum(deltas, axis=1, dtype=unsigned)
    found, _ = decode_tile(deltas.tobytes(), _table(dtype, (rows, width), samples, predictor=2), rows)
    assert found.dtype == dtype
    assert np.array_equal(found.view(unsigned), expected)


def test_threads_do_not_share_scratch() -> None:
    """Tiles decoded at once in eight threads are those that one thread decodes."""
    datas = [_pixels("float32", seed=i) for i in range(8)]
    contents = [_gtiff(d, compress="deflate", predictor=3, **LAYOUTS["tiled"])[0] for d in datas]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for data, found in zip(datas, pool.map(read_bands, contents), strict=True):
                assert np.array_equal(found.values, np.moveaxis(data, 0, -1))


CODES = {"none": 1, "deflate": 8, "lzw": 5, "packbits": 32773, "lzma": 34925, "zstd": 50000}


@pytest.mark.parametrize("codec", CODES)
def test_a_short_tile_is_an_error(codec: str) -> None:
    """Too few bytes are corrupt, never padded in silence (LZW and PackBits come short without a word)."""
    data = np.random.default_rng(0).integers(0, 9, (15, 16)).astype(np.uint8)
    with pytest.raises(CorruptTiffError):
        decode_tile(_encoded(codec, data), _table("uint8", (16, 16), compression=CODES[codec]), 16)


@pytest.mark.parametrize("codec", [*CODES.values(), 7, 34887, 50001, 32946])
@pytest.mark.parametrize("junk", [b"", b"\0", b"x\x9c", b"(\xb5/\xfd", b"Lerc2 ", b"RIFF", bytes(range(200))])
def test_junk_is_an_error_of_ours(codec: int, junk: bytes) -> None:
    """Bytes that no codec can decode: CorruptTiffError, whatever the codec raises."""
    with pytest.raises(CorruptTiffError):
        decode_tile(junk, _table("uint8", (16, 16), compression=codec), 16)


@pytest.mark.parametrize("codec", ["jpeg", "webp", "lerc"])
def test_a_tile_of_the_wrong_size_is_an_error(codec: str) -> None:
    """A picture smaller than the tile, or with other samples, is corrupt."""
    block = {"tiled": True, "blockxsize": 32, "blockysize": 32, "interleave": "pixel"}
    content, _ = _gtiff(_photo(3), compress=codec, **block)
    table = header_of(content).image
    start, count = int(table.tile_offsets[0]), int(table.tile_byte_counts[0])
    tile = content[start : start + count]
    facts = {"compression": table.compression, "jpeg_tables": table.jpeg_tables, "photometric": table.photometric}
    assert decode_tile(tile, _table("uint8", (32, 32), 3, **facts), 32)[0].shape == (32, 32, 3)
    for shape, samples in (((64, 32), 3), ((32, 64), 3), ((32, 32), 1)):
        with pytest.raises(CorruptTiffError):
            decode_tile(tile, _table("uint8", shape, samples, **facts), shape[0])


@pytest.mark.parametrize(
    ("creation", "name"),
    [
        ({"compress": "ccittfax4", "nbits": 1, "photometric": "MINISWHITE"}, "CCITT"),
        ({"photometric": "CMYK", "count": 4}, "CMYK"),
        ({"dtype": "complex_int16"}, "complex integer"),
    ],
    ids=["ccitt", "cmyk", "cint16"],
)
def test_what_is_not_supported_is_named(creation: dict[str, Any], name: str) -> None:
    """Refused when the header is read, with the feature's name."""
    count = creation.pop("count", 1)
    dtype = creation.pop("dtype", "uint8")
    profile = {"driver": "GTiff", "width": 32, "height": 32, "count": count, "dtype": dtype}
    with MemoryFile() as memory:
        with memory.open(**profile, crs="EPSG:32633", transform=TRANSFORM, **creation):
            pass
        content = memory.read()
    with pytest.raises(UnsupportedTiffError, match=name):
        header_of(content)


def test_a_giant_tile_is_refused() -> None:
    """A strip that decodes to more than the limit is refused with its size and the way out."""
    file = io.BytesIO()
    tifffile.imwrite(
        file, iter([b"\0"]), shape=(20_000, 20_000), dtype="u1", rowsperstrip=20_000, compression="deflate"
    )
    with pytest.raises(UnsupportedTiffError, match=r"381 MiB.*COG"):
        header_of(file.getvalue())
