"""Atomic Parquet writing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from rasteret_ml.collection.schema import placed
from rasteret_ml.errors import UsageError

__all__ = ["check_target", "write_collection", "write_view"]

_GROUP_BYTES = 16 * 2**20
"""Uncompressed size of a row group: the smaller, the sooner one of its rows is there; the larger, the shorter the
footer, in which every group takes about 110 bytes for each of a band's hundred columns."""
_LEAST_ROWS, _MOST_ROWS = 512, 50_000
_ZSTD_LEVEL = 3
_LITTLE = {"batch_readahead": 2, "fragment_readahead": 1}
"""How far ahead of the rows that are looked at a dataset reads."""


def write_collection(table: pa.Table, out: str | os.PathLike[str]) -> str:
    """Write `table` to `out`, whole or not at all.

    A name ending in `.parquet` becomes one file; any other a hive-partitioned folder
    `year=YYYY/month=M/part-0.parquet`, as rasteret lays it out. What was there before is replaced only once
    the new one is complete. zstd, statistics and dictionaries on.

    Returns:
        The path written.

    Raises:
        UsageError: `out` exists and is something else than a file or folder of Parquet.
    """
    path = check_target(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        _write_file(table, path)
    else:
        _write_folder(table, path)
    return str(path)


def write_view(
    dataset: ds.Dataset,
    condition: ds.Expression | None,
    metadata: Mapping[bytes, bytes] | None,
    out: str | os.PathLike[str],
    added: tuple[str, pa.ChunkedArray] | None,
) -> str:
    """`write_collection` of the rows of a dataset; of one file, a row group is in memory at a time.

    Args:
        dataset: Where the rows are.
        condition: Which of them; None = all.
        metadata: Of the file.
        out: As for `write_collection`.
        added: A column (name, values of the rows) that goes with them; None = nothing does.
    """

    def part(table: pa.Table, start: int) -> pa.Table:
        table = table.drop_columns([n for n in ("year", "month") if n in table.column_names])
        table = table if added is None else placed(table, added[0], added[1].slice(start, len(table)))
        return table.replace_schema_metadata(metadata)

    path = check_target(out)
    if path.suffix != ".parquet":
        return write_collection(part(dataset.to_table(filter=condition), 0), out)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema, start = part(dataset.schema.empty_table(), 0).schema, 0
    with (
        _replaced(path) as name,
        pq.ParquetWriter(
            name, schema, compression="zstd", compression_level=_ZSTD_LEVEL, use_dictionary=_repeating(schema)
        ) as writer,
    ):
        for group in _groups(dataset.to_batches(filter=condition, batch_size=_LEAST_ROWS, **_LITTLE)):
            writer.write_table(part(group, start), row_group_size=_MOST_ROWS)
            start += len(group)
    return str(path)


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Batches joined until they are a row group."""
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _LEAST_ROWS and (size >= _GROUP_BYTES or rows >= _MOST_ROWS):
            yield pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
    if rows:
        yield pa.Table.from_batches(held)


def check_target(out: str | os.PathLike[str]) -> Path:
    """Where `write_collection` would write.

    Raises:
        UsageError: something else is there, or it cannot be written to.
    """
    path = Path(out).expanduser()
    if path.suffix == ".parquet":
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give the Collection another name, or drop the .parquet ending.")
    elif path.is_file() or (path.is_dir() and any(_foreign(path))):
        raise UsageError(f"{path} exists and is not a Collection; it is left alone. Choose another name.")
    standing = next(parent for parent in path.absolute().parents if parent.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise UsageError(f"{path} cannot be written: {standing} is not a folder that may be written to.")
    return path


def _write_file(table: pa.Table, path: Path) -> None:
    with _replaced(path) as name:
        pq.write_table(
            table,
            name,
            compression="zstd",
            compression_level=_ZSTD_LEVEL,
            row_group_size=_group_rows(table),
            use_dictionary=_repeating(table.schema),
        )


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[str]:
    """The name of a new file that takes a path's place once all has gone well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield name
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _group_rows(table: pa.Table) -> int:
    each = table.nbytes / max(1, len(table))
    return int(np.clip(_GROUP_BYTES // max(1.0, each), _LEAST_ROWS, _MOST_ROWS))


def _repeating(schema: pa.Schema) -> list[str]:
    """Columns for which dictionaries are worth their time: all but the tile arrays, in which nothing repeats."""
    leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    return [
        leaf for leaf in leaves if not leaf.endswith(("tile_offsets.list.element", "tile_byte_counts.list.element"))
    ]


def _leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Parquet's names of a column's leaves."""
    if pa.types.is_struct(kind):
        for field in (kind.field(k) for k in range(kind.num_fields)):
            yield from _leaves(f"{path}.{field.name}", field.type)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    else:
        yield path


def _write_folder(table: pa.Table, path: Path) -> None:
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(work, 0o777 & ~_umask())
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    try:
        for name, part in (("year", pc.year), ("month", pc.month)):
            table = table.append_column(name, pc.cast(part(table["datetime"]), pa.int32()))
        ds.write_dataset(
            table,
            work,
            format="parquet",
            partitioning=ds.partitioning(pa.schema([("year", pa.int32()), ("month", pa.int32())]), flavor="hive"),
            basename_template="part-{i}.parquet",
            file_options=ds.ParquetFileFormat().make_write_options(
                compression="zstd", compression_level=_ZSTD_LEVEL, use_dictionary=_repeating(table.schema)
            ),
            max_rows_per_group=_group_rows(table),
            max_rows_per_file=0,
        )
        _swap(work, path, old)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, path: Path, old: Path) -> None:
    """Put `work` in `path`'s place; what was there stays until that has worked."""
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(work, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _foreign(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if not (p.name.startswith(("year=", "_", ".")) or p.suffix == ".parquet")]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
