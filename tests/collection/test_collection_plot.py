"""A Collection on the map."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely
from affine import Affine
from matplotlib.figure import Figure
from picture_oracle import artists, legend_texts, rendered

from rasteret_ml.collection.build.build import build
from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.colours import palette_colour
from rasteret_ml.testing import make_cog


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Four scenes a degree apart, with split, date and clouds."""
    folder: Path = tmp_path_factory.mktemp("four")
    at = Affine(10, 0, 500000, 0, -10, 5000000)
    hrefs = [make_cog(folder / f"{i}.tif", np.ones((1, 16, 16), np.uint8), transform=at) for i in range(4)]
    columns = {
        "id": list("abcd"),
        "datetime": [dt.datetime(2024, 1, 1), dt.datetime(2024, 2, 1), None, dt.datetime(2024, 2, 1, 5)],
        "eo:cloud_cover": [0.0, 50.0, None, 100.0],
        "split": ["train", "val", "train", None],
        "B1": hrefs,
    }
    shapes = [shapely.box(10 + i, 40, 10.5 + i, 40.5) for i in range(4)]
    return build(gpd.GeoDataFrame(columns, geometry=shapes, crs=4326), folder / "four.parquet", bands=["B1"])


def _paths(figure, gid="footprints"):
    (collection,) = artists(figure.axes[0], gid)
    return [shapely.Polygon(path.vertices) for path in collection.get_paths()]


def test_the_footprints_are_the_records_geometries(four):
    figure = four.plot()
    expected = shapely.from_wkb(four.to_table(["geometry"])["geometry"].to_numpy())
    assert all(a.equals(b) for a, b in zip(_paths(figure), expected, strict=True))
    assert figure.axes[0].get_title() == "4 records"
    rendered(figure)


def test_a_view_draws_its_own_records(four):
    figure = four.subset(split="train").plot(color="split")
    assert len(_paths(figure)) == 2
    assert legend_texts(figure) == ["train (2)"]


@pytest.mark.parametrize(
    ("color", "texts"),
    [
        ("split", ["train (2)", "val (1)", "none (1)"]),
        ("datetime", ["2024-01-01 (1)", "2024-02-01 (2)", "none (1)"]),
        ("eo:cloud_cover", ["none (1)"]),
        ("id", ["a (1)", "b (1)", "c (1)", "d (1)"]),
    ],
)
def test_colours_by_a_column(four, color, texts):
    figure = four.plot(color=color)
    assert legend_texts(figure) == texts
    assert len(figure.axes) == (2 if color == "eo:cloud_cover" else 1)


def test_aois_in_any_crs_with_their_own_split(four):
    areas = gpd.GeoDataFrame(
        {"split": ["val", "test"], "fold": [1, 2]},
        geometry=[shapely.box(10.1, 40.1, 10.4, 40.4), shapely.Point(11.2, 40.2).buffer(0.1)],
        crs=4326,
    )
    figure = four.plot(aois=areas.to_crs(32632), color="split")
    assert legend_texts(figure) == ["test (1)", "train (2)", "val (2)", "none (1)"]
    for drawn, area in zip(_paths(figure, "AOIs"), areas.geometry, strict=True):
        assert drawn.symmetric_difference(area).area < 1e-3 * area.area
    np.testing.assert_allclose(artists(figure.axes[0], "AOIs")[0].get_edgecolors()[0], palette_colour(2))
    assert figure.axes[0].get_title() == "4 records, 2 AOIs"
    figure = four.plot(aois=areas, color="fold")  # a column of the AOIs only
    assert "footprints" in legend_texts(figure)
    assert legend_texts(four.plot(aois=shapely.box(10, 40, 11, 41))) == ["footprints", "AOIs"]


def test_records_without_a_geometry_are_counted(four):
    table = four.to_table()
    shapes = table["geometry"].to_pylist()
    shapes[1] = None
    at = table.schema.get_field_index("geometry")
    field = table.schema.field("geometry").with_nullable(True)
    gappy = Collection(table.set_column(at, field, pa.array(shapes, field.type)))
    figure = gappy.plot(color="split")
    assert figure.axes[0].get_title() == "4 records, 1 without a geometry"
    assert len(_paths(figure)) == 3


def test_a_dictionary_column_keeps_its_nulls(four):
    table = four.to_table()
    folds = pa.chunked_array([pa.array(["a", "b", None, "a"]).dictionary_encode()])
    figure = Collection(table.append_column("fold", folds)).plot(color="fold")
    assert legend_texts(figure) == ["a (2)", "b (1)", "none (1)"]


def test_given_axes_and_errors(four):
    figure = Figure()
    assert four.plot(ax=figure.subplots()) is figure
    with pytest.raises(UsageError, match="color= needs a column 'fold'"):
        four.plot(color="fold")
    with pytest.raises(UsageError, match="'assets' must hold"):
        four.plot(color="assets")
