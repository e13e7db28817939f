"""Files of other writers that once were read wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
import tifffile
from affine import Affine
from pixel_oracle import assert_chip, build_one, run, window_by_rasterio
from rasterio.control import GroundControlPoint

from rasteret_ml.errors import UsageError
from rasteret_ml.testing import make_cog

WINDOW = (0, 0, 20, 30)


@pytest.mark.parametrize("flags", [None, (1, 1, 1), (2, 2, 2), (None, 1, None)], ids=str)
def test_a_mask_file_speaks_for_the_bands_that_its_flags_name(tmp_path: Path, flags, rng: np.random.Generator) -> None:
    """GDAL's INTERNAL_MASK_FLAGS in a `.msk`: 2 = its first band for all; absent = no mask of that band."""
    data = rng.integers(1, 99, (3, 20, 30)).astype(np.uint8)
    path = tmp_path / "a.tif"
    path.write_bytes(Path(make_cog(tmp_path / "made.tif", data, overviews="none")).read_bytes())
    items = [f'<Item name="INTERNAL_MASK_FLAGS_{i}">{f}</Item>' for i, f in enumerate(flags or (), 1) if f is not None]
    text = f"<GDALMetadata>{''.join(items)}</GDALMetadata>\0"
    masks = (rng.random((3, 20, 30)) > 0.5).astype(np.uint8) * 255
    tags = [(42112, 2, len(text), text, True)] if flags else []
    tifffile.imwrite(f"{path}.msk", masks, planarconfig="separate", photometric="minisblack", extratags=tags)
    record = build_one(path, tmp_path)
    assert_chip(run(record.read_window(WINDOW, ["B1", "B2", "B3"])), *window_by_rasterio(path, WINDOW))


@pytest.mark.parametrize("nodata", [2**64 - 1, 2**63, 2**63 - 1, 7])
def test_unsigned_nodata_of_64_bits_survives_the_table(tmp_path: Path, nodata: int) -> None:
    """Parquet's int64 and float64 hold neither of the first two."""
    data = np.full((20, 30), nodata - 1, np.uint64)
    data[3, 4] = nodata
    text = f"{nodata}\0"
    tifffile.imwrite(tmp_path / "a.tif", data, extratags=[(42113, 2, len(text), text, True)], metadata=None)
    record = build_one(tmp_path / "a.tif", tmp_path)
    assert record.source("B1").nodata == nodata
    valid = np.asarray(run(record.read_window(WINDOW, ["B1"])).valid)[0]
    assert np.argwhere(~valid).tolist() == [[3, 4]]


def test_a_broken_overview_file_does_not_cost_the_raster(tmp_path: Path) -> None:
    """It is left aside; the pixels are there."""
    data = np.arange(600, dtype=np.uint16).reshape(1, 20, 30)
    path = make_cog(tmp_path / "a.tif", data, overviews="none")
    Path(f"{path}.ovr").write_bytes(Path(path).read_bytes()[:150])
    record = build_one(path, tmp_path)
    assert_chip(run(record.read_window(WINDOW, ["B1"])), *window_by_rasterio(path, WINDOW))


def test_ground_control_points_are_no_place(tmp_path: Path) -> None:
    """A file with nothing else is read by pixel window, and refused where it would have to lie somewhere."""
    points = [GroundControlPoint(r, c, 500000 + 10 * c, 5000000 - 10 * r) for r, c in ((0, 0), (0, 30), (20, 0))]
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=30, height=20, count=1, dtype="uint8", gcps=points, crs=32633
    ) as target:
        target.write(np.ones((1, 20, 30), np.uint8))
    record = build_one(tmp_path / "a.tif", tmp_path)
    assert bool(run(record.read_window(WINDOW, ["B1"])).valid.all())
    with pytest.raises(UsageError, match=r"not georeferenced.*read_window"):
        run(record.load_bands([shapely.box(0, 0, 30, 20)], ["B1"], geometry_crs=32633, output="tensor"))


def test_a_pyramid_in_subdirectories(tmp_path: Path) -> None:
    """Some writers hang overviews under the first directory (tag 330) instead of behind it."""
    data = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(data, subifds=1, tile=(16, 16), metadata=None)
        writer.write(data[::2, ::2], subfiletype=1, tile=(16, 16), metadata=None)
    record = build_one(tmp_path / "a.tif", tmp_path)
    chip = run(record.read_window((0, 0, 32, 32), ["B1"], level=1))
    np.testing.assert_array_equal(np.asarray(chip.data)[0], data[::2, ::2])
    assert Affine.identity() == record.source("B1").metadata.grid.transform
