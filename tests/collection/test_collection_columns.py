"""Columns that a user adds: added, replaced, written, read back."""

from __future__ import annotations

import pickle
from pathlib import Path

import geopandas as gpd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shapely
from affine import Affine
from pixel_oracle import rasters, run

from rasteret_ml.collection import write
from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog


@pytest.fixture(scope="module", params=["file", "folder", "memory"])
def three(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Three records in different months."""
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
def test_a_column_survives_writing_and_opening(three: Collection, tmp_path: Path, out: str) -> None:
    """In row order, and in filters and pickles; the other columns are unchanged."""
    names = three.to_table(["id"])["id"].to_pylist()
    values = [{"a": "train", "b": None, "c": "val"}[name] for name in names]
    added = three.with_column("split", values)
    written = added.write(tmp_path / out)
    at_once = three.with_column("split", values, tmp_path / "at_once" / out)
    assert at_once.to_table().equals(written.to_table(), check_metadata=True)
    for found in (added, written, at_once, Collection.open(written.path), pickle.loads(pickle.dumps(added))):
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
def test_columns_from_numpy_pandas_and_arrow(three: Collection, values: object) -> None:
    """Missing values are null."""
    added = three.with_column("height", values)
    assert added.to_table(["height"])["height"].to_pylist() == [1.5, None, 2.0]
    assert len(added.where(pc.field("height") > 1.7)) == 1


def test_a_column_is_replaced_in_place(three: Collection) -> None:
    """Also in a filtered view, for whose rows the values are."""
    twice = three.with_column("split", ["x"] * 3).with_column("split", [1, 2, 3])
    assert twice.schema.names.count("split") == 1
    assert twice.to_table(["split"])["split"].to_pylist() == [1, 2, 3]
    view = three.where(pc.field("id") != "b").with_column("split", ["x", "y"])
    assert view.to_table(["split"])["split"].to_pylist() == ["x", "y"]
    assert three.with_column("note", [None] * 3).to_table(["note"])["note"].type == pa.string()


@pytest.mark.parametrize(
    "name", ["id", "datetime", "geometry", "bbox", "assets", "B1_metadata", "proj:epsg", "year", ""]
)
def test_reserved_names_are_errors(three: Collection, name: str) -> None:
    """Columns that the library writes itself."""
    with pytest.raises(UsageError, match="must not have a reserved name"):
        three.with_column(name, [1, 2, 3])


def test_values_that_do_not_fit_are_errors(three: Collection) -> None:
    """Too few, a single text, mixed types."""
    with pytest.raises(UsageError, match="2 values for 3 records"):
        three.with_column("split", [1, 2])
    with pytest.raises(UsageError, match="one value per record"):
        three.with_column("split", "abc")
    with pytest.raises(UsageError, match="values of one type"):
        three.with_column("split", [1, "a", 2.5])


@pytest.mark.slow
def test_a_column_is_written_a_row_group_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a filtered view and over its own file; the whole table is never in memory."""
    transform = Affine(10, 0, 500000, 0, -10, 5000000)
    href = make_cog(tmp_path / "a.tif", np.ones((1, 16, 16), np.uint8), transform=transform)
    one = build([href], tmp_path / "one.parquet", bands=["B1"]).to_table()
    place = one.schema.get_field_index("id")
    ids = [f"r{i:04d}" for i in range(3000)]
    many = pa.concat_tables([one] * len(ids)).set_column(place, "id", pa.array(ids))
    collection = Collection(many).write(tmp_path / "many.parquet")
    monkeypatch.setattr(write, "_GROUP_BYTES", 1)
    view = collection.where(pc.field("id") >= "r0100").where(pc.field("id") != "r2000")
    values = np.arange(len(view))

    def refuse(*args, **kwargs):
        raise AssertionError("read the whole table")

    with monkeypatch.context() as patch:
        patch.setattr(Collection, "to_table", refuse)
        found = view.with_column("number", values, collection.path)
    groups = pq.ParquetFile(found.path).metadata
    assert groups.num_row_groups >= 4
    table = found.to_table(["id", "number"])
    assert table["id"].to_pylist() == [name for name in ids[100:] if name != "r2000"]
    assert table["number"].to_pylist() == values.tolist()
    assert (
        found.to_table()
        .drop_columns(["number"])
        .equals(many.filter(pc.field("id") >= "r0100").filter(pc.field("id") != "r2000"))
    )
    empty = found.where(pc.field("id") == "none").write(tmp_path / "empty.parquet")
    assert len(empty) == 0
    assert empty.schema == found.schema
