"""What a read costs and how it fails: each tile once, no header, everything named."""

from __future__ import annotations

import asyncio
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import HASTY, QUICK, assert_chip, build_one, cause_of, rasters, run, window_by_rasterio
from property_settings import examples

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import (
    CorruptTiffError,
    FetchNotFoundError,
    FetchTimeoutError,
    FileChangedError,
    RangeNotSupportedError,
    ReadError,
    ServerError,
)
from rasteret_ml.geo.grid import Window
from rasteret_ml.ranges import ByteRange, CoalesceLimits
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.engine import Engine, RequestLimiter
from rasteret_ml.raster.execute import ExecuteResult, TileError, execute
from rasteret_ml.raster.jobs import explain
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.storage.open import open_reader
from rasteret_ml.telemetry import Meter
from rasteret_ml.testing import InjectedError, MemoryReader, RangeServer, RecordingReader, make_cog

_TILE, _SIDE = 64, 256


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RasterAccessor, MemoryReader]:
    """Three chunky bands in 4 x 4 tiles of noise, with a mask; noise keeps the tiles large."""
    folder = tmp_path_factory.mktemp("scene")
    rng = np.random.default_rng(5)
    data = rng.integers(0, 65535, (3, _SIDE, _SIDE), dtype=np.uint16)
    mask = np.ones((_SIDE, _SIDE), bool)
    mask[:, 200:] = False
    path = make_cog(folder / "scene.tif", data, blocksize=_TILE, mask=mask)
    return path, build_one(path, folder), MemoryReader({path: Path(path).read_bytes()})


def _plans(record: RasterAccessor, windows: list[tuple[int, int, int, int]], bands: list[str]) -> list[ChipPlan]:
    grid = record.grid(bands[0])
    return [record.plan(grid.window(Window(row=r, col=c, height=h, width=w)), bands) for r, c, h, w in windows]


def _tiles_of(windows: list[tuple[int, int, int, int]]) -> set[int]:
    """Indexes of the tiles that the windows meet, by arithmetic."""
    found = set()
    for row, col, height, width in windows:
        for r in range(max(row, 0), min(row + height, _SIDE)):
            if r % _TILE and r != max(row, 0):
                continue
            for c in range(max(col, 0), min(col + width, _SIDE)):
                found.add((r // _TILE) * (_SIDE // _TILE) + c // _TILE)
    return found


_WINDOWS = st.lists(
    st.tuples(st.integers(-70, 300), st.integers(-70, 300), st.integers(1, 120), st.integers(1, 120)),
    min_size=1,
    max_size=6,
)


@examples(60, database=None)
@given(windows=_WINDOWS, gap=st.sampled_from([0, 500, 64 * 1024]))
def test_explain_says_what_execute_then_does(scene: Any, windows: list[tuple[int, int, int, int]], gap: int) -> None:
    """Requests, bytes, tiles and chips of a batch; each tile is fetched and decoded once; the pixels are right."""
    path, record, memory = scene
    plans = _plans(record, windows, ["B3", "B1"])
    limits = CoalesceLimits(gap=gap)
    estimate = explain(plans, limits)
    reader, meter = RecordingReader(memory), Meter()
    result: ExecuteResult = run(execute(plans, Engine(reader=reader, coalesce=limits, meter=meter)))
    stats = meter.snapshot()
    assert estimate.requests == len(reader.calls)
    assert estimate.bytes_fetched == sum(span.length for _, span in reader.calls)
    assert estimate.tiles == stats.tiles_decoded
    assert estimate.bytes_wanted == stats.bytes_used
    assert estimate.chips == stats.chips == len(result.chips)
    assert estimate.files == len({href for href, _ in reader.calls})
    image = _tiles_of(windows)
    assert estimate.tiles == 2 * len(image)  # three bands share a tile, the mask has its own
    for window, chip in zip(windows, result.chips, strict=True):
        assert_chip(chip, *window_by_rasterio(path, window, [3, 1]))
    ends = [(span.start, span.stop) for _, span in sorted(reader.calls, key=lambda c: c[1])]
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))


def test_explain_against_the_server(server: RangeServer, tmp_path: Path, rng: np.random.Generator) -> None:
    """The estimate is what the server then counts, requests and bytes, over two files."""
    for name in "ab":
        make_cog(tmp_path / f"{name}.tif", rng.integers(0, 65535, (1, 256, 256), dtype=np.uint16), blocksize=64)
    records = rasters(build([f"{server.url}/{name}.tif" for name in "ab"], tmp_path / "c.parquet"))
    plans = [plan for r in records for plan in _plans(r, [(0, 0, 100, 100), (150, 150, 100, 100)], ["B1"])]
    estimate = explain(plans)
    server.requests.clear()

    async def read() -> None:
        async with open_reader() as reader:
            await execute(plans, Engine(reader=reader))

    run(read())
    assert estimate.files == 2
    assert len(server.requests) == estimate.requests
    assert sum(request.sent for request in server.requests) == estimate.bytes_fetched


