"""Which pixels are valid: GDAL's word for it, in every dtype and from every source of validity, and no NaN."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import build_one, cause_of, rasters, run
from property_settings import examples
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.windows import Window as RioWindow

from rasteret_ml.cog.header.gdal_tags import parse_nodata
from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import FileChangedError, ReadError
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.assemble import equals_nodata, valid_pixels
from rasteret_ml.testing import RangeServer

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore::rasterio.errors.NodataShadowWarning"),
]

TEXTS = {
    "uint8": ["0", "7", "255", "256", "-1", "7.9", "-0.5", "0.5", "1e2", "", "7 8", " 7", "7,9", "nan", "1e400", "inf"],
    "int8": ["-128", "127", "128", "-129", "255", "-1", "-0.5", "-1.5"],
    "uint16": ["65535", "65536", "-1", "1e3"],
    "int16": ["-32768", "-32769", "32767", "-9999.0", "-9999.7"],
    "uint32": ["4294967295", "4294967296", "4294967294.5", "-1"],
    "int32": ["-2147483648", "-2147483649", "2147483647"],
    "int64": [str(v) for v in (-(2**63), 2**63 - 1, 2**63 - 2, 2**53 + 1)] + ["1.5", "-1.5", " 7", "+7"],
    "uint64": [str(v) for v in (2**64 - 1, 2**64 - 2, 2**63, 2**53 + 1)] + ["7.5", "-0", " 7", "+7"],
    "float16": ["-65504", "0.1", "nan", "7", "1e5"],
    "float32": [
        "0", "-0.0", "0.1", "7", "16777217", "-9999", "nan", "inf", "-inf", "1e20", "3.4028234663852886e+38", "1e-45",
        "-3.4028234663852886e+38", "-3.40282346638529e+38", "-3.4e+38", "3.5e38", "1e39", "1e300", "-1e300", "1e400",
        "1e-40", "3.4e38", "1.7e38", "Infinity", "-1.#INF", "1.#QNAN",
    ],
    "float64": [
        "0", "0.1", "-9999", "1.79769313486232e+308", "-1.7976931348623157e+308", "5e-324", "nan", "-inf", "1e-310",
        "3.4028234663852886e+38", "9007199254740993", "1e308", "8e307",
    ],
    "complex64": ["7", "0.5", "nan", "0", "inf"],
    "complex128": ["7", "0.1"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """GDAL's remarks on odd nodata are expected."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _near(dtype: np.dtype[Any], text: str) -> np.ndarray[Any, Any]:
    """`[1, n]`: values at, and ever further from, the number in `text`, and the type's own limits."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = 7.0
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        exact = int(text) if text.lstrip("+- ").isdigit() else int(number) if np.isfinite(number) else 0
        around = {exact + k for k in range(-3, 4)} | {int(float(exact)) + k for k in (-1, 0, 1)}
        around |= {limits.min, limits.min + 1, limits.max, limits.max - 1, 0, 1, 7, 8, 100, 1000}
        return np.array([sorted(v for v in around if limits.min <= v <= limits.max)], dtype)
    real = dtype if dtype.kind == "f" else np.dtype(f"f{dtype.itemsize // 2}")
    facts = np.finfo(real)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        middle = real.type(number)
        values = [middle, -middle, np.nan, np.inf, -np.inf, 0.0, -0.0, 1, 7, facts.max, facts.min, facts.tiny]
        for end in (np.inf, -np.inf):
            value = middle
            for _ in range(14):
                value = np.nextafter(value, real.type(end))
                values.append(value)
        steps = (1, 5, 10, 20, 30, 40, 45, 47, 48, 50, 60, 100, 1000, 10**6, 10**7)
        values += [real.type(number * (1 + sign * step * 1e-8)) for step, sign in product(steps, (1, -1))]
        found = np.array([values], real)
    return found if dtype.kind == "f" else found + (1j * np.arange(found.size)).astype(dtype)


def _by_gdal(values: np.ndarray[Any, Any], text: str) -> tuple[np.ndarray[Any, Any], float | None]:
    """What GDAL holds for valid, NaN apart, in a file of these values with this raw nodata tag; the value it reads."""
    file = io.BytesIO()
    tags = [(42113, "s", 0, text, True)] if text else []
    tifffile.imwrite(file, values, photometric="minisblack", metadata=None, extratags=tags)
    with warnings.catch_warnings(), MemoryFile(file.getvalue()) as memory:
        warnings.simplefilter("ignore")  # rasterio 1.5 compares a half with what no half can hold
        with memory.open() as source:
            valid = source.read_masks(1) != 0
            return valid if values.dtype.kind in "iu" else valid & ~np.isnan(values), source.nodata


def _ours(values: np.ndarray[Any, Any], text: str) -> np.ndarray[Any, Any]:
    """GDAL reads float16 as float32; so must the comparison."""
    return valid_pixels(values, None, parse_nodata(text, values.dtype))


@pytest.mark.parametrize(("dtype", "text"), [(dtype, text) for dtype, texts in TEXTS.items() for text in texts])
def test_nodata_masks_what_gdal_masks(dtype: str, text: str) -> None:
    """Tolerance of floats, extremes, infinities, fractions, values out of range, of every type."""
    values = _near(np.dtype(dtype), text)
    expected, _ = _by_gdal(values, text)
    np.testing.assert_array_equal(_ours(values, text), expected, err_msg=str(values))


@examples(150)
@given(
    dtype=st.sampled_from(sorted(TEXTS)),
    number=st.one_of(
        st.integers(-(2**63), 2**64 - 1),
        st.integers(-300, 70000),
        st.floats(-1e30, 1e30, allow_nan=False),
        st.floats(width=32, allow_nan=False).filter(lambda v: abs(v) < 3e31),
    ),
)
def test_any_number_masks_what_gdal_masks(dtype: str, number: float) -> None:
    """Drawn nodata; of 64-bit integers whole ones within the type, which GDAL too reads exactly."""
    if dtype in ("int64", "uint64"):
        limits = np.iinfo(dtype)
        number = min(max(int(number), limits.min), limits.max)
    values, text = _near(np.dtype(dtype), str(number)), str(number)
    expected, _ = _by_gdal(values, text)
    np.testing.assert_array_equal(_ours(values, text), expected, err_msg=str(values))


@pytest.mark.parametrize(
    ("dtype", "text"), [("float64", "1e300"), ("float64", "-1e305"), ("float32", "1e35"), ("float32", "-4e37")]
)
def test_values_whose_sum_with_nodata_overflows(dtype: str, text: str) -> None:
    """GDAL's tolerance is then infinite: the largest value of a type is near every large nodata."""
    values = _near(np.dtype(dtype), text)
    expected, _ = _by_gdal(values, text)
    np.testing.assert_array_equal(_ours(values, text), expected, err_msg=str(values))


