"""A map of real scenes against one pass of the model over the whole image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import rasterio
import torch
from cog_rules import broken_rules

import rasteret_ml as rm

pytestmark = pytest.mark.slow

REACH = 3
"""Pixels that the model sees beyond the one that it predicts."""
OVERLAP = 32


class Whole(torch.nn.Module):
    """Three 3 x 3 convolutions with whole numbers, so that sums are exact in any order of addition."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        planes = (10, 4, 4, 4)
        self.layers = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, padding=1, dtype=torch.float64) for a, b in itertools.pairwise(planes)
        )
        for layer in self.layers:
            for parameter in (layer.weight, layer.bias):
                parameter.data = torch.randint(-2, 3, parameter.shape, generator=generator).double()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Scores."""
        for layer in self.layers[:-1]:
            image = layer(image).relu()
        return self.layers[-1](image)


def as_double(batch):
    """Pixels as they are, 0 where they are not valid."""
    return batch | {"image": torch.where(batch["mask_valid"], batch["image"].double(), 0.0)}


@pytest.fixture(scope="module")
def landcover(shared_data, tmp_path_factory):
    """The dataset, the scores of the whole image at once, and which pixels are valid."""
    folder = tmp_path_factory.mktemp("landcover")
    collection = rm.build(str(shared_data / "landcover" / "images" / "*.tif"), folder / "images.parquet")
    dataset = rm.RasteretDataset(collection, collection.bands)
    whole = rm.collate([dataset[dataset.bounds]])
    with torch.inference_mode():
        scores = Whole()(as_double(whole)["image"])[0].numpy()
    return dataset, whole, scores, whole["mask_valid"][0, 0].numpy()


def predicted(dataset, path, overlap=OVERLAP, **options):
    """The map's pixels, and the file's facts."""
    sampler = rm.GridAOISampler(dataset, 192, 192 - overlap)
    loader = rm.DataLoader(dataset, batch_size=8, sampler=sampler)
    (written,) = rm.predict_map(Whole(), loader, path, normalize=as_double, block=256, **options)
    assert broken_rules(written) == []
    with rasterio.open(written) as file:
        assert file.crs.to_epsg() == 27700
        return file.read(), file.transform, file.shape


def test_chips_leave_no_seam(landcover, tmp_path):
    """Nearest to the middle: the classes of the whole image in every pixel but the outermost; nodata where invalid."""
    dataset, whole, scores, valid = landcover
    found, transform, shape = predicted(dataset, tmp_path / "map.tif", merge="centre")
    assert tuple(transform)[:6] == tuple(whole["transform"][0].tolist())[:6]
    assert shape == valid.shape == (947, 930)
    inside = np.s_[REACH:-REACH, REACH:-REACH]
    np.testing.assert_array_equal(found[0][inside], np.where(valid, scores.argmax(0), 255)[inside])
    np.testing.assert_array_equal(found[0] == 255, ~valid)
    assert len(np.unique(found[0][valid])) == 4


def test_blended_scores_are_close(landcover, tmp_path):
    """The same away from chips' edges; there, where chips see less, far closer than chips that do not overlap."""
    dataset, _, scores, valid = landcover
    inside = np.s_[:, REACH:-REACH, REACH:-REACH]
    expected = np.where(valid, scores, np.nan)[inside]
    spread = np.nanstd(expected, axis=(1, 2), keepdims=True)

    def errors(overlap):
        found, _, _ = predicted(dataset, tmp_path / f"{overlap}.tif", overlap, merge="blend", output="scores")
        return np.abs(found[inside] - expected) / spread

    blended, abrupt = errors(OVERLAP), errors(0)
    # Only pixels within reach of an edge may differ: 5 seams of 2 * 2 * REACH pixels each way.
    assert np.nanmean(blended > 1e-5) < 2 * 5 * 2 * 2 * REACH / min(valid.shape)
    assert np.nanmax(blended) < np.nanmax(abrupt) / 8
    assert np.nanmean(blended) < np.nanmean(abrupt) / 20
