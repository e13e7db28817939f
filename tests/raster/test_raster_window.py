"""Windows by pixel: the same pixels, dtype and validity as rasterio, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import assert_chip, build_one, rasters, run, window_by_rasterio
from property_settings import examples
from rasterio.enums import Resampling as GdalResampling
from rasterio.warp import reproject

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import ReadError, UnknownBandError, UsageError
from rasteret_ml.geo.grid import Window
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import execute
from rasteret_ml.storage.open import open_reader
from rasteret_ml.testing import MemoryReader, make_cog

_SHAPE = (150, 190)


def _pixels(dtype: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.normal(0, 1000, (count, *_SHAPE)).astype(kind)
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, (count, *_SHAPE), dtype=kind, endpoint=True)


def _plain(path: Path, data: np.ndarray, **options: Any) -> str:
    """A tiled GeoTIFF that is no COG (planar, sparse, big-endian ones)."""
    profile = {
        "driver": "GTiff", "count": data.shape[0], "height": data.shape[1], "width": data.shape[2],
        "dtype": data.dtype.name, "crs": "EPSG:32633", "transform": Affine(10, 0, 500000, 0, -10, 5000000),
        "tiled": True, "blockxsize": 64, "blockysize": 48, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **(profile | options)) as target:
        target.write(data)
    return str(path)


def _make_files(folder: Path) -> dict[str, str]:
    """One small file per trait that changes how pixels are found."""
    rng = np.random.default_rng(7)
    blob = np.zeros(_SHAPE, bool)
    blob[20:120, 30:171] = True
    few = rng.integers(0, 5, (1, *_SHAPE), dtype=np.uint8)
    floats = _pixels("float32", 1, 3)
    floats[0, rng.random(_SHAPE) < 0.3] = -9999
    nans = _pixels("float64", 1, 4)
    nans[0, rng.random(_SHAPE) < 0.3] = np.nan
    holes = few.copy()
    holes[0, :96, 64:] = 0
    made: dict[str, str] = {}

    def cog(name: str, data: np.ndarray, **options: Any) -> None:
        made[name] = make_cog(folder / f"{name}.tif", data, blocksize=64, **options)

    cog("u16_deflate", _pixels("uint16", 1, 0))
    cog("i16_zstd", _pixels("int16", 1, 1), compress="zstd", nodata=-1)
    cog("u8_lzw_chunky", _pixels("uint8", 5, 2), compress="lzw", nodata=0)
    cog("u16_none_chunky", _pixels("uint16", 3, 9), compress="none")
    cog("i32_deflate", _pixels("int32", 2, 5), predictor="no")
    cog("f32_nodata", floats, nodata=-9999)
    cog("f64_nan", nans, nodata=float("nan"), compress="zstd")
    cog("u8_mask", few, mask=blob)
    cog("u8_mask_chunky", np.repeat(few, 3, axis=0) + np.arange(3, dtype=np.uint8)[:, None, None], mask=blob)
    cog("f32_lerc", _pixels("float32", 1, 6), compress="lerc", max_z_error=0)
    made["planar"] = _plain(folder / "planar.tif", _pixels("uint16", 3, 10), interleave="band", nodata=7)
    made["big_endian"] = _plain(folder / "big_endian.tif", _pixels("uint16", 2, 11), endianness="big", predictor=2)
    made["sparse"] = _plain(folder / "sparse.tif", holes, sparse_ok=True, compress=None)
    made["sparse_nodata"] = _plain(folder / "sparse_nodata.tif", holes, sparse_ok=True, nodata=0)
    made["strips"] = _plain(folder / "strips.tif", _pixels("int8", 2, 12), tiled=False, blockysize=33, compress="lzw")
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, RasterAccessor], MemoryReader]:
    """Paths and records by name, and a reader that holds all files."""
    folder = tmp_path_factory.mktemp("made")
    paths = _make_files(folder)
    collection = build(list(paths.values()), folder / "made.parquet", strict=True)
    records = dict(zip(paths, rasters(collection), strict=True))
    return paths, records, MemoryReader({path: Path(path).read_bytes() for path in paths.values()})


_NAMES = [
    "u16_deflate", "i16_zstd", "u8_lzw_chunky", "u16_none_chunky", "i32_deflate", "f32_nodata", "f64_nan", "u8_mask",
    "u8_mask_chunky", "f32_lerc", "planar", "big_endian", "sparse", "sparse_nodata", "strips",
]  # fmt: skip


@pytest.mark.parametrize("name", _NAMES)
def test_the_whole_image_and_its_surroundings(made: Any, name: str) -> None:
    """Every band, 20 pixels past the image on every side, of each layout, codec, mask and nodata kind."""
    paths, records, reader = made
    window = (-20, -20, _SHAPE[0] + 40, _SHAPE[1] + 40)
    chip = run(records[name].read_window(window, records[name].available_bands, backend=reader))
    assert_chip(chip, *window_by_rasterio(paths[name], window))
    covered = np.zeros(chip.grid.shape, bool)
    covered[20:-20, 20:-20] = True
    np.testing.assert_array_equal(np.asarray(chip.covered), covered)
    assert bool(np.asarray(chip.inside).all())


def test_the_sparse_files_are_sparse(made: Any) -> None:
    """The fixture really leaves tiles out; else the test above would prove nothing about them."""
    _, records, _ = made
    for name in ("sparse", "sparse_nodata"):
        assert (records[name].source("B1").metadata.tile_byte_counts == 0).any()
    assert records["planar"].source("B2").metadata.planar_configuration == 2
    assert records["u8_lzw_chunky"].source("B2").metadata.planar_configuration == 1
    assert records["u8_mask"].source("B1").metadata.mask is not None
    assert records["big_endian"].source("B1").metadata.image.big_endian


@st.composite
def _windows(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Inside, partly and fully outside, single pixels, and windows at the edges of tiles."""
    row = draw(st.integers(-90, _SHAPE[0] + 40) | st.sampled_from([0, 47, 48, 63, 64, 128, 149, 150]))
    col = draw(st.integers(-90, _SHAPE[1] + 40) | st.sampled_from([0, 63, 64, 128, 189, 190]))
    return row, col, draw(st.integers(1, 130)), draw(st.integers(1, 130))


