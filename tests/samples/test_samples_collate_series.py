"""Collate time series, several label keys and metadata: padding, types and squeezed axes."""

from __future__ import annotations

import math

import pytest
import torch

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.samples.buffers import batch_buffer


def series(dates: int, height: int = 4, width: int = 5) -> dict[str, torch.Tensor]:
    """Return a series sample whose pixels are 1 at the first date, 2 at the second, and so on."""
    return {
        "image": (torch.arange(dates) + 1)[:, None, None, None].expand(-1, 2, height, width).to(torch.uint16),
        "mask_valid": torch.ones(dates, 1, height, width, dtype=torch.bool),
        "mask_clear": torch.ones(dates, 1, height, width, dtype=torch.bool),
        "time": torch.arange(dates, dtype=torch.float64),
        "record": torch.arange(dates),
        "time_valid": torch.ones(dates, dtype=torch.bool),
        "scale": torch.full((dates, 2), 0.5),
        "offset": torch.full((dates, 2), -3.0),
        "length": torch.tensor([dates]),
        "aoi": torch.tensor([dates]),
        "epsg": torch.tensor([32600 + dates]),
        "label": torch.tensor([dates / 2]),
    }


def test_series_of_different_lengths_are_padded_at_the_end():
    """Each key with its own fill value; no date is lost or moved."""
    batch = rm.collate([series(3), series(1)])
    assert batch["image"].dtype == torch.uint16
    assert batch["image"][:, :, 0, 0, 0].tolist() == [[1, 2, 3], [1, 0, 0]]
    for key in ("mask_valid", "mask_clear"):
        assert batch[key].all((2, 3, 4)).tolist() == [[True, True, True], [True, False, False]]
        assert not batch[key][1, 1:].any()
    assert batch["time"][0].tolist() == [0, 1, 2]
    assert batch["time"][1, 0].item() == 0
    assert batch["time"][1, 1:].isnan().all()
    assert batch["record"].tolist() == [[0, 1, 2], [0, -1, -1]]
    assert batch["time_valid"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["scale"][1].tolist() == [[0.5, 0.5], [1, 1], [1, 1]]
    assert batch["offset"][1].tolist() == [[-3, -3], [0, 0], [0, 0]]
    assert batch["length"].tolist() == [3, 1]
    assert batch["aoi"].tolist() == [3, 1]
    assert batch["epsg"].tolist() == [32603, 32601]
    assert batch["label"].tolist() == [1.5, 0.5]


def test_series_of_different_sizes_and_lengths_are_padded_along_both():
    """T, height and width at once."""
    batch = rm.collate([series(2, 4, 5), series(1, 6, 3)])
    assert batch["image"].shape == (2, 2, 2, 6, 5)
    assert batch["mask_valid"].sum((1, 2, 3, 4)).tolist() == [2 * 20, 18]


@pytest.mark.parametrize(
    ("key", "dtype", "fill"),
    [
        ("mask", torch.int64, -1),
        ("mask_crop", torch.int16, -1),
        ("mask_height", torch.float32, math.nan),
        ("mask_aoi", torch.bool, False),
        ("image_radar", torch.float32, 0.0),
    ],
)
def test_padding_by_key_and_type(key, dtype, fill):
    """Masks by type, images with 0."""
    batch = rm.collate([{key: torch.ones(2, 3, dtype=dtype)}, {key: torch.ones(3, 2, dtype=dtype)}], ignore_index=-1)
    assert batch[key].dtype == dtype
    expected = torch.full((2, 3, 3), fill, dtype=dtype)
    expected[0, :2, :3] = 1
    expected[1, :3, :2] = 1
    torch.testing.assert_close(batch[key], expected, equal_nan=True)


def test_series_of_one_buffer_are_not_copied():
    """The batch is the buffer itself."""
    buffer = batch_buffer((2, 3, 1, 4, 4), torch.uint8)
    batch = rm.collate([{"image": row} for row in buffer.unbind(0)])
    assert batch["image"].data_ptr() == buffer.data_ptr()
    lengths = torch.tensor([[3], [2]])
    assert rm.collate([{"length": row} for row in lengths.unbind(0)])["length"].data_ptr() == lengths.data_ptr()


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        ([{"image": torch.zeros(2, 4, 4)}, {"image": torch.zeros(3, 4, 4)}], "differ in more"),
        ([{"image": torch.zeros(2, 2, 4, 4)}, {"image": torch.zeros(2, 3, 4, 4)}], "differ in more"),
        ([{"image": torch.zeros(1, 2, 4, 4)}, {"image": torch.zeros(2, 4, 4)}], "differ in more"),
        ([{"scale": torch.zeros(2)}, {"scale": torch.zeros(3)}], "'scale' cannot be batched"),
        ([{"scale": torch.zeros(2, 2)}, {"scale": torch.zeros(2, 3)}], "more than T"),
        ([{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(3, 4)}], "'boxes' cannot be batched"),
        ([{"mask": torch.zeros(n, n, dtype=torch.uint8)} for n in (2, 3)], "ignore_index"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_padded_are_refused(samples, text):
    """Channels are not padded, and uint8 cannot hold -100."""
    with pytest.raises(UsageError, match=text):
        rm.collate(samples)


def test_scales_of_other_keys_are_padded_like_scale() -> None:
    """`scale_image_s1` of series of different lengths."""
    samples = [{"scale_image_s1": torch.full((t, 1), 0.5), "offset_image_s1": torch.ones(t, 1)} for t in (1, 3)]
    batch = rm.collate(samples)
    assert batch["scale_image_s1"][0, :, 0].tolist() == [0.5, 1.0, 1.0]
    assert batch["offset_image_s1"][0, :, 0].tolist() == [1.0, 0.0, 0.0]
