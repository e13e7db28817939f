"""Many headers at once: one request each, hundreds in flight, bounded memory."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from affine import Affine

from rasteret_ml.cog.header.ifd import SparseFile
from rasteret_ml.cog.header.parse import CogHeader, parse_header
from rasteret_ml.collection.build import headers, table_builder
from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.headers import HeaderParser, OpenedFile, read_header, read_headers
from rasteret_ml.collection.build.record_rows import SourceAsset, SourceRecord, join_rows
from rasteret_ml.collection.build.table_builder import TableBuilder, TempStore
from rasteret_ml.errors import CorruptTiffError, NotATiffError, RasteretError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.testing import MemoryReader, RangeServer, RecordingReader, make_cog


@pytest.fixture(scope="module")
def cog(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with overviews."""
    path = tmp_path_factory.mktemp("cog") / "a.tif"
    data = np.random.default_rng(0).integers(1, 9, (1, 1024, 1024), np.uint16)
    return Path(make_cog(path, data, nodata=0)).read_bytes()


def names(count: int) -> list[str]:
    """URLs of `count` files."""
    return [f"https://h/s{i:04}_20240101.tif" for i in range(count)]


class Gate:
    """A reader that blocks until `width` reads are waiting, and counts reads and tasks."""

    def __init__(self, content: bytes, width: int) -> None:
        self.content, self.width = content, width
        self.inside = self.most = self.tasks = self.started = 0
        self.full: asyncio.Event | None = None

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        self.full = self.full or asyncio.Event()
        self.started += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.tasks = max(self.tasks, len(asyncio.all_tasks()))
        if self.inside >= self.width:
            self.full.set()
        await self.full.wait()
        self.inside -= 1
        return RangeResponse(data=self.content[span.start : span.stop], size=len(self.content))

    async def aclose(self) -> None:
        """Nothing to release."""


def test_each_file_costs_one_request(cog: bytes, tmp_path: Path) -> None:
    """Exactly one, also if two records share a file."""
    reader = RecordingReader(MemoryReader(dict.fromkeys(names(40), cog)))
    build(names(40), tmp_path / "c.parquet", backend=reader)
    assert reader.calls == [(href, ByteRange(0, headers.FIRST_BYTES)) for href in names(40)]
    shared = RecordingReader(MemoryReader({"https://h/s.tif": cog}))
    table = pa.table({"id": ["a", "b"], "B1": ["https://h/s.tif"] * 2})
    assert len(build(table, tmp_path / "d.parquet", bands=["B1"], backend=shared)) == 2
    assert len(shared.calls) == 1


def test_max_concurrent_reads_are_in_flight(cog: bytes, tmp_path: Path) -> None:
    """The gate opens only if 200 reads wait at once; there are not as many tasks as files."""
    gate = Gate(cog, 200)
    collection = build(names(500), tmp_path / "c.parquet", backend=gate, max_concurrent=200)
    assert len(collection) == 500
    assert gate.most == 200
    assert gate.tasks <= 200 + 2


def test_a_connection_for_each_header_in_flight(tmp_path: Path, cog: bytes) -> None:
    """All 100 requests reach the server before it answers the first (the reader's default is 64)."""
    (tmp_path / "in").mkdir()
    for i in range(100):
        (tmp_path / "in" / f"{i}.tif").write_bytes(cog)

    class Together(RangeServer):
        """Answers no request until 100 have arrived."""

        waiting = 0
        open: asyncio.Event | None = None

        async def _respond(self, request: Any) -> Any:
            self.open = self.open or asyncio.Event()
            self.waiting += 1
            if self.waiting >= 100:
                self.open.set()
            await self.open.wait()
            return await super()._respond(request)

    with Together(tmp_path / "in") as server:
        build([f"{server.url}/{i}.tif" for i in range(100)], tmp_path / "c.parquet", max_concurrent=100)
        assert server.waiting == 100


def test_a_slow_consumer_slows_reading(cog: bytes) -> None:
    """Backpressure: at most `max_concurrent` files wait for `on_result`."""
    gate = Gate(cog, 1)

    async def main() -> int:
        done = asyncio.Event()
        results = 0

        async def on_result(href: str, result: OpenedFile | RasteretError) -> None:
            nonlocal results
            results += 1
            if results == 8:
                done.set()
            await asyncio.Event().wait()

        work = asyncio.ensure_future(
            read_headers(gate, names(100), on_result, sidecars=False, max_concurrent=8, progress=False)
        )
        await done.wait()
        started = gate.started
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        return started

    assert asyncio.run(main()) == 8


