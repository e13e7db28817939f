"""Datasets whose place is a circle: records and AOIs on both sides of the antimeridian, labels of the whole globe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
from affine import Affine

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog

LONLAT = "EPSG:4326"


def _globe(folder: Path, west: float, name: str = "globe") -> tuple[Path, np.ndarray]:
    """A raster of all longitudes, one degree a pixel, with the values of a -180..180 one."""
    data = np.arange(180 * 360, dtype=np.uint16).reshape(180, 360)
    turned = np.roll(data, -int(west + 180), axis=1)
    transform = Affine(1, 0, west, 0, -1, 90)
    make_cog(folder / f"{name}.tif", turned, blocksize=64, crs=LONLAT, transform=transform, overviews="none")
    return folder / f"{name}.tif", data


def _dataset(folder: Path, *paths: Path, **options) -> rm.RasteretDataset:
    collection = rm.build([str(path) for path in paths], folder / "c.parquet", datetime=None)
    return rm.RasteretDataset(collection, ["B1"], **options)


@pytest.mark.parametrize("west", [-180, 0])
@pytest.mark.parametrize("lon", [-185, -100, -5, 0, 100, 175, 200, 355])
def test_a_chip_anywhere_on_the_circle(tmp_path: Path, west: int, lon: int) -> None:
    """Ten by ten degrees, whatever turn its longitudes are written in: numpy's roll of the raster."""
    path, data = _globe(tmp_path, west)
    sample = _dataset(tmp_path, path)[lon : lon + 10, 10:20]
    cols = np.arange(lon + 180, lon + 190) % 360
    np.testing.assert_array_equal(np.asarray(sample["image"])[0], data[70:80][:, cols])
    assert bool(sample["mask_valid"].all())


def test_records_on_both_sides_of_the_antimeridian(tmp_path: Path) -> None:
    """Two tiles that meet at 180 degrees fill a chip across it."""
    west = make_cog(
        tmp_path / "w.tif", np.full((20, 10), 1, np.uint8), crs=LONLAT, transform=Affine(1, 0, 170, 0, -1, 20)
    )
    east = make_cog(
        tmp_path / "e.tif", np.full((20, 10), 2, np.uint8), crs=LONLAT, transform=Affine(1, 0, -180, 0, -1, 20)
    )
    dataset = _dataset(tmp_path, Path(west), Path(east))
    for start in (175, -185):
        sample = dataset[start : start + 10, 0:10]
        assert np.asarray(sample["image"])[0, 0].tolist() == [1] * 5 + [2] * 5
        assert bool(sample["mask_valid"].all())


@pytest.mark.parametrize("west", [-180, 0])
@pytest.mark.parametrize(
    "aoi",
    [
        shapely.box(176, 0, 184, 8),
        shapely.box(-184, 0, -176, 8),
        shapely.MultiPolygon([shapely.box(176, 0, 180, 8), shapely.box(-180, 0, -176, 8)]),
    ],
    ids=["past 180", "past -180", "split"],
)
def test_an_aoi_across_the_antimeridian_is_sampled_whole(tmp_path: Path, west: int, aoi: shapely.Geometry) -> None:
    """A grid of chips covers every pixel of it, and every one is valid."""
    path, _ = _globe(tmp_path, west)
    dataset = _dataset(tmp_path, path)
    sampler = rm.GridAOISampler(dataset, size=4, stride=4, aois=[aoi], aois_crs=LONLAT)
    seen = set()
    for query in sampler:
        sample = dataset[query]
        assert bool(sample["mask_valid"].all())
        seen |= set(np.asarray(sample["image"])[0].ravel().tolist())
    wanted = {row * 360 + col for row in range(82, 90) for col in (*range(356, 360), *range(4))}
    assert wanted <= seen


def test_labels_of_the_globe_under_images_of_a_zone(tmp_path: Path) -> None:
    """`images & labels`: the globe is cut to what the zone's projection can show."""
    globe, data = _globe(tmp_path, -180)
    scene = make_cog(
        tmp_path / "scene.tif",
        np.ones((64, 64), np.uint16),
        crs="EPSG:32633",
        transform=Affine(1000, 0, 500000, 0, -1000, 5000000),
    )
    images = rm.RasteretDataset(rm.build(scene, tmp_path / "s.parquet", datetime=None), ["B1"])
    labels = rm.RasteretDataset(rm.build(str(globe), tmp_path / "g.parquet", datetime=None), ["B1"], is_image=False)
    both = images & labels
    sample = both[500000:532000, 4968000:5000000]
    assert int(sample["mask"][0, 0]) == data[90 - 46, 180 + 15]  # 15.0 E, 45.15 N
    assert bool((sample["mask"] != -100).all())


def test_a_scene_on_a_projections_edge_is_refused_by_name(tmp_path: Path) -> None:
    """A UTM scene across 180 degrees in web Mercator: an error that says what to do, not a grid round the world."""
    data = np.ones((60, 80), np.uint8)
    path = make_cog(tmp_path / "a.tif", data, crs="EPSG:32660", transform=Affine(200, 0, 730000, 0, -200, 5000000))
    with pytest.raises(UsageError, match=r"edge of that projection.*Choose another CRS"):
        _dataset(tmp_path, Path(path), crs="EPSG:3857")


def test_labels_are_never_read_from_overviews_that_may_be_averages(tmp_path: Path) -> None:
    """At half the resolution each label is one of the four under it, whatever made the file's overviews."""
    codes = np.random.default_rng(0).integers(0, 5, (256, 256)).astype(np.uint8)
    path = make_cog(tmp_path / "a.tif", codes, blocksize=64, overview_resampling="cubic")
    dataset = _dataset(tmp_path, Path(path), is_image=False, res=20)
    mask = np.asarray(dataset[500000:502560, 4997440:5000000]["mask"])
    under = codes.reshape(128, 2, 128, 2).swapaxes(1, 2).reshape(128, 128, 4)
    assert bool((under == mask[..., None]).any(axis=-1).all())
