"""Join two samples of a chip (`&`), and fill one from the other (`|`)."""

from __future__ import annotations

import re

import pytest
import torch

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.merge import join_samples, merge_by_validity, with_validity

H, W = 3, 4


def images(value: float, *lead: int, dtype: torch.dtype = torch.uint16, **keys: torch.Tensor):
    """Return an image sample `[*lead, H, W]`, all valid."""
    return {
        "image": torch.full((*lead, H, W), value).to(dtype),
        "mask_valid": torch.ones(*lead[:-1], 1, H, W, dtype=torch.bool),
        **keys,
    }


def labels(value: int, key: str = "mask"):
    return {key: torch.full((H, W), value), "mask_valid": torch.ones(1, H, W, dtype=torch.bool)}


def test_labels_with_different_keys_are_joined():
    """The same key twice is an error that names key=."""
    joined = join_samples([images(1, 2), labels(1), labels(2, "mask_height")])
    assert (joined["mask"] == 1).all()
    assert (joined["mask_height"] == 2).all()
    with pytest.raises(UsageError, match=r"'mask'.*key="):
        join_samples([images(1, 2), labels(1), labels(2)])


def test_series_join_along_channels():
    """TorchGeo concatenates them along T."""
    joined = join_samples([images(1, 5, 2), images(2, 5, 3)])
    assert joined["image"].shape == (5, 5, H, W)
    assert joined["image"][:, :, 0, 0].tolist() == [[1, 1, 2, 2, 2]] * 5
    assert joined["mask_valid"].shape == (5, 1, H, W)


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        (images(1, 5, 2), images(1, 4, 2), r"5 and 4 dates.*same length=.*one dataset"),
        (images(1, 5, 2), images(1, 2), "time series and single images"),
        (images(1, 2), images(1, 2, dtype=torch.float32), "uint16 and torch.float32"),
        (images(1, 2), {"image": torch.zeros(2, H, W + 1, dtype=torch.uint16)}, "one height and width"),
    ],
)
def test_images_of_different_shapes_or_types_are_refused(left, right, text):
    """The error says what to do."""
    with pytest.raises(UsageError, match=text):
        join_samples([left, right])


def test_validity_and_clouds_are_joined_by_and():
    """Per date and over bands; the validity of a single label applies to every date."""
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
def test_scale_covers_all_channels_if_one_side_has_it(lead):
    """Scale 1 and offset 0 are added for the other side."""
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


def test_place_and_time_come_from_the_left_side():
    """The inputs are not changed."""
    places = {"transform": torch.zeros(9), "time": torch.zeros(1), "record": torch.zeros(1, dtype=torch.int64)}
    others = {key: value + 7 for key, value in places.items()} | {"epsg": torch.tensor([4326])}
    left, right = images(1, 2) | places, labels(1) | others
    joined = join_samples([left, right])
    assert all(torch.equal(joined[key], value) for key, value in places.items())
    assert joined["epsg"].item() == 4326
    assert set(left) == {"image", "mask_valid", *places}


def test_series_are_filled_date_by_date():
    """A gap in one date is not filled from another date; padding is replaced by whole dates."""

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


def test_labels_next_to_a_series_are_filled_where_it_has_no_valid_date():
    """Labels have no axis T."""
    left = images(1, 2, 1) | {"mask": torch.full((H, W), 1)}
    right = images(2, 2, 1) | {"mask": torch.full((H, W), 2)}
    left["mask_valid"][:, 0, 0, 0] = False
    left["mask_valid"][0, 0, 1, 1] = False
    merged = merge_by_validity([left, right])
    expected = torch.full((H, W), 1)
    expected[0, 0] = 2
    assert torch.equal(merged["mask"], expected)


def test_nodata_never_wins_in_a_union():
    """TorchGeo's maximum would give 65535."""
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
        (images(2, 1) | {"scale": torch.tensor([0.5])}, "must have one scale"),
        (images(2, 1) | {"offset": torch.tensor([-1000.0])}, "must have one offset"),
        (images(2.5, 1, dtype=torch.float32), "uint16 and torch.float32"),
    ],
)
def test_union_of_different_lengths_scales_or_types_is_refused(other, text):
    """Pixels are not mixed."""
    left = images(1, 1)
    left["mask_valid"][0, 0, 0] = False
    with pytest.raises(UsageError, match=text):
        merge_by_validity([left, other])


