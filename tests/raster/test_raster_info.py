"""Raster items and band names."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from rasteret_ml.errors import UsageError
from rasteret_ml.raster.raster_info import BandRegistry, RasterInfo, asset_href


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo registrations after each test."""
    monkeypatch.setattr(BandRegistry, "_tables", dict(BandRegistry._tables))


def _info() -> RasterInfo:
    return RasterInfo(id="a", datetime=None, bbox=None, footprint=None, crs=None)


def test_a_row_is_frozen() -> None:
    """Fields cannot be assigned."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        _info().id = "b"  # type: ignore[misc]


def test_a_row_pickles() -> None:
    """All fields are kept."""
    info = dataclasses.replace(_info(), bbox=(1.0, 2.0, 3.0, 4.0), assets={"B1": {"href": "x"}}, row=7)
    other = pickle.loads(pickle.dumps(info))
    assert dataclasses.asdict(other) == dataclasses.asdict(info)
    assert dataclasses.asdict(copy.copy(info)) == dataclasses.asdict(info)


@pytest.mark.parametrize(
    ("band", "source", "names"),
    [
        ("B04", "sentinel-2-l2a", ("B04", "red")),
        ("red", "sentinel-2-l2a", ("red", "B04")),
        ("B8A", "sentinel-2-c1-l2a", ("B8A", "nir08")),
        ("SCL", "earthsearch/sentinel-2-l2a", ("SCL", "scl")),
        ("scl", "sentinel-2-l2a", ("scl", "SCL")),
        ("B4", "landsat-c2-l2", ("B4", "red")),
        ("nir08", "landsat-c2-l2", ("nir08", "B5")),
        ("B04", "", ("B04",)),
        ("B04", "nobody-knows", ("B04",)),
        ("unheard-of", "sentinel-2-l2a", ("unheard-of",)),
    ],
)
def test_names_in_order_of_lookup(band: str, source: str, names: tuple[str, ...]) -> None:
    """The name itself, its asset key, and the code whose asset key it is."""
    assert BandRegistry.names(band, source) == names


def test_sentinel_2_and_landsat_do_not_mix() -> None:
    """B05 is red edge, B5 near infrared."""
    assert BandRegistry.names("B05", "sentinel-2-l2a") == ("B05", "rededge1")
    assert BandRegistry.names("B5", "landsat-c2-l2") == ("B5", "nir08")
    assert BandRegistry.names("B5", "sentinel-2-l2a") == ("B5",)


def test_registration_is_open() -> None:
    """Register and replace a source; the mapping is copied."""
    table = {"1": "pan"}
    BandRegistry.register("mine", table)
    table["1"] = "changed"
    assert BandRegistry.names("1", "mine") == ("1", "pan")
    assert BandRegistry.names("pan", "mine") == ("pan", "1")
    BandRegistry.register("mine", {"2": "blue"})
    assert BandRegistry.names("1", "mine") == ("1",)
    assert BandRegistry.names("B02", "sentinel-2-l2a") == ("B02", "blue")


def test_a_data_source_needs_a_name() -> None:
    """The empty name means no registry."""
    with pytest.raises(UsageError, match="name"):
        BandRegistry.register("", {"1": "pan"})


@pytest.mark.parametrize(
    ("asset", "href"),
    [
        ("https://host/a.tif", "https://host/a.tif"),
        ({"href": "a.tif", "alternate": {"s3": {"href": "s3://b/a.tif"}}}, "a.tif"),
        (
            {"href": None, "alternate": {"s3": {"href": "s3://b/a.tif"}, "https": {"href": "https://h/a"}}},
            "https://h/a",
        ),
        ({"alternate": {"s3": {"href": "s3://b/a.tif"}}}, "s3://b/a.tif"),
        ({"alternate": {"other": {"href": "x.tif"}}}, "x.tif"),
        ({"alternate": {"other": None}}, None),
        ({"title": "nothing"}, None),
        ({"href": ""}, None),
        ("", None),
        (None, None),
        (3, None),
    ],
)
def test_href_of_an_asset(asset: object, href: str | None) -> None:
    """`href`, else an alternate, else the asset itself."""
    assert asset_href(asset) == href
