"""Ordinary files that rasteret refused or broke on (`reference/rasteret.md`, section 5, numbers 13-16)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
import shapely
import tifffile
import torch
from affine import Affine
from peer_files import GRID, TILED, assert_equals_rasterio, dataset_of, gtiff, noise, photo, slices
from pixel_oracle import assert_chip, build_one, rasters, run, window_by_rasterio
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp

import rasteret_ml as rm
from rasteret_ml.errors import NotATiffError, UnknownBandError
from rasteret_ml.testing import make_cog

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def _jpeg(path: Path, **options: Any) -> str:
    return gtiff(path, photo(3), compress="jpeg", photometric="RGB", interleave="pixel", **TILED, **options)


def _webp(path: Path) -> str:
    return gtiff(path, photo(3), compress="webp", photometric="RGB", interleave="pixel", **TILED)


def _strips(path: Path) -> str:
    return gtiff(path, noise("int16", (2, 70, 90)), tiled=False, blockysize=13, compress="lzw", predictor=2)


def _one_strip(path: Path) -> str:
    return gtiff(path, noise("uint8", (1, 70, 90)), tiled=False, blockysize=70)


def _rotated(path: Path) -> str:
    return gtiff(path, noise("uint8", (1, 70, 90)), transform=GRID @ Affine.rotation(30) @ Affine.shear(5, 10))


def _control_points(path: Path) -> str:
    corners = [(0, 0, 15.0, 45.0), (0, 90, 15.1, 45.01), (70, 0, 15.01, 44.9), (70, 90, 15.12, 44.92)]
    points = [GroundControlPoint(row=r, col=c, x=x, y=y) for r, c, x, y in corners]
    return gtiff(path, noise("uint8", (1, 70, 90)), transform=Affine.identity(), crs="EPSG:4326", gcps=points)


def _mask(path: Path) -> str:
    mask = np.zeros((70, 90), bool)
    mask[10:50, 20:80] = True
    return make_cog(path, noise("uint8", (2, 70, 90)), mask=mask, blocksize=128)


def _alpha(path: Path) -> str:
    data = noise("uint16", (4, 70, 90))
    data[3] = np.where(data[3] > 30000, 65535, 0)
    return gtiff(path, data, photometric="RGB", alpha="non-premultiplied", interleave="pixel", compress="zstd", **TILED)


def _undescribed_alpha(path: Path) -> str:
    data = noise("uint8", (2, 70, 90))
    data[1] = np.where(data[1] > 127, 255, 0)
    made = gtiff(path, data, alpha="yes", compress="deflate")
    with rasterio.open(made) as source:
        assert source.colorinterp[1] == ColorInterp.alpha
    return made


def _complex(path: Path) -> str:
    return gtiff(path, noise("float32", (1, 70, 90)) * np.complex64(1 + 2j), compress="deflate")


@pytest.mark.parametrize(
    "make",
    [
        _jpeg, _webp, _strips, _one_strip, _rotated, _control_points, _mask, _alpha, _undescribed_alpha, _complex,
    ],
)  # fmt: skip
def test_files_that_rasteret_refused(tmp_path: Path, make: Callable[[Path], str]) -> None:
    """rasteret 5.16: unsupported codecs, layouts, georeferences; masks and alpha were not looked at."""
    assert_equals_rasterio(make(tmp_path / "a.tif"), tmp_path)


@pytest.mark.parametrize("dtype", ["complex64", "complex_int16"])
def test_complex_pixels(tmp_path: Path, dtype: str) -> None:
    """rasteret 5.16: no complex, no CInt16; both keep their imaginary part."""
    data = np.round(noise("float32", (2, 40, 50)) + 1j * noise("float32", (2, 40, 50), 1)).astype(np.complex64)
    path = gtiff(tmp_path / "c.tif", data, dtype=dtype, compress="deflate")
    chip = run(build_one(path, tmp_path).read_window((-2, -2, 30, 30), ["B1", "B2"]))
    assert chip.data.dtype == torch.complex64
    np.testing.assert_array_equal(chip.data[:, 2:, 2:], data[:, :28, :28])
    assert bool(chip.valid[:, 2:, 2:].all())
    assert not bool(chip.valid[:, :2].any())


@pytest.mark.parametrize(("compression", "count"), [("jpegxl", 1), ("jpegxl", 3), ("jpeg2000", 1), ("jpeg2000", 3)])
def test_jxl_and_jpeg_2000(tmp_path: Path, compression: str, count: int) -> None:
    """rasteret 5.16: no JPEG XL, no JPEG 2000 (lossless ones here: what was written)."""
    data, path = photo(count), tmp_path / "a.tif"
    lossless = {"lossless": True} if compression == "jpegxl" else {"level": 0}
    tifffile.imwrite(
        path, data[0] if count == 1 else np.moveaxis(data, 0, -1), tile=(32, 32), compression=compression,
        compressionargs=lossless, photometric="rgb" if count == 3 else "minisblack", metadata=None,
    )  # fmt: skip
    record = build_one(path, tmp_path, crs=32633)
    chip = run(record.read_window((0, 0, 70, 90), record.available_bands))
    assert_chip(chip, data, np.ones(data.shape, bool))


def test_ycbcr_jpeg_becomes_rgb(tmp_path: Path) -> None:
    """rasteret 5.16: GDAL's JPEG COGs (YCbCr, tables in tag 347) were refused; libjpegs differ by a few levels."""
    path = make_cog(tmp_path / "a.tif", photo(3), compress="jpeg", blocksize=128)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.YCBCR
        expected = np.moveaxis(tiff.pages[0].asarray(), -1, 0)
    record = build_one(path, tmp_path)
    chip = run(record.read_window((0, 0, 70, 90), record.available_bands))
    assert_chip(chip, expected, np.ones(expected.shape, bool))
    assert np.abs(expected.astype(int) - photo(3)).mean() < 8


