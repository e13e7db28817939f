"""Every pixel right: generated GeoTIFFs of every make, built, read whole and by window, equal GDAL's bit for bit."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from affine import Affine
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from pixel_oracle import build_one, rasters, run, window_by_rasterio
from property_settings import examples
from rasterio.shutil import copy as gdal_copy
from rasterio.windows import Window as RioWindow

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import DataError
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.storage.local import LocalReader
from rasteret_ml.storage.open import open_reader
from rasteret_ml.testing import RangeServer, RecordingReader

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::rasterio.errors.NodataShadowWarning"),
]

_EXAMPLES = examples(80, suppress_health_check=[HealthCheck.too_slow])
_FEW = examples(20, suppress_health_check=[HealthCheck.too_slow])
_TRANSFORM = Affine(10, 0, 500000, 0, -10, 5000000)
_INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
_FLOATS = ["float32", "float64"]
_COMPLEX = ["complex64", "complex128"]
_PREDICTED = ("deflate", "lzw", "zstd")
_LERC = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
_numbers = count()


@dataclass(frozen=True)
class Make:
    """How one file is made."""

    data: np.ndarray[Any, Any]
    options: dict[str, Any]
    nodata: int | float | None
    mask: np.ndarray[Any, Any] | None
    sparse: bool
    tail: bool
    seed: int

    def __repr__(self) -> str:
        facts = {"shape": self.data.shape, "dtype": self.data.dtype.name, "nodata": self.nodata, "seed": self.seed}
        facts |= {"mask": self.mask is not None, "sparse": self.sparse, "tail": self.tail}
        return f"{facts} {self.options}"


def _pixels(dtype: str, shape: tuple[int, ...], bits: int | None, seed: int) -> np.ndarray[Any, Any]:
    """Noise over the whole type and runs of equal values; floats have NaN, infinities and both zeros."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind in "iu":
        limits = np.iinfo(dtype)
        most = limits.max if bits is None else 2**bits - 1
        noise = rng.integers(limits.min, most, shape, dtype=dtype, endpoint=True)
        return np.where(rng.random(shape) < 0.6, noise, np.dtype(dtype).type(min(7, most)))
    values = rng.normal(0, 1e3, shape).astype(dtype)
    if kind == "c":
        values = values + (1j * rng.normal(0, 1e3, shape)).astype(dtype)
    odd = rng.random(shape)
    for limit, value in ((0.05, np.nan), (0.1, np.inf), (0.15, -np.inf), (0.2, 0.0), (0.25, -0.0), (0.4, 7.0)):
        values[(odd < limit) & (odd >= limit - 0.05)] = value
    return values


@st.composite
def _layouts(draw: st.DrawFn, height: int) -> dict[str, Any]:
    kind = draw(st.sampled_from(["tiles", "rectangles", "strips", "one strip", "large tiles"]))
    side = st.sampled_from([16, 32, 48])
    if kind == "tiles":
        tile = draw(side)
        return {"tiled": True, "blockxsize": tile, "blockysize": tile}
    if kind == "rectangles":
        return {"tiled": True, "blockxsize": draw(side), "blockysize": draw(side)}
    if kind == "large tiles":
        return {"tiled": True, "blockxsize": 160, "blockysize": 128}
    rows = height if kind == "one strip" else draw(st.integers(1, height))
    return {"tiled": False, "blockysize": rows}


def _codecs(dtype: str, bits: int | None, bands: int) -> list[dict[str, Any]]:
    """The lossless codecs and predictors for a type."""
    found = [{"compress": name} for name in ("none", "packbits", "lzma", *_PREDICTED)]
    width = np.dtype(dtype).itemsize
    if bits is None and dtype not in _COMPLEX:
        found += [{"compress": name, "predictor": 2} for name in _PREDICTED]
    if dtype in _FLOATS:
        found += [{"compress": name, "predictor": 3} for name in _PREDICTED]
    if bits is None and dtype in _LERC:
        found += [{"compress": name, "max_z_error": 0} for name in ("lerc", "lerc_deflate", "lerc_zstd")]
    if dtype == "uint8" and bits is None and bands in (3, 4):
        found += [{"compress": "webp", "webp_lossless": True}]
    return found if width < 16 else [entry for entry in found if entry["compress"] != "lzma"]


