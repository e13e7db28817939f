"""Chips put together block by block, by any ranks in any order, are what plain arrays of the whole map say."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.predict.blend import OutputSpec
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.rank_shard import RankShard, shard_folder
from rasteret_ml.predict.write_cog import write_maps

BLOCK = 16


def extent_of(shape, size, corners, first=0, start=0):
    """A map of a shape with chips at some corners."""
    grid = Grid(crs="EPSG:32633", transform=Affine(10, 0, 500000, 0, -10, 5000000), shape=shape)
    places = np.array(corners, np.int64).reshape(-1, 2)
    positions = np.arange(start, start + len(places))
    return MapExtent(grid=grid, block=BLOCK, first_block=first, chip_size=size, positions=positions, corners=places)


def place_of(extents, position):
    """The transform of a chip."""
    extent = next(extent for extent in extents if position in extent.positions)
    row, col = extent.corners[position - extent.positions[0]].tolist()
    return extent.grid.transform @ Affine.translation(col, row)


def window_of(extent, corner):
    """The part of the map, and of the chip, that they share."""
    rows, cols = (np.arange(c, c + n) for c, n in zip(corner, extent.chip_size, strict=True))
    inside = (rows >= 0) & (rows < extent.grid.height), (cols >= 0) & (cols < extent.grid.width)
    return np.ix_(rows[inside[0]], cols[inside[1]]), np.ix_(*inside)


def plainly_blended(extent, chips, valids):
    """Scores of the whole map, in double precision, and where there are any."""
    rows, cols = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in extent.chip_size)
    weights = rows[:, None] * cols
    total, weight = np.zeros((chips.shape[1], *extent.grid.shape)), np.zeros(extent.grid.shape)
    for chip, valid, corner in zip(chips, valids, extent.corners, strict=True):
        here, there = window_of(extent, corner)
        weight[here] += (weights * valid)[there]
        for plane, scores in zip(total, chip, strict=True):
            plane[here] += (scores * weights * valid)[there]
    return total / np.where(weight > 0, weight, 1), weight > 0


def plainly_nearest(extent, chips, valids):
    """For each pixel the chip that has it nearest its middle, the earliest of equals, pixel by pixel."""
    found = np.zeros((chips.shape[1], *extent.grid.shape), chips.dtype)
    best = np.zeros(extent.grid.shape)
    (height, width) = extent.chip_size
    for chip, valid, (top, left) in zip(chips, valids, extent.corners, strict=True):
        for r in range(height):
            for c in range(width):
                row, col = top + r, left + c
                near = min(r + 1, height - r) * min(c + 1, width - c)
                inside = 0 <= row < extent.grid.height and 0 <= col < extent.grid.width
                if inside and valid[r, c] and near > best[row, col]:
                    best[row, col] = near
                    found[:, row, col] = chip[:, r, c]
    return found, best > 0


@st.composite
def maps(draw):
    """A regular or a scattered set of chips over a map, with what is valid in each."""
    shape = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    size = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    if draw(st.booleans()):
        stride = draw(st.integers(1, size[0])), draw(st.integers(1, size[1]))
        steps = [range(0, max(1, n - s + t), t) for n, s, t in zip(shape, size, stride, strict=True)]
        corners = [(r, c) for r in steps[0] for c in steps[1]][:60]
    else:
        corner = st.tuples(st.integers(-30, 70), st.integers(-30, 70))
        corners = draw(st.lists(corner, min_size=1, max_size=12))
    return extent_of(shape, size, corners), draw(st.integers(0, 2**32 - 1))


def written(folder, extents, spec, chips, valids, ranks, rng, memory=1):
    """The files that some ranks write, each of its own chips in any order, saved and taken up at any time."""
    positions = np.arange(len(chips))
    values = spec.chip_values(chips, valids)
    for rank in range(ranks):
        shard = None
        for position in rng.permutation(positions[rank::ranks]):
            shard = shard or RankShard(shard_folder(folder, rank), extents, spec, memory)
            shard.add(int(position), values[position], valids[position], place_of(extents, position))
            if rng.random() < 0.3:
                shard.save()
            if rng.random() < 0.2:
                shard.save()
                shard.close()
                shard = None
        if shard is not None:
            shard.save()
            shard.close()
    paths = [str(folder / f"map-{i}.tif") for i in range(len(extents))]
    write_maps(folder, extents, paths, ((), {}))
    found = []
    for path in paths:
        with rasterio.open(path) as file:
            found.append(file.read())
    return found


@examples(30)
@given(maps(), st.integers(1, 3), st.sampled_from([1, 1 << 30]))
def test_blended_scores_are_the_weighted_mean(made, ranks, memory):
    """Within the rounding of float32; NaN where no chip is valid."""
    extent, seed = made
    rng = np.random.default_rng(seed)
    chips = rng.random((len(extent.positions), 3, *extent.chip_size), np.float32)
    valids = rng.random((len(chips), *extent.chip_size)) < rng.random()
    spec = OutputSpec.for_predictions(3, False, output="scores", merge="blend", nodata=None, block=BLOCK)
    expected, valid = plainly_blended(extent, chips, valids)
    if valid.any():
        with tempfile.TemporaryDirectory() as folder:
            (found,) = written(Path(folder), [extent], spec, chips, valids, ranks, rng, memory)
        np.testing.assert_allclose(found, np.where(valid, expected, np.nan), rtol=2e-5, atol=1e-6)


@examples(30)
@given(maps(), st.integers(1, 3), st.booleans())
def test_the_nearest_chip_is_exact(made, ranks, labels):
    """Whatever the order and the number of ranks."""
    extent, seed = made
    rng = np.random.default_rng(seed)
    shape = len(extent.positions), 1 if labels else 4, *extent.chip_size
    chips = rng.integers(0, 9, shape) if labels else rng.random(shape, np.float32)
    valids = rng.random((len(chips), *extent.chip_size)) < rng.random()
    spec = OutputSpec.for_predictions(shape[1], labels, output="classes", merge="centre", nodata=None, block=BLOCK)
    expected, valid = plainly_nearest(extent, chips if labels else chips.argmax(1, keepdims=True), valids)
    if valid.any():
        with tempfile.TemporaryDirectory() as folder:
            (found,) = written(Path(folder), [extent], spec, chips, valids, ranks, rng)
        np.testing.assert_array_equal(found, np.where(valid, expected, 255))


@examples(40)
@given(maps())
def test_a_block_waits_for_each_chip_that_may_change_it(made):
    """Counted in one go as one by one."""
    extent, _ = made
    expected = np.zeros(extent.block_grid, int)
    for corner in extent.corners:
        rows, cols = (range(c - 1, c + n + 1) for c, n in zip(corner, extent.chip_size, strict=True))
        inside = {
            (r // BLOCK, c // BLOCK)
            for r in rows for c in cols if 0 <= r < extent.grid.height and 0 <= c < extent.grid.width
        }  # fmt: skip
        for place in inside:
            expected[place] += 1
    np.testing.assert_array_equal(extent.chips_per_block(slice(None)).reshape(extent.block_grid), expected)


def test_several_maps_do_not_mix(tmp_path):
    """Each position goes to its own."""
    rng = np.random.default_rng(0)
    one = extent_of((40, 40), (20, 20), [(0, 0), (20, 20)])
    two = extent_of((20, 50), (20, 20), [(0, 30)], first=one.block_count, start=2)
    chips = rng.integers(0, 9, (3, 1, 20, 20))
    spec = OutputSpec.for_predictions(1, True, output="classes", merge="centre", nodata=None, block=BLOCK)
    first, second = written(tmp_path, [one, two], spec, chips, np.ones((3, 20, 20), bool), 2, rng)
    np.testing.assert_array_equal(first[0, :20, :20], chips[0, 0])
    np.testing.assert_array_equal(first[0, 20:, 20:], chips[1, 0])
    assert (first[0, :20, 20:] == 255).all()
    np.testing.assert_array_equal(second[0, :, 30:], chips[2, 0])
    assert (second[0, :, :30] == 255).all()


@pytest.mark.parametrize("transform", [(10, 0, 500100, 0, 10, 4999700), (-10, 0, 500300, 0, -10, 4999900)])
def test_chips_that_run_the_other_way_are_turned(tmp_path, transform):
    """South-up and from right to left."""
    extent = extent_of((40, 40), (20, 20), [(10, 10)])
    chip = np.arange(400).reshape(1, 1, 20, 20) % 251
    spec = OutputSpec.for_predictions(1, True, output="classes", merge="centre", nodata=None, block=BLOCK)
    shard = RankShard(shard_folder(tmp_path, 0), [extent], spec, 1)
    shard.add(0, spec.chip_values(chip, np.ones((1, 20, 20), bool))[0], np.ones((20, 20), bool), Affine(*transform))
    shard.save()
    shard.close()
    write_maps(tmp_path, [extent], [str(tmp_path / "map.tif")], ((), {}))
    with rasterio.open(tmp_path / "map.tif") as file:
        turned = chip[0, 0, ::-1] if transform[4] > 0 else chip[0, 0, :, ::-1]
        np.testing.assert_array_equal(file.read(1)[10:30, 10:30], turned)


@pytest.mark.parametrize(("shift", "row"), [(0.0, 10), (-0.5, 10), (-0.49, 10), (-0.51, 9), (0.5, 11), (0.49, 10)])
def test_a_chip_between_the_pixels_goes_to_the_nearest(shift, row):
    """Halves all the same way, so that chips of one scene stay together."""
    extent = extent_of((40, 40), (20, 20), [(10, 10), (11, 10)])
    for at, top in ((0, 10), (1, 11)):
        y = 5000000 - 10 * (top + shift)
        found = extent.chip_window(at, Affine(10, 0, 500100, 0, -10, y))
        assert (found.row - top, found.col) == (row - 10, 10)


def test_chips_that_are_elsewhere_are_refused():
    """A batch of another sampler, other pixels, turned ones."""
    extent = extent_of((40, 40), (20, 20), [(10, 10)])
    with pytest.raises(UsageError, match="row 15 and column 10"):
        extent.chip_window(0, Affine(10, 0, 500100, 0, -10, 4999850))
    with pytest.raises(UsageError, match="common grid"):
        extent.chip_window(0, Affine(20, 0, 500100, 0, -20, 4999900))
    with pytest.raises(UsageError, match="common grid"):
        extent.chip_window(0, Affine(10, 1, 500100, 1, -10, 4999900))


@pytest.mark.parametrize(
    ("planes", "labels", "options", "dtype", "nodata"),
    [
        (4, False, {}, "uint8", 255),
        (1, False, {}, "uint8", 255),
        (255, False, {}, "uint8", 255),
        (256, False, {}, "uint16", 65535),
        (4, False, {"nodata": 1000}, "uint16", 1000),
        (4, False, {"nodata": 4}, "uint8", 4),
        (1, True, {"merge": "centre", "nodata": 0}, "uint8", 0),
        (3, False, {"output": "scores"}, "float32", float("nan")),
    ],
)
def test_types_and_nodata(planes, labels, options, dtype, nodata):
    """The smallest type that holds the classes and nodata."""
    spec = OutputSpec.for_predictions(
        planes, labels, **({"output": "classes", "merge": "blend", "nodata": None, "block": 16} | options)
    )
    assert spec.dtype == dtype
    np.testing.assert_equal(spec.nodata, float(nodata))


def test_what_cannot_be_is_refused():
    """Classes have no mean; nodata is no class."""
    choices = {"nodata": None, "block": 16}
    with pytest.raises(UsageError, match="centre"):
        OutputSpec.for_predictions(1, True, output="classes", merge="blend", **choices)
    with pytest.raises(UsageError, match="scores"):
        OutputSpec.for_predictions(1, True, output="scores", merge="centre", **choices)
    with pytest.raises(UsageError, match="one of the 4 classes"):
        OutputSpec.for_predictions(4, False, output="classes", merge="blend", nodata=3, block=16)
    spec = OutputSpec.for_predictions(1, True, output="classes", merge="centre", **choices)
    valid = np.ones((1, 1, 1), bool)
    for value in (-1, 255, 256):
        with pytest.raises(UsageError, match="must fit"):
            spec.chip_values(np.full((1, 1, 1, 1), value), valid)
        assert spec.chip_values(np.full((1, 1, 1, 1), value), ~valid).dtype == np.uint8