@pytest.mark.parametrize(
    ("dtype", "text", "ours", "theirs"),
    [
        ("int64", "1e3", {1000}, {1}),  # GDAL stops at the exponent
        ("uint64", "1e3", {1000}, {1}),
        ("int64", "-4e0", {-4}, {-4}),
        ("uint8", "abc", set(), {0}),  # GDAL takes what is no number for 0
        ("int64", "nan", set(), {0}),
        ("uint64", "-1", set(), {2**64 - 1}),  # C's strtoull wraps around
        ("uint64", "18446744073709551616", set(), {2**64 - 1}),  # … and stops at the type's ends
        ("int64", "9223372036854775808", set(), {2**63 - 1}),
        ("int64", "-9223372036854775809", set(), {-(2**63)}),
    ],
)
def test_where_we_differ_on_purpose(dtype: str, text: str, ours: set[int], theirs: set[int]) -> None:
    """Each is a number that GDAL misreads; a file says so seldom, and never means what GDAL makes of it."""
    values = np.append(_near(np.dtype(dtype), text)[0], np.array(sorted(ours | theirs), dtype))[None]
    assert {int(v) for v in values[~_ours(values, text)]} == ours
    assert {int(v) for v in values[~_by_gdal(values, text)[0]]} == theirs


def test_the_largest_uint64_is_nodata_though_rasterio_says_none() -> None:
    """Its mask knows what its attribute cannot hold."""
    text = str(2**64 - 1)
    values = _near(np.dtype("uint64"), text)
    expected, reported = _by_gdal(values, text)
    assert reported is None
    assert (~expected).sum() == 1
    np.testing.assert_array_equal(_ours(values, text), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_nan_is_never_valid(dtype: str) -> None:
    """Whatever the mask and the nodata value say; and no number equals it."""
    values = np.array([[np.nan, 1.0, np.inf]], dtype)
    for nodata, masked in product((None, 5.0, float("nan")), (None, np.ones((1, 3), bool))):
        assert valid_pixels(values, masked, nodata).tolist() == [[False, True, True]]
    assert not equals_nodata(values, 5.0).any()


# --- precedence: mask, then nodata, then alpha ------------------------------------------------------------------

_SHAPE = (50, 60)


def _bands(count: int, dtype: str = "uint8") -> np.ndarray[Any, Any]:
    """Noise in which 7 is frequent; the last band is 0 here, faint there, opaque elsewhere."""
    rng = np.random.default_rng(count)
    data = rng.integers(1, 100, (count, *_SHAPE)).astype(dtype)
    data[rng.random(data.shape) < 0.2] = 7
    top = 255 if np.dtype(dtype).kind == "f" or np.dtype(dtype).itemsize == 1 else 65535
    data[-1] = rng.choice([0, 0, 1, 2, 7, 100, 127 if dtype == "int8" else top], _SHAPE)
    return data


def _mask() -> np.ndarray[Any, Any]:
    return np.random.default_rng(9).random(_SHAPE) < 0.6


def _write(path: Path, data: np.ndarray[Any, Any], mask: np.ndarray[Any, Any] | None = None, **options: Any) -> Path:
    count, height, width = data.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": data.dtype.name}
    profile |= {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500000, 0, -10, 5000000)}
    tiles = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate"}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **(profile | tiles | options)) as target:
        target.write(data)
        if mask is not None:
            target.write_mask(mask)
    return path


