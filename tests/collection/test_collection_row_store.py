"""Records by row from shared copies, lazy conversion of structs, and columns read without tile tables."""

from __future__ import annotations

import dataclasses
import datetime as dt
import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.column_arrays import band_arrays
from rasteret_ml.collection.record_reader import LazyMapping
from rasteret_ml.collection.row_store import RowStore, cache_folder
from rasteret_ml.collection.schema import BAND_STRUCT, METADATA_SUFFIX, bbox_array
from rasteret_ml.errors import CollectionError
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.raster_info import RasterInfo

COLUMNS = ["id", "datetime", "bbox", "assets", "proj:epsg", "crs", "collection", "B1_metadata", "B2_metadata"]
ROWS = 23


def _struct(i: int, band: int) -> dict[str, Any] | None:
    """Row 5 lacks band 2; every third has a mask, every fourth an overview, one no lists at all."""
    if band == 2 and i == 5:
        return None
    tiles = {
        "image_width": 30, "image_height": 20, "tile_width": 16, "tile_height": 16, "dtype": "uint16",
        "tile_offsets": np.arange(4) * 100 + 1000 * i + band, "tile_byte_counts": np.arange(4) + 90,
    }  # fmt: skip
    small = tiles | {"image_width": 15, "image_height": 10, "tile_offsets": [9 * i], "tile_byte_counts": [8]}
    return tiles | {
        "transform": [10.0, 500000.0 + 300 * i, -10.0, 5000000.0],
        "compression": 8,
        "nodata": float(i) if i % 2 else None,
        "mask": tiles if i % 3 == 0 else None,
        "overviews": [small] if i % 4 == 0 else [],
        "overview_masks": None,
    }


def table(rows: int = ROWS) -> pa.Table:
    """Records over three months, one undated."""
    dates = [None if i == 7 else dt.datetime(2024, 1 + i % 3, 1 + i) for i in range(rows)]
    asset = pa.struct([("href", pa.string()), ("band_index", pa.int64())])
    hrefs = [[{"href": f"/{b}/{i}.tif"} if b == 1 or i != 5 else None for i in range(rows)] for b in (1, 2)]
    children = [pa.array(column, asset) for column in hrefs]
    columns = {
        "id": pa.array([f"r{i:03d}" for i in range(rows)]),
        "datetime": pa.array(dates, pa.timestamp("us")),
        "geometry": pa.nulls(rows, pa.binary()),
        "bbox": bbox_array(np.column_stack([np.arange(rows)] * 4).astype(float)),
        "assets": pa.StructArray.from_arrays(children, names=["B1", "B2"]),
        "proj:epsg": pa.array([32633] * rows, pa.int32()),
        "eo:cloud_cover": pa.array([float(i) for i in range(rows)]),
        "B1_metadata": pa.array([_struct(i, 1) for i in range(rows)], BAND_STRUCT),
        "B2_metadata": pa.array([_struct(i, 2) for i in range(rows)], BAND_STRUCT),
    }
    return pa.table(columns)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RASTERET_ML_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["file", "groups", "folder", "memory"])
def collection(request: pytest.FixtureRequest, tmp_path: Path) -> Collection:
    """The same records from one file (of one row group, or of six), from a hive folder, from memory."""
    whole = Collection(table())
    if request.param == "file":
        return whole.write(tmp_path / "c.parquet")
    if request.param == "folder":
        return whole.write(tmp_path / "c")
    if request.param == "groups":
        pq.write_table(table(), tmp_path / "g.parquet", row_group_size=4)
        return Collection.open(tmp_path / "g.parquet")
    return whole


def _views(collection: Collection) -> list[Collection]:
    clouds = pc.field("eo:cloud_cover")
    return [
        collection,
        collection.where((clouds > 3) & (clouds < 18)),
        collection.where(clouds == 22),
        collection.subset(date_range="2024-02-01/2024-03-31"),
        collection.where(pc.field("bbox", "xmin") > 4).where(clouds != 9),
    ]


