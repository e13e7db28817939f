"""No tile is read twice at a time, or ever where a cache holds it; whatever happens to whom, pixels are right."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import assert_chip, build_one, run, window_by_rasterio
from property_settings import examples

from rasteret_ml.errors import FetchError, FileChangedError, ReadError
from rasteret_ml.geo.grid import Window
from rasteret_ml.ranges import ByteRange, CoalesceLimits
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.assemble import allocate, finish_chip
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import ExecuteResult, execute
from rasteret_ml.raster.jobs import copy_tile, tile_jobs
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.tile_cache import TileCache
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.telemetry import Meter
from rasteret_ml.testing import MemoryReader, RecordingReader, make_cog

_TILE, _SIDE = 64, 256
_TILE_BYTES = 2 * _TILE * _TILE * 2
_APART = CoalesceLimits(gap=0, touching=0)


class GatedReader(RecordingReader):
    """Answers only once the gate is open."""

    def __init__(self, reader: MemoryReader) -> None:
        super().__init__(reader)
        self.gate = asyncio.Event()

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        """See `RangeReader.read`."""
        self.calls.append((href, span))
        await self.gate.wait()
        return await self._reader.read(href, span)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RasterAccessor, MemoryReader]:
    """Two bands that share their 4 x 4 tiles."""
    folder = tmp_path_factory.mktemp("store")
    data = np.random.default_rng(7).integers(0, 65535, (2, _SIDE, _SIDE), dtype=np.uint16)
    path = make_cog(folder / "scene.tif", data, blocksize=_TILE)
    return path, build_one(path, folder), MemoryReader({path: Path(path).read_bytes()})


def _plan(record: RasterAccessor, window: tuple[int, int, int, int], bands: tuple[str, ...] = ("B1", "B2")) -> ChipPlan:
    row, col, height, width = window
    return record.plan(record.grid("B1").window(Window(row=row, col=col, height=height, width=width)), bands)


_WINDOWS = st.tuples(st.integers(-20, 250), st.integers(-20, 250), st.integers(1, 120), st.integers(1, 120))


@examples(60, database=None)
@given(
    batches=st.lists(st.lists(_WINDOWS, min_size=1, max_size=3), min_size=1, max_size=4),
    cache=st.sampled_from([0, 3 * _TILE_BYTES, 10**9]),
    gather_or_cancel=st.booleans(),
)
def test_any_batches_at_once_or_in_turn_with_any_cache_are_right(
    scene: Any, batches: list[list[tuple[int, int, int, int]]], cache: int, gather_or_cancel: bool
) -> None:
    """Pixels equal rasterio's; tiles counted once each: decoded, shared or kept; a large cache decodes each once."""
    path, record, memory = scene
    meter, reader = Meter(), RecordingReader(memory)

    async def main() -> list[ExecuteResult]:
        engine = Engine(reader=reader, tiles=TileCache(cache), meter=meter, coalesce=_APART)
        works = [execute([_plan(record, w) for w in windows], engine) for windows in batches]
        if gather_or_cancel:
            return list(await asyncio.gather(*works))
        return [await work for work in works]

    results = run(main())
    for windows, result in zip(batches, results, strict=True):
        for window, chip in zip(windows, result.chips, strict=True):
            assert_chip(chip, *window_by_rasterio(path, window))
    stats = meter.snapshot()
    wanted = [_tiles_of(windows) for windows in batches]
    assert stats.tiles_decoded + stats.tiles_shared + stats.cache_hits == sum(map(len, wanted))
    assert stats.tiles_decoded == len(reader.calls)
    if cache == 10**9 or gather_or_cancel:
        assert stats.tiles_decoded >= len(set().union(*wanted))
    if cache == 10**9 and not gather_or_cancel:
        assert stats.tiles_decoded == len(set().union(*wanted))
    if not cache:
        assert stats.cache_hits == 0


