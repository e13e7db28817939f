"""Turn headers into rows while other headers are still being read.

Once all headers of a group of `GROUP_RECORDS` records have arrived, it becomes Arrow columns on another thread and its
headers are dropped. Tile tables that do not fit in memory wait in a temporary file.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import pyarrow as pa

from rasteret_ml.collection.build.headers import OpenedFile
from rasteret_ml.collection.build.record_rows import RecordRows, SourceRecord, make_rows
from rasteret_ml.errors import RasteretError

GROUP_RECORDS = 256  #: Records that become Arrow columns together.
_MAX_CONCURRENT_GROUPS = 2
_MAX_MEMORY_BYTES = 256 * 1024 * 1024
_Columns = Mapping[str, pa.Array]
# Rows without tile tables, and a function that returns their tile tables.
_Group = tuple[RecordRows, Callable[[], _Columns]]


class TempStore:
    """Stores Arrow columns: in memory up to a limit, then in an unnamed temporary file. A context manager.

    The tile tables of a million scenes take ten gigabytes; memory-mapped, they pass through memory as they are written.
    The file is placed beside `out`, the path that is built, where as much space is needed anyway.
    """

    def __init__(self, out: str | os.PathLike[str], *, max_bytes: int = _MAX_MEMORY_BYTES) -> None:
        self._folder = next(p for p in Path(out).expanduser().absolute().parents if p.is_dir())
        self._free_bytes = max_bytes
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._map: pa.Buffer | None = None

    def add(self, columns: _Columns) -> Callable[[], _Columns]:
        """Store columns, which may block on the disk; the returned function reads them, once everything is stored."""
        with self._lock:
            self._free_bytes -= sum(column.nbytes for column in columns.values())
            if self._free_bytes >= 0:
                return lambda: columns
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by `__exit__`
            start = self._file.tell()
            batch = pa.record_batch(list(columns.values()), names=list(columns))
            with pa.ipc.new_stream(self._file, batch.schema) as stream:
                stream.write_batch(batch)
            self._file.write(bytes(-self._file.tell() % 64))  # Arrow arrays must be aligned
        return lambda: self._read(start)

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
        """Close the file; the system deletes it once no column read from it is left."""
        self._map = None
        if self._file is not None:
            self._file.close()


class TableBuilder:
    """Accepts headers in any order, and returns rows in the order of their records.

    `store` holds tile tables until `finish`; `strict`: raise the first failure instead of reporting it.
    """

    def __init__(self, records: Sequence[SourceRecord], store: TempStore, *, strict: bool = False) -> None:
        self._store = store
        self._strict = strict
        # Records of each group.
        self._records = [records[start : start + GROUP_RECORDS] for start in range(0, len(records), GROUP_RECORDS)]
        self._missing = [0] * len(self._records)  # Headers that each group is waiting for.
        self._group: dict[str, int] = {}  # The first group that needs the header of an href, usually the only one.
        self._shared: dict[str, list[int]] = {}  # All groups that still need the header of an href, if several do.
        self._opened: dict[str, OpenedFile | RasteretError] = {}
        self._rows: list[_Group | None] = [None] * len(self._records)
        self._slots = asyncio.Semaphore(_MAX_CONCURRENT_GROUPS)
        for group in range(len(self._records)):
            for href in self._hrefs_of(group):
                first = self._group.setdefault(href, group)
                if first != group:
                    self._shared.setdefault(href, [first]).append(group)
                self._missing[group] += 1

    def _hrefs_of(self, group: int) -> list[str]:
        hrefs = (asset.href for record in self._records[group] for asset in record.assets.values())
        return list(dict.fromkeys(hrefs))

    @property
    def hrefs(self) -> list[str]:
        """Distinct hrefs, in the order of the records."""
        return list(self._group)

    async def add(self, href: str, result: OpenedFile | RasteretError) -> None:
        """Add the header of a file, or the error of reading it; a group that is now complete becomes rows."""
        if self._strict and isinstance(result, RasteretError):
            raise result
        async with self._slots:
            pass  # wait if headers arrive faster than they become rows
        self._opened[href] = result
        for group in tuple(self._shared.get(href, [self._group[href]])):
            self._missing[group] -= 1
            if not self._missing[group]:
                async with self._slots:
                    await self._convert(group)

    async def finish(self) -> list[RecordRows]:
        """Return all rows, once every href has been added."""
        for group, done in enumerate(self._rows):
            if done is None:  # no record of the group has an href
                await self._convert(group)
        return [replace(done[0], metadata=done[1]()) for done in self._rows if done is not None]

    async def _convert(self, group: int) -> None:
        hrefs = self._hrefs_of(group)
        headers = {href: self._opened[href] for href in hrefs}
        for href in hrefs:
            shared = self._shared.get(href, [])
            if len(shared) > 1:
                shared.remove(group)
            else:
                del self._opened[href]
        rows, read_metadata = await asyncio.to_thread(self._make_rows, self._records[group], headers)
        if self._strict and rows.failures:
            raise rows.failures[0].error
        self._rows[group] = rows, read_metadata

    def _make_rows(self, records: Sequence[SourceRecord], headers: Mapping[str, OpenedFile | RasteretError]) -> _Group:
        rows = make_rows(records, headers)
        return replace(rows, metadata={}), self._store.add(rows.metadata)
