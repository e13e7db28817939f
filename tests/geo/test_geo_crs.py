"""CRS text and transforms against pyproj and rasterio."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyproj
import pytest
import rasterio.crs
import rasterio.warp
import shapely
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import (
    LONLAT,
    crs_text,
    epsg_code,
    same_crs,
    transform_bounds,
    transform_geometries,
    transform_points,
)

UTM = "EPSG:32633"
NAMELESS = pyproj.CRS.from_proj4("+proj=laea +lat_0=52.5 +lon_0=10.25 +x_0=7 +y_0=9 +ellps=GRS80 +units=m")


@pytest.mark.parametrize(
    "crs",
    [
        32633,
        np.int64(32633),
        "EPSG:32633",
        "epsg:32633",
        "urn:ogc:def:crs:EPSG::32633",
        pyproj.CRS(32633),
        pyproj.CRS(32633).to_wkt(),
        pyproj.CRS(32633).to_json(),
        rasterio.crs.CRS.from_epsg(32633),
        rasterio.crs.CRS.from_epsg(32633).to_wkt(),
    ],
    ids=lambda crs: type(crs).__name__,
)
def test_one_text_for_one_crs(crs) -> None:
    """However a CRS is written, its text is the authority's code."""
    assert crs_text(crs) == UTM


@pytest.mark.parametrize("crs", ["OGC:CRS84", "urn:ogc:def:crs:OGC:1.3:CRS84", 4326, "WGS84", pyproj.CRS("OGC:CRS84")])
def test_longitude_latitude_has_one_name(crs) -> None:
    """CRS84 and 4326 differ in axis order only, and x is always first here."""
    assert crs_text(crs) == LONLAT == "EPSG:4326"


def test_a_crs_without_a_code_is_its_wkt() -> None:
    """The text means the same system and is stable."""
    text = crs_text(NAMELESS)
    assert pyproj.CRS(text).equals(NAMELESS)
    assert crs_text(text) == text
    assert epsg_code(text) is None


@pytest.mark.parametrize(
    "crs", [None, True, "", "no such thing", "EPSG:1", 999999, -5, 3.5, [], object(), b"EPSG:4326"]
)
def test_refuses_what_is_no_crs(crs) -> None:
    """A clear error of ours at the door."""
    with pytest.raises(UsageError, match="coordinate reference system"):
        crs_text(crs)


@pytest.mark.parametrize(
    ("text", "code"),
    [(UTM, 32633), (LONLAT, 4326), (None, None), (pyproj.CRS(3857).to_wkt(), 3857), ("OGC:CRS84", None)],
)
def test_epsg_code(text: str | None, code: int | None) -> None:
    """The number where there is one; CRS84 has none but is 4326 after `crs_text`."""
    if text == "OGC:CRS84":
        assert epsg_code(crs_text(text)) == 4326
    else:
        assert epsg_code(text) == code


def test_same_crs() -> None:
    """Equal whatever the spelling or axis order; None only equals None."""
    assert same_crs(UTM, pyproj.CRS(UTM).to_wkt())
    assert same_crs(LONLAT, "OGC:CRS84")
    assert same_crs(None, None)
    assert not same_crs(UTM, "EPSG:32634")
    assert not same_crs(UTM, None)
    assert not same_crs(None, UTM)


@examples(50)
@given(
    points=st.lists(st.tuples(st.floats(9, 21), st.floats(1, 80)), min_size=1, max_size=20),
    target=st.sampled_from([UTM, "EPSG:3857", "EPSG:3035", "EPSG:2154"]),
)
def test_points_equal_rasterio(points: list[tuple[float, float]], target: str) -> None:
    """x before y, whatever the axes' official order (3035 is northing first)."""
    lon, lat = np.array(points).T
    x, y = transform_points(lon, lat, LONLAT, target)
    expected = rasterio.warp.transform(LONLAT, target, lon, lat)
    assert np.allclose([x, y], expected, rtol=1e-9, atol=1e-3)
    back = transform_points(x, y, target, LONLAT)
    assert np.allclose(back, [lon, lat], atol=1e-6)


def test_points_without_an_answer_are_infinite() -> None:
    """No exception, no made-up number: infinity (a pole has no place in Mercator, 100 degrees north is nowhere)."""
    x, y = transform_points(np.array([0.0, 10.0]), np.array([100.0, 50.0]), LONLAT, UTM)
    assert np.isinf(x[0])
    assert np.isinf(y[0])
    assert np.isfinite([x[1], y[1]]).all()


@pytest.mark.parametrize("target", [UTM, "EPSG:3857", "EPSG:3035", "EPSG:32634"])
def test_bounds_equal_rasterio(target: str) -> None:
    """Edges bow: the bounds are those of the densified edges, as rasterio's."""
    bounds = (9.5, 45.0, 20.5, 61.0)
    expected = rasterio.warp.transform_bounds(LONLAT, target, *bounds, densify_pts=21)
    assert transform_bounds(bounds, LONLAT, target) == pytest.approx(expected, rel=1e-9)
    assert transform_bounds(bounds, LONLAT, "OGC:CRS84") == bounds


def test_geometries_follow_curved_edges() -> None:
    """A wide box lands where its densely cut outline lands, within a thousandth of its area; holes stay."""
    box = shapely.Polygon(shapely.box(5, 50, 25, 70).exterior, [shapely.box(10, 55, 12, 57).exterior.coords])
    small = shapely.box(15, 50, 15.01, 50.01)
    found = transform_geometries(np.array([box, small], dtype=object), LONLAT, "EPSG:3035")
    project = pyproj.Transformer.from_crs(4326, 3035, always_xy=True).transform
    for geometry, result in zip((box, small), found, strict=True):
        dense = shapely.segmentize(geometry, 0.02)
        expected = shapely.transform(dense, lambda p: np.column_stack(project(p[:, 0], p[:, 1])))
        assert result.symmetric_difference(expected).area < 1e-3 * expected.area
    assert len(found[0].interiors) == 1


def test_geometries_in_the_same_crs_are_left_alone() -> None:
    """No vertex is added where there is nothing to transform."""
    boxes = np.array([shapely.box(0, 0, 1, 1)], dtype=object)
    assert transform_geometries(boxes, LONLAT, "OGC:CRS84")[0] == boxes[0]


def test_points_and_3d_geometries_can_be_transformed() -> None:
    """A point has no extent to cut, and z is dropped."""
    found = transform_geometries(np.array([shapely.Point(15, 50, 7.0)], dtype=object), LONLAT, UTM)
    assert not found[0].has_z
    assert (found[0].x, found[0].y) == pytest.approx((500000, 5538630.7), abs=0.1)


def test_threads_do_not_disturb_each_other() -> None:
    """Transforms from eight threads equal those of one (pyproj transformers must not be shared)."""
    lon, lat = np.linspace(9, 21, 2000), np.linspace(40, 60, 2000)
    expected = transform_points(lon, lat, LONLAT, UTM)
    with ThreadPoolExecutor(8) as pool:
        for x, y in pool.map(lambda _: transform_points(lon, lat, LONLAT, UTM), range(32)):
            assert np.array_equal(x, expected[0])
            assert np.array_equal(y, expected[1])
