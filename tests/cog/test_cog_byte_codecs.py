"""How samples are packed: odd widths, complex integers, 24-bit floats, YCbCr, reversed bits; GDAL is the oracle."""

from __future__ import annotations

import io
import itertools
import struct
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from made_tiffs import LAYOUTS, assert_same, gdal_pixels, gtiff, make_table, raw_tiff
from whole_file import header_of, read_bands

from rasteret_ml.cog.codecs.decode import check_supported, decode_tile
from rasteret_ml.cog.codecs.unpack import unpack_units, ycbcr_to_rgb
from rasteret_ml.errors import CorruptTiffError


@pytest.mark.parametrize("nbits", [n for n in range(1, 32) if n not in (8, 16)])
@pytest.mark.parametrize("compress", [{}, {"compress": "deflate"}], ids=["none", "deflate"])
def test_odd_bit_widths(nbits: int, compress: dict[str, str]) -> None:
    """Samples of 1 to 31 bits, rows padded to a byte, in every layout."""
    dtype = "uint8" if nbits <= 8 else "uint16" if nbits <= 16 else "uint32"
    data = np.random.default_rng(nbits).integers(0, 2**nbits, (3, 37, 45)).astype(dtype)
    for layout, interleave in itertools.product(LAYOUTS.values(), ("pixel", "band")):
        content, expected = gtiff(data, nbits=nbits, interleave=interleave, **layout, **compress)
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
        assert_same(content, expected)


def test_reversed_bit_order() -> None:
    """Fill order 2 (old scanners): bits of every byte reversed before anything else."""
    data = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
    file = io.BytesIO()
    tifffile.imwrite(file, data, rowsperstrip=8, metadata=None, extratags=[(65000, "H", 1, 2, True)])
    content = file.getvalue().replace(struct.pack("<HHIH", 65000, 3, 1, 2), struct.pack("<HHIH", 266, 3, 1, 2))
    assert header_of(content).image.fill_order == 2
    assert np.array_equal(read_bands(content).values[..., 0], imagecodecs.bitorder_decode(data))


@pytest.mark.parametrize("nbits", [n for n in range(1, 32) if n not in (8, 16, 24)])
def test_odd_bit_widths_of_big_endian_files(nbits: int) -> None:
    """The most significant bit comes first in either byte order, as GDAL writes and reads them."""
    dtype = "uint8" if nbits <= 8 else "uint16" if nbits <= 16 else "uint32"
    data = np.random.default_rng(nbits).integers(0, 2**nbits, (3, 37, 45)).astype(dtype)
    content, expected = gtiff(data, nbits=nbits, endianness="BIG", interleave="pixel", **LAYOUTS["tiled"])
    assert header_of(content).image.big_endian
    assert np.array_equal(expected, np.moveaxis(data, 0, -1))
    assert_same(content, expected)


def _decoded(stored: bytes, shape: tuple[int, int], dtype: str, samples: int = 1, **facts: Any) -> np.ndarray[Any, Any]:
    table = make_table(dtype, shape, samples, **facts)
    check_supported(table)
    found, valid = decode_tile(stored, table, shape[0])
    assert valid is None
    assert found.dtype == dtype
    assert found.shape == (*shape, samples)
    return found


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("predictor", [1, 2])
def test_complex_integers(bits: int, big_endian: bool, predictor: int) -> None:
    """Two integers per sample; libtiff takes differences of the two as one word."""
    order, item = ">" if big_endian else "<", bits // 16
    parts = np.random.default_rng(0).integers(-30000, 30000, (8, 9, 3, 2)).astype(f"{order}i{item}")
    stored = imagecodecs.zstd_encode(parts.tobytes())
    facts = {258: [bits] * 3, 259: 50000, 277: 3, 317: predictor, 338: [0, 0], 339: [5] * 3}
    expected = gdal_pixels(raw_tiff([stored], (8, 9), big_endian=big_endian, tags=facts))
    dtype = "complex64" if bits == 32 else "complex128"
    found = _decoded(
        stored, (8, 9), dtype, 3, compression=50000, predictor=predictor, bits_per_sample=bits, big_endian=big_endian
    )
    if bits == 64:  # GDAL's complex integers of 32 bits come as complex64 here, which rounds them
        found = found.astype(np.complex64)
    assert np.array_equal(found, expected)
    if predictor == 1:
        assert np.array_equal(found, (parts[..., 0] + 1j * parts[..., 1].astype(np.float64)).astype(found.dtype))


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
@pytest.mark.parametrize("endianness", ["LITTLE", "BIG"])
def test_complex_with_differences_as_gdal_writes_them(dtype: str, endianness: str) -> None:
    """Predictor 2 on complex samples, in both byte orders."""
    rng = np.random.default_rng(0)
    data = np.round(rng.normal(0, 1e3, (2, 16, 16)) + 1j * rng.normal(0, 1e3, (2, 16, 16))).astype(np.complex64)
    content, expected = gtiff(data, dtype=dtype, compress="deflate", predictor=2, endianness=endianness, blockysize=16)
    assert np.array_equal(expected, np.moveaxis(data, 0, -1))
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        page = tiff.pages[0]
        stored = content[page.dataoffsets[0] : page.dataoffsets[0] + page.databytecounts[0]]
        planar = page.planarconfig == 2
    bits = 32 if dtype == "complex_int16" else 0
    found = _decoded(
        stored, (16, 16), "complex64", 1 if planar else 2, compression=8, predictor=2, bits_per_sample=bits,
        big_endian=endianness == "BIG",
    )  # fmt: skip
    assert np.array_equal(found, expected[..., :1] if planar else expected)


