"""Overviews: which one is read, that its pixels are GDAL's, and what is said of a tile that cannot be had."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import tifffile
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from pixel_oracle import build_one, cause_of, run
from property_settings import examples
from rasterio.enums import Resampling
from rasterio.warp import reproject, transform

from rasteret_ml.cog.tile_table import TileTable
from rasteret_ml.errors import CorruptTiffError, FileChangedError, ReadError, UsageError
from rasteret_ml.geo.grid import Grid, Window
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.engine import Engine
from rasteret_ml.raster.execute import TileError, execute
from rasteret_ml.raster.jobs import ReadEstimate, explain
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.testing import MemoryReader, RecordingReader, make_cog

_HEIGHT, _WIDTH, _TILE = 401, 333, 64
_ORIGIN = (500000.0, 5000000.0)
_EXACTLY = {"tolerance": 0} if "tolerance" in signature(reproject).parameters else {}
"""An older rasterio cannot but interpolate positions: what lies within a hundredth of an edge may be its neighbour."""


def _smooth(count: int = 1, dtype: str = "uint16", shape: tuple[int, int] = (_HEIGHT, _WIDTH)) -> np.ndarray[Any, Any]:
    """Hills with noise, never 0, within a byte."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    noise = np.random.default_rng(1).integers(0, 40, (count, *shape))
    return (120 + 40 * np.sin(x / 9) + 40 * np.cos(y / 13) + noise).astype(dtype)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RasterAccessor]:
    """A COG of odd size with three overviews, nodata, and no mask."""
    folder = tmp_path_factory.mktemp("levels")
    data = _smooth(2)
    data[:, 100:160, 120:200] = 0
    path = make_cog(folder / "scene.tif", data, nodata=0, blocksize=_TILE, overview_resampling="nearest")
    return path, build_one(path, folder)


def _grid(factor: float, shape: tuple[int, int], shift: tuple[float, float] = (0.0, 0.0)) -> Grid:
    """Pixels `factor` times those of the scene, from `shift` scene pixels (down, right) on."""
    x, y = _ORIGIN[0] + 10 * shift[1], _ORIGIN[1] - 10 * shift[0]
    return Grid(crs="EPSG:32633", transform=Affine(10 * factor, 0, x, 0, -10 * factor, y), shape=shape)


def _execute(plans: Sequence[ChipPlan], path: str, content: bytes | None = None, error_rate: bool = False) -> Any:
    memory = MemoryReader({path: Path(path).read_bytes() if content is None else content})
    return run(execute(plans, Engine(reader=memory), allow_errors=error_rate))


