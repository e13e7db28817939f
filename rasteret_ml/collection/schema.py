"""The Parquet schema of a Collection: rasteret's columns and structs, plus the children that exact pixels need.

Source: the tables that rasteret 0.3 and 0.4 write (`COG_BAND_METADATA_STRUCT`), and GeoParquet 1.1.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from rasteret_ml.errors import CollectionError, UsageError

METADATA_SUFFIX = "_metadata"  #: Ending of the columns that hold a band's header and tile table.

# rasteret's COG_BAND_METADATA_STRUCT, in its order.
_RASTERET_FIELDS = [
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

_STORAGE_FIELDS = [
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
_BAND_ONLY = {"transform", "pixel_scale", "tiepoint", "nodata"}
# Type of a mask or an overview.
_TILE_TABLE = pa.struct([(n, t) for n, t in _RASTERET_FIELDS if n not in _BAND_ONLY] + _STORAGE_FIELDS)

#: Type of a `{band}_metadata` column.
BAND_STRUCT = pa.struct(
    [
        *_RASTERET_FIELDS,
        *_STORAGE_FIELDS,
        ("nodata_int", pa.int64()),
        ("mask", _TILE_TABLE),
        ("overviews", pa.list_(_TILE_TABLE)),
        ("overview_masks", pa.list_(_TILE_TABLE)),
        ("mask_sample", pa.int32()),
        ("mask_is_alpha", pa.bool_()),
        ("overview_resampling", pa.string()),
        ("scale", pa.float64()),
        ("offset", pa.float64()),
        ("file_size", pa.int64()),
        ("etag", pa.string()),
    ]
)

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
BBOX_STRUCT = pa.struct([(corner, pa.float64()) for corner in _CORNERS])  #: Type of the `bbox` column.

_TILE_ARRAYS = {"tile_offsets", "tile_byte_counts", "mask", "overviews", "overview_masks", "jpeg_tables"}
_REQUIRED = {"id": pa.types.is_string, "datetime": pa.types.is_timestamp, "assets": pa.types.is_struct}
# Columns that this library writes (`year` and `month` are the folders of the hive layout).
_RESERVED = {"id", "datetime", "bbox", "geometry", "assets", "collection", "crs", "proj:epsg", "year", "month"}


def check_schema(schema: pa.Schema, source: str) -> None:
    """Raise `CollectionError` if a table, called `source` in the message, lacks columns of a Collection."""
    problems = []
    for name, accepts in _REQUIRED.items():
        if name not in schema.names:
            problems.append(f"no column {name!r}")
        elif not accepts(schema.field(name).type) and not (
            name == "id" and schema.field(name).type == pa.large_string()
        ):
            problems.append(f"column {name!r} is {schema.field(name).type}")
    if not any(n.endswith(METADATA_SUFFIX) and pa.types.is_struct(schema.field(n).type) for n in schema.names):
        problems.append("no '{band}_metadata' column: make the Collection with rasteret_ml.build")
    if problems:
        raise CollectionError(f"{source} is not a Collection: {'; '.join(problems)}.")


def is_reserved(name: str) -> bool:
    """Whether a column name is one of the schema's own, such as `id` or `B04_metadata`."""
    return name in _RESERVED or name.endswith(METADATA_SUFFIX)


def header_fields(band_struct: pa.StructType) -> list[str]:
    """Names of a band struct's children other than its tile arrays."""
    return [field.name for field in band_struct if field.name not in _TILE_ARRAYS]


def to_column(name: str, values: Any, count: int) -> pa.ChunkedArray:
    """Convert the `count` values of a column that a user adds; see `Collection.with_column`."""
    if not isinstance(name, str) or not name or is_reserved(name):
        raise UsageError(f"A new column must not have a reserved name, got {name!r}; choose another name.")
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise UsageError(f"with_column({name!r}) needs one value per record, got {values!r}.")
    if len(values) != count:
        raise UsageError(f"with_column({name!r}) got {len(values)} values for {count} records.")
    try:
        column = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UsageError(f"with_column({name!r}) needs values of one type: {error}") from None
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def set_column(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    """Return the table with a column replaced in place, or appended if it has none of this name."""
    index = table.schema.get_field_index(name)
    return table.append_column(name, column) if index < 0 else table.set_column(index, name, column)


def geo_metadata(geometry_types: Iterable[str]) -> dict[bytes, bytes]:
    """GeoParquet 1.1.0 file metadata: WKB in CRS84 with a bounding-box covering."""
    column = {
        "encoding": "WKB",
        "geometry_types": sorted(geometry_types),
        "covering": {"bbox": {corner: ["bbox", corner] for corner in _CORNERS}},
    }
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
    return {b"geo": json.dumps(geo).encode()}


def bbox_array(bounds: np.ndarray[Any, np.dtype[np.float64]]) -> pa.StructArray:
    """Bounds `[N, 4]` as the `bbox` column; rows with NaN are null."""
    null = np.isnan(bounds).any(axis=1)
    columns = [pa.array(bounds[:, i]) for i in range(4)]
    return pa.StructArray.from_arrays(columns, fields=list(BBOX_STRUCT), mask=pa.array(null))


def geoarrow_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema with its geometry column tagged as GeoArrow WKB in OGC:CRS84."""
    index = schema.get_field_index("geometry")
    if index < 0:
        return schema
    tags = {"ARROW:extension:name": "geoarrow.wkb", "ARROW:extension:metadata": json.dumps({"crs": "OGC:CRS84"})}
    return schema.set(index, schema.field(index).with_metadata(tags))