def _tiles_of(windows: list[tuple[int, int, int, int]]) -> set[tuple[int, int]]:
    found = set()
    for row, col, height, width in windows:
        rows = range(max(row, 0) // _TILE, (min(row + height, _SIDE) - 1) // _TILE + 1)
        cols = range(max(col, 0) // _TILE, (min(col + width, _SIDE) - 1) // _TILE + 1)
        found |= {(r, c) for r in rows for c in cols}
    return found


def test_a_batch_joins_what_another_one_is_reading(scene: Any) -> None:
    """One request for both; other rows and another band of the tile are served as well."""
    path, record, memory = scene

    async def main() -> tuple[ExecuteResult, ExecuteResult]:
        reader, meter = GatedReader(memory), Meter()
        engine = Engine(reader=reader, meter=meter)
        first = asyncio.create_task(execute([_plan(record, (0, 0, 5, 64), ("B2",))], engine))
        await _until(lambda: reader.calls)
        second = asyncio.create_task(execute([_plan(record, (50, 3, 14, 9), ("B1",))], engine))
        await _until(lambda: sum(len(f.copies) for f in engine.tiles._in_flight.values()) == 2)
        reader.gate.set()
        both = await first, await second
        assert len(reader.calls) == 1
        assert (meter.snapshot().tiles_decoded, meter.snapshot().tiles_shared) == (1, 1)
        assert not engine.tiles._in_flight
        return both

    one, other = run(main())
    assert_chip(one.chips[0], *window_by_rasterio(path, (0, 0, 5, 64), [2]))
    assert_chip(other.chips[0], *window_by_rasterio(path, (50, 3, 14, 9), [1]))


async def _until(true: Any) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0)


@pytest.mark.parametrize("running", [True, False], ids=["while it fetches", "before it begins"])
def test_who_joined_a_batch_that_gives_up_reads_for_itself(scene: Any, running: bool) -> None:
    """Cancelling a batch does not hurt another one that waits for its tiles."""
    path, record, memory = scene
    windows = [(0, 0, 10, 10), (0, 70, 10, 10)]

    async def main() -> ExecuteResult:
        reader = GatedReader(memory)
        engine = Engine(reader=reader, coalesce=_APART)
        first = asyncio.create_task(execute([_plan(record, w) for w in windows], engine))
        await _until(lambda: len(reader.calls) == 2 if running else engine.tiles._in_flight)
        second = asyncio.create_task(execute([_plan(record, w) for w in windows], engine))
        await _until(lambda: all(len(f.copies) == 4 for f in engine.tiles._in_flight.values()))
        first.cancel()
        reader.gate.set()
        result = await second
        assert first.cancelled()
        assert not engine.tiles._in_flight
        return result

    result = run(main())
    for window, chip in zip(windows, result.chips, strict=True):
        assert_chip(chip, *window_by_rasterio(path, window))


def test_a_failure_is_everybodys_who_wanted_the_tile(scene: Any) -> None:
    """Both batches raise with their own names; one that allows failures lists it."""
    _, record, _ = scene

    class Broken(GatedReader):
        async def read(self, href: str, span: ByteRange) -> RangeResponse:
            self.calls.append((href, span))
            await self.gate.wait()
            raise FetchError("the line is cut")

    async def main() -> list[Any]:
        reader = Broken(MemoryReader({}))
        engine = Engine(reader=reader)
        plans = [_plan(record, (0, 0, 5, 5), ("B1",))], [_plan(record, (5, 0, 5, 5), ("B2",))]
        works = [
            asyncio.create_task(execute(plans[0], engine)),
            asyncio.create_task(execute(plans[1], engine)),
            asyncio.create_task(execute(plans[1], engine, allow_errors=True)),
        ]
        await _until(lambda: sum(len(f.copies) for f in engine.tiles._in_flight.values()) == 3)
        reader.gate.set()
        return await asyncio.gather(*works, return_exceptions=True)

    one, other, listed = run(main())
    assert isinstance(one, ReadError)
    assert "band B1" in str(one)
    assert isinstance(other, ReadError)
    assert "band B2" in str(other)
    assert [failure.band for failure in listed.errors] == ["B2"]
    assert not listed.chips[0].valid.any()


def test_the_cache_keeps_within_its_bytes_the_tiles_last_used(scene: Any) -> None:
    """Three tiles fit: the fourth drops the one that was not looked at for longest."""
    path, record, memory = scene
    reader, store = RecordingReader(memory), TileCache(3 * _TILE_BYTES)
    columns = [0, 1, 2, 0, 3, 0, 2, 1]

    async def main() -> list[int]:
        engine, seen = Engine(reader=reader, tiles=store), []
        for column in columns:
            window = (0, column * _TILE, 8, 8)
            result = await execute([_plan(record, window)], engine)
            assert_chip(result.chips[0], *window_by_rasterio(path, window))
            assert store.nbytes <= store.max_bytes
            seen.append(len(reader.calls))
        return seen

    assert run(main()) == [1, 2, 3, 3, 4, 4, 4, 5]


def test_a_tile_that_is_dropped_before_it_is_pasted_keeps_its_pixels(scene: Any) -> None:
    """Whatever is kept in its place meanwhile."""
    path, record, memory = scene
    windows = [(0, column * _TILE, 8, 8) for column in range(4)]
    plans = [_plan(record, window) for window in windows]

    async def main() -> None:
        engine = Engine(reader=memory, tiles=TileCache(_TILE_BYTES))
        for turn in range(3):
            await execute(plans[turn : turn + 1], engine)
            buffers = allocate(plans[turn])
            _, _, cached = engine.tiles.schedule(tile_jobs(plans[turn : turn + 1], [buffers]))
            assert cached
            for other in (*plans[turn + 1 :], *plans[:turn]):
                await execute([other], engine)
            for job, tile in cached:
                copy_tile(job.copies, tile.pixels, tile.valid)
            assert_chip(finish_chip(plans[turn], buffers), *window_by_rasterio(path, windows[turn]))

    run(main())


def test_a_file_that_was_rewritten_is_not_answered_from_the_cache(tmp_path: Path) -> None:
    """The same address, indexed anew, is another file."""
    path, store = tmp_path / "a.tif", TileCache(10**9)
    for value in (1, 2):
        make_cog(path, np.full((1, 64, 64), value, np.uint16), blocksize=64, compress="none")
        record = build_one(path, tmp_path)
        reader = MemoryReader({str(path): path.read_bytes()})
        result = run(execute([_plan(record, (0, 0, 4, 4), ("B1",))], Engine(reader=reader, tiles=store)))
        assert (result.chips[0].data == value).all()


def test_a_stale_index_still_raises_with_a_cache(scene: Any) -> None:
    """What the server says of a file is compared also where others joined."""
    path, record, memory = scene

    class Other(RecordingReader):
        async def read(self, href: str, span: ByteRange) -> RangeResponse:
            response = await self._reader.read(href, span)
            return RangeResponse(data=response.data, size=17, etag=None)

    with pytest.raises(ReadError) as caught:
        run(execute([_plan(record, (0, 0, 4, 4))], Engine(reader=Other(memory), tiles=TileCache(10**9))))
    assert isinstance(caught.value.__cause__, FileChangedError)
    assert path in str(caught.value)


def test_a_thread_of_a_batch_that_gave_up_never_writes_into_another(scene: Any) -> None:
    """Who joined waits for the thread that is decoding: after the hand-over nothing touches the chip."""
    path, record, memory = scene
    started, taken = threading.Event(), threading.Event()

    class Slow(ThreadPoolExecutor):
        """The first decode waits inside the thread, its tile taken."""

        def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Any:
            if started.is_set():
                return super().submit(work, *args, **kwargs)
            started.set()

            def held() -> Any:
                taken.wait(10)
                return work(*args, **kwargs)

            return super().submit(held)

    async def main() -> Any:
        with Slow(2) as pool:
            engine = Engine(reader=memory, pool=pool)
            first = asyncio.create_task(execute([_plan(record, (0, 0, 10, 10))], engine))
            await _until(started.is_set)
            second = asyncio.create_task(execute([_plan(record, (0, 0, 10, 10))], engine))
            await _until(lambda: all(len(f.copies) == 4 for f in engine.tiles._in_flight.values()))
            first.cancel()
            chip = (await second).chips[0] if not taken.is_set() else None
            assert chip is not None
            kept = chip.data.copy()
            chip.data[:] = 0  # as a transform in place
            taken.set()
        return chip.data, kept

    data, kept = run(main())
    assert not data.any()
    np.testing.assert_array_equal(kept, window_by_rasterio(path, (0, 0, 10, 10))[0])