def assert_same(a: Any, b: Any) -> None:
    """Equal, numpy arrays included, in a dict or a LazyMapping."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, (dict, LazyMapping)):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b
        assert type(a) is type(b)


def assert_same_record(found: RasterInfo, whole: RasterInfo) -> None:
    """Equal in all fields that the store reads."""
    for name in ("id", "datetime", "bbox", "crs", "collection", "row"):
        assert getattr(found, name) == getattr(whole, name)
    assert_same(found.assets, whole.assets)
    assert_same(found.band_metadata, whole.band_metadata)


def test_the_store_and_iteration_agree(collection: Collection) -> None:
    """Every row of every view, in any order; null and empty lists stay distinct."""
    for view in _views(collection):
        records = list(view.iterate_records())
        assert [r.row for r in records] == list(range(len(view)))
        store = RowStore(view, COLUMNS)
        for row in np.random.default_rng(0).permutation(len(records)):
            assert_same_record(store[int(row)], records[row])


def _read(store: RowStore, rows: list[int]) -> list[RasterInfo]:
    return [store[row] for row in rows]


@pytest.mark.slow
def test_a_spawned_process_reads_the_same(collection: Collection, cache: Path) -> None:
    """After pickling, from the same copies: a row group that the parent has copied is not copied again."""
    view = _views(collection)[1]
    store, records = RowStore(view, COLUMNS), list(view.iterate_records())
    rows = list(range(len(records)))
    _read(store, rows)
    copies = sorted(path.name for path in cache.glob("*")) if cache.exists() else []
    assert bool(copies) == (collection.path is not None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_read, (store, rows))
    for one, other in zip(found, records, strict=True):
        assert_same_record(one, other)
    assert (sorted(path.name for path in cache.glob("*")) if cache.exists() else []) == copies


def test_without_a_cache_folder_rows_are_kept_in_memory(
    collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full or read-only disk costs speed, not records."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RASTERET_ML_CACHE", str(tmp_path / "file"))
    assert cache_folder() is None
    store = RowStore(collection, COLUMNS)
    for row, record in enumerate(collection.iterate_records()):
        assert_same_record(store[row], record)


def test_a_cache_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default folder is used only if it is private, because its files are trusted and contain hrefs."""
    monkeypatch.delenv("RASTERET_ML_CACHE")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert cache_folder() is None
    folder.rmdir()
    (tmp_path / "other").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "other")
    assert cache_folder() is None


def test_a_rewritten_file_has_new_copies_and_old_ones_go(tmp_path: Path, cache: Path) -> None:
    """A copy's name depends on path, size and modification time; copies that are not opened are removed."""
    first = Collection(table()).write(tmp_path / "c.parquet")
    assert RowStore(first, COLUMNS)[0].id == "r000"
    (old,) = cache.glob("*")
    os.utime(old, (time.time() - 10**7,) * 2)
    second = Collection(table().slice(1)).write(tmp_path / "c.parquet")
    assert RowStore(second, COLUMNS)[0].id == "r001"
    assert not old.exists()
    assert len(list(cache.glob("*"))) == 1


def test_files_of_a_folder_may_differ(tmp_path: Path) -> None:
    """A band that one of them lacks is null; narrower numbers are cast."""
    whole = table().slice(0, 12)
    (tmp_path / "c").mkdir()
    pq.write_table(whole.slice(0, 5), tmp_path / "c" / "a.parquet")
    other = whole.slice(5).drop_columns(["B2_metadata"])
    place = other.schema.get_field_index("proj:epsg")
    other = other.set_column(place, "proj:epsg", other["proj:epsg"].cast(pa.int16()))
    pq.write_table(other, tmp_path / "c" / "b.parquet")
    view = Collection.open(tmp_path / "c").where(pc.field("eo:cloud_cover") != 6)
    records, store = list(view.iterate_records()), RowStore(view, COLUMNS)
    assert len(records) == 11
    for row, record in enumerate(records):
        assert_same_record(store[row], record)
        assert (record.band_metadata["B2_metadata"] is None) == (row >= 5)
    assert band_arrays(view, "B2").present.tolist() == [True] * 5 + [False] * 6


