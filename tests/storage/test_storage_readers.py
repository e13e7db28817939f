"""Every reader follows the protocol, and errors name file and reason."""

from __future__ import annotations

import asyncio
import errno
import os
import traceback
from pathlib import Path
from typing import Any

import pytest
from pixel_oracle import PATIENT

from rasteret_ml.errors import AccessDeniedError, FetchError, FetchNotFoundError, UsageError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage import local
from rasteret_ml.storage.http import HttpReader
from rasteret_ml.storage.local import LocalReader
from rasteret_ml.storage.open import SchemeReader, SigningReader, open_reader
from rasteret_ml.storage.reader import BackendReader, FetchLimits, RangeReader, RetryPolicy, as_reader
from rasteret_ml.telemetry import Meter
from rasteret_ml.testing import MemoryReader, RangeReaderSuite, RangeServer, RecordingReader

_ONCE = FetchLimits(retry=RetryPolicy(attempts=1), timeouts=PATIENT)


class _Slices:
    """A minimal backend: a dict of bytes."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.calls: list[tuple[str, int, int]] = []

    async def get_range(self, url: str, start: int, length: int) -> bytes:
        self.calls.append((url, start, length))
        return self.files[url][start : start + length]


class _ManyRanges:
    """A backend with only `get_ranges`."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    async def get_ranges(self, url: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        return [self.files[url][start : start + length] for start, length in ranges]


class _ObstoreLike:
    """A store addressed by the path in its bucket, as in obstore."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    async def get_range_async(self, path: str, *, start: int, length: int) -> bytes:
        return self.files[path][start : start + length]


class TestLocalReader(RangeReaderSuite):
    """Paths."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self) -> tuple[RangeReader, str, str]:
        (self.folder / "there.bin").write_bytes(self.content)
        return LocalReader(), str(self.folder / "there.bin"), str(self.folder / "nowhere.bin")


class TestFileUrl(TestLocalReader):
    """`file://` addresses, with a space in the name."""

    def make(self) -> tuple[RangeReader, str, str]:
        (self.folder / "a b.bin").write_bytes(self.content)
        return SchemeReader(_ONCE), (self.folder / "a b.bin").as_uri(), (self.folder / "c d.bin").as_uri()


class TestHttpReader(RangeReaderSuite):
    """HTTP on loopback."""

    @pytest.fixture(autouse=True)
    def _server(self, server: RangeServer, tmp_path: Path) -> None:
        (tmp_path / "there.bin").write_bytes(self.content)
        self.url = server.url

    def make(self) -> tuple[RangeReader, str, str]:
        return HttpReader(_ONCE), f"{self.url}/there.bin", f"{self.url}/nowhere.bin"


class TestSchemeReader(TestHttpReader):
    """The default reader."""

    def make(self) -> tuple[RangeReader, str, str]:
        return open_reader(_ONCE), f"{self.url}/there.bin", f"{self.url}/nowhere.bin"


class TestSigningReader(TestHttpReader):
    """A wrapper that changes only the address."""

    def make(self) -> tuple[RangeReader, str, str]:
        def sign(href: str) -> str:
            return href.replace("s3://bucket", self.url)

        return SigningReader(SchemeReader(_ONCE), sign), "s3://bucket/there.bin", "s3://bucket/nowhere.bin"


class TestMemoryReader(RangeReaderSuite):
    """Byte strings."""

    def make(self) -> tuple[RangeReader, str, str]:
        return MemoryReader({"mem://there": self.content}), "mem://there", "mem://nowhere"


class TestRecordingReader(RangeReaderSuite):
    """A wrapper that records calls."""

    def make(self) -> tuple[RangeReader, str, str]:
        return RecordingReader(MemoryReader({"there": self.content})), "there", "nowhere"


class TestBackendReader(RangeReaderSuite):
    """A caller's `get_range`."""

    def make(self) -> tuple[RangeReader, str, str]:
        return BackendReader(_Slices({"mem://there": self.content})), "mem://there", "mem://nowhere"


class TestBackendOfManyRanges(RangeReaderSuite):
    """A caller's `get_ranges`."""

    def make(self) -> tuple[RangeReader, str, str]:
        return BackendReader(_ManyRanges({"mem://there": self.content})), "mem://there", "mem://nowhere"


class TestObstoreBackend(RangeReaderSuite):
    """An obstore store of a bucket receives the key, without scheme, bucket and query."""

    def make(self) -> tuple[RangeReader, str, str]:
        return BackendReader(_ObstoreLike({"a/there.tif": self.content})), "s3://bucket/a/there.tif?x=1", "s3://b/no"


def test_the_suite_catches_a_reader_that_is_off_by_one() -> None:
    """The conformance suite fails for a reader whose ranges include the stop byte."""

    class OffByOne(MemoryReader):
        async def read(self, href: str, span: ByteRange) -> object:  # type: ignore[override]
            return await super().read(href, ByteRange(span.start, span.length + 1))

    class Suite(RangeReaderSuite):
        def make(self) -> tuple[RangeReader, str, str]:
            return OffByOne({"there": self.content}), "there", "nowhere"  # type: ignore[return-value]

    with pytest.raises(AssertionError):
        Suite().test_reads_exactly_the_range()


