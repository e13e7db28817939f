"""Cells of labels, and weights that bring rare classes in."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

import rasteret_ml as rm
from rasteret_ml.errors import UsageError


def test_cells_hold_the_shares_of_their_pixels(scenes):
    """Every cell's shares are those of the raster cut by hand; together they are all of it."""
    labels = rm.RasteretDataset(scenes.labels, ["B1"], is_image=False)
    cells = rm.label_cells(labels, 50)
    assert [name for name in cells.columns if name.startswith("class_")] == [f"class_{value}" for value in (1, 2, 3, 4)]
    assert len(cells) == 6 * 13
    total = np.zeros(5)
    for cell in cells.itertuples():
        xmin, _, xmax, ymax = cell.geometry.bounds
        row, left = round((5000000 - ymax) / 10), round((xmin - 499990) / 10)
        assert xmax - xmin == 500
        part = scenes.cover[row : row + 50, left : left + 50]
        counts = np.bincount(part.ravel(), minlength=5)
        assert cell.valid == pytest.approx(counts[1:].sum() / 2500)
        shares = [cell.class_1, cell.class_2, cell.class_3, cell.class_4]
        assert shares == pytest.approx((counts[1:] / counts[1:].sum()).tolist())
        total += counts
    assert total.sum() == scenes.cover.size


def cells_of(pixels: np.ndarray) -> gpd.GeoDataFrame:
    """Cells with these pixels of each class `[N, K]`, a hundred in a cell."""
    labelled = pixels.sum(axis=1)
    columns = {f"class_{k}": pixels[:, k] / np.maximum(labelled, 1) for k in range(pixels.shape[1])}
    return gpd.GeoDataFrame(
        {"valid": labelled / 100} | columns, geometry=[shapely.box(0, 0, 1, 1)] * len(pixels), crs=32633
    )


def test_weights_even_out_what_can_be_evened_out():
    """Two pure kinds of cells, one of them a hundredth: each is drawn half of the time."""
    pixels = np.zeros((100, 2))
    pixels[:99, 0], pixels[99:, 1] = 100, 100
    weights = rm.balanced_weights(cells_of(pixels))
    assert weights @ pixels / 100 == pytest.approx([0.5, 0.5], abs=1e-3)
    assert weights[:99] == pytest.approx(np.full(99, weights[0]))


@examples(40)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_no_mix_of_classes_is_more_even(seed, classes):
    """The mean logarithm of the expected shares beats the area's own, inverse frequency, and random mixes."""
    rng = np.random.default_rng(seed)
    pixels = np.floor(rng.dirichlet(np.full(classes, 0.3), 30) * 100) + 0.0
    pixels[:, 0] += 100 - pixels.sum(axis=1)
    pixels = pixels[:, pixels.sum(axis=0) > 0]
    draws = pixels / pixels.sum(axis=0)

    def evenness(weights):
        return np.log(weights / weights.sum() @ pixels / 100).mean()

    best = evenness(rm.balanced_weights(cells_of(pixels)))
    others = [np.ones(30), draws.sum(axis=1), *(draws @ mix for mix in rng.dirichlet(np.ones(draws.shape[1]), 20))]
    assert all(best >= evenness(other) - 1e-3 for other in others)


def test_a_rare_class_of_real_land_cover_comes_often(shared_data, tmp_path):
    """Chips drawn by the cells' weights hold more than twice as many pixels of class 4 as chips drawn by area."""
    found = sorted((shared_data / "landcover" / "labels").glob("*.tif"))
    collection = rm.build([str(path) for path in found], tmp_path / "labels.parquet", datetime=None)
    labels = rm.RasteretDataset(collection, collection.bands, is_image=False)
    cells = rm.label_cells(labels, 64)
    weights = rm.balanced_weights(cells)
    assert weights.sum() == pytest.approx(1)
    shares = []
    for options in ({"weight": weights}, {}):
        sampler = rm.RandomAOISampler(labels, 64, 200, cells, seed=1, placement="centre", **options)
        masks = np.stack([sample["mask"].numpy() for sample in labels.__getitems__(list(sampler))])
        counts = np.bincount(masks[masks >= 0], minlength=5)
        shares.append(counts / counts.sum())
    balanced, plain = shares
    assert 0 < plain[4] < 0.1
    assert balanced[4] > 2.5 * plain[4]
    assert np.std(balanced[1:]) < np.std(plain[1:])


def test_what_has_no_classes_is_refused(scenes):
    """Images, and tables that are no cells."""
    with pytest.raises(UsageError, match="no 'mask'"):
        rm.label_cells(rm.RasteretDataset(scenes.images, ["B02"]), 50)
    with pytest.raises(UsageError, match="cells must have class_<value> columns"):
        rm.balanced_weights(gpd.GeoDataFrame({"a": [1]}, geometry=[shapely.box(0, 0, 1, 1)]))