def _read(record: RasterAccessor, level: int = 0, **options: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels and validity of all bands, at one level."""
    bands = [f"B{i + 1}" for i in range(len(record.available_bands))]
    window = (0, 0, *record.grid("B1", level).shape)
    chip = run(record.read_window(window, bands, level=level, **options))
    return np.asarray(chip.data), np.asarray(chip.valid)


def _assert_as_gdal(path: Path, record: RasterAccessor, level: int = 0) -> np.ndarray[Any, Any]:
    """Pixels and per-band validity equal GDAL's; the validity."""
    with rasterio.open(path, **({"overview_level": level - 1} if level else {})) as source:
        data, valid = source.read(), source.read_masks() != 0
    got, got_valid = _read(record, level)
    np.testing.assert_array_equal(got, data)
    np.testing.assert_array_equal(got_valid, valid if data.dtype.kind in "iu" else valid & ~np.isnan(data))
    return got_valid


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("nodata", [None, 7], ids=["no nodata", "nodata"])
@pytest.mark.parametrize(("count", "dtype"), [(2, "uint8"), (4, "uint8"), (2, "uint16"), (4, "uint16")])
def test_mask_before_nodata_before_alpha(
    count: int, dtype: str, nodata: int | None, masked: bool, interleave: str, tmp_path: Path
) -> None:
    """Band by band as GDAL; a `nodata=` of the caller's counts beside mask or alpha, and instead of the file's."""
    data, mask = _bands(count, dtype), _mask() if masked else None
    colours = {"photometric": "rgb"} if count == 4 else {}
    path = _write(tmp_path / "a.tif", data, mask, alpha="yes", nodata=nodata, interleave=interleave, **colours)
    record = build_one(path, tmp_path)
    valid = _assert_as_gdal(path, record)
    if masked:
        assert (valid == mask).all()
    elif nodata is None:
        assert valid[-1].all()
        assert (valid[:-1] == (data[-1] > 0)).all()
    says = np.broadcast_to(data[-1] > 0, data.shape).copy() if mask is None else np.broadcast_to(mask, data.shape)
    if mask is None:
        says[-1] = True  # the alpha band is not transparent itself
    np.testing.assert_array_equal(_read(record, nodata=55)[1], says & (data != 55))


@pytest.mark.parametrize(("count", "dtype"), [(1, "int16"), (3, "float32")])
@pytest.mark.parametrize("nodata", [None, 7])
def test_the_callers_nodata_and_the_mask_must_both_hold(
    count: int, dtype: str, nodata: int | None, tmp_path: Path
) -> None:
    """The file's own nodata counts for nothing beside its mask; the caller's is a wish of its own."""
    data, mask = _bands(count, dtype), _mask()
    record = build_one(_write(tmp_path / "a.tif", data, mask, nodata=nodata), tmp_path)
    np.testing.assert_array_equal(_assert_as_gdal(tmp_path / "a.tif", record), np.broadcast_to(mask, data.shape))
    np.testing.assert_array_equal(_read(record, nodata=7)[1], mask & (data != 7))
    plain = build_one(_write(tmp_path / "b.tif", data, nodata=nodata), tmp_path)
    np.testing.assert_array_equal(_assert_as_gdal(tmp_path / "b.tif", plain), (data != 7) | (nodata is None))
    np.testing.assert_array_equal(_read(plain, nodata=55)[1], data != 55)


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(1, "uint8"), (3, "uint8"), (5, "uint8"), (2, "int16"), (4, "int8"), (4, "float32"), (2, "uint32"), (4, "uint16")],
)
def test_an_alpha_that_gdal_does_not_heed(count: int, dtype: str, tmp_path: Path) -> None:
    """Only the last of two or four bands of unsigned bytes or shorts is one (of four greys GDAL marks the second)."""
    path = _write(tmp_path / "a.tif", _bands(count, dtype), alpha="yes")
    assert _assert_as_gdal(path, build_one(path, tmp_path)).all()


