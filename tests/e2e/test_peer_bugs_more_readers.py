"""Bugs of other readers (`reference/readers.md`, sections 1.3-1.8: aiocogeo to tifffile), a test for each."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from peer_files import TILED, X, Y, assert_equals_rasterio, dataset_of, entry_of, gtiff, noise, slices
from pixel_oracle import QUICK, assert_chip, build_one, cause_of, rasters, run, window_by_rasterio

import rasteret_ml as rm
from rasteret_ml.errors import (
    AccessDeniedError,
    DataError,
    FetchError,
    RangeNotSupportedError,
    ReadError,
    ServerError,
)
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.execute import TileError
from rasteret_ml.storage.open import open_reader
from rasteret_ml.testing import InjectedError, RangeServer, make_cog

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


# 1.3 aiocogeo -----------------------------------------------------------------------------------------------


def _served(server: RangeServer, folder: Path, name: str = "a") -> rm.RasterAccessor:
    """A scene on the server, built over HTTP, in 4 x 4 tiles that lie apart."""
    make_cog(folder / f"{name}.tif", noise("uint16", (1, 256, 256)), blocksize=64, compress="none", overviews="none")
    (record,) = rasters(rm.build(f"{server.url}/{name}.tif", folder / f"{name}.parquet"))
    return record


def _quickly(record: rm.RasterAccessor, *windows: tuple[int, int, int, int]) -> list[Chip]:
    """Read windows one after the other with one reader that soon gives up."""

    async def work() -> list[Chip]:
        async with open_reader(QUICK) as reader:
            return [await record.read_window(window, ["B1"], backend=reader) for window in windows]

    return run(work())


def test_headers_past_the_first_request(server: RangeServer, tmp_path: Path) -> None:
    """aiocogeo: what lay beyond the first 16 KiB of the header was parsed from too few bytes."""
    data, layout = noise("uint8", (1, 1500, 1500)), {"tiled": True, "blockxsize": 16, "blockysize": 16}
    path = gtiff(tmp_path / "a.tif", data, compress="deflate", **layout)
    (record,) = rasters(rm.build(f"{server.url}/a.tif", tmp_path / "c.parquet"))
    assert len(record.source("B1").metadata.tile_offsets) * 8 > 2 * 32 * 1024
    for window in ((0, 0, 20, 20), (1490, 1485, 20, 20), (700, 33, 64, 64)):
        assert_chip(run(record.read_window(window, ["B1"])), *window_by_rasterio(path, window))


@pytest.mark.parametrize(("dtype", "nodata"), [("uint8", 255), ("int16", -9999), ("uint16", 65535), ("float32", -3.5)])
def test_nodata_is_a_number_not_a_byte(tmp_path: Path, dtype: str, nodata: float) -> None:
    """aiocogeo: nodata was the first byte of its text: 255 became 50, the code of "2"."""
    data = np.arange(-60, 60) if dtype in ("int16", "float32") else np.arange(120)
    data = np.tile(data, (1, 10, 1)).astype(dtype)
    data[0, :, 7] = nodata
    path = make_cog(tmp_path / "a.tif", data, nodata=nodata)
    assert assert_equals_rasterio(path, tmp_path).source("B1").nodata == nodata


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "packbits", "zstd"])
@pytest.mark.parametrize("bits", [1, 8])
def test_masks_of_any_codec(tmp_path: Path, compression: str | None, bits: int) -> None:
    """aiocogeo: a mask had to be deflated."""
    data, mask, path = noise("uint8", (70, 90)), noise("uint8", (70, 90), 1) > 99, tmp_path / "a.tif"
    stored = mask if bits == 1 else mask.astype(np.uint8) * 255
    options: dict[str, Any] = {"tile": (32, 32), "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(data, compression="deflate", **options)
        tiff.write(stored, compression=compression, photometric="minisblack", subfiletype=1, **options)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[1].tags[254].overwrite(4)
        tiff.pages[1].tags[262].overwrite(4)
    assert_equals_rasterio(str(path), tmp_path)
    chip = run(build_one(path, tmp_path).read_window((0, 0, 70, 90), ["B1"]))
    assert_chip(chip, data[None], mask[None])


def test_big_tiff(tmp_path: Path) -> None:
    """aiocogeo: NotImplementedError."""
    path = make_cog(tmp_path / "a.tif", noise("float32", (2, 70, 90)), bigtiff="yes", predictor="standard")
    assert struct.unpack_from("<H", Path(path).read_bytes(), 2) == (43,)
    assert_equals_rasterio(path, tmp_path)


def test_a_server_that_ignores_ranges(server: RangeServer, tmp_path: Path) -> None:
    """aiocogeo: the whole file with status 200 was taken for the range, and its first bytes for tiles."""
    record = _served(server, tmp_path)
    server.errors["a.tif"] = InjectedError(kind="ignore_range")
    with pytest.raises(ReadError) as caught:
        _quickly(record, (130, 130, 20, 20))
    assert isinstance(cause_of(caught.value), RangeNotSupportedError)
    with pytest.raises(DataError, match="range"):
        rm.build(f"{server.url}/a.tif", tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("status", "kind"), [(403, AccessDeniedError), (401, AccessDeniedError), (503, ServerError), (429, ServerError)]
)
def test_a_refusal_is_not_a_missing_file(server: RangeServer, tmp_path: Path, status: int, kind: type) -> None:
    """aiocogeo: every error of the client was FileNotFoundError, and closed the session that others used."""
    record = _served(server, tmp_path)
    server.errors["a.tif"] = InjectedError(kind="status", status=status)

    async def work() -> Chip:
        async with open_reader(QUICK) as reader:
            with pytest.raises(ReadError) as caught:
                await record.read_window((0, 0, 9, 9), ["B1"], backend=reader)
            assert isinstance(cause_of(caught.value), kind)
            del server.errors["a.tif"]
            return await record.read_window((0, 0, 9, 9), ["B1"], backend=reader)

    assert_chip(run(work()), *window_by_rasterio(tmp_path / "a.tif", (0, 0, 9, 9)))


# 1.4 odc-loader, 1.5 stackstac, 1.6 GDAL --------------------------------------------------------------------


def test_nan_and_the_nodata_value_are_both_invalid(tmp_path: Path) -> None:
    """stackstac, lazycogs: one of the two was left valid in float rasters that hold both."""
    data = noise("float32", (1, 32, 32))
    data[0, 3], data[0, 5] = np.nan, -9999
    sample = dataset_of(make_cog(tmp_path / "a.tif", data, nodata=-9999), tmp_path)[slices(0, 0, 32, 32)]
    np.testing.assert_array_equal(sample["image"].numpy(), data)
    np.testing.assert_array_equal(sample["mask_valid"].numpy(), ~np.isnan(data) & (data != -9999))


def test_tolerated_failures_are_listed(server: RangeServer, tmp_path: Path) -> None:
    """odc-loader: `fail_on_error=False` left fill and no list; stackstac: chunks of another shape, no file named."""
    record = _served(server, tmp_path)
    server.errors["a.tif"] = InjectedError(kind="status", status=404)
    failures: list[TileError] = []
    box = shapely.box(X, Y - 900, X + 1000, Y)
    (chip,) = run(record.load_bands([box], ["B1"], geometry_crs=32633, output="tensor", failures=failures))
    assert (tuple(chip.data.shape), bool(chip.valid.any())) == ((1, 90, 100), False)
    assert sorted(failure.tile for failure in failures) == [0, 1, 4, 5]
    assert {failure.href for failure in failures} == {f"{server.url}/a.tif"}


@pytest.mark.parametrize("times", [1, 1000])
def test_a_dropped_connection_never_gives_blank_pixels(server: RangeServer, tmp_path: Path, times: int) -> None:
    """GDAL #11552: with threads a connection that broke off ended in blank pixels, in silence."""
    record = _served(server, tmp_path)
    server.errors["a.tif"] = InjectedError(kind="cut", times=times)
    if times == 1:
        (chip,) = _quickly(record, (50, 50, 100, 100))
        assert_chip(chip, *window_by_rasterio(tmp_path / "a.tif", (50, 50, 100, 100)))
        return
    with pytest.raises(ReadError) as caught:
        _quickly(record, (50, 50, 100, 100))
    assert isinstance(cause_of(caught.value), FetchError)


