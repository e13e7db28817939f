"""Columns that people add to a Collection."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.errors import UsageError

__all__ = ["column_of_values", "placed"]

_CONTRACT = {"id", "datetime", "bbox", "geometry", "assets", "collection", "crs", "proj:epsg", "year", "month"}
"""What says which raster a row is, where and when (`year` and `month` are the folders it is written to)."""


def column_of_values(name: str, values: Any, count: int) -> pa.ChunkedArray:
    """Values of `count` rows as the column of a name.

    Raises:
        UsageError: a name of the contract, another number of values, or values that Arrow has no type for.
    """
    if not isinstance(name, str) or not name or name in _CONTRACT or name.endswith(METADATA_SUFFIX):
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
