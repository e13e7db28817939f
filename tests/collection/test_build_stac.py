"""Collections from STAC: mappings, pystac objects, item collections, JSON files."""

from __future__ import annotations

import copy
import datetime as dt
import json
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from pixel_oracle import assert_chip, rasters, run, window_by_rasterio

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import DataError, UnknownBandError, UsageError
from rasteret_ml.testing import RangeServer, make_cog

_BANDS = ["B02", "B03", "B04", "B08", "SCL"]


def _paths(shared_data: Path) -> list[Path]:
    return sorted((shared_data / "multidate").glob("*/*.json"))


def _item(folder: Path, name: str = "item", **properties: Any) -> dict[str, Any]:
    """A small item with absolute hrefs: red, nir, a thumbnail and a document."""
    assets: dict[str, Any] = {}
    for i, key in enumerate(("red", "nir")):
        path = make_cog(folder / name / f"{key}.tif", np.full((1, 16, 16), 5 * i + 5, np.uint16))
        assets[key] = {"href": path, "type": "image/tiff; application=geotiff", "roles": ["data"]}
    assets["thumbnail"] = {"href": "t.tif", "type": "image/tiff", "roles": ["thumbnail"]}
    assets["metadata"] = {"href": "m.xml", "type": "application/xml"}
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "sentinel-2-l2a", "links": [],
        "bbox": [15.0, 45.0, 15.1, 45.1],
        "geometry": shapely.geometry.mapping(shapely.box(15, 45, 15.1, 45.1)),
        "properties": {"datetime": "2024-05-06T07:08:09Z", "eo:cloud_cover": 4, "tags": ["a"]} | properties,
        "assets": assets,
    }  # fmt: skip


def _sources(paths: list[Path]) -> dict[str, Any]:
    """The multidate items in every form that `build` accepts."""
    absolute = []
    for path in paths:
        item = json.loads(path.read_text())
        for asset in item["assets"].values():
            asset["href"] = str(path.parent / asset["href"])
        absolute.append(item)
    objects = [pystac.Item.from_file(str(path)) for path in paths]
    return {
        "JSON paths": [str(path) for path in paths],
        "Paths": paths,
        "glob": f"{paths[0].parent.parent}/*/*.json",
        "mappings": absolute,
        "FeatureCollection": {"type": "FeatureCollection", "features": absolute},
        "pystac items with relative hrefs": objects,
        "ItemCollection": pystac.ItemCollection([pystac.Item.from_dict(item) for item in absolute]),
        "mixed": [absolute[0], objects[1], *[str(path) for path in paths[2:]]],
    }


@pytest.mark.parametrize(
    "kind",
    [
        "JSON paths",
        "Paths",
        "glob",
        "mappings",
        "FeatureCollection",
        "pystac items with relative hrefs",
        "ItemCollection",
        "mixed",
    ],
)
def test_every_form_gives_the_same_collection(shared_data: Path, tmp_path: Path, kind: str) -> None:
    """All ten multidate items, both tiles, five bands by their codes through the registry, SCL among them."""
    paths = _paths(shared_data)
    assert len(paths) == 10
    collection = build(_sources(paths)[kind], tmp_path / "c.parquet", bands=_BANDS, strict=True)
    assert collection.bands == _BANDS
    assert collection.crs == ["EPSG:32633"]
    assert collection.data_source == "sentinel-2-l2a"
    records = {record.id: record for record in rasters(collection)}
    assert sorted(records) == sorted(path.stem for path in paths)
    for path in (paths[0], paths[-1]):
        record, item = records[path.stem], json.loads(path.read_text())
        assert record.available_bands == _BANDS
        assert record.cloud_cover == item["properties"]["eo:cloud_cover"]
        assert record.collection == "sentinel-2-l2a"
        when = dt.datetime.fromisoformat(item["properties"]["datetime"])
        assert record.datetime == when.astimezone(dt.UTC).replace(tzinfo=None)
        assert shapely.from_wkb(record.footprint).equals(shapely.geometry.shape(item["geometry"]))
        for band in ("B04", "SCL"):
            chip = run(record.read_window((200, 200, 30, 40), [band]))
            assert_chip(chip, *window_by_rasterio(path.parent / f"{band}.tif", (200, 200, 30, 40)))


def test_the_two_tiles_keep_their_own_grids(shared_data: Path, tmp_path: Path) -> None:
    """Each record has the grid of its file, although the neighbour's is half a pixel off."""
    paths = _paths(shared_data)
    for path, record in zip(paths, rasters(build(paths, tmp_path / "c.parquet")), strict=True):
        with rasterio.open(path.parent / "B08.tif") as source:
            assert record.grid("B08").transform == record.grid("nir").transform == source.transform


