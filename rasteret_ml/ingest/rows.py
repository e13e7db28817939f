"""Drafts and headers to the Arrow table of a Collection."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from rasteret_ml.collection.schema import BAND_STRUCT, METADATA_SUFFIX, bbox_array, geo_metadata
from rasteret_ml.errors import DataError, RasteretError, UsageError, redact
from rasteret_ml.geo.crs import LONLAT, epsg_code, transform_geometries
from rasteret_ml.ingest.draft import AssetDraft, RecordDraft
from rasteret_ml.ingest.report import BuildFailure
from rasteret_ml.raster.open import OpenedFile

__all__ = ["Row", "resolve_record", "rows_to_table"]

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

Row = dict[str, Any]
"""A record's columns as plain values; `bands` maps band to (asset, metadata struct)."""


def resolve_record(
    draft: RecordDraft, headers: Mapping[str, OpenedFile | RasteretError]
) -> tuple[Row | None, list[BuildFailure]]:
    """A draft with its headers as a row; None where no band is readable. Failures are listed, never hidden."""
    bands: dict[str, tuple[AssetDraft, dict[str, Any]]] = {}
    crs, outline = draft.crs, None
    failures = [BuildFailure(record=draft.id, band=b, href="", error=DataError(why)) for b, why in draft.problems]
    if not draft.assets and not failures:
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
        if outline is None and opened.header.transform is not None:
            outline = opened.header.band(0).grid.footprint
    if not bands:
        return None, failures
    geometry = draft.geometry
    if geometry is None and outline is not None and crs is not None:
        geometry = _footprint(outline, crs)
    row = {
        "id": draft.id,
        "datetime": draft.datetime,
        "geometry": geometry,
        "crs": crs,
        "collection": draft.collection or None,
        "properties": {
            k: v for k, v in draft.properties.items() if k not in _RESERVED and not k.endswith(METADATA_SUFFIX)
        },
        "bands": bands,
    }
    return row, failures


def _footprint(outline: shapely.Polygon, crs: str) -> bytes | None:
    """The outline in longitude and latitude; None where there is no way there (another planet, a local CRS)."""
    try:
        (found,) = transform_geometries(np.array([outline], dtype=object), crs, LONLAT)
    except UsageError:
        return None
    finite = not found.is_empty and np.isfinite(found.bounds).all()
    wkb: bytes | None = shapely.to_wkb(found) if finite else None
    return wkb


def _bands_of(
    name: str, asset: AssetDraft, opened: OpenedFile, band_names: Sequence[str]
) -> dict[str, tuple[AssetDraft, dict[str, Any]]]:
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
    return {n: (part, _struct(part, opened)) for n, part in parts.items()}


def _own_names(opened: OpenedFile) -> list[str]:
    described = [band.description for band in opened.header.bands]
    if all(described) and len(set(described)) == len(described):
        return [str(name) for name in described]
    return [f"B{i + 1}" for i in range(opened.header.count)]


def _struct(asset: AssetDraft, opened: OpenedFile) -> dict[str, Any]:
    metadata = opened.band(asset.band_index or 0)
    return replace(
        metadata,
        scale=metadata.scale if asset.scale is None else float(asset.scale),
        offset=metadata.offset if asset.offset is None else float(asset.offset),
        nodata=asset.nodata if metadata.nodata is None else metadata.nodata,
    ).to_struct()


def rows_to_table(rows: Sequence[Row], *, name: str, data_source: str) -> pa.Table:
    """The Arrow table of rows, by the Parquet contract."""
    bands = list(dict.fromkeys(band for row in rows for band in row["bands"]))
    shapes = shapely.from_wkb(np.array([row["geometry"] for row in rows], dtype=object))
    columns: dict[str, pa.Array] = {
        "id": pa.array([row["id"] for row in rows], pa.string()),
        "datetime": pa.array([row["datetime"] for row in rows], pa.timestamp("us")),
        "geometry": pa.array([row["geometry"] for row in rows], pa.binary()),
        "assets": _assets(rows, bands),
    }
    if any(row["collection"] for row in rows):
        columns["collection"] = pa.array([row["collection"] for row in rows], pa.string())
    for key in dict.fromkeys(key for row in rows for key in row["properties"]):
        columns[key] = _property([row["properties"].get(key) for row in rows])
    columns["proj:epsg"] = pa.array([epsg_code(row["crs"]) for row in rows], pa.int32())
    columns["crs"] = pa.array([row["crs"] for row in rows], pa.string())
    for band in bands:
        structs = [row["bands"][band][1] if band in row["bands"] else None for row in rows]
        columns[f"{band}{METADATA_SUFFIX}"] = pa.array(structs, BAND_STRUCT)
    columns["bbox"] = bbox_array(shapely.bounds(shapes))
    present = [shape.geom_type for shape in shapes if shape is not None]
    return pa.table(columns).replace_schema_metadata(
        _file_metadata(rows, name, data_source) | dict(geo_metadata(set(present)))
    )


def _assets(rows: Sequence[Row], bands: Sequence[str]) -> pa.StructArray:
    children = []
    for band in bands:
        found = [row["bands"].get(band) for row in rows]
        children.append(
            pa.array(
                [None if f is None else {"href": f[0].href, "band_index": f[0].band_index} for f in found],
                _ASSET,
            )
        )
    return pa.StructArray.from_arrays(children, names=list(bands))


def _property(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # one property, several types over the items
        return pa.array([None if v is None else str(v) for v in values], pa.string())


def _file_metadata(rows: Sequence[Row], name: str, data_source: str) -> dict[bytes, bytes]:
    dates = [row["datetime"] for row in rows if row["datetime"] is not None]
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
