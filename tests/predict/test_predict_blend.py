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
from rasteret_ml.predict.join_shards import join_parts, part_folder
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.output_spec import OutputSpec
from rasteret_ml.predict.rank_shard import RankShard

BLOCK = 16


def sheet_of(shape, size, corners, first=0, start=0):
    """A map of a shape with chips at some corners."""
    grid = Grid(crs="EPSG:32633", transform=Affine(10, 0, 500000, 0, -10, 5000000), shape=shape)
    places = np.array(corners, np.int64).reshape(-1, 2)
    positions = np.arange(start, start + len(places))
    return MapExtent(grid=grid, block=BLOCK, first=first, size=size, positions=positions, corners=places)


def window_of(sheet, corner):
    """The part of the map, and of the chip, that they share."""
    rows, cols = (np.arange(c, c + n) for c, n in zip(corner, sheet.size, strict=True))
    inside = (rows >= 0) & (rows < sheet.grid.height), (cols >= 0) & (cols < sheet.grid.width)
    return np.ix_(rows[inside[0]], cols[inside[1]]), np.ix_(*inside)


def plainly_blended(sheet, chips, valids):
    """Scores of the whole map, in double precision, and where there are any."""
    rows, cols = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in sheet.size)
    weights = rows[:, None] * cols
    total, weight = np.zeros((chips.shape[1], *sheet.grid.shape)), np.zeros(sheet.grid.shape)
    for chip, valid, corner in zip(chips, valids, sheet.corners, strict=True):
        here, there = window_of(sheet, corner)
        weight[here] += (weights * valid)[there]
        for plane, scores in zip(total, chip, strict=True):
            plane[here] += (scores * weights * valid)[there]
    return total / np.where(weight > 0, weight, 1), weight > 0


def plainly_nearest(sheet, chips, valids):
    """For each pixel the chip that has it nearest its middle, the earliest of equals, pixel by pixel."""
    found = np.zeros((chips.shape[1], *sheet.grid.shape), chips.dtype)
    best = np.zeros(sheet.grid.shape)
    (height, width) = sheet.size
    for chip, valid, (top, left) in zip(chips, valids, sheet.corners, strict=True):
        for r in range(height):
            for c in range(width):
                row, col = top + r, left + c
                near = min(r + 1, height - r) * min(c + 1, width - c)
                inside = 0 <= row < sheet.grid.height and 0 <= col < sheet.grid.width
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
    return sheet_of(shape, size, corners), draw(st.integers(0, 2**32 - 1))


def written(folder, sheets, form, chips, valids, ranks, rng, memory=1):
    """The files that some ranks write, each of its own chips in any order, saved and taken up at any time."""
    positions = np.arange(len(chips))
    values = form.values(chips, valids)
    for rank in range(ranks):
        part = None
        for position in rng.permutation(positions[rank::ranks]):
            part = part or RankShard(part_folder(folder, rank), sheets, form, memory)
            part.add(int(position), values[position], valids[position])
            if rng.random() < 0.3:
                part.save()
            if rng.random() < 0.2:
                part.save()
                part.close()
                part = None
        if part is not None:
            part.save()
            part.close()
    paths = [str(folder / f"map-{i}.tif") for i in range(len(sheets))]
    join_parts(folder, sheets, paths, ((), {}))
    found = []
    for path in paths:
        with rasterio.open(path) as file:
            found.append(file.read())
    return found


@examples(30)
@given(maps(), st.integers(1, 3), st.sampled_from([1, 1 << 30]))
def test_blended_scores_are_the_weighted_mean(made, ranks, memory):
    """Within the rounding of float32; NaN where no chip is valid."""
    sheet, seed = made
    rng = np.random.default_rng(seed)
    chips = rng.random((len(sheet.positions), 3, *sheet.size), np.float32)
    valids = rng.random((len(chips), *sheet.size)) < rng.random()
    form = OutputSpec.of(3, False, output="scores", merge="blend", nodata=None, block=BLOCK)
    expected, valid = plainly_blended(sheet, chips, valids)
    if valid.any():
        with tempfile.TemporaryDirectory() as folder:
            (found,) = written(Path(folder), [sheet], form, chips, valids, ranks, rng, memory)
        np.testing.assert_allclose(found, np.where(valid, expected, np.nan), rtol=2e-5, atol=1e-6)


@examples(30)
@given(maps(), st.integers(1, 3), st.booleans())
def test_the_nearest_chip_is_exact(made, ranks, labels):
    """Whatever the order and the number of ranks."""
    sheet, seed = made
    rng = np.random.default_rng(seed)
    shape = len(sheet.positions), 1 if labels else 4, *sheet.size
    chips = rng.integers(0, 9, shape) if labels else rng.random(shape, np.float32)
    valids = rng.random((len(chips), *sheet.size)) < rng.random()
    form = OutputSpec.of(shape[1], labels, output="classes", merge="centre", nodata=None, block=BLOCK)
    expected, valid = plainly_nearest(sheet, chips if labels else chips.argmax(1, keepdims=True), valids)
    if valid.any():
        with tempfile.TemporaryDirectory() as folder:
            (found,) = written(Path(folder), [sheet], form, chips, valids, ranks, rng)
        np.testing.assert_array_equal(found, np.where(valid, expected, 255))


