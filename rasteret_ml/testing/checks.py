"""Checks for any loader and any `RangeReader`, and readers for tests."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from rasteret_ml.errors import FetchError, FetchNotFoundError
from rasteret_ml.ranges import ByteRange
from rasteret_ml.storage.reader import RangeReader, RangeResponse


class MemoryReader:
    """Read from byte strings by URL."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = dict(files)

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        if href not in self._files:
            raise FetchNotFoundError(f"{href}: no such file.")
        data = self._files[href]
        if span.start >= len(data) > 0:
            raise FetchError(f"{href}: {span} starts past the end of the file ({len(data)} bytes).")
        return RangeResponse(data=data[span.start : span.stop], size=len(data))

    async def aclose(self) -> None:
        """Nothing to release."""


class RecordingReader:
    """Wrap a reader and record its calls."""

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.calls: list[tuple[str, ByteRange]] = []  #: (URL, range) of every read, in order.

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        self.calls.append((href, span))
        return await self._reader.read(href, span)

    async def aclose(self) -> None:
        """Close the wrapped reader."""
        await self._reader.aclose()


class RangeReaderSuite:
    """Tests of a `RangeReader`: subclass as `class TestMyReader(RangeReaderSuite)` and implement `make`."""

    content = bytes(range(256)) * 40  #: Content of the file that `make` provides.

    def make(self) -> tuple[RangeReader, str, str]:
        """Return a new reader, the URL of a file with `content`, and the URL of no file."""
        raise NotImplementedError

    def _read(self, *spans: ByteRange, missing: bool = False) -> list[bytes]:
        async def run() -> list[bytes]:
            reader, url, missing_url = self.make()
            try:
                found = [await reader.read(missing_url if missing else url, span) for span in spans]
                assert all(response.size in (None, len(self.content)) for response in found)
                return [bytes(response.data) for response in found]
            finally:
                await reader.aclose()

        return asyncio.run(run())

    def _is_refused(self, span: ByteRange, *, missing: bool = False) -> bool:
        try:
            self._read(span, missing=missing)
        except FetchError:
            return True
        return False

    def test_reads_exactly_the_range(self) -> None:
        """At the start, in the middle and at the end."""
        n = len(self.content)
        spans = [ByteRange(0, 1), ByteRange(17, 500), ByteRange(n - 3, 3), ByteRange(0, n)]
        assert self._read(*spans) == [self.content[s.start : s.stop] for s in spans]

    def test_a_range_past_the_end_comes_back_short(self) -> None:
        """The first request of a header may be larger than the file."""
        n = len(self.content)
        assert self._read(ByteRange(n - 10, 1000)) == [self.content[-10:]]

    def test_a_missing_file_is_a_fetch_error(self) -> None:
        """Not another error, and no data."""
        assert self._is_refused(ByteRange(0, 10), missing=True), "a missing file was read"

    def test_a_range_beyond_the_end_is_a_fetch_error(self) -> None:
        """There are no bytes to return."""
        assert self._is_refused(ByteRange(len(self.content) + 5, 10)), "bytes past the end were read"


_MAX_STATE_BYTES = 1024  # Of a state as JSON.


def batch_digest(batch: Mapping[str, Any]) -> str:
    """Return a digest of the keys of a batch, and of the dtype, shape and bytes of its tensors."""
    sha = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        sha.update(key.encode())
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous().numpy()
            sha.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()


def check_resume(
    make: Callable[[], Any],
    *,
    make_resumed: Callable[[], Any] | None = None,
    epochs: int = 2,
    stops: Iterable[int] | None = None,
) -> int:
    """Stop a loader, restore its state in another, and compare the rest with an uninterrupted run.

    Args:
        make: Makes the loader that is stopped; all that it makes must be alike.
        make_resumed: Makes the loader that resumes, which may have other workers; default `make`.
        epochs: Epochs of the whole run.
        stops: Numbers of batches, counted over all epochs, after which to stop; default all, 0 included.

    Returns:
        The number of stops.

    Raises:
        AssertionError: the rest differs, an epoch has no batches, or a state takes 1 kB or more.
    """
    loader = make()
    digests: list[str] = []
    states, ends = [loader.state_dict()], set()
    for _ in range(epochs):
        for batch in loader:
            digests.append(batch_digest(batch))
            states.append(loader.state_dict())
        ends.add(len(digests))
    positions = sorted(set(range(len(digests) + 1) if stops is None else stops))
    for position in positions:
        text = json.dumps(states[position])
        assert len(text) < _MAX_STATE_BYTES, f"a state of {len(text)} bytes: {text}"
        loader = (make_resumed or make)()
        loader.load_state_dict(json.loads(text))
        rest: list[str] = []
        while len(rest) < len(digests) - position:
            before = len(rest)
            rest += [batch_digest(batch) for batch in loader]
            # Resumed at the end of an epoch, a loader has no batches left in it.
            assert len(rest) > before or position + before in ends, "an epoch without a batch"
        assert rest == digests[position:], f"resumed after batch {position}, the rest differs (state {text})"
    return len(positions)
