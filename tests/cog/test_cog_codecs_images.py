"""JPEG, WebP, JPEG XL, JPEG 2000 and LERC against GDAL, or tifffile where this GDAL lacks the codec."""

from __future__ import annotations

import io
import itertools
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from made_tiffs import LAYOUTS, assert_same, gdal_pixels, gtiff, make_table, photo, pixels, raw_tiff
from whole_file import header_of, read_band, read_bands

from rasteret_ml.cog.codecs.decode import check_supported, decode_tile
from rasteret_ml.errors import CorruptTiffError


@pytest.mark.parametrize("codec", ["lerc", "lerc_deflate", "lerc_zstd"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_lerc(codec: str, dtype: str) -> None:
    """Lossless LERC, with or without a second codec around it."""
    for layout, interleave in itertools.product(LAYOUTS.values(), ("pixel", "band")):
        content, expected = gtiff(pixels(dtype), compress=codec, max_z_error=0, interleave=interleave, **layout)
        assert_same(content, expected)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_lossy_lerc_equals_gdal(dtype: str) -> None:
    """The decoded pixels equal GDAL's, whatever the encoder lost."""
    content, expected = gtiff(pixels(dtype), compress="lerc", max_z_error=2, **LAYOUTS["tiled"])
    assert_same(content, expected)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_lerc_says_where_nan_was(interleave: str) -> None:
    """LERC stores NaN as a mask: a pixel is valid exactly where GDAL reads a number."""
    data = pixels("float32", count=2)
    data[:, 5:9, 3:30] = np.nan
    content, expected = gtiff(data, compress="lerc", max_z_error=0, interleave=interleave, **LAYOUTS["tiled"])
    header = header_of(content)
    for band in range(2):
        found = read_band(content, header, band)
        holes = np.isnan(expected[..., band])
        assert holes.sum() == 4 * 27
        assert np.array_equal(found.valid[..., 0] & ~np.isnan(found.values[..., 0]), ~holes)
        assert np.array_equal(found.values[..., 0][~holes], expected[..., band][~holes])


def test_lerc_bands_may_differ_in_where_they_are_nan() -> None:
    """Each interleaved band has its own mask, and invalid pixels are never valid numbers."""
    data = pixels("float32", count=2)
    data[0, 2:6, 2:6] = np.nan
    data[1, 10:12, 20:30] = np.nan
    content, expected = gtiff(data, compress="lerc", max_z_error=0, interleave="pixel", **LAYOUTS["tiled"])
    header = header_of(content)
    for band in range(2):
        found, holes = read_band(content, header, band), np.isnan(expected[..., band])
        usable = found.valid[..., 0] & ~np.isnan(found.values[..., 0])
        assert np.array_equal(usable, ~holes)
        assert np.array_equal(found.values[..., 0][usable], expected[..., band][usable])


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
    content, expected = gtiff(photo(count), compress="jpeg", jpegtablesmode=tables, quality=90, **block, **creation)
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
    data = photo(count)
    content, expected = gtiff(
        data, compress="webp", webp_lossless=lossless, tiled=True, blockxsize=32, blockysize=32, interleave="pixel",
        photometric="RGB",
    )  # fmt: skip
    if lossless and count == 3:
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
    assert_same(content, expected)


def test_webp_opaque_alpha_comes_back() -> None:
    """The encoder drops an alpha band that is 255 everywhere; decoding restores it."""
    data = photo(4)
    data[3] = 255
    content, expected = gtiff(
        data, compress="webp", webp_lossless=True, tiled=True, blockxsize=32, blockysize=32, interleave="pixel"
    )
    assert (expected[..., 3] == 255).all()
    assert_same(content, expected)


def _tifffile(data: np.ndarray[Any, Any], planar: bool, **options: Any) -> tuple[bytes, np.ndarray[Any, Any]]:
    """`data` `[bands, h, w]` written by tifffile, and read back by it as `[h, w, bands]`."""
    file = io.BytesIO()
    stored = data[0] if len(data) == 1 else data if planar else np.moveaxis(data, 0, -1)
    config = ("separate" if planar else "contig") if len(data) > 1 else None
    tifffile.imwrite(file, stored, planarconfig=config, metadata=None, **options)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
        found = tiff.pages[0].asarray()
    found = found[..., None] if len(data) == 1 else np.moveaxis(found, 0, -1) if planar else found
    return file.getvalue(), found


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("tile", [(16, 32), None])
def test_jpegxl(dtype: str, samples: int, tile: tuple[int, int] | None) -> None:
    """Lossless, grey to RGBA, at sizes that no tile divides; the array that was written."""
    kind = np.dtype(dtype).kind
    data = pixels(dtype, samples) if kind == "u" else np.random.default_rng(0).random((samples, 37, 45)).astype(dtype)
    for planar in (False, True) if samples > 1 else (False,):
        content, expected = _tifffile(
            data, planar, compression="jpegxl", compressionargs={"lossless": True}, tile=tile,
            rowsperstrip=None if tile else 8, photometric="rgb" if samples > 2 else "minisblack",
            extrasamples=None if samples in (1, 3) else ["unassalpha"],
        )  # fmt: skip
        assert np.array_equal(expected, np.moveaxis(data, 0, -1))
        assert_same(content, expected)


def test_jpegxl_in_a_container_and_lossy() -> None:
    """Boxes around the codestream, the code of DNG (52546), and what tifffile makes of lossy colours."""
    data = np.moveaxis(photo(3), 0, -1)
    stored = imagecodecs.jpegxl_encode(data, usecontainer=True, distance=1.0)
    assert stored[4:8] == b"JXL "
    for code in (50002, 52546):
        table = make_table("uint8", data.shape[:2], 3, compression=code, photometric=2)
        check_supported(table)
        assert np.array_equal(decode_tile(stored, table, 70)[0], imagecodecs.jpegxl_decode(stored))


def test_jpegxl_extra_channels_that_are_not_alpha() -> None:
    """The codec returns grey with extra channels as planes; we return interleaved pixels."""
    data = np.random.default_rng(0).integers(0, 256, (5, 16, 24)).astype(np.uint8)
    stored = imagecodecs.jpegxl_encode(data, lossless=True, planar=True, photometric="gray")
    assert imagecodecs.jpegxl_decode(stored).shape == (5, 16, 24)
    found, _ = decode_tile(stored, make_table("uint8", (16, 24), 5, compression=50002), 16)
    assert np.array_equal(found, np.moveaxis(data, 0, -1))


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (256, 256), (37, 45), (1, 300), (520, 9), (100, 150), (90, 160)])
def test_jpegxl_sizes(size: tuple[int, int]) -> None:
    """The size header has short forms, ratios and four lengths of numbers."""
    data = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    stored = imagecodecs.jpegxl_encode(data, lossless=True)
    found, _ = decode_tile(stored, make_table("uint8", size, compression=50002), size[0])
    assert np.array_equal(found[..., 0], data)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("code", [34712, 33005])
