"""Columns of one's own: added, replaced, written, found again."""

from __future__ import annotations

import pickle
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from affine import Affine
from pixel_oracle import rasters, run

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import UsageError
from rasteret_ml.ingest.build import build
from rasteret_ml.testing import make_cog


@pytest.fixture(scope="module", params=["file", "folder", "memory"])
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three records of different months."""
    folder = tmp_path_factory.mktemp("three")
    transform = Affine(10, 0, 500000, 0, -10, 5000000)
    rows = [
        {
            "id": name,
            "datetime": pd.Timestamp(f"2024-0{i + 1}-01"),
            "geometry": shapely.box(15 + i, 45, 15.1 + i, 45.1),
            "B1": make_cog(folder / f"{name}.tif", np.full((1, 16, 16), i + 1, np.uint8), transform=transform),
        }
        for i, name in enumerate("abc")
    ]
    out = folder / ("three" if request.param == "folder" else "three.parquet")
    built = build(gpd.GeoDataFrame(rows, crs=4326), out, bands=["B1"], data_source="mine")
    return Collection(built.to_table(), data_source="mine") if request.param == "memory" else built


@pytest.mark.parametrize("out", ["again.parquet", "again"])
def test_a_column_is_there_after_writing_and_opening(three: Collection, tmp_path: Path, out: str) -> None:
    """In row order, filters see it, and so do copies; the rest of the table is as it was."""
    names = three.to_table(["id"])["id"].to_pylist()
    values = [{"a": "train", "b": None, "c": "val"}[name] for name in names]
    added = three.with_column("split", values)
    written = added.write(tmp_path / out)
    for found in (added, written, Collection.open(written.path), pickle.loads(pickle.dumps(added))):
        table = found.to_table(["id", "split"])
        assert dict(zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True)) == {
            "a": "train", "b": None, "c": "val",
        }  # fmt: skip
        assert [info.id for info in found.subset(split="val").iterate_records()] == ["c"]
        assert found.data_source == "mine"
    assert "split" not in three.schema.names
    (record,) = rasters(written.subset(split="val"))
    assert np.asarray(run(record.read_window((0, 0, 2, 2), ["B1"])).data).tolist() == [[[3, 3], [3, 3]]]


@pytest.mark.parametrize(
    "values",
    [np.array([1.5, np.nan, 2.0]), pd.Series([1.5, None, 2.0], index=[7, 8, 9]), pa.array([1.5, None, 2.0])],
    ids=["numpy", "pandas", "arrow"],
)
def test_columns_of_any_kind(three: Collection, values: object) -> None:
    """What is missing is null."""
    added = three.with_column("height", values)
    assert added.to_table(["height"])["height"].to_pylist() == [1.5, None, 2.0]
    assert len(added.where(pc.field("height") > 1.7)) == 1


def test_a_column_is_replaced_and_a_view_gets_its_own(three: Collection) -> None:
    """Once, in its place; values are for the rows of the view."""
    twice = three.with_column("split", ["x"] * 3).with_column("split", [1, 2, 3])
    assert twice.schema.names.count("split") == 1
    assert twice.to_table(["split"])["split"].to_pylist() == [1, 2, 3]
    view = three.where(pc.field("id") != "b").with_column("split", ["x", "y"])
    assert view.to_table(["split"])["split"].to_pylist() == ["x", "y"]
    assert three.with_column("note", [None] * 3).to_table(["note"])["note"].type == pa.string()


@pytest.mark.parametrize(
    "name", ["id", "datetime", "geometry", "bbox", "assets", "B1_metadata", "proj:epsg", "year", ""]
)
def test_names_of_the_contract_are_refused(three: Collection, name: str) -> None:
    """They say which raster a row is."""
    with pytest.raises(UsageError, match="says what the raster is"):
        three.with_column(name, [1, 2, 3])


def test_values_that_do_not_fit_are_refused(three: Collection) -> None:
    """Too few, one for all, of no one type."""
    with pytest.raises(UsageError, match="2 values for 3 records"):
        three.with_column("split", [1, 2])
    with pytest.raises(UsageError, match="one value for each record"):
        three.with_column("split", "abc")
    with pytest.raises(UsageError, match="no one type"):
        three.with_column("split", [1, "a", 2.5])
