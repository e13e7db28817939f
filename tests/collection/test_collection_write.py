"""Writing: complete or not at all, and readable by other tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import duckdb
import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import shapely
from pixel_oracle import assert_chip, rasters, run, window_by_rasterio

from rasteret_ml.collection import write as writing
from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.write import write_collection
from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog


def _files(folder: Path) -> list[str]:
    """Three scenes in two months and one undated, two bands each."""
    names = ["s_20240105", "s_20240120", "s_20240601", "undated"]
    return [
        make_cog(folder / f"{name}.tif", np.full((2, 32, 32), i + 1, np.uint16), nodata=9, blocksize=16)
        for i, name in enumerate(names)
    ]


@pytest.fixture(params=["c.parquet", "folder"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Collection:
    """A Collection as one file, and as a hive folder."""
    return build(_files(tmp_path), tmp_path / request.param)


def _parts(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_layouts(tmp_path: Path) -> None:
    """One file, or rasteret's partitions; no other file remains."""
    files = _files(tmp_path / "data")
    build(files, tmp_path / "out" / "c.parquet")
    build(files, tmp_path / "out" / "folder")
    assert _parts(tmp_path / "out") == [
        "c.parquet",
        "folder/year=2024/month=1/part-0.parquet",
        "folder/year=2024/month=6/part-0.parquet",
        "folder/year=__HIVE_DEFAULT_PARTITION__/month=__HIVE_DEFAULT_PARTITION__/part-0.parquet",
    ]


def test_rasterets_columns_and_structs(built: Collection) -> None:
    """Names, types and order of rasteret's fields; ours come after them."""
    schema = built.schema
    assert schema.field("id").type == pa.string()
    assert schema.field("datetime").type == pa.timestamp("us")
    assert schema.field("geometry").type == pa.binary()
    assert schema.field("proj:epsg").type == pa.int32()
    assert schema.field("crs").type == pa.string()
    corner = ("xmin", "ymin", "xmax", "ymax")
    assert schema.field("bbox").type == pa.struct([(c, pa.float64()) for c in corner])
    asset = pa.struct([("href", pa.string()), ("band_index", pa.int64())])
    assert schema.field("assets").type == pa.struct([("B1", asset), ("B2", asset)])
    band = schema.field("B1_metadata").type
    fields = [
        ("image_width", pa.int32()), ("image_height", pa.int32()), ("tile_width", pa.int32()),
        ("tile_height", pa.int32()), ("dtype", pa.string()), ("transform", pa.list_(pa.float64())),
        ("predictor", pa.int32()), ("compression", pa.int32()), ("tile_offsets", pa.list_(pa.int64())),
        ("tile_byte_counts", pa.list_(pa.int64())), ("pixel_scale", pa.list_(pa.float64())),
        ("tiepoint", pa.list_(pa.float64())), ("nodata", pa.float64()), ("samples_per_pixel", pa.int32()),
        ("planar_configuration", pa.int32()), ("photometric", pa.int32()), ("extra_samples", pa.list_(pa.int32())),
    ]  # fmt: skip
    assert [(band.field(i).name, band.field(i).type) for i in range(len(fields))] == fields


def test_rasterets_values(built: Collection) -> None:
    """Four-value transforms in rasteret's order, offsets of the band, nodata, EPSG and its text."""
    row = built.to_table().slice(0, 1).to_pylist()[0]
    struct = row["B2_metadata"]
    assert struct["transform"] == [10.0, 500000.0, -10.0, 5000000.0]
    assert (struct["image_width"], struct["tile_width"], struct["dtype"], struct["nodata"]) == (32, 16, "uint16", 9.0)
    assert len(struct["tile_offsets"]) == len(struct["tile_byte_counts"]) == 4
    assert (row["proj:epsg"], row["crs"]) == (32633, "EPSG:32633")
    assert row["assets"]["B2"]["band_index"] == 1
    metadata = built.schema.metadata
    assert metadata[b"rasteret_collection_version"] == b"1"
    assert {b"name", b"data_source", b"description", b"created", b"date_range"} <= set(metadata)
    assert metadata[b"date_range"] == b"2024-01-05T00:00:00,2024-06-01T00:00:00"


