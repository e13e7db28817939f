"""Where the rows of a view lie: which file, which row group, which row of it; and how only what is needed is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

__all__ = ["Pieces", "RowGroup", "TablePiece", "parquet_file"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TablePiece:
    """Rows that are in memory already."""

    batch: pa.RecordBatch
    """The rows."""
    key: None = None
    """They lie in no file."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return int(self.batch.num_rows)

    def batches(self, names: Sequence[str], schema: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
        """The rows, as they are."""
        yield self.batch.select([name for name in names if name in self.batch.schema.names])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowGroup:
    """One row group of a Parquet file."""

    fragment: ds.ParquetFileFragment
    """The file."""
    number: int
    """Which of its row groups."""
    num_rows: int
    """Its rows."""
    key: tuple[Any, ...]
    """What tells it from every other row group: file, size, time of its last change, number."""

    def batches(self, names: Sequence[str], schema: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
        """The columns named, `size` rows at a time; children of structs that are null throughout may be left out."""
        file = parquet_file(self.fragment)
        stored = file.schema_arrow
        same = all(name in stored.names and stored.field(name).type == schema.field(name).type for name in names)
        if not same:  # written with other columns or types than the first file: the dataset knows how to cast
            part = self.fragment.subset(row_group_ids=[self.number], schema=schema)
            yield from part.to_table(schema=schema, columns=list(names)).to_batches(max_chunksize=size)
            return
        paths = _filled_leaves(file.metadata.row_group(self.number), names, schema)
        for batch in file.iter_batches(size, row_groups=[self.number], columns=paths):
            yield batch.select(list(names))


def parquet_file(fragment: ds.ParquetFileFragment) -> pq.ParquetFile:
    """The fragment's file, opened without reading its footer again."""
    local = fragment.filesystem.type_name == "local"
    source = fragment.path if local else fragment.filesystem.open_input_file(fragment.path)
    return pq.ParquetFile(source, metadata=fragment.metadata, memory_map=local)


def _filled_leaves(group: Any, names: Sequence[str], schema: pa.Schema) -> list[str]:
    """Leaf columns that hold anything, and of each child that is null throughout the one that says so."""
    tops, kept = set(names), list[str]()
    spare: dict[tuple[str, str], str] = {}
    for i in range(group.num_columns):
        chunk = group.column(i)
        path = chunk.path_in_schema
        top = next((name for name in _prefixes(path) if name in tops), None)
        if top is None:
            continue
        key = top, path[len(top) + 1 :].split(".")[0]
        facts = chunk.statistics
        if facts is not None and facts.has_null_count and facts.null_count == chunk.num_values:
            spare.setdefault(key, path)
        else:
            kept.append(path)
    told = {prefix for path in kept for prefix in _prefixes(path)}
    for (top, child), path in spare.items():
        if not _is_told(top, child, told, schema):
            kept.append(path)
            told.update(_prefixes(path))
    return kept


def _is_told(top: str, child: str, told: set[str], schema: pa.Schema) -> bool:
    """Whether the leaves kept tell a child's nulls: one of its own, or any of the struct where it is a plain value."""
    kind = schema.field(top).type
    plain = pa.types.is_struct(kind) and kind.get_field_index(child) >= 0
    plain = plain and not pa.types.is_nested(kind.field(child).type)
    return (top if plain or not child else f"{top}.{child}") in told


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[: k + 1]) for k in range(len(parts)))


class Pieces:
    """The pieces of a view in the order of its rows, and which of their rows it has."""

    def __init__(self, dataset: ds.Dataset, condition: ds.Expression | None) -> None:
        self._schema = dataset.schema
        self.pieces = tuple(_pieces(dataset))
        self.starts = np.concatenate([[0], np.cumsum([p.num_rows for p in self.pieces])]).astype(np.int64)
        self._rows: npt.NDArray[np.int64] | None = None
        if condition is not None:
            # As a column, not as a filter: it then says which rows fit, and not only what is in them.
            fits = dataset.to_table(columns={"fits": condition})["fits"].fill_null(False)
            self._rows = np.flatnonzero(fits.to_numpy()).astype(np.int64)

    @property
    def on_disk(self) -> bool:
        """Whether all rows lie in row groups of Parquet files."""
        return all(isinstance(piece, RowGroup) for piece in self.pieces)

    def locate(self, row: int) -> tuple[int, int]:
        """(piece, row in it) of a row of the view."""
        at = row if self._rows is None else int(self._rows[row])
        piece = int(np.searchsorted(self.starts, at, side="right")) - 1
        return piece, at - int(self.starts[piece])

    def children(self, column: str, names: Sequence[str]) -> pa.Table:
        """Children of a struct column, and `_present`: the struct itself is not null. Nothing else is read.

        A dataset's own projection (`ds.field(column, child)`) reads every child: of a band, its tile tables.
        """
        kind = self._schema.field(column).type
        needed = np.arange(len(self.pieces))
        if self._rows is not None:
            needed = np.unique(np.searchsorted(self.starts, self._rows, side="right") - 1)
        tables = [_children(groups, column, kind, names) for groups in self._by_file(needed)]
        schema = pa.schema([(n, kind.field(n).type) for n in names] + [("_present", pa.bool_())])
        whole = pa.concat_tables(tables) if tables else schema.empty_table()
        if self._rows is None:
            return whole
        sizes = np.diff(self.starts)[needed]
        read_from = np.cumsum(sizes) - sizes
        at = np.searchsorted(self.starts[needed], self._rows, side="right") - 1
        return whole.take(pa.array(self._rows - self.starts[needed][at] + read_from[at]))

    def _by_file(self, needed: npt.NDArray[np.intp]) -> Iterator[list[RowGroup]]:
        for _, groups in itertools.groupby((self.pieces[k] for k in needed), key=lambda p: id(p.fragment)):
            yield list(groups)


def _pieces(dataset: ds.Dataset) -> Iterator[RowGroup | TablePiece]:
    for fragment in dataset.get_fragments():
        if not isinstance(fragment, ds.ParquetFileFragment):
            yield from (TablePiece(batch=batch) for batch in fragment.to_batches(schema=dataset.schema))
            continue
        found = fragment.filesystem.get_file_info(fragment.path)
        key = fragment.filesystem.type_name, fragment.path, found.size, found.mtime_ns
        for group in fragment.row_groups:
            yield RowGroup(fragment=fragment, number=group.id, num_rows=group.num_rows, key=(*key, group.id))


def _children(groups: Sequence[RowGroup], column: str, kind: pa.StructType, names: Sequence[str]) -> pa.Table:
    """One file's part of `Pieces.children`; what the file lacks is null."""
    file, count = parquet_file(groups[0].fragment), sum(group.num_rows for group in groups)
    stored = file.schema_arrow.field(column).type if column in file.schema_arrow.names else pa.null()
    if not pa.types.is_struct(stored):
        nulls = [pa.nulls(count, kind.field(name).type) for name in names]
        return pa.table([*nulls, pa.repeat(False, count)], names=[*names, "_present"])
    have = [name for name in names if stored.get_field_index(name) >= 0] or [stored.field(0).name]
    read = file.read_row_groups([group.number for group in groups], columns=[f"{column}.{name}" for name in have])
    structs = pa.chunked_array(read[column]).combine_chunks()
    found = {structs.type.field(k).name: child for k, child in enumerate(structs.flatten())}
    columns = [
        found[name].cast(kind.field(name).type) if name in found else pa.nulls(count, kind.field(name).type)
        for name in names
    ]
    return pa.table([*columns, structs.is_valid()], names=[*names, "_present"])
