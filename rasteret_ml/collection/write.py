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
_LOW_MEMORY_SCAN = {"batch_readahead": 2, "fragment_readahead": 1}


def write_collection(table: pa.Table, out: str | os.PathLike[str]) -> str:
    """Write a table to `out`, completely or not at all.

    A name ending in `.parquet` becomes one file; any other name a hive-partitioned folder
    `year=YYYY/month=M/part-0.parquet`, rasteret's layout. zstd, statistics and dictionaries are on.

    Returns:
        The path written.

    Raises:
        UsageError: `out` exists and is neither a Parquet file nor a folder of them.
    """
    path = check_output_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        with _replacing(path) as temporary:
            pq.write_table(table, temporary, row_group_size=_group_rows(table), **_file_options(table.schema))
    else:
        _write_folder(table, path)
    return str(path)


def write_view(
    dataset: ds.Dataset,
    filter: ds.Expression | None,
    metadata: Mapping[bytes, bytes] | None,
    out: str | os.PathLike[str],
    new_column: tuple[str, pa.ChunkedArray] | None = None,
) -> str:
    """Write the filtered rows of a dataset; a single file needs memory for one row group only.

    Args:
        dataset: The rows.
        filter: Rows to write; None = all.
        metadata: Schema metadata of the file.
        out: As for `write_collection`.
        new_column: Name and values of a column to add, one value per row written.

    Returns:
        The path written.
    """

    def finish(table: pa.Table, start: int) -> pa.Table:
        table = table.drop_columns([n for n in ("year", "month") if n in table.column_names])
        if new_column is not None:
            table = set_column(table, new_column[0], new_column[1].slice(start, len(table)))
        return table.replace_schema_metadata(metadata)

    path = check_output_path(out)
    if path.suffix != ".parquet":
        return write_collection(finish(dataset.to_table(filter=filter), 0), out)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema, start = finish(dataset.schema.empty_table(), 0).schema, 0
    with _replacing(path) as temporary, pq.ParquetWriter(temporary, schema, **_file_options(schema)) as writer:
        for group in _row_groups(dataset.to_batches(filter=filter, batch_size=_MIN_GROUP_ROWS, **_LOW_MEMORY_SCAN)):
            writer.write_table(finish(group, start), row_group_size=_MAX_GROUP_ROWS)
            start += len(group)
    return str(path)


def check_output_path(out: str | os.PathLike[str]) -> Path:
    """Return the path that `write_collection` writes to.

    Raises:
        UsageError: Something else exists at the path, or the folder is not writable.
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


def _group_rows(table: pa.Table) -> int:
    row_bytes = table.nbytes / max(1, len(table))
    return int(np.clip(_GROUP_BYTES // max(1.0, row_bytes), _MIN_GROUP_ROWS, _MAX_GROUP_ROWS))


def _file_options(schema: pa.Schema) -> dict[str, object]:
    """Compression, and dictionaries for all columns but the tile arrays, whose values never repeat."""
    leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    no_dictionary = ("tile_offsets.list.element", "tile_byte_counts.list.element")
    dictionary = [leaf for leaf in leaves if not leaf.endswith(no_dictionary)]
    return {"compression": "zstd", "compression_level": _ZSTD_LEVEL, "use_dictionary": dictionary}


def _leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Parquet's names of a column's leaves."""
    if pa.types.is_struct(kind):
        for field in (kind.field(k) for k in range(kind.num_fields)):
            yield from _leaves(f"{path}.{field.name}", field.type)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    else:
        yield path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """Yield the name of a temporary file that replaces `path` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield str(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_folder(table: pa.Table, path: Path) -> None:
    work = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    work.mkdir()
    try:
        for name, unit in (("year", pc.year), ("month", pc.month)):
            table = table.append_column(name, pc.cast(unit(table["datetime"]), pa.int32()))
        ds.write_dataset(
            table,
            work,
            format="parquet",
            partitioning=ds.partitioning(pa.schema([("year", pa.int32()), ("month", pa.int32())]), flavor="hive"),
            basename_template="part-{i}.parquet",
            file_options=ds.ParquetFileFormat().make_write_options(**_file_options(table.schema)),
            max_rows_per_group=_group_rows(table),
            max_rows_per_file=0,
        )
        _swap(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, path: Path) -> None:
    """Move `work` to `path`; the previous folder is restored if that fails."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(work, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
