"""Blank samples: same keys, shapes and types as the original, no valid pixel and no label."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.samples.collate import blank_sample

BANDS = ("B02", "B03")
REMAP = {1: 0, 2: 1, 3: 2, 4: 3}
KEPT = ("aoi", "draw", "bounds", "transform", "epsg", "crs")


def _labels(scenes: Any, ignore_index: int = -100, key: str = "mask") -> rm.RasteretDataset:
    labels = {"remap": REMAP, "ignore_index": ignore_index}
    return rm.RasteretDataset(scenes.labels, ["B1"], is_image=False, labels=labels, sample={"key": key})


KINDS = {
    "image": lambda s: rm.RasteretDataset(s.images, BANDS, sample={"mask_aoi": True, "valid_per_band": True}),
    "native": lambda s: rm.RasteretDataset(s.images, BANDS, grid="native"),
    "series": lambda s: rm.RasteretDataset(s.images, BANDS, series=3),
    "series & labels": lambda s: rm.RasteretDataset(s.images, BANDS, series=3) & _labels(s),
    "images & two heads": lambda s: (
        rm.RasteretDataset(s.images, BANDS) & _labels(s, -1, "mask_a") & _labels(s, 255, "mask_b")
    ),
    "labels | labels": lambda s: _labels(s, 7) | _labels(s, 7),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_blank_sample_collates_with_the_original(scenes: Any, kind: str) -> None:
    """Keys, shapes and types are equal, no pixel is valid, and identity and place are kept."""
    dataset = KINDS[kind](scenes)
    ignored = dataset.ignored_classes
    for query in rm.RandomAOISampler(dataset, 48, 3, seed=1):
        sample = dataset[query]
        before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in sample.items()}
        blank = blank_sample(sample, ignored)
        batch = rm.collate([sample, blank])
        assert list(blank) == list(sample)
        for key, value in sample.items():
            if not isinstance(value, torch.Tensor):
                assert blank[key] is value  # TorchGeo 0.8's slices and CRS
                continue
            assert blank[key].dtype == value.dtype, key
            assert blank[key].shape == value.shape, key
            assert value.numpy().tobytes() == before[key].numpy().tobytes(), key
            assert batch[key].shape[0] == 2, key
            if key in KEPT:
                assert torch.equal(blank[key], value), key
            elif key.startswith("image"):
                assert not blank[key].any()
                assert value.any()
            elif value.dtype == torch.bool:
                assert not blank[key].any(), key
            elif key.startswith("mask"):
                assert (blank[key] == ignored[key]).all()
                assert (value != ignored[key]).any()


def test_blank_values_by_key() -> None:
    """Labels, times and scales, in samples and batches; unknown keys are kept."""
    sample = {
        "mask": torch.ones(2, 2),
        "label": torch.tensor([3]),
        "time": torch.ones(2, dtype=torch.float64),
        "record": torch.tensor([4, 5]),
        "time_valid": torch.tensor([True, True]),
        "length": torch.tensor([2]),
        "scale": torch.full((3,), 7.0),
        "offset_image_s1": torch.full((3,), 7.0),
        "weight": torch.tensor([2.0]),
    }
    blank = blank_sample(sample)
    assert blank["mask"].isnan().all()
    assert blank["label"].tolist() == [-100]
    assert blank["time"].isnan().all()
    assert blank["record"].tolist() == [-1, -1]
    assert not blank["time_valid"].any()
    assert blank["length"].tolist() == [0]
    assert blank["scale"].tolist() == [1, 1, 1]
    assert blank["offset_image_s1"].tolist() == [0, 0, 0]
    assert blank["weight"].tolist() == [2]
    assert blank_sample({"label": torch.tensor([0.5])})["label"].isnan().all()
    batch = blank_sample(rm.collate([sample, sample]))
    assert {key: value.shape for key, value in batch.items()} == {
        key: value.shape for key, value in rm.collate([blank, blank]).items()
    }


def test_ignored_classes_by_key(scenes: Any) -> None:
    """For every label dataset, including polygons; empty without labels."""
    assert KINDS["images & two heads"](scenes).ignored_classes == {"mask_a": -1, "mask_b": 255}
    assert KINDS["labels | labels"](scenes).ignored_classes == {"mask": 7}
    assert KINDS["image"](scenes).ignored_classes == {}
