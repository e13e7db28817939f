"""AOI tables from any source, with identity, labels, weights and time windows."""

from __future__ import annotations

import logging
import pickle

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
from fields import CRS, HOLED, L_SHAPE, PARTS, SQUARE, Plane

import rasteret_ml as rm
from rasteret_ml.errors import GeometryError, UsageError

BOW_TIE = shapely.Polygon([(0, 0), (200, 200), (200, 0), (0, 200)])
FLAT = shapely.Polygon([(0, 0), (100, 100), (200, 200), (0, 0)])


def crops():
    columns = {
        "crop": ["wheat", "maize", "wheat", "rye"],
        "code": [7, 3, 7, 9],
        "yield": [1.5, 2.5, 0.5, 4.0],
        "kind": pd.Categorical(["a", "b", "a", "b"], categories=["c", "b", "a"]),
        "from": ["2023-03-01", "2023-03", None, "2023-04-01T12:00:00Z"],
        "to": pd.to_datetime(["2023-05-01", "2023-06-01", None, "2023-05-01"]),
        "span": ["2023-03-01/2023-03-31", "../2023-05", "2023-06-01T10:00:00+02:00", None],
        "w": [1, 0, 2, 3],
    }
    return gpd.GeoDataFrame(columns, geometry=[L_SHAPE, HOLED, PARTS, shapely.box(0, 0, 5, 5)], crs=CRS)


def test_any_source_gives_the_same_table(tmp_path):
    """Files, streams, lists and tables; an AOITable is returned unchanged."""
    table = crops()[["crop", "geometry"]]
    table.to_parquet(tmp_path / "a.parquet")
    table.to_file(tmp_path / "a.gpkg")
    wanted = rm.AOITable.of(table, label="crop")
    sources = [str(tmp_path / "a.parquet"), tmp_path / "a.gpkg", pa.table(table.to_arrow())]
    for source in sources:
        found = rm.AOITable.of(source, label="crop")
        assert shapely.equals(found.geometries, wanted.geometries).all()
        assert found.crs == CRS
        assert found.labels.tolist() == wanted.labels.tolist() == [2, 0, 2, 1]
        assert found.row(2)["crop"] == "wheat"
    bare = rm.AOITable.of(list(table.geometry), crs=CRS)
    assert shapely.equals(bare.geometries, wanted.geometries).all()
    assert bare.labels is None
    assert rm.AOITable.of(bare) is bare
    assert rm.AOITable.of(bare, crs=32633) is bare
    other = pickle.loads(pickle.dumps(wanted))
    assert other.classes == ("maize", "rye", "wheat")
    assert other.geometries is not wanted.geometries


@pytest.mark.parametrize(
    ("label", "classes", "labels", "names"),
    [
        ("crop", None, [2, 0, 2, 1], ("maize", "rye", "wheat")),
        ("code", None, [1, 0, 1, 2], (3, 7, 9)),
        ("kind", None, [2, 1, 2, 1], ("c", "b", "a")),
        ("kind", ["a", "b"], [0, 1, 0, 1], ("a", "b")),
        ("crop", ["rye", "wheat", "oats", "maize"], [1, 3, 1, 0], ("rye", "wheat", "oats", "maize")),
        ("crop", {"wheat": 0, "rye": 0, "maize": 2}, [0, 2, 0, 0], ("wheat", None, "maize")),
        ("yield", None, [1.5, 2.5, 0.5, 4.0], ()),
        ("yield", [0.5, 1.5, 2.5, 4.0], [1, 2, 0, 3], (0.5, 1.5, 2.5, 4.0)),
        ([True, False, True, True], None, [1, 0, 1, 1], (False, True)),
    ],
)
def test_labels(label, classes, labels, names):
    """Text, integers and categories become classes, floats stay values, and classes can be numbered explicitly."""
    table = rm.AOITable.of(crops(), label=label, classes=classes)
    assert table.labels.tolist() == labels
    assert table.labels.dtype == (np.int64 if names else np.float64)
    assert table.classes == names
    with pytest.raises(ValueError, match="read-only"):
        table.labels[0] = 5


