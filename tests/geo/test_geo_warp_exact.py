"""Exact positions, every type, and pixels that do not depend on how a chip was cut."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from warp_oracle import exact_warp, majority

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import transform_points
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.geo.resample.positions import Resampling, needed_window, pixel_ratio, positions, to_source
from rasteret_ml.geo.resample.warp import warp

KERNELS: tuple[Resampling, ...] = get_args(Resampling)
AVERAGING: tuple[Resampling, ...] = ("bilinear", "cubic", "average")
UTM = "EPSG:32633"
SOURCE = Grid(crs=UTM, transform=Affine(10, 0, 300000, 0, -10, 5500000), shape=(220, 240))
FAR_NORTH = Grid(crs=UTM, transform=Affine(10, 0, 500000, 0, -10, 8800000), shape=(220, 240))
DEGREES = Grid(crs="EPSG:4326", transform=Affine(1.4e-4, 0, 12.2, 0, -9e-5, 49.6), shape=(220, 240))


def over(source: Grid, crs: str, res: tuple[float, float], shape: tuple[int, int] = (180, 170)) -> Grid:
    """A grid whose middle is the source's."""
    x, y = source.transform @ (source.width / 2, source.height / 2)
    to_x, to_y = transform_points(np.array([x]), np.array([y]), str(source.crs), crs)
    left, top = float(to_x[0]) - res[0] * shape[1] / 2, float(to_y[0]) + res[1] * shape[0] / 2
    return Grid(crs=crs, transform=Affine(res[0], 0, left, 0, -res[1], top), shape=shape)


PAIRS = {
    "neighbouring zone": (SOURCE, over(SOURCE, "EPSG:32632", (10, 10))),
    "to geographic": (SOURCE, over(SOURCE, "EPSG:4326", (1.4e-4, 9e-5))),
    "from geographic": (DEGREES, over(DEGREES, UTM, (10, 10))),
    "mercator": (SOURCE, over(SOURCE, "EPSG:3857", (15.4, 15.4))),
    "polar": (FAR_NORTH, over(FAR_NORTH, "EPSG:3413", (10, 10))),
    "coarser": (SOURCE, over(SOURCE, "EPSG:32632", (30, 30), (60, 60))),
    "larger than the image": (SOURCE, over(SOURCE, "EPSG:32632", (20, 20))),
}


def scene(shape: tuple[int, int], holes: float = 0.03) -> np.ndarray[Any, Any]:
    """uint16 noise with holes of 0."""
    rng = np.random.default_rng(3)
    data = rng.integers(1, 65535, shape, dtype=np.uint16, endpoint=True)
    data[rng.random(shape) < holes] = 0
    data[60:90, 100:140] = 0
    return data


def kernel_scales(source: Grid, target: Grid) -> tuple[float, float]:
    """What GDAL is to be told."""
    ratios = [max(1.0, r) for r in pixel_ratio(target, source)]
    near = [round(r) if abs(r - round(r)) < 0.05 else r for r in ratios]
    return near[0], near[1]


@pytest.mark.parametrize("kernel", ["nearest", *AVERAGING])
@pytest.mark.parametrize("name", PAIRS)
def test_pixels_equal_an_exact_gdal(name: str, kernel: Resampling) -> None:
    """Values within a level (nearest: equal) and validity equal, but for ties (`average`: inside the image)."""
    source, target = PAIRS[name]
    data = scene(source.shape)
    expected = exact_warp(data, source, target, kernel, 0, kernel_scales(source, target)).astype(int)
    found, valid = warp(data, data != 0, source, target, kernel, 0)
    at = positions(target, source)
    tie = (np.abs(at.cols - np.round(at.cols)) < 1e-6) | (np.abs(at.rows - np.round(at.rows)) < 1e-6)
    rim = 0 if kernel != "average" else max(pixel_ratio(target, source))
    fair = (at.cols >= rim) & (at.cols <= source.width - rim) & (at.rows >= rim) & (at.rows <= source.height - rim)
    difference = np.abs(found.astype(int) - expected)[valid & fair & ~tie]
    assert len(difference) > 1000
    assert difference.max() <= (0 if kernel == "nearest" else 1)
    assert np.array_equal(valid[~tie], expected[~tie] != 0)
    assert tie.sum() < 10


