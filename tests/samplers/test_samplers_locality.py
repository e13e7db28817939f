"""Local orders: the same chips in diverse batches that share tiles."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
import rasteret_ml.testing
from rasteret_ml.errors import UsageError
from rasteret_ml.samplers.locality import Locality, TileLookup, TilePositions, local_order
from rasteret_ml.samplers.ranks import epoch_random, uniforms

RES = 10.0
TILE = 512 * RES
ALWAYS = slice(pd.Timestamp("1900-01-01"), pd.Timestamp("2100-01-01"), 1)


@pytest.fixture
def batch_diversity(monkeypatch):
    """The measure of diversity in the benchmarks."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "benchmarks")
    return importlib.import_module("batch_diversity").batch_diversity


class Scenes:
    """A minimal dataset for samplers: boxes and their dates."""

    res = (RES, RES)

    def __init__(self, shapes, dates=None, crs="EPSG:32633"):
        when = pd.DatetimeIndex(["2023-01-01"] * len(shapes) if dates is None else dates)
        index = pd.IntervalIndex.from_arrays(when, when, closed="both", name="datetime")
        self.index = gpd.GeoDataFrame({"rid": np.arange(len(shapes))}, geometry=list(shapes), crs=crs, index=index)
        self.crs = self.index.crs

    @property
    def bounds(self):
        xmin, ymin, xmax, ymax = self.index.total_bounds
        times = self.index.index
        return slice(xmin, xmax, RES), slice(ymin, ymax, RES), slice(times.left.min(), times.right.max(), 1)


def square_scenes(count, tiles=12):
    """Scenes of `tiles` x `tiles` tiles, separated by the width of a scene."""
    side = tiles * TILE
    return Scenes([shapely.box(2 * i * side, 0, (2 * i + 1) * side, side) for i in range(count)])


def places(aois):
    return sorted((a[0].start, a[0].stop, a[1].start, a[1].stop, a.row) for a in aois)


