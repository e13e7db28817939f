"""Drafts and headers to the Arrow table of a Collection, a group of records at a time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.collection.schema import BAND_STRUCT, METADATA_SUFFIX, bbox_array, geo_metadata
from rasteret_ml.errors import DataError, RasteretError, UsageError, redact
from rasteret_ml.geo.crs import LONLAT, epsg_code, transform_geometries
from rasteret_ml.collection.build.draft import AssetDraft, RecordDraft
from rasteret_ml.collection.build.draft import BuildFailure
from rasteret_ml.collection.build.headers import OpenedFile

__all__ = ["RowGroup", "groups_to_table", "make_group"]

_ASSET = pa.struct([("href", pa.string()), ("band_index", pa.int64())])
_RESERVED = {
    "id",
    "datetime",
    "geometry",
    "bbox",
    "assets",
    "proj:epsg",
    "crs",
    "collection",
    "year",
    "month",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowGroup:
    """Consecutive records, as Arrow columns where that matters."""

    drafts: tuple[RecordDraft, ...]
    """Those with a readable band: one row each."""
    crs: tuple[str | None, ...]
    """CRS text of each row."""
    geometry: pa.BinaryArray
    """Footprint of each row as WKB in longitude/latitude."""
    bounds: npt.NDArray[np.float64]
    """Its bounds `[N, 4]`, NaN where there is none."""
    geometry_types: frozenset[str]
    """Kinds of geometry among them."""
    assets: Mapping[str, pa.StructArray]
    """By band: where it is; null where a row lacks it."""
    metadata: Mapping[str, pa.StructArray]
    """By band: its tile tables; null where a row lacks it."""
    failures: tuple[BuildFailure, ...]
    """What could not be used."""


@dataclass(slots=True, kw_only=True)
class _Record:
    draft: RecordDraft
    crs: str | None
    bands: dict[str, tuple[AssetDraft, CogMetadata]]
    outline: npt.NDArray[np.float64] | None
    """Corners of the raster `[4, 2]` in its CRS."""


def make_group(drafts: Sequence[RecordDraft], headers: Mapping[str, OpenedFile | RasteretError]) -> RowGroup:
    """Drafts with their headers as rows; a draft of which no band is readable is none. Failures are listed."""
    failures: list[BuildFailure] = []
    resolved = [_resolve(draft, headers, failures) for draft in drafts]
    records = [record for record in resolved if record is not None]
    footprints = _footprints(records)
    shapes = shapely.from_wkb(np.array(footprints, dtype=object))
    bands = dict.fromkeys(band for record in records for band in record.bands)
    assets, metadata = {}, {}
    for band in bands:
        found = [record.bands.get(band) for record in records]
        places = [None if f is None else {"href": f[0].href, "band_index": f[0].band_index} for f in found]
        assets[band] = pa.array(places, _ASSET)
        metadata[band] = pa.array([None if f is None else f[1].to_struct() for f in found], BAND_STRUCT)
    return RowGroup(
        drafts=tuple(record.draft for record in records),
        crs=tuple(record.crs for record in records),
        geometry=pa.array(footprints, pa.binary()),
        bounds=shapely.bounds(shapes).reshape(-1, 4),
        geometry_types=frozenset(shape.geom_type for shape in shapes if shape is not None),
        assets=assets,
        metadata=metadata,
        failures=tuple(failures),
    )


def _resolve(
    draft: RecordDraft, headers: Mapping[str, OpenedFile | RasteretError], failures: list[BuildFailure]
) -> _Record | None:
    bands: dict[str, tuple[AssetDraft, CogMetadata]] = {}
    crs, outline = draft.crs, None
    for band, why in draft.problems:
        failures.append(BuildFailure(record=draft.id, band=band, href="", error=DataError(why)))
    if not draft.assets and not draft.problems:
        failures.append(BuildFailure(record=draft.id, band="*", href="", error=DataError("it has no address at all")))
    for name, asset in draft.assets.items():
        opened = headers[asset.href]
        try:
            if isinstance(opened, RasteretError):
                raise opened
            found = _bands_of(name, asset, opened, draft.band_names)
            own = opened.header.crs
            if own is not None and bands and crs is not None and own != crs:
                raise DataError(f"{redact(asset.href)}: its CRS is {own}, but the record's other bands have {crs}.")
            crs = own if own is not None else crs
        except RasteretError as error:
            failures.append(BuildFailure(record=draft.id, band=name, href=redact(asset.href), error=error))
            continue
        bands.update(found)
        if outline is None:
            outline = _corners(opened)
    return _Record(draft=draft, crs=crs, bands=bands, outline=outline) if bands else None


def _corners(opened: OpenedFile) -> npt.NDArray[np.float64] | None:
    t, image = opened.header.transform, opened.header.image
    if t is None:
        return None
    w, h = image.width, image.height
    return np.array(
        [(t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f) for x, y in ((0, 0), (w, 0), (w, h), (0, h))], np.float64
    )


def _footprints(records: Sequence[_Record]) -> list[bytes | None]:
    """Each record's own geometry, else its raster's outline; all outlines of a CRS in one go."""
    found: list[bytes | None] = [record.draft.geometry for record in records]
    by_crs: dict[str, list[tuple[int, npt.NDArray[np.float64]]]] = {}
    for i, record in enumerate(records):
        if found[i] is None and record.outline is not None and record.crs is not None:
            by_crs.setdefault(record.crs, []).append((i, record.outline))
    for crs, outlines in by_crs.items():
        polygons = shapely.polygons(np.stack([outline for _, outline in outlines]))
        for (i, _), footprint in zip(outlines, _in_lonlat(polygons, crs), strict=True):
            found[i] = footprint
    return found


def _in_lonlat(outlines: npt.NDArray[np.object_], crs: str) -> list[bytes | None]:
    """Outlines as WKB; None where there is no way there (another planet, a local CRS)."""
    try:
        found = transform_geometries(outlines, crs, LONLAT)
    except UsageError:
        return [None] * len(outlines)
    finite = np.isfinite(shapely.bounds(found)).all(axis=1) & ~shapely.is_empty(found)
    return [wkb if good else None for wkb, good in zip(shapely.to_wkb(found), finite, strict=True)]


def _bands_of(
    name: str, asset: AssetDraft, opened: OpenedFile, band_names: Sequence[str]
) -> dict[str, tuple[AssetDraft, CogMetadata]]:
    count = opened.header.count
    if name == "*":
        names = band_names or _own_names(opened)
        if len(names) != count:
            raise DataError(
                f"{redact(asset.href)}: the file has {count} bands, but {len(names)} names were given: {list(names)}."
            )
        parts = {n: replace(asset, band_index=i if count > 1 else None) for i, n in enumerate(names)}
    elif asset.band_index is None and count > 1 and len(asset.band_names) == count:
        parts = {n: replace(asset, band_index=i) for i, n in enumerate(asset.band_names)}
    else:
        index = asset.band_index
        if index is None and count > 1:
            raise DataError(
                f"{redact(asset.href)}: the file has {count} bands, and nothing says which one {name!r} is; a table "
                "can give (column, index), a STAC asset its `bands`."
            )
        if index is not None and not 0 <= index < count:
            raise DataError(f"{redact(asset.href)}: the file has {count} bands; there is no index {index}.")
        parts = {name: asset}
    return {n: (part, _stated(part, opened.band(part.band_index or 0))) for n, part in parts.items()}


def _own_names(opened: OpenedFile) -> list[str]:
    described = [band.description for band in opened.header.bands]
    if all(described) and len(set(described)) == len(described):
        return [str(name) for name in described]
    return [f"B{i + 1}" for i in range(opened.header.count)]


def _stated(asset: AssetDraft, metadata: CogMetadata) -> CogMetadata:
    """A band's metadata with what the source says of it."""
    if asset.scale is None and asset.offset is None and (asset.nodata is None or metadata.nodata is not None):
        return metadata
    return replace(
        metadata,
        scale=metadata.scale if asset.scale is None else float(asset.scale),
        offset=metadata.offset if asset.offset is None else float(asset.offset),
        nodata=asset.nodata if metadata.nodata is None else metadata.nodata,
    )


