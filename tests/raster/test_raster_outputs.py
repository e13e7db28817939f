"""Output of `load_bands` as xarray and GeoPandas."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
import xarray as xr
from affine import Affine
from pixel_oracle import build_one, rasters, run
from rasterio.features import geometry_mask

from rasteret_ml.collection.build.build import build
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.execute import TileError
from rasteret_ml.testing import MemoryReader, make_cog

_X, _Y = 500000.0, 5000000.0


def _box(col: float, row: float, width: float, height: float) -> shapely.Polygon:
    return shapely.box(_X + 10 * col, _Y - 10 * (row + height), _X + 10 * (col + width), _Y - 10 * row)


_WHOLE = _box(0, 0, 40, 30)
_TRIANGLE = shapely.Polygon([(_X + 20, _Y - 30), (_X + 250, _Y - 40), (_X + 60, _Y - 260)])


def _raster(folder: Path, dtype: str, nodata: float | None = None, count: int = 1) -> tuple[np.ndarray, RasterAccessor]:
    """A raster of 30 x 40 pixels without a zero, dated by its name."""
    data = np.random.default_rng(2).integers(1, 100, (count, 30, 40)).astype(dtype)
    path = make_cog(folder / f"scene_20240315_{dtype}.tif", data, nodata=nodata)
    return data, build_one(path, folder)


def _dataset(record: RasterAccessor, shapes: Any, bands: list[str], **options: Any) -> xr.Dataset:
    return run(record.load_bands(shapes, bands, geometry_crs=32633, **options))  # type: ignore[return-value]


def _frame(record: RasterAccessor, shapes: Any, bands: list[str], **options: Any) -> gpd.GeoDataFrame:
    return run(record.load_bands(shapes, bands, for_xarray=False, geometry_crs=32633, **options))  # type: ignore[return-value]


def test_the_dataset_holds_the_files_pixels_on_its_grid(tmp_path: Path) -> None:
    """Variables by band, `[time, y, x]`, coordinates at pixel centres, CRS as rioxarray reads it."""
    data, record = _raster(tmp_path, "uint16", count=2)
    found = _dataset(record, [_box(5, 7, 20, 10)], ["B2", "B1"])
    assert isinstance(found, xr.Dataset)
    assert list(found.data_vars) == ["B2", "B1"]
    for band, i in (("B1", 0), ("B2", 1)):
        assert found[band].dims == ("time", "y", "x")
        assert found[band].dtype == np.uint16
        np.testing.assert_array_equal(found[band].values[0], data[i, 7:17, 5:25])
    np.testing.assert_allclose(found.x.values, _X + 10 * (np.arange(5, 25) + 0.5))
    np.testing.assert_allclose(found.y.values, _Y - 10 * (np.arange(7, 17) + 0.5))
    assert found.time.values[0] == np.datetime64("2024-03-15", "ns")
    assert found.attrs["id"] == "scene_20240315_uint16"
    reference = found["spatial_ref"].attrs
    assert pyproj.CRS(reference["crs_wkt"]).to_epsg() == 32633
    c, a, b, f, d, e = (float(v) for v in reference["GeoTransform"].split())
    assert Affine(a, b, c, d, e, f) == Affine(10, 0, _X + 50, 0, -10, _Y - 70)
    assert found["B1"].attrs["grid_mapping"] == "spatial_ref"


def test_output_overrides_for_xarray(tmp_path: Path) -> None:
    """Every way to name every output."""
    _, record = _raster(tmp_path, "uint8")
    for options, kind in [
        ({}, xr.Dataset),
        ({"for_xarray": False}, gpd.GeoDataFrame),
        ({"for_xarray": False, "output": "xarray"}, xr.Dataset),
        ({"for_xarray": True, "output": "geopandas"}, gpd.GeoDataFrame),
        ({"for_xarray": True, "output": "tensor"}, list),
    ]:
        assert isinstance(run(record.load_bands([_WHOLE], ["B1"], geometry_crs=32633, **options)), kind)


@pytest.mark.parametrize(
    ("dtype", "nodata", "masked"),
    [
        ("uint8", None, "float32"),
        ("uint16", None, "float32"),
        ("int16", None, "float32"),
        ("int32", None, "float64"),
        ("float32", None, "float32"),
        ("float64", None, "float64"),
        ("uint16", 0, "uint16"),
        ("int16", -5, "int16"),
        ("float32", -9999, "float32"),
    ],
)
@pytest.mark.parametrize("output", ["xarray", "geopandas"])
def test_integers_become_float_only_where_a_mask_needs_nan(
    tmp_path: Path, dtype: str, nodata: float | None, masked: str, output: str
) -> None:
    """A geometry of whole pixels leaves the type alone; one that cuts brings NaN, or the nodata value if declared."""
    data, record = _raster(tmp_path, dtype, nodata)

    def values(shape: shapely.Polygon) -> np.ndarray:
        if output == "xarray":
            return np.asarray(_dataset(record, [shape], ["B1"])["B1"].values[0])
        return np.asarray(_frame(record, [shape], ["B1"]).iloc[0]["data"])

    whole = values(_WHOLE)
    assert whole.dtype == data.dtype
    np.testing.assert_array_equal(whole, data[0])
    cut = values(_TRIANGLE)
    assert cut.dtype == np.dtype(masked)
    inside = geometry_mask([_TRIANGLE], (30, 40), Affine(10, 0, _X, 0, -10, _Y), invert=True)
    rows, cols = slice(3, 26), slice(2, 25)
    assert inside.sum() == inside[rows, cols].sum() > 0
    expected = np.where(inside, data[0].astype(masked), np.nan if nodata is None else nodata)[rows, cols]
    np.testing.assert_array_equal(cut, expected.astype(masked))


def test_tables_are_clipped_to_the_raster(tmp_path: Path) -> None:
    """Geometries beyond the edge add no empty rows and columns, unless boundless=True."""
    data, record = _raster(tmp_path, "uint16")
    shape = _box(30, 20, 50, 50)
    found = _dataset(record, [shape], ["B1"])["B1"]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found.values[0], data[0, 20:, 30:])
    kept = _dataset(record, [shape], ["B1"], boundless=True)["B1"].values[0]
    assert kept.shape == (50, 50)
    np.testing.assert_array_equal(kept[:10, :10], data[0, 20:, 30:])
    assert np.isnan(kept).sum() == 2500 - 100


def test_one_dataset_holds_all_geometries(tmp_path: Path) -> None:
    """The grid spans two separate boxes, and is NaN between them."""
    data, record = _raster(tmp_path, "uint16")
    found = _dataset(record, [_box(25, 20, 4, 4), _box(2, 3, 5, 6)], ["B1"])["B1"].values[0]
    expected = np.full((21, 27), np.nan, np.float32)
    expected[0:6, 0:5] = data[0, 3:9, 2:7]
    expected[17:21, 23:27] = data[0, 20:24, 25:29]
    np.testing.assert_array_equal(found, expected)


def test_the_frame_has_a_row_per_geometry_and_band(tmp_path: Path) -> None:
    """Aligned with the geometries by `geometry_id`; one that misses the raster has no row."""
    data, record = _raster(tmp_path, "uint16", nodata=7, count=2)
    shapes = [_box(100, 0, 5, 5), _box(2, 3, 5, 6), _TRIANGLE]
    frame = _frame(record, shapes, ["B1", "B2"])
    assert isinstance(frame, gpd.GeoDataFrame)
    assert frame.crs.to_epsg() == 32633
    assert list(zip(frame["geometry_id"], frame["band"], strict=True)) == [(1, "B1"), (1, "B2"), (2, "B1"), (2, "B2")]
    assert [shapes[i] for i in frame["geometry_id"]] == list(frame.geometry)
    row = frame.iloc[1]
    np.testing.assert_array_equal(row["data"], data[1, 3:9, 2:7])
    np.testing.assert_array_equal(row["valid"], data[1, 3:9, 2:7] != 7)
    assert row["transform"] == Affine(10, 0, _X + 20, 0, -10, _Y - 30)
    assert row["crs"] == "EPSG:32633"
    assert row["nodata"] == 7
    assert row["id"] == "scene_20240315_uint16"
    assert row["datetime"] == dt.datetime(2024, 3, 15)
    inside = geometry_mask([_TRIANGLE], frame.iloc[2]["data"].shape, frame.iloc[2]["transform"], invert=True)
    assert not frame.iloc[2]["valid"][~inside].any()


def test_nodata_is_the_fill_value_of_xarray(tmp_path: Path) -> None:
    """`_FillValue` is the declared nodata; absent if none is declared."""
    _, with_nodata = _raster(tmp_path, "int16", -5)
    assert _dataset(with_nodata, [_TRIANGLE], ["B1"])["B1"].attrs["_FillValue"] == -5
    _, without = _raster(tmp_path, "uint16")
    assert "_FillValue" not in _dataset(without, [_TRIANGLE], ["B1"])["B1"].attrs


def test_target_crs_reprojects_the_tables(tmp_path: Path) -> None:
    """Grid, coordinates and CRS are the target's; a constant raster stays constant inside and NaN outside."""
    path = make_cog(tmp_path / "c.tif", np.full((1, 30, 40), 77, np.uint8))
    record = build_one(path, tmp_path)
    found = _dataset(record, [_box(5, 5, 30, 20)], ["B1"], target_crs=4326)
    values = found["B1"].values[0]
    assert pyproj.CRS(found["spatial_ref"].attrs["crs_wkt"]).to_epsg() == 4326
    assert np.all((found.x.values > 14.9) & (found.x.values < 15.1))
    assert values.dtype == np.float32
    assert set(np.unique(values[~np.isnan(values)])) == {77}
    assert np.isnan(values).any()
    frame = _frame(record, [_box(5, 5, 30, 20)], ["B1"], target_crs=4326)
    assert frame.iloc[0]["crs"] == "EPSG:4326"