def test_integer_valued_floats_are_cast_to_the_left_sides_type():
    """Stock datasets give float32, whatever is stored."""
    left = images(1, 1)
    left["mask_valid"][0, 0, 0] = False
    stock = with_validity({"image": torch.tensor([[[5.0, 0, 0, 0], [0] * 4, [0, 0, 0, 2.5]]])})
    assert stock["mask_valid"].sum().item() == 2
    merged = merge_by_validity([left, stock])
    assert merged["image"].dtype == torch.uint16
    assert merged["image"].flatten().tolist() == [5] + [1] * 11


def test_a_stock_sample_without_pixels_is_refused():
    """The error names the keys it needs."""
    with pytest.raises(UsageError, match="'image' or 'mask'"):
        with_validity({"bbox_xyxy": torch.zeros(0, 4)})


DAY = 86400.0


def dated(value: int, days: list[float], length: int = 3, key: str = "image", **keys: torch.Tensor):
    """Return a series of these days, padded."""
    there = torch.arange(length) < len(days)
    return {
        key: torch.full((length, 1, H, W), value).to(torch.uint16),
        "mask_valid": there[:, None, None, None].expand(length, 1, H, W).clone(),
        "time": torch.tensor([day * DAY for day in days] + [torch.nan] * (length - len(days)), dtype=torch.float64),
        "record": torch.where(there, value, -1),
        "time_valid": there,
        "length": torch.tensor([len(days)]),
        **keys,
    }


@pytest.mark.parametrize("key", ["image", "image_s1"])
def test_series_of_different_dates_do_not_join(key):
    """Times within a day match, and padding matches any date."""
    with pytest.raises(UsageError, match=r"`&`.*1970-01-02 00:00 and 1970-01-03 00:00.*same series=.*bands of both"):
        join_samples([dated(1, [1, 2, 3]), dated(2, [2, 3], key=key)])
    near = join_samples([dated(1, [1, 2.9, 4]), dated(2, [1.7, 3.1], key=key)])
    assert near["time_valid"].tolist() == [True, True, False]
    assert near["length"].tolist() == [2]
    assert near["time"][:2].tolist() == [DAY, 2.9 * DAY]
    assert near["time"][2].isnan()
    assert near["record"].tolist() == [1, 1, -1]
    assert near["mask_valid"].flatten(1).all(1).tolist() == [True, True, False]


def test_series_of_different_dates_do_not_fill_each_other():
    """Even if no pixel is missing."""
    with pytest.raises(UsageError, match=r"`\|`.*1970-01-02 00:00 and 1970-01-12 00:00.*records of both"):
        merge_by_validity([dated(1, [1], 1), dated(2, [11], 1)])


def test_series_of_different_lengths_do_not_join_under_any_key():
    """They would share `mask_valid` and `time`."""
    with pytest.raises(UsageError, match=r"3 and 2 dates.*length="):
        join_samples([dated(1, [1, 2]), dated(2, [1, 2], 2, key="image_s1")])
    with pytest.raises(UsageError, match="3 and 2 dates"):
        join_samples([dated(1, [1, 2]), images(1, 2, 1)])


@pytest.mark.parametrize("series_first", [True, False])
def test_dates_come_from_the_series_on_either_side(series_first):
    """The validity of a single image applies to every date."""
    single = {"image_dem": torch.ones(1, H, W), "mask_valid": torch.ones(1, H, W, dtype=torch.bool)}
    single |= {"time": torch.zeros(1, dtype=torch.float64), "record": torch.tensor([77])}
    single["mask_clear"] = torch.ones(1, H, W, dtype=torch.bool)
    single["mask_valid"][0, 0, 0] = False
    series = dated(5, [1, 2])
    joined = join_samples([series, single] if series_first else [single, series])
    for key in ("time_valid", "length", "record", "image"):
        assert torch.equal(joined[key], series[key])
    assert joined["time"][:2].tolist() == [DAY, 2 * DAY]
    assert torch.equal(joined["mask_valid"], series["mask_valid"] & single["mask_valid"])
    assert joined["mask_clear"].shape == (3, 1, H, W)


