"""`load_bands` as tensors: which pixels, which mask, which geometries, which CRS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import assert_chip, build_one, run, window_by_rasterio
from property_settings import examples
from rasterio.features import geometry_mask
from rasterio.warp import calculate_default_transform

from rasteret_ml.errors import GeometryError, UnknownBandError, UsageError
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.chip import Chip
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import execute
from rasteret_ml.storage.open import open_reader
from rasteret_ml.testing import make_cog

_X, _Y = 500000.0, 5000000.0
_SIZE = 200


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RasterAccessor]:
    """A two-band uint16 raster of 200 x 200 pixels of 10 m in EPSG:32633, without nodata."""
    folder = tmp_path_factory.mktemp("plain")
    data = np.random.default_rng(1).integers(0, 65535, (2, _SIZE, _SIZE), dtype=np.uint16)
    path = make_cog(folder / "plain.tif", data, blocksize=64)
    return path, build_one(path, folder)


def _tensors(record: RasterAccessor, geometries: Any, bands: list[str], **options: Any) -> list[Chip | None]:
    return run(record.load_bands(geometries, bands, output="tensor", **options))  # type: ignore[return-value]


def _box(col: float, row: float, width: float, height: float) -> shapely.Polygon:
    """A box in pixels of the plain raster, as CRS coordinates."""
    return shapely.box(_X + 10 * col, _Y - 10 * (row + height), _X + 10 * (col + width), _Y - 10 * row)


def _shapes(shared_data: Path) -> dict[str, shapely.Geometry]:
    """The polygons of the landcover set, with holes and multi-parts, some of them put together."""
    found: dict[str, shapely.Geometry] = {}
    for path in sorted((shared_data / "landcover" / "polygons").glob("*.geojson")):
        for i, shape in enumerate(gpd.read_file(path).geometry):
            found[f"{path.stem}-{i}"] = shape
    parts = [s for name, s in found.items() if name.startswith("aber_osgb_multi_polys")]
    assert len(parts) == 4
    found["multi"] = shapely.MultiPolygon(parts)
    hole = found["aber_osgb_single_poly_hole-0"]
    assert any(len(polygon.interiors) for polygon in shapely.get_parts(hole))
    found["multi-holes"] = shapely.unary_union([hole, *parts]).difference(parts[0].centroid.buffer(150))
    return found


@pytest.mark.parametrize("all_touched", [False, True])
def test_landcover_masks_equal_rasterio(shared_data: Path, tmp_path: Path, all_touched: bool) -> None:
    """`inside` is `rasterio.features.geometry_mask`, for holes and multi-parts, and the pixels are the file's."""
    path = shared_data / "landcover" / "labels" / "sen2_20210527_aber_cls.tif"
    record, shapes = build_one(path, tmp_path), _shapes(shared_data)
    chips = _tensors(record, list(shapes.values()), ["Band 1"], geometry_crs=27700, all_touched=all_touched)
    with rasterio.open(path) as source:
        for (name, shape), chip in zip(shapes.items(), chips, strict=True):
            assert chip is not None, name
            t = chip.grid.transform
            expected = geometry_mask([shape], chip.grid.shape, t, all_touched=all_touched, invert=True)
            np.testing.assert_array_equal(np.asarray(chip.inside), expected, err_msg=name)
            col, row = (round(v) for v in ~source.transform @ (t.c, t.f))
            assert_chip(chip, *window_by_rasterio(path, (row, col, *chip.grid.shape)))
            left, bottom, right, top = shape.bounds
            assert left - t.c < 10.0
            assert t.f - top < 10.0
            assert t.c + 10 * chip.grid.width - right < 10.0
            assert bottom - (t.f - 10 * chip.grid.height) < 10.0


