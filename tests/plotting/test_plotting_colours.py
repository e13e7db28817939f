"""Colours of classes: stable, told apart, the user's own in any form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.chips import ChipLayers, ChipStyle, draw_chips
from rasteret_ml.plotting.colours import NAMED_PALETTE, class_colours, class_names, palette_colour

_TO_LINEAR_RGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
# Machado, Oliveira and Fernandes (2009), severity 1.
_EYES = {
    "usual": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def _lab(rgb: np.ndarray, eye: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB colours as an eye sees them."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ eye.T, 0, 1) @ np.linalg.inv(_TO_LINEAR_RGB).T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("eye", _EYES)
def test_the_palette_is_told_apart_by_all_eyes(eye):
    lab = _lab(np.array([palette_colour(i)[:3] for i in range(len(NAMED_PALETTE))]), _EYES[eye])
    nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2))
    assert nearest > 10  # the usual red against green of equal lightness falls to about 5


def test_the_oracle_of_eyes_sees_the_difference():
    red_green = np.array([[0.75, 0.35, 0.2], [0.53, 0.5, 0.2]])
    apart = {name: float(np.linalg.norm(np.subtract(*_lab(red_green, eye)))) for name, eye in _EYES.items()}
    assert apart["usual"] > 30 > 12 > apart["deutan"]


def test_a_class_has_the_same_colour_whatever_else_is_there():
    assert class_colours([5])[5] == class_colours(range(20))[5] == palette_colour(5)
    assert len({palette_colour(i) for i in range(27)}) == 27
    assert palette_colour(27) == palette_colour(0)
    assert all(0 <= v <= 1 for i in range(-30, 60) for v in palette_colour(i))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("forestgreen", to_rgba("forestgreen")),
        ("#ff0000", (1, 0, 0, 1)),
        ((0.5, 0.25, 0), (0.5, 0.25, 0, 1)),
        ((255, 0, 51), (1, 0, 0.2, 1)),
        ([255, 0, 51, 0], (1, 0, 0.2, 0)),
        (np.array([0, 102, 255], np.uint8), (0, 0.4, 1, 1)),
    ],
)
def test_the_users_colours_in_any_form(given, expected):
    found = class_colours([3, 4], {3: given})
    assert found[3] == pytest.approx(expected)
    assert found[4] == palette_colour(4)


def test_a_colour_table_of_a_file_is_in_bytes_throughout():
    table = {0: (1, 1, 1, 255), 1: (1, 0, 0, 255)}
    assert class_colours([0, 1], table)[1] == pytest.approx((1 / 255, 0, 0, 1))
    assert class_colours([1], {1: (1, 0, 0)})[1] == (1, 0, 0, 1)


def test_a_list_counts_from_zero():
    assert class_colours([1], ["red", "blue"])[1] == to_rgba("blue")
    assert class_names([0, 1, 2], ["water", "wood"]) == {0: "water", 1: "wood", 2: "class 2"}
    assert class_names([7], {7: "maize"}) == {7: "maize"}


@pytest.mark.parametrize("bad", ["no such colour", (1, 2), (300, 0, 0), (0.5, 0.5, 1.5), 7, None])
def test_what_is_no_colour_names_its_class(bad):
    with pytest.raises(UsageError, match="class 12"):
        class_colours([12], {12: bad})


@pytest.mark.parametrize("bad", ["viridis", 3])
def test_what_is_no_table_is_refused(bad):
    with pytest.raises(UsageError, match="colours must be a mapping"):
        class_colours([1], bad)


def test_labels_have_the_colour_of_their_class_and_ignored_ones_are_transparent(rng):
    labels = rng.integers(-2, 6, (30, 20))
    figure = draw_chips([ChipLayers(labels=labels)], ChipStyle(ignore_index=-2, colours={5: "red"}))
    shown = np.asarray(figure.axes[0].images[0].get_array())
    colours = class_colours(range(-2, 6), {5: "red"}) | {-2: (0, 0, 0, 0)}
    for (row, col), number in np.ndenumerate(labels):
        np.testing.assert_allclose(shown[row, col], colours[int(number)])
