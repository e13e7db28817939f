"""Stored pixels to model input: types, scale, statistics, invalid pixels."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

import rasteret_ml as rm
from rasteret_ml.errors import UsageError


def valid(*shape: int) -> torch.Tensor:
    """Everything is valid."""
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int64, torch.float32, torch.float64],
)
def test_every_type_is_converted_and_normalised(dtype):
    """Against numpy in float64, and the batch itself stays."""
    stored = torch.arange(120).to(dtype).reshape(2, 3, 4, 5)
    batch = {"image": stored, "mask_valid": valid(2, 1, 4, 5)}
    ready = rm.normalize(batch, (1, 20, 50), (2, 3, 0.5))
    mean, std = (np.array(v)[:, None, None] for v in ((1, 20, 50), (2, 3, 0.5)))
    np.testing.assert_allclose(ready["image"].numpy(), (stored.numpy().astype(float) - mean) / std, rtol=1e-6)
    assert ready["image"].dtype == torch.float32
    assert batch["image"] is stored


def test_large_numbers_are_rounded_once():
    """Of uint32 the difference to the mean counts, not float32's steps of 256."""
    stored = torch.tensor([4_000_000_001, 4_000_000_003]).to(torch.uint32).reshape(1, 1, 1, 2)
    ready = rm.normalize({"image": stored, "mask_valid": valid(1, 1, 1, 2)}, [4_000_000_000], [1])
    assert ready["image"].flatten().tolist() == [1, 3]


def test_scale_and_offset_come_before_mean_and_std():
    """Each sample's own, so that the same ground is the same number under two scales; and they are applied once."""
    reflectance = torch.rand(2, 2, 3, 3)
    scale, offset = torch.tensor([[1e-4, 2e-4], [2e-4, 1e-4]]), torch.tensor([[0.0, 0.1], [-0.1, 0.0]])
    stored = (reflectance - offset[..., None, None]) / scale[..., None, None]
    batch = {"image": stored, "scale": scale, "offset": offset, "mask_valid": valid(2, 1, 3, 3)}
    ready = rm.normalize(batch, (0.2, 0.3), (0.1, 0.4), scaled=True)
    expected = (reflectance - torch.tensor([0.2, 0.3])[:, None, None]) / torch.tensor([0.1, 0.4])[:, None, None]
    torch.testing.assert_close(ready["image"], expected, rtol=1e-4, atol=1e-5)
    assert "scale" not in ready
    assert "offset" not in ready
    torch.testing.assert_close(rm.normalize(batch, scaled=True)["image"], reflectance, rtol=1e-5, atol=1e-6)
    assert torch.equal(rm.normalize(batch)["image"], stored)
    assert rm.normalize(batch)["scale"] is scale
    with pytest.raises(UsageError, match="needs 'scale'"):
        rm.normalize({"image": stored, "mask_valid": valid(2, 1, 3, 3)}, scaled=True)


def test_scaled_statistics_go_with_scaled_pixels(tmp_path):
    """Two records of one ground, one stored with an offset: normalised they are the same, mean 0 and deviation 1."""
    truth = np.random.default_rng(3).integers(2000, 4000, (1, 64, 64))
    for name, offset in (("A_20210101", 0), ("B_20230101", -1000)):
        shape = {"count": 1, "height": 64, "width": 64, "tiled": True, "blockxsize": 64, "blockysize": 64}
        place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 500000, 0, -10, 5000000)}
        with rasterio.open(tmp_path / f"{name}.tif", "w", dtype="uint16", **shape, **place) as file:
            file.write(truth - offset)
            file.scales, file.offsets = (1e-4,), (offset * 1e-4,)
    collection = rm.build(str(tmp_path / "*.tif"), tmp_path / "images.parquet", bands=["B1"])
    datasets = [
        rm.RasteretDataset(collection.subset(date_range=(f"{year}-01-01",) * 2), ["B1"]) for year in (2021, 2023)
    ]
    statistics = rm.dataset_statistics(datasets[1], size=64, scaled=True)
    assert statistics.mean[0] == pytest.approx(truth.mean() * 1e-4, rel=1e-6)
    assert statistics.made["scaled"] is True
    numbers = {"mean": statistics.mean, "std": statistics.std, "scaled": True}
    ready = [rm.normalize(next(iter(rm.DataLoader(d, sampler=rm.GridAOISampler(d, 64)))), **numbers) for d in datasets]
    torch.testing.assert_close(ready[0]["image"], ready[1]["image"], rtol=1e-4, atol=1e-4)
    assert float(ready[0]["image"].mean()) == pytest.approx(0, abs=1e-3)
    assert float(ready[0]["image"].std()) == pytest.approx(1, abs=1e-3)
    plain = rm.dataset_statistics(datasets[1], size=64)
    assert plain.mean[0] == pytest.approx(truth.mean() + 1000, rel=1e-6)
    assert "scaled" not in plain.made