def _overview(path: str, level: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pixels and validity of a level, by GDAL."""
    with rasterio.open(path, **({"overview_level": level - 1} if level else {})) as source:
        return source.read(), source.read_masks() != 0


def _assert_every_level(path: str, record: RasterAccessor, levels: int) -> None:
    """All bands of all levels are GDAL's, pixels and validity."""
    bands = [f"B{i + 1}" for i in range(len(record.available_bands))]
    assert len(record.source("B1").metadata.levels) == levels
    for level in range(levels):
        data, valid = _overview(path, level)
        chip = run(record.read_window((0, 0, *data.shape[1:]), bands, level=level))
        np.testing.assert_array_equal(np.asarray(chip.data), data, err_msg=f"level {level}")
        np.testing.assert_array_equal(np.asarray(chip.valid), valid, err_msg=f"level {level}")


@examples(60)
@given(factor=st.floats(0.2, 20), shift=st.tuples(st.floats(0, 50), st.floats(0, 50)))
def test_the_coarsest_level_that_is_not_coarser(
    scene: tuple[str, RasterAccessor], factor: float, shift: tuple[float, float]
) -> None:
    """By arithmetic; within a hundredth of an overview's own size either may be read."""
    _, record = scene
    grid = _grid(factor, (8, 8), (shift[0] + 0.37, shift[1] + 0.21))
    (level,) = explain([record.plan(grid, ["B1"])]).levels["B1"]
    wanted = {max(i for i, step in enumerate((1, 2, 4, 8)) if step <= max(1, factor * slack)) for slack in (0.98, 1.03)}
    assert level in wanted
    assert explain([record.plan(grid, ["B1"], overviews=False)]).levels == {"B1": (0,)}


def test_coarser_reads_cost_less(scene: tuple[str, RasterAccessor]) -> None:
    """The whole scene, ever smaller: fewer tiles and bytes at each level, and far fewer than without overviews."""
    _, record = scene

    def cost(factor: float, overviews: bool = True) -> ReadEstimate:
        grid = _grid(factor, (int(_HEIGHT / factor), int(_WIDTH / factor)), (0.3, 0.3))
        return explain([record.plan(grid, ["B1"], overviews=overviews)])

    costs = [cost(factor) for factor in (1.0, 2.2, 4.4, 8.8)]
    assert [c.levels["B1"] for c in costs] == [(0,), (1,), (2,), (3,)]
    for fine, coarse in pairwise(costs):
        assert fine.tiles > coarse.tiles
        assert fine.bytes_fetched > coarse.bytes_fetched
    assert costs[3].tiles == costs[3].requests == 1
    assert costs[3].bytes_fetched * 20 < cost(8.8, overviews=False).bytes_fetched


@examples(40)
@given(
    level=st.integers(0, 3),
    corner=st.tuples(st.integers(-30, 220), st.integers(-30, 220)),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
)
def test_an_aligned_grid_is_copied(
    scene: tuple[str, RasterAccessor], level: int, corner: tuple[int, int], size: tuple[int, int]
) -> None:
    """Windows of every level's own grid, past its odd edges too: GDAL's overview bit for bit, nothing resampled."""
    path, record = scene
    window = Window(row=corner[0], col=corner[1], height=size[0], width=size[1])
    plan = record.plan(record.grid("B1", level).window(window), ["B2", "B1"], resampling="cubic")
    assert all(band.resampling is None for band in plan.bands)
    assert all(band.level.number == level for band in plan.bands if band.window is not None)
    (chip,) = _execute([plan], path).chips
    data, valid = (stack[[1, 0]] for stack in _overview(path, level))
    extent = Window(row=0, col=0, height=data.shape[1], width=data.shape[2])
    inside = window.intersection(extent)
    if inside is None:
        assert not chip.valid.any()
    else:
        here, there = (slice(None), *inside.relative_to(window).slices), (slice(None), *inside.slices)
        np.testing.assert_array_equal(chip.data[here], data[there])
        np.testing.assert_array_equal(chip.valid[here], valid[there])
        assert chip.valid.sum() == valid[there].sum()


def test_a_level_that_is_not_there_is_refused(scene: tuple[str, RasterAccessor]) -> None:
    """The message counts those that are."""
    _, record = scene
    with pytest.raises(UsageError, match="level must be from 0 to 3, got 4"):
        record.grid("B1", 4)


def _gtiff(path: Path, data: np.ndarray[Any, Any], **options: Any) -> str:
    """A plain GeoTIFF without overviews, tiled."""
    count, height, width = data.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": data.dtype.name}
    profile |= {"crs": "EPSG:32633", "transform": Affine(10, 0, _ORIGIN[0], 0, -10, _ORIGIN[1])}
    profile |= {"tiled": True, "blockxsize": _TILE, "blockysize": _TILE, "compress": "deflate"}
    with rasterio.open(path, "w", **(profile | options)) as target:
        target.write(data)
    return str(path)


def _reduce(path: str, kernel: Resampling = Resampling.nearest, **settings: Any) -> str:
    with rasterio.Env(**settings), rasterio.open(path, "r+") as target:
        target.build_overviews([2, 4], kernel)
    return path


@pytest.mark.parametrize(
    ("told", "mixed"), [("AVERAGE", True), ("BILINEAR", True), ("NEAREST", False), ("MODE", False), (None, False)]
)
def test_categories_take_no_average(told: str | None, mixed: bool, tmp_path: Path) -> None:
    """Nearest stays at full resolution where overviews are known to be mixed, classes where they may be."""
    path = _gtiff(tmp_path / "a.tif", _smooth(1, "uint8"))
    if told is not None:
        with rasterio.open(path, "r+") as target:
            target.update_tags(OVERVIEW_RESAMPLING=told)
    record = build_one(_reduce(path), tmp_path)
    grid = _grid(4, (50, 40), (1.5, 0))
    read = {k: explain([record.plan(grid, ["B1"], resampling=k)]).levels["B1"] for k in ("nearest", "mode", "bilinear")}
    sure = (2,) if told is not None and not mixed else (0,)
    assert read == {"nearest": ((0,) if mixed else (2,)), "mode": sure, "bilinear": (2,)}
    classes = record.plan(grid, ["B1"], resampling="nearest", categories=True)
    assert explain([classes]).levels["B1"] == sure


def test_what_gdal_says_of_its_overviews_is_heeded(tmp_path: Path) -> None:
    """COGs of GDAL 3.11 and later name the kernel themselves."""
    path = make_cog(tmp_path / "a.tif", _smooth(), blocksize=_TILE, overview_resampling="average")
    with rasterio.open(path) as source:
        told = source.tags(ns="IMAGE_STRUCTURE").get("OVERVIEW_RESAMPLING")
    record = build_one(path, tmp_path)
    assert record.source("B1").metadata.overview_resampling == (None if told is None else told.lower())
    levels = explain([record.plan(_grid(2.5, (50, 50)), ["B1"], resampling="nearest")]).levels
    assert levels == {"B1": (1,) if told is None else (0,)}


def test_overviews_without_their_mask_are_not_used(tmp_path: Path) -> None:
    """The image has a mask and its overviews (a .ovr) have none: they would pass for valid."""
    path = _gtiff(tmp_path / "a.tif", _smooth())
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
        target.write_mask(np.random.default_rng(0).random((_HEIGHT, _WIDTH)) < 0.5)
    record = build_one(_reduce(path, TIFF_USE_OVR=True), tmp_path)
    assert len(record.source("B1").metadata.overviews) == 2
    assert explain([record.plan(_grid(4.4, (50, 50)), ["B1"])]).levels == {"B1": (0,)}
    with pytest.raises(UsageError, match="level must be from 0 to 0"):
        record.grid("B1", 1)


@pytest.mark.parametrize("shape", [(401, 333), (129, 1), (2, 257), (65, 64), (100, 3)])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_every_level_of_odd_sizes(shape: tuple[int, int], interleave: str, tmp_path: Path) -> None:
    """Planar and chunky, masks inside."""
    path = _gtiff(tmp_path / "a.tif", _smooth(3, "int16", shape), interleave=interleave)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
        target.write_mask(np.random.default_rng(0).random(shape) < 0.5)
    _assert_every_level(_reduce(path), build_one(path, tmp_path), 3)


@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("beside", ["PIXEL", "BAND"])
@pytest.mark.parametrize("alpha", [False, True], ids=["plain", "alpha"])
def test_overviews_of_another_interleave(alpha: bool, beside: str, interleave: str, tmp_path: Path) -> None:
    """GDAL's .ovr files are planar by default, whatever the image is: each table's own layout counts."""
    data = _smooth(4, "uint8")
    data[3, 50:250, 70:300] = 0
    options = {"photometric": "rgb", "alpha": "yes"} if alpha else {"photometric": "minisblack", "alpha": "no"}
    path = _gtiff(tmp_path / "a.tif", data, interleave=interleave, **options)
    _reduce(path, TIFF_USE_OVR=True, INTERLEAVE_OVERVIEW=beside)
    _assert_every_level(path, build_one(path, tmp_path), 3)


def test_jpeg_tables_of_each_directory(tmp_path: Path) -> None:
    """Overviews of another quality have tables of their own."""
    path = _gtiff(tmp_path / "a.tif", _smooth(1, "uint8"), compress="jpeg", jpeg_quality=90)
    record = build_one(_reduce(path, JPEG_QUALITY_OVERVIEW=30), tmp_path)
    tables = [level.image.jpeg_tables for level in record.source("B1").metadata.levels]
    assert tables[0] != tables[1]
    assert None not in tables
    _assert_every_level(path, record, 3)


@pytest.mark.parametrize(("factor", "level"), [(2.3, 1), (4.7, 2), (9.1, 3), (1.7, 0)])
@pytest.mark.parametrize("kernel", ["nearest", "bilinear"])
@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:3857"])
def test_resampled_as_gdal_resamples_the_overview(
    scene: tuple[str, RasterAccessor], factor: float, level: int, kernel: Any, crs: str
) -> None:
    """`reproject` of the very level that was chosen; nodata is left out of the means."""
    path, record = scene
    shape = (int(340 / factor), int(270 / factor))
    grid = _grid(factor, shape, (21.37, 17.71))
    if crs != "EPSG:32633":  # 10 m of UTM are 14.1 m of Mercator at 45 degrees north
        (x,), (y,) = transform("EPSG:32633", crs, [_ORIGIN[0] + 177], [_ORIGIN[1] - 213])
        grid = Grid(crs=crs, transform=Affine(14.15 * factor, 0, x, 0, -14.15 * factor, y), shape=shape)
    plan = record.plan(grid, ["B1"], resampling=kernel)
    assert plan.bands[0].level.number == level
    (chip,) = _execute([plan], path).chips
    expected, own = np.zeros(shape, np.uint16), record.grid("B1", level)
    reproject(
        _overview(path, level)[0][0], expected, src_transform=own.transform, src_crs=own.crs, src_nodata=0,
        dst_nodata=0, dst_transform=grid.transform, dst_crs=grid.crs, resampling=Resampling[kernel], **_EXACTLY,
    )  # fmt: skip
    valid = chip.valid[0] & (expected != 0)
    assert (chip.valid[0] != (expected != 0)).mean() < 0.01
    assert valid.mean() > 0.5
    apart = np.abs(chip.data[0].astype(int) - expected)[valid]
    if kernel == "nearest":
        assert (apart > 0).mean() < (0.002 if _EXACTLY else 0.02)  # ties
    else:
        assert apart.max() <= 1


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RasterAccessor]:
    """A COG with a mask at every level, padded, so that no claim of a few MB leaves it."""
    folder = tmp_path_factory.mktemp("masked")
    mask = np.random.default_rng(0).random((_HEIGHT, _WIDTH)) < 0.8
    path = make_cog(folder / "masked.tif", _smooth(2), mask=mask, blocksize=_TILE)
    with open(path, "ab") as file:
        file.write(bytes(4 * 2**20))
    return path, build_one(path, folder)


