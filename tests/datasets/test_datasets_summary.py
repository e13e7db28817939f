"""`repr` and `_repr_html_` of datasets: what is in them and on which pixels, without a read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from torchgeo.datasets import RasterDataset

import rasteret_ml as rm
from rasteret_ml.testing import make_cog


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> rm.Collection:
    """Two days of two bands; the files are gone, so that nothing can be read."""
    folder = tmp_path_factory.mktemp("scenes")
    for day in (1, 5):
        make_cog(folder / f"s_2023050{day}.tif", np.ones((2, 32, 32), np.uint16), nodata=0)
    found = rm.build(str(folder / "*.tif"), folder / "scenes.parquet")
    for path in folder.glob("*.tif"):
        path.unlink()
    return found


@pytest.fixture(scope="module")
def polygons() -> gpd.GeoDataFrame:
    """Two fields of two classes, one of them with markup and a secret in its name."""
    crops = ["<b>oats</b>", "https://host/rye?token=SECRET"]
    shapes = [shapely.box(500000, 4999900, 500100, 5000000), shapely.box(500100, 4999900, 500200, 5000000)]
    return gpd.GeoDataFrame({"crop": crops}, geometry=shapes, crs="EPSG:32633")


def rows(dataset: object) -> dict[str, ElementTree.Element]:
    """Cells of the outermost table, by heading."""
    table = ElementTree.fromstring(dataset._repr_html_()).find("table")
    assert table is not None
    return {str(row.findtext("th")): row.find("td") for row in table.findall("tr")}


def texts(dataset: object) -> dict[str, str | None]:
    """Texts of the outermost table, by heading."""
    return {name: cell.text for name, cell in rows(dataset).items()}


def test_images(scenes):
    """Records, bands, type, grid, time and what samples hold."""
    dataset = rm.RasteretDataset(scenes, ["B1", "B2"], sample={"mask_aoi": True})
    assert repr(dataset) == "RasteretDataset(2 records, bands=[B1, B2], uint16, [EPSG:32633, 10 x 10 per pixel])"
    assert texts(dataset) == {
        "Records": "2",
        "Bands": "B1, B2",
        "Stored as": "uint16",
        "Grid": "EPSG:32633, 10 x 10 per pixel",
        "Time": "2023-05-01 00:00 to 2023-05-05 00:00 UTC",
        "Samples": "image [2, H, W] uint16, mask_aoi, mask_valid, record, time, transform",
    }
    assert str(dataset).startswith("RasteretDataset Dataset")  # TorchGeo's own


def test_series_native_grids_and_labels(scenes):
    """An axis T, the index's CRS of native grids, and int64 classes."""
    series = texts(rm.RasteretDataset(scenes, ["B1"], series=3, grid="native"))
    assert series["Grid"] == "native (index in EPSG:32633)"
    assert (
        series["Samples"] == "image [T, 1, H, W] uint16, epsg, length, mask_valid, record, time, time_valid, transform"
    )
    labels = texts(rm.RasteretDataset(scenes, ["B1"], is_image=False))
    assert labels["Samples"] == "mask [H, W] int64, mask_valid, record, time, transform"


def test_polygons_escape_text_and_hide_secrets(polygons):
    """Class names come from the user's table."""
    dataset = rm.PolygonDataset(polygons, "crop", res=10)
    found = texts(dataset)
    assert (found["Polygons"], found["Time"]) == ("2", "2 undated")
    assert found["Grid"] == "EPSG:32633, 10 x 10 per pixel"
    assert found["Classes"].startswith("0 = <b>oats</b>, 1 = https://host/rye")
    assert "<b>" not in dataset._repr_html_()
    for text in (repr(dataset), dataset._repr_html_()):
        assert "SECRET" not in text
    values = rm.PolygonDataset(polygons.assign(yields=[1.0, 2.0]), "yields", continuous=True)
    assert texts(values)["Samples"] == "mask [H, W] float32, mask_valid, transform"
    assert repr(values) == "PolygonDataset(2 polygons, values, [EPSG:32633, no pixels of its own])"


@pytest.mark.parametrize(
    ("sown", "harvest", "shown"),
    [
        (["2023-04-01", "2023-05-01"], ["2023-08-31", "2023-09-30"], "2023-04-01 00:00 to 2023-09-30 23:59 UTC"),
        (["2023-04-01", None], ["2023-08-31", None], "2023-04-01 00:00 to 2023-08-31 23:59 UTC, 1 undated"),
        (["2023-04-01", "2023-05-01"], [None, None], "2023-04-01 00:00 to .. UTC"),
    ],
)
def test_open_times(polygons, sown, harvest, shown):
    """Windows may be open at one end or at both."""
    table = polygons.assign(sown=pd.array(sown, "string"), harvest=pd.array(harvest, "string"))
    assert texts(rm.PolygonDataset(table, time=("sown", "harvest")))["Time"] == shown


def test_combinations_show_both_sides(scenes, polygons, tmp_path: Path):
    """A table inside the table for ours, the class of a stock dataset."""
    images = rm.RasteretDataset(scenes, ["B1"])
    both = images & rm.PolygonDataset(polygons, "crop")
    assert repr(both).startswith("(RasteretDataset(2 records, bands=[B1], ")
    assert ") & PolygonDataset(2 polygons, " in repr(both)
    found = rows(both)
    assert found["Left"].find("div/strong").text == "RasteretDataset"
    assert found["Right"].find("div/strong").text == "PolygonDataset"
    make_cog(tmp_path / "a.tif", np.ones((1, 32, 32), np.uint16))
    either = images | RasterDataset(str(tmp_path))
    assert repr(either).endswith(" | RasterDataset)")
    assert texts(either)["Right"] == "RasterDataset"