def test_dropping_keeps_identity_and_classes(caplog):
    """Row numbers do not change if others are dropped, and dropped rows are logged."""
    table = crops()
    table.loc[1, "geometry"] = None
    table.loc[4] = table.loc[3]
    table.loc[4, "geometry"] = FLAT
    with pytest.raises(GeometryError, match=r"\[1\] have no geometry"):
        rm.AOITable.of(table)
    with caplog.at_level(logging.WARNING):
        found = rm.AOITable.of(table, label="crop", classes=["rye", "maize", "wheat"], empty="drop", weight="w")
    assert "[1]" in caplog.text
    assert "[4]" in caplog.text
    assert found.rows.tolist() == [0, 2, 3]
    assert found.labels.tolist() == [2, 2, 0]
    assert found.weights.tolist() == [1, 2, 3]
    some = found.where(found.labels == 2)
    assert some.rows.tolist() == [0, 2]
    again = some.where([2])
    assert again.rows.tolist() == [2]
    assert again.classes == found.classes
    assert again.row(int(again.rows[0]))["code"] == 7
    assert again.attributes["crop"].tolist() == ["wheat"]
    aoi = next(iter(rm.PerAOISampler(Plane(SQUARE), 4, again)))
    assert aoi.row == 2
    assert aoi.label == 2
    assert isinstance(aoi.label, int)
    assert again.row(aoi)["crop"] == "wheat"
    for wrong in ([1], np.zeros(1, bool), np.ones(7, bool), ["a"]):
        with pytest.raises(UsageError):
            again.where(wrong)


def test_invalid_geometries_are_repaired_dropped_or_refused(caplog):
    """Messages list the rows; a repair keeps the area."""
    shapes = [L_SHAPE, BOW_TIE]
    with caplog.at_level(logging.WARNING):
        repaired = rm.AOITable.of(shapes, crs=CRS)
        dropped = rm.AOITable.of(shapes, crs=CRS, invalid="drop")
    assert repaired.geometries[1].is_valid
    assert repaired.geometries[1].area == pytest.approx(2 * 100 * 100)
    assert dropped.rows.tolist() == [0]
    assert caplog.text.count("[1]") == 2
    with pytest.raises(GeometryError, match=r"\[1\] are not valid"):
        rm.AOITable.of(shapes, crs=CRS, invalid="raise")
    with pytest.raises(GeometryError, match=r"\[0\] are polygons without an area"):
        rm.AOITable.of([FLAT, L_SHAPE], crs=CRS)
    with pytest.raises(GeometryError, match="None of the AOIs"):
        rm.AOITable.of([FLAT], crs=CRS, empty="drop")


def test_time_windows():
    """Instants, intervals and pairs; a day, month or year is covered completely."""
    pair = rm.AOITable.of(crops(), time=("from", "to"))
    assert pair.start[[0, 1, 3]].tolist() == np.array(["2023-03-01", "2023-03-01", "2023-04-01T12"], "M8[ns]").tolist()
    assert np.isnat(pair.start[2])
    assert pair.stop[0] == np.datetime64("2023-05-01")
    span = rm.AOITable.of(crops(), time="span")
    assert np.isnat(span.start).tolist() == [False, True, False, True]
    assert span.stop[0] > np.datetime64("2023-03-31T23:59:59")
    assert span.stop[0] < np.datetime64("2023-04-01")
    assert span.stop[1] > np.datetime64("2023-05-31T23:59:59")
    assert span.stop[1] < np.datetime64("2023-06-01")
    assert span.start[2] == span.stop[2] == np.datetime64("2023-06-01T08:00:00")
    days = crops().assign(day=pd.to_datetime(["2023-03-01"] * 4).date)
    day = rm.AOITable.of(days, time="day")
    assert day.stop[0] - day.start[0] == np.timedelta64(86400 * 10**6 - 1, "us")
    zoned = crops().assign(at=pd.to_datetime(["2023-03-01T01:00"] * 4).tz_localize("Europe/Berlin"))
    assert rm.AOITable.of(zoned, time="at").start[0] == np.datetime64("2023-03-01T00:00")


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"label": "plant"}, "plant.*no such column"),
        ({"label": [1, 2]}, "2 values for a table of 4"),
        ({"label": "from"}, r"\[2\] have no label.*table\[table\['from'\].notna\(\)\]"),
        ({"label": "to"}, "have no label|not a time"),
        ({"label": "crop", "classes": ["wheat", "rye"]}, r"\[1\].*no class.*maize.*table\['crop'\].isin\(classes\)"),
        ({"label": "crop", "classes": ["wheat", "wheat"]}, "different values"),
        ({"label": "crop", "classes": {"wheat": -1}}, "from 0"),
        ({"classes": ["a"]}, "label="),
        ({"weight": [1, -1, 0, 0]}, r"\[1\] have a weight"),
        ({"weight": [1, np.nan, 0, 0]}, r"\[1\] have a weight"),
        ({"weight": [0, 0, 0, 0]}, "All weights are 0"),
        ({"weight": "crop"}, "numbers"),
        ({"time": "crop"}, r"\[0, 1, 2, 3\] must be ISO"),
        ({"time": ("to", "from")}, "end before they start"),
        ({"crs": 4326}, "got EPSG:4326"),
        ({"invalid": "mend"}, "mend"),
    ],
)
def test_bad_tables_are_refused(kwargs, text):
    """The message lists the rows."""
    with pytest.raises(UsageError, match=text):
        rm.AOITable.of(crops(), **kwargs)


