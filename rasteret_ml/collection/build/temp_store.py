"""Tile tables that are not needed until the end wait on disk, past a bound."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import pyarrow as pa

__all__ = ["TempStore"]

_MOST_IN_MEMORY = 256 * 1024 * 1024
_Columns = Mapping[str, pa.Array]


class TempStore:
    """Keeps columns: in memory up to a bound, then in a nameless file, mapped to read them back. A context manager.

    A million scenes have ten gigabytes of tile tables. Mapped, they pass through memory as they are written.
    """

    def __init__(self, out: str | os.PathLike[str], *, most: int = _MOST_IN_MEMORY) -> None:
        """Prepare to keep up to `most` bytes in memory; the file lies beside `out`, where as much room is needed."""
        self._folder = next(p for p in Path(out).expanduser().absolute().parents if p.is_dir())
        self._left = most
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._map: pa.Buffer | None = None

    def keep(self, columns: _Columns) -> Callable[[], _Columns]:
        """A function that gives `columns` back, to be called once all are kept. May write: call it off the loop."""
        if not columns:
            return lambda: columns
        with self._lock:
            self._left -= sum(column.nbytes for column in columns.values())
            if self._left >= 0:
                return lambda: columns
            start = self._write(columns)
        return lambda: self._read(start)

    def _write(self, columns: _Columns) -> int:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by `__exit__`
        start = self._file.tell()
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        with pa.ipc.new_stream(self._file, batch.schema) as stream:
            stream.write_batch(batch)
        self._file.write(bytes(-self._file.tell() % 64))  # Arrow wants its arrays aligned
        return start

    def _read(self, start: int) -> _Columns:
        assert self._file is not None
        if self._map is None:
            self._file.flush()
            self._map = pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        batch = pa.ipc.open_stream(self._map.slice(start)).read_next_batch()
        return dict(zip(batch.schema.names, batch.columns, strict=True))

    def __enter__(self) -> TempStore:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the file; it is gone once the columns that were read from it are."""
        self._map = None
        if self._file is not None:
            self._file.close()
