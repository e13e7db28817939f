"""Transforms and CRSs equal GDAL's."""

from __future__ import annotations

import io
import math

import numpy as np
import pyproj
import pytest
import tifffile
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from rasterio.io import MemoryFile
from rasterio.rpc import RPC
from whole_file import header_of

from rasteret_ml.cog.header.georeference import GeoTags, read_crs, read_transform
from rasteret_ml.geo.crs import crs_text


def _write(transform: Affine, crs="EPSG:32633", *, point: bool = False) -> tuple[bytes, Affine, object]:
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=8, height=6, count=1, dtype="uint8", crs=crs, transform=transform
        ) as dataset:
            if point:
                dataset.update_tags(AREA_OR_POINT="Point")
            dataset.write(np.zeros((1, 6, 8), np.uint8))
        with memory.open() as dataset:
            return memory.read(), dataset.transform, dataset.crs


@examples(40)
@given(
    origin=st.tuples(st.floats(-1e6, 1e6), st.floats(-1e7, 1e7)),
    size=st.tuples(st.floats(0.1, 1000), st.floats(0.1, 1000)),
    angle=st.sampled_from([0, 0, 30, -100, 180]),
    south_up=st.booleans(),
    point=st.booleans(),
)
def test_transforms_equal_gdal(origin, size, angle: int, south_up: bool, point: bool) -> None:
    """North-up, south-up, rotated, PixelIsPoint: corners equal GDAL's to a millionth of a pixel."""
    scale = Affine.scale(size[0], size[1] if south_up else -size[1])
    transform = Affine.translation(*origin) @ Affine.rotation(angle) @ scale
    content, expected, _ = _write(transform, point=point)
    found = header_of(content).transform
    assert found is not None
    for corner in ((0, 0), (8, 0), (8, 6), (0, 6)):
        near = ~expected @ (found @ corner)
        assert math.dist(near, corner) < 1e-6


def test_pixel_is_point_moves_half_a_pixel() -> None:
    """The tiepoint is a pixel's centre (OGC 19-008r4, 7.1.2.2)."""
    tags = GeoTags(
        pixel_scale=(10, 10, 0), tiepoint=(0, 0, 0, 500000, 5000000, 0), directory=(1, 1, 0, 1, 1025, 0, 1, 2)
    )
    assert read_transform(tags) == Affine(10, 0, 499995, 0, -10, 5000005)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (GeoTags(), None),
        (GeoTags(pixel_scale=(10, 10, 0)), None),
        (GeoTags(tiepoint=(0, 0, 0, 1, 2, 0) * 4), None),
        (GeoTags(pixel_scale=(0, 0, 0), tiepoint=(0, 0, 0, 1, 2, 0)), None),
        (GeoTags(pixel_scale=(math.nan, 1, 0), tiepoint=(0, 0, 0, 1, 2, 0)), None),
        (GeoTags(transformation=(0.0,) * 16), None),
        (GeoTags(pixel_scale=(2, 3, 0), tiepoint=(4, 5, 0, 100, 200, 0)), Affine(2, 0, 92, 0, -3, 215)),
        (GeoTags(transformation=(1, 2, 0, 3, 4, 5, 0, 6, *[0] * 7, 1)), Affine(1, 2, 3, 4, 5, 6)),
        (GeoTags(pixel_scale=(2, -3, 0), tiepoint=(0, 0, 0, 1, 2, 0)), Affine(2, 0, 1, 0, -3, 2)),
    ],
)
def test_transform_of_tags(tags: GeoTags, expected: Affine | None) -> None:
    """Invalid transforms are None; a tiepoint need not be at the first pixel."""
    assert read_transform(tags) == expected


@examples(300)
@given(
    linear=st.lists(st.sampled_from([0.0, 1e-9, 1e-5, 0.1, 10.0, -10.0, 60.0, 1e6]), min_size=4, max_size=4),
    origin=st.lists(st.sampled_from([0.0, 399960.0, -5e6, 1e12, math.inf, math.nan]), min_size=2, max_size=2),
)
def test_a_transform_counts_where_its_inverse_finds_pixels(linear: list[float], origin: list[float]) -> None:
    """As computed with `Affine`, point by point; the two may differ only near the tolerance."""
    a, b, d, e = linear
    transform = Affine(a, b, origin[0], d, e, origin[1])
    found = read_transform(GeoTags(transformation=(a, b, 0, origin[0], d, e, 0, origin[1], *[0] * 7, 1)))
    if transform.determinant == 0:
        assert found is None
        return
    pixels = (0.0, 1.0, 1e5)
    back = [~transform @ (transform @ (pixel, pixel)) for pixel in pixels]
    wrong = max(abs(v - pixel) for pixel, point in zip(pixels, back, strict=True) for v in point)
    if not 0.5e-3 < wrong < 2e-3:
        expected = all(abs(v - pixel) < 1e-3 for pixel, point in zip(pixels, back, strict=True) for v in point)
        assert (found is not None) == expected


CRSES = [
    "EPSG:4326",
    "EPSG:32633",
    "EPSG:3857",
    "EPSG:3035",
    "EPSG:27700",
    "EPSG:2263",
    "EPSG:5070",
    "ESRI:102008",
    "ESRI:54009",
    "+proj=laea +lat_0=52.5 +lon_0=10.25 +x_0=7 +y_0=9 +ellps=GRS80 +units=m",
    "+proj=geos +h=35785831 +lon_0=-75 +sweep=x +ellps=GRS80 +units=m",
    "+proj=utm +zone=33 +datum=WGS84 +units=us-ft",
    "+proj=sinu +R=6371007.181 +units=m",
]


