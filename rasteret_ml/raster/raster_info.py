"""One row of a Collection, and the names that bands go by."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rasteret_ml.errors import UsageError

__all__ = ["BandRegistry", "RasterInfo", "asset_href"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RasterInfo:
    """Scene metadata of one raster item; frozen and picklable."""

    id: str
    """Identifier; not necessarily unique."""
    datetime: dt.datetime | None
    """Acquisition, UTC without tzinfo; None = undated."""
    bbox: tuple[float, float, float, float] | None
    """(xmin, ymin, xmax, ymax) in longitude/latitude."""
    footprint: bytes | None = field(repr=False)
    """Outline as WKB in longitude/latitude."""
    crs: int | str | None
    """CRS of the pixels: an EPSG number, else WKT."""
    cloud_cover: float | None = None
    """Percent, None = unknown (unknown is not clear)."""
    assets: Mapping[str, Any] = field(default_factory=dict, repr=False)  # addresses may carry secrets
    """Per asset key a mapping with `href` and, for one band of a file, `band_index`; or a bare address."""
    band_metadata: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict, repr=False)
    """Per `{band}_metadata` the struct of the Parquet contract, None where the band is absent."""
    collection: str = ""
    """STAC collection that the item belongs to."""
    row: int = -1
    """Row of the Collection; -1 = none."""

    @property
    def stored_bands(self) -> list[str]:
        """Keys of `band_metadata` whose band is there; a mapping that can say so (`present`) converts nothing."""
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
    """Per data source, which asset key a band code stands for (`B02` is `blue`), open to registration."""

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
        """Add or replace a data source's mapping of band code to asset key."""
        if not data_source:
            raise UsageError("A data source needs a name.")
        cls._tables = {**cls._tables, data_source: dict(bands)}

    @classmethod
    def names(cls, band: str, data_source: str) -> tuple[str, ...]:
        """The keys a band may be stored under, best first: itself, the forward name, the reverse one."""
        table = cls._tables.get(data_source, {})
        found = [band]
        if band in table:
            found.append(table[band])
        found.extend(code for code, name in table.items() if name == band)
        return tuple(dict.fromkeys(found))


def asset_href(asset: Any) -> str | None:
    """The address in an asset: `href`, else the first alternate, else the asset itself where it is text."""
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
