"""Rows of an Arrow batch as `RasterInfo`; structs are converted to Python only when they are accessed.

Arrow's own scalars are twenty times as slow as numpy for the numbers of a band, which has a hundred fields.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.raster.raster_info import RasterInfo

RowReader = Callable[[int], Any]  #: Returns a column's value at a row.


def _row_reader(array: pa.Array) -> RowReader:
    """Return a function from row number to Python value: structs as dicts, lists of numbers as numpy views."""
    if array.null_count == len(array):
        return lambda i: None
    if pa.types.is_struct(array.type):
        return _struct_reader(array)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _list_reader(array)
    if not (_is_number(array.type) or pa.types.is_boolean(array.type)):
        return lambda i: array[i].as_py()
    if not array.null_count:
        item: RowReader = array.to_numpy(zero_copy_only=False).item
        return item
    is_present = _presence(array)
    item = array.fill_null(False if pa.types.is_boolean(array.type) else 0).to_numpy(zero_copy_only=False).item
    return lambda i: item(i) if is_present(i) else None


def _struct_reader(array: pa.StructArray) -> RowReader:
    # Bands have a hundred children, most of them null: their readers are created with the first row read.
    readers: list[tuple[str, RowReader]] = []
    constants: dict[str, Any] = {}
    is_present = _presence(array)

    def read(i: int) -> dict[str, Any] | None:
        if not is_present(i):
            return None
        if not constants:
            for name, child in _children(array).items():
                is_constant = _is_constant(child)  # usual: the files of a Collection are alike
                constants[name] = child[0].as_py() if is_constant else None
                if not is_constant:
                    readers.append((name, _row_reader(child)))
        value = constants.copy()
        for name, read_child in readers:
            value[name] = read_child(i)
        return value

    return read


def _is_constant(array: pa.Array) -> bool:
    if array.null_count or pa.types.is_nested(array.type):
        return bool(array.null_count == len(array))
    if _is_number(array.type):  # ten times as fast as pc.unique
        numbers = array.to_numpy()
        return bool((numbers == numbers[0]).all())
    return len(pc.unique(array)) == 1


def _list_reader(array: pa.ListArray) -> RowReader:
    offsets, values, is_present = array.offsets.to_numpy(), array.values, _presence(array)
    if _is_number(values.type):
        if values.null_count:
            return lambda i: array[i].values.to_numpy(zero_copy_only=False) if is_present(i) else None
        numbers = values.to_numpy()
        return lambda i: numbers[offsets[i] : offsets[i + 1]] if is_present(i) else None
    item_reader = functools.cache(lambda: _row_reader(values))

    def read(i: int) -> list[Any] | None:
        if not is_present(i):
            return None
        return [item_reader()(j) for j in range(int(offsets[i]), int(offsets[i + 1]))]

    return read


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _presence(array: pa.Array) -> Callable[[int], bool]:
    """Return a function from row number to whether the value is not null."""
    if not array.null_count:
        return lambda i: True
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda i: bool(valid[i])


def _children(structs: pa.StructArray) -> dict[str, pa.Array]:
    return {field.name: structs.field(k) for k, field in enumerate(structs.type)}


class _LazyColumns:
    """Columns whose readers are created on first use."""

    def __init__(self, columns: Mapping[str, pa.Array]) -> None:
        self.names = tuple(columns)
        self.reader = functools.cache(lambda name: _row_reader(columns[name]))
        self.presence = functools.cache(lambda name: _presence(columns[name]))


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
    """Reads the rows of one batch as records."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns["datetime"] = columns["datetime"].cast(pa.timestamp("us"), safe=False)  # UTC without a time zone
        assets = columns.pop("assets")
        bands = {name: column for name, column in columns.items() if name.endswith(METADATA_SUFFIX)}
        self._has_assets = _presence(assets)
        self._assets = _LazyColumns(_children(assets))
        self._bands = _LazyColumns(bands)
        self._readers = {name: _row_reader(column) for name, column in columns.items() if name not in bands}

    def record(self, i: int, row: int) -> RasterInfo:
        """Read row `i` of the batch, which is row `row` of the Collection."""
        box, when, epsg, text = (self._value(n, i) for n in ("bbox", "datetime", "proj:epsg", "crs"))
        return RasterInfo(
            id=str(self._value("id", i)),
            datetime=when,
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
