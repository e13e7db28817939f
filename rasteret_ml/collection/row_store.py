"""Random access to the rows of a Collection, through memory-mapped copies of its row groups.

Parquet is read one column chunk at a time, which for a single row of tile tables is thousands of times too much. When a
row of a row group is first read, the group's columns are copied to an Arrow file in `cache_folder()`. All processes of
the machine that read the same Parquet file map that copy, so that a row costs microseconds and no memory per process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from rasteret_ml.collection.record_reader import RecordReader
from rasteret_ml.raster.raster_info import RasterInfo

if TYPE_CHECKING:
    from rasteret_ml.collection.collection import Collection

_log = logging.getLogger(__name__)
_FORMAT_VERSION = 3
_BATCH_ROWS = 4096
_MAX_OPEN_BLOCKS = 256
_MAX_UNMAPPED_BYTES = 256 * 2**20  # Blocks kept in this process's memory if they cannot be copied to the cache folder.
_CACHE_SECONDS = 14 * 24 * 3600  # Copies that have not been opened for this long are removed.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParquetBlock:
    """One row group of a Parquet file."""

    fragment: ds.ParquetFileFragment  #: The file.
    number: int  #: Index of the row group in the file.
    num_rows: int  #: Number of rows.
    key: tuple[Any, ...]  #: Identity of the row group: file system, path, file size, modification time, index.

    def batches(self, names: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield the named columns in small batches."""
        file = _parquet_file(self.fragment)
        stored = file.schema_arrow
        if not all(name in stored.names and stored.field(name).type == schema.field(name).type for name in names):
            # Written with other columns or types than the dataset's first file: let the dataset cast.
            fragment = self.fragment.subset(row_group_ids=[self.number], schema=schema)
            yield from fragment.to_table(schema=schema, columns=list(names)).to_batches(max_chunksize=_BATCH_ROWS)
            return
        leaves = _leaves_to_read(file.metadata.row_group(self.number), names)
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[self.number], columns=leaves):
            yield batch.select(list(names))


def _parquet_file(fragment: ds.ParquetFileFragment) -> pq.ParquetFile:
    """Open a fragment's file without reading its footer again."""
    is_local = fragment.filesystem.type_name == "local"
    source = fragment.path if is_local else fragment.filesystem.open_input_file(fragment.path)
    # Over a network, column chunks are fetched together: a band has a hundred of them.
    return pq.ParquetFile(source, metadata=fragment.metadata, memory_map=is_local, pre_buffer=not is_local)


def _leaves_to_read(group: Any, names: Sequence[str]) -> list[str]:
    """Leaf columns of the named columns; of a struct's child without any values, such as the masks, only the first.

    That one tells null from empty lists. To copy all leaves would take up to twice as long.
    """
    prefixes = tuple(f"{name}." for name in names)
    leaves: dict[str, list[str]] = {}
    filled: set[str] = set()
    for chunk in map(group.column, range(group.num_columns)):
        path = chunk.path_in_schema
        if not f"{path}.".startswith(prefixes):
            continue
        child = ".".join(path.split(".")[:2])
        leaves.setdefault(child, []).append(path)
        statistics = None if child in filled else chunk.statistics
        if statistics is None or not statistics.has_null_count or statistics.null_count < chunk.num_values:
            filled.add(child)
    return [path for child, paths in leaves.items() for path in (paths if child in filled else paths[:1])]


class RowBlocks:
    """The row groups (or batches in memory) of a filtered dataset, and the rows of them that the filter keeps."""

    def __init__(self, dataset: ds.Dataset, filter: ds.Expression | None) -> None:
        self._schema = dataset.schema
        self.blocks = tuple(_blocks(dataset))
        self._starts = np.concatenate([[0], np.cumsum([b.num_rows for b in self.blocks])]).astype(np.int64)
        self._rows: npt.NDArray[np.int64] | None = None
        if filter is not None:
            # Read as a column rather than used as a filter, so that the positions of the rows are known.
            keep = dataset.to_table(columns={"keep": filter})["keep"].fill_null(False)
            self._rows = np.flatnonzero(keep.to_numpy()).astype(np.int64)

    def locate(self, row: int) -> tuple[int, int]:
        """Return (block, row in the block) of a row of the view."""
        position = row if self._rows is None else int(self._rows[row])
        block = int(np.searchsorted(self._starts, position, side="right")) - 1
        return block, position - int(self._starts[block])

    def read_children(self, column: str, names: Sequence[str]) -> pa.Table:
        """Read children of a struct column, and `_present`: the struct itself is not null.

        A dataset's own projection (`ds.field(column, child)`) reads all children, tile tables included.
        """
        kind, sizes = self._schema.field(column).type, np.diff(self._starts)
        is_read = (sizes if self._rows is None else np.diff(np.searchsorted(self._rows, self._starts))) > 0
        by_file = itertools.groupby(itertools.compress(self.blocks, is_read), key=lambda block: id(block.fragment))
        tables = [_read_children(list(group), column, kind, names) for _, group in by_file]
        schema = pa.schema([(n, kind.field(n).type) for n in names] + [("_present", pa.bool_())])
        table = pa.concat_tables([schema.empty_table(), *tables])
        if self._rows is None:
            return table
        positions = np.cumsum(np.repeat(is_read, sizes)) - 1  # in the table, of the rows that were read
        return table.take(pa.array(positions[self._rows]))


def _blocks(dataset: ds.Dataset) -> Iterator[ParquetBlock | pa.RecordBatch]:
    for fragment in dataset.get_fragments():
        if not isinstance(fragment, ds.ParquetFileFragment):
            yield from fragment.to_batches(schema=dataset.schema)
            continue
        info = fragment.filesystem.get_file_info(fragment.path)
        key = fragment.filesystem.type_name, fragment.path, info.size, info.mtime_ns
        for group in fragment.row_groups:
            yield ParquetBlock(fragment=fragment, number=group.id, num_rows=group.num_rows, key=(*key, group.id))