def test_tokens_are_made_at_each_read(server: RangeServer, tmp_path: Path) -> None:
    """odc-stac: credentials expire, and reads "just start failing eventually and never recover"."""
    record, tokens = _served(server, tmp_path), iter(range(100))

    def sign(href: str) -> str:
        return f"{href}?token={next(tokens)}"

    server.requests.clear()
    server.errors["a.tif"] = InjectedError(kind="status", status=403, times=1)
    box, asked = shapely.box(X, Y - 200, X + 200, Y), {"geometry_crs": 32633, "output": "tensor", "sign": sign}
    for _ in range(2):
        (chip,) = run(record.load_bands([box], ["B1"], **asked))
        assert_chip(chip, *window_by_rasterio(tmp_path / "a.tif", (0, 0, 20, 20)))
    assert [request.query for request in server.requests] == ["token=0", "token=1", "token=2"]


# 1.7 rio-tiler, 1.8 tifffile --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::rasterio.errors.NodataShadowWarning")
def test_nodata_comes_before_alpha(tmp_path: Path) -> None:
    """rio-tiler's and GDAL's order, which others turn round: declared nodata, then alpha."""
    data = noise("uint8", (4, 40, 40))
    data[3] = np.where(data[3] > 127, 255, 0)
    data[:3, 5:9] = 0
    options: dict[str, Any] = {"photometric": "RGB", "alpha": "non-premultiplied", "nodata": 0}
    assert_equals_rasterio(gtiff(tmp_path / "a.tif", data, **options), tmp_path)