def test_overviews_are_read(tmp_path: Path) -> None:
    """rasteret 5.16: overviews were not known; each level's pixels and mask are GDAL's."""
    mask = np.zeros((300, 260), bool)
    mask[40:200, 10:250] = True
    path = make_cog(tmp_path / "a.tif", noise("uint16", (2, 300, 260)), mask=mask, blocksize=64)
    record = build_one(path, tmp_path)
    with rasterio.open(path) as source:
        factors = source.overviews(1)
    assert len(factors) >= 2
    for level in range(1, len(factors) + 1):
        with rasterio.open(path, overview_level=level - 1) as source:
            data, valid = source.read(), source.read_masks() != 0
        chip = run(record.read_window((0, 0, *data.shape[1:]), ["B1", "B2"], level=level))
        assert_chip(chip, data, valid)
        assert not valid.all()


def test_scale_and_offset_are_facts_of_each_band(tmp_path: Path) -> None:
    """rasteret 5.16: per-band scale and offset were dropped; here pixels stay raw and the facts come along."""
    data = noise("int16", (2, 20, 20))
    path = gtiff(tmp_path / "a.tif", data)
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (0.0001, 2.5), (-0.1, 7.0)
    sample = dataset_of(path, tmp_path)[slices(0, 0, 20, 20)]
    np.testing.assert_array_equal(sample["image"].numpy(), data)
    assert sample["scale"].tolist() == pytest.approx([0.0001, 2.5])
    assert sample["offset"].tolist() == pytest.approx([-0.1, 7.0])


def test_colour_tables_leave_the_values_raw(tmp_path: Path) -> None:
    """rasteret 5.16: palette files were refused; their numbers are classes, not colours."""
    data = noise("uint8", (1, 40, 40)) % 5
    path = gtiff(tmp_path / "p.tif", data, photometric="palette", compress="deflate")
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {i: (40 * i, 255 - 40 * i, 7, 255) for i in range(5)})
    assert_equals_rasterio(path, tmp_path)
    mask = dataset_of(path, tmp_path, is_image=False)[slices(0, 0, 40, 40)]["mask"]
    np.testing.assert_array_equal(mask.numpy(), data[0])


def test_a_crs_without_a_code_is_kept(tmp_path: Path) -> None:
    """rasteret 5.16: a CRS without EPSG made the build raise; here places in it are where pyproj has them."""
    own = pyproj.CRS("+proj=laea +lat_0=12.5 +lon_0=31 +x_0=77 +y_0=33 +datum=WGS84 +units=m")
    data = noise("uint16", (1, 60, 80))
    path = make_cog(tmp_path / "a.tif", data, crs=own.to_wkt(), transform=Affine(10, 0, 1000, 0, -10, 2000))
    record = build_one(path, tmp_path)
    assert isinstance(record.crs, str)
    to_lonlat = pyproj.Transformer.from_crs(own, 4326, always_xy=True).transform
    centre = shapely.Point(1000 + 10 * 30.5, 2000 - 10 * 20.5)
    around = shapely.transform(centre.buffer(0.5), to_lonlat, interleaved=False)
    (chip,) = run(record.load_bands([around], ["B1"], output="tensor"))
    assert chip.data.tolist() == [[[data[0, 20, 30]]]]
    dataset = dataset_of(path, tmp_path)
    x, y, _ = dataset.bounds
    np.testing.assert_array_equal(dataset[x, y]["image"].numpy(), data)


