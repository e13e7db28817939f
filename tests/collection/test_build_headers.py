"""Many headers at once: one request each, hundreds in flight, nothing held for longer than it is needed."""

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

from rasteret_ml.cog.header.parse import CogHeader, parse_header
from rasteret_ml.cog.header.sparse_file import SparseFile
from rasteret_ml.collection.build import assembly, headers
from rasteret_ml.collection.build.assembly import Assembly
from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.build.draft import AssetDraft, RecordDraft
from rasteret_ml.collection.build.headers import HeaderParser, OpenedFile, read_header, read_headers
from rasteret_ml.collection.build.row_groups import groups_to_table
from rasteret_ml.collection.build.temp_store import TempStore
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
    """Addresses of so many files."""
    return [f"https://h/s{i:04}_20240101.tif" for i in range(count)]


class Gate:
    """A reader that lets nobody through until `width` reads wait, and counts them and the tasks there are."""

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
    """And one only, also where two records share a file."""
    reader = RecordingReader(MemoryReader(dict.fromkeys(names(40), cog)))
    build(names(40), tmp_path / "c.parquet", backend=reader)
    assert reader.calls == [(href, ByteRange(0, headers.FIRST_BYTES)) for href in names(40)]
    shared = RecordingReader(MemoryReader({"https://h/s.tif": cog}))
    table = pa.table({"id": ["a", "b"], "B1": ["https://h/s.tif"] * 2})
    assert len(build(table, tmp_path / "d.parquet", bands=["B1"], backend=shared)) == 2
    assert len(shared.calls) == 1


def test_hundreds_are_in_flight_and_no_more_than_that(cog: bytes, tmp_path: Path) -> None:
    """The gate opens only if 200 reads wait together; there is no task for each of 500 files."""
    gate = Gate(cog, 200)
    collection = build(names(500), tmp_path / "c.parquet", backend=gate, max_concurrent=200)
    assert len(collection) == 500
    assert gate.most == 200
    assert gate.tasks <= 200 + 2


def test_a_connection_for_each_header_in_flight(tmp_path: Path, cog: bytes) -> None:
    """All 100 requests reach the server before it answers the first (the reader's own default is 64)."""
    (tmp_path / "in").mkdir()
    for i in range(100):
        (tmp_path / "in" / f"{i}.tif").write_bytes(cog)

    class Together(RangeServer):
        """Holds every answer until 100 are asked for."""

        waiting = 0
        open: asyncio.Event | None = None

        async def _answer(self, request: Any) -> Any:
            self.open = self.open or asyncio.Event()
            self.waiting += 1
            if self.waiting >= 100:
                self.open.set()
            await self.open.wait()
            return await super()._answer(request)

    with Together(tmp_path / "in") as server:
        build([f"{server.url}/{i}.tif" for i in range(100)], tmp_path / "c.parquet", max_concurrent=100)
        assert server.waiting == 100


