"""The Parquet contract: rasteret's columns and structs, and the extra children that right pixels need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from rasteret_ml.errors import CollectionError, UsageError

__all__ = [
    "BAND_STRUCT",
    "BBOX_STRUCT",
    "METADATA_SUFFIX",
    "bbox_array",
    "check_schema",
    "column_of_values",
    "geo_metadata",
    "geoarrow_schema",
    "light_band_struct",
    "placed",
    "struct_to_python",
]

_RESERVED = {"id", "datetime", "bbox", "geometry", "assets", "collection", "crs", "proj:epsg", "year", "month"}
"""What says which raster a row is, where and when (`year` and `month` are the folders it is written to)."""


def column_of_values(name: str, values: Any, count: int) -> pa.ChunkedArray:
    """Values of `count` rows as the column of a name.

    Raises:
        UsageError: a name of the contract, another number of values, or values that Arrow has no type for.
    """
    if not isinstance(name, str) or not name or name in _RESERVED or name.endswith(METADATA_SUFFIX):
        raise UsageError(f"{name!r} cannot be the name of a column of one's own: it says what the raster is.")
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise UsageError(f"with_column({name!r}) takes one value for each record, not {values!r}.")
    if len(values) != count:
        raise UsageError(f"with_column({name!r}) was given {len(values)} values for {count} records.")
    try:
        column = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UsageError(f"with_column({name!r}): these values have no one type: {error}") from None
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def placed(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """The table with a column, added or, where it has one of this name, in that one's place."""
    place = table.schema.get_field_index(name)
    return table.append_column(name, column) if place < 0 else table.set_column(place, name, column)


METADATA_SUFFIX = "_metadata"
"""Ending of the columns that hold a band's tile table."""

_CONTRACT = [
    ("image_width", pa.int32()),
    ("image_height", pa.int32()),
    ("tile_width", pa.int32()),
    ("tile_height", pa.int32()),
    ("dtype", pa.string()),
    ("transform", pa.list_(pa.float64())),
    ("predictor", pa.int32()),
    ("compression", pa.int32()),
    ("tile_offsets", pa.list_(pa.int64())),
    ("tile_byte_counts", pa.list_(pa.int64())),
    ("pixel_scale", pa.list_(pa.float64())),
    ("tiepoint", pa.list_(pa.float64())),
    ("nodata", pa.float64()),
    ("samples_per_pixel", pa.int32()),
    ("planar_configuration", pa.int32()),
    ("photometric", pa.int32()),
    ("extra_samples", pa.list_(pa.int32())),
]
"""rasteret's COG_BAND_METADATA_STRUCT, name by name."""

_STORAGE = [
    ("bits_per_sample", pa.int32()),
    ("big_endian", pa.bool_()),
    ("fill_order", pa.int32()),
    ("striped", pa.bool_()),
    ("jpeg_tables", pa.binary()),
    ("ycbcr_subsampling", pa.list_(pa.int32())),
    ("ycbcr_coefficients", pa.list_(pa.float64())),
    ("block_leaders", pa.bool_()),
    ("sidecar", pa.struct([("suffix", pa.string()), ("size", pa.int64()), ("etag", pa.string())])),
]
_NOT_OF_A_TABLE = {"transform", "pixel_scale", "tiepoint", "nodata"}
_TABLE = pa.struct([(n, t) for n, t in _CONTRACT if n not in _NOT_OF_A_TABLE] + _STORAGE)

BAND_STRUCT = pa.struct(
    [
        *_CONTRACT,
        *_STORAGE,
        ("nodata_int", pa.int64()),
        ("mask", _TABLE),
        ("overviews", pa.list_(_TABLE)),
        ("overview_masks", pa.list_(_TABLE)),
        ("mask_sample", pa.int32()),
        ("mask_is_alpha", pa.bool_()),
        ("overview_resampling", pa.string()),
        ("scale", pa.float64()),
        ("offset", pa.float64()),
        ("file_size", pa.int64()),
        ("etag", pa.string()),
    ]
)
"""Type of a `{band}_metadata` column."""

_TILE_ARRAYS = {"tile_offsets", "tile_byte_counts", "mask", "overviews", "overview_masks", "jpeg_tables"}
_REQUIRED = {"id": pa.types.is_string, "datetime": pa.types.is_timestamp, "assets": pa.types.is_struct}


def check_schema(schema: pa.Schema, where: str) -> None:
    """Refuse a table that is not a Collection.

    Raises:
        CollectionError: what is missing or of the wrong type, and where.
    """
    problems = []
    for name, accepts in _REQUIRED.items():
        if name not in schema.names:
            problems.append(f"no column {name!r}")
        elif not (
            accepts(schema.field(name).type) or (name == "id" and pa.types.is_large_string(schema.field(name).type))
        ):
            problems.append(f"column {name!r} is {schema.field(name).type}")
    if not any(n.endswith(METADATA_SUFFIX) and pa.types.is_struct(schema.field(n).type) for n in schema.names):
        problems.append("no '{band}_metadata' column: make the Collection with rasteret_ml.build")
    if problems:
        raise CollectionError(f"{where} is not a Collection: {'; '.join(problems)}.")


def light_band_struct(kind: pa.StructType) -> list[str]:
    """The children of a band's struct that say what it is, without its tile arrays."""
    return [kind.field(i).name for i in range(kind.num_fields) if kind.field(i).name not in _TILE_ARRAYS]


def struct_to_python(scalar: pa.Scalar) -> Any:
    """An Arrow value as Python: structs as dicts, lists of numbers as numpy arrays (never Python integers)."""
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if pa.types.is_struct(kind):
        return {name: struct_to_python(scalar[name]) for name in kind.names}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type):
            return scalar.values.to_numpy(zero_copy_only=False)
        return [struct_to_python(value) for value in scalar.values]
    return scalar.as_py()


def geo_metadata(geometry_types: Iterable[str]) -> Mapping[bytes, bytes]:
    """GeoParquet 1.1.0 file metadata: WKB in CRS84 with a bounding-box covering."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    column = {
        "encoding": "WKB",
        "geometry_types": sorted(geometry_types),
        "covering": {"bbox": {corner: ["bbox", corner] for corner in corners}},
    }
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return {b"geo": json.dumps(geo).encode()}


BBOX_STRUCT = pa.struct([(corner, pa.float64()) for corner in ("xmin", "ymin", "xmax", "ymax")])
"""Type of the `bbox` column."""


def bbox_array(bounds: np.ndarray[Any, np.dtype[np.float64]]) -> pa.StructArray:
    """Bounds `[N, 4]` as the `bbox` column; rows with NaN are null."""
    null = np.isnan(bounds).any(axis=1)
    columns = [pa.array(bounds[:, i]) for i in range(4)]
    return pa.StructArray.from_arrays(columns, fields=list(BBOX_STRUCT), mask=pa.array(null))


def geoarrow_schema(schema: pa.Schema) -> pa.Schema:
    """`schema` with its geometry column named as GeoArrow WKB in OGC:CRS84, for who asks Arrow what it is."""
    place = schema.get_field_index("geometry")
    if place < 0:
        return schema
    facts = {"ARROW:extension:name": "geoarrow.wkb", "ARROW:extension:metadata": json.dumps({"crs": "OGC:CRS84"})}
    return schema.set(place, schema.field(place).with_metadata(facts))