def test_parquet_is_zstd_with_statistics(built: Collection, tmp_path: Path) -> None:
    """As rasteret writes it."""
    for path in (p for p in tmp_path.rglob("*.parquet") if p.is_file()):
        group = pq.ParquetFile(path).metadata.row_group(0)
        column = group.column(0)
        assert column.compression == "ZSTD"
        assert column.is_stats_set


def test_geoparquet_metadata_is_1_1_with_covering(built: Collection, tmp_path: Path) -> None:
    """In every file of the layout: WKB, the default CRS (CRS84), a bbox covering."""
    files = [p for p in tmp_path.rglob("*.parquet") if p.is_file()]
    assert files
    for path in files:
        geo = json.loads(pq.read_schema(path).metadata[b"geo"])
        assert geo["version"] == "1.1.0"
        column = geo["columns"][geo["primary_column"]]
        assert column["encoding"] == "WKB"
        assert "crs" not in column
        assert column["geometry_types"] == ["Polygon"]
        assert column["covering"]["bbox"]["xmax"] == ["bbox", "xmax"]


def test_it_opens_in_pyarrow(built: Collection) -> None:
    """As a dataset, without this library."""
    assert built.path is not None
    table = ds.dataset(built.path, format="parquet", partitioning="hive").to_table()
    assert sorted(table["id"].to_pylist()) == ["s_20240105", "s_20240120", "s_20240601", "undated"]


def test_it_opens_in_geopandas(tmp_path: Path) -> None:
    """Both layouts as GeoParquet with a geometry in longitude/latitude, also with a bbox filter."""
    for name in ("c.parquet", "folder"):
        built = build(_files(tmp_path)[:3], tmp_path / name)
        frame = gpd.read_parquet(built.path)
        assert sorted(frame["id"]) == ["s_20240105", "s_20240120", "s_20240601"]
        assert frame.crs.is_geographic
        assert frame.geometry.iloc[0].bounds == pytest.approx(tuple(built.record_bounds()[0]))
        assert len(gpd.read_parquet(built.path, bbox=(100, 10, 101, 11))) == 0
        assert len(gpd.read_parquet(built.path, bbox=(14, 44, 16, 46))) == 3


def test_undated_records_open_in_geopandas(built: Collection) -> None:
    """In rasteret's layout their partition is null, so GeoPandas must ignore partitions."""
    assert len(gpd.read_parquet(built.path, partitioning=None)) == 4


def test_geopandas_takes_the_arrow_stream(built: Collection) -> None:
    """As the docstring of `__arrow_c_stream__` says: the geometry column is recognised, with its CRS."""
    frame = gpd.GeoDataFrame.from_arrow(built)
    assert len(frame) == 4
    assert isinstance(frame.geometry.iloc[0], shapely.Polygon)
    assert frame.crs.is_geographic


def test_it_opens_in_duckdb(built: Collection, tmp_path: Path) -> None:
    """SQL over the files, nested fields included, and over the Collection itself."""
    assert built.path is not None
    where = built.path if built.path.endswith(".parquet") else f"{built.path}/**/*.parquet"
    query = f"""select id, assets.B1.href, B1_metadata.image_width, bbox.xmin from read_parquet('{where}',
        hive_partitioning=true) where datetime >= timestamp '2024-06-01' order by id"""
    ((identifier, href, width, xmin),) = duckdb.sql(query).fetchall()
    assert (identifier, width) == ("s_20240601", 32)
    assert href.endswith("s_20240601.tif")
    assert 14.9 < xmin < 15.1
    relation = duckdb.from_arrow(built.to_table())
    assert relation.aggregate("count(*)").fetchall() == [(4,)]
    clear = built.where(pc.field("id") == "undated")  # noqa: F841 - DuckDB finds it by its name
    assert duckdb.sql("select id from clear").fetchall() == [("undated",)]


def test_a_view_writes_and_reads_again(built: Collection, tmp_path: Path) -> None:
    """In both layouts, from both layouts, with pixels, properties and registry intact."""
    for name in ("again.parquet", "again"):
        view = built.where(pc.field("id") == "s_20240120").write(tmp_path / name)
        assert view.path == str(tmp_path / name)
        assert len(view) == 1
        assert view.bands == built.bands
        assert view.crs == built.crs
        assert view.data_source == built.data_source
        assert view.schema.metadata[b"geo"] == built.schema.metadata[b"geo"]
        (record,) = rasters(view)
        path = record.assets["B1"]["href"]
        chip = run(record.read_window((-3, 5, 30, 40), ["B2", "B1"]))
        assert_chip(chip, *window_by_rasterio(path, (-3, 5, 30, 40), [2, 1]))


