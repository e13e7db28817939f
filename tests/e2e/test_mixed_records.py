"""Records that differ: missing bands, other types, other nodata, other resolutions. Right, or refused by name."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.warp import reproject

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog

WHOLE = slice(500000.0, 500640.0), slice(4999360.0, 5000000.0)


def scene(folder: Path, name: str, band: str, pixels: np.ndarray, res: float = 10.0, **options) -> str:
    """A band of a scene at the usual corner."""
    transform = Affine(res, 0, 500000, 0, -res, 5000000)
    return make_cog(folder / f"{name}_{band}.tif", pixels, transform=transform, blocksize=128, **options)


def collect(folder: Path, bands: list[str]) -> rm.Collection:
    """All that lies in the folder."""
    return rm.build(str(folder / "*.tif"), folder / "c.parquet", bands=bands)


def test_records_that_lack_a_band_are_named_and_left_out(tmp_path: Path, caplog, rng) -> None:
    """The others give right pixels; asked for the bands that all have, all are used."""
    pixels = rng.integers(1, 999, (3, 64, 64), np.uint16)
    scene(tmp_path, "full_20230101", "A", pixels[0])
    scene(tmp_path, "full_20230101", "B", pixels[1])
    scene(tmp_path, "half_20230102", "A", pixels[2])
    collection = collect(tmp_path, ["A", "B"])
    with caplog.at_level(logging.WARNING):
        both = rm.RasteretDataset(collection, ["A", "B"])
    assert "1 of 2 records" in caplog.text
    assert "half_20230102" in caplog.text
    np.testing.assert_array_equal(both[WHOLE]["image"].numpy(), pixels[:2])
    np.testing.assert_array_equal(rm.RasteretDataset(collection, ["A"])[WHOLE]["image"].numpy(), pixels[2:])


def test_records_of_other_types_are_refused_and_the_remedy_works(tmp_path: Path, rng) -> None:
    """The message says which types there are and how to take one of them."""
    scene(tmp_path, "old_20230101", "A", rng.integers(1, 99, (64, 64), np.uint8))
    new = rng.integers(1, 999, (64, 64), np.uint16)
    scene(tmp_path, "new_20230102", "A", new)
    collection = collect(tmp_path, ["A"])
    with pytest.raises(UsageError, match=r"uint16.*uint8.*where\(pc\.field\('A_metadata', 'dtype'\) == "):
        rm.RasteretDataset(collection, ["A"])
    one = collection.where(pc.field("A_metadata", "dtype") == "uint16")
    np.testing.assert_array_equal(rm.RasteretDataset(one, ["A"])[WHOLE]["image"][0].numpy(), new)


def test_each_record_has_its_own_nodata(tmp_path: Path, rng) -> None:
    """0 in one and 65535 in the other: validity by each one's own, gaps filled from the other."""
    old, new = rng.integers(1, 60000, (2, 64, 64), np.uint16)
    new[:20], new[30:40], old[:10] = 65535, 0, 0
    scene(tmp_path, "old_20230101", "A", old, nodata=0)
    scene(tmp_path, "new_20230102", "A", new, nodata=65535)
    sample = rm.RasteretDataset(collect(tmp_path, ["A"]), ["A"])[WHOLE]
    expected, valid = new.copy(), new != 65535
    expected[10:20], valid[10:20] = old[10:20], True
    np.testing.assert_array_equal(sample["mask_valid"][0].numpy(), valid)
    np.testing.assert_array_equal(sample["image"][0].numpy()[valid], expected[valid])
    assert (sample["image"][0].numpy()[30:40] == 0).all()  # 0 is data in the newer one


def test_other_resolutions_are_resampled_onto_the_common_grid(tmp_path: Path, rng) -> None:
    """As GDAL's average of the finer record; on native grids each keeps its own pixels."""
    coarse = rng.integers(1, 999, (32, 32), np.uint16)
    fine = rng.integers(1, 999, (64, 64), np.uint16)
    scene(tmp_path, "a_20230102", "A", coarse, 20.0, overviews="none")
    scene(tmp_path, "b_20230101", "A", fine, 10.0, overviews="none")
    collection = collect(tmp_path, ["A"])
    finer = collection.where(pc.field("id") == "b_20230101")
    common = rm.RasteretDataset(collection, ["A"])
    np.testing.assert_array_equal(common[WHOLE]["image"][0].numpy(), coarse)
    averaged = rm.RasteretDataset(finer, ["A"], res=20.0, mosaic={"resampling": "average"})[WHOLE]["image"][0].numpy()
    wanted = np.zeros((32, 32), np.uint16)
    with rasterio.open(tmp_path / "b_20230101_A.tif") as file:
        reproject(
            rasterio.band(file, 1), wanted, dst_transform=Affine(20, 0, 500000, 0, -20, 5000000), dst_crs=file.crs,
            resampling=Resampling.average,
        )  # fmt: skip
    assert np.abs(averaged.astype(int) - wanted).max() <= 1
    native = rm.RasteretDataset(collection, ["A"], grid="native", mosaic={"order": "oldest"})
    x, y, _ = native.bounds
    sample = native[x.start + 100 : x.start + 420 : 10.0, y.stop - 420 : y.stop - 100 : 10.0]
    np.testing.assert_array_equal(sample["image"][0].numpy(), fine[10:42, 10:42])
    assert sample["epsg"].tolist() == [32633]