@pytest.mark.parametrize("name", ["neighbouring zone", "polar", "coarser"])
def test_mode_is_the_majority_of_the_area(name: str) -> None:
    """The class that covers most of a pixel, from a loop over its box."""
    source, target = PAIRS[name]
    target = target.window(Window(row=20, col=20, height=30, width=30))
    data = np.random.default_rng(1).integers(1, 5, source.shape).astype(np.uint8)
    valid = np.random.default_rng(2).random(source.shape) > 0.2
    best, most, second = majority(data, valid, source, target)
    found, found_valid = warp(data, valid, source, target, "mode", 0)
    clear = most > second + 1e-4
    assert clear.sum() > 500
    assert np.array_equal(found_valid, most > 0)
    assert np.array_equal(found[clear], best[clear])


@pytest.mark.parametrize("values", [2, 3000])
def test_mode_takes_the_smallest_of_equals(values: int) -> None:
    """Two by two different classes: the smallest, by both ways of counting."""
    grid = Grid(crs=UTM, transform=SOURCE.transform, shape=(40, 40))
    data = (np.arange(1600).reshape(40, 40) % values).astype(np.int32)
    coarse = Grid(crs=UTM, transform=grid.transform @ Affine.scale(2), shape=(20, 20))
    found, _ = warp(data, np.ones(data.shape, bool), grid, coarse, "mode", 0)
    blocks = data.reshape(20, 2, 20, 2).swapaxes(1, 2).reshape(20, 20, 4)
    assert np.array_equal(found, blocks.min(-1))


@examples(40)
@given(data=st.data(), name=st.sampled_from(sorted(PAIRS)))
def test_a_chip_equals_the_crop_of_a_larger_one(data: st.DataObject, name: str) -> None:
    """Nearest, read from its own window or from the whole image: no pixel depends on the cut."""
    source, target = PAIRS[name]
    pixels = scene(source.shape)
    height, width = (data.draw(st.integers(1, length)) for length in target.shape)
    row, col = data.draw(st.integers(0, target.height - height)), data.draw(st.integers(0, target.width - width))
    box = Window(row=row, col=col, height=height, width=width)
    whole, whole_valid = warp(pixels, pixels != 0, source, target, "nearest", 0)
    needed = needed_window(target.window(box), source, "nearest")
    assert needed is not None
    held = needed.intersection(Window(row=0, col=0, height=source.height, width=source.width))
    if held is None:
        assert not whole_valid[box.slices].any()
        return
    part = pixels[held.slices]
    found, valid = warp(part, part != 0, source.window(held), target.window(box), "nearest", 0)
    assert np.array_equal(found, whole[box.slices])
    assert np.array_equal(valid, whole_valid[box.slices])


@pytest.mark.parametrize("kernel", KERNELS)
@examples(15)
@given(row=st.integers(-20, 200), col=st.integers(-20, 220), dtype=st.sampled_from(["uint16", "float32", "complex64"]))
def test_aligned_grids_give_copies(kernel: Resampling, row: int, col: int, dtype: str) -> None:
    """Whole pixels apart every kernel is the identity, bit for bit."""
    rng = np.random.default_rng(0)
    data = (
        (rng.normal(300, 80, SOURCE.shape) + 1j * rng.normal(0, 9, SOURCE.shape)).astype(dtype)
        if dtype[0] == "c"
        else rng.normal(300, 80, SOURCE.shape).astype(dtype)
    )
    valid = rng.random(SOURCE.shape) > 0.1
    window = Window(row=row, col=col, height=24, width=31)
    found, found_valid = warp(data, valid, SOURCE, SOURCE.window(window), kernel, 0)
    expected, expected_valid = np.zeros(window.shape, dtype), np.zeros(window.shape, bool)
    shared = window.intersection(Window(row=0, col=0, height=SOURCE.height, width=SOURCE.width))
    if shared is not None:
        at = shared.relative_to(window).slices
        expected[at], expected_valid[at] = np.where(valid, data, 0)[shared.slices], valid[shared.slices]
    assert found.dtype == data.dtype
    assert np.array_equal(found_valid, expected_valid)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kernel", ["nearest", "mode"])
