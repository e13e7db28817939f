"""Turn any source of rasters into `SourceRecord`s: paths and URLs, tables, STAC items. No header is read here."""

from __future__ import annotations

import datetime as dt
import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from rasteret_ml.collection.build.record_rows import SourceAsset, SourceRecord, to_naive_utc
from rasteret_ml.collection.build.stac import TIFF_ENDINGS, is_stac, items_from, record_from_item
from rasteret_ml.errors import UsageError, redact
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.storage.urls import is_remote, local_path

_log = logging.getLogger(__name__)
_JSON = (".json", ".geojson")
_DATE = re.compile(r"(?<!\d)((?:19|20)\d{2})([-_]?)(0[1-9]|1[0-2])\2(0[1-9]|[12]\d|3[01])(?!\d)")
_SEPARATORS = "_-. "


def read_source(
    source: Any,
    bands: Sequence[str] | Mapping[str, Any] | None,
    columns: Mapping[str, str] | None,
    datetime: str | None,
    data_source: str | None,
) -> list[SourceRecord]:
    """Return the records of a source; arguments and errors as for `build`."""
    if isinstance(bands, str):
        raise UsageError(f"bands must be a list of names, got {bands!r}; pass [{bands!r}].")
    if isinstance(source, pd.DataFrame) or hasattr(source, "__arrow_c_stream__"):
        return records_from_table(as_arrow_table(source), bands, columns or {}, data_source)
    parts = list(source) if isinstance(source, (list, tuple, set, frozenset)) else [source]
    parts = [os.fspath(part) if isinstance(part, os.PathLike) else part for part in parts]
    paths = [part for part in parts if isinstance(part, str)]
    if len(paths) == 1 == len(parts) and paths[0].endswith((".parquet", ".geoparquet")):
        return records_from_table(as_arrow_table(paths[0]), bands, columns or {}, data_source)
    if columns:
        raise UsageError("columns= is for tables, but the source is files or STAC items; leave it out.")
    if isinstance(bands, Mapping):
        raise UsageError("bands= must be a list of names for files and STAC items; a mapping is for tables.")
    names = None if bands is None else list(bands)
    items = [part for part in parts if not isinstance(part, str)]
    for item in items:
        if not is_stac(item):
            raise UsageError(f"source must be paths, a table or STAC items, got {type(item).__name__}.")
    files = expand_paths([path for path in paths if not path.endswith(_JSON)])
    json_paths = [path for path in paths if path.endswith(_JSON)] + [f for f in files if f.endswith(_JSON)]
    records = [
        record_from_item(item, base, names, data_source)
        for origin in [*items, *expand_paths(json_paths)]
        for item, base in items_from(origin)
    ]
    return records + records_from_files([f for f in files if not f.endswith(_JSON)], names, datetime)


# Files --------------------------------------------------------------------------------------------------


def expand_paths(paths: Sequence[str]) -> list[str]:
    """List the files that paths, globs, folders (all TIFFs below), `.txt` lists (one path per line) and URLs mean.

    Raises UsageError if a glob, folder or list has no files.
    """
    found: list[str] = []
    for path in paths:
        local = local_path(path)
        if is_remote(path):
            files = [path]
        elif local.endswith(".txt"):
            try:
                lines = [line.strip() for line in Path(local).read_text(encoding="utf-8").splitlines()]
            except OSError as error:
                raise UsageError(f"{redact(path)}: cannot be read ({error.strerror}).") from None
            files = expand_paths([line for line in lines if line and not line.startswith("#")])
        elif os.path.isdir(local):
            files = sorted(str(p) for p in Path(local).rglob("*") if p.suffix.lower() in TIFF_ENDINGS)
        elif glob.has_magic(local) and not os.path.exists(local):
            files = sorted(glob.glob(local, recursive=True))
        else:
            files = [local]
        if not files:
            raise UsageError(f"{redact(path)}: no files found; check the path.")
        found.extend(files)
    return list(dict.fromkeys(p if is_remote(p) else os.path.abspath(local_path(p)) for p in found))


