"""Drafts from STAC items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import shape

from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.storage.urls import resolve_href
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.collection.build.draft import AssetDraft, RecordDraft, naive_utc
from rasteret_ml.raster.raster_info import BandRegistry, asset_href

__all__ = ["draft_from_item", "is_stac", "items_from"]

_TIFF_ENDINGS = (".tif", ".tiff", ".gtiff")
_NOT_BANDS = {"overview", "thumbnail", "visual"}


def is_stac(source: Any) -> bool:
    """Whether `source` is an item, a collection of items, or a pystac object of these."""
    if isinstance(source, Mapping):
        return source.get("type") in ("Feature", "FeatureCollection") and _looks_like_items(source)
    return hasattr(source, "to_dict") and (hasattr(source, "assets") or hasattr(source, "items"))


def _looks_like_items(source: Mapping[str, Any]) -> bool:
    features = source.get("features") if source["type"] == "FeatureCollection" else [source]
    return isinstance(features, list) and all(isinstance(f, Mapping) and "assets" in f for f in features)


def items_from(source: Any) -> Iterator[tuple[Mapping[str, Any], str | None]]:
    """(item, the address its relative hrefs start from) of a mapping, a pystac object or a JSON file's path."""
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
        own = getattr(source, "get_self_href", lambda: None)()
        source = source.to_dict(transform_hrefs=False) if hasattr(source, "assets") else source.to_dict()
        if own is not None:
            yield source, own
            return
    if source.get("type") == "FeatureCollection":
        for feature in source["features"]:
            yield feature, _self_href(feature)
    else:
        yield source, _self_href(source)


def _self_href(item: Mapping[str, Any]) -> str | None:
    links = item.get("links") or []
    return next((str(link["href"]) for link in links if link.get("rel") == "self" and link.get("href")), None)


def draft_from_item(
    item: Mapping[str, Any], base: str | None, bands: Sequence[str] | None, data_source: str | None
) -> RecordDraft:
    """One item's draft.

    Args:
        item: STAC item as a mapping.
        base: Where relative hrefs start.
        bands: Band codes or asset keys to take, found through the band registry; None = every GeoTIFF asset
            that is no preview.
        data_source: Band registry; default the item's collection.

    A band that the item lacks is noted in the draft's `problems`.
    """
    found = item.get("assets") or {}
    properties = item.get("properties") or {}
    source = data_source if data_source is not None else str(item.get("collection") or "")
    chosen = _every_tiff(found) if bands is None else _named(found, bands, source)
    assets, problems = {}, []
    for name, place in chosen.items():
        if place is None:
            problems.append((name, f"item {item.get('id')} has no asset for it; it has: {', '.join(found)}"))
            continue
        key, index = place
        draft = _asset(found[key], base, index)
        if draft is None:
            problems.append((name, f"asset {key!r} of item {item.get('id')} has no href"))
        else:
            assets[name] = draft
    when = properties.get("datetime") or properties.get("start_datetime")
    geometry = item.get("geometry")
    return RecordDraft(
        id=str(item.get("id")),
        assets=assets,
        problems=tuple(problems),
        datetime=naive_utc(when),
        geometry=shapely.to_wkb(shapely.force_2d(shape(geometry))) if geometry else None,
        crs=_crs(properties),
        collection=str(item.get("collection") or ""),
        properties={k: v for k, v in properties.items() if isinstance(v, (str, int, float, bool)) and k != "datetime"},
    )


_Place = tuple[str, int | None]
"""An asset key, and which band of its file (None: the only one, or all)."""


def _every_tiff(assets: Mapping[str, Any]) -> dict[str, _Place | None]:
    return {key: (key, None) for key, asset in assets.items() if _is_tiff(asset) and not _is_preview(key, asset)}


def _is_tiff(asset: Any) -> bool:
    media = asset.get("type") or "" if isinstance(asset, Mapping) else ""
    href = (asset_href(asset) or "").split("?", 1)[0].lower()
    return "tiff" in media.lower() or (not media and href.endswith(_TIFF_ENDINGS))


def _is_preview(key: str, asset: Mapping[str, Any]) -> bool:
    return bool(_NOT_BANDS & {key, *(asset.get("roles") or [])})


def _named(assets: Mapping[str, Any], bands: Sequence[str], source: str) -> dict[str, _Place | None]:
    """Where each band is: an asset of its name, else one of the bands that an asset lists; None where nowhere."""
    chosen: dict[str, _Place | None] = {}
    for band in bands:
        names = BandRegistry.names(band, source)
        whole = [(name, None) for name in names if name in assets]
        parts = [(key, i) for key, a in assets.items() for i, own in enumerate(_band_names(a)) if own in names]
        chosen[band] = next(iter([*whole, *parts]), None)
    return chosen


def _band_facts(asset: Any) -> list[Mapping[str, Any]]:
    """What is said of each band of an asset, by STAC 1.1 `bands` or by `raster:bands` and `eo:bands`."""
    if not isinstance(asset, Mapping):
        return []
    if asset.get("bands"):
        return list(asset["bands"])
    raster, eo = asset.get("raster:bands") or [], asset.get("eo:bands") or []
    count = max(len(raster), len(eo))
    pad = [*raster, *[{}] * (count - len(raster))], [*eo, *[{}] * (count - len(eo))]
    return [{**e, **r} for r, e in zip(*pad, strict=True)]


def _band_names(asset: Any) -> tuple[str, ...]:
    """Names of the bands of an asset that has several; empty where one is unnamed or two are alike."""
    names = [str(facts.get("name") or "") for facts in _band_facts(asset)]
    return tuple(names) if len(names) > 1 and all(names) and len(set(names)) == len(names) else ()


def _asset(asset: Any, base: str | None, index: int | None) -> AssetDraft | None:
    href = asset_href(asset)
    if href is None:
        return None
    own = asset.get("band_index") if isinstance(asset, Mapping) else None
    index = own if index is None else index
    listed = _band_facts(asset)
    facts = listed[index or 0] if len(listed) > (index or 0) else {}
    nodata = facts.get("nodata")
    return AssetDraft(
        href=resolve_href(href, base),
        band_index=None if index is None else int(index),
        scale=facts.get("scale", facts.get("raster:scale")),
        offset=facts.get("offset", facts.get("raster:offset")),
        nodata=float(nodata) if nodata is not None else None,
        band_names=() if index is not None else _band_names(asset),
    )


def _crs(properties: Mapping[str, Any]) -> str | None:
    value = properties.get("proj:epsg") or properties.get("proj:code") or properties.get("proj:wkt2")
    return None if value is None else crs_text(value)