def test_a_collection_may_be_written_over_itself(built: Collection) -> None:
    """The filtered view replaces the file that it is read from."""
    assert built.path is not None
    built.where(pc.field("id") != "undated").write(built.path)
    assert len(Collection.open(built.path)) == 3


def test_a_folder_of_undated_records_only(tmp_path: Path) -> None:
    """Files without a date in their names: the folder opens, and can be read."""
    built = build(_files(tmp_path)[3], tmp_path / "folder")
    (record,) = rasters(Collection.open(tmp_path / "folder"))
    assert len(built) == 1
    assert record.datetime is None


def test_a_rebuild_leaves_no_old_partition(tmp_path: Path) -> None:
    """Four rows, then one: the folder holds one."""
    files = _files(tmp_path / "data")
    build(files, tmp_path / "out")
    rebuilt = build(files[2], tmp_path / "out")
    assert len(rebuilt) == len(Collection.open(tmp_path / "out")) == 1
    assert len(_parts(tmp_path / "out")) == 1


class _DiskError(OSError):
    """A full disk."""


def _fail_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    def write_table(table: pa.Table, where: str, **_: Any) -> None:
        Path(where).write_bytes(b"PAR1 half a file")
        raise _DiskError("disk full")

    def write_dataset(table: pa.Table, where: Any, **_: Any) -> None:
        (Path(where) / "part-0.parquet").write_bytes(b"PAR1 half a file")
        raise _DiskError("disk full")

    monkeypatch.setattr(writing.pq, "write_table", write_table)
    monkeypatch.setattr(writing.ds, "write_dataset", write_dataset)


def test_a_failed_write_leaves_the_old_one(built: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: the old Collection is intact, and no temporary file remains."""
    assert built.path is not None
    before = _parts(tmp_path)
    table = built.to_table().drop_columns([n for n in ("year", "month") if n in built.schema.names])
    _fail_writing(monkeypatch)
    with pytest.raises(_DiskError):
        write_collection(table.slice(0, 1), built.path)
    assert _parts(tmp_path) == before
    assert len(Collection.open(built.path)) == 4


def test_a_failed_first_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a partial Collection nor a temporary file."""
    files = _files(tmp_path / "data")
    (tmp_path / "out").mkdir()
    _fail_writing(monkeypatch)
    for name in ("c.parquet", "folder"):
        with pytest.raises(_DiskError):
            build(files, tmp_path / "out" / name)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_while_swapping_leaves_the_old_one(
    built: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rename fails, as on a network disk."""
    assert built.path is not None
    target, real = built.path, os.replace
    table = built.to_table().drop_columns([n for n in ("year", "month") if n in built.schema.names])

    def replace(source: Any, to: Any) -> None:
        if os.fspath(to) == target and ".old-" not in os.fspath(source):
            raise _DiskError("rename failed")
        real(source, to)

    monkeypatch.setattr(writing.os, "replace", replace)
    with pytest.raises(_DiskError):
        write_collection(table.slice(0, 1), target)
    monkeypatch.undo()
    assert len(Collection.open(target)) == 4


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    """A folder with other things, a file where a folder should be, a folder where a file should be."""
    files = _files(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("years of work")
    (tmp_path / "note").write_text("a note")
    (tmp_path / "d.parquet").mkdir()
    for name in ("mine", "note", "d.parquet"):
        with pytest.raises(UsageError, match=name):
            build(files, tmp_path / name)
    assert (tmp_path / "mine" / "thesis.doc").read_text() == "years of work"
    assert (tmp_path / "note").read_text() == "a note"
    assert (tmp_path / "d.parquet").is_dir()


def test_permissions_are_ordinary(built: Collection, tmp_path: Path) -> None:
    """Files have the permissions of the umask."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [Path(str(built.path)), *Path(str(built.path)).rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == expected