@pytest.mark.parametrize("value", [2**60 + 1, -(2**63), 2**53 + 1])
def test_64_bit_nodata_is_exact(tmp_path: Path, value: int) -> None:
    """rasterio writes it as -4.6e+18 and GDAL reads back -4; as a float its neighbours are nodata too."""
    data = np.full((40, 40), value + 1, np.int64)
    data[5:9] = value
    text, path = str(value) + "\0", tmp_path / "a.tif"
    tifffile.imwrite(path, data, tile=(16, 16), metadata=None, extratags=[(42113, "s", len(text), text, True)])
    record = build_one(path, tmp_path)
    assert record.source("B1").nodata == value
    chip = run(record.read_window((0, 0, 40, 50), ["B1"]))
    expected = np.full((1, 40, 50), value)
    expected[:, :, :40] = data
    assert_chip(chip, expected, expected != value)


def test_inks_stay_inks(tmp_path: Path) -> None:
    """GDAL shows CMYK as RGBA, its black as transparency; here four samples are what the file holds."""
    data, path = noise("uint8", (40, 40, 4)), tmp_path / "a.tif"
    tifffile.imwrite(path, data, photometric="separated", tile=(32, 32), compression="lzw", metadata=None)
    record = build_one(path, tmp_path)
    chip = run(record.read_window((0, 0, 40, 40), record.available_bands))
    assert_chip(chip, np.moveaxis(data, -1, 0), np.ones((4, 40, 40), bool))


@pytest.mark.parametrize("compress", ["lerc", "lerc_deflate", "lerc_zstd"])
@pytest.mark.parametrize("nodata", [None, -9999.0])
def test_lerc_has_a_mask_of_its_own(tmp_path: Path, compress: str, nodata: float | None) -> None:
    """async-tiff, tifffile: LERC's own mask was ignored, and 21 % of the pixels became 0."""
    data = noise("float32", (1, 70, 90))
    holes = noise("uint8", (1, 70, 90)) < 54
    data[holes] = np.nan
    path = gtiff(tmp_path / "a.tif", data, compress=compress, nodata=nodata, **TILED)
    chip = run(build_one(path, tmp_path).read_window((0, 0, 70, 90), ["B1"]))
    np.testing.assert_array_equal(np.asarray(chip.valid), ~holes)
    np.testing.assert_array_equal(np.asarray(chip.data)[~holes], data[~holes])
    assert not (np.asarray(chip.data)[holes] == 0).any()


def test_reversed_bits(tmp_path: Path) -> None:
    """tifffile's catalogue of corner cases: FillOrder 2 stores the bits of each byte the other way round."""
    data, path = noise("uint8", (40, 40)), tmp_path / "a.tif"
    tifffile.imwrite(path, data, rowsperstrip=40, metadata=None, extratags=[(269, "H", 1, 2, True)])
    content = Path(path).read_bytes()
    assert content.count(data.tobytes()) == 1
    mirrored = np.packbits(np.unpackbits(data[..., None], axis=-1), axis=-1, bitorder="little")
    altered = bytearray(content.replace(data.tobytes(), mirrored.tobytes()))
    struct.pack_into("<H", altered, entry_of(content, 269), 266)
    path.write_bytes(altered)
    record = assert_equals_rasterio(str(path), tmp_path)
    assert_chip(run(record.read_window((0, 0, 40, 40), ["B1"])), data[None], np.ones((1, 40, 40), bool))
