"""The same product on either side of a zone edge: native grids bit for bit, a common one, labels in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

import rasteret_ml as rm
from rasteret_ml.errors import MixedCRSError, UsageError
from rasteret_ml.geo.crs import transform_points
from rasteret_ml.testing import make_cog


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> rm.Collection:
    """Both files."""
    shared = Path(__file__).resolve().parents[3] / "shared" / "data" / "utm_pair"
    if not shared.is_dir():
        pytest.skip(f"no real data at {shared}")
    return rm.build(str(shared / "*.tif"), tmp_path_factory.mktemp("pair") / "p.parquet", bands=list("RGBN"))


def test_native_chips_of_both_zones_in_one_batch(shared_data: Path, pair: rm.Collection) -> None:
    """Every pixel is the file's own, bit for bit, and `epsg` says whose grid it is on."""
    dataset = rm.RasteretDataset(pair, list("RGBN"), grid="native")
    loader = rm.DataLoader(dataset, batch_size=16, sampler=rm.RandomAOISampler(dataset, 64, 64, seed=2))
    files = {26917: "m_3607824_se_17", 26918: "m_3607717_sw_18"}
    paths = {epsg: next((shared_data / "utm_pair").glob(f"{name}*")) for epsg, name in files.items()}
    seen, mixed = set(), False
    for batch in loader:
        codes = batch["epsg"].tolist()
        mixed |= len(set(codes)) > 1
        seen |= set(codes)
        for i, code in enumerate(codes):
            transform = Affine(*batch["transform"][i].tolist()[:6])
            with rasterio.open(paths[code]) as file:
                col, row = (round(v) for v in ~file.transform @ (transform.c, transform.f))
                assert transform.almost_equals(file.transform @ Affine.translation(col, row), 1e-6)
                expected = file.read(window=((row, row + 64), (col, col + 64)), boundless=True)
            np.testing.assert_array_equal(batch["image"][i].numpy(), expected)
    assert seen == {26917, 26918}
    assert mixed


def test_a_common_grid_equals_gdals_warp(shared_data: Path, pair: rm.Collection) -> None:
    """On the first zone's grid, the other zone's scene by GDAL's exact bilinear warp, to a level of rounding."""
    dataset = rm.RasteretDataset(pair, ["R", "G"], crs="EPSG:26917", mosaic={"resampling": "bilinear"})
    path = next((shared_data / "utm_pair").glob("*_18_*"))
    only = rm.RasteretDataset(pair, ["R", "G"], crs="EPSG:26917")
    other = only.index[only.index.rid == _row_of(pair, path.stem)].geometry.iloc[0]
    x, y = other.representative_point().coords[0]
    place = slice(x - 60, x + 60), slice(y - 60, y + 60)
    grid = dataset.chip_grid(place)
    with (
        rasterio.open(path) as file,
        WarpedVRT(
            file, crs=grid.crs, transform=grid.transform, width=grid.width, height=grid.height,
            resampling=Resampling.bilinear, tolerance=1e-9, XSCALE="1", YSCALE="1",
        ) as warped,
    ):  # fmt: skip
        wanted = warped.read([1, 2])
    found = rm.RasteretDataset(pair, ["R", "G"], crs="EPSG:26917", mosaic={"resampling": "bilinear", "order": "oldest"})
    sample = _only(found, path.stem, pair)[place]
    assert np.abs(sample["image"].numpy().astype(int) - wanted).max() <= 1


def _row_of(pair: rm.Collection, stem: str) -> int:
    return pair.to_table(["id"])["id"].to_pylist().index(stem)


def _only(dataset: rm.RasteretDataset, stem: str, pair: rm.Collection) -> rm.RasteretDataset:
    dataset.index = dataset.index[dataset.index.rid == _row_of(pair, stem)]
    return dataset


def test_several_crss_are_never_a_silent_choice(pair: rm.Collection) -> None:
    """A common grid needs one; a native one takes none."""
    with pytest.raises(MixedCRSError, match=r"26918 .*26917 "):
        rm.RasteretDataset(pair, ["R"])
    with pytest.raises(UsageError, match="native"):
        rm.RasteretDataset(pair, ["R"], grid="native", crs=26917)


