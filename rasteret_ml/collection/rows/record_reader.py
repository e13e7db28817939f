"""Rows of an Arrow table as records: a struct becomes Python values only once somebody asks for it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.raster.raster_info import RasterInfo

__all__ = ["RecordReader", "StoredMapping", "row_reader"]

RowReader = Callable[[int], Any]
"""Value of a row of one column."""


def row_reader(array: pa.Array, kind: pa.DataType | None = None) -> RowReader:
    """A function from a row of `array` to its value as Python: structs as dicts, lists of numbers as numpy views.

    `kind` is the type it should have: children that the array lacks are None.
    """
    kind = array.type if kind is None else kind
    if array.null_count == len(array):
        return _nothing
    if pa.types.is_struct(kind):
        return _struct_reader(array, kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _list_reader(array, kind)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type) or pa.types.is_boolean(array.type):
        return _number_reader(array)

    def value(i: int) -> Any:
        return array[i].as_py()

    return value


def _number_reader(array: pa.Array) -> RowReader:
    # Twenty times as fast as an Arrow scalar, and a band has twenty numbers.
    present = _present(array)
    known = array.fill_null(False if pa.types.is_boolean(array.type) else 0) if array.null_count else array
    numbers = known.to_numpy(zero_copy_only=False)
    number: RowReader = numbers.item
    if not array.null_count:
        return number
    return lambda i: number(i) if present(i) else None


def _nothing(i: int) -> None:
    return None


def _struct_reader(array: pa.StructArray, kind: pa.StructType) -> RowReader:
    # Bands have a hundred children, most of them null: readers are made when a row is first read.
    readers: list[tuple[str, RowReader]] = []
    blank: dict[str, Any] = {}
    present = _present(array)

    def value(i: int) -> dict[str, Any] | None:
        if not present(i):
            return None
        if not blank:
            for field in (kind.field(k) for k in range(kind.num_fields)):
                place = array.type.get_field_index(field.name)
                child = None if place < 0 else array.field(place)
                blank[field.name] = None
                if child is None or child.null_count == len(child):
                    continue
                if not pa.types.is_nested(field.type) and _is_constant(child):
                    blank[field.name] = child[0].as_py()  # of most children: files of one Collection are alike
                else:
                    readers.append((field.name, row_reader(child, field.type)))
        found = blank.copy()
        for name, read in readers:
            found[name] = read(i)
        return found

    return value


def _is_constant(array: pa.Array) -> bool:
    if array.null_count:
        return False
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):  # ten times as fast as to look for unique
        numbers = array.to_numpy()
        return bool((numbers == numbers[0]).all())
    if pa.types.is_boolean(array.type):
        return array.true_count in (0, len(array))
    return len(pc.unique(array)) == 1


def _list_reader(array: pa.ListArray, kind: pa.ListType) -> RowReader:
    offsets, values, present = array.offsets.to_numpy(), array.values, _present(array)
    inner: list[RowReader] = []
    if pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type):
        if values.null_count:
            return lambda i: array[i].values.to_numpy(zero_copy_only=False) if present(i) else None
        numbers = values.to_numpy()
        return lambda i: numbers[offsets[i] : offsets[i + 1]] if present(i) else None

    def value(i: int) -> list[Any] | None:
        if not present(i):
            return None
        if offsets[i] == offsets[i + 1]:
            return []
        if not inner:
            inner.append(row_reader(values, kind.value_type))
        return [inner[0](j) for j in range(int(offsets[i]), int(offsets[i + 1]))]

    return value


def _present(array: pa.Array) -> Callable[[int], bool]:
    if not array.null_count:
        return _always
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda i: bool(valid[i])


def _always(i: int) -> bool:
    return True


class StoredMapping(Mapping[str, Any]):
    """A row's values by name, each converted from Arrow when it is first asked for; read-only.

    Copies and pickles as a dict of plain values, of this row alone.
    """

    __slots__ = ("_held", "_present", "_readers", "_row")

    def __init__(
        self, readers: Mapping[str, RowReader], present: Mapping[str, Callable[[int], bool]], row: int
    ) -> None:
        self._readers = readers
        self._present = present
        self._row = row
        self._held: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._held:
            self._held[name] = self._readers[name](self._row)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def present(self) -> list[str]:
        """Names with a value that is not null; converts nothing."""
        return [name for name, has in self._present.items() if has(self._row)]

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._readers)})"  # values may carry secrets


class RecordReader:
    """The rows of one batch as records.

    Args:
        batch: The rows.
        schema: Types that its columns should have, see `row_reader`; default their own.
    """

    def __init__(self, batch: pa.RecordBatch, schema: pa.Schema | None = None) -> None:
        schema = batch.schema if schema is None else schema
        columns = {n: (a, schema.field(n).type) for n, a in zip(batch.schema.names, batch.columns, strict=True)}
        bands = {name for name in columns if name.endswith(METADATA_SUFFIX)}
        assets, kind = columns.pop("assets", (None, None))
        self._has_assets = _never if assets is None else _present(assets)
        self._assets = _Children(_fields(assets, kind))
        self._bands = _Children({name: columns[name] for name in columns if name in bands})
        self._values = {name: row_reader(*column) for name, column in columns.items() if name not in bands}

    def record(self, i: int, row: int) -> RasterInfo:
        """Row `i` of the batch; `row` is its place in the Collection."""
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
            assets=self._assets.row(i) if self._has_assets(i) else {},
            band_metadata=self._bands.row(i),
            collection=self._value("collection", i) or "",
            row=row,
        )

    def _value(self, name: str, i: int) -> Any:
        read = self._values.get(name)
        return None if read is None else read(i)


Columns = Mapping[str, tuple[pa.Array | None, pa.DataType]]


def _fields(structs: pa.StructArray | None, kind: pa.StructType) -> Columns:
    """A struct's children; None for one that the array lacks."""
    if structs is None:
        return {}
    fields = [kind.field(k) for k in range(kind.num_fields)]
    places = [structs.type.get_field_index(field.name) for field in fields]
    return {f.name: (structs.field(p) if p >= 0 else None, f.type) for f, p in zip(fields, places, strict=True)}


class _Children:
    """Columns of which a row's values are read one by one; readers are made when first asked for."""

    def __init__(self, columns: Columns) -> None:
        self._readers = _Lazy(columns, row_reader, _nothing)
        self._present = _Lazy(columns, lambda array, kind: _present(array), _never)

    def row(self, i: int) -> StoredMapping:
        return StoredMapping(self._readers, self._present, i)


def _never(i: int) -> bool:
    return False


class _Lazy(Mapping[str, Any]):
    """What `make` makes of each column, made once, when first asked for; `nothing` where all of it is null."""

    def __init__(self, columns: Columns, make: Callable[[pa.Array, pa.DataType], Any], nothing: Any) -> None:
        self._columns, self._make, self._nothing = columns, make, nothing
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        made = self._made.get(name)
        if made is None:
            array, kind = self._columns[name]
            empty = array is None or array.null_count == len(array)
            made = self._made[name] = self._nothing if empty else self._make(array, kind)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)