@pytest.mark.parametrize("dtype", ["int64", "uint64", "complex64", "complex128", "float64", "bool"])
def test_picking_kernels_keep_every_bit(kernel: Resampling, dtype: str) -> None:
    """Values that no float32, or float64, holds come out as they are."""
    source, target = PAIRS["neighbouring zone"]
    codes = np.random.default_rng(1).integers(0, 4, source.shape)
    chosen: dict[str, list[Any]] = {"c": [1 + 2j, 0.1 - 3j, 5j, 7], "f": [0.1, 1e300, -1e-300, 3], "b": [0, 1, 0, 1]}
    large = [2**53 + 1, 2**62 + 3, 5, 7]
    values = np.array(chosen.get(np.dtype(dtype).kind, large)).astype(dtype)
    found, valid = warp(values[codes], np.ones(codes.shape, bool), source, target, kernel, 0)
    expected, _ = warp(codes.astype(np.uint8), np.ones(codes.shape, bool), source, target, kernel, 0)
    assert valid.sum() > 10000
    if kernel == "nearest":
        assert np.array_equal(found[valid], values[expected][valid])
    assert np.isin(found[valid], values).all()


@pytest.mark.parametrize("kernel", AVERAGING)
@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_numbers_are_two_parts(kernel: Resampling, dtype: str) -> None:
    """Real and imaginary parts as if each were resampled by itself, with one validity."""
    source, target = PAIRS["coarser"]
    rng = np.random.default_rng(1)
    data = (rng.normal(0, 1, source.shape) + 1j * rng.normal(0, 1, source.shape)).astype(dtype)
    data[5:30, 20:40] = complex(np.nan, 1)
    valid = rng.random(source.shape) > 0.1
    found, found_valid = warp(data, valid, source, target, kernel, 9)
    known = valid & ~np.isnan(data)
    for part, of in ((found.real, data.real), (found.imag, data.imag)):
        expected, expected_valid = warp(np.ascontiguousarray(of), known, source, target, kernel, 0)
        assert np.array_equal(found_valid, expected_valid)
        assert np.allclose(part[found_valid], expected[found_valid], rtol=1e-5, atol=1e-6)
    assert (found[~found_valid] == 9).all()