def _table(record: RasterAccessor, level: int, of_mask: bool) -> tuple[TileTable, str]:
    """A tile table, and what the messages call its image."""
    held = record.source("B1").metadata.levels[level]
    table = held.mask if of_mask else held.image
    assert table is not None
    return table, ("mask of " if of_mask else "") + (f"overview {level}" if level else "full resolution")


def _message(path: str, image: str, tile: int, start: int, length: int) -> str:
    return f"record masked, band B1, {path}, {image}, tile {tile}, bytes {start}-{start + length - 1}: "


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("of_mask", [False, True], ids=["image", "mask"])
def test_a_block_leader_that_says_otherwise(masked: tuple[str, RasterAccessor], level: int, of_mask: bool) -> None:
    """One byte of it changed, and no size and no tag to tell: the index is out of date."""
    path, record = masked
    table, image = _table(record, level, of_mask)
    offset, count = int(table.tile_offsets[3]), int(table.tile_byte_counts[3])
    content = bytearray(Path(path).read_bytes())
    content[offset - 4] ^= 1
    plan = record.plan(record.grid("B1", level), ["B1", "B2"])
    with pytest.raises(ReadError) as caught:
        _execute([plan], path, bytes(content))
    assert _message(path, image, 3, offset, count) in str(caught.value)
    assert isinstance(cause_of(caught.value), FileChangedError)
    result = _execute([plan], path, bytes(content), error_rate=True)
    (failure,) = result.errors
    assert (failure.image, failure.tile, type(failure.error)) == (image, 3, FileChangedError)
    data, valid = _overview(path, level)
    hole = tuple(slice(i * _TILE, (i + 1) * _TILE) for i in divmod(3, table.tiles_across))
    data[:, *hole] = data[:, *hole] if of_mask else 0
    valid[:, *hole] = False
    np.testing.assert_array_equal(result.chips[0].data, data)
    np.testing.assert_array_equal(result.chips[0].valid, valid)


