"""The rules know a COG when they see one, and a plain GeoTIFF as well."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from cog_rules import broken_rules

from rasteret_ml.testing import make_cog

PIXELS = np.random.default_rng(0).integers(0, 9, (700, 900), np.uint8)


@pytest.mark.parametrize("options", [{}, {"compress": "none"}, {"bigtiff": "YES"}, {"sparse_ok": True}])
def test_what_gdal_calls_a_cog_breaks_no_rule(tmp_path, options):
    """Whatever its options."""
    assert broken_rules(make_cog(tmp_path / "cog.tif", PIXELS, nodata=0, **options)) == []


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({}, "strips"),
        ({"tiled": True, "blockxsize": 256, "blockysize": 256}, "overviews are missing"),
        ({"tiled": True, "blockxsize": 256, "blockysize": 256}, "no structural metadata after the header"),
    ],
)
def test_a_plain_geotiff_breaks_them(tmp_path, options, rule):
    """And is told why."""
    path = tmp_path / "plain.tif"
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "height": 700, "width": 900}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=(10, 0, 0, 0, -10, 0), **profile, **options) as file:
        file.write(PIXELS, 1)
    assert rule in broken_rules(path)


def test_a_changed_cog_breaks_them(tmp_path):
    """Pixels that are written again lie at the end."""
    path = make_cog(tmp_path / "cog.tif", PIXELS)
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK=True) as file:
        file.write(PIXELS[::-1], 1)
    assert broken_rules(path)
