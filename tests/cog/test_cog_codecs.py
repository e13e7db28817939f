"""Every codec, layout and type against GDAL's pixels (written and read back by rasterio), bit for bit."""

from __future__ import annotations

import io
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import imagecodecs
import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from made_tiffs import INTEGERS, LAYOUTS, TRANSFORM, assert_same, gtiff, make_table, photo, pixels
from property_settings import examples
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.shutil import copy as gdal_copy
from whole_file import header_of, read_band, read_bands

from rasteret_ml.cog.codecs.byte_codecs import scratch
from rasteret_ml.cog.codecs.decode import check_supported, decode_tile
from rasteret_ml.errors import UnsupportedTiffError

FLOATS = ["float32", "float64"]
COMPLEX = ["complex64", "complex128"]
WITH_PREDICTOR = ["deflate", "lzw", "zstd"]
MATRIX = [
    (codec, predictor, dtype)
    for codec in ("none", "lzma", "packbits", *WITH_PREDICTOR)
    for predictor in ((1, 2, 3) if codec in WITH_PREDICTOR else (1,))
    for dtype in (INTEGERS + FLOATS + COMPLEX if predictor == 1 else INTEGERS + FLOATS if predictor == 2 else FLOATS)
]
BIG = [
    (codec, predictor, dtype)
    for codec, predictor in itertools.product([None, "deflate", "zstd", "lzw", "packbits", "lzma"], [1, 2, 3])
    for dtype in ("uint8", "uint16", "int16", "uint32", "int64", "float16", "float32", "float64", "complex64")
    if predictor == 1 or (codec in WITH_PREDICTOR and predictor == {"f": 3, "c": 0}.get(np.dtype(dtype).kind, 2))
]
COG_CODECS = ["none", "deflate", "lzw", "zstd", "lzma", "lerc", "lerc_deflate", "lerc_zstd", "jpeg", "webp"]


@pytest.mark.parametrize(("codec", "predictor", "dtype"), MATRIX)
def test_lossless_codecs(codec: str, predictor: int, dtype: str) -> None:
    """Tiled and striped, pixel- and band-interleaved, sizes that no tile divides."""
    data = pixels(dtype)
    for layout, interleave in itertools.product(LAYOUTS.values(), ("pixel", "band")):
        creation = layout | {"interleave": interleave}
        if codec != "none":
            creation["compress"] = codec
        if predictor > 1:
            creation["predictor"] = predictor
        content, expected = gtiff(data, **creation)
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
        assert_same(content, expected)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(("codec", "predictor", "dtype"), BIG)
def test_both_byte_orders(codec: str | None, predictor: int, dtype: str, byteorder: str) -> None:
    """Files of tifffile in either byte order (float16 too), chunky and planar, equal the array written."""
    data = np.moveaxis(pixels(dtype), 0, -1)
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
        assert_same(file.getvalue(), data)


@pytest.mark.parametrize("endianness", ["LITTLE", "BIG"])
@pytest.mark.parametrize(
    ("dtype", "predictor"),
    [("uint16", 1), ("int16", 2), ("uint32", 2), ("int64", 2), ("float32", 2), ("float64", 2), ("float32", 3),
     ("float64", 3), ("complex64", 1)],
)  # fmt: skip
def test_gdal_writes_both_byte_orders(endianness: str, dtype: str, predictor: int) -> None:
    """The same from GDAL's writer, which also takes differences of floats' bits (predictor 2)."""
    content, expected = gtiff(
        pixels(dtype), endianness=endianness, compress="deflate", predictor=predictor, **LAYOUTS["tiled"]
    )
    assert header_of(content).image.big_endian == (endianness == "BIG")
    assert_same(content, expected)


