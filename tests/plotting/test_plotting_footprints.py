"""Footprints on a map: one collection, colours by a column, counts, aspect."""

from __future__ import annotations

import datetime as dt
import math

import numpy as np
import pandas as pd
import pytest
import shapely
from matplotlib import colormaps
from matplotlib.figure import Figure
from picture_oracle import artists, colour_at, legend_texts, panel, rendered

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.colours import column_scale, palette_colour
from rasteret_ml.plotting.footprints import draw_footprints


def _boxes(count, lat=0.0):
    return np.array([shapely.box(2 * i, lat, 2 * i + 1, lat + 1) for i in range(count)], object)


def _texts(*values):
    return np.array(values, object)


def _edges(figure, gid="footprints"):
    (collection,) = artists(figure.axes[0], gid)
    return collection.get_edgecolors()


def test_many_footprints_are_one_collection():
    x, y = np.meshgrid(np.arange(100.0), np.arange(100.0) / 2)
    figure = draw_footprints(shapely.box(x.ravel(), y.ravel(), x.ravel() + 0.9, y.ravel() + 0.4))
    (collection,) = artists(figure.axes[0], "footprints")
    assert len(collection.get_paths()) == 10_000
    assert figure.axes[0].get_title() == "10,000 records"
    rendered(figure)


def test_holes_are_open():
    shape = shapely.box(0, 0, 10, 10) - shapely.box(3, 3, 7, 7)
    figure = draw_footprints(np.array([shape], object))
    inside, hole, outside = (colour_at(figure, figure.axes[0], v, v) for v in (1.3, 4.7, -0.3))
    assert hole == outside == (255, 255, 255)
    assert inside != outside


def test_records_without_a_geometry_are_counted():
    shapes = np.array([None, shapely.Polygon(), *_boxes(3)], object)
    figure = draw_footprints(shapes, aois=np.array([shapely.box(0, 0, 1, 1)], object))
    assert figure.axes[0].get_title() == "5 records, 2 without a geometry, 1 AOI"
    assert len(artists(figure.axes[0], "footprints")[0].get_paths()) == 3


def test_no_records_at_all():
    figure = draw_footprints(np.empty(0, object), values=np.empty(0, object), name="split")
    assert figure.axes[0].get_title() == "0 records"
    rendered(figure)


def test_a_split_is_a_legend_with_counts_and_the_missing_are_grey():
    figure = draw_footprints(_boxes(5), values=_texts("val", "train", "train", None, "val"), name="split")
    assert legend_texts(figure) == ["train (2)", "val (2)", "none (1)"]
    train, val = palette_colour(0), palette_colour(1)
    np.testing.assert_allclose(_edges(figure)[[0, 1, 2, 4]], [val, train, train, val])
    assert len(set(_edges(figure)[3][:3])) == 1


def test_colours_follow_their_record_past_a_missing_geometry():
    shapes = _boxes(3)
    shapes[0] = None
    figure = draw_footprints(shapes, values=_texts("a", "b", "a"), name="x")
    np.testing.assert_allclose(_edges(figure), [palette_colour(1), palette_colour(0)])


def test_a_few_days_are_named_and_many_are_a_bar_with_dates():
    days = np.array(["2024-01-05T10", "2024-01-01T09", "2024-01-05T11", "NaT"], "datetime64[us]")
    figure = draw_footprints(_boxes(4), values=days, name="datetime")
    assert legend_texts(figure) == ["2024-01-01 (1)", "2024-01-05 (2)", "none (1)"]
    ends = colormaps["viridis"]([0.0, 1.0])
    np.testing.assert_allclose(_edges(figure)[:3], ends[[1, 0, 1]])
    many = np.datetime64("2024-01-01", "us") + np.arange(30) * np.timedelta64(10, "D")
    figure = draw_footprints(_boxes(30), values=many, name="datetime")
    rendered(figure)
    bar = figure.axes[1]
    assert bar.get_ylabel() == "datetime"
    ticks = [text.get_text() for text in bar.get_yticklabels()]
    assert ticks
    assert all(dt.date.fromisoformat(text).year == 2024 for text in ticks)
    np.testing.assert_allclose(_edges(figure)[[0, -1]], ends)


def test_numbers_are_a_bar_and_unknown_ones_grey():
    figure = draw_footprints(_boxes(3), values=np.array([0.0, np.nan, 80.0]), name="eo:cloud_cover")
    np.testing.assert_allclose(_edges(figure)[[0, 2]], colormaps["viridis"]([0.0, 1.0]))
    assert legend_texts(figure) == ["none (1)"]
    assert figure.axes[1].get_ylabel() == "eo:cloud_cover"


def test_a_few_whole_numbers_are_categories():
    figure = draw_footprints(_boxes(3), values=np.array([26918, 26917, 26918], np.int32), name="proj:epsg")
    assert legend_texts(figure) == ["26917 (1)", "26918 (2)"]
    assert len(figure.axes) == 1
    assert len(draw_footprints(_boxes(9), values=np.arange(9), name="fold").axes) == 2