def test_series_and_several_images_have_their_own_numbers():
    """Scale `[B, T, C]` by date, mean by key; a single image beside a series is valid where any date is."""
    dates = valid(1, 2, 1, 1, 2)
    dates[0, 0, 0, 0, 0] = dates[0, :, 0, 0, 1] = False
    batch = {
        "image": torch.tensor([[[[[10, 10]]], [[[20, 20]]]]], dtype=torch.uint16),
        "image_s1": torch.tensor([[[[7.0, 7.0]], [[9.0, float("nan")]]]]),
        "mask_valid": dates,
        "scale": torch.tensor([[[1.0], [0.5]]]),
        "offset": torch.tensor([[[0.0], [1.0]]]),
    }
    numbers = {"image": (1.0,), "image_s1": (2.0, 3.0)}
    ready = rm.normalize(batch, numbers, {"image": (2.0,), "image_s1": (1.0, 1.0)}, scaled=True)
    assert ready["image"].flatten().tolist() == [0, 0, 5, 0]
    assert ready["image_s1"].flatten().tolist() == [5, 0, 6, 0]
    with pytest.raises(UsageError, match="image_s1"):
        rm.normalize(batch, (1.0,), (1.0,))
    both = rm.normalize(batch | {"scale_image_s1": torch.tensor([[2.0, 1.0]])}, scaled=True)
    assert both["image_s1"].flatten().tolist() == [14, 0, 9, 0]
    alone = {"image_s1": batch["image_s1"][:, :1], "scale": torch.tensor([[2.0]]), "offset": torch.tensor([[1.0]])}
    assert rm.normalize(alone, (0.0,), (1.0,), scaled=True)["image_s1"].flatten().tolist() == [15, 15]


def test_validity_per_band_fills_each_band():
    """And another image only where all bands are valid."""
    flags = torch.tensor([[[[True, False]], [[True, True]]]])
    batch = {"image": torch.ones(1, 2, 1, 2), "image_s1": torch.ones(1, 3, 1, 2), "mask_valid": flags}
    ready = rm.normalize(batch)
    assert ready["image"].flatten().tolist() == [1, 0, 1, 1]
    assert ready["image_s1"].flatten().tolist() == [1, 0] * 3


def test_labels_outside_the_aoi_do_not_count():
    """Of every head, by its type, beside a series as well."""
    inside = torch.tensor([[[[[True, False]]], [[[True, False]]]]])
    batch = {
        "image": torch.ones(1, 2, 1, 1, 2),
        "mask_valid": valid(1, 2, 1, 1, 2),
        "mask_aoi": inside,
        "mask": torch.tensor([[[3, 4]]]),
        "mask_height": torch.tensor([[[1.5, 2.5]]]),
    }
    ready = rm.normalize(batch, ignore_index=255)
    assert ready["mask"].tolist() == [[[3, 255]]]
    assert ready["mask_height"][0, 0, 0] == 1.5
    assert ready["mask_height"][0, 0, 1].isnan()
    with pytest.raises(UsageError, match="cannot hold"):
        rm.normalize(batch | {"mask": batch["mask"].to(torch.uint8)})


def test_numbers_that_do_not_fit_are_refused():
    """They are not broadcast."""
    with pytest.raises(UsageError, match="a number for each of 3 bands, got 2"):
        rm.normalize({"image": torch.ones(1, 3, 2, 2)}, (1, 2))
    with pytest.raises(UsageError, match="mean must be a list with a number for each band, got 500"):
        rm.normalize({"image": torch.ones(1, 3, 2, 2)}, 500.0)
    for std in ((1, 0, 1), (1, float("nan"), 1)):
        with pytest.raises(UsageError, match="std must be > 0 for each band"):
            rm.normalize({"image": torch.ones(1, 3, 2, 2)}, std=std)
    with pytest.raises(UsageError, match="must be real"):
        rm.normalize({"image": torch.ones(1, 1, 2, 2, dtype=torch.complex64)})