@st.composite
def makes(draw: st.DrawFn, driver: str = "GTiff") -> Make:
    """Any file that GDAL can write without loss."""
    bits = draw(st.sampled_from([None, None, None, *range(1, 8), *range(9, 16)]))
    dtype = draw(st.sampled_from(_INTEGERS + _FLOATS + _COMPLEX))
    if bits is not None:
        dtype = "uint8" if bits < 9 else "uint16"
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 110))
    bands, seed = draw(st.integers(1, 5)), draw(st.integers(0, 2**16))
    options = dict(draw(st.sampled_from(_codecs(dtype, bits, bands)))) | {"driver": driver}
    interleaves = ["pixel", "band"] + (["tile"] if driver == "COG" else [])
    if driver == "GTiff":
        options |= draw(_layouts(height)) | {"interleave": draw(st.sampled_from(interleaves))}
        order = "little" if options["compress"].startswith("lerc") else draw(st.sampled_from(["little", "big"]))
        options |= {"bigtiff": draw(st.sampled_from(["yes", "no"])), "endianness": order}  # LERC: a test of its own
    else:
        options["blocksize"] = draw(st.sampled_from([128, 256]))
        if _has_cog_interleave():
            options["interleave"] = draw(st.sampled_from(interleaves))
        if "predictor" in options:
            options["predictor"] = {2: "standard", 3: "floating_point"}[options["predictor"]]
    if bits is not None:
        options["nbits"] = bits
    if options["compress"] == "webp" or (options["compress"].startswith("lerc") and dtype in _FLOATS):
        options["interleave"] = "pixel"
    data = _pixels(dtype, (bands, height, width), bits, seed)
    if options["compress"].startswith("lerc"):
        data = np.nan_to_num(data, posinf=1, neginf=-1)
    nodata = draw(
        st.sampled_from(
            [None, 0, 7 if bits is None else min(7, 2**bits - 1)] + ([np.nan, np.inf] if dtype in _FLOATS else [])
        )
    )
    mask = np.random.default_rng(seed).random((height, width)) < 0.7 if draw(st.booleans()) else None
    return Make(data, options, nodata, mask, draw(st.booleans()), draw(st.booleans()), seed)


def _has_cog_interleave() -> bool:
    """GDAL 3.11 and later write the COGs whose planes are apart."""
    return tuple(int(v) for v in rasterio.__gdal_version__.split(".")[:2]) >= (3, 11)