@pytest.mark.parametrize("codec", COG_CODECS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_the_cog_driver(codec: str, dtype: str, tmp_path) -> None:
    """GDAL's COG driver (overviews, leaders, predictors by type): full resolution and every overview."""
    if codec in ("jpeg", "webp") and dtype != "uint8":
        return
    data = photo(3) if codec in ("jpeg", "webp") else pixels(dtype, shape=(300, 280))
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


@examples(60)
@given(
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    samples=st.integers(1, 5),
    big_endian=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_float_predictor_equals_imagecodecs(dtype, rows, width, samples, big_endian: bool, seed: int) -> None:
    """The fast path equals `floatpred_decode` on arbitrary bits, NaN payloads included."""
    item = np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width, samples * item)).astype(np.uint8)
    order = ">" if big_endian else "<"
    encoded = raw.view(f"{order}f{item}").reshape(rows, width, samples)
    expected = imagecodecs.floatpred_decode(encoded, axis=-2).astype(dtype)
    table = make_table(dtype, (rows, width), samples, compression=50000, predictor=3, big_endian=big_endian)
    found, valid = decode_tile(imagecodecs.zstd_encode(raw.tobytes()), table, rows)
    assert valid is None
    assert found.dtype == dtype
    assert np.array_equal(found.view(np.uint8), np.ascontiguousarray(expected).view(np.uint8))


