"""Integer pixel boxes against sets of pixels."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.grid import Window

SMALL = st.integers(-6, 6)
WINDOWS = st.builds(Window, row=SMALL, col=SMALL, height=st.integers(1, 8), width=st.integers(1, 8))


def _pixels(window: Window | None) -> set[tuple[int, int]]:
    if window is None:
        return set()
    return {(r, c) for r in range(window.row, window.row_stop) for c in range(window.col, window.col_stop)}


@pytest.mark.parametrize(("height", "width"), [(0, 3), (3, 0), (-1, 3)])
def test_refuses_an_empty_window(height: int, width: int) -> None:
    """A window has at least one pixel; the message says what was asked."""
    with pytest.raises(UsageError, match=f"{height} x {width}"):
        Window(row=0, col=0, height=height, width=width)


@examples(100)
@given(a=WINDOWS, b=WINDOWS)
def test_intersection_is_the_shared_pixels(a: Window, b: Window) -> None:
    """As sets of pixels, in either order; None where nothing is shared."""
    assert _pixels(a.intersection(b)) == _pixels(a) & _pixels(b)
    assert a.intersection(b) == b.intersection(a)


@examples(50)
@given(a=WINDOWS, origin=WINDOWS)
def test_relative_to_moves_the_origin(a: Window, origin: Window) -> None:
    """The same pixels, counted from the other window's corner."""
    moved = _pixels(a.relative_to(origin))
    assert {(r + origin.row, c + origin.col) for r, c in moved} == _pixels(a)


def test_slices_shape_words_and_pickle() -> None:
    """Slices cut an array to `shape`; the text has exclusive ends."""
    w = Window(row=1, col=2, height=3, width=4)
    assert np.zeros((10, 10))[w.slices].shape == w.shape == (3, 4)
    assert str(w) == "rows 1:4, columns 2:6"
    assert pickle.loads(pickle.dumps(w)) == w