def test_jpeg2000(dtype: str, samples: int, code: int) -> None:
    """Reversible wavelets; bare or in a JP2 box, whose colours are not applied."""
    data = np.moveaxis(pixels(dtype, samples), 0, -1)
    table = make_table(dtype, data.shape[:2], samples, compression=code)
    check_supported(table)
    for form in ("j2k", "jp2"):
        stored = imagecodecs.jpeg2k_encode(data if samples > 1 else data[..., 0], level=0, codecformat=form)
        assert np.array_equal(decode_tile(stored, table, 37)[0], data)


def test_jpeg2000_of_tifffile() -> None:
    """Tiles and lossy colours, as tifffile reads them."""
    content, expected = _tifffile(photo(3), False, compression="jpeg2000", tile=(32, 32), photometric="rgb")
    assert_same(content, expected)


@pytest.mark.parametrize(
    ("bits", "lossless", "samples"),
    [(12, False, 1), (12, False, 3), (8, True, 1), (8, True, 3), (12, True, 1), (16, True, 1), (16, True, 3)],
)
def test_jpeg_of_other_widths_and_lossless(bits: int, lossless: bool, samples: int) -> None:
    """12-bit and lossless (SOF3) frames, which this GDAL's libjpeg cannot read: as imagecodecs gives them."""
    dtype = "uint8" if bits == 8 else "uint16"
    data = np.random.default_rng(0).integers(0, 2**bits, (32, 48, samples)).astype(dtype)
    data = data if samples > 1 else data[..., 0]
    options = {"colorspace": "RGB", "outcolorspace": "RGB"} if samples > 1 else {}
    stored = imagecodecs.jpeg8_encode(data, bitspersample=bits, lossless=lossless, **options)
    width = 0 if bits in (8, 16) else bits
    table = make_table(dtype, (32, 48), samples, compression=7, photometric=1, bits_per_sample=width)
    check_supported(table)
    expected = data if lossless else imagecodecs.jpeg8_decode(stored, **options)
    assert np.array_equal(decode_tile(stored, table, 32)[0], expected.reshape(32, 48, samples))


