"""Turn source records and the headers of their files into rows of a Collection, as Arrow arrays.

What a file says about itself (CRS, extent, nodata) beats what its source says; scale and offset of the source beat the
file's. One unreadable file costs one band of one record, and is reported.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import shapely

from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.collection.build.headers import OpenedFile
from rasteret_ml.collection.schema import BAND_STRUCT, METADATA_SUFFIX, bbox_array, geo_metadata, is_reserved
from rasteret_ml.errors import DataError, RasteretError, UsageError, redact
from rasteret_ml.geo.crs import LONLAT, epsg_code, transform_geometries

_ASSET_STRUCT = pa.struct([("href", pa.string()), ("band_index", pa.int64())])


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAsset:
    """A file that holds one or more bands, as its source describes it."""

    href: str  #: Path or URL, unsigned.
    band_index: int | None = None  #: Index of the band in the file, from 0; None = the only band, or all of them.
    scale: float | None = None  #: Scale by the source (STAC `raster:bands`); beats the file's.
    offset: float | None = None  #: Offset by the source; beats the file's.
    nodata: float | None = None  #: Nodata value by the source; used if the file declares none.
    #: Names by the source of all bands of the file, each of which becomes a band of the record; empty = none given.
    band_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """One raster item as its source describes it, before its files are opened."""

    id: str  #: Identifier.
    #: Files by band name. The only key `*` means all bands of a file, by the asset's `band_names`, else the file's band
    #: descriptions, else B1, B2, …
    assets: Mapping[str, SourceAsset]
    datetime: dt.datetime | None = None  #: Acquisition time, naive UTC; None = undated.
    geometry: bytes | None = None  #: Footprint as WKB in longitude/latitude; None = the outline of the raster.
    crs: str | None = None  #: CRS to use if the file declares none.
    collection: str = ""  #: STAC collection.
    properties: Mapping[str, Any] = field(default_factory=dict)  #: Values of further columns.
    problems: tuple[tuple[str, str], ...] = ()  #: (band, reason) for bands that the source itself lacks.


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFailure:
    """A band or file that was left out of a Collection."""

    record: str  #: Record id.
    band: str  #: Band; `*` for all bands of a file.
    href: str  #: Path or URL, without secrets.
    error: RasteretError  #: Why it was left out.

    def __str__(self) -> str:
        return f"{self.record}, band {self.band}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordRows:
    """Consecutive rows of a Collection."""

    records: tuple[SourceRecord, ...]  #: Records with a readable band, one per row.
    crs: tuple[str | None, ...]  #: CRS of each row.
    geometry: pa.BinaryArray  #: Footprint of each row as WKB in longitude/latitude.
    bounds: npt.NDArray[np.float64]  #: Bounds of the footprints `[N, 4]`, NaN where there is none.
    geometry_types: frozenset[str]  #: Geometry types of the footprints.
    assets: Mapping[str, pa.StructArray]  #: Asset of each row by band; null where a row lacks the band.
    #: Header and tile table of each row by band; null where a row lacks the band.
    metadata: Mapping[str, pa.StructArray]
    failures: tuple[BuildFailure, ...]  #: What was left out.


@dataclass(slots=True, kw_only=True)
class _OpenedRecord:
    """A record with at least one readable band."""

    source: SourceRecord
    crs: str | None
    bands: dict[str, tuple[SourceAsset, CogMetadata]]
    corners: npt.NDArray[np.float64] | None  # Corners of the raster `[4, 2]` as (x, y) in its CRS.


def to_naive_utc(value: Any) -> dt.datetime | None:
    """Convert a time of any kind to a naive UTC datetime; None, NaT and "" are undated, others a `UsageError`."""
    try:
        stamp = pd.Timestamp(value)
    except (ValueError, TypeError) as error:
        raise UsageError(f"datetime must be a date or time, got {value!r} ({error}).") from None
    if stamp is pd.NaT:
        return None
    stamp = stamp.tz_convert(None) if stamp.tzinfo is not None else stamp
    naive: dt.datetime = stamp.floor("us").to_pydatetime()
    return naive


def make_rows(sources: Sequence[SourceRecord], headers: Mapping[str, OpenedFile | RasteretError]) -> RecordRows:
    """Combine records with the headers, or the errors of reading them, of their files by href.

    A record without a readable band becomes no row.
    """
    failures: list[BuildFailure] = []
    opened = [_open_record(source, headers, failures) for source in sources]
    records = [record for record in opened if record is not None]
    footprints = _footprints(records)
    shapes = shapely.from_wkb(np.array(footprints, dtype=object))
    assets, metadata = {}, {}
    for name in dict.fromkeys(name for record in records for name in record.bands):
        bands = [record.bands.get(name) for record in records]
        refs = [None if b is None else {"href": b[0].href, "band_index": b[0].band_index} for b in bands]
        assets[name] = pa.array(refs, _ASSET_STRUCT)
        metadata[name] = pa.array([None if b is None else b[1].to_struct() for b in bands], BAND_STRUCT)
    return RecordRows(
        records=tuple(record.source for record in records),
        crs=tuple(record.crs for record in records),
        geometry=pa.array(footprints, pa.binary()),
        bounds=shapely.bounds(shapes).reshape(-1, 4),
        geometry_types=frozenset(shape.geom_type for shape in shapes if shape is not None),
        assets=assets,
        metadata=metadata,
        failures=tuple(failures),
    )


def _open_record(
    source: SourceRecord, headers: Mapping[str, OpenedFile | RasteretError], failures: list[BuildFailure]
) -> _OpenedRecord | None:
    bands: dict[str, tuple[SourceAsset, CogMetadata]] = {}
    crs, corners = source.crs, None
    for band, reason in source.problems:
        failures.append(BuildFailure(record=source.id, band=band, href="", error=DataError(reason)))
    if not source.assets and not source.problems:
        failures.append(BuildFailure(record=source.id, band="*", href="", error=DataError("it has no address")))
    for name, asset in source.assets.items():
        file = headers[asset.href]
        try:
            if isinstance(file, RasteretError):
                raise file
            found = _bands_of(name, asset, file)
            file_crs = file.header.crs
            if file_crs is not None and bands and crs is not None and file_crs != crs:
                raise DataError(
                    f"{redact(asset.href)}: its CRS is {file_crs}, but other bands of the record have {crs}."
                )
            crs = file_crs if file_crs is not None else crs
        except RasteretError as error:
            failures.append(BuildFailure(record=source.id, band=name, href=redact(asset.href), error=error))
            continue
        bands.update(found)
        if corners is None:
            corners = _corners(file)
    return _OpenedRecord(source=source, crs=crs, bands=bands, corners=corners) if bands else None


def _bands_of(name: str, asset: SourceAsset, file: OpenedFile) -> dict[str, tuple[SourceAsset, CogMetadata]]:
    count = file.header.count
    if name == "*":
        described = [str(band.description or "") for band in file.header.bands]
        is_named = all(described) and len(set(described)) == count
        names = asset.band_names or (described if is_named else [f"B{i + 1}" for i in range(count)])
        if len(names) != count:
            raise DataError(
                f"{redact(asset.href)}: the file has {count} bands, but got {len(names)} names: {list(names)}."
            )
        assets = {n: replace(asset, band_index=i if count > 1 else None) for i, n in enumerate(names)}
    elif asset.band_index is None and count > 1 and len(asset.band_names) == count:
        assets = {n: replace(asset, band_index=i) for i, n in enumerate(asset.band_names)}
    else:
        index = asset.band_index
        if index is None and count > 1:
            raise DataError(
                f"{redact(asset.href)}: the file has {count} bands, and nothing says which one is {name!r}; give "
                "(column, index) for a table, or list `bands` in the STAC asset."
            )
        if index is not None and not 0 <= index < count:
            raise DataError(
                f"{redact(asset.href)}: the band index must be < {count}, the number of bands, got {index}."
            )
        assets = {name: asset}
    return {n: (a, _with_source_values(file.band(a.band_index or 0), a)) for n, a in assets.items()}


def _with_source_values(metadata: CogMetadata, asset: SourceAsset) -> CogMetadata:
    return replace(
        metadata,
        scale=metadata.scale if asset.scale is None else float(asset.scale),
        offset=metadata.offset if asset.offset is None else float(asset.offset),
        nodata=asset.nodata if metadata.nodata is None else metadata.nodata,
    )


def _corners(file: OpenedFile) -> npt.NDArray[np.float64] | None:
    t, image = file.header.transform, file.header.image
    if t is None:
        return None
    w, h = image.width, image.height
    return np.array([t @ corner for corner in ((0, 0), (w, 0), (w, h), (0, h))], np.float64)


def _footprints(records: Sequence[_OpenedRecord]) -> list[bytes | None]:
    """Each record's geometry, else the outline of its raster; outlines are transformed together, CRS by CRS."""
    footprints: list[bytes | None] = [record.source.geometry for record in records]
    outlines = [i for i, r in enumerate(records) if footprints[i] is None and r.corners is not None and r.crs]
    for crs in dict.fromkeys(str(records[i].crs) for i in outlines):
        rows = [i for i in outlines if records[i].crs == crs]
        polygons = shapely.polygons(np.array([records[i].corners for i in rows]))
        for i, footprint in zip(rows, _to_lonlat(polygons, crs), strict=True):
            footprints[i] = footprint
    return footprints


