"""The stretch: percentiles of what is valid, for every type."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.chips import stretch, stretch_limits

TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int64", "float16", "float32", "float64"]


@examples(60)
@given(st.integers(0, 10**6), st.sampled_from(TYPES), st.integers(1, 4), st.floats(0, 0.9), st.booleans())
def test_limits_are_numpys_percentiles_of_the_valid_pixels(seed, dtype, bands, share, joint):
    rng = np.random.default_rng(seed)
    image = (rng.normal(0, 50, (bands, 9, 11)) % 120).astype(dtype)
    valid = rng.random((1, 9, 11)) >= share
    valid[0, 0, :2] = True
    limits = stretch_limits(image, valid, percentiles=(5, 90), joint=joint)
    for c in range(bands):
        values = (image if joint else image[c : c + 1])[
            np.broadcast_to(valid, image.shape)[: len(image) if joint else 1]
        ]
        low, high = np.percentile(values.astype(np.float64), (5, 90))
        if low == high:
            low, high = values.min(), values.max()
        np.testing.assert_allclose(limits[c], (low, high))


@examples(40)
@given(st.integers(0, 10**6), st.sampled_from(TYPES))
def test_stretched_is_the_clipped_line_between_the_limits(seed, dtype):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 100, (2, 5, 6)).astype(dtype)
    limits = np.array([[10.0, 60.0], [5.0, 5.5]])
    shown = stretch(image, limits)
    assert shown.dtype == np.float32
    for c in range(2):
        expected = np.interp(image[c].astype(np.float64), limits[c], (0, 1))
        np.testing.assert_allclose(shown[c], expected, atol=1e-6)


def test_the_ends_of_int8_and_uint16_do_not_wrap():
    image = np.array([[[-128, 127]]], np.int8)
    np.testing.assert_array_equal(stretch(image, stretch_limits(image, percentiles=(0, 100))), [[[0, 1]]])
    image = np.array([[[0, 65535]]], np.uint16)
    np.testing.assert_array_equal(stretch(image, stretch_limits(image, percentiles=(0, 100))), [[[0, 1]]])


def test_truth_values_are_black_and_white():
    image = np.array([[[True, False, True, False]]])
    np.testing.assert_array_equal(stretch(image, stretch_limits(image)), image.astype(np.float32))


def test_one_value_is_mid_grey_and_outliers_of_a_flat_band_are_seen():
    flat = np.full((1, 10, 10), 7, np.uint16)
    np.testing.assert_array_equal(stretch(flat, stretch_limits(flat)), 0.5)
    flat[0, 3, 3] = 9
    shown = stretch(flat, stretch_limits(flat))
    assert shown[0, 3, 3] == 1
    assert shown.sum() == 1


def test_nothing_valid_gives_zero_and_one_without_a_warning():
    image = np.full((2, 3, 3), 5, np.float32)
    np.testing.assert_array_equal(stretch_limits(image, np.zeros((1, 3, 3), bool)), [[0, 1], [0, 1]])
    np.testing.assert_array_equal(stretch_limits(image * np.nan), [[0, 1], [0, 1]])


def test_nan_and_infinity_have_no_say_and_are_drawable():
    image = np.array([[[np.nan, np.inf, -np.inf, 1, 2, 3]]], np.float32)
    limits = stretch_limits(image, percentiles=(0, 100))
    np.testing.assert_array_equal(limits, [[1, 3]])
    np.testing.assert_array_equal(stretch(image, limits), [[[0, 1, 0, 0, 0.5, 1]]])


def test_validity_of_each_band_and_dates_that_share_limits():
    image = np.arange(2 * 2 * 4).reshape(2, 2, 2, 2)  # [T, C, H, W]
    valid = np.ones((2, 2, 2, 2), bool)
    valid[1, 0] = False
    limits = stretch_limits(image, valid, percentiles=(0, 100))
    np.testing.assert_array_equal(limits, [[0, 3], [4, 15]])


@pytest.mark.parametrize("pair", [(50, 50), (-1, 98), (2, 101), (98, 2)])
def test_percentiles_that_cannot_be(pair):
    with pytest.raises(UsageError, match="percentiles"):
        stretch_limits(np.zeros((1, 2, 2)), percentiles=pair)


def test_complex_pixels_are_refused():
    with pytest.raises(UsageError, match="magnitude"):
        stretch_limits(np.zeros((1, 2, 2), np.complex64))
