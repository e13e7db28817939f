"""Composites over time equal numpy's masked median and mean, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.samples.composite import Composite

BANDS = ("B02", "B04", "B08")


@examples(60)
@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans(), st.sampled_from([np.uint16, np.int16, np.float32]))
def test_composites_equal_numpy_at_every_pixel(seed, dates, with_clear, dtype):
    """Clear and valid dates are used if there are any, else valid ones."""
    rng = np.random.default_rng(seed)
    data = rng.integers(1, 3000, (dates, 3, 4, 5)).astype(dtype)
    valid = rng.random(data.shape) < 0.7
    clear = rng.random((dates, 4, 5)) < 0.5 if with_clear else None
    results = {k: Composite.parse(k, BANDS).apply(data, valid, clear) for k in ("median", "mean", "max_ndvi")}
    for row in range(4):
        for col in range(5):
            pixel, good = data[:, :, row, col].astype(np.float64), valid[:, :, row, col]
            if clear is not None:
                bright = clear[:, row, col] & good.all(axis=1)
                assert results["median"][2][row, col] == bright.any()
                good = good & bright[:, None] if bright.any() else good
            for band in range(3):
                values = pixel[good[:, band], band]
                for kind, of in (("median", np.median), ("mean", np.mean)):
                    out, known, _ = results[kind]
                    assert known[band, row, col] == bool(len(values))
                    if len(values):
                        np.testing.assert_allclose(out[band, row, col], of(values), rtol=1e-6)
            whole = np.flatnonzero(good.all(axis=1))
            out, known, _ = results["max_ndvi"]
            assert known[:, row, col].tolist() == [bool(len(whole))] * 3
            if len(whole):
                red, nir = pixel[whole, 1], pixel[whole, 2]
                best = whole[np.argmax((nir - red) / (nir + red))]
                assert out[:, row, col].tolist() == data[best, :, row, col].tolist()


def test_types_of_results():
    """Selected pixels keep their type; computed ones are floats."""
    data = np.ones((2, 3, 1, 1), np.uint16)
    for kind, dtype in (("median", np.float32), ("mean", np.float32), ("max_ndvi", np.uint16)):
        assert Composite.parse(kind, BANDS).apply(data, data > 0, None)[0].dtype == dtype


def test_unknown_composites_and_bands_are_refused():
    """The error lists the known names."""
    with pytest.raises(UsageError, match="median"):
        Composite.parse("mode", BANDS)
    with pytest.raises(UsageError, match="B08"):
        Composite.parse("max_ndvi", ("B02", "B04"))
    assert Composite.parse({"max_index": ("B04", "B02")}, BANDS).bands == (1, 0)
