"""Collections from tables: GeoDataFrames, Arrow tables and Parquet files with an href column per band."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import shapely
from pixel_oracle import rasters, run

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.read_source import as_arrow_table, records_from_table
from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog

_SHAPES = [shapely.box(14.9, 44.9, 15.1, 45.2), shapely.box(15.0, 45.0, 15.2, 45.3)]


@pytest.fixture
def frame(tmp_path: Path) -> gpd.GeoDataFrame:
    """Two scenes: red and nir files, a three-band file, and further columns."""
    rows: dict[str, list[Any]] = {
        "id": ["one", "two"],
        "datetime": [dt.datetime(2024, 1, 2, 3, 4, 5), dt.datetime(2024, 6, 7)],
        "eo:cloud_cover": [1.5, None],
        "split": ["train", "val"],
        "label": [3, 4],
        "red": [], "nir": [], "stack": [],
    }  # fmt: skip
    for i in range(2):
        for j, column in enumerate(("red", "nir")):
            path = tmp_path / f"{column}{i}.tif"
            rows[column].append(make_cog(path, np.full((1, 16, 16), 10 * i + j, np.uint8)))
        stack = np.stack([np.full((16, 16), 100 + 10 * i + k, np.uint8) for k in range(3)])
        rows["stack"].append(make_cog(tmp_path / f"stack{i}.tif", stack))
    return gpd.GeoDataFrame(rows, geometry=_SHAPES, crs=4326)


def _as(kind: str, frame: gpd.GeoDataFrame, folder: Path) -> Any:
    """The same table in another form."""
    plain = pd.DataFrame(frame.drop(columns="geometry")).assign(geometry=shapely.to_wkb(frame.geometry.to_numpy()))
    if kind == "GeoDataFrame":
        return frame
    if kind == "projected GeoDataFrame":
        return frame.to_crs(32633)
    if kind == "DataFrame":
        return plain
    if kind == "Arrow table":
        return pa.Table.from_pandas(plain, preserve_index=False)
    if kind == "GeoArrow table":
        return pa.table(frame.to_arrow(index=False))
    if kind == "projected GeoArrow table":
        return pa.table(frame.to_crs(32633).to_arrow(index=False))
    if kind == "Parquet":
        pa.parquet.write_table(_as("Arrow table", frame, folder), folder / "t.parquet")
        return str(folder / "t.parquet")
    projected = kind == "projected GeoParquet"
    (frame.to_crs(32633) if projected else frame).to_parquet(folder / "g.parquet")
    return folder / "g.parquet"


@pytest.mark.parametrize(
    "kind",
    [
        "GeoDataFrame",
        "projected GeoDataFrame",
        "DataFrame",
        "Arrow table",
        "GeoArrow table",
        "projected GeoArrow table",
        "Parquet",
        "GeoParquet",
        "projected GeoParquet",
    ],
)
def test_every_form_gives_the_same_collection(frame: gpd.GeoDataFrame, tmp_path: Path, kind: str) -> None:
    """Ids, dates, footprints in lon/lat whatever the table's CRS, further columns, and the pixels."""
    collection = build(_as(kind, frame, tmp_path), tmp_path / "c.parquet", bands=["red", "nir"])
    assert collection.bands == ["red", "nir"]
    records = rasters(collection)
    assert [record.id for record in records] == ["one", "two"]
    assert [record.datetime for record in records] == [dt.datetime(2024, 1, 2, 3, 4, 5), dt.datetime(2024, 6, 7)]
    assert [record.cloud_cover for record in records] == [1.5, None]
    for i, record in enumerate(records):
        assert record.bbox == pytest.approx(_SHAPES[i].bounds, abs=2e-3)
        chip = run(record.read_window((0, 0, 1, 1), ["nir", "red"]))
        assert np.asarray(chip.data).ravel().tolist() == [10 * i + 1, 10 * i]
    assert [record.id for record in rasters(collection.subset(split="val"))] == ["two"]
    assert collection.to_table(["label"])["label"].to_pylist() == [3, 4]