@examples(40)
@given(maps())
def test_a_block_waits_for_each_chip_that_may_change_it(made):
    """Counted in one go as one by one."""
    sheet, _ = made
    expected = np.zeros(sheet.shape, int)
    for corner in sheet.corners:
        rows, cols = (range(c - 1, c + n + 1) for c, n in zip(corner, sheet.size, strict=True))
        inside = {
            (r // BLOCK, c // BLOCK)
            for r in rows for c in cols if 0 <= r < sheet.grid.height and 0 <= c < sheet.grid.width
        }  # fmt: skip
        for place in inside:
            expected[place] += 1
    np.testing.assert_array_equal(sheet.chips_on_blocks(slice(None)).reshape(sheet.shape), expected)


def test_maps_of_several_sheets_do_not_mix(tmp_path):
    """Each position goes to its own."""
    rng = np.random.default_rng(0)
    one = sheet_of((40, 40), (20, 20), [(0, 0), (20, 20)])
    two = sheet_of((20, 50), (20, 20), [(0, 30)], first=one.blocks, start=2)
    chips = rng.integers(0, 9, (3, 1, 20, 20))
    form = OutputSpec.of(1, True, output="classes", merge="centre", nodata=None, block=BLOCK)
    first, second = written(tmp_path, [one, two], form, chips, np.ones((3, 20, 20), bool), 2, rng)
    np.testing.assert_array_equal(first[0, :20, :20], chips[0, 0])
    np.testing.assert_array_equal(first[0, 20:, 20:], chips[1, 0])
    assert (first[0, :20, 20:] == 255).all()
    np.testing.assert_array_equal(second[0, :, 30:], chips[2, 0])
    assert (second[0, :, :30] == 255).all()


@pytest.mark.parametrize("transform", [(10, 0, 500100, 0, 10, 4999700), (-10, 0, 500300, 0, -10, 4999900)])
def test_chips_that_run_the_other_way_are_turned(tmp_path, transform):
    """South-up and from right to left."""
    sheet = sheet_of((40, 40), (20, 20), [(10, 10)])
    chip = np.arange(400).reshape(1, 1, 20, 20) % 251
    form = OutputSpec.of(1, True, output="classes", merge="centre", nodata=None, block=BLOCK)
    part = RankShard(part_folder(tmp_path, 0), [sheet], form, 1)
    part.add(0, form.values(chip, np.ones((1, 20, 20), bool))[0], np.ones((20, 20), bool), Affine(*transform))
    part.save()
    part.close()
    join_parts(tmp_path, [sheet], [str(tmp_path / "map.tif")], ((), {}))
    with rasterio.open(tmp_path / "map.tif") as file:
        turned = chip[0, 0, ::-1] if transform[4] > 0 else chip[0, 0, :, ::-1]
        np.testing.assert_array_equal(file.read(1)[10:30, 10:30], turned)


@pytest.mark.parametrize(("shift", "row"), [(0.0, 10), (-0.5, 10), (-0.49, 10), (-0.51, 9), (0.5, 11), (0.49, 10)])
def test_a_chip_between_the_pixels_goes_to_the_nearest(shift, row):
    """Halves all the same way, so that chips of one scene stay together."""
    sheet = sheet_of((40, 40), (20, 20), [(10, 10), (11, 10)])
    for at, top in ((0, 10), (1, 11)):
        y = 5000000 - 10 * (top + shift)
        found = sheet.place(at, Affine(10, 0, 500100, 0, -10, y))
        assert (found.row - top, found.col) == (row - 10, 10)


def test_chips_that_are_elsewhere_are_refused():
    """A batch of another sampler, other pixels, turned ones."""
    sheet = sheet_of((40, 40), (20, 20), [(10, 10)])
    with pytest.raises(UsageError, match="row 15 and column 10"):
        sheet.place(0, Affine(10, 0, 500100, 0, -10, 4999850))
    with pytest.raises(UsageError, match="common grid"):
        sheet.place(0, Affine(20, 0, 500100, 0, -20, 4999900))
    with pytest.raises(UsageError, match="common grid"):
        sheet.place(0, Affine(10, 1, 500100, 1, -10, 4999900))


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
    form = OutputSpec.of(
        planes, labels, **({"output": "classes", "merge": "blend", "nodata": None, "block": 16} | options)
    )
    assert form.dtype == dtype
    np.testing.assert_equal(form.nodata, float(nodata))


def test_what_cannot_be_is_refused():
    """Classes have no mean; nodata is no class."""
    choices = {"nodata": None, "block": 16}
    with pytest.raises(UsageError, match="centre"):
        OutputSpec.of(1, True, output="classes", merge="blend", **choices)
    with pytest.raises(UsageError, match="scores"):
        OutputSpec.of(1, True, output="scores", merge="centre", **choices)
    with pytest.raises(UsageError, match="one of the 4 classes"):
        OutputSpec.of(4, False, output="classes", merge="blend", nodata=3, block=16)
    form = OutputSpec.of(1, True, output="classes", merge="centre", **choices)
    valid = np.ones((1, 1, 1), bool)
    for value in (-1, 255, 256):
        with pytest.raises(UsageError, match="do not fit"):
            form.values(np.full((1, 1, 1, 1), value), valid)
        assert form.values(np.full((1, 1, 1, 1), value), ~valid).dtype == np.uint8