def decoded(aois, dataset, capacity, workers=1, batch_size=16):
    """Decoded tiles per chip, if workers alternate by batch and each caches its last `capacity` tiles."""
    scenes = shapely.bounds(np.asarray(dataset.index.geometry, dtype=object))
    caches = [OrderedDict() for _ in range(workers)]
    misses = 0
    for start in range(0, len(aois), batch_size):
        cache = caches[start // batch_size % workers]
        for x, y, _ in aois[start : start + batch_size]:
            scene = int(np.flatnonzero((scenes[:, 0] <= x.start) & (x.stop <= scenes[:, 2]))[0])
            left, top = scenes[scene, 0], scenes[scene, 3]
            for row in range(int((top - y.stop) // TILE), int((top - y.start - 1e-6) // TILE) + 1):
                for column in range(int((x.start - left) // TILE), int((x.stop - left - 1e-6) // TILE) + 1):
                    misses += (scene, row, column) not in cache
                    cache[scene, row, column] = None
                    cache.move_to_end((scene, row, column))
        while len(cache) > capacity:
            cache.popitem(last=False)
    return misses / len(aois)


@pytest.mark.parametrize("aois", [None, [shapely.box(1e4, 1e4, 5e4, 3e4), shapely.Point(15e4, 3e4).buffer(2e4)]])
@pytest.mark.parametrize(
    "locality", [1, 16, Locality(blocks=5, tiles=2), Locality(lanes=3, batch_size=8), Locality(blocks=5000)]
)
def test_an_epoch_has_the_chips_of_the_uniform_order(locality, aois):
    """Each chip occurs once, in another order, with ascending positions."""
    dataset = square_scenes(3)
    options = {"size": 256, "length": 1003, "aois": aois, "aois_crs": dataset.crs, "seed": 4}
    uniform, local = (rm.RandomAOISampler(dataset, **options, locality=k) for k in (None, locality))
    for epoch in (0, 7):
        uniform.set_epoch(epoch)
        local.set_epoch(epoch)
        one, other = list(uniform), list(local)
        assert places(one) == places(other)
        assert [tuple(a) for a in one] != [tuple(a) for a in other]
        assert [a.position for a in other] == list(range(1003))
        assert {a.epoch for a in other} == {epoch}
        assert [tuple(local.at(i)) for i in (0, 500, 1002)] == [tuple(other[i]) for i in (0, 500, 1002)]


def test_the_order_is_a_function_of_seed_epoch_and_locality():
    """Also for a pickled sampler."""
    dataset = square_scenes(2)

    def order(seed=0, epoch=0, locality=16):
        sampler = rm.RandomAOISampler(dataset, 256, 500, seed=seed, locality=locality)
        sampler.set_epoch(3)
        sampler.at(0)
        sampler = pickle.loads(pickle.dumps(sampler))
        sampler.set_epoch(epoch)
        return [tuple(a) for a in sampler]

    first = order()
    assert order() == first
    for other in (order(seed=1), order(epoch=1), order(locality=8), order(locality=Locality(tiles=2))):
        assert other != first
    assert order(locality=Locality(blocks=16)) == first


@pytest.mark.slow
def test_another_process_has_the_same_order():
    """It does not depend on the hash seed."""
    code = (
        "import numpy as np, zlib\n"
        "from rasteret_ml.samplers.locality import Locality, TilePositions, local_order\n"
        "from rasteret_ml.samplers.ranks import epoch_random\n"
        "n = np.arange(5000)\n"
        "tiles = TilePositions(scene=n % 7 - 1, row=n * 31 % 23, column=n * 17 % 29)\n"
        "order = local_order(tiles, Locality(lanes=2), epoch_random(3, 5))\n"
        "print(zlib.crc32(order.astype('<i8').tobytes()))\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env={"PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("1", "2")
    }
    # A known answer, because a change of it (in NumPy or here) would break resumed runs.
    assert seen == {"3418301618\n"}


def test_epoch_random_and_uniforms_have_separate_streams():
    """Both use the same key."""
    assert not np.isin(epoch_random(3, 5).random(1000), uniforms(3, 5, range(1000))).any()
    assert not np.array_equal(epoch_random(3, 5).random(9), epoch_random(3, 6).random(9))


@examples(150)
@given(st.data(), st.integers(0, 300), st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 20))
def test_an_order_is_a_permutation(data, count, blocks, tiles, lanes, batch_size):
    """For any chips and locality."""
    scenes, side = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 9))
    random = np.random.default_rng(count)
    positions = TilePositions(
        scene=random.integers(-1, scenes + 1, count),
        row=random.integers(-side, side, count),
        column=random.integers(-side, side, count),
    )
    locality = Locality(blocks=blocks, tiles=tiles, lanes=lanes, batch_size=batch_size)
    order = local_order(positions, locality, epoch_random(0, 0))
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


@examples(50)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 32))
def test_every_scene_has_its_share_at_any_time(sizes, blocks):
    """In each round of the active blocks a scene has its share of chips, rounded (plus one at the cuts of streams)."""
    scene = np.repeat(np.arange(len(sizes)), sizes)
    random = np.random.default_rng(1)
    tiles = TilePositions(scene=scene, row=random.integers(0, 9, len(scene)), column=random.integers(0, 9, len(scene)))
    order = local_order(tiles, Locality(blocks=blocks, tiles=2), epoch_random(0, 0))
    whole = len(order) // blocks * blocks
    rounds = scene[order[:whole]].reshape(-1, blocks)
    for number, size in enumerate(sizes):
        share = blocks * size / len(scene)
        held = (rounds == number).sum(axis=1)
        assert held.max(initial=0) <= np.ceil(share) + 1
        assert held.min(initial=blocks) >= np.floor(share) - 1


def test_lanes_alternate_without_sharing_blocks():
    """They alternate by batch, so that each of two workers keeps to its own blocks."""
    dataset = square_scenes(12)
    locality = Locality(blocks=16, tiles=3, lanes=2, batch_size=16)
    aois = list(rm.RandomAOISampler(dataset, 256, 12 * 144 * 4, locality=locality))
    cells = TileLookup(dataset, (256, 256), ALWAYS).locate(np.array([(a[0].start, a[1].stop) for a in aois]))
    blocks = cells.blocks(3).reshape(-1, 2, 16)
    assert (
        np.mean([len(set(a) & set(b)) for a, b in blocks]) < 1
    )  # a block that is cut by the end of a stream is in both
    one = list(rm.RandomAOISampler(dataset, 256, len(aois), locality=Locality()))
    assert decoded(aois, dataset, 128, workers=2) < 0.7 * decoded(one, dataset, 128, workers=2)


@pytest.mark.parametrize("scenes", [1, 4, 8, 60])
def test_default_batches_are_as_diverse_as_uniform_ones(scenes, batch_diversity):
    """At least 0.9 of the scenes and 0.5 of the tiles that uniform batches hold, in each quarter of the epoch."""
    tiles = 12 if scenes < 60 else 6
    dataset = square_scenes(scenes, tiles)
    length = scenes * tiles * tiles * 8
    aois = list(rm.RandomAOISampler(dataset, 256, length, locality=Locality()))
    whole = batch_diversity(aois, dataset, 16)
    assert whole.scene_ratio > 0.99
    assert whole.tile_ratio > 0.99
    quarter = length // 4
    for start in range(0, length, quarter):
        part = batch_diversity(aois[start : start + quarter], dataset, 16)
        assert part.scenes >= 0.9 * whole.scenes_uniform
        assert part.tiles >= 0.5 * whole.tiles_uniform


