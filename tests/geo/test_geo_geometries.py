"""Geometries from whatever people hold, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
from shapely.geometry import mapping

from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.geo.geometries import geometries_from, polygons_from

BOX = shapely.box(1, 2, 3, 4)
HOLED = shapely.box(10, 10, 20, 20).difference(shapely.box(12, 12, 14, 15))
MULTI = shapely.MultiPolygon([BOX, HOLED])
UTM = "EPSG:32633"
FEATURE = {"type": "Feature", "properties": {"a": 1}, "geometry": mapping(BOX)}
COLLECTION = {"type": "FeatureCollection", "features": [FEATURE, {**FEATURE, "geometry": mapping(HOLED)}]}


class _Interface:
    """Something with `__geo_interface__`, as fiona's and geojson's objects have."""

    __geo_interface__ = mapping(BOX)


def _arrow(geometries: list, encoding: str, crs: str | None = None):
    return gpd.GeoSeries(geometries, crs=crs).to_arrow(geometry_encoding=encoding)


@pytest.mark.parametrize(
    "source",
    [
        BOX,
        BOX.wkb,
        bytearray(BOX.wkb),
        memoryview(BOX.wkb),
        mapping(BOX),
        FEATURE,
        {"type": "FeatureCollection", "features": [FEATURE]},
        _Interface(),
        (1, 2, 3, 4),
        [1.0, 2.0, 3.0, 4.0],
        np.array([1, 2, 3, 4]),
        [BOX],
        [BOX.wkb],
        [FEATURE],
        [(1, 2, 3, 4)],
        np.array([BOX], dtype=object),
        iter([BOX]),
        gpd.GeoSeries([BOX]),
        gpd.GeoDataFrame(geometry=[BOX]),
        _arrow([BOX], "WKB"),
        _arrow([BOX], "geoarrow"),
        pa.array(_arrow([BOX], "geoarrow")),
        pa.chunked_array([pa.array(_arrow([BOX], "geoarrow"))]),
        pa.array([BOX.wkb]),
        pa.array([BOX.wkb], type=pa.large_binary()),
        pa.chunked_array([pa.array([BOX.wkb])]),
        pa.table(gpd.GeoDataFrame(geometry=[BOX]).to_arrow()),
    ],
    ids=lambda source: type(source).__name__,
)
def test_every_kind_of_source_gives_the_same_polygon(source) -> None:
    """One way in: whatever the container, one polygon in longitude/latitude comes out."""
    found = polygons_from(source)
    assert len(found) == 1
    assert found.geometries[0].equals(BOX)
    assert found.crs == "EPSG:4326"


@pytest.mark.parametrize("geometries", [[BOX, HOLED], [MULTI, MULTI], [HOLED]], ids=["polygons", "multi", "one"])
@pytest.mark.parametrize("encoding", ["WKB", "geoarrow"])
def test_arrow_keeps_holes_parts_and_crs(geometries: list, encoding: str) -> None:
    """GeoArrow native and WKB arrays come through vertex for vertex, with the CRS of their metadata."""
    found = polygons_from(_arrow(geometries, encoding, UTM))
    assert [g.normalize() for g in found.geometries] == [g.normalize() for g in geometries]
    assert found.crs == UTM


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("geometries", [[BOX, HOLED], [MULTI, shapely.MultiPolygon([BOX])]], ids=["polygons", "multi"])
def test_arrow_storage_without_its_type_name(geometries: list, interleaved: bool) -> None:
    """An array that lost its extension name on the way is still polygons, a slice of it the same ones."""
    array = pa.array(gpd.GeoSeries(geometries).to_arrow(geometry_encoding="geoarrow", interleaved=interleaved))
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    assert [g.equals(e) for g, e in zip(geometries_from(storage).geometries, geometries, strict=True)] == [True, True]
    assert geometries_from(storage[1:]).geometries[0].equals(geometries[1])


def test_tables_come_along() -> None:
    """A GeoDataFrame's columns stay reachable, row by row, and so do those of an Arrow table."""
    frame = gpd.GeoDataFrame({"label": [3, 5]}, geometry=[BOX, HOLED], crs=UTM)
    for source in (frame, pa.table(frame.to_arrow())):
        found = geometries_from(source)
        assert found.crs == UTM
        assert found.table is not None
        assert found.table["label"].tolist() == [3, 5]
    assert geometries_from([BOX]).table is None