@pytest.mark.slow
def test_polygons_on_imagery_equal_rasterio(shared_data: Path, tmp_path: Path) -> None:
    """All ten bands inside each polygon; a scene that a polygon misses gives None in its place."""
    shapes = _shapes(shared_data)
    missed = met = 0
    for path in sorted((shared_data / "landcover" / "images").glob("*.tif"))[:6]:
        record = build_one(path, tmp_path)
        names = [f"Band {i + 1}" for i in range(10)]
        chips = _tensors(record, list(shapes.values()), names, geometry_crs=27700)
        with rasterio.open(path) as source:
            outline = shapely.box(*source.bounds)
            for shape, chip in zip(shapes.values(), chips, strict=True):
                if not shape.intersects(outline):
                    assert chip is None
                    missed += 1
                    continue
                assert chip is not None
                met += 1
                t = chip.grid.transform
                col, row = (round(v) for v in ~source.transform @ (t.c, t.f))
                assert_chip(chip, *window_by_rasterio(path, (row, col, *chip.grid.shape)))
                inside = geometry_mask([shape], chip.grid.shape, t, invert=True)
                np.testing.assert_array_equal(np.asarray(chip.inside), inside)
    assert missed
    assert met


@examples(60, database=None)
@given(
    centre=st.tuples(st.floats(-40, 240), st.floats(-40, 240)),
    radii=st.lists(st.floats(0.3, 60), min_size=3, max_size=9),
    hole=st.floats(0, 0.9),
)
def test_any_polygon_has_rasterios_mask(
    plain: Any, centre: tuple[float, float], radii: list[float], hole: float
) -> None:
    """Random stars with a hole, on and off the raster: mask, window and pixels, or None where they do not meet."""
    path, record = plain
    angles = np.linspace(0, 2 * np.pi, len(radii), endpoint=False)
    ring = np.column_stack([np.cos(angles), np.sin(angles)]) * np.array(radii)[:, None] * 10
    middle = np.array([_X + 10 * centre[0], _Y - 10 * centre[1]])
    holes = [ring[::-1] * hole + middle] if hole > 0.05 else []
    shape = shapely.Polygon(ring + middle, holes)
    (chip,) = _tensors(record, [shape], ["B1", "B2"], geometry_crs="EPSG:32633")
    if not shape.intersects(_box(0, 0, _SIZE, _SIZE)):
        assert chip is None
        return
    assert chip is not None
    expected = geometry_mask([shape], chip.grid.shape, chip.grid.transform, invert=True)
    np.testing.assert_array_equal(np.asarray(chip.inside), expected)
    t = chip.grid.transform
    window = (round((_Y - t.f) / 10), round((t.c - _X) / 10), *chip.grid.shape)
    assert_chip(chip, *window_by_rasterio(path, window))


def test_the_list_is_aligned_with_the_geometries(plain: Any) -> None:
    """A geometry outside, or one that only touches the edge, is None; its neighbours keep their places."""
    path, record = plain
    shapes = [_box(10, 10, 5, 5), _box(300, 10, 5, 5), _box(-20, 0, 20, 20), _box(190, 190, 30, 30)]
    chips = _tensors(record, shapes, ["B2"], geometry_crs=32633)
    assert [chip is None for chip in chips] == [False, True, True, False]
    assert_chip(chips[0], *window_by_rasterio(path, (10, 10, 5, 5), [2]))  # type: ignore[arg-type]
    assert_chip(chips[3], *window_by_rasterio(path, (190, 190, 30, 30), [2]))  # type: ignore[arg-type]
    assert not np.asarray(chips[3].valid)[0, 10:].any()  # type: ignore[union-attr]


def test_boundless_false_cuts_at_the_edge(plain: Any) -> None:
    """The same geometry, kept whole and cut."""
    path, record = plain
    kept, cut = (
        _tensors(record, [_box(190, -5, 30, 30)], ["B1"], geometry_crs=32633, boundless=whole)[0]
        for whole in (True, False)
    )
    assert kept.grid.shape == (30, 30)  # type: ignore[union-attr]
    assert cut.grid.shape == (25, 10)  # type: ignore[union-attr]
    assert_chip(cut, *window_by_rasterio(path, (0, 190, 25, 10), [1]))  # type: ignore[arg-type]