class Backwards:
    """A reader that answers its callers in the opposite order, a batch at a time."""

    def __init__(self, files: dict[str, bytes], batch: int) -> None:
        self._files, self._batch = files, batch
        self._waiting: list[asyncio.Event] = []
        self._left = len(files)

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        mine = asyncio.Event()
        self._waiting.append(mine)
        self._left -= 1
        if len(self._waiting) == self._batch or not self._left:
            self._waiting.pop().set()
        await mine.wait()
        if self._waiting:
            self._waiting.pop().set()
        data = self._files[href]
        return RangeResponse(data=data[span.start : span.stop], size=len(data))

    async def aclose(self) -> None:
        """Nothing to release."""


@pytest.mark.parametrize("group", [1, 4, 1000])
def test_rows_keep_their_order(cog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Whatever header arrives first, rows and failures keep the order of the source."""
    monkeypatch.setattr(table_builder, "GROUP_RECORDS", group)
    files = dict.fromkeys(names(30), cog) | {names(30)[i]: b"hello" for i in (3, 17)}
    collection = build(names(30), tmp_path / "c.parquet", backend=Backwards(files, 7), max_concurrent=7)
    good = [name[10:-4] for i, name in enumerate(names(30)) if i not in (3, 17)]
    assert pq.read_table(tmp_path / "c.parquet")["id"].to_pylist() == good
    failures = collection.report.failures  # type: ignore[attr-defined]
    assert [(f.record, type(f.error)) for f in failures] == [(names(30)[i][10:-4], NotATiffError) for i in (3, 17)]
    assert all(names(30)[3] in str(f.error) for f in failures[:1])


def test_strict_stops_at_the_first_failure(cog: bytes, tmp_path: Path) -> None:
    """Files that have not been started are not read."""
    files = dict.fromkeys(names(100), cog) | {names(100)[2]: b"hello"}
    reader = RecordingReader(MemoryReader(files))
    with pytest.raises(NotATiffError, match="s0002"):
        build(names(100), tmp_path / "c.parquet", backend=reader, max_concurrent=4, strict=True)
    assert len(reader.calls) < 100


def mixed_records(count: int) -> list[SourceRecord]:
    """Records with one band, two or none, in their own files or a shared one."""
    made = []
    for i in range(count):
        bands = {"red": SourceAsset(href=f"https://h/{i}.tif")}
        if i % 3 == 0:
            bands["nir"] = SourceAsset(href="https://h/shared.tif", scale=0.5, nodata=7)
        if i % 7 == 5:
            bands = {}
        made.append(SourceRecord(id=str(i), assets=bands, properties={"n": i} if i % 2 else {"n": "text"}))
    return made


def outcomes(cog: bytes, tmp_path: Path, records: Sequence[SourceRecord]) -> dict[str, OpenedFile | RasteretError]:
    """A header for each href, in several CRSs; some are errors."""
    found: dict[str, OpenedFile | RasteretError] = {}
    opened = []
    for epsg in (32601, 32633, 4326, None):
        crs = None if epsg is None else f"EPSG:{epsg}"
        path = tmp_path / f"{epsg}.tif"
        size = 0.001 if epsg == 4326 else 60.0
        x, y = (10.0, 50.0) if epsg == 4326 else (399960.0, 5000040.0)
        transform = Affine(size, 0, x, 0, -size, y)
        make_cog(path, np.ones((1, 1024, 1024), np.uint8), crs=crs, transform=transform)
        opened.append(asyncio.run(read_header(MemoryReader({"a": path.read_bytes()}), "a")))
    for i, href in enumerate(dict.fromkeys(a.href for r in records for a in r.assets.values())):
        found[href] = CorruptTiffError(f"{href}: broken") if i % 11 == 4 else opened[i % 4]
    return found


def table_of(
    records: Sequence[SourceRecord], headers: dict[str, OpenedFile | RasteretError], store: TempStore
) -> tuple[pa.Table, list[str]]:
    """The table and failures of adding all results in some order."""

    async def main() -> tuple[pa.Table, list[str]]:
        builder = TableBuilder(records, store)
        assert sorted(builder.hrefs) == sorted(headers)
        for href in sorted(builder.hrefs, key=hash):
            await builder.add(href, headers[href])
        groups = await builder.finish()
        table = join_rows(groups, name="x", data_source="")
        return table, [str(failure) for group in groups for failure in group.failures]

    return asyncio.run(main())


def test_group_size_does_not_change_the_table(cog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same table for any group size, in memory or through the temporary file."""
    records = mixed_records(60)
    found = outcomes(cog, tmp_path, records)
    expected: tuple[pa.Table, list[str]] | None = None
    for group in (1, 7, 1000):
        for max_bytes in (0, 1 << 40):
            monkeypatch.setattr(table_builder, "GROUP_RECORDS", group)
            with TempStore(tmp_path / "c.parquet", max_bytes=max_bytes) as store:
                table, failures = table_of(records, found, store)
            table.validate(full=True)
            expected = expected or (table, failures)
            assert table.combine_chunks().equals(expected[0].combine_chunks())
            assert failures == expected[1]
    assert expected is not None
    assert {"red_metadata", "nir_metadata"} <= set(expected[0].column_names)
    assert any("broken" in failure for failure in expected[1])
    assert any("no address" in failure for failure in expected[1])
    assert list(tmp_path.glob(".*")) == []


def test_a_build_that_exceeds_memory_writes_the_same_file(
    cog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary file changes nothing in the result, and is removed."""
    reader = MemoryReader(dict.fromkeys(names(20), cog))
    build(names(20), tmp_path / "a.parquet", backend=reader)
    monkeypatch.setattr(table_builder, "GROUP_RECORDS", 3)
    monkeypatch.setattr(TempStore.__init__, "__kwdefaults__", {"max_bytes": 0})
    build(names(20), tmp_path / "b.parquet", backend=reader)
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


@pytest.mark.slow
def test_headers_are_dropped_once_they_are_rows(cog: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the headers of groups being converted and of files in flight are alive, not those of all 200 files."""
    monkeypatch.setattr(table_builder, "GROUP_RECORDS", 5)
    alive: weakref.WeakSet[OpenedFile] = weakref.WeakSet()
    inner = table_builder.make_rows

    def slowly(*args: Any) -> Any:
        for _ in range(50):  # let other threads run
            inner(*args)
        return inner(*args)

    monkeypatch.setattr(table_builder, "make_rows", slowly)
    most = 0
    records = [SourceRecord(id=str(i), assets={"b": SourceAsset(href=href)}) for i, href in enumerate(names(200))]
    builder = TableBuilder(records, TempStore(tmp_path / "c.parquet"))

    class Watched(OpenedFile):
        """Supports weak references."""

    async def on_result(href: str, result: OpenedFile | RasteretError) -> None:
        nonlocal most
        assert isinstance(result, OpenedFile)
        watched = Watched(header=result.header, size=result.size, etag=result.etag)
        alive.add(watched)
        most = max(most, len(alive))
        await builder.add(href, watched)

    reader = MemoryReader(dict.fromkeys(names(200), cog))
    asyncio.run(read_headers(reader, names(200), on_result, sidecars=False, max_concurrent=3, progress=False))
    gc.collect()
    assert most <= 5 * (2 + 1) + 2 * 3
    assert len(alive) == 0


def test_parsing_happens_off_the_loop_in_batches(cog: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting headers are parsed together on another thread, each with its own outcome."""
    threads: list[int] = []
    batches: list[int] = []
    inner = headers._parse_all

    def parse_all(files: Sequence[SparseFile]) -> list[CogHeader | Exception]:
        threads.append(threading.get_ident())
        batches.append(len(files))
        return inner(files)

    monkeypatch.setattr(headers, "_parse_all", parse_all)

    async def main() -> list[CogHeader | BaseException]:
        parser = HeaderParser()
        files = [SparseFile(len(cog)) for _ in range(9)]
        for i, file in enumerate(files):
            file.add(0, b"hello" * 10 if i == 4 else cog)
        return await asyncio.gather(*(parser.parse(file) for file in files), return_exceptions=True)

    found = asyncio.run(main())
    assert [type(outcome) for outcome in found] == [NotATiffError if i == 4 else CogHeader for i in range(9)]
    assert threading.get_ident() not in threads
    assert batches == [1, 8]


def test_a_bug_in_the_parser_is_not_hidden(cog: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches every waiting caller, and the next file is parsed."""
    monkeypatch.setattr(headers, "_parse_all", lambda files: 1 / 0)

    async def main() -> None:
        parser = HeaderParser()
        file = SparseFile(len(cog))
        file.add(0, cog)
        with pytest.raises(ZeroDivisionError):
            await parser.parse(file)
        monkeypatch.setattr(headers, "_parse_all", lambda files: [parse_header(file) for file in files])
        assert (await parser.parse(file)).count == 1

    asyncio.run(main())


def test_cancelling_one_read_leaves_the_others(cog: bytes) -> None:
    """The others of its batch get their headers."""

    async def main() -> int:
        parser = HeaderParser()
        files = [SparseFile(len(cog)) for _ in range(3)]
        for file in files:
            file.add(0, cog)
        tasks = [asyncio.ensure_future(parser.parse(file)) for file in files]
        await asyncio.sleep(0)
        tasks[1].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[1], asyncio.CancelledError)
        return sum(isinstance(outcome, CogHeader) for outcome in found)

    assert asyncio.run(main()) == 2