def write(make: Make, folder: Path) -> Path:
    """The file, by GDAL; sparse ones hold only the blocks that have pixels written to them."""
    path = folder / f"{next(_numbers)}.tif"
    options = dict(make.options)
    cog = options.pop("driver") == "COG"
    bands, height, width = make.data.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": make.data.dtype.name}
    profile |= {"crs": "EPSG:32633", "transform": _TRANSFORM, "nodata": make.nodata}
    first = profile | ({"nbits": options["nbits"]} if cog and "nbits" in options else {} if cog else options)
    temporary = path.with_suffix(".source.tif") if cog else path
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        with rasterio.open(temporary, "w", **first, sparse_ok=make.sparse) as target:
            part = RioWindow(0, 0, width, max(1, height // 2)) if make.sparse else RioWindow(0, 0, width, height)
            target.write(make.data[:, : int(part.height)], window=part)
            if make.mask is not None:
                target.write_mask(make.mask[: int(part.height)], window=part)
        if make.tail and not cog:
            with rasterio.open(path, "r+") as target:  # the directory grows and moves to the end of the file
                target.update_tags(remark="x" * 2000)
        if cog:
            gdal_copy(temporary, path, driver="COG", sparse_ok=make.sparse, overviews="none", **options)
            temporary.unlink()
    return path


def _windows(shape: tuple[int, int], seed: int, number: int = 6) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, height and width: the whole image first, then anywhere, past the edges too."""
    yield 0, 0, *shape
    rng = np.random.default_rng(seed)
    for _ in range(number):
        height, width = (int(rng.integers(1, side + 12)) for side in shape)
        row, col = (int(rng.integers(-10, side + 10)) for side in shape)
        yield row, col, height, width


def check(path: Path, record: RasterAccessor, seed: int, exact: bool = True) -> None:
    """Whole and in random windows, pixels bit for bit and validity, equal rasterio's."""
    with rasterio.open(path) as source:
        shape, bands = source.shape, [f"B{i}" for i in source.indexes]
    windows = list(_windows(shape, seed))

    async def read() -> list[Any]:
        async with open_reader() as reader:
            return await asyncio.gather(*(record.read_window(window, bands, backend=reader) for window in windows))

    for window, chip in zip(windows, run(read()), strict=True):
        data, valid = window_by_rasterio(path, window)
        if data.dtype.kind in "fc":
            valid = valid & ~np.isnan(data)
        got = np.asarray(chip.data)
        assert got.dtype == data.dtype
        np.testing.assert_array_equal(got, data)
        if exact:
            assert got.tobytes() == data.tobytes(), "equal but not bit for bit"
        np.testing.assert_array_equal(np.asarray(chip.valid), valid, err_msg=f"validity in {window}")


@_EXAMPLES
@given(make=makes())
def test_geotiffs_equal_gdal(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Codec, predictor, dtype, interleave, blocks, byte order, BigTIFF, sparse, mask, nodata, IFD at the end."""
    folder = tmp_path_factory.mktemp("made")
    path = write(make, folder)
    check(path, build_one(path, folder), make.seed)
    shutil.rmtree(folder)


@_FEW
@given(make=makes("COG"))
def test_cogs_equal_gdal(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same by the COG driver, planes interleaved by pixel, tile or band where GDAL knows how."""
    folder = tmp_path_factory.mktemp("cog")
    path = write(make, folder)
    check(path, build_one(path, folder), make.seed)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("codec", "dtype"), [("lerc", "uint16"), ("lerc_deflate", "float32")])
def test_lerc_in_a_big_endian_file(codec: str, dtype: str, tmp_path: Path) -> None:
    """libtiff swaps the bytes of what LERC gives, as it swapped them before it was encoded."""
    data = np.random.default_rng(0).integers(0, 30000, (2, 40, 50)).astype(dtype)
    options = {"driver": "GTiff", "compress": codec, "max_z_error": 0, "endianness": "big"}
    path = write(Make(data, options, None, None, False, False, 0), tmp_path)
    check(path, build_one(path, tmp_path), 0)


@st.composite
def _by_tifffile(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Pixels `[bands, h, w]` and how tifffile writes them."""
    dtype = draw(st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int64", "float32", "float64"]))
    height, width, bands = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.sampled_from([1, 2, 3, 5]))
    data = np.nan_to_num(_pixels(dtype, (bands, height, width), None, draw(st.integers(0, 999))), posinf=1, neginf=-1)
    codec = draw(st.sampled_from([None, "zlib", "lzw", "zstd", "packbits", "lzma"]))
    options: dict[str, Any] = {"compression": codec, "byteorder": draw(st.sampled_from(["<", ">"]))}
    options |= {"bigtiff": draw(st.booleans()), "planarconfig": draw(st.sampled_from(["contig", "separate"]))}
    if codec in ("zlib", "lzw", "zstd"):
        options["predictor"] = draw(st.sampled_from([None, 3 if data.dtype.kind == "f" else 2]))
    if draw(st.booleans()):
        options["tile"] = (draw(st.sampled_from([16, 64])), draw(st.sampled_from([16, 32])))
    else:
        options["rowsperstrip"] = draw(st.integers(1, height))
    return data, options


@_FEW
@given(made=_by_tifffile(), seed=st.integers(0, 999))
def test_what_tifffile_writes(
    made: tuple[np.ndarray[Any, Any], dict[str, Any]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Both byte orders, planes, tiles that are no squares, strips of any height."""
    data, options = made
    folder = tmp_path_factory.mktemp("tifffile")
    if len(data) == 1:
        data, options = data[0], {key: value for key, value in options.items() if key != "planarconfig"}
    elif options["planarconfig"] == "contig":
        data = np.moveaxis(data, 0, -1)
    tifffile.imwrite(folder / "a.tif", np.ascontiguousarray(data), photometric="minisblack", **options)
    check(folder / "a.tif", build_one(folder / "a.tif", folder), seed)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "bits", [1, 7, 12, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 16) if n not in (1, 7, 12))]
)
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_packed_samples(bits: int, interleave: str, tmp_path: Path) -> None:
    """1 to 15 bits, rows that end within a byte; GDAL's NBITS of 8 and above 16 are plain types."""
    dtype = "uint8" if bits <= 8 else "uint16"
    options = {"driver": "GTiff", "nbits": bits, "interleave": interleave, "compress": "deflate"}
    make = Make(_pixels(dtype, (3, 41, 37), bits, bits), options, 2**bits - 1, None, False, False, bits)
    path = write(make, tmp_path)
    check(path, build_one(path, tmp_path), bits)


@pytest.mark.parametrize("interleave", ["pixel", "band", "tile"])
def test_cogs_of_each_interleave(interleave: str, tmp_path: Path) -> None:
    """With mask and overviews; a GDAL that does not know the option leaves it out."""
    if not _has_cog_interleave():
        pytest.skip(f"GDAL {rasterio.__gdal_version__} writes no COG of interleave {interleave}")
    data = _pixels("int16", (3, 300, 280), None, 4)
    options = {"driver": "COG", "interleave": interleave, "blocksize": 128, "compress": "zstd"}
    path = write(
        Make(data, options, None, np.random.default_rng(0).random((300, 280)) < 0.5, False, False, 0), tmp_path
    )
    with rasterio.open(path) as source:
        assert source.tags(ns="IMAGE_STRUCTURE")["INTERLEAVE"].lower() == interleave
    check(path, build_one(path, tmp_path), 4)