def checkerboard(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fields of 200 m of UTM 33, by coordinates."""
    return ((np.floor(x / 200) + np.floor(y / 200)) % 2).astype(np.uint8) + 1


def write_checkerboard(path: Path, crs: str, left: float, top: float, res: float, size: int) -> str:
    """The checkerboard of zone 33 as seen on a grid of any zone."""
    centres = (np.arange(size) + 0.5) * res
    x, y = np.meshgrid(left + centres, top - centres)
    x33, y33 = transform_points(x.ravel(), y.ravel(), crs, "EPSG:32633")
    transform = Affine(res, 0, left, 0, -res, top)
    return make_cog(path, checkerboard(x33, y33).reshape(size, size), transform=transform, crs=crs, overviews="none")


@pytest.mark.parametrize("grid", ["native", pytest.param("common", marks=pytest.mark.slow)])
def test_labels_stay_on_their_image_across_the_zone_edge(tmp_path: Path, grid: str) -> None:
    """A checkerboard in zones 33 and 34 with labels in a third CRS: they differ within half a pixel of lines only."""
    # Around the edge at 18 degrees east, 46 north.
    (x33,), (y33,) = transform_points(np.array([18.0]), np.array([46.0]), "EPSG:4326", "EPSG:32633")
    (x34,), (y34,) = transform_points(np.array([18.0]), np.array([46.0]), "EPSG:4326", "EPSG:32634")
    write_checkerboard(tmp_path / "west_B1.tif", "EPSG:32633", round(x33) - 3500, round(y33) + 2000, 10, 400)
    write_checkerboard(tmp_path / "east_B1.tif", "EPSG:32634", round(x34) - 500, round(y34) + 2000, 10, 400)
    (xl,), (yl,) = transform_points(np.array([18.0]), np.array([46.0]), "EPSG:4326", "EPSG:3035")
    write_checkerboard(tmp_path / "label.tif", "EPSG:3035", round(xl) - 6000, round(yl) + 6000, 5, 2400)
    collection = rm.build(str(tmp_path / "*_B1.tif"), tmp_path / "i.parquet", bands=["B1"])
    labels = rm.build(str(tmp_path / "label.tif"), tmp_path / "l.parquet", datetime=None)
    options = {"grid": "native"} if grid == "native" else {"crs": "EPSG:32633"}
    images = rm.RasteretDataset(collection, ["B1"], mosaic={"resampling": "nearest"}, **options)
    both = images & rm.RasteretDataset(labels, labels.bands, is_image=False)
    loader = rm.DataLoader(both, batch_size=8, sampler=rm.RandomAOISampler(both, 64, 32))
    zones = set()
    for batch in loader:
        valid = batch["mask_valid"][:, 0]
        assert valid.float().mean() > 0.95
        wrong = valid & (batch["image"][:, 0].long() != batch["mask"])
        # Pixels of 10 m whose centres lie within half a pixel of a line of the checkerboard may fall on either side.
        for i in range(len(wrong)):
            transform = Affine(*batch["transform"][i].tolist()[:6])
            rows, cols = np.nonzero(wrong[i].numpy())
            x, y = transform @ (cols + 0.5, rows + 0.5)
            crs = f"EPSG:{batch['epsg'][i].item()}" if grid == "native" else "EPSG:32633"
            x33s, y33s = transform_points(np.atleast_1d(x), np.atleast_1d(y), crs, "EPSG:32633")
            near = np.minimum(np.abs(x33s - 200 * np.round(x33s / 200)), np.abs(y33s - 200 * np.round(y33s / 200)))
            assert (near <= 10 * 0.5 * 2**0.5 + 5 * 0.5 * 2**0.5).all()
        if grid == "native":
            zones |= set(batch["epsg"].tolist())
        assert torch.isin(batch["mask"][valid], torch.tensor([1, 2])).all()
    assert grid == "common" or zones == {32633, 32634}