def test_four_jpeg_samples_are_never_converted() -> None:
    """CMYK as stored even if an Adobe marker says YCCK: as libtiff, markers are ignored."""
    data = np.random.default_rng(0).integers(0, 256, (16, 16, 4)).astype(np.uint8)
    plain = bytes(imagecodecs.jpeg8_encode(data, level=95))
    stored = plain[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\2" + plain[2:]
    assert not np.array_equal(imagecodecs.jpeg8_decode(stored), imagecodecs.jpeg8_decode(plain))
    tags = {258: [8] * 4, 259: 7, 262: 1, 277: 4, 338: [0, 0, 0]}
    expected = gdal_pixels(raw_tiff([stored], (16, 16), tags=tags))
    for photometric in (1, 2, 5):
        table = make_table("uint8", (16, 16), 4, compression=7, photometric=photometric)
        check_supported(table)
        assert np.array_equal(decode_tile(stored, table, 16)[0], expected)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_inks_stay_inks(planar: bool, dtype: str) -> None:
    """CMYK is read as stored, as in tifffile; GDAL converts 8-bit files to RGBA."""
    data = pixels(dtype, 4)
    content, expected = _tifffile(data, planar, photometric="separated", tile=(16, 16), compression="deflate")
    assert np.array_equal(expected, np.moveaxis(data, 0, -1))
    assert_same(content, expected)


def test_subsampled_jpeg_that_is_not_ycbcr_is_an_error() -> None:
    """libtiff refuses it as well, because the colour space is undefined."""
    stored = imagecodecs.jpeg8_encode(np.ascontiguousarray(np.moveaxis(photo(3), 0, -1)), subsampling="420")
    with pytest.raises(CorruptTiffError, match="only YCbCr"):
        decode_tile(stored, make_table("uint8", (70, 90), 3, compression=7, photometric=2), 70)


CROPPED = {
    7: imagecodecs.jpeg8_encode,
    34712: lambda a: imagecodecs.jpeg2k_encode(a, level=0),
    34887: imagecodecs.lerc_encode,
    50001: lambda a: imagecodecs.webp_encode(a, lossless=True),
    50002: lambda a: imagecodecs.jpegxl_encode(a, lossless=True),
}


@pytest.mark.parametrize("code", CROPPED)
def test_pictures_cropped_to_the_image(code: int) -> None:
    """An edge tile may hold only the part in the image; one column or row less is corrupt."""
    data = np.moveaxis(photo(3), 0, -1)[:40, :50]
    stored = bytes(CROPPED[code](np.ascontiguousarray(data)))
    table = make_table("uint8", (64, 64), 3, compression=code, photometric=6 if code == 7 else 2)
    whole = make_table("uint8", (40, 50), 3, compression=code, photometric=6 if code == 7 else 2)
    found, _ = decode_tile(stored, table, 64, 40, 50)
    expected = decode_tile(stored, whole, 40)[0].copy() if code == 7 else data
    assert np.array_equal(decode_tile(stored, table, 64, 40, 50)[0][:40, :50], expected)
    assert found.shape == (64, 64, 3)
    assert not found[40:].any()
    assert not found[:, 50:].any()
    assert decode_tile(stored, table, 64, 33, 1)[0].shape == (64, 64, 3)
    for rows, cols in ((41, 50), (40, 51), (64, 64)):
        with pytest.raises(CorruptTiffError, match=f"40 x 50 pixels, {rows} x {cols} of a tile of 64 x 64"):
            decode_tile(stored, table, 64, rows, cols)


def test_a_last_strip_of_a_jpeg_may_be_of_full_height() -> None:
    """More rows than needed, up to the strip's own height, are dropped (`tif_jpeg_ycbcr_too_big_last_stripe.tif`)."""
    data = photo(1)[0, :32]
    stored = imagecodecs.jpeg8_encode(data)
    table = make_table("uint8", (32, 90), compression=7, photometric=1)
    found, _ = decode_tile(stored, table, 20)
    assert np.array_equal(found[..., 0], imagecodecs.jpeg8_decode(stored)[:20])


@pytest.mark.parametrize("wrap", [bytes, imagecodecs.zlib_encode, imagecodecs.zstd_encode])
def test_lerc_masks_of_cropped_tiles(wrap: Any) -> None:
    """The codec's validity mask has the tile's shape, and is false where nothing is stored."""
    data = np.arange(80, dtype=np.float32).reshape(8, 10)
    holes = data % 7 == 0
    stored = bytes(wrap(bytes(imagecodecs.lerc_encode(data, masks=~holes))))
    table = make_table("float32", (16, 16), compression=34887)
    found, valid = decode_tile(stored, table, 16, 8, 10)
    assert valid is not None
    assert found.shape == valid.shape == (16, 16, 1)
    assert np.array_equal(valid[:8, :10, 0], ~holes)
    assert not valid[8:].any()
    assert not valid[:, 10:].any()
    assert np.array_equal(found[:8, :10, 0][~holes], data[~holes])