@pytest.mark.parametrize("name", ["a.geojson", "a.parquet", "a.gpkg"])
def test_files(tmp_path: Path, name: str) -> None:
    """Vector files of the usual kinds, by path or string."""
    frame = gpd.GeoDataFrame({"label": [3, 5]}, geometry=[BOX, HOLED], crs=4326)
    path = tmp_path / name
    frame.to_parquet(path) if name.endswith("parquet") else frame.to_file(path)
    for source in (path, str(path)):
        found = polygons_from(source)
        assert [g.equals(e) for g, e in zip(found.geometries, [BOX, HOLED], strict=True)] == [True, True]
        assert found.crs == "EPSG:4326"


def test_crs_is_the_sources_else_the_callers_else_lonlat() -> None:
    """What the source says wins; the argument fills the gap; agreeing twice is fine in any spelling."""
    assert geometries_from(gpd.GeoSeries([BOX], crs=UTM)).crs == UTM
    assert geometries_from([BOX], UTM).crs == UTM
    assert geometries_from(gpd.GeoSeries([BOX]), 32633).crs == UTM
    assert geometries_from(gpd.GeoSeries([BOX], crs=UTM), 32633).crs == UTM
    assert geometries_from(gpd.GeoSeries([BOX], crs="OGC:CRS84"), "EPSG:4326").crs == "EPSG:4326"