def test_local_errors_name_the_path_and_the_reason(tmp_path: Path) -> None:
    """A missing file, a folder and a range past the end are three errors that name the path."""
    (tmp_path / "ten.bin").write_bytes(b"0123456789")
    reader = LocalReader()
    for name, kind in [("no.bin", FetchNotFoundError), (".", AccessDeniedError), ("ten.bin", FetchError)]:
        with pytest.raises(kind, match=str(tmp_path)):
            asyncio.run(reader.read(str(tmp_path / name), ByteRange(10, 5)))


def test_local_tag_changes_when_the_file_does(tmp_path: Path) -> None:
    """A rewritten file of the same size has another ETag."""
    path = tmp_path / "a.bin"
    tags = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        if tags:
            stat = path.stat()
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
        tags.append(asyncio.run(LocalReader().read(str(path), ByteRange(0, 3))).etag)
    assert tags[0] != tags[1]


def test_readers_count_what_they_read(tmp_path: Path, server: RangeServer) -> None:
    """Local and HTTP reads add to the same meter: requests and body bytes."""
    (tmp_path / "a.bin").write_bytes(bytes(1000))
    meter = Meter()

    async def read() -> None:
        async with open_reader(meter=meter) as reader:
            await reader.read(str(tmp_path / "a.bin"), ByteRange(0, 100))
            await reader.read(f"{server.url}/a.bin", ByteRange(0, 23))

    asyncio.run(read())
    assert (meter.snapshot().requests, meter.snapshot().bytes_fetched) == (2, 123)


def test_a_backend_without_a_method_is_refused_at_once() -> None:
    """The message names the type and the required method."""
    with pytest.raises(UsageError, match=r"get_range.*dict"):
        as_reader({})


def test_a_reader_is_taken_as_it_is() -> None:
    """`as_reader` wraps backends only."""
    reader = MemoryReader({})
    assert as_reader(reader) is reader
    assert isinstance(as_reader(_Slices({})), BackendReader)


def test_a_backend_that_gives_too_much_is_an_error() -> None:
    """More bytes than requested are an error."""

    class Generous:
        async def get_range(self, url: str, start: int, length: int) -> bytes:
            return bytes(length + 1)

    with pytest.raises(FetchError, match=r"https://host/a\.tif.* gave 11 bytes"):
        asyncio.run(as_reader(Generous()).read("https://host/a.tif", ByteRange(0, 10)))


def test_a_backend_error_is_a_fetch_error_without_secrets() -> None:
    """Any exception of a backend is wrapped, and a signed URL in its text is redacted."""

    class Broken:
        async def get_range(self, url: str, start: int, length: int) -> bytes:
            raise RuntimeError(f"cannot open {url}")

    with pytest.raises(FetchError, match="backend failed to read bytes 0-9") as caught:
        asyncio.run(as_reader(Broken()).read("https://host/a.tif?sig=SECRET", ByteRange(0, 10)))
    assert "host/a.tif" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_backend_error_keeps_the_secret_in_a_traceback_too() -> None:
    """DataLoader workers log formatted tracebacks, which must not contain the signed address."""

    class Broken:
        async def get_range(self, url: str, start: int, length: int) -> bytes:
            raise RuntimeError(f"cannot open {url}")

    href = "https://host/a.tif?sig=SECRET"
    with pytest.raises(FetchError) as caught:
        asyncio.run(as_reader(Broken()).read(href, ByteRange(0, 10)))
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


def test_the_caller_keeps_the_backend() -> None:
    """Closing the wrapper does not close the caller's backend."""

    class Closable(_Slices):
        closed = False

        async def close(self) -> None:
            self.closed = True

    backend = Closable({"a": b"abc"})

    async def use() -> None:
        reader = BackendReader(backend)
        await reader.aclose()
        assert bytes((await reader.read("a", ByteRange(0, 3))).data) == b"abc"

    asyncio.run(use())
    assert not backend.closed


def _without_threads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record what is run in threads from now on."""
    hops: list[object] = []
    inner = asyncio.to_thread

    async def to_thread(*args: Any) -> Any:
        hops.append(args)
        return await inner(*args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    return hops


def test_what_is_in_memory_is_read_without_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was just written is in the page cache, if the system can tell."""
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 8)
    hops = _without_threads(monkeypatch)
    reader = LocalReader()
    got = asyncio.run(reader.read(str(path), ByteRange(100, 50)))
    assert got.data == (bytes(range(256)) * 8)[100:150]
    assert (hops == []) == (not reader._threaded)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_what_must_be_waited_for_is_read_on_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A file that is not cached (tried each time), and a file system that cannot tell (tried once)."""
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)))
    inner, asked = os.preadv, []

    def preadv(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags:
            asked.append(offset)
            raise OSError(code, "not now")
        return inner(descriptor, buffers, offset)

    monkeypatch.setattr(local, "_NO_WAIT", 8)
    monkeypatch.setattr(os, "preadv", preadv)
    hops = _without_threads(monkeypatch)
    reader = LocalReader()
    for _ in range(3):
        assert asyncio.run(reader.read(str(path), ByteRange(100, 1000))).data == bytes(range(100, 256))
    assert len(hops) == 3
    assert len(asked) == (3 if code == errno.EAGAIN else 1)


def test_a_read_that_comes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may return fewer bytes than requested, from memory or from disk."""
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)))
    inner = os.preadv
    monkeypatch.setattr(local, "_NO_WAIT", 8)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset, flags=0: inner(fd, [buffers[0][:7]], offset))
    assert asyncio.run(LocalReader().read(str(path), ByteRange(3, 200))).data == bytes(range(3, 203))