def _displacement(a: object, b: object, x: np.ndarray, y: np.ndarray) -> float:
    """Distance of points in `a` from themselves in `b`, relative to their distance from the origin."""
    other = pyproj.Transformer.from_crs(pyproj.CRS(a), pyproj.CRS(b), always_xy=True).transform(x, y)
    return float(np.hypot(other[0] - x, other[1] - y).max() / (1 + np.hypot(x, y).max()))


@pytest.mark.parametrize("crs", CRSES)
def test_crs_equals_gdal(crs: str) -> None:
    """With and without an EPSG code, as rasterio reads the same file."""
    content, _, expected = _write(Affine(10, 0, 1000, 0, -10, 2000), crs=crs)
    found = header_of(content).crs
    assert found == crs_text(expected.to_wkt())


def test_no_crs_and_rubbish_is_none() -> None:
    """Missing or meaningless keys give no CRS and no error."""
    assert read_crs(GeoTags()) is None
    assert read_crs(GeoTags(directory=(1, 1))) is None
    assert read_crs(GeoTags(directory=(9, 9, 9, 9, 9, 9, 9))) is None


def _geotiff(*keys: tuple[int, int, int, int], ascii: str = "", doubles: tuple[float, ...] = ()) -> bytes:
    directory = (1, 1, 0, len(keys), *[v for key in keys for v in key])
    extra = [(34735, "H", len(directory), directory, True), (33550, "d", 3, (10.0, 10.0, 0.0), True)]
    extra.append((33922, "d", 6, (0.0, 0.0, 0.0, 3.5e6, 7e6, 0.0), True))
    if ascii:
        extra.append((34737, "s", 0, ascii, True))
    if doubles:
        extra.append((34736, "d", len(doubles), doubles, True))
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((6, 8), np.uint8), extratags=extra, metadata=None)
    return file.getvalue()


ESRI_MERCATOR = (
    'ESRI PE String = PROJCS["WGS_1984_Web_Mercator_Auxiliary_Sphere",GEOGCS["GCS_WGS_1984",DATUM["D_WGS_1984",'
    'SPHEROID["WGS_1984",6378137.0,298.257223563]],PRIMEM["Greenwich",0.0],UNIT["Degree",0.0174532925199433]],'
    'PROJECTION["Mercator_Auxiliary_Sphere"],PARAMETER["False_Easting",0.0],PARAMETER["False_Northing",0.0],'
    'PARAMETER["Central_Meridian",0.0],PARAMETER["Standard_Parallel_1",0.0],PARAMETER["Auxiliary_Sphere_Type",0.0],'
    'UNIT["Meter",1.0]]|'
)


@pytest.mark.parametrize(
    "content",
    [
        _geotiff((1024, 0, 1, 1), (1025, 0, 1, 1), (3072, 0, 1, 2853), (3076, 0, 1, 9003)),
        _geotiff((1024, 0, 1, 1), (3072, 0, 1, 32633), (3076, 0, 1, 9002)),
        _geotiff(
            (1024, 0, 1, 32767), (2048, 0, 1, 4326), (2054, 0, 1, 9102), (3073, 34737, len(ESRI_MERCATOR), 0),
            (3076, 0, 1, 9001), ascii=ESRI_MERCATOR,
        ),
        _geotiff((1024, 0, 1, 1), (3072, 0, 1, 32633), (3076, 0, 1, 9001)),
        _geotiff((1024, 0, 1, 2), (2048, 0, 1, 4258), (2054, 0, 1, 9102)),
    ],
    ids=["us-feet", "feet", "arcgis-web-mercator", "metres", "degrees"],
)  # fmt: skip
def test_keys_that_overrule_a_code(content: bytes) -> None:
    """Units that differ from the code's, and ArcGIS descriptions: points agree with GDAL."""
    with MemoryFile(content) as memory, memory.open() as dataset:
        expected = dataset.crs.to_wkt()
        points = np.array([dataset.transform @ corner for corner in ((0, 0), (8, 6))]).T
    if pyproj.CRS(expected).is_geographic:
        points = points / 1e6
    found = header_of(content).crs
    assert found is not None
    assert pyproj.CRS(found).is_geographic == pyproj.CRS(expected).is_geographic
    assert _displacement(expected, found, *points) < 1e-6


def test_rational_polynomials_are_no_transform() -> None:
    """A scene with RPCs only has no affine."""
    rpc = RPC(
        height_off=0, height_scale=1, lat_off=0, lat_scale=1, line_den_coeff=[1.0] + [0.0] * 19,
        line_num_coeff=[1.0] * 20, line_off=0, line_scale=1, long_off=0, long_scale=1,
        samp_den_coeff=[1.0] + [0.0] * 19, samp_num_coeff=[1.0] * 20, samp_off=0, samp_scale=1,
    )  # fmt: skip
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", width=8, height=6, count=1, dtype="uint8", rpcs=rpc) as dataset:
            dataset.write(np.zeros((1, 6, 8), np.uint8))
        assert header_of(memory.read()).transform in (None, Affine.identity())
