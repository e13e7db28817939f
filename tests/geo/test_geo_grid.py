"""Pixel grids against simple arithmetic and rasterio."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.features import geometry_window
from rasterio.io import MemoryFile
from rasterio.transform import array_bounds, rowcol

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid, Window, round_half_up

UTM = "EPSG:32633"
NATIVE = Grid(crs=UTM, transform=Affine(10, 0, 500000, 0, -10, 5000000), shape=(100, 120))
ROTATED = Grid(
    crs=UTM, transform=Affine.translation(500000, 5000000) @ Affine.rotation(30) @ Affine.scale(10, -10), shape=(40, 60)
)

RES = st.sampled_from([0.1, 0.5, 1.0, 10.0, 30.0, 1 / 3, 8.983152841195215e-05])
ORIGIN = st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000))
OFFSET = st.integers(-500, 500)
SIZE = st.integers(1, 300)


def _grid(res: float, origin: tuple[int, int], sign_x: int = 1, sign_y: int = -1) -> Grid:
    transform = Affine(sign_x * res, 0, origin[0] * res * 7.3, 0, sign_y * res, origin[1] * res * 3.1)
    return Grid(crs=UTM, transform=transform, shape=(50, 70))


@examples(100)
@given(
    res=RES,
    origin=ORIGIN,
    row=OFFSET,
    col=OFFSET,
    height=SIZE,
    width=SIZE,
    signs=st.tuples(*[st.sampled_from([1, -1])] * 2),
)
def test_snap_finds_the_window_whose_bounds_it_is_given(res, origin, row, col, height, width, signs) -> None:
    """Bounds that lie on pixel edges come back as exactly that window, on all four orientations of the axes."""
    grid = _grid(res, origin, *signs)
    window = grid.window(Window(row=row, col=col, height=height, width=width))
    assert grid.snap(window.bounds) == window


@examples(100)
@given(col=st.floats(-50, 50), row=st.floats(-50, 50), height=st.floats(0.01, 40), width=st.floats(0.01, 40), res=RES)
def test_snap_rounds_size_and_origin(col: float, row: float, height: float, width: float, res: float) -> None:
    """Size and origin are the nearest whole pixels, and at least one pixel remains."""
    grid = _grid(res, (3, 5))
    t = grid.transform
    xmin, ymax = t.c + col * res, t.f - row * res
    chip = grid.snap((xmin, ymax - height * res, xmin + width * res, ymax))
    at_col, at_row = ~t @ (chip.transform.c, chip.transform.f)
    noise = 1e-6
    assert abs(at_col - round(at_col)) < noise
    assert abs(at_row - round(at_row)) < noise
    assert abs(at_col - col) <= 0.5 + noise
    assert abs(at_row - row) <= 0.5 + noise
    assert chip.height >= 1
    assert chip.width >= 1
    assert abs(chip.height - height) <= max(0.5, 1 - height) + noise
    assert abs(chip.width - width) <= max(0.5, 1 - width) + noise


def test_snap_rounds_halves_up() -> None:
    """An origin or size of n and a half pixels goes to n + 1, before the origin too."""
    chip = NATIVE.snap((500005, 4999795, 500030, 4999995))
    assert chip == NATIVE.window(Window(row=1, col=1, height=20, width=3))
    chip = NATIVE.snap((499985, 4999975, 500015, 5000015))
    assert chip == NATIVE.window(Window(row=-1, col=-1, height=4, width=3))
    assert [round_half_up(v) for v in (-1.5, -0.5, 0.5, 1.5, 2.5, 2.49)] == [-1, 0, 1, 2, 3, 2]


@pytest.mark.parametrize(
    "bounds",
    [(10, 0, 0, 10), (0, 0, 0, 10), (0, 0, 10, 0), (0, 0, math.inf, 10), (math.nan, 0, 1, 1), (-math.inf, 0, 1, 1)],
)
def test_snap_refuses_bounds_that_are_none(bounds) -> None:
    """Empty, swapped and infinite bounds are errors at the door."""
    with pytest.raises(UsageError, match="xmin < xmax"):
        NATIVE.snap(bounds)


def test_snap_refuses_a_rotated_grid() -> None:
    """It has no x and y slices; the message says what to do."""
    with pytest.raises(UsageError, match=r"crs=.*res="):
        ROTATED.snap((500000, 4999900, 500100, 5000000))


@examples(100)
@given(res=RES, origin=ORIGIN, row=OFFSET, col=OFFSET, height=SIZE, width=SIZE)
def test_window_of_is_the_inverse_of_window(res, origin, row, col, height, width) -> None:
    """A window's grid is found again where it was cut, on straight and rotated grids."""
    window = Window(row=row, col=col, height=height, width=width)
    for grid in (_grid(res, origin), ROTATED):
        assert grid.window_of(grid.window(window)) == window


@pytest.mark.parametrize(
    "other",
    [
        Grid(crs=UTM, transform=NATIVE.transform @ Affine.translation(0.5, 0), shape=(10, 10)),
        Grid(crs=UTM, transform=NATIVE.transform @ Affine.translation(0, 0.01), shape=(10, 10)),
        Grid(crs=UTM, transform=NATIVE.transform @ Affine.scale(2), shape=(10, 10)),
        Grid(crs=UTM, transform=NATIVE.transform @ Affine.scale(1, -1), shape=(10, 10)),
        Grid(crs=UTM, transform=NATIVE.transform @ Affine.scale(1.001), shape=(10, 10)),
        Grid(crs=UTM, transform=NATIVE.transform @ Affine.rotation(1), shape=(10, 10)),
        Grid(crs="EPSG:32634", transform=NATIVE.transform, shape=(10, 10)),
        Grid(crs=None, transform=NATIVE.transform, shape=(10, 10)),
    ],
    ids=["half-pixel", "hundredth", "coarser", "flipped", "slightly-coarser", "rotated", "other-crs", "no-crs"],
)
def test_window_of_another_grid_is_none(other: Grid) -> None:
    """Pixels that do not coincide are never taken as they are."""
    assert NATIVE.window_of(other) is None


