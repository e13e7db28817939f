"""Resampling against rasterio, and what must never happen to nodata."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from affine import Affine
from hypothesis import example, given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.enums import Resampling as GdalResampling
from rasterio.warp import reproject, transform_bounds

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.geo.resample.positions import Resampling, needed_window, positions
from rasteret_ml.geo.resample.warp import warp

UTM = "EPSG:32633"
KERNELS = get_args(Resampling)
SOURCE = Grid(crs=UTM, transform=Affine(10, 0, 500000, 0, -10, 5000000), shape=(60, 70))
DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]


def source_window(target: Grid, source: Grid, resampling: Resampling) -> Window | None:
    """What is read: the window needed, as far as the source has it."""
    needed = needed_window(target, source, resampling)
    return (
        None if needed is None else needed.intersection(Window(row=0, col=0, height=source.height, width=source.width))
    )


def _target(dx: float, dy: float, scale: float, shape: tuple[int, int] = (40, 45), crs: str = UTM) -> Grid:
    transform = SOURCE.transform @ Affine.translation(dx, dy) @ Affine.scale(scale)
    return Grid(crs=crs, transform=transform, shape=shape)


_WEST, _, _, _NORTH = transform_bounds(UTM, "EPSG:32632", *SOURCE.bounds)
NEIGHBOUR_ZONE = Grid(crs="EPSG:32632", transform=Affine(12, 0, _WEST + 50, 0, -12, _NORTH - 50), shape=(50, 48))
"""Lies over `SOURCE`, a few degrees askew."""


def _noise(dtype: str, shape: tuple[int, int] = SOURCE.shape, seed: int = 0) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 100, shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize("dtype", DTYPES)
@examples(15)
@given(row=st.integers(-30, 70), col=st.integers(-30, 80), seed=st.integers(0, 9))
def test_nearest_on_an_aligned_grid_is_a_copy(dtype: str, row: int, col: int, seed: int) -> None:
    """A whole number of pixels away, nearest gives the same pixels bit for bit; outside is invalid and filled."""
    data, valid = _noise(dtype, seed=seed), np.random.default_rng(seed).random(SOURCE.shape) > 0.2
    window = Window(row=row, col=col, height=25, width=30)
    found, found_valid = warp(data, valid, SOURCE, SOURCE.window(window), "nearest", 7)
    expected, expected_valid = np.full(window.shape, 7, dtype), np.zeros(window.shape, bool)
    shared = window.intersection(Window(row=0, col=0, height=60, width=70))
    if shared is not None:
        at = shared.relative_to(window).slices
        expected[at] = np.where(valid[shared.slices], data[shared.slices], np.array(7, dtype))
        expected_valid[at] = valid[shared.slices]
    assert found.dtype == dtype
    assert np.array_equal(found_valid, expected_valid)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_are_kept(kernel: Resampling, dtype: str) -> None:
    """A constant image of the type's largest or smallest value stays that value: no wrap, no rounding."""
    limits = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    for value in (limits.min, limits.max):
        if dtype == "float32":
            value /= 4  # GDAL accumulates weights times values in float32
        if dtype == "float64":
            value /= 1e300
        data = np.full(SOURCE.shape, value, dtype)
        found, valid = warp(data, np.ones(SOURCE.shape, bool), SOURCE, _target(10.3, 9.6, 1.0, (20, 20)), kernel, 0)
        assert valid.all()
        assert np.allclose(found.astype(float), float(data[0, 0]), rtol=1e-3 if dtype == "float16" else 1e-6, atol=0)
        assert found.dtype == dtype


TARGETS = [_target(0.3, 0.7, 1.0), _target(5.2, -3.1, 0.37), _target(-4.4, 2.5, 3.1, (25, 28)), NEIGHBOUR_ZONE]


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "cubic", "average"])
@pytest.mark.parametrize("target", TARGETS, ids=["shifted", "finer", "coarser", "other-zone"])
@pytest.mark.parametrize("holes", [False, True])
def test_floats_equal_rasterio(kernel: Resampling, target: Grid, holes: bool) -> None:
    """The same pixels and the same validity as `reproject` with a nodata value of its own choosing.

    The kernel's scale is given to GDAL: left alone, it takes it from the arrays' extents, not from the grids.
    At the image's edge its `average` counts the outermost pixels for what they do not cover as well.
    """
    scale = {2: 1 / 3.1, 3: 1 / 1.2}.get(TARGETS.index(target), 1.0)
    data = np.random.default_rng(5).normal(100, 20, SOURCE.shape)
    valid = np.random.default_rng(6).random(SOURCE.shape) > (0.15 if holes else -1)
    expected = np.full(target.shape, -9999.0)
    reproject(
        np.where(valid, data, -9999.0),
        expected,
        src_transform=SOURCE.transform,
        src_crs=SOURCE.crs,
        src_nodata=-9999.0,
        dst_transform=target.transform,
        dst_crs=target.crs,
        dst_nodata=-9999.0,
        resampling=GdalResampling[kernel],
        XSCALE=scale,
        YSCALE=scale,
    )
    found, found_valid = warp(data, valid, SOURCE, target, kernel, -9999.0)
    assert found_valid.any()
    assert np.array_equal(found_valid, expected != -9999.0)
    # The neighbouring zone's pixels are 1.2 of ours only about: its grid is turned and stretched a little.
    limit = 2.0 if target is NEIGHBOUR_ZONE else 1e-6
    at = positions(target, SOURCE)
    rim = 3.1 if kernel == "average" else 0
    fair = (at.cols >= rim) & (at.cols <= 70 - rim) & (at.rows >= rim) & (at.rows <= 60 - rim)
    assert fair.sum() > 200
    assert np.abs(found - expected)[fair].max() <= limit