def test_old_geojson_crs_is_honoured() -> None:
    """GeoJSON 2008's `crs` member, as QGIS and GDAL still write it."""
    named = COLLECTION | {"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}}
    assert geometries_from(named).crs == UTM
    assert geometries_from(COLLECTION).crs == "EPSG:4326"
    with pytest.raises(GeometryError, match=r"32633.*4326"):
        geometries_from(named, 4326)


@pytest.mark.parametrize(
    "source", [gpd.GeoSeries([BOX], crs=UTM), _arrow([BOX], "geoarrow", UTM), _arrow([BOX], "WKB", UTM)]
)
def test_two_crs_are_refused(source) -> None:
    """A contradiction is an error that names both."""
    with pytest.raises(GeometryError, match=r"32633.*4326"):
        geometries_from(source, 4326)


def test_a_crs_that_is_none_is_refused() -> None:
    """The argument is checked even where it is the only CRS."""
    with pytest.raises(UsageError, match="no such thing"):
        geometries_from([BOX], "no such thing")


@pytest.mark.parametrize(
    "source",
    [
        5,
        5.0,
        pytest.param(object(), id="object"),
        True,
        [5],
        [BOX, "text"],
        [[BOX]],
        (1, 2, 3),
        {"type": "Nonsense"},
        {},
        {"type": "Polygon"},
        b"rubbish",
    ],
    ids=repr,
)
def test_the_wrong_type_is_refused(source) -> None:
    """No TypeError from deep inside: an error of ours that says what would do, or which one cannot be read."""
    with pytest.raises(GeometryError, match=r"is not a geometry|cannot be read"):
        geometries_from(source)


def test_none_is_refused() -> None:
    """None is no geometry, alone or in a list; the position is named."""
    with pytest.raises(GeometryError):
        geometries_from(None)
    with pytest.raises(GeometryError, match="Geometry 1 is missing"):
        geometries_from([BOX, None])


@pytest.mark.parametrize(
    "source",
    [
        [BOX, shapely.Polygon()],
        gpd.GeoSeries([BOX, shapely.Polygon()]),
        _arrow([BOX, shapely.Polygon()], "geoarrow"),
        pa.array([BOX.wkb, shapely.Polygon().wkb]),
    ],
    ids=["list", "series", "geoarrow", "wkb"],
)
def test_an_empty_geometry_is_refused(source) -> None:
    """By its position."""
    with pytest.raises(GeometryError, match="Geometry 1 is empty"):
        geometries_from(source)


@pytest.mark.parametrize(
    "source",
    [gpd.GeoSeries([BOX, None]), pa.array([BOX.wkb, None]), _arrow([BOX, None], "WKB")],
    ids=["series", "wkb", "geoarrow.wkb"],
)
def test_a_missing_geometry_is_refused(source) -> None:
    """By its position."""
    with pytest.raises(GeometryError, match="Geometry 1 is missing"):
        geometries_from(source)


@pytest.mark.parametrize(
    "source", [[], (), gpd.GeoSeries([]), pa.array([], type=pa.binary()), {"type": "FeatureCollection", "features": []}]
)
def test_no_geometries_are_refused(source) -> None:
    """An empty container is a mistake, not an empty answer."""
    with pytest.raises(GeometryError, match="No geometries"):
        geometries_from(source)


@pytest.mark.parametrize(
    ("geometry", "kind"),
    [
        (shapely.Point(1, 2), "Point"),
        (shapely.LineString([(0, 0), (1, 1)]), "LineString"),
        (shapely.MultiPoint([(0, 0), (1, 1)]), "MultiPoint"),
        (shapely.GeometryCollection([BOX]), "GeometryCollection"),
    ],
)
def test_polygons_refuses_what_has_no_area(geometry, kind: str) -> None:
    """Its position, its kind, and that a buffer would help; `geometries_from` takes it."""
    with pytest.raises(GeometryError, match=rf"Geometry 1 is a {kind};.*buffer"):
        polygons_from([BOX, geometry])
    assert len(geometries_from([BOX, geometry])) == 2


@pytest.mark.parametrize("bounds", [(3, 2, 1, 4), (1, 4, 3, 2), (1, 2, 1, 4), (np.nan, 2, 3, 4)])
def test_a_swapped_bounding_box_is_refused(bounds) -> None:
    """With the order that is meant."""
    with pytest.raises(GeometryError, match=r"xmin, ymin, xmax, ymax"):
        geometries_from(bounds)


def test_four_boxes_are_not_one() -> None:
    """A list of four bounding boxes is four geometries."""
    boxes = [(i, i, i + 1, i + 1) for i in range(4)]
    assert [g.bounds for g in geometries_from(boxes).geometries] == [tuple(map(float, b)) for b in boxes]


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """A missing file and a file of something else: our error, with the path."""
    other = tmp_path / "other.geojson"
    other.write_text("not json")
    for path in (tmp_path / "missing.geojson", tmp_path / "missing.parquet", other):
        with pytest.raises(GeometryError, match=path.name):
            geometries_from(path)


@pytest.mark.parametrize(
    "source",
    [
        pa.array([1, 2, 3]),
        pa.array(["POINT (1 2)"]),
        pa.table({"a": [1, 2]}),
        pd.DataFrame({"a": [1]}),
        pa.array([[1.0, 2.0]]),
    ],
    ids=["int", "text", "table", "frame", "list"],
)
def test_arrow_without_geometry_is_refused(source) -> None:
    """Arrow data that holds no geometry is our error, not Arrow's."""
    with pytest.raises(GeometryError):
        geometries_from(source)


@pytest.mark.parametrize(
    "source", [pa.array([b"rubbish"]), pa.chunked_array([pa.array([b"\x01\x02"])]), [BOX.wkb[:20]]]
)
def test_rubbish_wkb_is_refused(source) -> None:
    """Bytes that are no WKB are our error however they come."""
    with pytest.raises(GeometryError):
        geometries_from(source)


@pytest.mark.parametrize(
    "source",
    [
        {"type": "FeatureCollection"},
        {"type": "FeatureCollection", "features": None},
        {"type": "FeatureCollection", "features": [{"type": "Feature"}]},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": "text"}},
    ],
    ids=["no-features", "features-null", "no-geometry", "no-coordinates"],
)
def test_malformed_geojson_is_refused(source) -> None:
    """GeoJSON that lacks its parts is our error."""
    with pytest.raises(UsageError):
        geometries_from(json.loads(json.dumps(source)))


def test_a_frame_without_geometry_is_refused() -> None:
    """A GeoDataFrame whose geometry column is not set is our error."""
    with pytest.raises(GeometryError):
        geometries_from(gpd.GeoDataFrame({"a": [1]}))


def test_a_feature_without_geometry_is_missing() -> None:
    """RFC 7946 allows a null geometry; it cannot be read here, and is named."""
    with pytest.raises(GeometryError, match="Geometry 1"):
        geometries_from([FEATURE, {**FEATURE, "geometry": None}])