def test_window_of_tolerates_noise_but_not_drift() -> None:
    """A thousandth of a pixel at the far corner is the limit: a tiny scale error is fine on a small chip only."""
    stretched = NATIVE.transform @ Affine.scale(1 + 5e-6)
    assert NATIVE.window_of(Grid(crs=UTM, transform=stretched, shape=(100, 100))) is not None
    assert NATIVE.window_of(Grid(crs=UTM, transform=stretched, shape=(1000, 1000))) is None
    assert NATIVE.window_of(Grid(crs="EPSG:32633", transform=NATIVE.transform, shape=(5, 6))) == Window(
        row=0, col=0, height=5, width=6
    )


@pytest.fixture(scope="module")
def dataset():
    """A dataset on `NATIVE`, for rasterio's window arithmetic."""
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=1, dtype="uint8", height=100, width=120, crs=UTM, transform=NATIVE.transform
        ) as created:
            created.write(np.zeros((1, 100, 120), np.uint8))
        with memory.open() as opened:
            yield opened


@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")  # rasterio with affine 3
def test_window_around_equals_rasterio(dataset, rng: np.random.Generator) -> None:
    """`geometry_window(boundless=True)` over random boxes, inside and outside the image."""
    for _ in range(200):
        x, y = rng.uniform(499500, 501500), rng.uniform(4998500, 5000500)
        box = shapely.box(x, y, x + rng.uniform(0.5, 900), y + rng.uniform(0.5, 900))
        expected = geometry_window(dataset, [box], boundless=True)
        found = NATIVE.window_around(box.bounds)
        assert (found.row, found.col, found.height, found.width) == (
            expected.row_off,
            expected.col_off,
            expected.height,
            expected.width,
        )


@examples(100)
@given(res=RES, origin=ORIGIN, row=OFFSET, col=OFFSET, height=SIZE, width=SIZE)
def test_window_around_aligned_bounds_adds_nothing(res, origin, row, col, height, width) -> None:
    """Floating point noise on a pixel edge does not add a row or column."""
    grid = _grid(res, origin)
    window = Window(row=row, col=col, height=height, width=width)
    assert grid.window_around(grid.window(window).bounds) == window


def test_window_around_a_point_is_one_pixel() -> None:
    """Bounds without an extent, on a pixel edge or not, still give a pixel."""
    assert NATIVE.window_around((500025, 4999975, 500025, 4999975)) == Window(row=2, col=2, height=1, width=1)
    assert NATIVE.window_around((500020, 4999980, 500020, 4999980)).shape == (1, 1)


def test_window_around_holds_the_bounds_on_a_rotated_grid() -> None:
    """Every corner of the box lies in the window, and the window is no wider than it must be."""
    bounds = (500050, 5000100, 500200, 5000200)
    grid = ROTATED.window(ROTATED.window_around(bounds))
    corners = shapely.box(*bounds)
    assert grid.footprint.buffer(1e-6).contains(corners)
    cols, rows = grid.to_pixels(*np.array(corners.exterior.coords).T)
    assert min(cols.min(), rows.min()) < 1
    assert grid.width - cols.max() < 1
    assert grid.height - rows.max() < 1


def test_bounds_res_and_footprint() -> None:
    """Bounds equal rasterio's `array_bounds`; a rotated footprint is exact, its pixel size kept."""
    assert NATIVE.bounds == array_bounds(100, 120, NATIVE.transform)
    assert NATIVE.footprint.equals(shapely.box(*NATIVE.bounds))
    assert NATIVE.res == (10, 10)
    assert ROTATED.res == pytest.approx((10, 10))
    assert ROTATED.footprint.area == pytest.approx(40 * 60 * 100)
    assert ROTATED.bounds == pytest.approx(ROTATED.footprint.bounds)
    assert (NATIVE.is_axis_aligned, ROTATED.is_axis_aligned) == (True, False)
    south_up = Grid(crs=UTM, transform=Affine(10, 0, 0, 0, 10, 0), shape=(5, 4))
    assert south_up.bounds == (0, 0, 40, 50)


def test_to_pixels_equals_rasterio(rng: np.random.Generator) -> None:
    """Fractional columns and rows floor to `rasterio.transform.rowcol`, rotated too."""
    for grid in (NATIVE, ROTATED):
        x, y = rng.uniform(499000, 502000, 500), rng.uniform(4998000, 5001000, 500)
        cols, rows = grid.to_pixels(x, y)
        expected_rows, expected_cols = rowcol(grid.transform, x, y)
        assert np.array_equal(np.floor(rows), expected_rows)
        assert np.array_equal(np.floor(cols), expected_cols)


@pytest.mark.filterwarnings("ignore:Use `@` matmul:PendingDeprecationWarning")  # rasterio with affine 3
def test_window_transform_equals_rasterio() -> None:
    """The window's grid has the transform that rasterio gives a window."""
    window = Window(row=-3, col=7, height=2, width=5)
    expected = rasterio.windows.transform(rasterio.windows.Window(7, -3, 5, 2), NATIVE.transform)
    assert NATIVE.window(window) == Grid(crs=UTM, transform=expected, shape=(2, 5))


def test_grids_compare_and_pickle() -> None:
    """Value objects: equal by value, hashable, the same after a pickle."""
    copy = pickle.loads(pickle.dumps(ROTATED))
    assert copy == ROTATED
    assert hash(copy) == hash(ROTATED)
    assert copy != NATIVE
