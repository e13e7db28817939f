"""One chip as a picture: what is drawn where."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import subprocess
import sys
import weakref

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from picture_oracle import artists, colour_at, legend_texts, panel, rendered

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.chips import ChipLayers, ChipStyle, draw_chips, validity_text
from rasteret_ml.plotting.colours import palette_colour


def _bytes(colour):
    return tuple(round(255 * v) for v in colour[:3])


def draw_chip(layers, style=None, **options):
    return draw_chips([layers], style, **options)


def _quarters(*values, dtype=np.int64):
    """A 20 x 20 map of four values: top left, top right, bottom left, bottom right."""
    return np.kron(np.array(values, dtype).reshape(2, 2), np.ones((10, 10), dtype))


def test_the_image_is_stretched_over_valid_pixels_and_row_0_is_on_top():
    image = np.stack([_quarters(1000, 2000, 0, 0), _quarters(2000, 1000, 0, 0), _quarters(1000, 1500, 0, 0)])
    valid = _quarters(1, 1, 0, 0).astype(bool)
    figure = draw_chip(ChipLayers(image=image.astype(np.uint16), valid=valid), ChipStyle(percentiles=(0, 100)))
    (ax,) = figure.axes
    assert colour_at(figure, ax, 4, 4) == (0, 255, 0)
    assert colour_at(figure, ax, 15, 4) == (255, 0, 255)


def test_south_up_rows_are_turned():
    image = _quarters(0, 0, 9, 9)[None]
    figure = draw_chip(ChipLayers(image=image, north_up=False), ChipStyle(percentiles=(0, 100)))
    top, bottom = panel(figure, figure.axes[0])[5, 50], panel(figure, figure.axes[0])[-5, 50]
    assert top.tolist() == [255] * 3
    assert bottom.tolist() == [0] * 3


def test_invalid_pixels_are_hatched_and_only_they():
    image = np.full((3, 20, 20), 7, np.uint8)
    valid = _quarters(1, 0, 1, 1).astype(bool)
    figure = draw_chip(ChipLayers(image=image, valid=valid))
    (ax,) = figure.axes
    (patch,) = artists(ax, "not valid")
    assert patch.hatches == ["////"]
    shown = panel(figure, ax)
    height, width = (n // 2 for n in shown.shape[:2])
    hatched = shown[5 : height - 5, width + 5 : -5].reshape(-1, 3)
    assert len(np.unique(hatched, axis=0)) > 2  # paper and lines
    assert hatched.min() > 127
    for part in (shown[: height - 5, : width - 5], shown[height + 5 :]):
        assert len(np.unique(part.reshape(-1, 3), axis=0)) == 1
    assert legend_texts(figure) == ["not valid"]


def test_clouds_are_marked_otherwise_and_not_where_invalid():
    image = np.full((1, 20, 20), 7, np.uint8)
    valid, clear = _quarters(0, 1, 1, 1).astype(bool), _quarters(0, 0, 1, 1).astype(bool)
    figure = draw_chip(ChipLayers(image=image, valid=valid, clear=clear))
    (ax,) = figure.axes
    (cloud,), (invalid,) = artists(ax, "not clear"), artists(ax, "not valid")
    assert cloud.hatches != invalid.hatches
    assert cloud.get_paths()[0].get_extents().bounds == (9.5, -0.5, 10, 10)
    assert invalid.get_paths()[0].get_extents().bounds == (-0.5, -0.5, 10, 10)
    assert legend_texts(figure) == ["not valid", "not clear"]


def test_clouds_have_no_say_in_the_stretch_unless_all_is_cloud():
    image = _quarters(10, 20, 10, 5000)[None]
    layers = ChipLayers(image=image, clear=_quarters(1, 1, 1, 0).astype(bool))
    style = ChipStyle(percentiles=(0, 100))
    figure = draw_chip(layers, style)
    assert colour_at(figure, figure.axes[0], 15, 4) == (255, 255, 255)
    overcast = draw_chip(dataclasses.replace(layers, clear=np.zeros((20, 20), bool)), style)
    shown = overcast.axes[0].images[0].get_array()
    assert (shown[4, 4, 0], shown[15, 15, 0]) == (0, 1)


def test_nothing_is_hatched_where_all_is_valid_and_clear():
    every = np.ones((20, 20), bool)
    figure = draw_chip(ChipLayers(image=np.zeros((1, 20, 20)), valid=every, clear=every, inside=every))
    assert figure.legends == []
    assert list(figure.axes[0].patches) == []


def test_labels_have_their_colours_ignore_index_none_and_the_legend_names_what_is_seen():
    labels = _quarters(2, 0, -100, 5)
    style = ChipStyle(classes={0: "water", 2: "wood", 3: "unseen"}, colours={2: "#00ff00", 3: "red"})
    figure = draw_chip(ChipLayers(labels=labels), style)
    (ax,) = figure.axes
    assert colour_at(figure, ax, 4, 4) == (0, 255, 0)
    assert colour_at(figure, ax, 15, 4) == _bytes(palette_colour(0))
    assert colour_at(figure, ax, 4, 15) == (255, 255, 255)
    assert colour_at(figure, ax, 15, 15) == _bytes(palette_colour(5))
    assert legend_texts(figure) == ["water", "wood", "class 5"]
    shown = [_bytes(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    assert shown == [_bytes(palette_colour(0)), (0, 255, 0), _bytes(palette_colour(5))]


def test_image_labels_and_prediction_stand_side_by_side_with_one_legend():
    layers = ChipLayers(
        image=np.zeros((3, 20, 20)), labels=_quarters(0, 1, 1, 1), prediction=_quarters(1, 1, 2, -1).astype(np.int32)
    )
    figure = draw_chip(layers, ChipStyle(ignore_index=-1), title="a place")
    assert [ax.get_title() for ax in figure.axes] == ["image", "labels", "prediction"]
    assert figure.get_suptitle() == "a place"
    assert legend_texts(figure) == ["class 0", "class 1", "class 2"]
    for ax, x, number in ((figure.axes[1], 4, 0), (figure.axes[2], 4, 1)):
        assert colour_at(figure, ax, x, 4) == _bytes(palette_colour(number))


def test_values_share_one_scale_with_their_prediction_and_nan_is_blank():
    truth = _quarters(0, 1, np.nan, 2, dtype=np.float32)
    layers = ChipLayers(labels=truth, prediction=np.full((20, 20), 4, np.float32))
    figure = draw_chip(layers)
    first, second = figure.axes[:2]
    low, high = (_bytes(matplotlib.colormaps["viridis"](v)) for v in (0.0, 1.0))
    assert colour_at(figure, first, 4, 4) == pytest.approx(low, abs=1)
    assert colour_at(figure, second, 4, 4) == pytest.approx(high, abs=1)
    assert colour_at(figure, first, 4, 15) == (255, 255, 255)
    assert len(figure.axes) == 4  # a bar each


def test_values_that_are_all_one_or_none_can_be_drawn():
    for fill in (3.0, np.nan):
        rendered(draw_chip(ChipLayers(labels=np.full((8, 8), fill, np.float32))))


def test_the_edge_of_the_aoi_is_drawn_between_pixels():
    inside = np.zeros((20, 20), bool)
    inside[5:10, 5:15] = True
    figure = draw_chip(ChipLayers(image=np.zeros((1, 20, 20)), inside=inside, labels=np.zeros((20, 20), int)))
    for ax in figure.axes:
        drawn = artists(ax, "AOI")
        assert [line.get_datalim(ax.transData).bounds for line in drawn] == [(4.5, 4.5, 10, 5)] * 2
        assert min(colour_at(figure, ax, 10, 4.5)) > 200
        assert ax.get_xlim() == (-0.5, 19.5)
    assert legend_texts(figure) == ["class 0", "AOI"]


def test_a_label_alone_shows_its_validity():
    figure = draw_chip(ChipLayers(labels=_quarters(0, 1, 1, -100), valid=_quarters(1, 1, 1, 0).astype(bool)))
    assert len(artists(figure.axes[0], "not valid")) == 1


def test_pixels_taller_than_wide_are_drawn_so():
    figure = draw_chip(ChipLayers(image=np.zeros((1, 10, 10)), aspect=2.0))
    rendered(figure)
    box = figure.axes[0].get_window_extent()
    assert box.height == pytest.approx(2 * box.width, rel=0.01)


def test_many_classes_are_counted_in_the_legend():
    labels = np.arange(900).reshape(30, 30) % 40
    labels[:, :2] = 39
    texts = legend_texts(draw_chip(ChipLayers(labels=labels)))
    assert len(texts) == 25
    assert texts[-1] == "and 16 more"
    assert "class 39" in texts


def test_two_classes_of_one_name_stay_two():
    figure = draw_chip(ChipLayers(labels=_quarters(0, 1, 1, 1)), ChipStyle(classes=["crop", "crop"]))
    assert legend_texts(figure) == ["crop (0)", "crop (1)"]


def test_on_axes_of_ones_own():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    layers = ChipLayers(image=np.zeros((1, 20, 20)), labels=_quarters(0, 1, 1, 1))
    assert draw_chip(layers, axes=(left, right), title="mine") is figure
    assert left.get_title() == "mine"
    assert legend_texts(figure) == ["class 0", "class 1"]
    part = Figure().subfigures(1, 2)[0]
    assert draw_chip(ChipLayers(labels=_quarters(0, 1, 1, 1)), axes=part.subplots()) is part.figure
    with pytest.raises(UsageError, match="axes must be 2 axes, one per panel, got 1"):
        draw_chip(layers, axes=left)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (ChipLayers(valid=np.ones((4, 4), bool)), "nothing to draw"),
        (ChipLayers(image=np.zeros((1, 4, 4)), labels=np.zeros((4, 5))), "image 4 x 4, labels 4 x 5"),
        (ChipLayers(image=np.zeros((2, 4, 4))), "must have 1 band .grey. or 3"),
    ],
)
def test_what_cannot_be_drawn_says_why(layers, words):
    with pytest.raises(UsageError, match=words):
        draw_chip(layers)


def test_figures_go_when_forgotten_pickle_and_show_in_a_notebook():
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    figures = [draw_chip(ChipLayers(image=np.zeros((1, 4, 4)))) for _ in range(25)]  # 20 are enough for a warning
    assert plt.get_fignums() == before
    assert figures[0]._repr_png_().startswith(b"\x89PNG")
    assert len(pickle.loads(pickle.dumps(figures[0])).axes) == 1
    gone = weakref.ref(figures[-1])
    figures.clear()
    gc.collect()
    assert gone() is None


def test_drawing_leaves_matplotlibs_settings_alone():
    before = dict(matplotlib.rcParams)
    rendered(draw_chip(ChipLayers(image=np.zeros((1, 4, 4)), valid=np.zeros((4, 4), bool))))
    assert dict(matplotlib.rcParams) == before


def test_the_rooms_door_and_the_collection_load_no_matplotlib():
    code = "import sys, rasteret_ml, rasteret_ml.plotting, rasteret_ml.collection.collection\n"
    subprocess.run([sys.executable, "-c", code + "assert 'matplotlib' not in sys.modules"], check=True, timeout=120)


@pytest.mark.parametrize(
    ("true", "of", "text"), [(0, 9, "0 %"), (9, 9, "100 %"), (1, 1000, "<1 %"), (999, 1000, ">99 %"), (3, 8, "38 %")]
)
def test_shares_round_to_all_or_nothing_only_where_it_is_so(true, of, text):
    assert validity_text(ChipLayers(valid=np.arange(of) < true)) == f"{text} valid"
