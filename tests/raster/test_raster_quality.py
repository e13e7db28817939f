"""Quality bands and scaling equal numpy, value by value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.raster.chip import Scaling
from rasteret_ml.raster.quality import QUALITY_PRESETS, QualityMask


def test_scl_classes_one_by_one():
    """The twelve classes of the Sentinel-2 scene classification."""
    data = np.arange(12, dtype=np.uint8)[None]
    clear = QualityMask.parse("sentinel-2-scl").apply(data, data != 0)
    assert np.flatnonzero(clear[0]).tolist() == [2, 4, 5, 6, 7, 11]


def test_qa_pixel_values_from_the_guide():
    """Example values of the Landsat product guide: clear land and water, cloud, shadow, dilated cloud, fill."""
    words = {21824: True, 21952: True, 22280: False, 23888: False, 21826: False, 1: False, 54596: False}
    data = np.array([list(words)], np.uint16)
    found = QUALITY_PRESETS["landsat-qa-pixel"].apply(data, np.ones(data.shape, bool))
    assert found[0].tolist() == list(words.values())


@examples(60)
@given(
    hnp.arrays(st.sampled_from([np.uint8, np.uint16, np.int16, np.uint32]), (3, 4)),
    st.sets(st.integers(0, 15), min_size=1),
    st.integers(0, 6),
    st.integers(0, 3),
    st.sets(st.integers(0, 7), min_size=1),
)
def test_bits_and_fields_equal_shifts_of_python_integers(data, bits, first, more, values):
    """Signed and unsigned types; bits beyond the type are an error."""
    values = {value for value in values if value < 2 ** (more + 1)}
    mask = QualityMask(band="q", bits=tuple(bits), fields={(first, first + more): tuple(values)})
    if max(*bits, first + more) >= 8 * data.itemsize:
        with pytest.raises(UsageError, match=rf"'q' is {data.dtype}: bits must be from 0 to {8 * data.itemsize - 1}"):
            mask.apply(data, np.ones(data.shape, bool))
        return
    found = mask.apply(data, np.ones(data.shape, bool))
    for value, clear in zip(data.ravel().tolist(), found.ravel().tolist(), strict=True):
        bad = any(value >> bit & 1 for bit in bits) or (value >> first) & (2 ** (more + 1) - 1) in values
        assert clear == (not bad)


def test_probabilities_and_unknown_pixels():
    """Pixels below the limit are clear; invalid and NaN pixels are not."""
    data = np.array([[0.1, 0.4, np.nan, 0.0]], np.float32)
    found = QualityMask(band="p", below=0.4).apply(data, np.array([[True, True, True, False]]))
    assert found[0].tolist() == [True, False, False, False]
    cloudy = QualityMask(band="c", cloudy=(8, 9))
    assert cloudy.apply(np.array([[8, 1, 1]], np.uint8), np.array([[True, True, False]])).tolist() == [
        [False, True, False]
    ]
    with pytest.raises(UsageError, match="below="):
        cloudy.apply(data, np.ones(data.shape, bool))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"clear": (1,), "cloudy": (2,)},
        {"bits": (64,)},
        {"fields": {(3, 1): (0,)}},
        {"fields": {(0, 1): (4,)}},
        {"bits": (1,), "nodata": "none"},
    ],
)
def test_invalid_rules_are_refused(wrong):
    """No rule, several rules, and bits and values out of range."""
    with pytest.raises(UsageError):
        QualityMask(band="q", **wrong)


def test_classes_out_of_range_are_refused():
    """They would match no pixel: with `cloudy`, all would be clear."""
    data = np.zeros((1, 2), np.uint8)
    for wrong in ({"cloudy": (300,)}, {"clear": (-1, 4)}):
        with pytest.raises(UsageError, match=r"'q' is uint8: classes must be"):
            QualityMask(band="q", **wrong).apply(data, np.ones(data.shape, bool))


@pytest.mark.parametrize(
    ("mask", "refused"),
    [
        ({"bits": (1,)}, True),
        ({"fields": {(1, 2): (3,)}}, True),
        ({"fields": {(1, 2): (0,)}}, False),
        ({"bits": (1,), "nodata": 0}, False),
        ({"bits": (1,), "nodata": "ignore"}, False),
        ({"cloudy": (3, 8)}, False),
        ({"clear": (4,)}, False),
        ({"below": 40}, False),
    ],
)
def test_nodata_that_means_clear_is_refused(mask, refused):
    """The file declares 0 as nodata, but by the bits 0 is clear; classes are not affected."""
    quality = QualityMask(band="q", **mask)
    if refused:
        with pytest.raises(UsageError, match=r"'q'.*nodata='ignore'.*nodata=0"):
            quality.check(np.dtype("uint8"), 0)
    else:
        quality.check(np.dtype("uint8"), 0)
    quality.check(np.dtype("uint8"), 255)
    quality.check(np.dtype("uint8"))


def test_masks_from_yaml():
    """Preset names and mappings with lists; errors name unknown ones."""
    assert QualityMask.parse({"band": "SCL", "clear": [4, 5]}) == QualityMask(band="SCL", clear=(4, 5))
    fields = {"8-9": [3], "4": [1]}
    assert QualityMask.parse({"band": "QA", "fields": fields}) == QualityMask(
        band="QA", fields={(8, 9): (3,), (4, 4): (1,)}
    )
    with pytest.raises(UsageError, match="bit ranges"):
        QualityMask.parse({"band": "QA", "fields": {"high": [3]}})
    with pytest.raises(UsageError, match="sentinel-2-scl"):
        QualityMask.parse("sentinel-9")
    with pytest.raises(UsageError, match="classes"):
        QualityMask.parse({"band": "SCL", "classes": [4, 5]})


@examples(60)
@given(
    hnp.arrays(np.uint16, (2, 3, 3)),
    st.tuples(st.sampled_from([0.0001, 0.01, 1.0, 2.5]), st.sampled_from([0.0, -0.1, 1000.0])),
    st.tuples(st.sampled_from([0.0001, 0.01, 1.0, 2.5]), st.sampled_from([0.0, -0.1, 1000.0])),
)
def test_restored_values_are_the_nearest_of_the_type(data, one, two):
    """Convert stored values from one scaling to another."""
    a, b = Scaling((one[0],) * 2, (one[1],) * 2), Scaling((two[0], None), (None, two[1]))
    valid = data % 3 != 0
    found = b.restore(a.values(data), data, valid)
    wanted = a.values(data)
    scale, offset = np.array([two[0], 1.0])[:, None, None], np.array([0.0, two[1]])[:, None, None]
    inside = np.clip(wanted, offset, 65535 * scale + offset)
    assert (np.abs(found * scale + offset - inside)[valid] <= np.broadcast_to(scale, data.shape)[valid] * 0.5001).all()
    assert (found[~valid] == data[~valid]).all()