def test_scale_belongs_to_image():
    """The scale of other pixels gets their name and is not concatenated."""
    radar = {"image_s1": torch.zeros(2, H, W), "scale": torch.tensor([0.5, 0.5]), "offset": torch.tensor([1.0, 2.0])}
    for samples in ([images(1, 3), radar], [radar, images(1, 3)], [radar, labels(1)]):
        joined = join_samples(samples)
        assert "scale" not in joined
        assert torch.equal(joined["scale_image_s1"], radar["scale"])
        assert torch.equal(joined["offset_image_s1"], radar["offset"])
    optical = images(1, 1) | {"scale": torch.tensor([0.1])}
    joined = join_samples([join_samples([optical, radar]), images(2, 1)])
    assert joined["scale"].tolist() == pytest.approx([0.1, 1])
    assert joined["scale_image_s1"].tolist() == [0.5, 0.5]


def test_joining_a_scaled_series_and_a_scaled_image_names_the_remedy():
    """Not just that tensor shapes differ."""
    series = dated(1, [1, 2, 3]) | {"scale": torch.ones(3, 1), "offset": torch.zeros(3, 1)}
    single = images(1, 1) | {"scale": torch.ones(1), "offset": torch.zeros(1)}
    for samples in ([series, single], [single, series]):
        with pytest.raises(UsageError, match=r"time series and single images.*key="):
            join_samples(samples)
    other = {"image_x" if key == "image" else key: value for key, value in single.items()}
    for samples in ([series, other], [other, series]):
        joined = join_samples(samples)
        assert joined["scale"].shape == (3, 1)
        assert joined["scale_image_x"].shape == (1,)


@pytest.mark.parametrize("other", [{"image_x": torch.ones(1, H, W)}, {"mask": torch.ones(H, W)}])
def test_union_of_different_pixel_keys_is_refused(other):
    """Otherwise pixels would become valid without being filled."""
    left, right = images(1, 1), other | {"mask_valid": torch.ones(1, H, W, dtype=torch.bool)}
    with pytest.raises(UsageError, match=re.escape(f"['image'] and {sorted(other)}")):
        merge_by_validity([left, right])


def test_dates_added_from_the_right_bring_their_scale():
    """Padding has no scale of its own."""
    left = dated(1, [1, 2]) | {"scale": torch.tensor([[0.5], [0.25], [1.0]]), "offset": torch.zeros(3, 1)}
    right = dated(9, [1, 2, 3]) | {"scale": torch.tensor([[0.5], [0.25], [0.125]]), "offset": torch.full((3, 1), 0.0)}
    right["offset"][2] = -7
    left["mask_valid"][0, 0, 0, 0] = False
    merged = merge_by_validity([left, right])
    assert merged["scale"].flatten().tolist() == [0.5, 0.25, 0.125]
    assert merged["offset"].flatten().tolist() == [0, 0, -7]
    assert merged["image"][:, 0, 0, 0].tolist() == [9, 1, 9]
    right["scale"][0] = 0.75
    with pytest.raises(UsageError, match="must have one scale"):
        merge_by_validity([left, right])
    left["mask_valid"][0] = True  # nothing to fill in that date
    assert merge_by_validity([left, right])["scale"].flatten().tolist() == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("left_tells", [True, False])
def test_unknown_is_not_clear(left_tells):
    """If only one side has `mask_clear`, pixels of the other are not clear."""
    left, right = images(1, 1), images(2, 1)
    left["mask_valid"][0, 0, 0] = False
    (left if left_tells else right)["mask_clear"] = torch.ones(1, H, W, dtype=torch.bool)
    clear = merge_by_validity([left, right])["mask_clear"]
    expected = torch.full((1, H, W), left_tells)
    expected[0, 0, 0] = not left_tells
    assert torch.equal(clear, expected)