# --- masks of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "planar", "kind"),
    [(3, "contig", "bits"), (3, "contig", "bytes"), (3, "separate", "bytes"), (1, "contig", "bytes")],
)
@pytest.mark.parametrize("several", [False, True], ids=["one", "per band"])
def test_masks_that_tifffile_writes(count: int, planar: str, kind: str, several: bool, tmp_path: Path) -> None:
    """One bit or a byte (any but 0 is valid), one for all bands or one for each."""
    path, rng = tmp_path / "a.tif", np.random.default_rng(3)
    data = rng.integers(0, 2**16, (count, *_SHAPE), dtype=np.uint16)
    mask = rng.choice([0, 255, 255, 1], (count if several else 1, *_SHAPE)).astype(np.uint8)
    if kind == "bits":
        mask = mask > 0
    first, second = (np.moveaxis(d, 0, -1) if planar == "contig" and len(d) > 1 else d for d in (data, mask))
    options = {"tile": (16, 32), "metadata": None, "planarconfig": planar if count > 1 else None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(first if count > 1 else first[0], photometric="minisblack", **options)
        options["planarconfig"] = planar if len(mask) > 1 else None
        tiff.write(
            np.ascontiguousarray(second if len(mask) > 1 else second[0]),
            photometric="minisblack",
            subfiletype=1,
            **options,
        )
    with tifffile.TiffFile(path, mode="r+b") as tiff:  # tifffile itself writes masks of one bit alone
        tiff.pages[1].tags["NewSubfileType"].overwrite(4)
        tiff.pages[1].tags["PhotometricInterpretation"].overwrite(4)
    valid = _assert_as_gdal(path, build_one(path, tmp_path))
    if kind == "bytes" or not several:  # bits of several samples are packed in tifffile's own way
        np.testing.assert_array_equal(valid, np.broadcast_to(mask > 0, data.shape))


def test_a_sparse_mask_is_invalid_where_nothing_is_stored(tmp_path: Path) -> None:
    """A mask tile that is not there says no."""
    path = tmp_path / "a.tif"
    options = {"tiled": True, "blockxsize": 16, "blockysize": 16, "sparse_ok": True, "crs": "EPSG:32633"}
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", driver="GTiff", count=1, height=64, width=64, dtype="uint8", **options) as target,
    ):
        target.write(np.full((1, 64, 64), 9, np.uint8))
        target.write_mask(np.full((20, 20), 255, np.uint8), window=RioWindow(16, 16, 20, 20))
    record = build_one(path, tmp_path)
    stored = record.source("B1").metadata.mask
    assert stored is not None
    assert (stored.tile_byte_counts == 0).any()
    assert _assert_as_gdal(path, record).sum() == 400


