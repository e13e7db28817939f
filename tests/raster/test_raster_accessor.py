"""A record and its bands: names, addresses, metadata."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from pixel_oracle import assert_chip, build_one, rasters, run, window_by_rasterio

from rasteret_ml.collection.build.build import build
from rasteret_ml.errors import CollectionError
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.raster_info import RasterInfo
from rasteret_ml.testing import make_cog


@pytest.fixture
def info(tmp_path: Path) -> RasterInfo:
    """A record with bands `red` and `nir`."""
    for i, name in enumerate(("red", "nir")):
        make_cog(tmp_path / "s_20240102" / f"{name}.tif", np.full((1, 16, 16), i + 1, np.uint8))
    files = [str(tmp_path / "s_20240102" / f"{name}.tif") for name in ("red", "nir")]
    (record,) = rasters(build(files, tmp_path / "c.parquet", bands=["red", "nir"]))
    return record.info


def test_attributes_are_the_rows(info: RasterInfo) -> None:
    """All that rasteret's accessor has, by the same names."""
    record = RasterAccessor(info, "sentinel-2-l2a")
    assert record.id == "s_20240102"
    assert record.datetime is not None
    assert record.datetime.isoformat() == "2024-01-02T00:00:00"
    assert record.crs == 32633
    assert record.data_source == "sentinel-2-l2a"
    assert record.cloud_cover is None
    assert record.collection == ""
    assert record.bbox == pytest.approx(shapely.from_wkb(record.footprint).bounds)
    assert record.geometry == record.footprint
    assert set(record.assets) == {"red", "nir"}
    assert set(record.band_metadata) == {"red_metadata", "nir_metadata"}
    assert record.available_bands == ["nir", "red"]
    assert "s_20240102" in repr(record)


def test_the_asset_key_is_code_then_forward_then_reverse(info: RasterInfo) -> None:
    """B04 finds `red` by the registry, `red` finds B04 where that is the key; without a registry only itself."""
    record = RasterAccessor(info, "sentinel-2-l2a")
    metadata, href, index = record.try_get_band_cog_metadata("B04")
    assert metadata is not None
    assert href == info.assets["red"]["href"]
    assert index is None
    assert metadata.crs == "EPSG:32633"
    assert RasterAccessor(info).try_get_band_cog_metadata("B04") == (None, None, None)
    coded = replace(
        info,
        assets={"B04": info.assets["red"]},
        band_metadata={"B04_metadata": info.band_metadata["red_metadata"]},
    )
    assert RasterAccessor(coded, "sentinel-2-l2a").try_get_band_cog_metadata("red")[1] == href


def test_metadata_may_be_kept_under_the_asked_name(info: RasterInfo) -> None:
    """Asset `red`, column `B04_metadata`: the code's own column wins over the asset key's."""
    own, other = info.band_metadata["nir_metadata"], info.band_metadata["red_metadata"]
    mixed = replace(info, band_metadata={"B04_metadata": own, "red_metadata": other})
    metadata, href, _ = RasterAccessor(mixed, "sentinel-2-l2a").try_get_band_cog_metadata("B04")
    assert metadata is not None
    assert href == info.assets["red"]["href"]
    assert own is not None
    np.testing.assert_array_equal(metadata.tile_byte_counts, own["tile_byte_counts"])


@pytest.mark.parametrize("gap", ["asset", "null asset", "href", "metadata", "null metadata"])
def test_whatever_is_missing_gives_three_nones(info: RasterInfo, gap: str) -> None:
    """And the band is not listed as available."""
    assets, structs = dict(info.assets), dict(info.band_metadata)
    if gap == "asset":
        del assets["red"]
    elif gap == "null asset":
        assets["red"] = None
    elif gap == "href":
        assets["red"] = {"href": None, "band_index": None}
    elif gap == "metadata":
        del structs["red_metadata"]
    else:
        structs["red_metadata"] = None
    record = RasterAccessor(replace(info, assets=assets, band_metadata=structs))
    assert record.try_get_band_cog_metadata("red") == (None, None, None)
    assert record.available_bands == ["nir"]


def test_an_asset_may_be_a_bare_address(info: RasterInfo) -> None:
    """As older tables have it; the pixels come all the same."""
    path = info.assets["red"]["href"]
    record = RasterAccessor(replace(info, assets={"red": path}))
    assert_chip(run(record.read_window((0, 0, 16, 16), ["red"])), *window_by_rasterio(path, (0, 0, 16, 16)))


def test_intersects_is_a_question_of_boxes(info: RasterInfo) -> None:
    """In longitude/latitude; False without a box."""
    record = RasterAccessor(info)
    assert record.bbox is not None
    xmin, ymin, xmax, ymax = record.bbox
    assert record.intersects((xmin - 1, ymin - 1, xmax, ymax))
    assert record.intersects(shapely.box(xmin, ymin, xmax, ymax).centroid.buffer(1e-6))
    assert not record.intersects((xmax + 1, ymin, xmax + 2, ymax))
    assert not RasterAccessor(replace(info, bbox=None)).intersects((-180, -90, 180, 90))


def test_a_record_pickles(info: RasterInfo) -> None:
    """Row and accessor cross to a worker and read there what they read here."""
    record = RasterAccessor(info, "sentinel-2-l2a")
    run(record.read_window((0, 0, 4, 4), ["B04"]))
    copy = pickle.loads(pickle.dumps(record))
    assert (copy.id, copy.data_source, copy.available_bands) == (record.id, record.data_source, record.available_bands)
    chip = run(copy.read_window((0, 0, 16, 16), ["B04"]))
    assert_chip(chip, *window_by_rasterio(info.assets["red"]["href"], (0, 0, 16, 16)))


def test_a_chunky_file_needs_a_band_index(tmp_path: Path) -> None:
    """Three samples interleaved and no word on which one: refused, not guessed."""
    record = build_one(make_cog(tmp_path / "rgb.tif", np.ones((3, 16, 16), np.uint16)), tmp_path)
    bare = replace(record.info, assets={"B1": {"href": record.assets["B1"]["href"], "band_index": None}})
    with pytest.raises(CollectionError, match=r"rgb.*B1.*interleaves 3 samples.*band_index"):
        RasterAccessor(bare).source("B1")