@pytest.mark.parametrize("kernel", ["nearest", "bilinear", "cubic", "average"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32"])
def test_integers_equal_rasterio(kernel: Resampling, dtype: str) -> None:
    """Within one level of GDAL's own integer path, exactly for the kernel that only picks."""
    data = np.random.default_rng(2).integers(1, 120, SOURCE.shape).astype(dtype)
    target = TARGETS[0]
    expected = np.zeros(target.shape, dtype)
    reproject(
        data,
        expected,
        src_transform=SOURCE.transform,
        src_crs=SOURCE.crs,
        dst_transform=target.transform,
        dst_crs=target.crs,
        resampling=GdalResampling[kernel],
    )
    found, valid = warp(data, np.ones(data.shape, bool), SOURCE, target, kernel, 0)
    assert found.dtype == dtype
    limit = 0 if kernel == "nearest" else 1
    assert np.abs(found[valid].astype(int) - expected[valid].astype(int)).max() <= limit


@pytest.mark.parametrize("target", TARGETS, ids=["shifted", "finer", "coarser", "other-zone"])
@pytest.mark.parametrize("kernel", ["bilinear", "average"])
@examples(15)
@given(low=st.integers(0, 200), share=st.floats(0.05, 0.9), seed=st.integers(0, 50))
def test_invalid_pixels_never_bleed(kernel: Resampling, target: Grid, low: int, share: float, seed: int) -> None:
    """Kernels that average stay inside the range of the valid pixels, whatever lies in the invalid ones."""
    rng = np.random.default_rng(seed)
    data = rng.integers(low, low + 50, SOURCE.shape, endpoint=True).astype(np.uint16)
    valid = rng.random(SOURCE.shape) > share
    data[~valid] = rng.choice([0, 65535], SOURCE.shape)[~valid]
    found, found_valid = warp(data, valid, SOURCE, target, kernel, 0)
    assert not found[~found_valid].any()
    if found_valid.any():
        assert found[found_valid].min() >= low
        assert found[found_valid].max() <= low + 50


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", TARGETS, ids=["shifted", "finer", "coarser", "other-zone"])
def test_what_is_invalid_does_not_matter(kernel: Resampling, target: Grid) -> None:
    """Two images that differ in their invalid pixels only give the same result (cubic included)."""
    rng = np.random.default_rng(4)
    data, valid = rng.normal(0, 1, SOURCE.shape).astype(np.float32), rng.random(SOURCE.shape) > 0.3
    other = np.where(valid, data, np.float32(1e30))
    found = [warp(d, valid, SOURCE, target, kernel, 0) for d in (data, other)]
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


def test_mode_and_average_equal_block_statistics() -> None:
    """On a grid three times as coarse: the majority class, and the mean, of each block's valid pixels."""
    rng = np.random.default_rng(8)
    data, valid = rng.integers(1, 4, SOURCE.shape).astype(np.uint8), rng.random(SOURCE.shape) > 0.3
    shape = (SOURCE.height // 3, SOURCE.width // 3)
    target = Grid(crs=UTM, transform=SOURCE.transform @ Affine.scale(3), shape=shape)
    blocks, kept = (
        a[: shape[0] * 3, : shape[1] * 3].reshape(shape[0], 3, shape[1], 3).swapaxes(1, 2).reshape(*shape, 9)
        for a in (data, valid)
    )
    votes = np.stack([((blocks == k) & kept).sum(-1) for k in (1, 2, 3)], -1)
    ranked = np.sort(votes, axis=-1)
    clear = ranked[..., 2] > ranked[..., 1]
    mode, mode_valid = warp(data, valid, SOURCE, target, "mode", 0)
    assert clear.sum() > 200
    assert np.array_equal(mode_valid, kept.any(-1))
    assert np.array_equal(mode[clear], votes.argmax(-1)[clear] + 1)
    mean, mean_valid = warp(data.astype(np.float64), valid, SOURCE, target, "average", 0)
    assert np.array_equal(mean_valid, kept.any(-1))
    some = kept.any(-1)
    expected = (blocks * kept).sum(-1)[some] / kept.sum(-1)[some]
    assert np.allclose(mean[some], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["nearest", "mode"])
def test_categories_stay_categories(kernel: Resampling) -> None:
    """Only classes that occur in the data come out."""
    data = np.random.default_rng(1).choice(np.array([3, 40, 200], np.uint8), SOURCE.shape)
    for target in TARGETS:
        found, valid = warp(data, data != 40, SOURCE, target, kernel, 99)
        assert set(np.unique(found[valid])) <= {3, 200}
        assert set(np.unique(found[~valid])) <= {99}


@pytest.mark.parametrize("kernel", ["nearest", "mode"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_pick_invent_no_value(kernel: Resampling, dtype: str) -> None:
    """Every value that comes out occurs in the data, to the last bit, for every type that is not refused."""
    data = _noise(dtype)
    for target in TARGETS:
        found, valid = warp(data, np.ones(data.shape, bool), SOURCE, target, kernel, 0)
        assert valid.any()
        assert np.isin(found[valid], data).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_valid_gives_nothing(kernel: Resampling) -> None:
    """All invalid, or far away: all fill, all invalid, never an error."""
    data = _noise("uint16")
    for valid, target in ((np.zeros, TARGETS[0]), (np.ones, _target(5000, 5000, 1.0))):
        found, found_valid = warp(data, valid(SOURCE.shape, bool), SOURCE, target, kernel, 42)
        assert not found_valid.any()
        assert (found == 42).all()


def test_inputs_are_not_changed() -> None:
    """Pixels and validity that were given stay as they were."""
    data, valid = _noise("float32"), np.random.default_rng(0).random(SOURCE.shape) > 0.5
    copies = data.copy(), valid.copy()
    warp(data, valid, SOURCE, TARGETS[0], "bilinear", 0)
    assert np.array_equal(data, copies[0])
    assert np.array_equal(valid, copies[1])


@pytest.mark.parametrize("kernel", KERNELS)
@examples(20)
@example(x=0.0, y=0.0, scale=1.0, size=6, zone=True)
@given(x=st.floats(0, 2500), y=st.floats(0, 2500), scale=st.floats(0.2, 6), size=st.integers(1, 40), zone=st.booleans())
def test_source_window_holds_all_that_is_needed(kernel: Resampling, x, y, scale, size, zone: bool) -> None:
    """Warping only the window that the plan asks for equals warping the whole image."""
    source = Grid(crs=UTM, transform=SOURCE.transform, shape=(260, 260))
    west, north = (_WEST, _NORTH) if zone else (500000, 5000000)
    origin = Affine(10 * scale, 0, west + x, 0, -10 * scale, north - y)
    target = Grid(crs="EPSG:32632" if zone else UTM, transform=origin, shape=(size, size + 3))
    data = np.add.outer(np.arange(260.0) * 3, np.arange(260.0)) + np.random.default_rng(0).random((260, 260))
    valid = np.ones((260, 260), bool)
    whole, whole_valid = warp(data, valid, source, target, kernel, -1)
    window = source_window(target, source, kernel)
    if window is None:
        assert not whole_valid.any()
        return
    assert window.intersection(Window(row=0, col=0, height=260, width=260)) == window
    part, part_valid = warp(data[window.slices], valid[window.slices], source.window(window), target, kernel, -1)
    close = np.isclose(part, whole, rtol=0, atol=1e-3) & (part_valid == whole_valid)
    # A pixel centre on an edge between two pixels may fall to either side of it.
    assert (~close).sum() <= (0 if kernel in ("bilinear", "cubic") else 0.05 * close.size)


def test_source_window_is_not_wasteful() -> None:
    """An aligned chip needs itself and the kernel's rim, no more."""
    target = SOURCE.window(Window(row=20, col=30, height=10, width=12))
    for kernel, rim in (("nearest", 1), ("bilinear", 2), ("cubic", 3)):
        found = source_window(target, SOURCE, kernel)
        assert found is not None
        assert found.row >= 20 - rim
        assert found.col >= 30 - rim
        assert found.row_stop <= 30 + rim
        assert found.col_stop <= 42 + rim


def test_source_window_of_a_far_target_is_none() -> None:
    """Beside the image, and where the projection has no answer."""
    assert source_window(_target(5000, 0, 1.0), SOURCE, "bilinear") is None
    nowhere = Grid(crs="EPSG:4326", transform=Affine(1, 0, 0, 0, -1, 300), shape=(10, 10))
    assert source_window(nowhere, SOURCE, "nearest") is None


@pytest.mark.parametrize(
    ("kernel", "crs", "message"), [("lanczos", UTM, "lanczos"), ("", UTM, "resampling"), ("nearest", None, "CRS")]
)
def test_source_window_refuses(kernel: Any, crs: str | None, message: str) -> None:
    """An unknown kernel and a missing CRS are errors at the door."""
    with pytest.raises(UsageError, match=message):
        source_window(Grid(crs=crs, transform=SOURCE.transform, shape=(5, 5)), SOURCE, kernel)