# --- sidecars -----------------------------------------------------------------------------------------------------


def _beside(folder: Path, parts: Sequence[str]) -> Path:
    """A file with its mask and overviews inside or beside it."""
    data = np.random.default_rng(1).integers(0, 255, (2, 201, 150), dtype=np.uint8)
    mask = np.random.default_rng(2).random((201, 150)) < 0.6
    path = _write(folder / "a.tif", data)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=".msk" not in parts, TIFF_USE_OVR=".ovr" in parts):
        with rasterio.open(path, "r+") as target:
            target.write_mask(mask)
        with rasterio.open(path, "r+") as target:
            target.build_overviews([2, 4], Resampling.nearest)
    return path


@pytest.mark.parametrize(
    "parts", [[".msk"], [".ovr"], [".msk", ".ovr"], []], ids=lambda parts: "+".join(parts) or "none"
)
def test_sidecars_of_local_files(parts: list[str], tmp_path: Path) -> None:
    """Looked for without being asked; every level's pixels and validity equal GDAL's."""
    path = _beside(tmp_path, parts)
    assert {p.name.removeprefix("a.tif") for p in tmp_path.iterdir()} >= set(parts)
    record = build_one(path, tmp_path)
    levels = 1 if parts == [".ovr"] else 3  # these overviews have no mask, though the image has one: not used
    assert len(record.source("B1").metadata.levels) == levels
    for level in range(levels):
        assert not _assert_as_gdal(path, record, level).all()


def test_sidecars_over_http_only_when_asked(server: RangeServer, tmp_path: Path) -> None:
    """They cost requests, mostly for what is not there."""
    path = _beside(tmp_path, [".msk", ".ovr"])
    href = f"{server.url}/a.tif"
    (plain,) = rasters(build(href, tmp_path / "plain.parquet"))
    assert [request.path for request in server.requests] == ["a.tif"]
    assert len(plain.source("B1").metadata.levels) == 1
    assert _read(plain)[1].all()
    (record,) = rasters(build(href, tmp_path / "full.parquet", sidecars=True))
    for level in range(3):
        assert not _assert_as_gdal(path, record, level).all()
    (without,) = rasters(build(str(path), tmp_path / "none.parquet", sidecars=False))
    assert _read(without)[1].all()


def test_a_sidecar_that_changed_is_named(tmp_path: Path) -> None:
    """The error is about the mask's file, not the image's."""
    path = _beside(tmp_path, [".msk"])
    record = build_one(path, tmp_path)
    sidecar = Path(f"{path}.msk")
    sidecar.write_bytes(sidecar.read_bytes() + b"x")
    with pytest.raises(ReadError, match=r"a\.tif\.msk, mask of full resolution, tile 0") as caught:
        run(record.read_window((0, 0, 5, 5), ["B1"]))
    assert isinstance(cause_of(caught.value), FileChangedError)