def test_an_outline_in_a_pale_colour_has_a_dark_rim():
    area = np.array([shapely.box(0, 0, 10, 10)], object)
    figure = draw_footprints(np.empty(0, object), aois=area)
    ax = figure.axes[0]
    ax.grid(False)
    across = panel(figure, ax)
    across = across[len(across) // 2, : across.shape[1] // 4].astype(int)  # white, the western outline, white
    line = np.flatnonzero(across.min(axis=1) < 250)
    middle = across[line[len(line) // 2]]
    np.testing.assert_allclose(middle, (191, 26, 89), atol=20)
    red_over_green = across[line[[0, -1]], 0] - across[line[[0, -1]], 1]
    assert (red_over_green < 40).all()  # grey on both sides of it
    assert (line == np.arange(line[0], line[-1] + 1)).all()


@pytest.mark.parametrize(("width", "height"), [(4, 1), (1, 1), (1, 4), (100, 1), (1, 100)])
def test_a_new_figure_is_as_wide_and_high_as_its_map(width, height):
    figure = draw_footprints(np.array([shapely.box(0, 0, width, height)], object))
    inches = figure.get_size_inches()
    assert (inches > 2.9).all()
    assert (inches < 8).all()
    across, up = inches - (2.0, 0.8)
    assert (across > up) == (width > height) or width == height


def test_records_and_aois_are_on_one_scale():
    areas = np.array([shapely.box(0, 0, 3, 3), shapely.Point(4, 0.5), shapely.LineString([(0, 0), (5, 1)])], object)
    figure = draw_footprints(
        _boxes(2),
        values=_texts("train", "val"),
        aois=areas,
        aoi_values=_texts("val", "test", "train"),
        name="split",
    )
    assert legend_texts(figure) == ["test (1)", "train (2)", "val (2)"]
    drawn = artists(figure.axes[0], "AOIs")
    assert len(drawn) == 3  # areas, lines, points
    np.testing.assert_allclose(drawn[0].get_edgecolors(), [palette_colour(2)])
    assert drawn[0].get_facecolors()[0, 3] == 0
    rendered(figure)


def test_aois_without_values_have_their_own_key():
    areas = np.array([shapely.box(0, 0, 3, 3)], object)
    assert legend_texts(draw_footprints(_boxes(2), aois=areas)) == ["footprints", "AOIs"]
    figure = draw_footprints(_boxes(2), aois=areas, aoi_values=_texts("train"), name="split")
    assert legend_texts(figure) == ["train (1)", "footprints"]


@pytest.mark.parametrize("lat", [0.0, 45.0, 60.0, -60.0])
def test_a_kilometre_is_as_long_both_ways(lat):
    figure = draw_footprints(_boxes(3, lat))
    rendered(figure)
    ax = figure.axes[0]
    east = ax.transData.transform((1, lat)) - ax.transData.transform((0, lat))
    north = ax.transData.transform((0, lat + 1)) - ax.transData.transform((0, lat))
    assert north[1] > 0
    assert east[0] / north[1] == pytest.approx(math.cos(math.radians(lat + 0.5)), rel=1e-3)


def test_ticks_say_east_and_west():
    shapes = np.array([shapely.box(-1, -1, 1, 1)], object)
    figure = draw_footprints(shapes)
    rendered(figure)
    texts = {text.get_text() for text in figure.axes[0].get_xticklabels()}
    assert {"0°", "1°E", "1°W"} <= texts


def test_on_axes_of_ones_own():
    figure = Figure()
    ax = figure.subplots()
    assert draw_footprints(_boxes(2), ax=ax) is figure
    assert ax.get_title() == "2 records"


def test_values_that_do_not_match_are_refused():
    with pytest.raises(UsageError, match="one entry per geometry, got 3 for 2"):
        draw_footprints(_boxes(2), values=np.zeros(3))


def test_scales_of_what_tables_hold():
    stamps = pd.Series(pd.to_datetime(["2024-01-01T23:30-05:00", "2024-01-03T00:00+00:00", None], utc=True))
    assert list(column_scale([stamps.to_numpy()], "t").legend) == ["2024-01-02 (1)", "2024-01-03 (1)", "none (1)"]
    dates = _texts(dt.date(2024, 5, 1), None, dt.datetime(2024, 5, 2, 1))
    assert list(column_scale([dates], "t").legend) == ["2024-05-01 (1)", "2024-05-02 (1)", "none (1)"]
    numbers = pd.Series([3, None, 5], dtype="Int64").to_numpy(dtype=object)
    scale = column_scale([numbers, np.array([7], np.uint8)], "n")
    np.testing.assert_allclose(scale.colours[[0, 3]], colormaps["viridis"]([0.0, 1.0]))
    assert list(scale.legend) == ["none (1)"]
    assert list(column_scale([np.array([True, False, True])], "b").legend) == ["False (1)", "True (2)"]
    assert list(column_scale([np.array([np.nan, "x"], object)], "b").legend) == ["x (1)", "none (1)"]
    whole = column_scale([np.array([4, 4], np.int64)], "n")
    assert list(whole.legend) == ["4 (2)"]
    one = column_scale([np.array([4.0, 4.0])], "n")
    assert one.bar is not None
    assert one.bar.get_clim() == (4.0, 5.0)


def test_columns_that_cannot_be_coloured():
    with pytest.raises(UsageError, match="'id' has 30 different texts"):
        column_scale([_texts(*(f"r{i}" for i in range(30)))], "id")
    with pytest.raises(UsageError, match=r"'assets' must hold .* got dict"):
        column_scale([_texts({"a": 1}, None)], "assets")
    with pytest.raises(UsageError, match=r"'when' must hold .* got Timestamp and str"):
        column_scale([np.array(["2024-01-01"], "datetime64[D]"), _texts("x")], "when")