def records_from_files(hrefs: Sequence[str], bands: Sequence[str] | None, datetime: str | None) -> list[SourceRecord]:
    """Group files into records.

    If every file name contains one of `bands` as a word (`…_B04.tif`, `B04.tif`), files in one folder that differ only
    in that word are one record. Otherwise each file is a record, and `bands` name its bands in order. `datetime`:
    "filename" reads a date (YYYYMMDD, YYYY-MM-DD) from the record's id; None = undated.
    """
    if datetime not in ("filename", None):
        raise UsageError(f"datetime must be 'filename' or None for files, got {datetime!r}.")
    matches = [_split_band(_path(href).stem, bands) for href in hrefs] if bands else []
    if matches and all(matches):
        return _group_by_band(hrefs, [match for match in matches if match], datetime)
    if any(matches):
        others = [redact(href) for href, match in zip(hrefs, matches, strict=True) if not match]
        reason = f"{len(others)} of {len(hrefs)} have no band in their name"
        _log.warning("files are not grouped by band: %s; leave them out or rename them: %s", reason, others[:3])
    return [
        SourceRecord(
            id=name,
            assets={"*": SourceAsset(href=href, band_names=tuple(bands or ()))},
            datetime=_find_date(name) if datetime else None,
        )
        for href, name in zip(hrefs, _unique_names(hrefs), strict=True)
    ]


def _group_by_band(
    hrefs: Sequence[str], matches: Sequence[tuple[str, str]], datetime: str | None
) -> list[SourceRecord]:
    groups: dict[tuple[str, str], dict[str, SourceAsset]] = {}
    for href, (band, rest) in zip(hrefs, matches, strict=True):
        assets = groups.setdefault((str(_path(href).parent), rest), {})
        if band in assets:
            raise UsageError(
                f"Two files have band {band} of one record: {redact(assets[band].href)}, {redact(href)}; leave one out."
            )
        assets[band] = SourceAsset(href=href)
    names = [rest or PurePosixPath(parent).name for parent, rest in groups]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    records = []
    for (parent, _), name, assets in zip(groups, names, groups.values(), strict=True):
        unique = f"{PurePosixPath(parent).name}/{name}" if name in repeated else name
        records.append(SourceRecord(id=unique, assets=assets, datetime=_find_date(unique) if datetime else None))
    return records


def _split_band(stem: str, bands: Sequence[str]) -> tuple[str, str] | None:
    """Return (band, rest of the stem) if the stem contains a band name as a word; the longest name wins."""
    for band in sorted(bands, key=len, reverse=True):
        match = re.search(rf"(?<![A-Za-z0-9]){re.escape(band)}(?![A-Za-z0-9])", stem, re.IGNORECASE)
        if match:
            before, after = stem[: match.start()], stem[match.end() :].strip(_SEPARATORS)
            separator = before[-1:] if after else ""
            return band, (before.rstrip(_SEPARATORS) + separator + after).strip(_SEPARATORS)
    return None


def _path(href: str) -> PurePosixPath:
    try:
        return PurePosixPath(unquote(urlsplit(href).path) if is_remote(href) else os.path.abspath(local_path(href)))
    except ValueError as error:
        raise UsageError(f"{redact(href)}: not a URL ({error}).") from None


def _unique_names(hrefs: Sequence[str]) -> list[str]:
    """Stems, preceded by as many parent folders as it takes to make them unique."""
    paths = [_path(href) for href in hrefs]
    depth, names = 1, [path.stem for path in paths]
    while len(set(names)) < len(names) and depth < 16:
        depth += 1
        names = ["/".join((*path.parts[-depth:-1], path.stem)) for path in paths]
    return names


def _find_date(name: str) -> dt.datetime | None:
    for year, _, month, day in _DATE.findall(name):
        try:
            return dt.datetime(int(year), int(month), int(day))
        except ValueError:
            continue
    return None


# Tables -------------------------------------------------------------------------------------------------