def test_inside_and_valid_are_two_things(tmp_path: Path) -> None:
    """`valid` is the data's truth and knows no geometry; `inside` is the geometry and knows no data."""
    data = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8)
    data[0, 0, 0] = 0
    record = build_one(make_cog(tmp_path / "a.tif", data, nodata=0), tmp_path)
    triangle = shapely.Polygon([(_X, _Y), (_X + 80, _Y), (_X, _Y - 80)])
    (chip,) = _tensors(record, [triangle], ["B1"], geometry_crs=32633)
    assert chip is not None
    np.testing.assert_array_equal(np.asarray(chip.valid)[0], data[0] != 0)
    assert not bool(chip.valid[0, 0, 0])
    assert bool(chip.inside[0, 0])
    assert bool(chip.valid[0, 7, 7])
    assert not bool(chip.inside[7, 7])
    np.testing.assert_array_equal(np.asarray(chip.data), data)


def _in_every_form(shape: shapely.Polygon) -> dict[str, Any]:
    series = gpd.GeoSeries([shape], crs=32633)
    bare = gpd.GeoSeries([shape])
    return {
        "GeoArrow with a CRS": series.to_arrow(geometry_encoding="geoarrow"),
        "GeoArrow WKB with a CRS": series.to_arrow(geometry_encoding="WKB"),
        "GeoSeries with a CRS": series,
        "GeoDataFrame with a CRS": gpd.GeoDataFrame(geometry=series),
        "GeoArrow": (bare.to_arrow(geometry_encoding="geoarrow"), 32633),
        "GeoSeries": (bare, "EPSG:32633"),
        "shapely": (shape, pyproj.CRS(32633)),
        "list of shapely": ([shape], 32633),
        "WKB": ([shapely.to_wkb(shape)], 32633),
        "GeoJSON": (shapely.geometry.mapping(shape), 32633),
        "bounds": (shape.bounds, 32633),
    }


def test_every_form_of_a_geometry_gives_the_same_chip(plain: Any) -> None:
    """The CRS comes from GeoArrow's metadata where it is there, else from `geometry_crs`."""
    path, record = plain
    expected = window_by_rasterio(path, (20, 30, 16, 12), [1])
    for name, source in _in_every_form(_box(30, 20, 12, 16)).items():
        geometries, crs = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
        (chip,) = _tensors(record, geometries, ["B1"], geometry_crs=crs)
        assert chip is not None, name
        assert_chip(chip, *expected)
        assert bool(chip.inside.all()), name


def test_geometries_are_longitude_latitude_by_default(plain: Any) -> None:
    """Without any word on the CRS coordinates are EPSG:4326, x first; the projected outline's mask is used."""
    _, record = plain
    to_lonlat = pyproj.Transformer.from_crs(32633, 4326, always_xy=True).transform
    to_utm = pyproj.Transformer.from_crs(4326, 32633, always_xy=True).transform
    lonlat = shapely.transform(_box(30, 20, 60, 40), to_lonlat, interleaved=False)
    (chip,) = _tensors(record, [lonlat], ["B1"])
    assert chip is not None
    back = shapely.transform(lonlat, to_utm, interleaved=False)
    expected = geometry_mask([back], chip.grid.shape, chip.grid.transform, invert=True)
    assert (np.asarray(chip.inside) != expected).mean() < 0.01
    assert abs(chip.grid.height - 40) <= 2
    assert abs(chip.grid.width - 60) <= 2
    far = _tensors(record, [shapely.box(15.0, 0.0, 15.1, 0.1)], ["B1"])
    assert far == [None]