def _edited(record: RasterAccessor, level: int, of_mask: bool, tile: int, **arrays: int) -> RasterAccessor:
    """The record with an entry of a tile array changed, as if the Collection had been damaged."""
    structs: Any = deepcopy(dict(record.band_metadata))
    for struct in structs.values():
        table = struct[("overview_masks" if of_mask else "overviews")][level - 1] if level else struct
        table = table["mask"] if of_mask and not level else table
        for name, value in arrays.items():
            table[name] = np.array(table[name])
            table[name][tile] = value
    return RasterAccessor(replace(record.info, band_metadata=structs))


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"tile_offsets": 2**40}, "the tile reaches past the end of the file"),
        ({"tile_byte_counts": 2**31}, "the tile reaches past the end of the file"),
        ({"tile_byte_counts": 2 * 2**20}, "the byte count is 2097152, but"),
    ],
    ids=["offset", "count past the end", "count"],
)
@pytest.mark.parametrize(("level", "of_mask"), [(0, False), (1, False), (2, False), (0, True), (1, True)])
def test_absurd_entries_are_refused_before_a_byte_is_asked_for(
    masked: tuple[str, RasterAccessor], level: int, of_mask: bool, arrays: dict[str, int], why: str
) -> None:
    """Offsets and byte counts that no such tile has, of any image of the file."""
    path, record = masked
    bad = _edited(record, level, of_mask, 2, **arrays)
    table, image = _table(bad, level, of_mask)
    start, length = int(table.tile_offsets[2]), int(table.tile_byte_counts[2])
    reader = RecordingReader(MemoryReader({path: Path(path).read_bytes()}))
    plans = [bad.plan(bad.grid("B1", level), ["B1", "B2"])]
    with pytest.raises(ReadError) as caught:
        run(execute(plans, Engine(reader=reader)))
    assert reader.calls == []
    assert _message(path, image, 2, start, length) + f"CorruptTiffError: {why}" in str(caught.value)
    assert isinstance(cause_of(caught.value), CorruptTiffError)
    result = run(execute(plans, Engine(reader=reader), allow_errors=True))
    assert [(f.image, f.tile) for f in result.errors] == [(image, 2)]


