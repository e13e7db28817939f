"""Drafts from tables: one row a record, one column of addresses per band."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import geopandas as gpd
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.collection.build.draft import AssetDraft, RecordDraft, naive_utc
from rasteret_ml.collection.build.stac import draft_from_item

__all__ = ["as_arrow_table", "drafts_from_table", "is_table"]


def is_table(source: Any) -> bool:
    """Whether `source` is a data frame or Arrow table."""
    return isinstance(source, pd.DataFrame) or hasattr(source, "__arrow_c_stream__")


def as_arrow_table(source: Any) -> pa.Table:
    """A data frame, Arrow object or Parquet path as an Arrow table; geometry becomes WKB in lon/lat."""
    if isinstance(source, gpd.GeoDataFrame):
        frame = pd.DataFrame(source.drop(columns=source.geometry.name))
        shapes = source.geometry.to_numpy()
        if source.crs is not None:
            shapes = transform_geometries(shapes, crs_text(source.crs), LONLAT)
        return pa.Table.from_pandas(frame, preserve_index=False).append_column(
            source.geometry.name, pa.array(shapely.to_wkb(shapes), pa.binary())
        )
    if isinstance(source, pd.DataFrame):
        return pa.Table.from_pandas(source, preserve_index=False)
    if isinstance(source, str):
        try:
            table = pq.read_table(source)
            geo = json.loads((table.schema.metadata or {}).get(b"geo", b"{}"))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UsageError(f"{source}: cannot be read as Parquet ({error}).") from None
        column = geo.get("primary_column")
        return table if column is None else _lonlat(table, gpd.read_parquet(source, columns=[column]))
    table = pa.table(source)
    tagged = [f.name for f in table.schema if _extension_name(f).startswith("geoarrow")]
    return _lonlat(table, gpd.GeoDataFrame.from_arrow(table.select(tagged[:1]))) if tagged else table


def _extension_name(field: pa.Field) -> str:
    named = (
        getattr(field.type, "extension_name", None) or (field.metadata or {}).get(b"ARROW:extension:name", b"").decode()
    )
    return str(named)


def _lonlat(table: pa.Table, geometry: gpd.GeoDataFrame) -> pa.Table:
    """`table` with its geometry column as plain WKB in longitude/latitude."""
    column, shapes = geometry.geometry.name, geometry.geometry.to_numpy()
    if geometry.crs is not None:
        shapes = transform_geometries(shapes, crs_text(geometry.crs), LONLAT)
    return table.set_column(table.column_names.index(column), column, pa.array(shapely.to_wkb(shapes), pa.binary()))


def drafts_from_table(
    table: pa.Table,
    bands: Mapping[str, Any] | Sequence[str] | None,
    columns: Mapping[str, str],
    data_source: str | None,
) -> list[RecordDraft]:
    """A draft per row.

    Args:
        table: The rows.
        bands: Band name to address column, or to (column, band index) for a file of several bands; a list
            where columns are named like bands. None only for STAC-GeoParquet, whose `assets` say it.
        columns: Which column is `id`, `datetime`, `geometry`; default those names. Without an id column, rows
            are numbered.
        data_source: Band registry, for STAC-GeoParquet.

    Raises:
        UsageError: a column that is not there.
    """
    unknown = set(columns) - {"id", "datetime", "geometry"}
    if unknown:
        raise UsageError(f"columns= maps id, datetime and geometry, not {sorted(unknown)}.")
    for role, name in columns.items():
        _need(table, name, f"columns[{role!r}]")
    is_stac = "assets" in table.column_names and pa.types.is_struct(table.schema.field("assets").type)
    by_column = isinstance(bands, Mapping) or (bands and set(bands) <= set(table.column_names))
    if is_stac and not by_column:
        return _from_stac_table(table, None if bands is None else list(bands), data_source)
    if not bands:
        raise UsageError(
            f"bands= must say which columns hold addresses, as {{'B04': 'column'}}; columns: {table.column_names}."
        )
    mapping = bands if isinstance(bands, Mapping) else {band: band for band in bands}
    return list(_from_columns(table, mapping, columns))


def _from_columns(table: pa.Table, bands: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[RecordDraft]:
    places = {}
    for band, place in bands.items():
        column, index = place if isinstance(place, (tuple, list)) else (place, None)
        _need(table, column, f"band {band!r}")
        places[band] = (column, index)
    role = {name: columns.get(name, name) for name in ("id", "datetime", "geometry")}
    used = {*role.values(), *(column for column, _ in places.values())}
    others = [n for n in table.column_names if n not in used and _is_scalar(table.schema.field(n).type)]
    for i, row in enumerate(table.select([n for n in table.column_names if n in used or n in others]).to_pylist()):
        assets = {
            band: AssetDraft(href=str(row[column]), band_index=index)
            for band, (column, index) in places.items()
            if row[column]
        }
        identifier = row.get(role["id"])
        yield RecordDraft(
            id=str(i if identifier is None else identifier),
            assets=assets,
            datetime=naive_utc(row.get(role["datetime"])),
            geometry=row.get(role["geometry"]),
            properties={name: row[name] for name in others},
        )


def _from_stac_table(table: pa.Table, bands: Sequence[str] | None, data_source: str | None) -> list[RecordDraft]:
    drafts = []
    for row in table.to_pylist():
        item = {
            "id": row["id"],
            "collection": row.get("collection"),
            "assets": {k: v for k, v in row["assets"].items() if v is not None},
            "properties": {k: v for k, v in row.items() if k not in ("id", "assets", "geometry", "collection")},
        }
        geometry = row.get("geometry")
        item["geometry"] = shapely.geometry.mapping(shapely.from_wkb(geometry)) if geometry else None
        drafts.append(draft_from_item(item, None, bands, data_source))
    return drafts


def _need(table: pa.Table, column: str, what: str) -> None:
    if column not in table.column_names:
        raise UsageError(f"{what}: the table has no column {column!r}; it has {table.column_names}.")


def _is_scalar(kind: pa.DataType) -> bool:
    return not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