def test_signed_bytes_of_old_gdal(tmp_path: Path) -> None:
    """PIXELTYPE=SIGNEDBYTE was int8 before GDAL 3.7: sample format 2, 8 bits."""
    data = _pixels("int8", (2, 33, 44), None, 0)
    options = {"driver": "GTiff", "pixeltype": "signedbyte"}
    path = write(Make(data, options, -128, None, False, False, 0), tmp_path)
    check(path, build_one(path, tmp_path), 0)


@examples(3)
@given(made=st.lists(makes(), min_size=3, max_size=3), cogs=st.lists(makes("COG"), min_size=1, max_size=1))
def test_the_same_over_http(made: list[Make], cogs: list[Make], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Header and tiles through a range server."""
    folder = tmp_path_factory.mktemp("served")
    paths = [write(make, folder) for make in (*made, *cogs)]
    with RangeServer(folder) as server:
        found = rasters(build([f"{server.url}/{path.name}" for path in paths], folder / "c.parquet", datetime=None))
        by_name = {record.id: record for record in found}
        for make, path in zip((*made, *cogs), paths, strict=True):
            check(path, by_name[path.stem], make.seed)
    shutil.rmtree(folder)


def _recorded(record: RasterAccessor, window: tuple[int, int, int, int]) -> tuple[Any, int, int]:
    """The chip of B1, how many requests it took and how many bytes."""
    reader = RecordingReader(LocalReader())
    chip = run(record.read_window(window, ["B1"], backend=reader))
    return chip, len(reader.calls), sum(span.length for _, span in reader.calls)


def test_a_window_of_a_huge_plain_strip(tmp_path: Path) -> None:
    """1.2 GB in one uncompressed strip: a window fetches its own rows, and nearly nothing else."""
    path = tmp_path / "strip.tif"
    pixels = tifffile.memmap(path, shape=(20000, 60000), dtype=np.uint8, photometric="minisblack")
    rng = np.random.default_rng(0)
    corners = [(0, 0), (14_990, 59_000), (19_990, 31_000)]
    for row, col in corners:
        pixels[row : row + 10, col : col + 100] = rng.integers(1, 255, (10, 100))
    pixels.flush()
    del pixels
    assert path.stat().st_blocks * 512 < 2**24
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].tags["RowsPerStrip"].value == 20000
    record = build_one(path, tmp_path)
    for row, col in corners:
        window = (row - 3, col - 7, 20, 120)
        chip, requests, fetched = _recorded(record, window)
        data, valid = window_by_rasterio(path, window)
        np.testing.assert_array_equal(np.asarray(chip.data), data)
        np.testing.assert_array_equal(np.asarray(chip.valid), valid)
        assert requests == 1
        assert fetched <= 28 * 60000  # 20 rows, and what is left of a piece of four on either side


def test_a_compressed_strip_that_is_too_large_is_refused(tmp_path: Path) -> None:
    """It could only be decoded whole: the size is told, and what to do."""
    path = tmp_path / "strip.tif"
    tifffile.imwrite(path, np.zeros((16, 8000), np.uint16), compression="zlib", rowsperstrip=16)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("ImageLength", "RowsPerStrip"):
            tiff.pages[0].tags[name].overwrite(20000)
    with pytest.raises(DataError, match=r"one strip of 8000 x 20000 pixels decodes to 305 MiB \(limit 128") as told:
        build(str(path), tmp_path / "c.parquet")
    assert str(path) in str(told.value)


@pytest.mark.parametrize("nodata", [None, 42])
@pytest.mark.parametrize("tiled", [True, False])
def test_a_giant_that_holds_nothing(nodata: int | None, tiled: bool, tmp_path: Path) -> None:
    """Sparse everywhere, however large its tiles: nodata, or valid zeros, without a request."""
    path = tmp_path / "giant.tif"
    blocks = {"tiled": True, "blockxsize": 4096, "blockysize": 8192} if tiled else {"blockysize": 30000}
    with rasterio.open(
        path, "w", driver="GTiff", width=150_000, height=120_000, count=1, dtype="uint32", nodata=nodata,
        compress="deflate", sparse_ok=True, bigtiff="yes", **blocks,
    ):  # fmt: skip
        pass
    record = build_one(path, tmp_path)
    chip, requests, _ = _recorded(record, (119_900, 149_900, 200, 200))
    assert requests == 0
    inside = np.zeros((1, 200, 200), bool)
    inside[:, :100, :100] = nodata is None
    assert (np.asarray(chip.data) == (nodata or 0)).all()
    np.testing.assert_array_equal(np.asarray(chip.valid), inside)