def test_without_bands_every_tiff_that_is_not_a_preview(tmp_path: Path) -> None:
    """Bands have the keys of their assets; thumbnails and documents are not bands; codes still resolve."""
    collection = build(_item(tmp_path), tmp_path / "c.parquet")
    assert collection.bands == ["red", "nir"]
    assert collection.report.failures == ()  # type: ignore[attr-defined]
    (record,) = rasters(collection)
    assert int(run(record.read_window((0, 0, 1, 1), ["B08"])).data[0, 0, 0]) == 10


def test_properties_become_columns(tmp_path: Path) -> None:
    """Scalars do, lists do not; a property with two types becomes text."""
    items = [_item(tmp_path, "a", platform="x", odd=1), _item(tmp_path, "b", odd="one")]
    table = build(items, tmp_path / "c.parquet").to_table()
    assert table["platform"].to_pylist() == ["x", None]
    assert table["odd"].to_pylist() == ["1", "one"]
    assert "tags" not in table.column_names
    assert table["eo:cloud_cover"].to_pylist() == [4, 4]


def test_dates_of_items(tmp_path: Path) -> None:
    """A null datetime falls back to start_datetime; zones are honoured; without either the record is undated."""
    items = [
        _item(tmp_path, "span", datetime=None, start_datetime="2024-01-01T02:00:00+02:00"),
        _item(tmp_path, "none", datetime=None),
    ]
    first, second = rasters(build(items, tmp_path / "c.parquet"))
    assert first.datetime == dt.datetime(2024, 1, 1)
    assert second.datetime is None


def test_raster_fields_of_the_item(tmp_path: Path) -> None:
    """Scale and offset of `raster:bands` beat the file's; nodata is used if the file declares none."""
    item = _item(tmp_path)
    item["assets"]["red"]["raster:bands"] = [{"scale": 0.5, "offset": -1.0, "nodata": 5}]
    (record,) = rasters(build(item, tmp_path / "c.parquet"))
    red, nir = record.source("red").metadata, record.source("nir").metadata
    assert (red.scale, red.offset, red.nodata) == (0.5, -1.0, 5)
    assert (nir.scale, nir.offset, nir.nodata) == (None, None, None)
    assert not bool(run(record.read_window((0, 0, 4, 4), ["red"])).valid.any())


def test_the_items_crs_is_used_where_the_file_has_none(tmp_path: Path) -> None:
    """`proj:epsg` or `proj:code`; the CRS of the file beats it."""
    for key, value in [("proj:epsg", 32631), ("proj:code", "EPSG:32631")]:
        item = _item(tmp_path, key.replace(":", "_"), **{key: value})
        (record,) = rasters(build(item, tmp_path / "c.parquet"))
        assert record.crs == 32633
        bare = make_cog(tmp_path / "bare.tif", np.ones((1, 16, 16), np.uint16), crs=None)
        item["assets"] = {"red": {"href": bare, "type": "image/tiff"}}
        (record,) = rasters(build(item, tmp_path / "c.parquet"))
        assert record.crs == 32631


def test_relative_hrefs_start_at_the_self_link(server: RangeServer, tmp_path: Path) -> None:
    """As in items from an API."""
    item = _item(tmp_path)
    for key in ("red", "nir"):
        item["assets"][key]["href"] = f"./{key}.tif"
    item["links"] = [{"rel": "self", "href": f"{server.url}/item/item.json"}]
    (record,) = rasters(build(item, tmp_path / "c.parquet"))
    assert record.assets["red"]["href"] == f"{server.url}/item/red.tif"


def test_alternate_hrefs(tmp_path: Path) -> None:
    """An asset whose only href is an alternate."""
    item = _item(tmp_path)
    red = item["assets"]["red"]
    red["alternate"] = {"s3": {"href": "s3://bucket/red.tif"}, "https": {"href": red["href"]}}
    red["href"] = None
    (record,) = rasters(build(item, tmp_path / "c.parquet", bands=["red"]))
    assert int(run(record.read_window((0, 0, 1, 1), ["red"])).data[0, 0, 0]) == 5


def test_an_asset_that_is_a_plain_href(tmp_path: Path) -> None:
    item = _item(tmp_path)
    item["assets"]["red"] = item["assets"]["red"]["href"]
    assert build(item, tmp_path / "c.parquet").bands == ["red", "nir"]