def test_explain_counts_sparse_tiles_as_free(tmp_path: Path) -> None:
    """A tile that is not stored costs no request."""
    data = np.zeros((1, 128, 128), np.uint8)
    data[0, :64, :64] = 3
    record = build_one(make_cog(tmp_path / "s.tif", data, blocksize=64, sparse_ok=True, overviews="none"), tmp_path)
    estimate = explain(_plans(record, [(0, 0, 128, 128)], ["B1"]))
    assert (estimate.tiles, estimate.sparse_tiles) == (1, 3)


def test_reading_fetches_no_header(server: RangeServer, tmp_path: Path, rng: np.random.Generator) -> None:
    """Every byte asked for after the build lies in the tiles; geometries and bands that share one ask once."""
    data = rng.integers(0, 65535, (4, 512, 512), dtype=np.uint16)
    make_cog(tmp_path / "a.tif", data, blocksize=256, compress="none", overviews="none")
    (record,) = rasters(build(f"{server.url}/a.tif", tmp_path / "c.parquet"))
    server.requests.clear()
    shapes = [shapely.box(500000 + 50 * i, 4999000, 500400 + 50 * i, 4999500) for i in range(20)]
    chips = run(record.load_bands(shapes, ["B1", "B2", "B3", "B4"], geometry_crs=32633, output="tensor"))
    assert len(chips) == 20
    image = record.source("B1").metadata
    (request,) = server.requests
    leader = 4  # a COG repeats a tile's size before it
    assert request.range == (image.tile_offsets[0] - leader, image.tile_offsets[0] + image.tile_byte_counts[0])