def test_nothing_is_read_while_rows_are_not_taken(cog: bytes) -> None:
    """Backpressure: whoever takes slowly has `max_concurrent` files waiting, not all of them."""
    gate = Gate(cog, 1)

    async def main() -> int:
        done = asyncio.Event()
        taken = 0

        async def take(href: str, result: OpenedFile | RasteretError) -> None:
            nonlocal taken
            taken += 1
            if taken == 8:
                done.set()
            await asyncio.Event().wait()

        work = asyncio.ensure_future(
            read_headers(gate, names(100), take, sidecars=False, max_concurrent=8, progress=False)
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
    """Whatever comes first: records stand as they were given, and a broken one is listed in its place."""
    monkeypatch.setattr(assembly, "GROUP", group)
    files = dict.fromkeys(names(30), cog) | {names(30)[i]: b"hello" for i in (3, 17)}
    collection = build(names(30), tmp_path / "c.parquet", backend=Backwards(files, 7), max_concurrent=7)
    good = [name[10:-4] for i, name in enumerate(names(30)) if i not in (3, 17)]
    assert pq.read_table(tmp_path / "c.parquet")["id"].to_pylist() == good
    failures = collection.report.failures  # type: ignore[attr-defined]
    assert [(f.record, type(f.error)) for f in failures] == [(names(30)[i][10:-4], NotATiffError) for i in (3, 17)]
    assert all(names(30)[3] in str(f.error) for f in failures[:1])


def test_strict_stops_at_the_first_failure(cog: bytes, tmp_path: Path) -> None:
    """Files that were not begun are not read any more."""
    files = dict.fromkeys(names(100), cog) | {names(100)[2]: b"hello"}
    reader = RecordingReader(MemoryReader(files))
    with pytest.raises(NotATiffError, match="s0002"):
        build(names(100), tmp_path / "c.parquet", backend=reader, max_concurrent=4, strict=True)
    assert len(reader.calls) < 100


def drafts_of_all_kinds(count: int) -> list[RecordDraft]:
    """Records with one band or two, with a file of their own or a shared one, some without any."""
    made = []
    for i in range(count):
        bands = {"red": AssetDraft(href=f"https://h/{i}.tif")}
        if i % 3 == 0:
            bands["nir"] = AssetDraft(href="https://h/shared.tif", scale=0.5, nodata=7)
        if i % 7 == 5:
            bands = {}
        made.append(RecordDraft(id=str(i), assets=bands, properties={"n": i} if i % 2 else {"n": "text"}))
    return made


def outcomes(cog: bytes, tmp_path: Path, drafts: Sequence[RecordDraft]) -> dict[str, OpenedFile | RasteretError]:
    """A header for each address, in several CRSs; some are errors."""
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
    for i, href in enumerate(dict.fromkeys(a.href for d in drafts for a in d.assets.values())):
        found[href] = CorruptTiffError(f"{href}: broken") if i % 11 == 4 else opened[i % 4]
    return found


def table_of(
    drafts: Sequence[RecordDraft], found: dict[str, OpenedFile | RasteretError], keep: TempStore
) -> tuple[pa.Table, list[str]]:
    """What comes of taking all results in some order."""

    async def main() -> tuple[pa.Table, list[str]]:
        made = Assembly(drafts, keep)
        assert sorted(made.hrefs) == sorted(found)
        for href in sorted(made.hrefs, key=hash):
            await made.take(href, found[href])
        groups = await made.finish()
        table = groups_to_table(groups, name="x", data_source="")
        return table, [str(failure) for group in groups for failure in group.failures]

    return asyncio.run(main())


def test_groups_do_not_show(cog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same table whether records become columns one by one or together, in memory or by way of the disk."""
    drafts = drafts_of_all_kinds(60)
    found = outcomes(cog, tmp_path, drafts)
    expected: tuple[pa.Table, list[str]] | None = None
    for group in (1, 7, 1000):
        for most in (0, 1 << 40):
            monkeypatch.setattr(assembly, "GROUP", group)
            with TempStore(tmp_path / "c.parquet", most=most) as keep:
                table, failures = table_of(drafts, found, keep)
            table.validate(full=True)
            expected = expected or (table, failures)
            assert table.combine_chunks().equals(expected[0].combine_chunks())
            assert failures == expected[1]
    assert expected is not None
    assert {"red_metadata", "nir_metadata"} <= set(expected[0].column_names)
    assert any("broken" in failure for failure in expected[1])
    assert any("no address" in failure for failure in expected[1])
    assert list(tmp_path.glob(".*")) == []


def test_what_waits_on_disk_is_written_whole(cog: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build past the bound gives the same file as one within it, and leaves nothing behind."""
    reader = MemoryReader(dict.fromkeys(names(20), cog))
    build(names(20), tmp_path / "a.parquet", backend=reader)
    monkeypatch.setattr(assembly, "GROUP", 3)
    monkeypatch.setattr(TempStore.__init__, "__kwdefaults__", {"most": 0})
    build(names(20), tmp_path / "b.parquet", backend=reader)
    assert pq.read_table(tmp_path / "a.parquet").equals(pq.read_table(tmp_path / "b.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


@pytest.mark.slow
def test_headers_are_forgotten_once_they_are_rows(cog: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 200 files, never more headers are alive than the groups at work and the files in flight have."""
    monkeypatch.setattr(assembly, "GROUP", 5)
    alive: weakref.WeakSet[OpenedFile] = weakref.WeakSet()
    inner = assembly.make_group

    def slowly(*args: Any) -> Any:
        for _ in range(50):  # other threads have their turn
            inner(*args)
        return inner(*args)

    monkeypatch.setattr(assembly, "make_group", slowly)
    most = 0
    drafts = [RecordDraft(id=str(i), assets={"b": AssetDraft(href=href)}) for i, href in enumerate(names(200))]
    made = Assembly(drafts, TempStore(tmp_path / "c.parquet"))

    class Watched(OpenedFile):
        """One that can be referred to weakly."""

    async def take(href: str, result: OpenedFile | RasteretError) -> None:
        nonlocal most
        assert isinstance(result, OpenedFile)
        watched = Watched(header=result.header, size=result.size, etag=result.etag)
        alive.add(watched)
        most = max(most, len(alive))
        await made.take(href, watched)

    reader = MemoryReader(dict.fromkeys(names(200), cog))
    asyncio.run(read_headers(reader, names(200), take, sidecars=False, max_concurrent=3, progress=False))
    gc.collect()
    assert most <= 5 * (2 + 1) + 2 * 3
    assert len(alive) == 0


def test_parsing_happens_off_the_loop_in_batches(cog: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits together is parsed in one hop, on another thread, each with its own outcome."""
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
    """It reaches everybody who waits, and the next file is parsed."""
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


def test_who_stops_waiting_stops_nobody_else(cog: bytes) -> None:
    """A cancelled read leaves the others of its batch."""

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