def test_a_box_over_the_antimeridian(tmp_path: Path) -> None:
    """rasteret 5.16: a bbox whose west is east of its east raised; it means the two strips at the line."""
    for name, west in (("fiji", 179.0), ("gulf", 0.0), ("samoa", -180.0)):
        make_cog(
            tmp_path / f"{name}.tif", np.full((1, 50, 100), 7, np.uint8), crs="EPSG:4326",
            transform=Affine(0.01, 0, west, 0, -0.01, 0.25),
        )  # fmt: skip
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", datetime=None)

    def found(*box: float) -> list[str]:
        return [record.id for record in rasters(collection.subset(bbox=box))]

    assert found(179.5, -1, -179.5, 1) == ["fiji", "samoa"]
    assert found(179.5, -1, 179.9, 1) == ["fiji"]
    assert found(-179.5, -1, 178, 1) == ["gulf", "samoa"]


def test_a_scene_across_the_antimeridian(tmp_path: Path) -> None:
    """rasteret 5.16: such a scene raised, or its footprint spanned the world; here it is two small parts, and read."""
    grid = Affine(100, 0, 830000, 0, -100, 100000)  # UTM 60: the line lies near x = 834000
    path = make_cog(tmp_path / "a.tif", noise("uint16", (1, 90, 100)), crs="EPSG:32660", transform=grid)
    record = build_one(path, tmp_path)
    outline = shapely.from_wkb(record.footprint)
    west, _, east, _ = outline.bounds
    assert (west, east) == pytest.approx((-180, 180))
    assert outline.area < 0.01
    (chip,) = run(record.load_bands([outline], ["B1"], output="tensor"))
    row, col = (round((100000 - chip.grid.transform.f) / 100), round((chip.grid.transform.c - 830000) / 100))
    assert_chip(chip, *window_by_rasterio(path, (row, col, *chip.grid.shape)))
    assert int(chip.valid.sum()) == 9000


def test_tags_of_type_undefined(tmp_path: Path) -> None:
    """rasteret 5.13: a tag of type 7 (an ICC profile, JPEG tables) killed the header's parse."""
    icc, path = bytes(range(256)) * 3, tmp_path / "icc.tif"
    data = noise("uint8", (1, 64, 64))
    tifffile.imwrite(path, data[0], tile=(32, 32), compression="deflate", iccprofile=icc, metadata=None)
    chip = run(build_one(path, tmp_path).read_window((0, 0, 64, 64), ["B1"]))
    np.testing.assert_array_equal(np.asarray(chip.data), data)
    jpeg = _jpeg(tmp_path / "jpeg.tif", jpegtablesmode=3)
    with tifffile.TiffFile(jpeg) as tiff:
        assert tiff.pages[0].tags[347].dtype == tifffile.DATATYPE.UNDEFINED
    assert_equals_rasterio(jpeg, tmp_path)


@pytest.mark.parametrize("nodata", [float("inf"), float("-inf")])
def test_infinite_nodata(tmp_path: Path, nodata: float) -> None:
    """rasteret 5.14: `nodata=inf` raised OverflowError at the build."""
    data = noise("float32", (1, 40, 40))
    data[0, 5:15, 5:15] = nodata
    path = make_cog(tmp_path / "a.tif", data, nodata=nodata)
    assert_equals_rasterio(path, tmp_path)
    sample = dataset_of(path, tmp_path)[slices(0, 0, 40, 40)]
    np.testing.assert_array_equal(sample["mask_valid"].numpy(), np.isfinite(data))


def test_one_unreadable_file_does_not_abort_a_build(tmp_path: Path) -> None:
    """rasteret 5.15: one bad asset ended an 18 minute build; here it is listed and the others are there."""
    for name in "ac":
        for band in ("B02", "B03"):
            make_cog(tmp_path / f"{name}_{band}.tif", np.full((1, 16, 16), 5, np.uint8))
    (tmp_path / "b_B02.tif").write_text("<!doctype html><title>Sign in</title>")
    (tmp_path / "c_B03.tif").write_bytes(b"")
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["B02", "B03"])
    assert {(f.record, f.band, type(f.error)) for f in collection.report.failures} >= {("b", "B02", NotATiffError)}
    assert {(f.record, f.band) for f in collection.report.failures} == {("b", "B02"), ("c", "B03")}
    a, c = rasters(collection)
    assert (a.id, a.available_bands, c.id, c.available_bands) == ("a", ["B02", "B03"], "c", ["B02"])
    assert set(run(c.read_window((0, 0, 16, 16), ["B02"])).data.unique().tolist()) == {5}
    with pytest.raises(UnknownBandError, match="B03"):
        run(c.read_window((0, 0, 16, 16), ["B03"]))