def _read_children(blocks: Sequence[ParquetBlock], column: str, kind: pa.StructType, names: Sequence[str]) -> pa.Table:
    """`RowBlocks.read_children` for row groups of one file; children that the file lacks are null."""
    file, count = _parquet_file(blocks[0].fragment), sum(block.num_rows for block in blocks)
    stored = file.schema_arrow.field(column).type if column in file.schema_arrow.names else pa.null()
    children, present = {}, pa.repeat(False, count)
    if pa.types.is_struct(stored):
        available = [name for name in names if stored.get_field_index(name) >= 0] or [stored.field(0).name]
        paths = [f"{column}.{name}" for name in available]
        structs = file.read_row_groups([block.number for block in blocks], columns=paths)[column].combine_chunks()
        children = {field.name: child for field, child in zip(structs.type, structs.flatten(), strict=True)}
        present = structs.is_valid()
    columns = [
        children[name].cast(kind.field(name).type) if name in children else pa.nulls(count, kind.field(name).type)
        for name in names
    ]
    return pa.table([*columns, present], names=[*names, "_present"])


class RowStore:
    """The records of a Collection by row, with only the named columns; nothing is read until a row is accessed.

    Pickles as the Collection and the names.
    """

    def __init__(self, collection: Collection, columns: Sequence[str]) -> None:
        self._collection = collection
        self._columns = [name for name in columns if name in collection.arrow_schema.names]
        self._types = [str(collection.arrow_schema.field(name).type) for name in self._columns]
        self._open: OrderedDict[int, _BlockReader] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowStore, (self._collection, self._columns)

    def __getitem__(self, row: int) -> RasterInfo:
        """Return the record at a row of the Collection."""
        with self._lock:
            block, i = self._collection.row_blocks.locate(row)
            reader = self._open.get(block)
            if reader is None:
                reader = self._open[block] = self._open_block(self._collection.row_blocks.blocks[block])
                while len(self._open) > 1 and (
                    len(self._open) > _MAX_OPEN_BLOCKS
                    or sum(reader.nbytes for reader in self._open.values()) > _MAX_UNMAPPED_BYTES
                ):
                    self._open.popitem(last=False)
            self._open.move_to_end(block)
            return reader.record(i, row)

    def _open_block(self, block: ParquetBlock | pa.RecordBatch) -> _BlockReader:
        schema, names = self._collection.arrow_schema, self._columns
        if not isinstance(block, ParquetBlock):
            return _BlockReader([block.select(names)], mapped=True)
        for _ in range(2):
            path = _copy_to_cache(block, names, schema, self._types)
            if path is None:
                break
            try:
                file = pa.ipc.open_file(pa.memory_map(str(path)))
                batches = [file.get_batch(k) for k in range(file.num_record_batches)]
                return _BlockReader(batches, mapped=True)
            except (OSError, pa.ArrowInvalid) as error:  # truncated by a full disk or power failure, or just removed
                _log.warning("%s is damaged (%s) and will be written again", path, error)
                path.unlink(missing_ok=True)
        return _BlockReader(list(block.batches(names, schema)), mapped=False)


class _BlockReader:
    """Reads records of one block."""

    def __init__(self, batches: Sequence[pa.RecordBatch], *, mapped: bool) -> None:
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._reader = functools.cache(lambda k: RecordReader(batches[k]))
        self.nbytes = 0 if mapped else sum(batch.nbytes for batch in batches)

    def record(self, i: int, row: int) -> RasterInfo:
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._reader(k).record(i - int(self._starts[k]), row)


def cache_folder() -> Path | None:
    """Return the folder for copies of row groups: $RASTERET_ML_CACHE, else a private folder in the temporary one.

    None if it cannot be created or belongs to another user.
    """
    configured = os.environ.get("RASTERET_ML_CACHE")
    owner = getattr(os, "getuid", lambda: "user")()
    folder = Path(configured).expanduser() if configured else Path(tempfile.gettempdir()) / f"rasteret_ml-{owner}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    # Another user could have created this name in a shared folder, and URLs in the copies may carry secrets.
    is_private = configured or not hasattr(os, "getuid") or (status.st_uid == owner and not status.st_mode & 0o077)
    return folder if is_private and os.access(folder, os.W_OK) else None


def _copy_to_cache(block: ParquetBlock, names: Sequence[str], schema: pa.Schema, types: Sequence[str]) -> Path | None:
    """Return the uncompressed copy of a block's columns, written now if missing; None if that is impossible."""
    folder = cache_folder()
    if folder is None:
        return None
    identity = repr((_FORMAT_VERSION, block.key, names, types))
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:40]}.arrow"
    try:
        if path.exists():
            os.utime(path)
        else:
            _remove_old_copies(folder)
            _write_batches(path, block.batches(names, schema))
    except OSError as error:
        _log.warning("Cannot copy a row group to %s (%s); it is kept in this process's memory", folder, error)
        return None
    return path


def _write_batches(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".arrow")
    try:
        first = next(batches)
        with os.fdopen(handle, "wb") as out, pa.ipc.new_file(out, first.schema) as sink:
            for batch in itertools.chain([first], batches):
                sink.write_batch(batch)
            sink.close()
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _remove_old_copies(folder: Path) -> None:
    oldest = time.time() - _CACHE_SECONDS
    for path in folder.glob("*.arrow"):
        with contextlib.suppress(OSError):  # another process was faster
            if path.stat().st_mtime < oldest:
                path.unlink()