def _two_extents(folder: Path) -> RasterAccessor:
    """Return a record whose second band covers only the upper half."""
    ones = np.ones((1, 40, 40), np.uint16)
    make_cog(folder / "s" / "A.tif", ones)
    make_cog(folder / "s" / "B.tif", ones[:, :20] + 1)
    files = [str(folder / "s" / "A.tif"), str(folder / "s" / "B.tif")]
    (record,) = rasters(build(files, folder / "c.parquet", bands=["A", "B"]))
    return record


@pytest.mark.parametrize("output", ["xarray", "geopandas"])
def test_a_band_is_nan_outside_its_own_extent(tmp_path: Path, output: str) -> None:
    """Band B has no pixels in the lower half, and the output shows no zeros there."""
    record = _two_extents(tmp_path)
    whole = [_box(0, 0, 40, 40)]
    if output == "xarray":
        found = _dataset(record, whole, ["A", "B"])
        a, b = found["A"].values[0], found["B"].values[0]
    else:
        frame = _frame(record, whole, ["A", "B"])
        a, b = frame.iloc[0]["data"], frame.iloc[1]["data"]
    assert (a == 1).all()
    assert (b[:20] == 2).all()
    assert np.isnan(b[20:].astype(float)).all()


def _corrupt(folder: Path) -> tuple[RasterAccessor, MemoryReader]:
    """Return a raster of 2 x 2 tiles without nodata, the last of which is corrupt."""
    data = np.random.default_rng(3).integers(1, 9, (1, 128, 128), dtype=np.uint16)
    path = make_cog(folder / "broken.tif", data, blocksize=64, overviews="none")
    record = build_one(path, folder)
    image = record.source("B1").metadata
    content = bytearray(Path(path).read_bytes())
    start, count = int(image.tile_offsets[3]), int(image.tile_byte_counts[3])
    content[start : start + count] = b"\xff" * count
    return record, MemoryReader({path: bytes(content)})


