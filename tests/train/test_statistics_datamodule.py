"""The datamodule's splits, its check of them, and the statistics that it keeps."""

from __future__ import annotations

import dataclasses

import geopandas as gpd
import numpy as np
import pytest
import shapely
import yaml

import rasteret_ml as rm
from rasteret_ml.errors import SplitLeakError, UsageError
from rasteret_ml.transforms.normalize import normalize
from rasteret_ml.transforms.statistics import DatasetStatistics

BANDS = ("B02", "B03")
HALVES = {"train": 0.6, "val": 0.2, "test": 0.2}


def module(scenes, *, sampling=None, normalization=None, **options):
    settings = {"bands": BANDS, "loading": {"batch_size": 8}, "normalization": {"max_chips": 8} | (normalization or {})}
    settings |= {"sampling": {"size": 16, "length": 200, "overlap": 8} | (sampling or {})}
    return rm.RasteretDataModule(
        str(scenes.folder / "images.parquet"), str(scenes.folder / "labels.parquet"), **(settings | options)
    )


def seen_by(loader, mean, std) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that are read, and those whose labels count, of the fixture's 300 x 600."""
    read, counted = np.zeros((300, 600), bool), np.zeros((300, 600), bool)
    for batch in loader:
        ready = normalize(batch, mean, std)
        for mask, t in zip(ready["mask"].numpy(), batch["transform"].tolist(), strict=True):
            row, col = round((5000000 - t[5]) / 10), round((t[2] - 500000) / 10)
            rows, cols = slice(max(row, 0), row + mask.shape[0]), slice(max(col, 0), col + mask.shape[1])
            part = mask[rows.start - row :, cols.start - col :][: 300 - rows.start, : 600 - cols.start]
            read[rows, cols] = True
            counted[rows, cols] |= part != -100
    return read, counted


def test_a_table_of_splits_trains_validates_and_tests_apart(scenes, tmp_path):
    """Pixels of the training count nowhere else, even where chips overlap; a file works like a table."""
    images = rm.RasteretDataset(scenes.images, BANDS)
    blocks = rm.split_blocks(images, 600, HALVES, buffer=20, seed=1)
    blocks.to_parquet(tmp_path / "blocks.parquet")
    data = module(scenes, split={"table": str(tmp_path / "blocks.parquet"), "buffer": 20})
    data.setup()
    trained, _ = seen_by(data.train_dataloader(), data.mean, data.std)
    _, validated = seen_by(data.val_dataloader(), data.mean, data.std)
    _, tested = seen_by(data.test_dataloader(), data.mean, data.std)
    assert trained.sum() > 10_000
    assert validated.sum() > 5_000
    assert tested.sum() > 5_000
    assert not (trained & validated).any()
    assert not (trained & tested).any()
    assert not (validated & tested).any()


@pytest.mark.slow
def test_test_polygons_are_held_out_too(scenes):
    """Training avoids both areas; without a validation side there is only the test area."""
    test = gpd.GeoDataFrame(geometry=[shapely.box(500000, 4997000, 502000, 4998000)], crs=32633)
    data = module(scenes, split={"test_aois": test})
    data.setup()
    trained, _ = seen_by(data.train_dataloader(), data.mean, data.std)
    _, validated = seen_by(data.val_dataloader(), data.mean, data.std)
    _, tested = seen_by(data.test_dataloader(), data.mean, data.std)
    assert not (trained & (validated | tested)).any()
    assert not tested[:200].any()
    assert tested[200:, :200].sum() > 0.7 * 20_000
    alone = module(scenes, split={"test_aois": test, "val_side": None})
    alone.setup()
    assert alone.val_dataloader() == []
    assert len(alone.test_dataloader()) == len(data.test_dataloader())


def test_splits_that_leak_are_refused(scenes):
    """Overlapping polygons, chips that reach out of theirs, and a violated buffer are errors before any read."""
    table = gpd.GeoDataFrame(
        {"split": ["train", "val", None]},
        geometry=[shapely.box(500000 + 1000 * i, 4998000, 501010 + 1000 * i, 5000000) for i in range(3)],
        crs=32633,
    )
    with pytest.raises(SplitLeakError, match=r"'train' and 'val' leak.*about 200 pixels"):
        module(scenes, split={"table": table}).setup()
    apart = table.assign(geometry=[shapely.box(500000, 4998000, 501000, 5000000), *table.geometry[1:]])
    module(scenes, split={"table": apart}).setup()
    with pytest.raises(SplitLeakError, match="placement='inside'"):
        module(scenes, split={"table": apart}, sampling={"placement": "centre"}).setup()
    with pytest.raises(SplitLeakError, match="less than the buffer of 50"):
        module(scenes, split={"table": apart, "buffer": 50}).setup()
    held = table.iloc[:1]
    with pytest.raises(SplitLeakError, match="'val' and 'test' leak"):
        module(scenes, split={"val_aois": held, "test_aois": held}).setup()
    with pytest.raises(UsageError, match="leave val_aois"):
        module(scenes, split={"table": table, "val_aois": held})
    with pytest.raises(UsageError, match="column 'split'"):
        module(scenes, split={"table": table[["geometry"]]}).setup()
    with pytest.raises(UsageError, match="'train', got only"):
        module(scenes, split={"table": table[table["split"] == "val"]}).setup()


def test_statistics_are_written_once_and_then_read(scenes, tmp_path):
    """Means, deviations and classes; a file of other bands is refused."""
    path = tmp_path / "statistics.yaml"
    first = module(scenes, normalization={"statistics": path})
    first.setup()
    found = DatasetStatistics.load(path)
    assert found.mean == first.mean
    assert found.std == first.std
    assert set(found.classes) == {1, 2, 3, 4}
    band = dataclasses.replace(found.bands["B02"], mean=123.0)
    dataclasses.replace(found, bands=found.bands | {"B02": band}, classes={1: 5, 4: 5}).save(path)
    stamp = path.stat().st_mtime_ns
    second = module(scenes, normalization={"statistics": str(path)})
    second.setup()
    assert second.mean == (123.0, first.mean[1])
    assert second.class_values == {1: 0, 4: 1}
    assert path.stat().st_mtime_ns == stamp
    given = module(scenes, normalization={"statistics": path, "mean": [1, 2], "std": [3, 4]})
    given.setup()
    assert (given.mean, given.std) == ((1, 2), (3, 4))
    document = yaml.safe_load(path.read_text())
    document["bands"]["B09"] = document["bands"].pop("B03")
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UsageError, match=r"bands of .* must be"):
        module(scenes, normalization={"statistics": path}).setup()


@pytest.mark.slow
def test_statistics_are_of_the_training_area_alone(scenes):
    """They equal numpy's over the pixels of the training area."""
    data = module(scenes, normalization={"max_chips": 10_000})
    data.setup()
    dataset = rm.RasteretDataset(scenes.images, BANDS)
    sample = dataset[dataset.bounds[:2]]
    image, valid = sample["image"].numpy().astype(float)[:, 90:], sample["mask_valid"].numpy()[0, 90:]
    assert data.mean == pytest.approx([band[valid].mean() for band in image], rel=1e-12)
    assert data.std == pytest.approx([band[valid].std() for band in image], rel=1e-12)