def test_two_words_on_the_crs_that_disagree_are_refused(plain: Any) -> None:
    """The array says 32633, the argument 4326: which one is wrong cannot be guessed."""
    _, record = plain
    series = gpd.GeoSeries([_box(1, 1, 2, 2)], crs=32633)
    with pytest.raises(GeometryError, match=r"EPSG:32633.*EPSG:4326"):
        _tensors(record, series.to_arrow(geometry_encoding="geoarrow"), ["B1"], geometry_crs=4326)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (shapely.Point(1, 1), "Geometry 0 is a Point"),
        ([shapely.box(0, 0, 1, 1), shapely.LineString([(0, 0), (1, 1)])], "Geometry 1 is a LineString"),
        ([shapely.box(0, 0, 1, 1), None], "Geometry 1 is missing"),
        ([shapely.Polygon()], "Geometry 0 is empty"),
        ([], "No geometries"),
        ([3.5], "Geometry 0: A float is not a geometry"),
    ],
)
def test_a_wrong_geometry_is_named_by_position(plain: Any, bad: Any, named: str) -> None:
    """Points and lines have no pixels; the message says which and what to do."""
    _, record = plain
    with pytest.raises(GeometryError, match=named):
        _tensors(record, bad, ["B1"])


@pytest.mark.parametrize("output", ["xarray", "geopandas"])
def test_an_aoi_outside_the_scene_is_an_error_for_tables(plain: Any, output: str) -> None:
    """There is no empty Dataset to give; the record is named."""
    _, record = plain
    with pytest.raises(GeometryError, match=r"plain: none of the 2 geometries touches"):
        run(record.load_bands([_box(300, 0, 5, 5), _box(0, 300, 5, 5)], ["B1"], geometry_crs=32633, output=output))


def test_an_unknown_band_lists_the_known(plain: Any) -> None:
    """At the door, before the geometries are looked at."""
    _, record = plain
    with pytest.raises(UnknownBandError, match=r"'B7'; it has: B1, B2"):
        _tensors(record, [_box(0, 0, 5, 5)], ["B7"], geometry_crs=32633)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"output": "numpy"}, "'numpy'"), ({"max_concurrent": 0}, "max_concurrent"), ({"resampling": "best"}, "'best'")],
)
def test_an_argument_that_cannot_work_is_named(plain: Any, options: dict[str, Any], named: str) -> None:
    """Wrong words are refused, not ignored."""
    _, record = plain
    asked = {"output": "tensor", "geometry_crs": 32633, "target_crs": 4326} | options
    with pytest.raises(UsageError, match=named):
        run(record.load_bands([_box(0, 0, 5, 5)], ["B1"], **asked))


@pytest.mark.parametrize("band", ["B1", "B2"])
def test_both_halves_give_the_same_pixels(plain: Any, band: str) -> None:
    """`load_bands` is `plan` and `execute`: what the dataset calls reads the same chip."""
    _, record = plain
    (chip,) = _tensors(record, [_box(55, 60, 40, 30)], [band], geometry_crs=32633)
    assert chip is not None
    plan = record.plan(chip.grid, [band])

    async def read() -> Chip:
        async with open_reader() as reader:
            return (await execute([plan], Engine(reader=reader))).chips[0]

    other = run(read())
    assert_chip(chip, other.data, other.valid)
    window = run(record.read_window((60, 55, 30, 40), [band]))
    assert_chip(window, other.data, other.valid)
    assert window.grid == other.grid == chip.grid


def test_a_nodata_override_wins(tmp_path: Path) -> None:
    """`nodata=` replaces the file's value, for validity and for the fill outside."""
    data = np.array([[[1, 2], [3, 0]]], np.uint8)
    record = build_one(make_cog(tmp_path / "a.tif", data, nodata=0), tmp_path)
    (chip,) = _tensors(record, [shapely.box(_X, _Y - 20, _X + 30, _Y)], ["B1"], geometry_crs=32633, nodata=2)
    assert chip is not None
    np.testing.assert_array_equal(np.asarray(chip.data), [[[1, 2, 2], [3, 0, 2]]])
    np.testing.assert_array_equal(np.asarray(chip.valid), [[[True, False, False], [True, True, False]]])
    assert chip.nodata == (2,)


