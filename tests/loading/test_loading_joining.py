"""What `&` makes of two samples of a chip, and what `|` does."""

from __future__ import annotations

import pytest
import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.loading.joining import join_samples, merge_by_validity, with_validity

H, W = 3, 4


def images(value: float, *lead: int, dtype: torch.dtype = torch.uint16, **keys: torch.Tensor):
    """A sample of images `[*lead, H, W]`, all valid."""
    return {
        "image": torch.full((*lead, H, W), value).to(dtype),
        "mask_valid": torch.ones(*lead[:-1], 1, H, W, dtype=torch.bool),
        **keys,
    }


def labels(value: int, key: str = "mask"):
    return {key: torch.full((H, W), value), "mask_valid": torch.ones(1, H, W, dtype=torch.bool)}


def test_several_heads_join_under_their_keys():
    """And one key twice is refused with the way out."""
    joined = join_samples([images(1, 2), labels(1), labels(2, "mask_height")])
    assert (joined["mask"] == 1).all()
    assert (joined["mask_height"] == 2).all()
    with pytest.raises(UsageError, match=r"'mask'.*key="):
        join_samples([images(1, 2), labels(1), labels(2)])


def test_series_join_along_channels():
    """torchgeo joins them along T."""
    joined = join_samples([images(1, 5, 2), images(2, 5, 3)])
    assert joined["image"].shape == (5, 5, H, W)
    assert joined["image"][:, :, 0, 0].tolist() == [[1, 1, 2, 2, 2]] * 5
    assert joined["mask_valid"].shape == (5, 1, H, W)


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        (images(1, 5, 2), images(1, 4, 2), r"5 and 4 dates.*same length.*key="),
        (images(1, 5, 2), images(1, 2), "time series and single images"),
        (images(1, 2), images(1, 2, dtype=torch.float32), "uint16 and torch.float32"),
        (images(1, 2), {"image": torch.zeros(2, H, W + 1, dtype=torch.uint16)}, "different sizes"),
    ],
)
def test_images_that_do_not_fit_are_refused(left, right, text):
    """With what to do."""
    with pytest.raises(UsageError, match=text):
        join_samples([left, right])


def test_validity_and_clouds_are_joined_by_and():
    """Per date and over bands; of a single label for each date."""
    left = images(1, 2, 3) | {"mask_clear": torch.ones(2, 1, H, W, dtype=torch.bool)}
    right = images(1, 2, 3) | {"mask_clear": torch.ones(2, 1, H, W, dtype=torch.bool)}
    left["mask_clear"][0, 0, 0, 0] = False
    right["mask_clear"][1, 0, 1, 1] = False
    right["mask_valid"][1, 0, 2, 2] = False
    label = labels(1)
    label["mask_valid"][0, 0, 3] = False
    joined = join_samples([left, right, label])
    assert torch.equal(joined["mask_clear"], left["mask_clear"] & right["mask_clear"])
    assert torch.equal(joined["mask_valid"], right["mask_valid"] & label["mask_valid"])
    per_band = images(1, 2) | {"mask_valid": torch.ones(2, H, W, dtype=torch.bool)}
    per_band["mask_valid"][1, 0, 0] = False
    assert join_samples([per_band, labels(1)])["mask_valid"].sum().item() == H * W - 1


@pytest.mark.parametrize("lead", [(2,), (5, 2)])
def test_scale_covers_all_channels_where_one_side_states_it(lead):
    """The other side's are 1 and 0."""
    stated = images(1, *lead) | {"scale": torch.full(lead, 0.5), "offset": torch.full(lead, -3.0)}
    for samples, scale in (
        ([stated, images(1, *lead)], [0.5, 0.5, 1, 1]),
        ([images(1, *lead), stated], [1, 1, 0.5, 0.5]),
    ):
        joined = join_samples(samples)
        assert joined["scale"].shape == joined["image"].shape[:-2]
        assert joined["scale"].reshape(-1, 4)[0].tolist() == scale
        assert joined["offset"].reshape(-1, 4)[-1].tolist() == [0 if s == 1 else -3 for s in scale]
    assert "scale" not in images(1, *lead)


