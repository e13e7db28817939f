"""Longitudes are a circle: windows, pixels, outlines and boxes at the antimeridian, round the poles and on 0..360."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyproj
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.collection.filters import bbox_overlaps, parse_lonlat_bbox
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import LONLAT, transform_bounds, transform_geometries, transform_points
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.geo.resample.positions import Resampling, needed_window, positions
from rasteret_ml.geo.resample.warp import warp
from rasteret_ml.raster.reprojected_grid import reprojected_grid

KERNELS: tuple[Resampling, ...] = get_args(Resampling)
GLOBE = Grid(crs=LONLAT, transform=Affine(0.25, 0, -180, 0, -0.25, 90), shape=(720, 1440))
EAST = Grid(crs=LONLAT, transform=Affine(0.25, 0, 0, 0, -0.25, 90), shape=(720, 1440))
"""The same pixels from 0 to 360 degrees."""
DATA = np.random.default_rng(0).integers(1, 60000, GLOBE.shape).astype(np.uint16)
VALID = np.random.default_rng(1).random(GLOBE.shape) > 0.05

TARGETS = {
    "zone 1": Grid(crs="EPSG:32601", transform=Affine(2e4, 0, 2e5, 0, -2e4, 6.4e6), shape=(30, 28)),
    "zone 60 south": Grid(crs="EPSG:32760", transform=Affine(3e4, 0, 5e5, 0, -3e4, 6.4e6), shape=(30, 28)),
    "north pole": Grid(crs="EPSG:3413", transform=Affine(3e4, 0, -5e5, 0, -3e4, 7e5), shape=(40, 45)),
    "south pole": Grid(crs="EPSG:3031", transform=Affine(3e4, 0, -5e5, 0, -3e4, 7e5), shape=(40, 45)),
    "beside the pole": Grid(crs="EPSG:3413", transform=Affine(3e4, 0, -15e5, 0, -3e4, 18e5), shape=(40, 45)),
    "degrees over 180": Grid(crs="EPSG:4258", transform=Affine(0.3, 0, 176.1, 0, -0.2, 11.03), shape=(30, 33)),
    "degrees over -180": Grid(crs="EPSG:4258", transform=Affine(0.3, 0, -184.1, 0, -0.2, 11.03), shape=(30, 33)),
    "degrees over 0": Grid(crs=LONLAT, transform=Affine(0.3, 0, -4.1, 0, -0.2, 11.03), shape=(30, 33)),
    "mercator": Grid(crs="EPSG:3832", transform=Affine(3e4, 0, 2.9e6, 0, -3e4, 4e6), shape=(30, 33)),
    "greenwich": Grid(crs="EPSG:32630", transform=Affine(2e4, 0, 5e5, 0, -2e4, 6.4e6), shape=(30, 28)),
}


def read(data: np.ndarray[Any, Any], source: Grid, window: Window) -> tuple[np.ndarray[Any, Any], Grid]:
    """A window of a raster of all longitudes: past its left and right edge it goes on at the other side."""
    assert source.turn is not None
    row, stop = max(window.row, 0), min(window.row_stop, source.height)
    held = Window(row=row, col=window.col, height=stop - row, width=window.width)
    cols = np.arange(held.col, held.col_stop) % source.turn
    return data[held.row : held.row_stop][:, cols], source.window(held)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", TARGETS)
def test_no_seam(name: str, kernel: Resampling) -> None:
    """From -180..180 and from 0..360 the same pixels, all valid where the data are."""
    target, found = TARGETS[name], []
    for grid, data, valid in ((GLOBE, DATA, VALID), (EAST, np.roll(DATA, 720, axis=1), np.roll(VALID, 720, axis=1))):
        window = needed_window(target, grid, kernel)
        assert window is not None
        pixels, part = read(data, grid, window)
        known, _ = read(valid, grid, window)
        found.append(warp(pixels, known, part, target, kernel, 0))
        if "pole" not in name:
            assert window.width < 120
    assert np.array_equal(found[0][1], found[1][1])
    differ = found[0][0].astype(int) != found[1][0].astype(int)
    assert differ.sum() <= (2 if kernel in ("nearest", "mode") else 0)
    assert found[0][1].mean() > 0.9


@pytest.mark.parametrize("name", TARGETS)
def test_nearest_is_the_pixel_under_each_point(name: str) -> None:
    """Each point by itself: its longitude folded, its pixel looked up in the whole raster."""
    target = TARGETS[name]
    cols, rows = np.meshgrid(np.arange(target.width) + 0.5, np.arange(target.height) + 0.5)
    t = target.transform
    lon, lat = transform_points(t.a * cols + t.c, t.e * rows + t.f, str(target.crs), LONLAT)
    expected = DATA[np.floor((90 - lat) * 4).astype(int), np.floor((lon + 180) % 360 * 4).astype(int)]
    window = needed_window(target, GLOBE, "nearest")
    assert window is not None
    pixels, part = read(DATA, GLOBE, window)
    found, valid = warp(pixels, np.ones(pixels.shape, bool), part, target, "nearest", 0)
    assert valid.all()
    assert (found != expected).sum() <= 2


@examples(60)
@given(
    lon=st.floats(-180, 180),
    lat=st.floats(-80, 80),
    size=st.integers(1, 40),
    kernel=st.sampled_from(KERNELS),
    crs=st.sampled_from(["azimuthal", LONLAT, "EPSG:4258"]),
)
def test_windows_are_small_and_enough_everywhere(lon, lat, size: int, kernel: Resampling, crs: str) -> None:
    """A chip anywhere: its window, read with and without thirty more pixels around, gives the same pixels."""
    if crs == "azimuthal":
        crs = pyproj.CRS.from_proj4(f"+proj=laea +lon_0={lon} +lat_0={lat} +ellps=WGS84").to_wkt()
        transform = Affine(15000, 0, -7500 * size, 0, -15000, 7500 * size)
    else:
        transform = Affine(0.13, 0, lon, 0, -0.13, lat)
    target = Grid(crs=crs, transform=transform, shape=(size, size))
    window = needed_window(target, GLOBE, kernel)
    assert window is not None
    wider = Window(row=window.row - 30, col=window.col - 30, height=window.height + 60, width=window.width + 60)
    results = []
    for each in (window, wider if wider.width < 1400 else window):
        pixels, part = read(DATA, GLOBE, each)
        results.append(warp(pixels, np.ones(pixels.shape, bool), part, target, kernel, 0))
    assert results[0][1].all()
    assert np.array_equal(results[0][1], results[1][1])
    assert np.array_equal(results[0][0], results[1][0])


def test_a_degrees_chip_over_a_zone_at_the_antimeridian() -> None:
    """Longitudes 179..181 and -181..-179 of UTM zones 60 and 1: the same pixels, none lost."""
    for zone, easting in (("EPSG:32660", 650000), ("EPSG:32601", 250000)):
        source = Grid(crs=zone, transform=Affine(1000, 0, easting, 0, -1000, 6150000), shape=(150, 150))
        data = np.random.default_rng(0).random(source.shape)
        found = []
        for west in (179.5, -180.5):
            target = Grid(crs=LONLAT, transform=Affine(0.01, 0, west, 0, -0.01, 55), shape=(40, 100))
            window = needed_window(target, source, "bilinear")
            assert window is not None
            assert max(window.shape) < 100
            found.append(warp(data, np.ones(data.shape, bool), source, target, "bilinear", 0))
        assert found[0][1].all()
        assert np.allclose(found[0][0], found[1][0], rtol=0, atol=1e-6)


def test_rasters_past_180_degrees() -> None:
    """A raster of 170..190 or -190..-170 is found from either side; a chip elsewhere does not touch it."""
    zone = TARGETS["zone 1"]
    for west in (160, -200):
        source = Grid(crs=LONLAT, transform=Affine(0.25, 0, west, 0, -0.25, 70), shape=(120, 160))
        extent = Window(row=0, col=0, height=120, width=160)
        window = needed_window(zone, source, "bilinear")
        assert window is not None
        assert window.intersection(extent) is not None
        assert window.width < 120
        away = needed_window(TARGETS["greenwich"], source, "bilinear")
        assert away is not None
        assert away.intersection(extent) is None


def test_turn() -> None:
    """Whole columns of 360 degrees; none for other CRSs, turned grids, or pixels that do not divide a turn."""
    assert GLOBE.turn == 1440
    assert Grid(crs="EPSG:4807", transform=Affine(0.5, 0, 0, 0, -0.5, 50), shape=(9, 9)).turn == 800
    assert Grid(crs=LONLAT, transform=Affine(1 / 3600, 0, 5, 0, -1 / 3600, 50), shape=(9, 9)).turn == 1296000
    for crs, transform in (
        ("EPSG:32601", Affine(10, 0, 0, 0, -10, 0)),
        (None, Affine(1, 0, 0, 0, -1, 0)),
        (LONLAT, Affine(0.7, 0, 0, 0, -0.7, 0)),
        (LONLAT, Affine(1, 0.1, 0, 0.1, -1, 0)),
    ):
        assert Grid(crs=crs, transform=transform, shape=(9, 9)).turn is None


def test_window_of_turns_to_where_the_grid_is() -> None:
    """Longitude -100 on 0..360 is at 260; where two turns share as much, the one that needs no turning."""
    chip = Grid(crs=LONLAT, transform=Affine(0.25, 0, -100, 0, -0.25, 10), shape=(20, 30))
    assert EAST.window_of(chip) == Window(row=320, col=1040, height=20, width=30)
    assert GLOBE.window_of(chip) == Window(row=320, col=320, height=20, width=30)
    seam = Grid(crs=LONLAT, transform=Affine(0.25, 0, 178, 0, -0.25, 10), shape=(20, 16))
    assert GLOBE.window_of(seam) == Window(row=320, col=1432, height=20, width=16)
    small = Grid(crs=LONLAT, transform=Affine(0.25, 0, 170, 0, -0.25, 20), shape=(80, 80))
    west = Grid(crs=LONLAT, transform=Affine(0.25, 0, -175, 0, -0.25, 10), shape=(20, 20))
    assert small.window_of(west) == Window(row=40, col=60, height=20, width=20)
    assert EAST.window_of(Grid(crs=LONLAT, transform=Affine(0.25, 0, -100.1, 0, -0.25, 10), shape=(20, 30))) is None


SCENES = {
    "zone 1": ("EPSG:32601", shapely.box(250000, 6e6, 380000, 6.11e6), 2),
    "zone 60": ("EPSG:32660", shapely.box(650000, 6e6, 760000, 6.11e6), 2),
    "zone 60 south": ("EPSG:32760", shapely.box(700000, 6e6, 860000, 6.11e6), 2),
    "beside the pole": ("EPSG:3413", shapely.box(-9e5, 1e5, -1e5, 9e5), 2),
    "north pole": ("EPSG:3413", shapely.box(-5e5, -4e5, 6e5, 7e5), 1),
    "south pole": ("EPSG:3031", shapely.box(-5e5, -4e5, 6e5, 7e5), 1),
    "ring round the pole": (
        "EPSG:3031",
        shapely.Polygon(shapely.box(-5e5, -4e5, 6e5, 7e5).exterior, [shapely.box(-1e5, -1e5, 2e5, 1e5).exterior]),
        1,
    ),
}


@pytest.mark.parametrize("name", SCENES)
def test_outlines_are_split_and_come_back(name: str) -> None:
    """Valid, within -180..180, in parts; points inside are inside; back in their own CRS they are the same again."""
    crs, outline, parts = SCENES[name]
    found = transform_geometries(np.array([outline], dtype=object), crs, LONLAT)[0]
    assert found.is_valid
    assert shapely.get_num_geometries(found) == parts
    assert found.bounds[0] == -180
    assert found.bounds[2] == 180
    xmin, ymin, xmax, ymax = outline.bounds
    x, y = np.random.default_rng(0).uniform((xmin - 2e5, ymin - 2e5), (xmax + 2e5, ymax + 2e5), (2000, 2)).T
    points = shapely.points(x, y)
    clear = shapely.distance(outline.boundary, points) > 3000
    lon, lat = transform_points(x, y, crs, LONLAT)
    assert np.array_equal(shapely.contains_xy(found, lon, lat)[clear], shapely.contains(outline, points)[clear])
    back = transform_geometries(np.array([found], dtype=object), LONLAT, crs)[0]
    assert back.is_valid
    assert back.geom_type == "Polygon"
    assert back.symmetric_difference(outline).area < 1e-3 * outline.area


def test_lines_are_split_too() -> None:
    """A line across the antimeridian becomes two."""
    line = shapely.LineString([(250000, 6e6), (380000, 6.01e6)])
    found = transform_geometries(np.array([line], dtype=object), "EPSG:32601", LONLAT)[0]
    assert found.geom_type == "MultiLineString"
    assert found.length < 3


def test_outlines_of_0_to_360_are_moved_back() -> None:
    """The globe is the globe; 170..190 is two boxes; what lies within -180..180 is not touched."""
    boxes = np.array([shapely.box(0, -90, 360, 90), shapely.box(170, -5, 190, 5), shapely.box(3, 4, 5, 6)], object)
    globe, two, same = transform_geometries(boxes, LONLAT, LONLAT)
    assert globe.equals(shapely.box(-180, -90, 180, 90))
    assert two.equals(shapely.union(shapely.box(170, -5, 180, 5), shapely.box(-180, -5, -170, 5)))
    assert same == boxes[2]


def test_geometries_move_to_the_longitudes_that_matter() -> None:
    """On a raster of 0..360 a western AOI lies past 180, a split one is whole again, a wide one is cut elsewhere."""
    split = shapely.union(shapely.box(179, 0, 180, 1), shapely.box(-180, 0, -179, 1))
    boxes = np.array(
        [shapely.box(-100, 0, -90, 1), split, shapely.box(-180, -90, 180, 90), shapely.Point(-1, 0)], object
    )
    found = transform_geometries(boxes, LONLAT, LONLAT, near=EAST.bounds)
    assert found[0].equals(shapely.box(260, 0, 270, 1))
    assert found[1].equals(shapely.box(179, 0, 181, 1))
    assert found[2].equals(shapely.box(0, -90, 360, 90))
    assert found[3].equals(shapely.Point(359, 0))
    past = transform_geometries(np.array([shapely.box(359, 0, 361, 1)], object), LONLAT, LONLAT, near=GLOBE.bounds)[0]
    assert past.equals(shapely.box(-1, 0, 1, 1))


@pytest.mark.parametrize("west", [-180.3, 179.7])
def test_an_aoi_beside_a_scene_across_the_antimeridian(west: float) -> None:
    """It is not cut away: AOIs on either side, on both, or round half the world have their image in the zone."""
    near = (250000.0, 6e6, 380000.0, 6.11e6)
    bounds = transform_bounds(near, "EPSG:32601", LONLAT)
    assert bounds[0] > bounds[2]
    aois = [shapely.box(179.9, 54.5, 179.95, 54.6), shapely.box(-179.95, 54.5, -179.9, 54.6)]
    aois += [shapely.box(west, 54.5, west + 0.6, 54.6), shapely.box(-180, -80, 180, 80)]
    found = transform_geometries(np.array(aois, dtype=object), LONLAT, "EPSG:32601", near=near)
    area = shapely.area(shapely.intersection(shapely.make_valid(found), shapely.box(*near)))
    assert area[0] == pytest.approx(3.24e3 * 11.13e3, rel=0.02)
    assert area[1] == pytest.approx(area[0], rel=0.01)
    assert area[2] == pytest.approx(12 * area[0], rel=0.01)
    assert area[3] == pytest.approx(130e3 * 110e3, rel=1e-3)


def test_warped_grids_stay_in_one_piece() -> None:
    """A scene across the antimeridian, and a rotated one: every corner inside, pixels of about the same area."""
    for crs, transform, to in (
        ("EPSG:32601", Affine(100, 0, 250000, 0, -100, 6.1e6), LONLAT),
        ("EPSG:3413", Affine(1000, 0, -9e5, 0, -1000, 9e5), LONLAT),
        ("EPSG:32633", Affine.translation(5e5, 5e6) @ Affine.rotation(40) @ Affine.scale(10, -10), "EPSG:32632"),
        ("EPSG:32633", Affine(10, 4, 5e5, 3, -10, 5e6), "EPSG:3857"),
    ):
        grid = Grid(crs=crs, transform=transform, shape=(700, 800))
        found = reprojected_grid(grid, to)
        at = positions(grid, found, corners=True)
        assert at.cols.min() >= -1.5
        assert at.rows.min() >= -1.5
        assert at.cols.max() <= found.width + 1.5
        assert at.rows.max() <= found.height + 1.5
        assert found.width * found.height < 6 * 700 * 800
    with pytest.raises(UsageError, match="No part"):
        reprojected_grid(Grid(crs=LONLAT, transform=Affine(1, 0.1, 0, 0, -1, 300), shape=(5, 5)), "EPSG:32633")


RECORDS = {"west": (-176, -174), "east": (174, 176), "past": (178, 185), "0..360": (184, 186), "home": (9, 11)}


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((170, -1, -170, 1), {"west", "east", "past", "0..360"}),
        ((179, -1, -179, 1), {"past"}),
        ((-174.8, -1, -174.5, 1), {"west", "0..360"}),
        ((184.2, -1, 184.4, 1), {"west", "past", "0..360"}),
        ((10, -1, 10.5, 1), {"home"}),
        ((10, 5, 10.5, 6), set()),
        ((-180, -90, 180, 90), set(RECORDS)),
    ],
)
def test_boxes_across_the_antimeridian(bbox: tuple[float, ...], expected: set[str]) -> None:
    """xmin > xmax is two boxes, and longitudes a turn apart are one place."""
    table = pa.table(
        {
            "id": list(RECORDS),
            "bbox": [{"xmin": float(a), "ymin": -2.0, "xmax": float(b), "ymax": 2.0} for a, b in RECORDS.values()],
        }
    )
    found = ds.dataset(table).to_table(filter=bbox_overlaps(parse_lonlat_bbox(bbox)))
    assert set(found["id"].to_pylist()) == expected


@pytest.mark.parametrize(
    "bbox",
    [(1, 2, 3), (0, 5, 1, 4), (0, 0, np.nan, 1), (5e5, 5e6, 6e5, 6e6), (350, 0, 10, 1), (0, -95, 1, 0), ("a", 0, 1, 1)],
)
def test_bad_boxes_are_refused(bbox: tuple[Any, ...]) -> None:
    """Metres, a wrong order, too few numbers: a clear error."""
    with pytest.raises(UsageError, match="bbox must be"):
        parse_lonlat_bbox(bbox)
