"""Atomic Parquet writing: a Collection is replaced only once the new one is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from rasteret_ml.collection.schema import set_column
from rasteret_ml.errors import UsageError

# Uncompressed bytes of a row group. Smaller groups give single rows sooner; larger ones a shorter footer, which takes
# about 110 bytes per group for each of a band's hundred columns.
_GROUP_BYTES = 16 * 2**20
_MIN_GROUP_ROWS, _MAX_GROUP_ROWS = 512, 50_000
_ZSTD_LEVEL = 3
#: Folders of a partitioned Collection.
FOLDERS = ds.partitioning(pa.schema([("year", pa.int32()), ("month", pa.int32())]), flavor="hive")
LOW_MEMORY_SCAN = {"batch_readahead": 2, "fragment_readahead": 1}  #: Arguments of `Dataset.to_batches`.


def write_collection(table: pa.Table, out: str | os.PathLike[str]) -> str:
    """Write a table to `out`, completely or not at all, and return the path.

    A name ending in `.parquet` becomes one file; any other name a hive-partitioned folder
    `year=YYYY/month=M/part-0.parquet`, rasteret's layout. zstd, statistics and dictionaries are on. What is not a
    Parquet file or a folder of them is not overwritten: `UsageError`.
    """
    path = check_output_path(out)
    is_file = path.suffix == ".parquet"
    if not is_file:
        for name, unit in (("year", pc.year), ("month", pc.month)):
            table = table.append_column(name, pc.cast(unit(table["datetime"]), pa.int32()))
    row_bytes = table.nbytes / max(1, len(table))
    group_rows = int(np.clip(_GROUP_BYTES // max(1.0, row_bytes), _MIN_GROUP_ROWS, _MAX_GROUP_ROWS))
    options = _file_options(table.schema)
    with _replacing(path) as temporary:
        if is_file:
            pq.write_table(table, temporary, row_group_size=group_rows, **options)
        else:
            temporary.mkdir()
            ds.write_dataset(
                table,
                temporary,
                format="parquet",
                partitioning=FOLDERS,
                basename_template="part-{i}.parquet",
                file_options=ds.ParquetFileFormat().make_write_options(**options),
                max_rows_per_group=group_rows,
                max_rows_per_file=0,
            )
    return str(path)


def write_view(
    dataset: ds.Dataset,
    filter: ds.Expression | None,
    metadata: Mapping[bytes, bytes] | None,
    out: str | os.PathLike[str],
    new_column: tuple[str, pa.ChunkedArray] | None = None,
) -> str:
    """Write the filtered rows of a dataset as `write_collection` does; a file needs memory for one row group only.

    `metadata` is that of the file's schema; `new_column` adds a column by name, one value per row written.
    """

    def finish(table: pa.Table, start: int) -> pa.Table:
        table = table.drop_columns([n for n in ("year", "month") if n in table.column_names])
        if new_column is not None:
            table = set_column(table, new_column[0], new_column[1].slice(start, len(table)))
        return table.replace_schema_metadata(metadata)

    path = check_output_path(out)
    if path.suffix != ".parquet":
        return write_collection(finish(dataset.to_table(filter=filter), 0), out)
    schema, start = finish(dataset.schema.empty_table(), 0).schema, 0
    with _replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **_file_options(schema)) as writer:
        for group in _row_groups(dataset.to_batches(filter=filter, batch_size=_MIN_GROUP_ROWS, **LOW_MEMORY_SCAN)):
            writer.write_table(finish(group, start), row_group_size=_MAX_GROUP_ROWS)
            start += len(group)
    return str(path)


def check_output_path(out: str | os.PathLike[str]) -> Path:
    """Return the path that `write_collection` writes to.

    `UsageError` if something else exists there, or the folder is not writable.
    """
    path = Path(out).expanduser()
    if path.suffix == ".parquet":
        if path.is_dir():
            raise UsageError(f"{path} is a folder; choose another name, or drop the .parquet ending.")
    elif path.is_file() or (path.is_dir() and any(_is_foreign(entry) for entry in path.iterdir())):
        raise UsageError(f"{path} exists and is not a Collection, so it is not overwritten; choose another name.")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{path} cannot be written: {parent} is not a writable folder.")
    return path


def _is_foreign(path: Path) -> bool:
    return not (path.name.startswith(("year=", "_", ".")) or path.suffix == ".parquet")


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Join batches until they fill a row group."""
    pending: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        pending.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _MIN_GROUP_ROWS and (size >= _GROUP_BYTES or rows >= _MAX_GROUP_ROWS):
            yield pa.Table.from_batches(pending)
            pending, rows, size = [], 0, 0
    if rows:
        yield pa.Table.from_batches(pending)


def _file_options(schema: pa.Schema) -> dict[str, object]:
    """Compression, and dictionaries for all columns but the tile arrays, whose values never repeat."""
    empty = pa.BufferOutputStream()
    pq.ParquetWriter(empty, schema).close()
    stored = pq.ParquetFile(pa.BufferReader(empty.getvalue())).schema
    no_dictionary = ("tile_offsets.list.element", "tile_byte_counts.list.element")
    dictionary = [leaf.path for leaf in stored if not leaf.path.endswith(no_dictionary)]
    return {"compression": "zstd", "compression_level": _ZSTD_LEVEL, "use_dictionary": dictionary}


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file or folder written there replaces it if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except BaseException:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # a folder
        with contextlib.suppress(OSError):
            temporary.unlink()
