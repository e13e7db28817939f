"""Statistics are numpy's over the same pixels, in flat memory, and come back from their file."""

from __future__ import annotations

import tracemalloc

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import torch
import yaml
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.testing import make_cog
from rasteret_ml.transforms.statistics import DatasetStatistics, accumulator_for

BANDS = ("B02", "B03")


class Pixels:
    """A dataset of numpy arrays: `image` `[..., C, 100, 100 n]`, `valid`, perhaps `mask`, on a grid of 1 m."""

    res = (1.0, 1.0)
    bands = ("red", "green")

    def __init__(self, image=None, valid=None, mask=None) -> None:
        self._parts = {"image": image, "mask_valid": valid, "mask": mask}
        height, width = valid.shape[-2:]
        when = pd.DatetimeIndex(["2023-01-01"])
        times = pd.IntervalIndex.from_arrays(when, when, closed="both", name="datetime")
        self.index = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, width, height)], crs="EPSG:32633", index=times)
        self.crs, self._height = self.index.crs, height
        self.bounds = slice(0, width, 1.0), slice(0, height, 1.0), slice(when[0], when[0], 1)

    def __getitem__(self, query):
        x, y, _ = query
        rows = slice(round(self._height - y.stop), round(self._height - y.start))
        columns = slice(round(x.start), round(x.stop))
        sample = {k: torch.from_numpy(v[..., rows, columns].copy()) for k, v in self._parts.items() if v is not None}
        return sample | {"transform": torch.tensor([1.0, 0, x.start, 0, -1.0, y.stop, 0, 0, 1], dtype=torch.float64)}


def images(dtype, shape, rng) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return (rng.normal(0, 3, shape) + 1e6).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 100, 300), (3, 2, 100, 300)], ids=["CHW", "TCHW"])
def test_statistics_are_numpys(dtype, shape, rng):
    """Over all valid pixels, whatever the type and however far from zero; the dates of a series count together."""
    image, valid = images(dtype, shape, rng), rng.random((*shape[:-3], 1, *shape[-2:])) < 0.7
    found = rm.dataset_statistics(Pixels(image, valid), size=64, max_chips=None, percentiles=(0, 2, 33.3, 50, 98, 100))
    assert list(found.bands) == ["red", "green"]
    for c, band in enumerate(found.bands.values()):
        pixels = np.moveaxis(image, -3, 0)[c][np.moveaxis(valid, -3, 0)[0]].astype(np.float64)
        assert band.mean == pytest.approx(pixels.mean(), rel=1e-9, abs=1e-9)
        assert band.std == pytest.approx(pixels.std(), rel=1e-9)
        assert (band.min, band.max, band.count) == (pixels.min(), pixels.max(), pixels.size)
        assert band.sampled == pixels.size
        assert list(band.percentiles.values()) == np.percentile(pixels, [0, 2, 33.3, 50, 98, 100]).tolist()
        assert band.histogram == tuple(np.histogram(pixels, 64, (pixels.min(), pixels.max()))[0])


@examples(80)
@given(hnp.arrays(np.int16, st.integers(1, 40), elements=st.integers(-300, 300)), st.floats(0, 100))
def test_counted_percentiles_are_numpys(values, q):
    """For any few values, to the last bit."""
    tally = accumulator_for(values.dtype)
    for part in np.array_split(values, 3):
        tally.add(part, np.zeros(len(part)))
    assert tally.result((q,)).percentiles[q] == np.percentile(values.astype(np.float64), q)