def test_a_mapping_names_bands(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """Band to column, and to (column, index) for files of several bands."""
    bands = {"B04": "red", "green": ("stack", 1), "blue": ["stack", 2]}
    collection = build(frame, tmp_path / "c.parquet", bands=bands)
    assert collection.bands == ["B04", "green", "blue"]
    for i, record in enumerate(rasters(collection)):
        chip = run(record.read_window((0, 0, 1, 1), ["blue", "B04", "green"]))
        assert np.asarray(chip.data).ravel().tolist() == [102 + 10 * i, 10 * i, 101 + 10 * i]


def test_columns_name_the_roles(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """`columns=` maps id, datetime and geometry."""
    renamed = frame.rename(columns={"id": "scene", "datetime": "when"}).rename_geometry("outline")
    columns = {"id": "scene", "datetime": "when", "geometry": "outline"}
    collection = build(renamed, tmp_path / "c.parquet", bands=["red"], columns=columns)
    records = rasters(collection)
    assert [record.id for record in records] == ["one", "two"]
    assert records[0].datetime == dt.datetime(2024, 1, 2, 3, 4, 5)
    assert records[0].bbox == pytest.approx(_SHAPES[0].bounds)


def test_rows_without_an_id_are_numbered(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """And integer ids become strings."""
    collection = build(frame.drop(columns="id"), tmp_path / "c.parquet", bands=["red"])
    assert [record.id for record in rasters(collection)] == ["0", "1"]
    collection = build(frame.assign(id=[7, 8]), tmp_path / "c.parquet", bands=["red"])
    assert [record.id for record in rasters(collection)] == ["7", "8"]


def test_a_table_without_geometry_takes_the_rasters_outline(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """And so does a row without a geometry."""
    bare = pd.DataFrame(frame.drop(columns=["geometry", "datetime"]))
    (first, _) = rasters(build(bare, tmp_path / "c.parquet", bands=["red"]))
    assert first.datetime is None
    assert first.bbox is not None
    assert first.bbox[2] - first.bbox[0] < 0.01
    gap = frame.copy()
    gap.loc[1, "geometry"] = None
    (first, second) = rasters(build(gap, tmp_path / "c.parquet", bands=["red"]))
    assert first.bbox == pytest.approx(_SHAPES[0].bounds)
    assert second.bbox is not None
    assert second.bbox[2] - second.bbox[0] < 0.01


def test_times_of_every_type(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """Aware times become UTC, text is parsed, nulls are undated."""
    zoned = frame.assign(datetime=pd.to_datetime(["2024-01-02T05:00:00+02:00", None], utc=True))
    (first, second) = rasters(build(zoned, tmp_path / "c.parquet", bands=["red"]))
    assert (first.datetime, second.datetime) == (dt.datetime(2024, 1, 2, 3), None)
    texts = frame.assign(datetime=["2024-01-02T05:00:00+02:00", "2024-06-07"])
    (first, second) = rasters(build(texts, tmp_path / "c.parquet", bands=["red"]))
    assert (first.datetime, second.datetime) == (dt.datetime(2024, 1, 2, 3), dt.datetime(2024, 6, 7))
    with pytest.raises(UsageError, match="'yesterdayish'"):
        build(frame.assign(datetime="yesterdayish"), tmp_path / "c.parquet", bands=["red"])


def test_a_null_href_is_a_missing_band(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """The record lacks that band, and no failure is reported."""
    frame.loc[1, "nir"] = None
    collection = build(frame, tmp_path / "c.parquet", bands=["red", "nir"])
    assert [record.available_bands for record in rasters(collection)] == [["nir", "red"], ["red"]]
    assert collection.report.failures == ()  # type: ignore[attr-defined]


def test_a_row_without_any_href_is_reported(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """It cannot be a record, and the report says so."""
    frame.loc[1, ["red", "nir"]] = None
    collection = build(frame, tmp_path / "c.parquet", bands=["red", "nir"])
    assert len(collection) == 1
    assert "two" in str(collection.report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": {"B04": "rouge"}}, r"band 'B04'.*no column 'rouge'.*'red'"),
        ({"bands": {"B04": ("rouge", 0)}}, r"band 'B04'.*no column 'rouge'"),
        ({"bands": ["rouge"]}, "no column 'rouge'"),
        ({}, r"bands= must map bands to href columns.*'red'"),
        ({"bands": ["red"], "columns": {"id": "scene"}}, r"columns\['id'\].*no column 'scene'"),
        ({"bands": ["red"], "columns": {"name": "id"}}, r"columns= must map id, datetime or geometry.*name"),
        ({"bands": "red"}, "'red'"),
    ],
)
def test_a_missing_column_is_named(
    frame: gpd.GeoDataFrame, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Together with the columns that exist."""
    with pytest.raises(UsageError, match=message):
        build(frame, tmp_path / "c.parquet", **options)


def test_columns_are_for_tables(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """For files they are an error."""
    with pytest.raises(UsageError, match=r"columns= is for tables"):
        build(frame["red"].to_list(), tmp_path / "c.parquet", columns={"id": "x"})


def test_a_file_of_several_bands_needs_an_index(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """The failure has the remedy; an index that does not exist is reported too."""
    collection = build(frame, tmp_path / "c.parquet", bands={"red": "red", "x": "stack", "y": ("stack", 3)})
    message = str(collection.report)
    assert "the file has 3 bands, and nothing says which one is 'x'; give (column, index)" in message
    assert "the band index must be < 3, the number of bands, got 3" in message
    assert collection.bands == ["red"]


def test_a_stac_geoparquet_is_a_table_of_items(shared_data: Path) -> None:
    """100 items with asset columns: their records have hrefs, dates and footprints."""
    found = 0
    for path in sorted((shared_data / "stac").glob("*.parquet")):
        table = as_arrow_table(str(path))
        if "assets" not in table.column_names:
            continue
        records = records_from_table(table, None, {}, None)
        assert len(records) == table.num_rows
        for record in records[:5]:
            assert record.assets
            assert record.geometry is not None
            assert all("://" in asset.href for asset in record.assets.values())
        found += 1
    assert found


def test_a_collection_can_be_built_again(frame: gpd.GeoDataFrame, tmp_path: Path) -> None:
    """From its own Parquet file, with all bands and band indices."""
    bands = {"B04": "red", "green": ("stack", 1)}
    build(frame, tmp_path / "a.parquet", bands=bands)
    again = build(str(tmp_path / "a.parquet"), tmp_path / "b.parquet")
    assert again.bands == ["B04", "green"]
    for i, record in enumerate(rasters(again)):
        chip = run(record.read_window((0, 0, 1, 1), ["green", "B04"]))
        assert np.asarray(chip.data).ravel().tolist() == [101 + 10 * i, 10 * i]
