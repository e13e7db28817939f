"""Turn STAC items into `SourceRecord`s.

Sources: STAC 1.0 and 1.1 (asset `bands`), the EO and raster extensions (`eo:bands`, `raster:bands`), the projection
extension (`proj:epsg`, `proj:code`, `proj:wkt2`) and the alternate-assets extension. pystac objects are accepted but
read as plain mappings: pystac is not required, and would raise for an item that is only partly malformed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import shapely

from rasteret_ml.collection.build.record_rows import SourceAsset, SourceRecord, to_naive_utc
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.raster.raster_info import BandRegistry, asset_href
from rasteret_ml.storage.urls import resolve_href

TIFF_ENDINGS = (".tif", ".tiff", ".gtiff")
_PREVIEWS = {"overview", "thumbnail", "visual"}  # Asset keys and roles that are pictures, not bands.
# By band: (asset key, index of the band in its file; None = the only one, or all). None = the item lacks the band.
_BandAssets = dict[str, tuple[str, int | None] | None]


def is_stac(source: Any) -> bool:
    """Whether `source` is a STAC item, an item collection, or a pystac object of these."""
    if not isinstance(source, Mapping):
        return hasattr(source, "to_dict") and (hasattr(source, "assets") or hasattr(source, "items"))
    if source.get("type") not in ("Feature", "FeatureCollection"):
        return False
    features = source.get("features") if source["type"] == "FeatureCollection" else [source]
    return isinstance(features, list) and all(isinstance(f, Mapping) and "assets" in f for f in features)


def items_from(source: Any) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """Yield (item, base) from a mapping, a pystac object or a JSON file; raise `DataError` if that is not STAC.

    `base` is the path or URL that the item's relative hrefs are relative to; None = unknown.
    """
    if isinstance(source, str):
        try:
            loaded = json.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{source}: cannot be read ({error.strerror}).") from None
        except ValueError as error:
            raise DataError(f"{source}: not JSON ({error}).") from None
        if not is_stac(loaded):
            raise DataError(f"{source}: not a STAC item or item collection.")
        for item, _ in items_from(loaded):
            yield item, source
        return
    if not isinstance(source, Mapping):
        source = source.to_dict(transform_hrefs=False) if hasattr(source, "assets") else source.to_dict()
    if source.get("type") == "FeatureCollection":
        for feature in source["features"]:
            yield feature, _self_href(feature)
    else:
        yield source, _self_href(source)


def _self_href(item: Mapping[str, Any]) -> str | None:
    links = item.get("links") or []
    return next((str(link["href"]) for link in links if link.get("rel") == "self" and link.get("href")), None)


def record_from_item(
    item: Mapping[str, Any], base: str | None, bands: Sequence[str] | None, data_source: str | None
) -> SourceRecord:
    """Convert one item, whose relative hrefs are relative to `base`; bands that it lacks become `problems`.

    `bands` are band codes or asset keys, resolved through the band registry `data_source`, by default the item's
    collection; None = every GeoTIFF asset that is not a preview.
    """
    item_assets = item.get("assets") or {}
    properties = item.get("properties") or {}
    registry = data_source if data_source is not None else str(item.get("collection") or "")
    selected = _all_tiffs(item_assets) if bands is None else _find_bands(item_assets, bands, registry)
    assets, problems = {}, []
    for band, location in selected.items():
        if location is None:
            problems.append(
                (band, f"item {item.get('id')} has no asset for it; its assets are {', '.join(item_assets)}")
            )
            continue
        key, index = location
        asset = _source_asset(item_assets[key], base, index)
        if asset is None:
            problems.append((band, f"asset {key!r} of item {item.get('id')} has no href"))
        else:
            assets[band] = asset
    geometry = item.get("geometry")
    crs = properties.get("proj:epsg") or properties.get("proj:code") or properties.get("proj:wkt2")
    return SourceRecord(
        id=str(item.get("id")),
        assets=assets,
        problems=tuple(problems),
        datetime=to_naive_utc(properties.get("datetime") or properties.get("start_datetime")),
        geometry=shapely.to_wkb(shapely.force_2d(shapely.geometry.shape(geometry))) if geometry else None,
        crs=None if crs is None else crs_text(crs),
        collection=str(item.get("collection") or ""),
        properties={k: v for k, v in properties.items() if isinstance(v, (str, int, float, bool)) and k != "datetime"},
    )


def _all_tiffs(assets: Mapping[str, Any]) -> _BandAssets:
    tiffs = {key: asset for key, asset in assets.items() if _is_tiff(asset)}
    roles = {key: asset.get("roles") or [] if isinstance(asset, Mapping) else [] for key, asset in tiffs.items()}
    return {key: (key, None) for key in tiffs if not _PREVIEWS & {key, *roles[key]}}


def _is_tiff(asset: Any) -> bool:
    media = asset.get("type") or "" if isinstance(asset, Mapping) else ""
    href = (asset_href(asset) or "").split("?", 1)[0].lower()
    return "tiff" in media.lower() or (not media and href.endswith(TIFF_ENDINGS))


def _find_bands(assets: Mapping[str, Any], bands: Sequence[str], registry: str) -> _BandAssets:
    """Find each band: an asset with its name, else one of the bands that an asset lists."""
    found: _BandAssets = {}
    for band in bands:
        names = BandRegistry.names(band, registry)
        whole = [(name, None) for name in names if name in assets]
        listed = [(key, i) for key, asset in assets.items() for i, n in enumerate(_band_names(asset)) if n in names]
        found[band] = next(iter([*whole, *listed]), None)
    return found


def _listed_bands(asset: Any) -> list[Mapping[str, Any]]:
    """Fields of each band that an asset lists: STAC 1.1 `bands`, else `raster:bands` merged with `eo:bands`."""
    if not isinstance(asset, Mapping):
        return []
    if asset.get("bands"):
        return list(asset["bands"])
    eo_bands, raster_bands = asset.get("eo:bands") or [], asset.get("raster:bands") or []
    return [{**(eo or {}), **(raster or {})} for eo, raster in itertools.zip_longest(eo_bands, raster_bands)]


def _band_names(asset: Any) -> tuple[str, ...]:
    """Names of the bands of a multi-band asset; empty if they are missing or not distinct."""
    names = [str(band.get("name") or "") for band in _listed_bands(asset)]
    return tuple(names) if len(names) > 1 and all(names) and len(set(names)) == len(names) else ()


def _source_asset(asset: Any, base: str | None, index: int | None) -> SourceAsset | None:
    href = asset_href(asset)
    if href is None:
        return None
    if index is None and isinstance(asset, Mapping):
        index = asset.get("band_index")
    listed = _listed_bands(asset)
    band = listed[index or 0] if len(listed) > (index or 0) else {}
    nodata = band.get("nodata")
    return SourceAsset(
        href=resolve_href(href, base),
        band_index=None if index is None else int(index),
        scale=band.get("scale", band.get("raster:scale")),
        offset=band.get("offset", band.get("raster:offset")),
        nodata=float(nodata) if nodata is not None else None,
        band_names=() if index is not None else _band_names(asset),
    )
