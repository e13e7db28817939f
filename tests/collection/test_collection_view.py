"""Opening, describing, filtering, iterating and pickling a Collection."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import pickle
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import assert_chip, rasters, run, window_by_rasterio
from property_settings import examples
from pyproj import CRS

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.testing import make_cog

_IDS = ["a", "b", "c", "d", "e"]
_DATES = [dt.datetime(2024, 1, 1, 10), dt.datetime(2024, 1, 31, 23, 59, 59), dt.datetime(2024, 3, 1), None, None]
_CLOUDS = [0.0, 20.0, 55.5, None, 99.0]
_SPLITS = ["train", "train", "val", "test", None]


def _table(folder: Path) -> gpd.GeoDataFrame:
    """Five scenes in a row, a tenth of a degree wide and a degree apart, the last in another UTM zone."""
    hrefs, shapes = [], []
    for i, name in enumerate(_IDS):
        crs = "EPSG:32633" if i < 4 else "EPSG:32634"
        t = Affine(10, 0, 500000, 0, -10, 5000000 - 100000 * i)
        hrefs.append(make_cog(folder / f"{name}.tif", np.full((1, 16, 16), i + 1, np.uint8), transform=t, crs=crs))
        shapes.append(shapely.box(10 + i, 40, 10.1 + i, 40.1))
    columns = {"id": _IDS, "datetime": _DATES, "eo:cloud_cover": _CLOUDS, "split": _SPLITS, "B1": hrefs}
    return gpd.GeoDataFrame(columns, geometry=shapes, crs=4326)


@pytest.fixture(scope="module", params=["file", "folder", "memory"])
def five(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """The same five records from one file, from a hive folder and from memory."""
    folder = tmp_path_factory.mktemp("five")
    out = folder / ("five" if request.param == "folder" else "five.parquet")
    built = build(_table(folder), out, bands=["B1"])
    return Collection(built.to_table()) if request.param == "memory" else built


def _ids(collection: Collection) -> list[str]:
    return sorted(collection.to_table(["id"])["id"].to_pylist())


def test_properties(five: Collection) -> None:
    """Length, bands, CRSs and bounds, without reading a tile table into Python."""
    assert len(five) == 5
    assert five.bands == ["B1"]
    assert five.crs == ["EPSG:32633", "EPSG:32634"]
    assert five.bounds == pytest.approx((10, 40, 14.1, 40.1))
    assert "5 records" in repr(five)
    assert "SECRET" not in repr(five)


def _summary(collection: Collection) -> dict[str, str]:
    """The rows of the HTML summary, unescaped."""
    root = ElementTree.fromstring(collection._repr_html_())
    return {str(row.findtext("th")): str(row.findtext("td")) for row in root.iter("tr")}


def test_the_html_summary(five: Collection) -> None:
    """Records, time span, CRSs, bands with dtype, bounds and stored size; well-formed."""
    summary = _summary(five)
    size = summary.pop("Stored size")
    assert re.fullmatch(r"[\d.]+ KiB" if five.path else r"[\d.]+ (KiB|B) in memory", size)
    assert summary == {
        "Path": five.path or "in memory",
        "Records": "5",
        "Time": "2024-01-01 10:00 to 2024-03-01 00:00 UTC, 2 undated",
        "CRS": "EPSG:32633, EPSG:32634",
        "Bands": "B1 (uint8)",
        "Bounds": "10.0000, 40.0000, 14.1000, 40.1000 (lon/lat)",
    }


def test_the_html_summary_of_views(five: Collection) -> None:
    """A filtered view counts and spans its own records; an empty one has neither times nor bounds."""
    view = _summary(five.where(pc.field("id") == "d"))
    assert (view["Records"], view["Time"], view["CRS"]) == ("1 of 5", "1 undated", "EPSG:32633")
    assert view["Bands"] == "B1 (uint8)"
    assert view["Bounds"] == "13.0000, 40.0000, 13.1000, 40.1000 (lon/lat)"
    assert view["Stored size"].endswith(", unfiltered")
    empty = five.where(pc.field("id") == "z")
    summary = _summary(empty)
    assert (summary["Records"], summary["Time"], summary["CRS"]) == ("0 of 5", "none", "unknown")
    assert (summary["Bands"], summary["Bounds"]) == ("B1 (unknown)", "unknown")
    assert repr(empty) == f"Collection(0 records, bands=[B1], crs=[], path={five.path!r})"


def test_summaries_escape_text_and_hide_secrets(five: Collection) -> None:
    """Names and paths may hold markup and signed URLs; hrefs are never shown."""
    path = "s3://KEY:SECRET@bucket/<b>.parquet?sig=SECRET"
    metadata = {b"name": b"<script>https://h/a?token=SECRET</script>"}
    table = five.to_table().replace_schema_metadata(metadata)
    hostile = Collection(table, path=path)
    for text in (repr(hostile), hostile._repr_html_()):
        assert "SECRET" not in text
        assert ".tif" not in text
        assert "bucket" in text
    assert "<script>" not in hostile._repr_html_()
    assert "<b>" not in hostile._repr_html_()
    assert "&lt;script&gt;" in hostile._repr_html_()


def test_summaries_of_many_bands_and_crs_are_short(five: Collection) -> None:
    """250 bands and 40 CRSs, one of them a page of WKT: the first are shown, the others counted."""
    table = five.to_table()
    for i in range(249):
        table = table.append_column(f"X{i}_metadata", table["B1_metadata"])
    texts = [f"EPSG:{32601 + i}" for i in range(39)] + [CRS.from_epsg(2154).to_wkt().replace("RGF93", "Mine")]
    table = pa.concat_tables([table.slice(0, 1)] * 40).combine_chunks()
    for name, values in (("proj:epsg", pa.nulls(40, pa.int32())), ("crs", pa.array(texts))):
        table = table.set_column(table.schema.get_field_index(name), name, values)
    many = Collection(table)
    assert len(many.bands) == 250
    assert "and 242 more" in repr(many)
    assert len(repr(many)) < 500
    summary = _summary(many)
    assert summary["Bands"].startswith("B1 (uint8), X0 (uint8), ")
    assert summary["Bands"].endswith(" and 234 more")
    assert summary["CRS"].endswith(" and 24 more")
    assert len(summary["CRS"]) < 600


def test_every_row_becomes_a_record(five: Collection) -> None:
    """`iterate_rasters` yields all of them, with all fields, numbered by row."""
    records = {r.id: r for r in rasters(five)}
    assert sorted(records) == _IDS
    for i, name in enumerate(_IDS):
        record = records[name]
        assert record.datetime == _DATES[i]
        assert record.cloud_cover == _CLOUDS[i]
        assert record.crs == (32633 if i < 4 else 32634)
        assert record.bbox == pytest.approx((10 + i, 40, 10.1 + i, 40.1))
        assert shapely.from_wkb(record.footprint).equals(shapely.box(10 + i, 40, 10.1 + i, 40.1))
        assert record.available_bands == ["B1"]
    assert sorted(r.info.row for r in records.values()) == [0, 1, 2, 3, 4]
    assert [r.id for r in rasters(five)] == five.to_table(["id"])["id"].to_pylist()


def test_rows_line_up_across_accessors(five: Collection) -> None:
    """`crs_codes`, `record_bounds`, `to_table` and `iterate_records` have the same row order."""
    ids = five.to_table(["id"])["id"].to_pylist()
    texts, codes = five.crs_codes()
    for i, info in enumerate(five.iterate_records()):
        assert info.id == ids[i]
        assert info.row == i
        assert texts[codes[i]] == f"EPSG:{info.crs}"
        assert tuple(five.record_bounds()[i]) == info.bbox


def test_tile_tables_stay_numpy(five: Collection) -> None:
    """No Python integer per tile."""
    info = next(five.iterate_records())
    struct = info.band_metadata["B1_metadata"]
    assert struct is not None
    assert isinstance(struct["tile_offsets"], np.ndarray)
    assert struct["tile_offsets"].dtype == np.int64


def test_where_returns_a_new_view(five: Collection) -> None:
    """The original is unchanged; conditions combine; no match is an empty Collection, not an error."""
    clear = five.where(pc.field("eo:cloud_cover") < 30)
    assert _ids(clear) == ["a", "b"]
    assert len(five) == 5
    assert _ids(clear.where(pc.field("id") != "a")) == ["b"]
    none = clear.where(pc.field("id") == "z")
    assert len(none) == 0
    assert none.crs == []
    assert none.bounds is None
    assert none.bands == ["B1"]
    assert rasters(none) == []


@pytest.mark.parametrize("bad", ["id = 'a'", True, None, 3])
def test_where_takes_an_expression(five: Collection, bad: Any) -> None:
    """SQL text and the like are errors with an example."""
    with pytest.raises(UsageError, match=r"pc\.field"):
        five.where(bad)


def test_where_names_an_unknown_column(five: Collection) -> None:
    """At once, not when the first row is read."""
    with pytest.raises(UsageError, match="nope"):
        five.where(pc.field("nope") == 1)


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ((9, 39, 12.05, 41), ["a", "b", "c"]),
        ((10.1, 40.1, 10.2, 40.2), ["a"]),
        ((10.2, 40, 10.9, 40.1), []),
        ((13.5, -90, 10.05, 90), ["a", "e"]),
        ((-180, -90, 180, 90), _IDS),
    ],
)
def test_subset_by_bbox(five: Collection, bbox: tuple[float, ...], expected: list[str]) -> None:
    """Overlap, touching included; xmin > xmax crosses the antimeridian."""
    assert _ids(five.subset(bbox=bbox)) == expected


@pytest.mark.parametrize("bad", [(1, 2, 3), (0, 5, 1, 4), (0, 0, float("nan"), 1)])
def test_an_invalid_bbox_is_an_error(five: Collection, bad: tuple[float, ...]) -> None:
    """Too short, ymin > ymax, NaN."""
    with pytest.raises(UsageError, match="bbox must be"):
        five.subset(bbox=bad)


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (("2024-01-01", "2024-01-31"), ["a", "b"]),
        ("2024-01-01/2024-01-31", ["a", "b"]),
        ((dt.date(2024, 1, 2), dt.date(2024, 3, 1)), ["b", "c"]),
        ((dt.datetime(2024, 1, 1, 10), dt.datetime(2024, 1, 1, 10)), ["a"]),
        (("2024-01-01T10:00:01", "2024-02-01T00:00:00Z"), ["b"]),
        (("2024-01-01T12:00:00+02:00", "2024-01-01T12:00:00+02:00"), ["a"]),
        (("2025-01-01", "2026-01-01"), []),
    ],
)
def test_subset_by_date(five: Collection, dates: Any, expected: list[str]) -> None:
    """Both ends are included, a day is whole, zones are honoured, undated records are dropped."""
    assert _ids(five.subset(date_range=dates)) == expected


@pytest.mark.parametrize("bad", ["2024-01-01", ("2024-02-01", "2024-01-01"), ("soon", "later"), (1, 2)])
def test_an_invalid_date_range_is_an_error(five: Collection, bad: Any) -> None:
    """One end, the wrong order, not dates."""
    with pytest.raises(UsageError, match=r"[dD]ate"):
        five.subset(date_range=bad)


def test_subset_by_cloud_and_split(five: Collection) -> None:
    """Unknown cover is dropped; the limit is exclusive; conditions combine."""
    assert _ids(five.subset(cloud_cover_lt=20.0)) == ["a"]
    assert _ids(five.subset(cloud_cover_lt=100)) == ["a", "b", "c", "e"]
    assert _ids(five.subset(split="train")) == ["a", "b"]
    assert _ids(five.subset(split="train", cloud_cover_lt=10, date_range="2024-01-01/2024-12-31")) == ["a"]
    assert _ids(five.subset(split="none such")) == []
    assert len(five.subset()) == 5


def test_subset_by_geometries(five: Collection) -> None:
    """Footprints, not boxes: a triangle whose box overlaps a footprint may still be disjoint from it."""
    corner = shapely.Polygon([(10.2, 40.1), (10.2, 40.2), (10.05, 40.2)])
    assert _ids(five.subset(geometries=[shapely.box(10.05, 40.05, 11.05, 40.06)])) == ["a", "b"]
    assert _ids(five.subset(geometries=[corner])) == []
    assert _ids(five.subset(geometries=[shapely.Point(12.05, 40.05), shapely.Point(14.05, 40.05)])) == ["c", "e"]
    utm = gpd.GeoSeries([shapely.box(11.04, 40.04, 11.06, 40.06)], crs=4326).to_crs(32633)
    assert _ids(five.subset(geometries=utm)) == ["b"]
    assert _ids(five.subset(geometries=list(utm), geometry_crs=32633)) == ["b"]
    assert _ids(five.subset(geometries=[shapely.box(11, 40, 12.05, 41)], split="val")) == ["c"]


def test_subset_needs_its_columns(tmp_path: Path) -> None:
    """A condition on a missing column is an error that lists the columns."""
    bare = build(make_cog(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8)), tmp_path / "c.parquet")
    with pytest.raises(UsageError, match=r"cloud_cover_lt=.*eo:cloud_cover.*datetime"):
        bare.subset(cloud_cover_lt=10)
    with pytest.raises(UsageError, match=r"split=.*'split'"):
        bare.subset(split="train")


def test_ids_need_not_be_unique(tmp_path: Path) -> None:
    """A geometry selects the row that it intersects, not every row with that id."""
    frame = _table(tmp_path).assign(id="same")
    collection = build(frame, tmp_path / "c.parquet", bands=["B1"])
    found = collection.subset(geometries=[shapely.Point(10.05, 40.05), shapely.Point(14.05, 40.05)])
    assert found.record_bounds()[:, 0].tolist() == [10, 14]


@examples(40, database=None)
@given(west=st.floats(9, 15), width=st.floats(0.01, 3), cloud=st.none() | st.floats(0, 100), start=st.integers(0, 80))
def test_any_subset_is_what_a_loop_would_keep(
    five: Collection, west: float, width: float, cloud: float | None, start: int
) -> None:
    """Pushed-down filters equal plain Python over the records."""
    bbox = (west, 39.0, west + width, 41.0)
    first = dt.datetime(2024, 1, 1) + dt.timedelta(days=start)
    view = five.subset(bbox=bbox, cloud_cover_lt=cloud, date_range=(first, dt.datetime(2024, 12, 31)))

    def fits(info: Any) -> bool:
        over = info.bbox[0] <= bbox[2] and info.bbox[2] >= bbox[0]
        clear = cloud is None or (info.cloud_cover is not None and info.cloud_cover < cloud)
        return over and clear and info.datetime is not None and info.datetime >= first

    assert _ids(view) == sorted(info.id for info in five.iterate_records() if fits(info))


def _read_there(collection: Collection) -> tuple[list[str], np.ndarray]:
    (record,) = rasters(collection)
    return _ids(collection), np.asarray(run(record.read_window((0, 0, 4, 4), ["B1"])).data)


def test_filtered_views_pickle(five: Collection) -> None:
    """The copy has the same rows, filter and registry."""
    view = Collection(five.to_table(), data_source="x") if five.path is None else five
    view = view.where(pc.field("eo:cloud_cover") < 60).subset(split="train")
    copy = pickle.loads(pickle.dumps(view))
    assert _ids(copy) == ["a", "b"]
    assert copy.data_source == view.data_source
    assert len(copy.where(pc.field("id") == "b")) == 1


@pytest.mark.parametrize("five", ["folder"], indirect=True)
def test_a_view_crosses_to_a_spawned_process(five: Collection) -> None:
    """And its record can be read there (one kind is enough: the test above has the others)."""
    view = five.where(pc.field("id") == "c")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        ids, pixels = pool.apply(_read_there, (view,))
    assert ids == ["c"]
    np.testing.assert_array_equal(pixels, np.full((1, 4, 4), 3, np.uint8))


def test_the_pickle_of_a_file_is_small(five: Collection) -> None:
    """It holds a path and a filter, not the rows."""
    size = len(pickle.dumps(five.where(pc.field("id") == "a")))
    assert (size < 3000) == (five.path is not None)


def test_the_arrow_stream_is_the_view(five: Collection) -> None:
    """`pa.table` accepts a Collection by the PyCapsule protocol."""
    view = five.subset(split="train")
    assert sorted(pa.table(view)["id"].to_pylist()) == ["a", "b"]
    assert view.to_table().schema.names == five.schema.names
    assert view.to_table({"name": pc.field("id")}).column_names == ["name"]


def test_band_table_leaves_out_the_tile_tables(five: Collection) -> None:
    """One row per record, small columns only."""
    table = five.band_table("B1")
    assert table.num_rows == 5
    assert set(table["dtype"].to_pylist()) == {"uint8"}
    assert table["_present"].to_pylist() == [True] * 5
    assert not {"tile_offsets", "tile_byte_counts", "overviews"} & set(table.column_names)


def test_pixels_come_through_a_view(five: Collection) -> None:
    """From open to pixels."""
    (record,) = rasters(five.where(pc.field("id") == "d"))
    chip = run(record.read_window((2, 3, 5, 6), ["B1"]))
    assert_chip(chip, *window_by_rasterio(record.assets["B1"]["href"], (2, 3, 5, 6)))


def test_precedence_of_the_data_source(tmp_path: Path) -> None:
    """The argument beats the file, which beats the column."""
    frame = _table(tmp_path)
    frame["collection"] = "landsat-c2-l2"
    built = build(frame, tmp_path / "c.parquet", bands=["B1"], data_source="stated")
    assert built.data_source == "stated"
    assert Collection.open(tmp_path / "c.parquet", data_source="mine").data_source == "mine"
    table = built.to_table().replace_schema_metadata({})
    if "collection" not in table.column_names:
        table = table.append_column("collection", pa.array(["landsat-c2-l2"] * 5))
    assert Collection(table).data_source == "landsat-c2-l2"
    assert Collection(table.drop_columns(["collection"])).data_source == ""


def test_open_takes_a_path_a_string_and_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`file://` URIs, `~`, relative paths and `Path`."""
    build(_table(tmp_path), tmp_path / "c.parquet", bands=["B1"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "c.parquet"
    for source in (path, str(path), path.as_uri(), "c.parquet", "~/c.parquet"):
        assert len(Collection.open(source)) == 5


def test_opening_something_else_is_an_error(tmp_path: Path) -> None:
    """The message has the path and what is missing."""
    (tmp_path / "text.parquet").write_text("id,datetime\n")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    good = build(_table(tmp_path), tmp_path / "good.parquet", bands=["B1"]).to_table()
    pq.write_table(good.drop_columns(["B1_metadata"]), tmp_path / "plain.parquet")
    pq.write_table(good.drop_columns(["assets"]), tmp_path / "no_assets.parquet")
    dates = pa.array(["2024-01-01"] * 5)
    at = good.schema.get_field_index("datetime")
    pq.write_table(good.set_column(at, "datetime", dates), tmp_path / "text_dates.parquet")
    for name, message in [
        ("nowhere.parquet", "no such file"),
        ("text.parquet", "cannot be opened as Parquet"),
        ("other.parquet", "no column 'id'"),
        ("empty", "not a Collection"),
        ("texts", "cannot be opened as Parquet"),
        ("plain.parquet", r"_metadata.*rasteret_ml\.build"),
        ("no_assets.parquet", "no column 'assets'"),
        ("text_dates.parquet", "'datetime' is string"),
    ]:
        with pytest.raises(CollectionError, match=rf"{name}.*{message}"):
            Collection.open(tmp_path / name)


def test_an_empty_table_is_an_empty_collection(tmp_path: Path) -> None:
    """Zero rows are valid."""
    built = build(_table(tmp_path), tmp_path / "c.parquet", bands=["B1"])
    empty = Collection(built.to_table().slice(0, 0))
    assert len(empty) == 0
    assert empty.bounds is None
    assert empty.record_bounds().shape == (0, 4)
    assert len(empty.subset(geometries=[shapely.box(0, 0, 1, 1)])) == 0
