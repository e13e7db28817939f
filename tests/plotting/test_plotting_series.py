"""A strip of dates: their names, one stretch, padding that says so."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from picture_oracle import artists, colour_at, legend_texts

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.chips import ChipLayers, ChipStyle, date_texts, draw_chips

_DAY = 86400.0
_NEW_YEAR = 1704067200.0  # 2024-01-01T00:00:00Z
_ALL = ChipStyle(percentiles=(0, 100))


def draw_series(chips, times, **options):
    return draw_chips(chips, times=times, **options)


def _chip(value, **masks):
    return ChipLayers(image=np.full((1, 10, 10), value, np.uint16), **masks)


def test_a_panel_for_each_date_with_its_shares():
    half = np.zeros((10, 10), bool)
    half[:5] = True
    quarter = half & half.T
    chips = [_chip(1, valid=half, clear=quarter), _chip(2, valid=~quarter, clear=np.ones((10, 10), bool))]
    figure = draw_series(chips, [_NEW_YEAR, _NEW_YEAR + _DAY - 1e-3], title="here")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["2024-01-01 00:00\n50 % valid, 25 % clear", "2024-01-01 23:59\n75 % valid, 75 % clear"]
    assert figure.get_suptitle() == "here"
    assert legend_texts(figure) == ["not valid", "not clear"]
    assert [len(artists(ax, "not clear")) for ax in figure.axes] == [1, 0]


def test_dates_are_utc_and_nan_is_undated():
    assert date_texts([_NEW_YEAR, _NEW_YEAR + 40 * _DAY, math.nan, -_DAY]) == [
        "2024-01-01", "2024-02-10", "undated", "1969-12-31",
    ]  # fmt: skip


def test_dates_share_one_stretch():
    figure = draw_series([_chip(100), _chip(150), _chip(200)], [0, _DAY, 2 * _DAY], style=_ALL)
    assert [colour_at(figure, ax, 5, 5)[0] for ax in figure.axes] == [0, pytest.approx(127, abs=1), 255]


def test_clouds_of_one_date_do_not_darken_the_others():
    every, none = np.ones((10, 10), bool), np.zeros((10, 10), bool)
    chips = [_chip(100, clear=every), _chip(9000, clear=none), _chip(200, clear=every)]
    figure = draw_series(chips, [0, _DAY, 2 * _DAY], style=_ALL)
    assert colour_at(figure, figure.axes[2], 5, 5) == (255, 255, 255)
    overcast = draw_series([_chip(100, clear=none), _chip(200, clear=none)], [0, _DAY], style=_ALL)
    low, high = (overcast.axes[i].images[0].get_array()[0, 0, 0] for i in (0, 1))
    assert (low, high) == (0, 1)


def test_padding_is_an_empty_panel_without_a_say():
    every = np.ones((10, 10), bool)
    chips = [_chip(100, valid=every), _chip(200, valid=every), _chip(0, valid=~every)]
    figure = draw_series(chips, [0, _DAY, math.nan], time_valid=[True, True, False], style=_ALL)
    padded = figure.axes[2]
    assert [text.get_text() for text in padded.texts] == ["padding"]
    assert padded.get_title() == "no date"
    assert list(padded.patches) == []
    assert colour_at(figure, figure.axes[0], 5, 5) == (0, 0, 0)
    assert legend_texts(figure) == []


def test_only_padding_can_be_drawn():
    figure = draw_series([_chip(0)], [math.nan], time_valid=[False])
    assert figure.axes[0].get_title() == "no date"


def test_labels_follow_the_dates_and_rows_wrap():
    chip = _chip(1, labels=np.zeros((10, 10), int), prediction=np.ones((10, 10), int))
    figure = draw_series([chip] * 5, [i * _DAY for i in range(5)], columns=4)
    assert [ax.get_title() for ax in figure.axes][5:] == ["labels", "prediction"]
    assert len(figure.axes) == 7
    assert legend_texts(figure) == ["class 0", "class 1"]
    colour_at(figure, figure.axes[0], 0, 0)
    assert len({round(ax.get_position().y0, 2) for ax in figure.axes}) == 2


def test_on_axes_of_ones_own():
    figure = Figure()
    axes = figure.subplots(2, 1)
    assert draw_series([_chip(1), _chip(2)], [0, _DAY], axes=axes) is figure
    assert axes[1].get_title() == "1970-01-02"


@pytest.mark.parametrize(("chips", "times", "time_valid"), [(0, 0, None), (2, 1, None), (2, 2, [True])])
def test_lengths_that_differ_are_refused(chips, times, time_valid):
    with pytest.raises(UsageError, match="one time and one time_valid per chip"):
        draw_series([_chip(1)] * chips, [0.0] * times, time_valid=time_valid)
