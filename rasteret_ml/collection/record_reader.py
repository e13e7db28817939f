"""Rows of an Arrow batch as `RasterInfo`; structs are converted to Python only when they are accessed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.raster.raster_info import RasterInfo

__all__ = ["LazyMapping", "RecordReader"]

RowReader = Callable[[int], Any]
"""Returns a column's value at a row."""


def _row_reader(array: pa.Array, kind: pa.DataType | None = None) -> RowReader:
    """Return a function from row number to Python value: structs as dicts, lists of numbers as numpy views.

    Args:
        array: One column.
        kind: Type to read it as, if the column was written with another; struct children that it lacks are None.
    """
    kind = array.type if kind is None else kind
    if array.null_count == len(array):
        return _read_none
    if pa.types.is_struct(kind):
        return _struct_reader(array, kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _list_reader(array, kind)
    if _is_number(array.type) or pa.types.is_boolean(array.type):
        return _number_reader(array)
    return lambda i: array[i].as_py()


def _number_reader(array: pa.Array) -> RowReader:
    # Twenty times as fast as an Arrow scalar, and a band has twenty numbers.
    if not array.null_count:
        number: RowReader = array.to_numpy(zero_copy_only=False).item
        return number
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
    if pa.types.is_boolean(array.type):
        return array.true_count in (0, len(array))
    return len(pc.unique(array)) == 1


def _list_reader(array: pa.ListArray, kind: pa.ListType) -> RowReader:
    offsets, values, is_present = array.offsets.to_numpy(), array.values, _presence(array)
    if _is_number(kind.value_type):
        if values.null_count:
            return lambda i: array[i].values.to_numpy(zero_copy_only=False) if is_present(i) else None
        numbers = values.to_numpy()
        return lambda i: numbers[offsets[i] : offsets[i + 1]] if is_present(i) else None
    item_readers: list[RowReader] = []

    def read(i: int) -> list[Any] | None:
        if not is_present(i):
            return None
        if offsets[i] == offsets[i + 1]:
            return []
        if not item_readers:
            item_readers.append(_row_reader(values, kind.value_type))
        return [item_readers[0](j) for j in range(int(offsets[i]), int(offsets[i + 1]))]

    return read


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _presence(array: pa.Array) -> Callable[[int], bool]:
    """Return a function from row number to whether the value is not null."""
    if not array.null_count:
        return _always
    if array.null_count == len(array):
        return _never
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda i: bool(valid[i])


def _read_none(i: int) -> None:
    return None


def _always(i: int) -> bool:
    return True


def _never(i: int) -> bool:
    return False


Columns = Mapping[str, tuple[pa.Array | None, pa.DataType]]
"""Array and type by name; None = a column that is null throughout."""


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
        self.columns = columns
        self._readers: dict[str, RowReader] = {}
        self._presences: dict[str, Callable[[int], bool]] = {}

    def reader(self, name: str) -> RowReader:
        reader = self._readers.get(name)
        if reader is None:
            array, kind = self.columns[name]
            reader = self._readers[name] = _read_none if array is None else _row_reader(array, kind)
        return reader

    def presence(self, name: str) -> Callable[[int], bool]:
        presence = self._presences.get(name)
        if presence is None:
            array, _ = self.columns[name]
            presence = self._presences[name] = _never if array is None else _presence(array)
        return presence


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
        return iter(self._columns.columns)

    def __len__(self) -> int:
        return len(self._columns.columns)

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
        schema: Types to read the columns as, see `_row_reader`; default the batch's own.
    """

    def __init__(self, batch: pa.RecordBatch, schema: pa.Schema | None = None) -> None:
        schema = batch.schema if schema is None else schema
        columns = {n: (a, schema.field(n).type) for n, a in zip(batch.schema.names, batch.columns, strict=True)}
        assets, kind = columns.pop("assets", (None, None))
        self._has_assets = _never if assets is None else _presence(assets)
        self._assets = _LazyColumns(_children(assets, kind))
        self._bands = _LazyColumns({n: column for n, column in columns.items() if n.endswith(METADATA_SUFFIX)})
        self._readers = {n: _row_reader(*column) for n, column in columns.items() if n not in self._bands.columns}

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