def test_the_frame_marks_pixels_that_could_not_be_read(tmp_path: Path) -> None:
    """`failures=` lists the tile, and `valid` is False exactly in it."""
    record, reader = _corrupt(tmp_path)
    failures: list[TileError] = []
    row = _frame(record, [_box(0, 0, 128, 128)], ["B1"], backend=reader, failures=failures).iloc[0]
    assert [failure.tile for failure in failures] == [3]
    expected = np.ones((128, 128), bool)
    expected[64:, 64:] = False
    np.testing.assert_array_equal(row["valid"], expected)
    assert (row["data"][expected] > 0).all()


def test_the_dataset_shows_no_zeros_for_pixels_that_could_not_be_read(tmp_path: Path) -> None:
    """They are NaN if no nodata is declared, because a Dataset has no validity."""
    record, reader = _corrupt(tmp_path)
    failures: list[TileError] = []
    found = _dataset(record, [_box(0, 0, 128, 128)], ["B1"], backend=reader, failures=failures)
    values = found["B1"].values[0]
    assert len(failures) == 1
    assert (values[:64] > 0).all()
    assert np.isnan(values[64:, 64:].astype(float)).all()


@pytest.mark.parametrize("output", ["xarray", "geopandas"])
def test_pixels_masked_by_the_file(tmp_path: Path, output: str) -> None:
    """They are not `valid` in GeoPandas, and NaN in xarray."""
    mask = np.zeros((30, 40), bool)
    mask[5:20, 5:20] = True
    record = build_one(make_cog(tmp_path / "m.tif", np.full((1, 30, 40), 9, np.uint8), mask=mask), tmp_path)
    if output == "geopandas":
        np.testing.assert_array_equal(_frame(record, [_WHOLE], ["B1"]).iloc[0]["valid"], mask)
        return
    values = _dataset(record, [_WHOLE], ["B1"])["B1"].values[0]
    np.testing.assert_array_equal(~np.isnan(values.astype(float)), mask)


def test_real_data_as_tables(shared_data: Path, tmp_path: Path) -> None:
    """NAIP with nodata 0: type kept, zero outside the polygon, the file's pixels inside."""
    path = shared_data / "naip" / "m_4709963_se_14_1_20140720.tif"
    record = build_one(path, tmp_path)
    with rasterio.open(path) as source:
        centre = shapely.box(*source.bounds).centroid.buffer(600)
        expected = source.read([1, 4])
        outside = geometry_mask([centre], source.shape, source.transform)
        expected[:, outside] = 0
    found = run(record.load_bands([centre], ["B1", "B4"], geometry_crs=26914))
    assert isinstance(found, xr.Dataset)
    row, col = round((5209245.0 - found.y.values[0]) / 5 - 0.5), round((found.x.values[0] - 485900.0) / 5 - 0.5)
    part = (slice(row, row + found.sizes["y"]), slice(col, col + found.sizes["x"]))
    assert (~outside).sum() == (~outside)[part].sum() > 0
    for band, pixels in zip(("B1", "B4"), expected, strict=True):
        assert found[band].dtype == np.uint8
        np.testing.assert_array_equal(found[band].values[0], pixels[part])