@examples(40)
@given(st.integers(0, 1000), st.floats(-1e8, 1e8), st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_merged_moments_are_those_of_the_whole(seed, offset, sizes):
    """However it is cut; what is not finite does not count."""
    values = (np.random.default_rng(seed).normal(offset, 2.0, sum(sizes))).astype(np.float64)
    tally = accumulator_for(values.dtype)
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        tally.add(np.append(part, [np.nan, np.inf]), np.zeros(len(part) + 2))
    found = tally.result(())
    assert found.count == len(values)
    assert found.mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(values.std(), rel=1e-9, abs=1e-7)


def test_percentiles_of_large_types_are_those_of_a_fair_sample(rng):
    """131,072 of 600,000 pixels: ranks within five standard deviations (0.7 %); the seed chooses the pixels."""
    image = rng.exponential(100.0, (1, 600, 1000)).astype(np.float32)
    plane = Pixels(image, np.ones((1, 600, 1000), bool))
    first, again, other = (
        rm.dataset_statistics(plane, size=200, max_chips=None, seed=s, batch_size=b, percentiles=(2, 50, 98))
        for s, b in ((0, 8), (0, 3), (1, 8))
    )
    (band,) = first.bands.values()
    assert list(first.bands) == ["band_0"]
    assert band.sampled == 1 << 17
    for q, value in band.percentiles.items():
        assert abs((image < value).mean() - q / 100) < 0.007
    assert first == again
    assert first.bands["band_0"].percentiles != other.bands["band_0"].percentiles


def test_over_real_chips_of_scenes(scenes):
    """The whole mosaic, as numpy has it, with the classes of the labels in the same pass."""
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    found = rm.dataset_statistics(dataset & labels, size=100, max_chips=None)
    sample = (dataset & labels)[dataset.bounds[:2]]
    valid = sample["mask_valid"].numpy()[0]
    image = sample["image"].numpy().astype(float)
    np.testing.assert_allclose(found.mean, [band[valid].mean() for band in image], rtol=1e-12)
    np.testing.assert_allclose(found.std, [band[valid].std() for band in image], rtol=1e-12)
    assert list(found.bands) == list(BANDS)
    assert list(rm.dataset_statistics(dataset | dataset, size=100, max_chips=1).bands) == list(BANDS)
    values, counts = np.unique(sample["mask"].numpy()[valid], return_counts=True)
    assert found.classes == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert found.class_shares == pytest.approx({v: c / valid.sum() for v, c in found.classes.items()})
    assert sum(found.class_weights[v] * c for v, c in found.classes.items()) == pytest.approx(valid.sum())
    assert len({found.class_weights[v] * c for v, c in found.classes.items()}) <= 2


def test_labels_alone_are_counted(scenes):
    """Nodata is no class; continuous labels are measured as a band."""
    labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    values, counts = np.unique(scenes.cover[scenes.cover != 0], return_counts=True)
    found = rm.dataset_statistics(labels, size=64, max_chips=None)
    assert found.classes == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert found.bands == {}
    heights = np.arange(10000, dtype=np.float32).reshape(100, 100)
    plane = Pixels(valid=np.ones((1, 100, 100), bool), mask=heights)
    assert rm.dataset_statistics(plane, size=50).bands["mask"].mean == pytest.approx(4999.5)


def test_each_of_several_heads_is_counted_by_its_key(scenes):
    """Alone and beside images; a key that no sample has is refused with those there are."""
    images = rm.RasteretDataset(scenes.images, ["B02"])
    cover = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    head = rm.RasteretDataset(
        scenes.labels, ["B1"], is_image=False, sample={"key": "mask_cover"}, labels={"remap": {1: 7, 2: 8}}
    )
    both = images & cover & head
    every = {"size": 100, "max_chips": None}
    plain, other = rm.dataset_statistics(both, **every), rm.dataset_statistics(both, **every, key="mask_cover")
    assert other.classes == {value + 6: count for value, count in plain.classes.items() if value in (1, 2)}
    assert other.bands == plain.bands
    assert rm.dataset_statistics(head, size=64, max_chips=None, key="mask_cover").classes.keys() == {7, 8}
    for dataset, key in ((head, "mask"), (both, "mask_heights")):
        with pytest.raises(UsageError, match=f"no '{key}'.*mask_cover"):
            rm.dataset_statistics(dataset, size=64, key=key)
    cells = rm.label_cells(head, 64, key="mask_cover")
    assert {"class_7", "class_8"} <= set(cells.columns)


def test_only_pixels_inside_the_aois_count(rng):
    """A chip reaches past its polygon; what is there is validation's."""
    image, valid = images("uint16", (2, 100, 100), rng), np.ones((1, 100, 100), bool)
    aoi = gpd.GeoDataFrame(geometry=[shapely.box(0, 0, 37, 100)], crs=32633)
    found = rm.dataset_statistics(Pixels(image, valid), aois=aoi, size=50, max_chips=None)
    assert found.mean == pytest.approx(image[:, :, :37].mean(axis=(1, 2)).tolist(), rel=1e-12)
    assert found.bands["red"].count == 3700


def test_some_chips_are_chosen_by_the_seed(rng):
    """A bounded pass looks at so many, others for another seed."""
    plane = Pixels(images("uint16", (2, 100, 1000), rng), np.ones((1, 100, 1000), bool))
    one, again, other = (rm.dataset_statistics(plane, size=50, max_chips=7, seed=s) for s in (0, 0, 1))
    assert one == again
    assert one.mean != other.mean
    assert one.made["chips"] == 7
    assert one.made["chips_in_all"] == 40
    assert one.bands["red"].count == 7 * 2500


def test_a_file_keeps_all_of_it(rng, tmp_path):
    """Equal when read again, and legible: bands are keys."""
    valid = np.ones((1, 100, 300), bool)
    labels = rng.integers(0, 3, (100, 300))
    found = rm.dataset_statistics(Pixels(images("float32", (2, 100, 300), rng), valid, labels), size=64, seed=5)
    path = found.save(tmp_path / "new" / "statistics.yaml")
    assert DatasetStatistics.load(path) == found
    plain = yaml.safe_load((tmp_path / "new" / "statistics.yaml").read_text())
    assert plain["bands"]["red"]["mean"] == found.mean[0]
    assert plain["classes"] == found.classes
    assert plain["made"]["seed"] == 5
    assert plain["made"]["bounds"] == {"EPSG:32633": [0, 0, 300, 100]}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["statistics.yaml"]
    for broken in ("", "bands: 3", "{", "bands: {red: {mean: x}}"):
        (tmp_path / "broken.yaml").write_text(broken)
        with pytest.raises(DataError, match=r"broken\.yaml is not a statistics YAML"):
            DatasetStatistics.load(tmp_path / "broken.yaml")


def test_what_cannot_be_measured_is_refused(rng):
    """Each says why."""
    image, valid = images("uint16", (2, 100, 100), rng), np.zeros((1, 100, 100), bool)
    with pytest.raises(UsageError, match=r"No valid pixel of \['green', 'red'\]"):
        rm.dataset_statistics(Pixels(image, valid), size=50)
    with pytest.raises(UsageError, match="percentiles must lie between"):
        rm.dataset_statistics(Pixels(image, ~valid), size=50, percentiles=(101,))
    with pytest.raises(UsageError, match="magnitude"):
        rm.dataset_statistics(Pixels(image.astype(np.complex64), ~valid), size=50)
    with pytest.raises(UsageError, match="must be > 0, got 8 and 0"):
        rm.dataset_statistics(Pixels(image, ~valid), size=50, max_chips=0)


def test_a_constant_band_can_be_divided_by():
    """Its deviation is 0, its divisor 1."""
    found = rm.dataset_statistics(Pixels(np.full((2, 100, 100), 7, np.uint8), np.ones((1, 100, 100), bool)), size=50)
    assert [band.std for band in found.bands.values()] == [0, 0]
    assert found.std == (1, 1)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_memory_does_not_grow_with_the_chips(dtype):
    """The peak of a pass over four times as many chips is about the same."""
    valid = np.ones((1, 128, 128 * 160), bool)
    image = np.random.default_rng(0).integers(0, 60000, (2, 128, 128 * 160)).astype(dtype)
    plane = Pixels(image, valid)
    rm.dataset_statistics(plane, size=128, max_chips=8)
    peaks = []
    for chips in (40, 160):
        tracemalloc.start()
        rm.dataset_statistics(plane, size=128, max_chips=chips, batch_size=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.15 * peaks[0]


@pytest.mark.slow
def test_memory_of_a_pass_over_files_does_not_grow_either(tmp_path):
    """Tiles, plans and samples of a batch are let go, and the records that were read stay few."""
    rng = np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(1, 4000, (1024, 1024), np.uint16)
        place = Affine(10, 0, 500000 + 10240 * number, 0, -10, 5000000)
        make_cog(tmp_path / f"s{number}_A.tif", pixels, transform=place)
    dataset = rm.RasteretDataset(rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A"]), ["A"])
    rm.dataset_statistics(dataset, size=64, max_chips=40, batch_size=4)
    peaks = []
    for chips in (100, 800):
        tracemalloc.start()
        found = rm.dataset_statistics(dataset, size=64, max_chips=chips, batch_size=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.bands["A"].count == chips * 64 * 64
    kept = 700 * 64 * 64 * 3  # the pixels and validity of the chips that the second pass reads beyond the first
    assert peaks[1] - peaks[0] < kept / 8


def test_native_chips_are_cut_in_their_own_zone(tmp_path):
    """Two zones: the pixels of an AOI are counted on the grid of the scene that it lies in."""
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) + 1
    for name, crs in (("west", "EPSG:32633"), ("east", "EPSG:32634")):
        make_cog(tmp_path / f"{name}_A.tif", values, crs=crs, blocksize=128)
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "c.parquet", bands=["A"], datetime=None)
    dataset = rm.RasteretDataset(collection, ["A"], grid="native")
    half = gpd.GeoDataFrame(geometry=[shapely.box(500000, 4999360, 500320, 5000000)], crs="EPSG:32634")
    found = rm.dataset_statistics(dataset, aois=half, size=32, max_chips=None).bands["A"]
    assert found.count == 64 * 32
    assert found.mean == pytest.approx(values[:, :32].mean())


@pytest.mark.parametrize(
    "aoi",
    [
        shapely.box(179.5, -0.5, 180.5, 0),
        shapely.MultiPolygon([shapely.box(179.5, -0.5, 180, 0), shapely.box(-180, -0.5, -179.5, 0)]),
    ],
    ids=["past the end", "in two parts"],
)
def test_an_aoi_across_the_antimeridian_counts_whole(tmp_path, aoi):
    """Of its chips past 180 degrees no pixel did."""
    values = np.arange(200 * 400, dtype=np.uint16).reshape(200, 400)
    place = Affine(0.01, 0, 178, 0, -0.01, 1)
    make_cog(tmp_path / "a.tif", values, crs="EPSG:4326", transform=place)
    dataset = rm.RasteretDataset(rm.build(str(tmp_path / "a.tif"), tmp_path / "c.parquet", bands=["A"]), ["A"])
    found = rm.dataset_statistics(dataset, aois=[aoi], size=32, max_chips=None).bands["A"]
    assert found.count == 50 * 100
    assert found.mean == pytest.approx(values[100:150, 150:250].mean())


def test_what_doubles_make_of_constants(tmp_path):
    """A constant is one, also where its sums round; a range too narrow for bins is one bin; numpy numbers save."""
    valid = np.ones((1, 100, 100), bool)
    for value in (0.1, 0.3, 1 / 3):
        found = rm.dataset_statistics(Pixels(np.full((1, 100, 100), value), valid), size=32, percentiles=np.array([50]))
        assert found.std == (1.0,)
        assert found.mean == (value,)
        found.save(tmp_path / "s.yaml")
        assert DatasetStatistics.load(tmp_path / "s.yaml").mean == (value,)
    nearly = np.full((1, 100, 100), 0.3)
    nearly[0, 0, 0] = 0.1 + 0.2
    assert sum(rm.dataset_statistics(Pixels(nearly, valid), size=32).bands["band_0"].histogram) == 100 * 100