def _nearest_by_pyproj(path: str, chip: Chip) -> tuple[np.ndarray, np.ndarray]:
    """For each target pixel: the source pixel its centre falls in (-1 outside), and how safe that is in pixels."""
    height, width = chip.grid.shape
    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = chip.grid.transform @ (cols, rows)
    with rasterio.open(path) as source:
        x, y = pyproj.Transformer.from_crs(chip.grid.crs, source.crs, always_xy=True).transform(x, y)
        u, v = ~source.transform @ (x, y)
        col, row = np.floor(u).astype(int), np.floor(v).astype(int)
        outside = (col < 0) | (row < 0) | (col >= source.width) | (row >= source.height)
        margin = np.minimum.reduce([u - col, 1 - (u - col), v - row, 1 - (v - row)])
        return np.where(outside, -1, row * source.width + col), margin


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3035", "EPSG:32634"])
def test_target_crs_puts_every_pixel_where_it_belongs(tmp_path: Path, crs: str) -> None:
    """Nearest onto GDAL's default grid of the target CRS; each pixel of the source carries its own number."""
    numbers = np.arange(_SIZE * _SIZE, dtype=np.uint16).reshape(1, _SIZE, _SIZE)
    path = make_cog(tmp_path / "n.tif", numbers, blocksize=64)
    record = build_one(path, tmp_path)
    box = [_box(40, 50, 90, 170)]
    (chip,) = _tensors(record, box, ["B1"], geometry_crs=32633, target_crs=crs, resampling="nearest")
    assert chip is not None
    assert chip.grid.crs == crs
    with rasterio.open(path) as source:
        expected, width, height = calculate_default_transform(
            source.crs, crs, source.width, source.height, *source.bounds
        )
    assert width
    assert height
    shift = ~expected @ chip.grid.transform
    assert shift.almost_equals(Affine.translation(round(shift.c), round(shift.f)), precision=1e-6)
    index, margin = _nearest_by_pyproj(path, chip)
    sure = margin > 0.13
    assert sure.mean() > 0.5
    valid, data = np.asarray(chip.valid)[0], np.asarray(chip.data)[0]
    assert data.dtype == np.uint16
    np.testing.assert_array_equal(valid[sure], index[sure] >= 0)
    both = sure & valid
    np.testing.assert_array_equal(data[both], index[both])
    assert (index[sure] < 0).any()


def test_target_crs_of_the_record_copies(plain: Any) -> None:
    """The record's own CRS, in any spelling, costs no resampling."""
    path, record = plain
    wkt = pyproj.CRS(32633).to_wkt()
    for crs in (32633, "epsg:32633", wkt):
        (chip,) = _tensors(record, [_box(30, 20, 12, 16)], ["B1"], geometry_crs=32633, target_crs=crs)
        assert_chip(chip, *window_by_rasterio(path, (20, 30, 16, 12), [1]))  # type: ignore[arg-type]


def test_nodata_does_not_bleed_through_a_warp(tmp_path: Path) -> None:
    """Bilinear at the rim of a hole: values stay those of valid neighbours, and the hole stays a hole."""
    data = np.full((1, 64, 64), 1000, np.uint16)
    data[0, 20:40, 20:40] = 0
    record = build_one(make_cog(tmp_path / "a.tif", data, nodata=0), tmp_path)
    whole = shapely.box(_X, _Y - 640, _X + 640, _Y)
    (chip,) = _tensors(record, [whole], ["B1"], geometry_crs=32633, target_crs=3035)
    assert chip is not None
    values, valid = np.asarray(chip.data)[0], np.asarray(chip.valid)[0]
    assert set(np.unique(values[valid])) == {1000}
    assert set(np.unique(values[~valid])) == {0}
    assert 300 < (~valid[8:-8, 8:-8]).sum() < 600