def test_a_table_cannot_be_changed():
    """Neither its labels nor its CRS can be replaced."""
    table = rm.AOITable.of(crops())
    with pytest.raises(UsageError, match="label"):
        rm.AOITable.of(table, label="crop")
    with pytest.raises(GeometryError, match="32633"):
        rm.AOITable.of(table, crs=4326)
    with pytest.raises(UsageError, match="no row"):
        table.row(-1)


def test_a_number_is_not_a_time():
    """Years as numbers would be read as nanoseconds since 1970."""
    table = gpd.GeoDataFrame({"year": [2020, 2021]}, geometry=[shapely.box(0, 0, 1, 1)] * 2, crs=4326)
    with pytest.raises(UsageError, match="to_datetime"):
        rm.AOITable.of(table, time="year")


def test_non_finite_coordinates_are_refused(caplog):
    """GEOS fails on them; they can be dropped, but not repaired."""
    with np.errstate(invalid="ignore"):
        nan = shapely.Polygon([(0, 0), (np.nan, 5), (5, 5), (0, 0)])
        infinite = shapely.Polygon([(0, 0), (np.inf, 5), (5, 5), (0, 0)])
    shapes = [L_SHAPE, nan, HOLED, infinite]
    for invalid in ("repair", "raise"):
        with pytest.raises(GeometryError, match=r"AOIs \[1, 3\] have coordinates that are NaN"):
            rm.AOITable.of(shapes, crs=CRS, invalid=invalid)
    with caplog.at_level(logging.WARNING):
        assert rm.AOITable.of(shapes, crs=CRS, invalid="drop").rows.tolist() == [0, 2]
    assert "[1, 3]" in caplog.text
    with pytest.raises(GeometryError, match="Geometry 1 has coordinates that are NaN"):
        rm.PolygonDataset(gpd.GeoDataFrame(geometry=shapes, crs=CRS))


@pytest.mark.parametrize("name", ["label", "weight", "time"])
def test_duplicate_column_names_are_refused(name):
    """It cannot be known which column is meant."""
    table = crops()[["w", "code", "geometry"]].rename(columns={"w": "a", "code": "a"})
    with pytest.raises(UsageError, match=f"{name}='a': the table has 2 columns of this name"):
        rm.AOITable.of(table, **{name: "a"})
    with pytest.raises(UsageError, match="2 columns of this name"):
        rm.split_aois(table, {"a": 0.5, "b": 0.5}, by="a")


def test_weights_near_the_largest_float_do_not_overflow():
    """Products of such weights overflowed, and all chips came from one AOI."""
    shapes = [shapely.box(0, 0, 1000, 1000), shapely.box(5000, 0, 6000, 1000)]
    sampler = rm.RandomAOISampler(Plane(SQUARE), 8, 2000, shapes, aois_crs=CRS, weight=[1e308, 3e307])
    rows = np.array([aoi.row for aoi in sampler])
    assert abs((rows == 0).mean() - 10 / 13) < 0.05
    with pytest.raises(UsageError, match="inset must be a finite distance >= 0"):
        rm.RandomAOISampler(Plane(SQUARE), 8, 1, shapes, aois_crs=CRS, placement={"inset": float("inf")})