@pytest.mark.slow
@pytest.mark.parametrize("big_endian", [False, True])
def test_every_float24(big_endian: bool) -> None:
    """All 2**24 of them, NaN payloads and subnormals included, bit for bit as GDAL."""
    every = np.arange(2**24, dtype=">u4" if big_endian else "<u4").view(np.uint8).reshape(-1, 4)
    stored = every[:, slice(1, 4) if big_endian else slice(0, 3)].tobytes()
    expected = gdal_pixels(raw_tiff([stored], (4096, 4096), big_endian=big_endian, tags={258: 24, 339: 3}))
    found = _decoded(stored, (4096, 4096), "float32", bits_per_sample=24, big_endian=big_endian)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    theirs = imagecodecs.float24_decode(stored, byteorder=">" if big_endian else "<").reshape(4096, 4096, 1)
    assert np.array_equal(found, theirs, equal_nan=True)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_float24_with_the_float_predictor(samples: int, big_endian: bool) -> None:
    """Three byte planes in place of four."""
    values = np.random.default_rng(0).integers(0, 2**24, (16, 20 * samples))
    planes = np.concatenate([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.uint8)
    planes[:, samples:] -= planes[:, :-samples].copy()
    stored = imagecodecs.zlib_encode(planes.tobytes())
    tags = {258: [24] * samples, 259: 8, 277: samples, 317: 3, 339: [3] * samples}
    expected = gdal_pixels(raw_tiff([stored], (16, 20), big_endian=big_endian, tags=tags))
    found = _decoded(
        stored, (16, 20), "float32", samples, compression=8, predictor=3, bits_per_sample=24, big_endian=big_endian
    )
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


STREAMS = {
    1: bytes, 5: imagecodecs.lzw_encode, 8: imagecodecs.zlib_encode, 32773: imagecodecs.packbits_encode,
    34925: imagecodecs.lzma_encode, 50000: imagecodecs.zstd_encode,
}  # fmt: skip


@pytest.mark.parametrize("code", STREAMS)
@pytest.mark.parametrize("predictor", [1, 2])
def test_a_predictor_belongs_to_some_codecs_only(code: int, predictor: int) -> None:
    """As libtiff, the tag is ignored for uncompressed data and PackBits."""
    data = np.random.default_rng(0).integers(0, 60, (16, 20)).astype(np.uint8)
    stored = bytes(STREAMS[code](data.tobytes()))
    expected = gdal_pixels(raw_tiff([stored], (16, 20), tags={259: code, 317: predictor}))
    assert np.array_equal(_decoded(stored, (16, 20), "uint8", compression=code, predictor=predictor), expected)


@pytest.mark.parametrize("code", [*STREAMS, 7, 34887, 50001])
def test_reversed_bits_of_every_codec(code: int) -> None:
    """libtiff reverses the whole stream, image codecs included, except JPEG."""
    data = np.random.default_rng(0).integers(0, 60, (16, 16, 3 if code == 50001 else 1)).astype(np.uint8)
    image = {7: imagecodecs.jpeg8_encode, 34887: imagecodecs.lerc_encode}
    if code == 50001:
        stored = imagecodecs.webp_encode(data, lossless=True)
    else:
        stored = image[code](data[..., 0]) if code in image else STREAMS[code](data.tobytes())
    stored = bytes(stored) if code == 7 else bytes(imagecodecs.bitorder_decode(bytes(stored)))
    samples = data.shape[-1]
    tags = {258: [8] * samples, 259: code, 262: 2 if samples == 3 else 1, 266: 2, 277: samples}
    tags |= {50674: [4, 0]} if code == 34887 else {}
    expected = gdal_pixels(raw_tiff([stored], (16, 16), tags=tags))
    assert np.array_equal(_decoded(stored, (16, 16), "uint8", samples, compression=code, fill_order=2), expected)
    assert code == 7 or np.array_equal(expected, data)


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("coefficients", [None, (0.2126, 0.7152, 0.0722)])
def test_ycbcr_becomes_rgb_as_in_gdal(
    subsampling: tuple[int, int], coefficients: tuple[float, float, float] | None
) -> None:
    """Data units of any subsampling, at sizes that they do not divide."""
    (across, down), (rows, width) = subsampling, (23, 29)
    size = -(-width // across) * -(-rows // down) * (across * down + 2)
    stored = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8).tobytes()
    tags: dict[int, Any] = {258: [8, 8, 8], 262: 6, 277: 3, 530: list(subsampling)}
    facts: dict[str, Any] = {"photometric": 6, "ycbcr_subsampling": subsampling}
    content = raw_tiff([stored], (rows, width), tags=tags)
    if coefficients is not None:
        fractions = [n for value in coefficients for n in (round(value * 10000), 10000)]
        content = _with_rationals(stored, (rows, width), tags, fractions)
        units = unpack_units(np.frombuffer(stored, np.uint8), rows, width, across, down)
        assert np.array_equal(ycbcr_to_rgb(units, coefficients), gdal_pixels(content))
        return
    assert np.array_equal(_decoded(stored, (rows, width), "uint8", 3, **facts), gdal_pixels(content))


def _with_rationals(stored: bytes, shape: tuple[int, int], tags: dict[int, Any], fractions: list[int]) -> bytes:
    """YCbCrCoefficients (529), which `raw_tiff` writes as longs, made rationals."""
    content = raw_tiff([stored], shape, tags=tags | {529: [2**31, *fractions[1:]]})
    content = content.replace(struct.pack("<I", 2**31), struct.pack("<I", fractions[0]))
    return content.replace(struct.pack("<HHI", 529, 4, 6), struct.pack("<HHI", 529, 5, 3))


def test_ycbcr_with_differences() -> None:
    """Not subsampled, a predictor is undone before colours are converted."""
    data = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    stored = imagecodecs.zlib_encode(data.tobytes())
    tags = {258: [8, 8, 8], 259: 8, 262: 6, 277: 3, 317: 2, 530: [1, 1]}
    found = _decoded(stored, (16, 20), "uint8", 3, compression=8, predictor=2, photometric=6)
    assert np.array_equal(found, gdal_pixels(raw_tiff([stored], (16, 20), tags=tags)))


@pytest.mark.parametrize("code", STREAMS)
@pytest.mark.parametrize("stored_rows", [16, 12, 10, 9])
def test_a_tile_that_stores_only_the_rows_of_the_image(code: int, stored_rows: int) -> None:
    """Rows that lie outside the image may be missing, and are zero; one row less is corrupt."""
    data = np.random.default_rng(0).integers(1, 60, (stored_rows, 16)).astype(np.uint8)
    stored = bytes(STREAMS[code](data.tobytes()))
    table = make_table("uint8", (16, 16), compression=code)
    if stored_rows < 10:
        with pytest.raises(CorruptTiffError, match="144 bytes, 256 expected, 160 at least"):
            decode_tile(stored, table, 16, 10)
        return
    found, _ = decode_tile(stored, table, 16, 10)
    assert np.array_equal(found[:stored_rows, :, 0], data)
    assert not found[stored_rows:].any()


@pytest.mark.parametrize("code", STREAMS)
def test_more_than_a_full_tile_is_an_error(code: int) -> None:
    """Except for uncompressed data, where further bytes are ignored."""
    data = np.random.default_rng(0).integers(1, 60, (17, 16)).astype(np.uint8)
    stored = bytes(STREAMS[code](data.tobytes()))
    table = make_table("uint8", (16, 16), compression=code)
    if code == 1:
        assert np.array_equal(decode_tile(stored, table, 16)[0][..., 0], data[:16])
        return
    with pytest.raises(CorruptTiffError, match="256"):
        decode_tile(stored, table, 16)