@examples(120, database=None)
@given(name=st.sampled_from(_NAMES), window=_windows(), data=st.data())
def test_any_window_of_any_bands(made: Any, name: str, window: tuple[int, int, int, int], data: st.DataObject) -> None:
    """Random windows and any choice and order of bands, repeats included."""
    paths, records, reader = made
    count = len(records[name].available_bands)
    picked = data.draw(st.lists(st.integers(1, count), min_size=1, max_size=count + 1))
    chip = run(records[name].read_window(window, [f"B{i}" for i in picked], backend=reader))
    assert_chip(chip, *window_by_rasterio(paths[name], window, picked))
    assert chip.bands == tuple(f"B{i}" for i in picked)
    row, col, height, width = window
    with rasterio.open(paths[name]) as source:
        assert chip.grid.transform == source.transform @ Affine.translation(col, row)
    assert chip.grid.shape == (height, width)


def _random_windows(rng: np.random.Generator, height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    windows = [(-30, -30, 64, 64), (height - 30, width - 30, 64, 64), (height + 5, 3, 10, 10), (0, 0, height, width)]
    for _ in range(count):
        row, col = int(rng.integers(-50, height)), int(rng.integers(-50, width))
        windows.append((row, col, int(rng.integers(1, 300)), int(rng.integers(1, 300))))
    return windows


@pytest.mark.slow
def test_multidate_items_equal_rasterio(shared_data: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Both MGRS tiles, deflate and zstd, every band with SCL: inside, over the edges and outside."""
    items = sorted((shared_data / "multidate").glob("*/*.json"))
    records = rasters(build([str(p) for p in items], tmp_path / "c.parquet", bands=["B02", "B03", "B04", "B08", "SCL"]))
    assert len(records) == 10
    for item, record in zip(items, records, strict=True):
        for band in ("B02", "B03", "B04", "B08", "SCL"):
            path = item.parent / f"{band}.tif"
            (window,) = _random_windows(rng, 384, 384, 1)[-1:]
            for asked in (window, (-30, 300, 128, 128)):
                assert_chip(run(record.read_window(asked, [band])), *window_by_rasterio(path, asked))


def test_naip_equals_rasterio(shared_data: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """Pixel-interleaved bands, in another order than the file's."""
    for path in sorted((shared_data / "naip").glob("*.tif")):
        record = build_one(path, tmp_path)
        for window in _random_windows(rng, 723, 934, 4):
            chip = run(record.read_window(window, ["B4", "B1", "B2"]))
            assert_chip(chip, *window_by_rasterio(path, window, [4, 1, 2]))


@pytest.mark.slow
def test_landcover_equals_rasterio(shared_data: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """LZW tiles larger than the image, ten bands; and the label raster with its nodata."""
    files = sorted((shared_data / "landcover").glob("*/*.tif"))
    assert len(files) == 17
    for path in files:
        record = build_one(path, tmp_path)
        with rasterio.open(path) as source:
            height, width, count = source.height, source.width, source.count
        names = [f"Band {i + 1}" for i in range(count)]
        assert sorted(names) == record.available_bands
        (window,) = _random_windows(rng, height, width, 1)[-1:]
        for asked in (window, (height - 40, width - 40, 64, 64)):
            assert_chip(run(record.read_window(asked, names)), *window_by_rasterio(path, asked))


def _multires(shared_data: Path, folder: Path) -> RasterAccessor:
    files = sorted(str(p) for p in (shared_data / "multires").glob("B*.tif"))
    (record,) = rasters(build(files, folder / "m.parquet", bands=["B01", "B04", "B05", "B08", "B09", "B8A"]))
    return record


def test_bands_of_several_resolutions_nearest(shared_data: Path, tmp_path: Path) -> None:
    """On the 10 m grid a 20 m pixel is repeated 2 x 2, a 60 m one 6 x 6, wherever the window starts."""
    record = _multires(shared_data, tmp_path)
    window = Window(row=301, col=77, height=130, width=95)
    plan = record.plan(record.grid("B04").window(window), ["B04", "B05", "B01"], resampling="nearest")

    async def read() -> Any:
        async with open_reader() as reader:
            return (await execute([plan], Engine(reader=reader))).chips[0]

    chip = run(read())
    rows, cols = np.arange(301, 431), np.arange(77, 172)
    for i, (band, factor) in enumerate([("B04", 1), ("B05", 2), ("B01", 6)]):
        with rasterio.open(shared_data / "multires" / f"{band}.tif") as source:
            expected = source.read(1)[np.ix_(rows // factor, cols // factor)]
        np.testing.assert_array_equal(chip.data[i], expected, err_msg=band)
    assert chip.valid.all()
    assert chip.data.dtype == np.uint16


def test_bands_of_several_resolutions_bilinear(shared_data: Path, tmp_path: Path) -> None:
    """`read_window` resamples bilinearly, as GDAL does of the whole file (rounding aside), and marks the outside."""
    record = _multires(shared_data, tmp_path)
    window = (900, 900, 256, 256)
    chip = run(record.read_window(window, ["B04", "B8A", "B09"]))
    np.testing.assert_array_equal(
        np.asarray(chip.data)[0], window_by_rasterio(shared_data / "multires" / "B04.tif", window)[0][0]
    )
    for i, band in [(1, "B8A"), (2, "B09")]:
        with rasterio.open(shared_data / "multires" / f"{band}.tif") as source:
            expected = np.full((256, 256), np.nan)
            reproject(
                source.read(1).astype(np.float64), expected, src_transform=source.transform, src_crs=source.crs,
                dst_transform=chip.grid.transform, dst_crs=source.crs, resampling=GdalResampling.bilinear,
                src_nodata=np.nan, dst_nodata=np.nan,
            )  # fmt: skip
        valid = np.asarray(chip.valid)[i]
        np.testing.assert_array_equal(valid[:168, :168], True)
        assert not valid[169:].any()
        assert not valid[:, 169:].any()
        difference = np.asarray(chip.data)[i][:168, :168].astype(float) - expected[:168, :168]
        assert np.abs(difference).max() <= 0.5 + 1e-3


def test_the_first_band_says_the_grid(shared_data: Path, tmp_path: Path) -> None:
    """A window counts pixels of the first band asked for."""
    record = _multires(shared_data, tmp_path)
    chip = run(record.read_window((0, 0, 10, 10), ["B01"]))
    assert chip.grid.res == (60.0, 60.0)
    assert run(record.read_window((0, 0, 10, 10), ["B05"])).grid.res == (20.0, 20.0)


def test_a_file_without_georeferencing_reads_by_window(tmp_path: Path, rng: np.random.Generator) -> None:
    """No CRS, no transform: pixels are pixels."""
    data = rng.integers(0, 255, (1, 100, 90), dtype=np.uint8)
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        path = _plain(tmp_path / "bare.tif", data, crs=None, transform=None, blockysize=64)
    record = build_one(path, tmp_path)
    chip = run(record.read_window((-5, 40, 50, 60), ["B1"]))
    expected = np.zeros((1, 50, 60), np.uint8)
    expected[0, 5:, :50] = data[0, :45, 40:]
    np.testing.assert_array_equal(np.asarray(chip.data), expected)
    with pytest.raises(UsageError, match=r"no CRS.*read_window"):
        run(record.load_bands([(0, 0, 1, 1)], ["B1"]))


def test_tensors_are_native(made: Any) -> None:
    """torch tensors of the file's own type: uint16 stays uint16, int8 stays int8; nothing is promoted."""
    _, records, reader = made
    expected = {"u16_deflate": torch.uint16, "i16_zstd": torch.int16, "strips": torch.int8, "f32_nodata": torch.float32}
    for name, dtype in expected.items():
        chip = run(records[name].read_window((0, 0, 8, 8), ["B1"], backend=reader))
        assert chip.data.dtype == dtype
        assert chip.valid.dtype == chip.inside.dtype == chip.covered.dtype == torch.bool
        assert chip.data.shape == chip.valid.shape == (1, 8, 8)
        assert chip.inside.shape == (8, 8)


def test_a_band_that_is_not_there_is_named_with_those_that_are(made: Any) -> None:
    """Before any byte is asked for."""
    _, records, _ = made
    with pytest.raises(UnknownBandError, match=r"planar has no band 'B9'; it has: B1, B2, B3"):
        run(records["planar"].read_window((0, 0, 4, 4), ["B1", "B9"], backend=MemoryReader({})))


def test_bands_of_different_types_are_refused(shared_data: Path, tmp_path: Path) -> None:
    """uint16 imagery and a uint8 mask in one chip would need a promotion that nobody asked for."""
    files = [str(shared_data / "multires" / n) for n in ("B04.tif", "cloud_mask.tif")]
    (record,) = rasters(build(files, tmp_path / "c.parquet", bands=["B04", "cloud_mask"]))
    with pytest.raises(UsageError, match=r"B04: uint16, cloud_mask: uint8"):
        run(record.read_window((0, 0, 4, 4), ["B04", "cloud_mask"]))


@pytest.mark.parametrize("bands", [[], "B1"])
def test_band_codes_are_a_list(made: Any, bands: Any) -> None:
    """A lone string would be read letter by letter."""
    _, records, reader = made
    with pytest.raises(UsageError, match="non-empty list"):
        run(records["planar"].read_window((0, 0, 4, 4), bands, backend=reader))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_an_empty_window_is_refused(made: Any, size: tuple[int, int]) -> None:
    """`size=0` has no pixels."""
    _, records, reader = made
    with pytest.raises(UsageError, match="at least one row and column"):
        run(records["planar"].read_window((0, 0, *size), ["B1"], backend=reader))


def test_a_missing_file_names_record_band_and_tile(made: Any) -> None:
    """What was indexed has gone since."""
    _, records, _ = made
    with pytest.raises(
        ReadError, match=r"record planar, band B2, .*planar\.tif, full resolution, tile 0, bytes \d+-\d+.*no such file"
    ):
        run(records["planar"].read_window((0, 0, 4, 4), ["B2"], backend=MemoryReader({})))