def test_a_batch_of_records_and_geometries_reads_each_file_once(shared_data: Path, tmp_path: Path) -> None:
    """LZW tiles larger than the image: ten bands and many polygons of a landcover scene cost one request."""
    files = sorted((shared_data / "landcover" / "images").glob("*.tif"))[:3]
    records = rasters(build([str(f) for f in files], tmp_path / "c.parquet"))
    memory = RecordingReader(MemoryReader({str(f): f.read_bytes() for f in files}))
    names = [f"Band {i + 1}" for i in range(10)]
    plans = [plan for r in records for plan in _plans(r, [(0, 0, 64, 64), (60, 60, 64, 64), (180, 180, 64, 64)], names)]
    result = run(execute(plans, Engine(reader=memory)))
    assert [href for href, _ in memory.calls] == [str(f) for f in files]
    for i, chip in enumerate(result.chips):
        window = [(0, 0, 64, 64), (60, 60, 64, 64), (180, 180, 64, 64)][i % 3]
        assert_chip(chip, *window_by_rasterio(files[i // 3], window))


def test_max_concurrent_bounds_the_requests(scene: Any) -> None:
    """Never more in flight than asked for, and really that many."""
    _, record, memory = scene

    class Counting(MemoryReader):
        now = most = 0

        def __init__(self) -> None:
            pass

        async def read(self, href: str, span: ByteRange) -> Any:
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(5):
                await asyncio.sleep(0)
            self.now -= 1
            return await memory.read(href, span)

    corners = [(r, c, 2, 2) for r in (0, 128) for c in (0, 128)]
    seen = []
    for bound in (1, 2):
        reader = Counting()
        limits = CoalesceLimits(gap=0, touching=0)
        plans = _plans(record, corners, ["B1"])
        run(execute(plans, Engine(reader=reader, limiter=RequestLimiter(bound), coalesce=limits)))
        seen.append(reader.most)
    assert seen == [1, 2]


def test_plans_are_pure_and_pickle(scene: Any) -> None:
    """Planning reads nothing; a plan survives pickling and gives the same chip."""
    path, record, memory = scene
    (plan,) = _plans(record, [(30, 40, 50, 60)], ["B2"])
    result = run(execute([pickle.loads(pickle.dumps(plan))], Engine(reader=memory)))
    assert_chip(result.chips[0], *window_by_rasterio(path, (30, 40, 50, 60), [2]))


def test_no_plans_and_no_pixels(scene: Any) -> None:
    """An empty batch, and a chip off the image, cost nothing and are not errors."""
    _, record, memory = scene
    reader = RecordingReader(memory)
    assert run(execute([], Engine(reader=reader))).chips == []
    (chip,) = run(execute(_plans(record, [(500, 500, 4, 5)], ["B1"]), Engine(reader=reader))).chips
    assert chip.data.shape == (1, 4, 5)
    assert not chip.valid.any()
    assert not chip.covered.any()
    assert reader.calls == []


def _broken(scene: Any, tile: int) -> MemoryReader:
    """The scene with one image tile overwritten."""
    path, record, _ = scene
    image, content = record.source("B1").metadata, bytearray(Path(path).read_bytes())
    start, count = int(image.tile_offsets[tile]), int(image.tile_byte_counts[tile])
    content[start : start + count] = b"\xff" * count
    return MemoryReader({path: bytes(content)})


def test_a_corrupt_tile_names_everything(scene: Any) -> None:
    """Record, band, address, tile, byte range and cause, in one message."""
    path, record, _ = scene
    image = record.source("B2").metadata
    start, count = int(image.tile_offsets[5]), int(image.tile_byte_counts[5])
    with pytest.raises(ReadError) as caught:
        run(record.read_window((0, 0, 128, 128), ["B2"], backend=_broken(scene, 5)))
    message = str(caught.value)
    for part in ("record scene", "band B2", path, "tile 5", f"bytes {start}-{start + count - 1}", "CorruptTiffError"):
        assert part in message
    assert isinstance(cause_of(caught.value), CorruptTiffError)
    assert str(ReadError(message)) == message


def test_failures_are_listed_and_their_pixels_invalid(scene: Any) -> None:
    """With a list, the other tiles come back right and the broken one is fill and invalid, for every band."""
    path, record, _ = scene
    failures: list[TileError] = []
    whole = shapely.box(500000, 5000000 - 2560, 500000 + 2560, 5000000)
    (chip,) = run(
        record.load_bands(
            [whole], ["B1", "B3"], geometry_crs=32633, output="tensor", backend=_broken(scene, 5), failures=failures
        )
    )
    (failure,) = failures
    assert (failure.record, failure.tile, failure.href) == ("scene", 5, path)
    assert isinstance(failure.error, CorruptTiffError)
    data, valid = window_by_rasterio(path, (0, 0, _SIDE, _SIDE), [1, 3])
    data[:, 64:128, 64:128] = 0
    valid[:, 64:128, 64:128] = False
    assert_chip(chip, data, valid)


def test_a_broken_mask_tile_is_a_failure_too(scene: Any) -> None:
    """Without its mask a pixel's validity is not known: invalid, and listed."""
    path, record, _ = scene
    mask = record.source("B1").metadata.mask
    assert mask is not None
    content = bytearray(Path(path).read_bytes())
    start, count = int(mask.tile_offsets[0]), int(mask.tile_byte_counts[0])
    content[start : start + count] = b"\xff" * count
    plans = _plans(record, [(0, 0, 100, 100)], ["B1"])
    result = run(execute(plans, Engine(reader=MemoryReader({path: bytes(content)})), allow_errors=True))
    assert len(result.errors) == 1
    data, valid = window_by_rasterio(path, (0, 0, 100, 100), [1])
    valid[:, :64, :64] = False
    assert_chip(result.chips[0], data, valid)


def _served(server: RangeServer, folder: Path) -> RasterAccessor:
    """A scene on the server: two rows of tiles, far apart in the file."""
    data = np.random.default_rng(8).integers(0, 65535, (1, 512, 512), dtype=np.uint16)
    make_cog(folder / "a.tif", data, compress="none", overviews="none")
    (record,) = rasters(build(f"{server.url}/a.tif", folder / "c.parquet"))
    server.requests.clear()
    return record


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (InjectedError(kind="status", status=404), FetchNotFoundError),
        (InjectedError(kind="status", status=500), ServerError),
        (InjectedError(kind="hang"), FetchTimeoutError),
        (InjectedError(kind="ignore_range"), RangeNotSupportedError),
        (InjectedError(kind="cut"), ServerError),
    ],
    ids=["404", "500", "hang", "ignores range", "cut"],
)
def test_a_server_that_fails_after_the_build(
    server: RangeServer, tmp_path: Path, fault: InjectedError, kind: type[Exception]
) -> None:
    """The ReadError names record, band, URL, tile and range, and carries the fetch error as its cause."""
    record = _served(server, tmp_path)
    server.errors["a.tif"] = fault

    async def read() -> None:
        async with open_reader(HASTY if fault.kind == "hang" else QUICK) as reader:
            await record.read_window((300, 300, 4, 4), ["B1"], backend=reader)

    with pytest.raises(ReadError, match=rf"record a, band B1, {server.url}/a\.tif, .*tile 3, bytes \d+-\d+") as caught:
        run(read())
    assert isinstance(cause_of(caught.value), kind)
    if fault.kind not in ("ignore_range",) and fault.status != 404:
        assert "2 attempts" in str(caught.value)


def test_transient_failures_cost_nothing_but_retries(server: RangeServer, tmp_path: Path) -> None:
    """One 503 in the middle of a read: the right pixels all the same."""
    record = _served(server, tmp_path)
    server.errors["a.tif"] = InjectedError(kind="status", status=503, times=1)

    async def read() -> Any:
        async with open_reader(QUICK) as reader:
            return await record.read_window((200, 200, 100, 100), ["B1"], backend=reader)

    assert_chip(run(read()), *window_by_rasterio(tmp_path / "a.tif", (200, 200, 100, 100)))


def test_one_file_of_two_missing(server: RangeServer, tmp_path: Path) -> None:
    """With failures allowed, the band that is there comes back, the other is listed tile by tile."""
    for band in ("B02", "B03"):
        make_cog(tmp_path / "s" / f"{band}.tif", np.full((1, 128, 128), 5, np.uint8), blocksize=64, overviews="none")
    hrefs = [f"{server.url}/s/{band}.tif" for band in ("B02", "B03")]
    (record,) = rasters(build(hrefs, tmp_path / "c.parquet", bands=["B02", "B03"]))
    server.errors["s/B03.tif"] = InjectedError(kind="status", status=404)
    failures: list[TileError] = []
    box = [record.grid("B02").bounds]
    (chip,) = run(record.load_bands(box, ["B02", "B03"], geometry_crs=32633, output="tensor", failures=failures))
    assert {(f.band, f.href) for f in failures} == {("B03", hrefs[1])}
    assert sorted(f.tile for f in failures) == [0, 1, 2, 3]
    assert bool(chip.valid[0].all())
    assert not bool(chip.valid[1].any())
    assert not chip.valid_all.any()


@pytest.mark.parametrize("remote", [True, False], ids=["http", "local"])
def test_a_file_rewritten_since_it_was_indexed(server: RangeServer, tmp_path: Path, remote: bool) -> None:
    """Another size: stale offsets would decode garbage, so the read says so and what to do."""
    path = make_cog(tmp_path / "a.tif", np.ones((1, 64, 64), np.uint8))
    href = f"{server.url}/a.tif" if remote else path
    (record,) = rasters(build(href, tmp_path / "c.parquet"))
    make_cog(path, np.random.default_rng(0).integers(0, 9, (3, 80, 80), dtype=np.uint8))
    with pytest.raises(ReadError, match=r"rewritten: build the Collection again") as caught:
        run(record.read_window((0, 0, 8, 8), ["B1"]))
    assert isinstance(cause_of(caught.value), FileChangedError)
    assert f"{Path(path).stat().st_size} bytes" in str(caught.value)


def test_a_truncated_file_is_an_error(scene: Any) -> None:
    """A backend that knows no sizes gives short bytes: never decoded as if they were whole."""
    path, record, _ = scene

    class Truncated:
        async def get_range(self, url: str, start: int, length: int) -> bytes:
            return Path(url).read_bytes()[: record.source("B1").metadata.tile_offsets[0] + 50][start : start + length]

    with pytest.raises(ReadError, match=r"record scene, band B1, .*tile 0"):
        run(record.read_window((0, 0, 8, 8), ["B1"], backend=Truncated()))
    assert path


def test_the_first_error_cancels_the_rest(scene: Any) -> None:
    """Nothing goes on reading behind a caller who already has the error."""
    _, record, memory = scene

    class Failing(RecordingReader):
        finished = 0

        async def read(self, href: str, span: ByteRange) -> Any:
            first = not self.calls
            response = await super().read(href, span)
            if first:
                raise FetchNotFoundError(f"{href}: gone.")
            for _ in range(1000):
                await asyncio.sleep(0)
            self.finished += 1
            return response

    reader = Failing(memory)
    plans = _plans(record, [(r, c, 2, 2) for r in (0, 128) for c in (0, 128)], ["B1"])
    with pytest.raises(ReadError, match="gone"):
        run(execute(plans, Engine(reader=reader, coalesce=CoalesceLimits(gap=0, touching=0))))
    assert len(reader.calls) > 1
    assert reader.finished == 0


@pytest.mark.parametrize(("shown", "expected"), [(True, "4/4"), (False, "")])
def test_the_progress_bar_counts_tiles(
    server: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: bool, expected: str
) -> None:
    """On request; silent without."""
    record = _served(server, tmp_path)
    run(record.load_bands([record.grid("B1").bounds], ["B1"], geometry_crs=32633, progress=shown))
    printed = capsys.readouterr()
    assert expected in printed.err
    assert bool(printed.err) == shown
    assert printed.out == ""