def test_data_source_overrides_the_collection(tmp_path: Path) -> None:
    """`data_source=` overrides the item's collection: Landsat's B5 is nir08, Sentinel's is not a band."""
    item = _item(tmp_path)
    item["assets"]["nir08"] = item["assets"].pop("nir")
    collection = build(item, tmp_path / "c.parquet", bands=["B5"], data_source="landsat-c2-l2")
    assert collection.data_source == "landsat-c2-l2"
    assert rasters(collection)[0].assets["B5"]["href"].endswith("nir.tif")


def test_a_band_that_every_item_lacks(tmp_path: Path) -> None:
    """The error names an item and its assets."""
    with pytest.raises(UnknownBandError, match=r"'B99'.*item item .*red, nir"):
        build(_item(tmp_path), tmp_path / "c.parquet", bands=["B99"])


def test_a_band_that_one_item_lacks_does_not_stop_the_others(tmp_path: Path) -> None:
    """It is reported, and the rest is built; `strict=True` raises."""
    items = [_item(tmp_path, "whole"), _item(tmp_path, "lacking")]
    del items[1]["assets"]["nir"]
    collection = build(items, tmp_path / "c.parquet", bands=["B04", "B08"])
    assert [record.available_bands for record in rasters(collection)] == [["B04", "B08"], ["B04"]]
    assert "lacking" in str(collection.report)
    with pytest.raises((DataError, UsageError), match="lacking"):
        build(items, tmp_path / "c.parquet", bands=["B04", "B08"], strict=True)


def test_an_asset_without_an_href_names_its_item(tmp_path: Path) -> None:
    """In the report or the error."""
    items = [_item(tmp_path, "whole"), _item(tmp_path, "hollow")]
    items[1]["assets"]["nir"]["href"] = None
    try:
        message = str(build(items, tmp_path / "c.parquet").report)
    except DataError as error:
        message = str(error)
    assert "hollow" in message
    assert "nir" in message


def test_a_mapping_of_bands_is_not_ignored_for_items(tmp_path: Path) -> None:
    """`bands={"B04": "nir"}` is an error or selects nir, but never means `["B04"]` (which is red)."""
    try:
        collection = build(_item(tmp_path), tmp_path / "c.parquet", bands={"B04": "nir"})
    except UsageError:
        return
    (record,) = rasters(collection)
    assert record.assets["B04"]["href"].endswith("nir.tif")


def test_an_asset_of_several_bands(tmp_path: Path) -> None:
    """NAIP's one `image` asset of four bands is built, or an error has a remedy that exists for STAC items."""
    item = _item(tmp_path)
    path = make_cog(tmp_path / "naip.tif", np.stack([np.full((16, 16), i, np.uint8) for i in range(4)]))
    names = [{"name": n} for n in ("Red", "Green", "Blue", "NIR")]
    item["assets"] = {"image": {"href": path, "type": "image/tiff", "eo:bands": names}}
    try:
        collection = build(item, tmp_path / "c.parquet")
    except DataError as error:
        message = str(error)
        assert "(column, index)" not in message, "an item has no columns"
        return
    (record,) = rasters(collection)
    values = [int(run(record.read_window((0, 0, 1, 1), [band])).data[0, 0, 0]) for band in collection.bands]
    assert values == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ('{"type": "Catalog"}', "not a STAC item"), ("[1, 2]", "not a STAC item")],
)
def test_a_json_file_that_is_not_stac(tmp_path: Path, content: str, message: str) -> None:
    """The error names it."""
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=rf"x\.json.*{message}"):
        build(str(tmp_path / "x.json"), tmp_path / "c.parquet")


def test_a_missing_json_file(tmp_path: Path) -> None:
    """The error names it."""
    with pytest.raises(UsageError, match=r"no\.json.*No such file"):
        build(str(tmp_path / "no.json"), tmp_path / "c.parquet")


def test_an_empty_item_collection_has_nothing_to_build(tmp_path: Path) -> None:
    """As after a search without results, in each form."""
    empty = {"type": "FeatureCollection", "features": []}
    for source in (pystac.ItemCollection([]), empty):
        with pytest.raises(UsageError, match="empty"):
            build(source, tmp_path / "c.parquet")


def test_the_items_are_not_changed(tmp_path: Path) -> None:
    """`build` does not modify its input."""
    item = _item(tmp_path)
    before = copy.deepcopy(item)
    build(item, tmp_path / "c.parquet", bands=["B04"])
    assert item == before