@pytest.mark.parametrize(
    ("tag", "value"), [("TileOffsets", 2**31), ("TileByteCounts", 2**30), ("TileByteCounts", 2 * 2**20)]
)
def test_a_file_whose_tags_lie(tag: str, value: int, tmp_path: Path) -> None:
    """The same, from the TIFF itself: `load_bands` lists what failed, and the rest comes back."""
    path = _gtiff(tmp_path / "a.tif", _smooth(2))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        entry = tiff.pages[0].tags[tag]
        entry.overwrite([*entry.value[:8], value, *entry.value[9:]])
    with open(path, "ab") as file:
        file.write(bytes(4 * 2**20))
    record = build_one(path, tmp_path)
    box = [record.grid("B1").bounds]
    with pytest.raises(
        ReadError, match=r"record a, band B1, .*a\.tif, full resolution, tile 8, bytes \d+-\d+"
    ) as caught:
        run(record.load_bands(box, ["B1", "B2"], geometry_crs=32633, output="tensor"))
    assert isinstance(cause_of(caught.value), CorruptTiffError)
    failures: list[TileError] = []
    (chip,) = run(record.load_bands(box, ["B1", "B2"], geometry_crs=32633, output="tensor", failures=failures))
    assert [(f.record, f.band, f.image, f.tile) for f in failures] == [("a", "B1", "full resolution", 8)]
    expected = np.ones((2, _HEIGHT, _WIDTH), bool)
    expected[:, 64:128, 128:192] = False  # six tiles across
    np.testing.assert_array_equal(np.asarray(chip.valid), expected)
    np.testing.assert_array_equal(np.asarray(chip.data), np.where(expected, _smooth(2), 0))


def test_another_size_or_version(scene: tuple[str, RasterAccessor], tmp_path: Path) -> None:
    """A byte more; or as many, but written at another time."""
    path, record = scene
    with pytest.raises(ReadError, match=r"band B1, .*, overview 2, tile 0, bytes .*rewritten: build") as caught:
        _execute([record.plan(record.grid("B1", 2), ["B1"])], path, Path(path).read_bytes() + b"x")
    assert isinstance(cause_of(caught.value), FileChangedError)
    copied = tmp_path / "scene.tif"
    copied.write_bytes(Path(path).read_bytes())
    fresh = build_one(copied, tmp_path)
    os.utime(copied, (1, 1))
    with pytest.raises(ReadError, match=r"overview 2, tile 0, .*the file's version is") as caught:
        run(fresh.read_window((0, 0, 4, 4), ["B1"], level=2))
    assert isinstance(cause_of(caught.value), FileChangedError)