def as_arrow_table(source: Any) -> pa.Table:
    """Convert a data frame, Arrow object or Parquet path; geometry becomes WKB in longitude/latitude."""
    if isinstance(source, gpd.GeoDataFrame):
        return _with_lonlat(pa.table(source.to_arrow(index=False)), source)
    if isinstance(source, pd.DataFrame):
        return pa.Table.from_pandas(source, preserve_index=False)
    if isinstance(source, str):
        try:
            table = pq.read_table(source)
            geo = json.loads((table.schema.metadata or {}).get(b"geo", b"{}"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UsageError(f"{redact(source)}: cannot be read as Parquet ({error}).") from None
        column = geo.get("primary_column")
        return table if column is None else _with_lonlat(table, gpd.read_parquet(source, columns=[column]))
    table = pa.table(source)
    geometry = [field.name for field in table.schema if _extension_name(field).startswith("geoarrow")]
    return _with_lonlat(table, gpd.GeoDataFrame.from_arrow(table.select(geometry[:1]))) if geometry else table


def _extension_name(field: pa.Field) -> str:
    stored = (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    return str(getattr(field.type, "extension_name", None) or stored)


def _with_lonlat(table: pa.Table, geometry: gpd.GeoDataFrame) -> pa.Table:
    name, shapes = geometry.geometry.name, geometry.geometry.to_numpy()
    if geometry.crs is not None:
        shapes = transform_geometries(shapes, crs_text(geometry.crs), LONLAT)
    return table.set_column(table.column_names.index(name), name, pa.array(shapely.to_wkb(shapes), pa.binary()))


def records_from_table(
    table: pa.Table,
    bands: Mapping[str, Any] | Sequence[str] | None,
    columns: Mapping[str, str],
    data_source: str | None,
) -> list[SourceRecord]:
    """Return one record per row; arguments and errors as for `build`.

    `bands` maps to href columns, or to (column, band index) for files of several bands; a list if the columns are named
    like the bands; None only for STAC-GeoParquet, which has a column `assets` and needs the band registry
    `data_source`. Without an id column, rows are numbered.
    """
    unknown = set(columns) - {"id", "datetime", "geometry"}
    if unknown:
        raise UsageError(f"columns= must map id, datetime or geometry, got {sorted(unknown)}.")
    for role, name in columns.items():
        _check_column(table, name, f"columns[{role!r}]")
    has_assets = "assets" in table.column_names and pa.types.is_struct(table.schema.field("assets").type)
    by_column = isinstance(bands, Mapping) or (bands and set(bands) <= set(table.column_names))
    if has_assets and not by_column:
        names = None if bands is None else list(bands)
        return [record_from_item(_row_to_item(row), None, names, data_source) for row in table.to_pylist()]
    if not bands:
        raise UsageError(
            f"bands= must map bands to href columns, as {{'B04': 'column'}}; the columns are {table.column_names}."
        )
    mapping = bands if isinstance(bands, Mapping) else {band: band for band in bands}
    return list(_records_from_columns(table, mapping, columns))


def _records_from_columns(
    table: pa.Table, bands: Mapping[str, Any], columns: Mapping[str, str]
) -> Iterator[SourceRecord]:
    sources = {}
    for band, value in bands.items():
        column, index = value if isinstance(value, (tuple, list)) else (value, None)
        _check_column(table, column, f"band {band!r}")
        sources[band] = (column, index)
    role = {name: columns.get(name, name) for name in ("id", "datetime", "geometry")}
    used = {*role.values(), *(column for column, _ in sources.values())}
    unwanted = (pa.types.is_nested, pa.types.is_binary, pa.types.is_large_binary)
    others = [f.name for f in table.schema if f.name not in used and not any(is_kind(f.type) for is_kind in unwanted)]
    for i, row in enumerate(table.select([n for n in table.column_names if n in used or n in others]).to_pylist()):
        identifier = row.get(role["id"])
        yield SourceRecord(
            id=str(i if identifier is None else identifier),
            assets={
                band: SourceAsset(href=str(row[column]), band_index=index)
                for band, (column, index) in sources.items()
                if row[column]
            },
            datetime=to_naive_utc(row.get(role["datetime"])),
            geometry=row.get(role["geometry"]),
            properties={name: row[name] for name in others},
        )


def _row_to_item(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a row of STAC-GeoParquet to an item."""
    geometry = row.get("geometry")
    return {
        "id": row["id"],
        "collection": row.get("collection"),
        "assets": {key: asset for key, asset in row["assets"].items() if asset is not None},
        "properties": {k: v for k, v in row.items() if k not in ("id", "assets", "geometry", "collection")},
        "geometry": shapely.geometry.mapping(shapely.from_wkb(geometry)) if geometry else None,
    }


def _check_column(table: pa.Table, column: str, argument: str) -> None:
    if column not in table.column_names:
        raise UsageError(f"{argument}: the table has no column {column!r}; its columns are {table.column_names}.")