def groups_to_table(groups: Sequence[RowGroup], *, name: str, data_source: str) -> pa.Table:
    """The Arrow table of all rows, by the Parquet contract."""
    drafts = [draft for group in groups for draft in group.drafts]
    crs = [text for group in groups for text in group.crs]
    bands = list(dict.fromkeys(band for group in groups for band in group.metadata))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "id": pa.array([draft.id for draft in drafts], pa.string()),
        "datetime": pa.array([draft.datetime for draft in drafts], pa.timestamp("us")),
        "geometry": pa.chunked_array([group.geometry for group in groups], pa.binary()),
        "assets": pa.chunked_array([_assets(group, bands) for group in groups]),
    }
    if any(draft.collection for draft in drafts):
        columns["collection"] = pa.array([draft.collection or None for draft in drafts], pa.string())
    for key in dict.fromkeys(key for draft in drafts for key in draft.properties if _is_free(key)):
        columns[key] = _property([draft.properties.get(key) for draft in drafts])
    columns["proj:epsg"] = pa.array([epsg_code(text) for text in crs], pa.int32())
    columns["crs"] = pa.array(crs, pa.string())
    for band in bands:
        tables = [group.metadata.get(band) for group in groups]
        columns[f"{band}{METADATA_SUFFIX}"] = pa.chunked_array(
            [_null(BAND_STRUCT, group) if t is None else t for t, group in zip(tables, groups, strict=True)],
            BAND_STRUCT,
        )
    columns["bbox"] = bbox_array(np.concatenate([group.bounds for group in groups]))
    kinds = frozenset[str]().union(*(group.geometry_types for group in groups))
    return pa.table(columns).replace_schema_metadata(
        _file_metadata(drafts, name, data_source) | dict(geo_metadata(set(kinds)))
    )


def _is_free(key: str) -> bool:
    return key not in _RESERVED and not key.endswith(METADATA_SUFFIX)


def _null(kind: pa.DataType, group: RowGroup) -> pa.Array:
    return pa.nulls(len(group.drafts), kind)


def _assets(group: RowGroup, bands: Sequence[str]) -> pa.StructArray:
    children = [group.assets[band] if band in group.assets else _null(_ASSET, group) for band in bands]
    return pa.StructArray.from_arrays(children, names=list(bands))


def _property(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # one property, several types over the items
        return pa.array([None if v is None else str(v) for v in values], pa.string())


def _file_metadata(drafts: Sequence[RecordDraft], name: str, data_source: str) -> dict[bytes, bytes]:
    dates = [draft.datetime for draft in drafts if draft.datetime is not None]
    span = f"{min(dates).isoformat()},{max(dates).isoformat()}" if dates else ""
    facts = {
        "name": name,
        "data_source": data_source,
        "description": "",
        "created": dt.datetime.now(dt.UTC).replace(tzinfo=None).isoformat(timespec="seconds"),
        "date_range": span,
        "rasteret_collection_version": "1",
    }
    return {key.encode(): value.encode() for key, value in facts.items()}
