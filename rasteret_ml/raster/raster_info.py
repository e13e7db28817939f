"""One row of a Collection, and the names of its bands."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rasteret_ml.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RasterInfo:
    """Metadata of one raster item; frozen and picklable."""

    id: str  #: Identifier; not necessarily unique.
    datetime: dt.datetime | None  #: Acquisition time, UTC without tzinfo; None = undated.
    bbox: tuple[float, float, float, float] | None  #: (xmin, ymin, xmax, ymax) in longitude/latitude.
    footprint: bytes | None = field(repr=False)  #: Outline as WKB in longitude/latitude.
    crs: int | str | None  #: CRS of the pixels: an EPSG code, else WKT.
    cloud_cover: float | None = None  #: Percent; None = unknown, which is not the same as 0.
    #: By asset key, a mapping with `href` and, for one band of a file, `band_index`; or a plain href.
    assets: Mapping[str, Any] = field(default_factory=dict, repr=False)  # hrefs may hold secrets
    #: By `{band}_metadata`, the tile table struct; None if the row lacks the band.
    band_metadata: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict, repr=False)
    collection: str = ""  #: STAC collection of the item.
    row: int = -1  #: Row of the Collection; -1 = not from a Collection.

    @property
    def stored_bands(self) -> list[str]:
        """Keys of `band_metadata` that are not None; uses the mapping's own `present()`, if any, to convert nothing."""
        present: Callable[[], list[str]] | None = getattr(self.band_metadata, "present", None)
        if present is not None:
            return present()
        return [key for key, struct in self.band_metadata.items() if struct is not None]


_SENTINEL_2 = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge1", "B06": "rededge2",
    "B07": "rededge3", "B08": "nir", "B8A": "nir08", "B09": "nir09", "B10": "cirrus", "B11": "swir16",
    "B12": "swir22", "SCL": "scl", "AOT": "aot", "WVP": "wvp",
}  # fmt: skip
_LANDSAT_8_9 = {
    "B1": "coastal", "B2": "blue", "B3": "green", "B4": "red", "B5": "nir08", "B6": "swir16", "B7": "swir22",
    "B10": "lwir11", "QA_PIXEL": "qa_pixel", "QA_RADSAT": "qa_radsat", "QA_AEROSOL": "qa_aerosol",
}  # fmt: skip


class BandRegistry:
    """Asset keys of band codes, by data source (`B02` is `blue`).

    Example:
        >>> BandRegistry.register("my-sensor", {"B1": "red", "B2": "nir"})
    """

    _tables: ClassVar[dict[str, dict[str, str]]] = {
        "sentinel-2-l1c": _SENTINEL_2,
        "sentinel-2-l2a": _SENTINEL_2,
        "sentinel-2-c1-l2a": _SENTINEL_2,
        "earthsearch/sentinel-2-l2a": _SENTINEL_2,
        "landsat-c2-l1": _LANDSAT_8_9,
        "landsat-c2-l2": _LANDSAT_8_9,
        "earthsearch/landsat-c2-l2": _LANDSAT_8_9,
    }

    @classmethod
    def register(cls, data_source: str, bands: Mapping[str, str]) -> None:
        """Add or replace the mapping of band code to asset key of a data source.

        Raises:
            UsageError: the name is empty.
        """
        if not data_source:
            raise UsageError("data_source must be a non-empty name, got ''.")
        cls._tables = {**cls._tables, data_source: dict(bands)}

    @classmethod
    def names(cls, band: str, data_source: str) -> tuple[str, ...]:
        """Return the keys a band may be stored under, in order: itself, its asset key, the codes it is the key of."""
        table = cls._tables.get(data_source, {})
        codes = [code for code, name in table.items() if name == band]
        return tuple(dict.fromkeys([band, table.get(band, band), *codes]))


def asset_href(asset: Any) -> str | None:
    """Return the href of a STAC asset: its own, else that of an alternate, else the asset itself if it is text."""
    if isinstance(asset, str):
        return asset or None
    if not isinstance(asset, Mapping):
        return None
    if asset.get("href"):
        return str(asset["href"])
    alternates = asset.get("alternate") or {}
    preferred = [alternates.get(k) for k in ("https", "http", "s3", "aws", "cloudfront")]
    for alternate in [*preferred, *alternates.values()]:
        if isinstance(alternate, Mapping) and alternate.get("href"):
            return str(alternate["href"])
    return None