def test_default_batches_share_tiles():
    """With a cache of 128 tiles per worker, chips decode five times fewer tiles than they touch (2.25)."""
    dataset = square_scenes(4)
    uniform, local = (list(rm.RandomAOISampler(dataset, 256, 4608, locality=value)) for value in (None, Locality()))
    assert decoded(local, dataset, 128, workers=1) < min(2.25 / 9, decoded(uniform, dataset, 128, workers=1) / 7)
    assert decoded(local, dataset, 128, workers=2) < min(2.25 / 5, decoded(uniform, dataset, 128, workers=2) / 4)


def test_local_draws_are_uniform_over_the_area():
    """Chi-squared over 64 cells of where centres may lie (99.9 % quantile of 63 degrees: 103.4), and over quarters."""
    dataset = square_scenes(1)
    aois = list(rm.RandomAOISampler(dataset, 256, 20_000, seed=3, locality=Locality()))
    room = 12 * TILE - 256 * RES
    cells = np.array([(a[0].start, a[1].start) for a in aois]) // (room / 8)
    counts = np.bincount((cells[:, 0] * 8 + cells[:, 1]).astype(int), minlength=64)
    assert ((counts - 312.5) ** 2 / 312.5).sum() < 103.4


def test_a_block_is_traversed_from_any_side():
    """No direction correlates with time."""
    dataset = square_scenes(1, 3)
    firsts = []
    for seed in range(200):
        aoi = rm.RandomAOISampler(dataset, 64, 90, seed=seed, locality=Locality(blocks=1, tiles=3)).at(0)
        firsts.append((aoi[0].start // TILE, aoi[1].start // TILE))
    share = np.array([[firsts.count((x, y)) for x in range(3)] for y in range(3)]) / 200
    assert share[1, 1] < 0.03  # the middle is never first
    assert (share[[0, 0, 2, 2], [0, 2, 0, 2]] > 0.08).all()


def test_where_scenes_overlap_the_newest_counts():
    """Then the first in the index; dates outside the time of interest are ignored."""
    shapes = [shapely.box(0, 0, 2e4, 2e4), shapely.box(0, 0, 2e4, 2e4), shapely.box(1e4, 0, 3e4, 2e4)]
    dataset = Scenes(
        [shapes[0], shapes[1], shapes[2], shapes[2]], ["2023-01-01", "2023-01-03", "2023-01-02", "2023-01-02"]
    )
    corners = np.array([(100.0, 15000.0), (12000.0, 15000.0), (25000.0, 15000.0), (90000.0, 15000.0)])

    def found(when):
        return TileLookup(dataset, (64, 64), when).locate(corners).scene.tolist()

    both, late, nowhere = found(ALWAYS)[0], found(ALWAYS)[2], found(ALWAYS)[3]
    assert nowhere == -1
    assert both != late
    assert found(ALWAYS) == [both, both, late, -1]
    second = slice(pd.Timestamp("2023-01-02"), pd.Timestamp("2023-01-02"), 1)
    assert found(second) == [-1, 0, 0, -1]


def test_the_tile_grid_is_the_datasets_own():
    """It is found by record, in any order of the index; the default is 512 pixels from the scene's corner."""
    dataset = square_scenes(3, 2)
    corners = np.array([(100.0, 2 * TILE - 10), (4 * TILE + 3000, 2 * TILE - 3000), (8 * TILE + 3000, TILE - 10)])
    plain = TileLookup(dataset, (64, 64), ALWAYS).locate(corners)
    assert plain.row.tolist() == [0, 0, 1]
    assert plain.column.tolist() == [0, 0, 0]
    left = np.array([-640.0, 4 * TILE, 8 * TILE])
    dataset.tile_layout = lambda: SimpleNamespace(
        rows=np.arange(3),
        x0=left,
        y0=np.full(3, 2 * TILE),
        tile_width=np.full(3, 2560.0),
        tile_height=np.full(3, 1280.0),
    )
    dataset.index = dataset.index.iloc[[2, 0, 1]]
    cells = TileLookup(dataset, (64, 64), ALWAYS).locate(corners)
    assert cells.row.tolist() == [0, 2, 4]
    assert cells.column.tolist() == [0, 1, 1]
    # Tiles are grouped for chips that are larger than a tile.
    grouped = TileLookup(dataset, (256, 256), ALWAYS).locate(corners)
    assert grouped.row.tolist() == [0, 1, 2]


def test_combinations_have_the_scenes_of_their_parts():
    """Those of the first part come first."""
    one, two = square_scenes(1, 2), Scenes([shapely.box(0, 0, 4 * TILE, 2 * TILE)])
    pair = SimpleNamespace(datasets=[one, two], index=two.index, crs=two.crs, res=two.res)
    corners = np.array([(100.0, 2 * TILE), (3 * TILE, 2 * TILE), (9 * TILE, 2 * TILE)])
    assert TileLookup(pair, (64, 64), ALWAYS).locate(corners).scene.tolist() == [0, 1, -1]


def test_longitudes_360_degrees_apart_are_the_same_scene():
    """For chips of AOIs across the antimeridian."""
    dataset = Scenes([shapely.box(170, 0, 180, 10)], crs="EPSG:4326")
    dataset.res = (0.001, 0.001)
    lookup = TileLookup(dataset, (64, 64), ALWAYS)
    assert lookup.locate(np.array([(-185.0, 5.0), (175.0, 5.0), (185.0, 5.0)])).scene.tolist() == [0, 0, -1]


def make_scenes(folder, rng):
    """Write two separate files of 4 x 4 tiles of 256 pixels."""
    for i in range(2):
        pixels = rng.integers(1, 9, (1, 1024, 1024)).astype(np.uint16)
        transform = Affine(RES, 0, 5e5 + i * 2e4, 0, -RES, 4e6)
        rm.testing.make_cog(folder / f"s{i}.tif", pixels, transform=transform, blocksize=256)


def test_a_rasteret_dataset_provides_its_tile_size(tmp_path, rng):
    """It is 256 pixels in this case."""
    make_scenes(tmp_path, rng)
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet")
    dataset = rm.RasteretDataset(collection, collection.bands)
    uniform, local = (rm.RandomAOISampler(dataset, 64, 600, locality=value) for value in (None, 8))
    assert places(uniform) == places(local)
    corners = np.array([(a[0].start, a[1].stop) for a in local])
    cells = TileLookup(dataset, (64, 64), ALWAYS).locate(corners)
    assert len(np.unique(cells.blocks(1))) == 32
    np.testing.assert_array_equal(cells.scene, (corners[:, 0] > 5.1e5).astype(int))
    np.testing.assert_array_equal(cells.column, (corners[:, 0] - 5e5) % 2e4 // 2560)
    np.testing.assert_array_equal(cells.row, (4e6 - corners[:, 1]) // 2560)
    sample = dataset[local.at(3)]
    assert bool(sample["mask_valid"].all())


def test_a_stock_torchgeo_dataset(tmp_path, rng, batch_diversity):
    """And `&` of two: the same chips in another order, which can be read."""
    from torchgeo.datasets import RasterDataset

    make_scenes(tmp_path, rng)
    images = RasterDataset(str(tmp_path))
    for dataset in (images, images & RasterDataset(str(tmp_path))):
        uniform, local = (rm.RandomAOISampler(dataset, 64, 200, locality=value) for value in (None, 4))
        assert places(uniform) == places(local)
        assert batch_diversity(local, dataset, 4).scenes == 2
        assert dataset[local.at(0)]["image"].shape[-2:] == (64, 64)


def test_batch_diversity_of_a_known_order(batch_diversity):
    """Compare with numbers computed by hand."""
    dataset = square_scenes(2, 2)
    queries = [
        (slice(x, x + 640, RES), slice(y - 640, y, RES), ALWAYS)
        for x, y in ((0, 100), (10, 90), (TILE, 99), (4 * TILE, 5 * RES))
        for y in [y + 1000.0]
    ]
    found = batch_diversity(queries, dataset, 2)
    assert (found.scenes, found.tiles) == (1.5, 1.5)
    # Of 6 pairs, 3 hold both scenes, and all but one two tiles.
    assert found.scenes_uniform == pytest.approx(1.5)
    assert found.tiles_uniform == pytest.approx(2 - 1 / 6)
    assert (found.scene_ratio, found.tile_ratio) == pytest.approx((1.0, 1.5 / (2 - 1 / 6)))
    with pytest.raises(UsageError, match="batch of 5"):
        batch_diversity(queries, dataset, 5)


def test_uniform_draws_are_as_diverse_as_expected(batch_diversity):
    """The expected number is that of a random order."""
    dataset = square_scenes(5)
    found = batch_diversity(rm.RandomAOISampler(dataset, 256, 8000, seed=2), dataset, 16)
    assert found.scene_ratio == pytest.approx(1, abs=0.02)
    assert found.tile_ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("value", [0, -3, 1.5, "many", True])
def test_locality_must_be_a_positive_integer(value):
    """The message names the field."""
    with pytest.raises(UsageError, match="blocks"):
        rm.RandomAOISampler(square_scenes(1), 64, 10, locality=value)
    with pytest.raises(UsageError, match="lanes"):
        Locality(lanes=value)
