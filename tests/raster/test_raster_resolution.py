"""Coarser and finer pixels by `res=`, default kernels, and a CRS for files that have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pixel_oracle import build_one, run
from rasterio.enums import Resampling

from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog


@pytest.fixture(scope="module")
def cog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """512 x 512 pixels of 10 m with overviews of 20 and 40 m."""
    path = tmp_path_factory.mktemp("res") / "a.tif"
    data = np.random.default_rng(0).integers(1, 9999, (2, 512, 512)).astype(np.uint16)
    make_cog(path, data, blocksize=128, nodata=0)
    return path


@pytest.mark.parametrize(("res", "level"), [(20, 1), ((40, 40), 2)])
def test_a_coarser_read_is_the_overview(cog: Path, tmp_path: Path, res, level: int) -> None:
    """Where the pixels coincide they are the overview's own, in every output."""
    record = build_one(cog, tmp_path)
    area = shapely.box(500200, 4997000, 503400, 4999800)
    (chip,) = run(record.load_bands([area], ["B1", "B2"], output="tensor", geometry_crs=32633, res=res))
    with rasterio.open(cog, overview_level=level - 1) as source:
        window = source.window(*area.bounds)
        np.testing.assert_array_equal(np.asarray(chip.data), source.read(window=window))
    frame = run(record.load_bands([area], ["B1"], geometry_crs=32633, res=res))
    np.testing.assert_array_equal(frame["B1"].values[0], np.asarray(chip.data)[0])
    size = res if isinstance(res, int) else res[0]
    assert abs(float(frame.x[1] - frame.x[0])) == size


def test_a_finer_read_repeats_pixels(cog: Path, tmp_path: Path) -> None:
    """`res=5` with nearest: each pixel four times."""
    record = build_one(cog, tmp_path)
    area = shapely.box(500200, 4999500, 500400, 4999700)
    options = {"output": "tensor", "geometry_crs": 32633}
    (fine,) = run(record.load_bands([area], ["B1"], res=5, resampling="nearest", **options))
    (own,) = run(record.load_bands([area], ["B1"], **options))
    repeated = np.asarray(own.data)[0].repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(np.asarray(fine.data)[0], repeated)


@pytest.mark.parametrize("res", [0, -10, float("nan"), (10, 20, 30)])
def test_a_pixel_size_that_cannot_be(cog: Path, tmp_path: Path, res) -> None:
    """Refused at the door."""
    record = build_one(cog, tmp_path)
    with pytest.raises(UsageError, match="res"):
        run(record.load_bands([shapely.box(500200, 4999500, 500400, 4999700)], ["B1"], res=res, geometry_crs=32633))


def test_colour_tables_and_bits_are_never_averaged(tmp_path: Path, rng: np.random.Generator) -> None:
    """Values that are codes: without a word about the kernel, only values that occur."""
    codes = rng.choice([3, 200], (1, 90, 90)).astype(np.uint8)
    profile = {"driver": "GTiff", "width": 90, "height": 90, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
    transform = Affine(10, 0, 500000, 0, -10, 5000000)
    with rasterio.open(tmp_path / "palette.tif", "w", **profile, transform=transform) as target:
        target.write_colormap(1, {3: (1, 2, 3), 200: (9, 8, 7)})
        target.write(codes)
    with rasterio.open(tmp_path / "bits.tif", "w", **profile, transform=transform, nbits=1) as target:
        target.write(codes // 200)
    for name, values in (("palette", {3, 200}), ("bits", {0, 1})):
        record = build_one(tmp_path / f"{name}.tif", tmp_path)
        (chip,) = run(record.load_bands([record.geometry], ["B1"], target_crs=32632, output="tensor"))
        seen = np.asarray(chip.data)[np.asarray(chip.valid)]
        assert set(np.unique(seen)) == values


def test_a_crs_for_files_that_have_none(tmp_path: Path) -> None:
    """`build(..., crs=)` is for those alone; with it they have a place."""
    data = np.arange(10000, dtype=np.uint16).reshape(1, 100, 100)
    transform = Affine(10, 0, 500000, 0, -10, 5000000)
    profile = {"driver": "GTiff", "width": 100, "height": 100, "count": 1, "dtype": "uint16", "transform": transform}
    for name, crs in (("none", None), ("own", "EPSG:32632")):
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile, crs=crs) as target:
            target.write(data)
    placed = build_one(tmp_path / "none.tif", tmp_path, crs="EPSG:32633")
    assert placed.crs == 32633
    assert build_one(tmp_path / "own.tif", tmp_path, crs="EPSG:32633").crs == 32632
    area = shapely.box(500100, 4999500, 500300, 4999700)
    (chip,) = run(placed.load_bands([area], ["B1"], geometry_crs=32633, output="tensor"))
    np.testing.assert_array_equal(np.asarray(chip.data)[0], data[0, 30:50, 10:30])
    placeless = build_one(tmp_path / "none.tif", tmp_path)
    with pytest.raises(UsageError, match=r"no CRS.*read_window"):
        run(placeless.load_bands([area], ["B1"], geometry_crs=32633, output="tensor"))


def test_a_level_asked_for_by_number_is_that_level(tmp_path: Path, rng: np.random.Generator) -> None:
    """Also of a colour table, whose overviews are not used unasked."""
    codes = rng.integers(0, 9, (1, 200, 200)).astype(np.uint8)
    profile = {"driver": "GTiff", "width": 200, "height": 200, "count": 1, "dtype": "uint8", "crs": "EPSG:32633"}
    path = tmp_path / "palette.tif"
    transform = Affine(10, 0, 500000, 0, -10, 5000000)
    with rasterio.open(path, "w", **profile, tiled=True, blockxsize=64, blockysize=64, transform=transform) as target:
        target.write_colormap(1, {i: (i, i, i) for i in range(9)})
        target.write(codes)
    with rasterio.open(path, "r+") as target:
        target.build_overviews([2], Resampling.mode)
    record = build_one(path, tmp_path)
    with rasterio.open(path, overview_level=0) as source:
        chip = run(record.read_window((0, 0, 100, 100), ["B1"], level=1))
        np.testing.assert_array_equal(np.asarray(chip.data), source.read())
    unasked = record.plan(record.grid("B1", 1), ["B1"])
    assert unasked.bands[0].level.number == 0
