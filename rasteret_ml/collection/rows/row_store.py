"""Records by row: each process maps the same uncompressed copies of row groups into its memory.

Parquet is read a column chunk at a time, which for one row of tile tables is thousands of times too much. So a row
group's columns are copied, when a row of it is first asked for, to an Arrow file in `cache_folder()`; every process
on the machine that reads the same file maps that copy, and a row costs microseconds and no memory of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rasteret_ml.collection.rows.pieces import RowGroup, TablePiece
from rasteret_ml.collection.rows.record_reader import RecordReader
from rasteret_ml.raster.raster_info import RasterInfo

if TYPE_CHECKING:
    from rasteret_ml.collection.collection import Collection

__all__ = ["RowStore", "cache_folder"]

_log = logging.getLogger(__name__)
_FORMAT = 2
_BATCH = 4096
"""Rows of a copy that are mapped together."""
_OPEN_PIECES = 256
_HELD_BYTES = 256 * 2**20
"""Row groups kept in this process's own memory, where they cannot be copied."""
_KEEP_SECONDS = 14 * 24 * 3600
"""Copies that nobody has opened for this long are removed."""


def cache_folder() -> Path | None:
    """Where copies of row groups are kept: $RASTERET_ML_CACHE, or a private folder among the temporary ones.

    None where there is no such place, or where it belongs to somebody else.
    """
    named = os.environ.get("RASTERET_ML_CACHE")
    owner = getattr(os, "getuid", lambda: "user")()
    folder = Path(named).expanduser() if named else Path(tempfile.gettempdir()) / f"rasteret_ml-{owner}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.lstat()
    except OSError:
        return None
    # In a folder that all may write to, another user could have put one of that name: addresses may carry secrets.
    private = named or not hasattr(os, "getuid") or (facts.st_uid == owner and not facts.st_mode & 0o077)
    return folder if private and os.access(folder, os.W_OK) else None


class RowStore:
    """The records of a Collection by row, with the columns named; nothing is read before a row is asked for.

    Pickles as the Collection and the names.
    """

    def __init__(self, collection: Collection, columns: Sequence[str]) -> None:
        self._collection = collection
        self._columns = tuple(columns)
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, _Rows] = OrderedDict()
        self._types: list[str] = []
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_collection": self._collection, "_columns": self._columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, row: int) -> RasterInfo:
        """The record at `row` of the Collection."""
        with self._lock:
            piece, i = self._collection.pieces.locate(row)
            rows = self._open.get(piece)
            if rows is None:
                rows = self._open[piece] = self._opened(self._collection.pieces.pieces[piece])
                self._make_room()
            self._open.move_to_end(piece)
            return rows.record(i, row)

    def _opened(self, piece: RowGroup | TablePiece) -> _Rows:
        schema = self._collection.arrow_schema
        names = [name for name in self._columns if name in schema.names]
        if not self._types:  # a band's type is a page of text
            self._types = [str(schema.field(name).type) for name in names]
        path = _copy_of(piece, names, schema, self._types)
        if path is None:
            return _Rows(list(piece.batches(names, schema, _BATCH)), schema, mapped=isinstance(piece, TablePiece))
        try:
            return _Rows(_mapped(path), schema, mapped=True)
        except (OSError, pa.ArrowInvalid) as error:  # cut off by a full disk or a power failure, or just removed
            _log.warning("%s is damaged (%s) and is made again", path, error)
            path.unlink(missing_ok=True)
            again = _copy_of(piece, names, schema, self._types)
        if again is None:
            return _Rows(list(piece.batches(names, schema, _BATCH)), schema, mapped=False)
        return _Rows(_mapped(again), schema, mapped=True)

    def _make_room(self) -> None:
        while len(self._open) > 1 and (
            len(self._open) > _OPEN_PIECES or sum(rows.nbytes for rows in self._open.values()) > _HELD_BYTES
        ):
            self._open.popitem(last=False)


class _Rows:
    """The rows of one piece, in batches."""

    def __init__(self, batches: Sequence[pa.RecordBatch], schema: pa.Schema, *, mapped: bool) -> None:
        self._batches, self._schema = batches, schema
        self._stops = np.cumsum([batch.num_rows for batch in batches])
        self._readers: dict[int, RecordReader] = {}
        self.nbytes = 0 if mapped else sum(batch.nbytes for batch in batches)

    def record(self, i: int, row: int) -> RasterInfo:
        k = int(np.searchsorted(self._stops, i, side="right"))
        reader = self._readers.get(k)
        if reader is None:
            reader = self._readers[k] = RecordReader(self._batches[k], self._schema)
        return reader.record(i - (int(self._stops[k - 1]) if k else 0), row)


def _mapped(path: Path) -> list[pa.RecordBatch]:
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    return [file.get_batch(k) for k in range(file.num_record_batches)]


def _copy_of(
    piece: RowGroup | TablePiece, names: Sequence[str], schema: pa.Schema, types: Sequence[str]
) -> Path | None:
    """The file that holds `piece`'s columns uncompressed, made where it is not there yet; None where it cannot be."""
    if piece.key is None:
        return None
    folder = cache_folder()
    if folder is None:
        return None
    facts = repr((_FORMAT, piece.key, names, types))
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:40]}.arrow"
    try:
        if path.exists():
            os.utime(path)
        else:
            _forget_old(folder)
            _write(path, piece.batches(names, schema, _BATCH))
    except OSError as error:
        _log.warning("No copy of a row group in %s (%s): it is held in this process's memory.", folder, error)
        return None
    return path


def _write(path: Path, batches: Iterator[pa.RecordBatch]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".arrow")
    try:
        first = next(batches)
        with os.fdopen(handle, "wb") as out, pa.ipc.new_file(out, first.schema) as sink:
            sink.write_batch(first)
            for batch in batches:
                sink.write_batch(batch)
            sink.close()
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _forget_old(folder: Path) -> None:
    oldest = time.time() - _KEEP_SECONDS
    for path in folder.glob("*.arrow"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
        except OSError:  # another process was faster
            continue