@pytest.mark.parametrize("kernel", AVERAGING)
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_averages_of_64_bit_integers_are_refused(kernel: Resampling, dtype: str) -> None:
    """No float holds them all; the message names the type and what to do."""
    with pytest.raises(UsageError, match=f"{dtype}.*nearest"):
        warp(np.zeros(SOURCE.shape, dtype), np.ones(SOURCE.shape, bool), SOURCE, SOURCE, kernel, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nodata_of_any_kind_never_bleeds(kernel: Resampling) -> None:
    """NaN, infinities and huge numbers in invalid pixels leave no trace; NaN is invalid also where it is not said."""
    source, target = PAIRS["larger than the image"]
    rng = np.random.default_rng(4)
    data, valid = rng.normal(0, 1, source.shape).astype(np.float32), rng.random(source.shape) > 0.3
    clean, clean_valid = warp(np.where(valid, data, 0), valid, source, target, kernel, -1)
    for bad in (np.nan, np.inf, -np.inf, 3e38):
        spoilt = np.where(valid, data, np.float32(bad))
        found, found_valid = warp(spoilt, valid, source, target, kernel, -1)
        assert np.array_equal(found, clean)
        assert np.array_equal(found_valid, clean_valid)
    found, found_valid = warp(np.where(valid, data, np.nan), np.ones_like(valid), source, target, kernel, -1)
    assert np.array_equal(found, clean)
    assert np.array_equal(found_valid, clean_valid)


@pytest.mark.parametrize("kernel", AVERAGING)
def test_a_valid_infinity_stays_where_it_is(kernel: Resampling) -> None:
    """On an aligned grid its neighbours have weight zero, and zero times infinity is not a number."""
    data = np.ones(SOURCE.shape, np.float32)
    data[7, 8] = np.inf
    found, valid = warp(data, np.ones(data.shape, bool), SOURCE, SOURCE, kernel, 0)
    assert np.array_equal(found, data)
    assert valid.all()


@pytest.mark.parametrize(
    ("crs", "transform", "shape"),
    [
        ("EPSG:32632", Affine(10, 0, 600000, 0, -10, 5500000), (300, 280)),
        ("EPSG:3857", Affine(900, 30, 1e6, 20, -900, 7e6), (400, 500)),
        ("EPSG:3413", Affine(5000, 0, -640000, 0, -5000, 640000), (256, 256)),
        ("EPSG:4326", Affine(0.5, 0, -180, 0, -0.5, 90), (360, 720)),
        ("ESRI:54052", Affine(50000, 0, -20e6, 0, -50000, 8.6e6), (344, 400)),
    ],
    ids=["smooth", "turned", "pole", "beyond the projection", "interrupted"],
)
@pytest.mark.parametrize("source_crs", ["EPSG:4326", UTM, "EPSG:3035"])
def test_positions_are_those_of_every_single_point(crs: str, transform: Affine, shape: Any, source_crs: str) -> None:
    """Interpolated or not: within a millionth of a pixel of pyproj's own answer, a whole turn apart at most."""
    target = Grid(crs=crs, transform=transform, shape=shape)
    res = 0.1 if source_crs == "EPSG:4326" else 10000
    source = Grid(crs=source_crs, transform=Affine(res, 0, 0, 0, -res, 90 if res < 1 else 6e6), shape=(1800, 3600))
    cols, rows = np.meshgrid(np.arange(shape[1]) + 0.5, np.arange(shape[0]) + 0.5)
    col, row = source.to_pixels(*to_source(target, source, cols, rows))
    at = positions(target, source)
    finite = np.isfinite(col) & np.isfinite(row)
    assert np.array_equal(np.isfinite(at.cols), finite)
    assert finite.any()
    turn = 3600 if res < 1 else np.inf
    off = np.abs(at.cols - col)[finite]
    assert np.minimum(off, np.abs(off - turn)).max() < 2e-6
    assert np.abs(at.rows - row)[finite].max() < 2e-6


def test_pixel_ratio() -> None:
    """Columns and rows per pixel, also where the middle has no place or lies at the antimeridian; else 1."""
    assert pixel_ratio(over(SOURCE, UTM, (30, 20)), SOURCE) == pytest.approx((3, 2))
    globe = Grid(crs="EPSG:4326", transform=Affine(0.01, 0, -180, 0, -0.01, 90), shape=(18000, 36000))
    seam = Grid(crs="EPSG:4326", transform=Affine(0.05, 0, 177.475, 0, -0.03, 10), shape=(100, 100))
    assert pixel_ratio(seam, globe) == pytest.approx((5, 3))
    zone = over(
        Grid(crs="EPSG:4326", transform=Affine(1, 0, 179.5, 0, -1, 0.5), shape=(1, 1)), "EPSG:32601", (1e3, 1e3)
    )
    assert pixel_ratio(zone, globe) == pytest.approx((0.9, 0.9), rel=0.03)
    nowhere = Grid(crs="EPSG:4326", transform=Affine(1, 0, 0, 0, -1, 300), shape=(10, 10))
    assert pixel_ratio(nowhere, SOURCE) == (1.0, 1.0)
    half = Grid(crs="EPSG:4326", transform=Affine(0.01, 0, 12, 0, -0.5, 115), shape=(102, 11))
    assert pixel_ratio(half, DEGREES)[1] > 1000
    middle_lost = pixel_ratio(
        Grid(crs="EPSG:4326", transform=Affine(0.01, 0, 12, 0, -0.5, 120), shape=(100, 11)), SOURCE
    )
    assert middle_lost[1] > 1000