def test_band_table_equals_the_columns(collection: Collection) -> None:
    """Field by field, for every view, with the presence of the band."""
    for view in _views(collection):
        for band in ("B1", "B2"):
            table = view.band_table(band)
            structs = view.to_table([f"{band}{METADATA_SUFFIX}"]).column(0).to_pylist()
            assert table["_present"].to_pylist() == [s is not None for s in structs]
            for name in table.column_names[:-1]:
                assert table[name].to_pylist() == [None if s is None else s[name] for s in structs]


def _corrupt_tile_tables(path: Path) -> int:
    """Overwrite the pages of all tile arrays, and return the number of column chunks."""
    footer, corrupted = pq.ParquetFile(path).metadata, 0
    with open(path, "r+b") as file:
        for g in range(footer.num_row_groups):
            for c in range(footer.num_columns):
                chunk = footer.row_group(g).column(c)
                if "tile_offsets" in chunk.path_in_schema or "tile_byte_counts" in chunk.path_in_schema:
                    file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                    file.write(b"\xff" * chunk.total_compressed_size)
                    corrupted += 1
    return corrupted


def test_columns_are_read_without_tile_tables(tmp_path: Path) -> None:
    """Everything but the records themselves can be read after all tile tables were corrupted."""
    path = Path(str(Collection(table()).write(tmp_path / "c.parquet").path))
    assert _corrupt_tile_tables(path) >= 4
    collection = Collection.open(path).where(pc.field("eo:cloud_cover") < 20)
    arrays = band_arrays(collection, "B2")
    assert arrays.present.sum() == 19
    assert arrays.shapes.tolist()[0] == [20, 30]
    assert arrays.transforms[3].tolist() == [10, 0, 500900, 0, -10, 5000000]
    assert collection.crs == ["EPSG:32633"]
    with pytest.raises((OSError, pa.ArrowException)):
        RowStore(collection, COLUMNS)[0]


def test_structs_are_converted_on_access(collection: Collection) -> None:
    """Neither creating a record nor listing its bands converts a tile table."""
    info = next(collection.iterate_records())
    assert isinstance(info.band_metadata, LazyMapping)
    assert RasterAccessor(info).available_bands == ["B1", "B2"]
    assert not info.band_metadata._values
    assert info.band_metadata["B2_metadata"] is info.band_metadata["B2_metadata"]
    assert list(info.band_metadata._values) == ["B2_metadata"]
    assert "href" not in repr(info.assets)
    records = list(collection.iterate_records())
    (lacking,) = (r for r in records if r.id == "r005")
    assert RasterAccessor(lacking).available_bands == ["B1"]
    assert lacking.assets["B2"] is None
    with pytest.raises(KeyError):
        lacking.band_metadata["B9_metadata"]


def test_lazy_records_pickle_as_plain_values(collection: Collection) -> None:
    """The values of one row, not the memory of the table; copies and asdict too."""
    for info in collection.iterate_records():
        data = pickle.dumps(info)
        assert len(data) < 6000
        copy = pickle.loads(data)
        assert type(copy.band_metadata) is dict
        assert_same_record(copy, info)
        assert type(dataclasses.asdict(info)["assets"]) is dict


@pytest.mark.parametrize(("values", "message"), [([1.0, 2.0, 3.0], "4 or 6 values, got 3")])
def test_a_transform_of_another_length_is_an_error(values: list[float], message: str) -> None:
    """As when the record is read."""
    struct = _struct(0, 1)
    assert struct is not None
    whole = table(1)
    place = whole.schema.get_field_index("B1_metadata")
    bad = pa.array([struct | {"transform": values}], BAND_STRUCT)
    with pytest.raises(CollectionError, match=message):
        band_arrays(Collection(whole.set_column(place, "B1_metadata", bad)), "B1").transforms  # noqa: B018