def test_where_and_when_are_the_left_sides():
    """The samples that went in stay as they were."""
    places = {"transform": torch.zeros(9), "time": torch.zeros(1), "record": torch.zeros(1, dtype=torch.int64)}
    others = {key: value + 7 for key, value in places.items()} | {"epsg": torch.tensor([4326])}
    left, right = images(1, 2) | places, labels(1) | others
    joined = join_samples([left, right])
    assert all(torch.equal(joined[key], value) for key, value in places.items())
    assert joined["epsg"].item() == 4326
    assert set(left) == {"image", "mask_valid", *places}


def test_series_are_filled_date_by_date():
    """A gap of one date is not filled from another; dates that are only padding come whole."""

    def dated(value: int, dates: int):
        there = torch.arange(3) < dates
        return images(value, 3, 2) | {
            "mask_valid": there[:, None, None, None].expand(3, 1, H, W).clone(),
            "time": torch.where(there, torch.arange(3.0, dtype=torch.float64) + value, torch.nan),
            "record": torch.where(there, value, -1),
            "time_valid": there,
            "length": torch.tensor([dates]),
        }

    left, right = dated(1, 2), dated(9, 3)
    left["mask_valid"][0, 0, 0, 0] = False
    right["mask_valid"][0, 0, 0, 0] = False
    left["mask_valid"][1, 0, 1, 1] = False
    merged = merge_by_validity([left, right])
    expected = torch.ones(3, 2, H, W, dtype=torch.int64)
    expected[1, :, 1, 1] = 9
    expected[2] = 9
    assert torch.equal(merged["image"].long(), expected)
    assert merged["mask_valid"].sum().item() == 3 * H * W - 1
    assert merged["time"].tolist() == [1, 2, 11]
    assert merged["record"].tolist() == [1, 1, 9]
    assert merged["time_valid"].tolist() == [True, True, True]
    assert merged["length"].tolist() == [3]


def test_labels_beside_a_series_are_filled_where_it_has_nothing():
    """They have no dates of their own."""
    left = images(1, 2, 1) | {"mask": torch.full((H, W), 1)}
    right = images(2, 2, 1) | {"mask": torch.full((H, W), 2)}
    left["mask_valid"][:, 0, 0, 0] = False
    left["mask_valid"][0, 0, 1, 1] = False
    merged = merge_by_validity([left, right])
    expected = torch.full((H, W), 1)
    expected[0, 0] = 2
    assert torch.equal(merged["mask"], expected)


def test_nodata_never_wins_in_a_union():
    """torchgeo's maximum makes 65535 of it."""
    left, right = images(65535, 1), images(7, 1)
    left["mask_valid"][0, 0, :2] = False
    left["image"][0, 0, 2:] = 3
    left["mask_valid"][0, 1:] = False
    right["mask_valid"][0, 2] = False
    merged = merge_by_validity([left, right])
    assert merged["image"][0].tolist() == [[7, 7, 3, 3], [7] * 4, [65535] * 4]
    assert merged["mask_valid"][0].tolist() == [[True] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (images(2, 3, 1), "same length"),
        (images(2, 1) | {"scale": torch.tensor([0.5])}, "another scale"),
        (images(2, 1) | {"offset": torch.tensor([-1000.0])}, "another offset"),
        (images(2.5, 1, dtype=torch.float32), "uint16 and torch.float32"),
    ],
)
def test_sides_of_a_union_that_do_not_fit_are_refused(other, text):
    """Rather than mixed."""
    left = images(1, 1)
    left["mask_valid"][0, 0, 0] = False
    with pytest.raises(UsageError, match=text):
        merge_by_validity([left, other])


def test_float_pixels_that_are_whole_take_the_left_sides_type():
    """Stock datasets give float32 whatever is stored."""
    left = images(1, 1)
    left["mask_valid"][0, 0, 0] = False
    stock = with_validity({"image": torch.tensor([[[5.0, 0, 0, 0], [0] * 4, [0, 0, 0, 2.5]]])})
    assert stock["mask_valid"].sum().item() == 2
    merged = merge_by_validity([left, stock])
    assert merged["image"].dtype == torch.uint16
    assert merged["image"].flatten().tolist() == [5] + [1] * 11


def test_a_stock_sample_without_pixels_is_refused():
    """There is nothing to fill from."""
    with pytest.raises(UsageError, match="'image' or 'mask'"):
        with_validity({"bbox_xyxy": torch.zeros(0, 4)})