def _to_lonlat(polygons: npt.NDArray[np.object_], crs: str) -> list[bytes | None]:
    """Polygons as WKB in longitude/latitude; None if there is no transformation (another planet, a local CRS)."""
    try:
        moved = transform_geometries(polygons, crs, LONLAT)
    except UsageError:
        return [None] * len(polygons)
    valid = np.isfinite(shapely.bounds(moved)).all(axis=1) & ~shapely.is_empty(moved)
    return [wkb if good else None for wkb, good in zip(shapely.to_wkb(moved), valid, strict=True)]


def join_rows(groups: Sequence[RecordRows], *, name: str, data_source: str) -> pa.Table:
    """Concatenate rows to the table of a Collection; `name` and `data_source` go to the file's metadata."""
    records = [record for group in groups for record in group.records]
    crs = [text for group in groups for text in group.crs]
    bands = list(dict.fromkeys(band for group in groups for band in group.metadata))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        "id": pa.array([record.id for record in records], pa.string()),
        "datetime": pa.array([record.datetime for record in records], pa.timestamp("us")),
        "geometry": pa.chunked_array([group.geometry for group in groups], pa.binary()),
        "assets": pa.chunked_array([_asset_structs(group, bands) for group in groups]),
    }
    if any(record.collection for record in records):
        columns["collection"] = pa.array([record.collection or None for record in records], pa.string())
    for key in dict.fromkeys(key for record in records for key in record.properties if not is_reserved(key)):
        columns[key] = _property_column([record.properties.get(key) for record in records])
    columns["proj:epsg"] = pa.array([epsg_code(text) for text in crs], pa.int32())
    columns["crs"] = pa.array(crs, pa.string())
    for band in bands:
        chunks = [
            group.metadata[band] if band in group.metadata else pa.nulls(len(group.records), BAND_STRUCT)
            for group in groups
        ]
        columns[f"{band}{METADATA_SUFFIX}"] = pa.chunked_array(chunks, BAND_STRUCT)
    columns["bbox"] = bbox_array(np.concatenate([group.bounds for group in groups]))
    geometry_types = frozenset[str]().union(*(group.geometry_types for group in groups))
    metadata = _file_metadata(records, name, data_source) | geo_metadata(geometry_types)
    return pa.table(columns).replace_schema_metadata(metadata)


def _asset_structs(group: RecordRows, bands: list[str]) -> pa.StructArray:
    nulls = pa.nulls(len(group.records), _ASSET_STRUCT)
    return pa.StructArray.from_arrays([group.assets.get(band, nulls) for band in bands], names=bands)


def _property_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # the items give one property several types
        return pa.array([None if v is None else str(v) for v in values], pa.string())


def _file_metadata(records: Sequence[SourceRecord], name: str, data_source: str) -> dict[bytes, bytes]:
    dates = [record.datetime for record in records if record.datetime is not None]
    metadata = {
        "name": name,
        "data_source": data_source,
        "description": "",
        "created": dt.datetime.now(dt.UTC).replace(tzinfo=None).isoformat(timespec="seconds"),
        "date_range": f"{min(dates).isoformat()},{max(dates).isoformat()}" if dates else "",
        "rasteret_collection_version": "1",
    }
    return {key.encode(): value.encode() for key, value in metadata.items()}
