"""Samples of every kind as pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from picture_oracle import artists, colour_at, legend_texts, rendered

import rasteret_ml as rm
from rasteret_ml.errors import UnknownBandError, UsageError
from rasteret_ml.plotting.colours import palette_colour
from rasteret_ml.samples.plots import plot_sample, shown_bands
from rasteret_ml.transforms.normalize import normalize

_NORTH_UP = torch.tensor([10.0, 0, 500000, 0, -10, 5000000, 0, 0, 1], dtype=torch.float64)


def _bytes(colour):
    return tuple(round(255 * v) for v in colour[:3])


def _sample(dtype=torch.uint16, bands=4, size=20):
    """The top half of each band is dark, the bottom half bright; the last two rows are invalid."""
    image = torch.zeros((bands, size, size), dtype=torch.int64)
    image[:, size // 2 :] = 100
    valid = torch.ones((1, size, size), dtype=torch.bool)
    valid[:, -2:] = False
    time = torch.tensor([pd.Timestamp("2023-08-11T10:03", tz="UTC").timestamp()], dtype=torch.float64)
    return {"image": image.to(dtype), "mask_valid": valid, "time": time, "transform": _NORTH_UP}


def _series(dates=3):
    image = torch.arange(dates)[:, None, None, None] * torch.ones((1, 3, 8, 8))
    time = torch.tensor([pd.Timestamp(f"2024-0{i + 1}-15", tz="UTC").timestamp() for i in range(dates)])
    held = torch.ones(dates, dtype=torch.bool)
    time, held[-1] = time.double(), False
    time[-1] = torch.nan
    valid = torch.ones((dates, 1, 8, 8), dtype=torch.bool)
    valid[0, :, :4] = False
    return {
        "image": image.to(torch.int16), "mask_valid": valid, "mask_clear": valid.clone(), "time": time,
        "time_valid": held, "mask": torch.zeros((8, 8), dtype=torch.int64), "transform": _NORTH_UP,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("count", "bands", "rgb", "expected"),
    [
        (4, ["B02", "B03", "B04", "B08"], None, (2, 1, 0)),
        (4, ["Red", "Green", "Blue", "NIR"], None, (0, 1, 2)),
        (4, ["nir", "blue", "green", "red"], None, (3, 2, 1)),
        (3, ["B2", "B3", "B4"], None, (2, 1, 0)),
        (4, ["B08", "B11", "B12", "B02"], None, (0, 1, 2)),
        (5, None, None, (0, 1, 2)),
        (2, ["VV", "VH"], None, (0,)),
        (1, None, None, (0,)),
        (4, ["B02", "B03", "B04", "B08"], ["B08", "B04", "B03"], (3, 2, 1)),
        (4, None, (3, 2, 1), (3, 2, 1)),
        (4, ["a", "b", "c", "d"], ("d", 0, "b"), (3, 0, 1)),
        (2, ["VV", "VH"], "VH", (1,)),
        (2, None, 1, (1,)),
    ],
)
def test_which_bands_are_shown(count, bands, rgb, expected):
    assert shown_bands(count, bands, rgb) == expected


@pytest.mark.parametrize(
    ("bands", "rgb", "error", "words"),
    [
        (["a"], None, UsageError, "3 bands, got 1 names"),
        (None, [0, 1], UsageError, "three bands, or one"),
        (["a", "b", "c"], "nir", UnknownBandError, "one of .*, got 'nir'"),
        (None, "nir", UnknownBandError, "bands= must name .*, got 'nir'"),
        (None, 3, UnknownBandError, "in 0..2, got 3"),
        (None, -1, UnknownBandError, "in 0..2, got -1"),
    ],
)
def test_bands_that_are_not_there(bands, rgb, error, words):
    with pytest.raises(error, match=words):
        shown_bands(3, bands, rgb)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.float16, torch.bfloat16, torch.float32]
)
def test_any_type_is_dark_above_and_bright_below(dtype):
    figure = plot_sample(_sample(dtype))
    (ax,) = figure.axes
    assert colour_at(figure, ax, 5, 3) == (0, 0, 0)
    assert colour_at(figure, ax, 5, 14) == (255, 255, 255)
    assert figure.get_suptitle() == "2023-08-11   90 % valid"
    assert len(artists(ax, "not valid")) == 1


def test_truth_values_are_a_picture_too():
    sample = {"image": torch.eye(6, dtype=torch.bool)[None]}
    figure = plot_sample(sample)
    assert colour_at(figure, figure.axes[0], 2, 2) == (255, 255, 255)
    assert colour_at(figure, figure.axes[0], 2, 4) == (0, 0, 0)


def test_chosen_bands_and_a_title_of_ones_own():
    sample = _sample(torch.float32)
    sample["image"][3] = sample["image"][3].flip(0)  # the other way round
    figure = plot_sample(sample, bands=["B02", "B03", "B04", "B08"], rgb=["B08", "B04", "B03"], title="false colours")
    assert figure.get_suptitle() == "false colours"
    assert colour_at(figure, figure.axes[0], 5, 3) == (255, 0, 0)


def test_a_float_image_is_invalid_where_it_is_nan():
    sample = _sample(torch.float32)
    sample["image"][1, :5] = torch.nan
    (patch,) = artists(plot_sample(sample).axes[0], "not valid")
    assert patch.get_paths()[0].get_extents().bounds == (-0.5, -0.5, 20, 20)
    del sample["mask_valid"]
    (patch,) = artists(plot_sample(sample).axes[0], "not valid")
    assert patch.get_paths()[0].get_extents().bounds == (-0.5, -0.5, 20, 5)
    assert artists(plot_sample(sample, rgb=0).axes[0], "not valid") == []


def test_validity_per_band_is_that_of_the_bands_shown():
    sample = _sample()
    sample["mask_valid"] = torch.ones((4, 20, 20), dtype=torch.bool)
    sample["mask_valid"][3] = False
    assert artists(plot_sample(sample, rgb=(0, 1, 2)).axes[0], "not valid") == []
    assert len(artists(plot_sample(sample, rgb=3).axes[0], "not valid")) == 1


def test_labels_classes_and_predictions():
    sample = _sample() | {
        "mask": torch.zeros((20, 20), dtype=torch.int64),
        "prediction": torch.stack([torch.zeros(20, 20), torch.ones(20, 20), -torch.ones(20, 20)]),  # scores
        "mask_aoi": torch.eye(20, dtype=torch.bool)[None],
        "mask_clear": torch.ones((1, 20, 20), dtype=torch.bool),
        "label": torch.tensor([1]),
    }
    sample["mask"][:10] = 255
    figure = plot_sample(sample, classes=["water", "wood"], colours={0: "blue"}, ignore_index=255)
    assert [ax.get_title() for ax in figure.axes] == ["image", "labels", "prediction"]
    assert legend_texts(figure) == ["water", "wood", "not valid", "AOI"]
    assert figure.get_suptitle() == "2023-08-11   90 % valid, 90 % clear   label wood"
    assert colour_at(figure, figure.axes[1], 3, 15) == (0, 0, 255)
    assert colour_at(figure, figure.axes[1], 15, 3) == (255, 255, 255)
    assert colour_at(figure, figure.axes[2], 15, 3) == _bytes(palette_colour(1))


def test_a_label_that_is_a_value_and_labels_that_are_values():
    sample = {"mask": torch.rand(6, 6), "label": torch.tensor([3.14159])}
    figure = plot_sample(sample)
    assert figure.get_suptitle() == "label 3.142"
    assert len(figure.axes) == 2


def test_items_of_a_batch_and_of_a_prepared_one():
    samples = [
        _sample() | {"mask": torch.ones((20, 20), dtype=torch.int64), "label": torch.tensor([i])} for i in (0, 1)
    ]
    batch = rm.collate(samples)
    item = {key: value[1] for key, value in batch.items()}
    assert plot_sample(item).get_suptitle().endswith("label class 1")
    ready = normalize(batch, [50.0] * 4, [20.0] * 4)
    figure = plot_sample({key: value[0] for key, value in ready.items()})
    assert colour_at(figure, figure.axes[0], 5, 3) == (0, 0, 0)
    assert colour_at(figure, figure.axes[0], 5, 14) == (255, 255, 255)
    with pytest.raises(UsageError, match="got a batch"):
        plot_sample(batch)
    with pytest.raises(UsageError, match="got a batch"):
        plot_sample(rm.collate([_series(), _series()]))


def test_the_lie_of_the_chip():
    sample = _sample(torch.uint8)
    sample["transform"] = torch.tensor([10.0, 0, 0, 0, 20, 0, 0, 0, 1], dtype=torch.float64)  # south up, tall pixels
    ax = plot_sample(sample).axes[0]
    assert ax.get_ylim() == (-0.5, 19.5)
    assert ax.get_aspect() == 2
    sample["transform"] = torch.tensor([0.1, 0, 10, 0, -0.1, 61, 0, 0, 1], dtype=torch.float64)
    for crs in (4326, torch.tensor(4326), torch.tensor([4326])):
        assert plot_sample(sample | {"crs": crs}).axes[0].get_aspect() == pytest.approx(2.0)  # 1 / cos(60°)
    assert plot_sample(sample | {"crs": torch.tensor(0)}).axes[0].get_aspect() == 1


def test_a_series_is_a_strip():
    for figure in (plot_sample(_series(), columns=2), plot_sample(_series())):
        assert [ax.get_title() for ax in figure.axes] == [
            "2024-01-15\n50 % valid, 50 % clear", "2024-02-15\n100 % valid, 100 % clear", "no date", "labels",
        ]  # fmt: skip
        assert [len(artists(ax, "not valid")) for ax in figure.axes] == [1, 0, 0, 0]
        assert legend_texts(figure) == ["class 0", "not valid"]
        rendered(figure)


def test_a_series_says_what_is_undated_and_takes_axes():
    sample = _series()
    del sample["time"], sample["time_valid"], sample["mask"], sample["mask_clear"]
    sample["mask_aoi"] = torch.eye(8, dtype=torch.bool)[None]
    axes = Figure().subplots(1, 3)
    plot_sample(sample, axes=axes, rgb=0)
    assert axes[2].get_title() == "undated\n100 % valid"
    assert len(artists(axes[2], "AOI")) == 2


def test_a_composite_of_several_dates_names_its_span():
    sample = _sample() | {"time": _series(4)["time"]}
    assert plot_sample(sample).get_suptitle() == "2024-01-15 to 2024-03-15 (3 days)   90 % valid"


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"mask_valid": torch.ones(1, 3, 3)}, "nothing to draw"),
        ({"mask": torch.zeros(2, 3, 3)}, "'mask' must be a map"),
        ({"image": torch.zeros(1, 3, 3), "mask": torch.zeros(4, 4)}, "must be on one grid"),
    ],
)
def test_what_cannot_be_drawn(sample, words):
    with pytest.raises(UsageError, match=words):
        plot_sample(sample)


def test_a_sample_of_a_dataset(scenes):
    """The hole of the newest scene is filled from the older one; beyond the scenes is hatched."""
    dataset = rm.RasteretDataset(scenes.images, ["B02", "B03"]) & rm.RasteretDataset(
        scenes.labels, [scenes.labels.bands[0]], is_image=False
    )
    sample = dataset[slice(499800.0, 500640.0), slice(4999360.0, 5000000.0)]
    figure = plot_sample(sample, bands=["B02", "B03"], rgb="B03")
    assert [ax.get_title() for ax in figure.axes] == ["image", "labels"]
    expected = np.asarray(sample["mask_valid"])[0]
    (patch,) = artists(figure.axes[0], "not valid")
    assert patch.get_paths()[0].get_extents().width == (~expected).any(axis=0).sum()
    assert {f"class {i}" for i in range(1, 5)} <= set(legend_texts(figure))
    number = int(sample["mask"][40, 60])
    assert colour_at(figure, figure.axes[1], 60, 40) == _bytes(palette_colour(number))
