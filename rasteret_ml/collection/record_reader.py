"""Rows of an Arrow batch as `RasterInfo`; structs are converted to Python only when they are accessed.

Arrow's own scalars are twenty times as slow as numpy for the numbers of a band, which has a hundred fields.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.raster.raster_info import RasterInfo

RowReader = Callable[[int], Any]  #: Returns a column's value at a row.


def _row_reader(array: pa.Array | None, kind: pa.DataType) -> RowReader:
    """Return a function from row number to Python value: structs as dicts, lists of numbers as numpy views.

    `kind` is the type to read the array as: struct children that the array lacks are None.
    """
    if array is None or array.null_count == len(array):
        return lambda i: None
    if pa.types.is_struct(kind):
        return _struct_reader(array, kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _list_reader(array, kind)
    if not (_is_number(array.type) or pa.types.is_boolean(array.type)):
        return lambda i: array[i].as_py()
    if not array.null_count:
        item: RowReader = array.to_numpy(zero_copy_only=False).item
        return item
    is_present = _presence(array)
    item = array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False).item
    return lambda i: item(i) if is_present(i) else None


def _struct_reader(array: pa.StructArray, kind: pa.StructType) -> RowReader:
    # Bands have a hundred children, most of them null: their readers are created with the first row read.
    readers: list[tuple[str, RowReader]] = []
    constants: dict[str, Any] = {}
    is_present = _presence(array)

    def read(i: int) -> dict[str, Any] | None:
        if not is_present(i):
            return None
        if not constants:
            for name, (child, child_kind) in _children(array, kind).items():
                constants[name] = None
                if child is None or child.null_count == len(child):
                    continue
                if not pa.types.is_nested(child_kind) and _is_constant(child):
                    constants[name] = child[0].as_py()  # usual: the files of a Collection are alike
                else:
                    readers.append((name, _row_reader(child, child_kind)))
        value = constants.copy()
        for name, read_child in readers:
            value[name] = read_child(i)
        return value

    return read


def _is_constant(array: pa.Array) -> bool:
    if array.null_count:
        return False
    if _is_number(array.type):  # ten times as fast as pc.unique
        numbers = array.to_numpy()
        return bool((numbers == numbers[0]).all())
    return len(pc.unique(array)) == 1


def _list_reader(array: pa.ListArray, kind: pa.ListType) -> RowReader:
    offsets, values, is_present = array.offsets.to_numpy(), array.values, _presence(array)
    if _is_number(kind.value_type):
        if values.null_count:
            return lambda i: array[i].values.to_numpy(zero_copy_only=False) if is_present(i) else None
        numbers = values.to_numpy()
        return lambda i: numbers[offsets[i] : offsets[i + 1]] if is_present(i) else None
    item_reader = functools.cache(lambda: _row_reader(values, kind.value_type))

    def read(i: int) -> list[Any] | None:
        if not is_present(i):
            return None
        return [item_reader()(j) for j in range(int(offsets[i]), int(offsets[i + 1]))]

    return read


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _presence(array: pa.Array | None) -> Callable[[int], bool]:
    """Return a function from row number to whether the value is not null."""
    if array is None:
        return lambda i: False
    if not array.null_count:
        return lambda i: True
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda i: bool(valid[i])


#: Array and type by name; None = a column that is null throughout.
Columns = Mapping[str, tuple[pa.Array | None, pa.DataType]]


def _children(structs: pa.StructArray | None, kind: pa.StructType) -> Columns:
    """Children of a struct by the names of `kind`."""
    if structs is None:
        return {}
    fields = [kind.field(k) for k in range(kind.num_fields)]
    indices = [structs.type.get_field_index(field.name) for field in fields]
    return {f.name: (structs.field(i) if i >= 0 else None, f.type) for f, i in zip(fields, indices, strict=True)}


class _LazyColumns:
    """Columns whose readers are created on first use."""

    def __init__(self, columns: Columns) -> None:
        self.names = tuple(columns)
        self.reader = functools.cache(lambda name: _row_reader(*columns[name]))
        self.presence = functools.cache(lambda name: _presence(columns[name][0]))


class LazyMapping(Mapping[str, Any]):
    """One row's values by column name, each converted from Arrow on first access; read-only.

    Copies and pickles as a dict of Python values.
    """

    __slots__ = ("_columns", "_row", "_values")

    def __init__(self, columns: _LazyColumns, row: int) -> None:
        self._columns = columns
        self._row = row
        self._values: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            self._values[name] = self._columns.reader(name)(self._row)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)

    def present(self) -> list[str]:
        """Names whose value is not null; converts nothing."""
        return [name for name in self if self._columns.presence(name)(self._row)]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"  # values may carry secrets


class RecordReader:
    """Reads the rows of one batch as records.

    Args:
        batch: The rows.
        schema: Types to read the columns as; default the batch's own. Struct children that the batch lacks are None.
    """

    def __init__(self, batch: pa.RecordBatch, schema: pa.Schema | None = None) -> None:
        schema = batch.schema if schema is None else schema
        columns = {n: (a, schema.field(n).type) for n, a in zip(batch.schema.names, batch.columns, strict=True)}
        assets, kind = columns.pop("assets", (None, None))
        bands = {name: column for name, column in columns.items() if name.endswith(METADATA_SUFFIX)}
        self._has_assets = _presence(assets)
        self._assets = _LazyColumns(_children(assets, kind))
        self._bands = _LazyColumns(bands)
        self._readers = {name: _row_reader(*column) for name, column in columns.items() if name not in bands}

    def record(self, i: int, row: int) -> RasterInfo:
        """Read row `i` of the batch, which is row `row` of the Collection."""
        box, when, epsg, text = (self._value(n, i) for n in ("bbox", "datetime", "proj:epsg", "crs"))
        if isinstance(when, dt.datetime) and when.tzinfo is not None:
            when = when.astimezone(dt.UTC).replace(tzinfo=None)
        return RasterInfo(
            id=str(self._value("id", i)),
            datetime=when.to_pydatetime() if hasattr(when, "to_pydatetime") else when,
            bbox=None if box is None else tuple(float(box[k]) for k in ("xmin", "ymin", "xmax", "ymax")),  # type: ignore[arg-type]
            footprint=self._value("geometry", i),
            crs=epsg if epsg is not None else text or None,
            cloud_cover=self._value("eo:cloud_cover", i),
            assets=LazyMapping(self._assets, i) if self._has_assets(i) else {},
            band_metadata=LazyMapping(self._bands, i),
            collection=self._value("collection", i) or "",
            row=row,
        )

    def _value(self, name: str, i: int) -> Any:
        reader = self._readers.get(name)
        return None if reader is None else reader(i)
