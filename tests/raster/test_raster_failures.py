"""Where failures are allowed: a tile's failing is its own, and told with the plans that wanted it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pixel_oracle import build_one, run

from rasteret_ml.errors import AccessDeniedError, FetchError, ReadError, ServerError
from rasteret_ml.geo.grid import Window
from rasteret_ml.ranges import ByteRange
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import TileError, execute
from rasteret_ml.storage.reader import RangeResponse
from rasteret_ml.testing import MemoryReader, make_cog

_TILE, _SIDE = 32, 128


class BrokenReader(MemoryReader):
    """Refuses what asks for certain bytes; keeps what was asked for."""

    def __init__(self, files: dict[str, bytes], broken: list[ByteRange], error: type[FetchError]) -> None:
        super().__init__(files)
        self.broken, self.error = broken, error
        self.asked: list[ByteRange] = []

    async def read(self, href: str, span: ByteRange) -> RangeResponse:
        self.asked.append(span)
        await asyncio.sleep(0)
        if any(bad.start < span.stop and span.start < bad.stop for bad in self.broken):
            raise self.error(f"{href}: {span}: refused")
        return await super().read(href, span)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RasterAccessor]:
    """Two chunky bands in 4 x 4 tiles that lie side by side in the file, with a mask."""
    folder = tmp_path_factory.mktemp("scene")
    data = np.random.default_rng(5).integers(1, 65535, (2, _SIDE, _SIDE), dtype=np.uint16)
    mask = np.ones((_SIDE, _SIDE), bool)
    path = make_cog(folder / "scene.tif", data, blocksize=_TILE, mask=mask, overviews="none")
    return path, build_one(path, folder)


def _tiles(record: RasterAccessor, tiles: list[int], *, of_mask: bool = False) -> list[ByteRange]:
    table = record.source("B1").metadata.mask if of_mask else record.source("B1").metadata.image
    assert table is not None
    return [ByteRange(int(table.tile_offsets[i]), int(table.tile_byte_counts[i])) for i in tiles]


def _reader(scene: tuple[str, Any], broken: list[ByteRange], error: type[FetchError] = ServerError) -> BrokenReader:
    return BrokenReader({scene[0]: Path(scene[0]).read_bytes()}, broken, error)


_WINDOWS = [(0, 0, 32, 32), (0, 16, 32, 32), (40, 40, 50, 50), (0, 0, 128, 128)]
"""(row, column, height, width): of tile 0; of 0 and 1; of 5, 6, 9 and 10; of all."""


@pytest.mark.parametrize("of_mask", [False, True])
@pytest.mark.parametrize("tiles", [[0], [1], [6], [15], [0, 1], [3, 9, 10], list(range(16))])
def test_only_the_broken_tiles_fail_and_each_tells_who_wanted_it(
    scene: tuple[str, RasterAccessor], tiles: list[int], of_mask: bool
) -> None:
    """Though all tiles are fetched with one request: what fails together is asked for apart."""
    record = scene[1]
    reader = _reader(scene, _tiles(record, tiles, of_mask=of_mask))
    grid = record.grid("B1")
    plans = [record.plan(grid.window(Window(row=r, col=c, height=h, width=w)), ["B1", "B2"]) for r, c, h, w in _WINDOWS]
    result = run(execute(plans, Engine(reader=reader), allow_errors=True))
    assert sorted(failure.tile for failure in result.errors) == tiles
    wanted = [{0}, {0, 1}, {5, 6, 9, 10}, set(range(16))]
    for failure in result.errors:
        assert failure.positions == tuple(i for i, own in enumerate(wanted) if failure.tile in own)
        assert isinstance(failure.error, ServerError)
        assert ("mask" in failure.image) == of_mask
    whole = run(execute(plans, Engine(reader=_reader(scene, []))))
    for chip, good, own in zip(result.chips, whole.chips, wanted, strict=True):
        assert not chip.valid.all() or own.isdisjoint(tiles)
        assert (chip.data[chip.valid] == good.data[chip.valid]).all()
        if own.isdisjoint(tiles):
            assert (chip.data == good.data).all()


def test_a_chip_may_be_had_whole_or_not_at_all(scene: tuple[str, RasterAccessor]) -> None:
    """The chips that lack a tile are empty, the others as they are; failures are told as ever."""
    record = scene[1]
    grid, broken = record.grid("B1"), _tiles(record, [1, 6])
    plans = [record.plan(grid.window(Window(row=r, col=c, height=h, width=w)), ["B1", "B2"]) for r, c, h, w in _WINDOWS]
    some = run(execute(plans, Engine(reader=_reader(scene, broken)), allow_errors=True))
    none = run(execute(plans, Engine(reader=_reader(scene, broken)), allow_errors=True, drop_incomplete=True))
    assert [(f.tile, f.positions) for f in none.errors] == [(f.tile, f.positions) for f in some.errors]
    for i, (chip, other) in enumerate(zip(none.chips, some.chips, strict=True)):
        if i == 0:
            assert (chip.data == other.data).all()
            assert chip.valid.all()
        else:
            assert other.valid.any()
            assert not chip.valid.any()
            assert not chip.data.any()
            assert chip.covered is not None
            assert not chip.covered.any()


def test_what_is_wrong_with_the_whole_file_is_not_asked_for_again(scene: tuple[str, RasterAccessor]) -> None:
    """Access denied once is denied; and where failures are not allowed, the first request that fails is the last."""
    record = scene[1]
    plans = [record.plan(record.grid("B1"), ["B1"])]
    broken = _tiles(record, [3])
    denied, strict, apart = (_reader(scene, broken, kind) for kind in (AccessDeniedError, ServerError, ServerError))
    result = run(execute(plans, Engine(reader=denied), allow_errors=True))
    assert len(result.errors) >= 16
    with pytest.raises(ReadError, match="refused"):
        run(execute(plans, Engine(reader=strict)))
    assert len(strict.asked) <= len(denied.asked) < 16
    run(execute(plans, Engine(reader=apart), allow_errors=True))
    assert len(apart.asked) > 16


def test_a_batch_that_shares_a_tile_with_a_failing_one_has_its_own_failure(scene: tuple[str, RasterAccessor]) -> None:
    """Two executions over one store: the broken tile fails in both, the others in neither."""
    record = scene[1]
    reader = _reader(scene, _tiles(record, [1]))
    grid, engine = record.grid("B1"), Engine(reader=reader)
    windows = [Window(row=0, col=0, height=32, width=64), Window(row=0, col=32, height=32, width=64)]
    plans = [[record.plan(grid.window(window), ["B1"])] for window in windows]

    async def both() -> list[Any]:
        return list(await asyncio.gather(*(execute(own, engine, allow_errors=True) for own in plans)))

    for result in run(both()):
        (failure,) = result.errors
        assert (failure.tile, failure.positions) == (1, (0,))
        assert isinstance(failure, TileError)