@examples(60)
@given(
    dtype=st.sampled_from([*INTEGERS, "float16", "float32", "float64"]),
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    samples=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_horizontal_predictor_is_a_running_sum(dtype, rows, width, samples, seed: int) -> None:
    """Differences along a row, sample by sample, wrapping in the sample's width (TIFF 6.0, section 14)."""
    unsigned = f"u{np.dtype(dtype).itemsize}"
    limits = np.iinfo(unsigned)
    deltas = np.random.default_rng(seed).integers(0, limits.max, (rows, width, samples), unsigned, endpoint=True)
    expected = np.cumsum(deltas, axis=1, dtype=unsigned)
    table = make_table(dtype, (rows, width), samples, compression=50000, predictor=2)
    found, _ = decode_tile(imagecodecs.zstd_encode(deltas.tobytes()), table, rows)
    assert found.dtype == dtype
    assert np.array_equal(found.view(unsigned), expected)


def test_threads_do_not_share_scratch() -> None:
    """Tiles decoded in eight threads equal those decoded in one."""
    datas = [pixels("float32", seed=i) for i in range(8)]
    contents = [gtiff(d, compress="deflate", predictor=3, **LAYOUTS["tiled"])[0] for d in datas]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for data, found in zip(datas, pool.map(read_bands, contents), strict=True):
                assert np.array_equal(found.values, np.moveaxis(data, 0, -1))


def test_a_giant_tile_is_refused() -> None:
    """A strip that decodes to more than the limit is refused with its size and a remedy."""
    file = io.BytesIO()
    tifffile.imwrite(
        file, iter([b"\0"]), shape=(20_000, 20_000), dtype="u1", rowsperstrip=20_000, compression="deflate"
    )
    with pytest.raises(UnsupportedTiffError, match=r"381 MiB.*COG"):
        header_of(file.getvalue())


@examples(80)
@given(
    codec=st.sampled_from([None, "deflate", "zstd", "lzw", "packbits", "lzma"]),
    predicted=st.booleans(),
    dtype=st.sampled_from([*INTEGERS, "float16", *FLOATS]),
    samples=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.sampled_from([None, (16, 16), (32, 16)]),
    byteorder=st.sampled_from("<>"),
    planar=st.booleans(),
)
def test_any_layout_of_tifffile(codec, predicted, dtype, samples, shape, tile, byteorder, planar: bool) -> None:
    """Tile or strip, edge or not, chunky or planar, 1 to 5 samples: the array that was written."""
    data = pixels(dtype, samples, shape)
    predictor = (
        codec in ("deflate", "zstd", "lzw", "lzma") and predicted and (3 if dtype in ("float16", *FLOATS) else 2)
    )
    stored = data[0] if samples == 1 else data if planar else np.moveaxis(data, 0, -1)
    file = io.BytesIO()
    tifffile.imwrite(
        file, stored, byteorder=byteorder, photometric="minisblack",
        planarconfig=("separate" if planar else "contig") if samples > 1 else None, tile=tile, compression=codec,
        rowsperstrip=None if tile else 7, predictor=predictor, metadata=None,
    )  # fmt: skip
    assert_same(file.getvalue(), np.moveaxis(data, 0, -1))


REFUSED = [
    ({"compression": 2}, "CCITT RLE"),
    ({"compression": 3}, "CCITT Group 3"),
    ({"compression": 4}, "CCITT Group 4"),
    ({"compression": 6}, "old-style JPEG"),
    ({"compression": 22610}, "JPEG XR"),
    ({"compression": 32771}, "word-aligned"),
    ({"compression": 32809}, "ThunderScan"),
    ({"compression": 33003}, "YCbCr"),
    ({"compression": 34661}, "JBIG"),
    ({"compression": 34676}, "SGI log"),
    ({"compression": 34934}, "JPEG XR"),
    ({"compression": 12345}, r"12345 \(unknown\)"),
    ({"photometric": 8}, "CIELab"),
    ({"photometric": 9}, "ICCLab"),
    ({"photometric": 10}, "ITULab"),
    ({"photometric": 6, "planar_configuration": 2, "samples_per_pixel": 3}, "separate planes"),
    ({"photometric": 6, "samples_per_pixel": 3, "ycbcr_subsampling": (2, 4)}, "2 x 4"),
    ({"photometric": 6, "samples_per_pixel": 3, "ycbcr_subsampling": (2, 2), "compression": 8, "predictor": 2}, "pred"),
    ({"photometric": 6, "samples_per_pixel": 3, "compression": 50001}, "YCbCr pixels in WebP"),
    ({"photometric": 6, "samples_per_pixel": 4}, "4 samples"),
    ({"photometric": 6, "samples_per_pixel": 4, "compression": 7}, "4 samples"),
    ({"compression": 8, "predictor": 4}, "predictor 4"),
    ({"compression": 8, "predictor": 3}, "floating point predictor on uint8"),
    ({"compression": 8, "predictor": 2, "bits_per_sample": 4}, "4-bit"),
    ({"compression": 8, "predictor": 2, "dtype": "complex128"}, "128-bit"),
    ({"compression": 8, "predictor": 3, "dtype": "complex64"}, "complex64"),
    ({"compression": 8, "predictor": 2, "dtype": "float32", "bits_per_sample": 24}, "24-bit"),
    ({"dtype": "uint32", "bits_per_sample": 24, "big_endian": True}, "big-endian 24-bit"),
    ({"dtype": "float32", "compression": 7}, "JPEG"),
    ({"dtype": "uint16", "compression": 50001, "samples_per_pixel": 3}, "WebP"),
    ({"compression": 50001}, "1 samples per pixel in WebP"),
    ({"dtype": "int64", "compression": 34887}, "LERC"),
    ({"compression": 50002, "fill_order": 2}, "reversed bits"),
]


@pytest.mark.parametrize(("facts", "name"), REFUSED)
def test_what_is_not_supported_is_named(facts: dict[str, Any], name: str) -> None:
    """Refused when the header is read, with the feature's name."""
    facts = dict(facts)
    table = make_table(facts.pop("dtype", "uint8"), (16, 16), facts.pop("samples_per_pixel", 1), **facts)
    with pytest.raises(UnsupportedTiffError, match=name):
        check_supported(table)


def test_a_giant_tile_is_refused_unless_nothing_is_stored() -> None:
    """The limit protects the decoder; sparse tiles are not decoded."""
    table = make_table("uint8", (20_000, 20_000))
    for check in (check_supported, lambda t: decode_tile(b"", t, 20_000)):
        with pytest.raises(UnsupportedTiffError, match="381 MiB"):
            check(table)
    check_supported(replace(table, tile_byte_counts=np.array([0], np.int64)))


def test_scratch_of_giants_is_not_kept() -> None:
    """A thread keeps scratch memory of at most 32 MiB."""
    small, giant = scratch(1000, "test"), scratch(40 * 2**20, "test")
    assert giant.size == 40 * 2**20
    assert np.shares_memory(scratch(1000, "test"), small)
