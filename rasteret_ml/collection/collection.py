"""The table of raster items: open it, narrow it, read its rows."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import shapely

from rasteret_ml.collection.rows.pieces import Pieces
from rasteret_ml.collection.rows.record_reader import RecordReader
from rasteret_ml.collection.schema import (
    METADATA_SUFFIX,
    check_schema,
    column_of_values,
    geoarrow_schema,
    light_band_struct,
    placed,
)
from rasteret_ml.collection.select import bbox_overlaps, date_overlaps, interval, lonlat_bounds
from rasteret_ml.collection.write import write_view
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.geo.geometries import geometries_from
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.raster_info import RasterInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Collection"]


class Collection:
    """An immutable view of raster items: every filter returns a new one and is pushed down to Parquet.

    Rows keep the order of the table. Open one with `Collection.open`, make one with `rasteret_ml.build`.
    """

    def __init__(
        self,
        source: ds.Dataset | pa.Table,
        *,
        path: str | None = None,
        filter: ds.Expression | None = None,
        data_source: str | None = None,
        report: object = None,
    ) -> None:
        """Wrap an Arrow table or dataset that keeps the contract; see `open`.

        Raises:
            CollectionError: it does not keep the contract.
        """
        dataset = ds.InMemoryDataset(source) if isinstance(source, pa.Table) else source
        check_schema(dataset.schema, path or "the table")
        self._dataset = dataset
        self._filter = filter
        self._path = path
        self._data_source = data_source
        self.report = report
        """The `BuildReport`, on a Collection fresh from `build`; else None."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, data_source: str | None = None, report: object = None) -> Collection:
        """Open a Parquet file or folder (hive partitions included), or a URI that pyarrow knows (s3, gs, file).

        Args:
            path: Where it is.
            data_source: Band registry to use; default what the file says, else its first `collection` value.
            report: A `BuildReport` to carry along.

        Raises:
            CollectionError: nothing there, or not a Collection.
        """
        name = os.fspath(path)
        name = name if "://" in name else os.path.expanduser(name)
        try:
            return cls(_open_dataset(name), path=name, data_source=data_source, report=report)
        except (OSError, pa.ArrowException) as error:
            raise CollectionError(f"{name} cannot be opened as Parquet: {error}") from error

    # Pickling: a path and a filter where there is one, else the rows themselves.
    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is not None:
            return _reopen, (self._path, self._filter, self._data_source)
        table = self.to_table()
        return _from_table, (table, self._data_source)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"Collection({len(self)} records, bands={self.bands}, crs={self.crs}, path={self._path!r})"

    @functools.cached_property
    def _length(self) -> int:
        return int(self._dataset.count_rows(filter=self._filter))

    @property
    def path(self) -> str | None:
        """Where it was opened from; None for a table in memory."""
        return self._path

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the table, as the Arrow stream gives it."""
        return geoarrow_schema(self._dataset.schema)

    @property
    def arrow_schema(self) -> pa.Schema:
        """Arrow schema of the table, as it is stored."""
        return self._dataset.schema

    @functools.cached_property
    def pieces(self) -> Pieces:
        """Where the rows lie; found once, when a row or a band's facts are first asked for."""
        return Pieces(self._dataset, self._filter)

    @property
    def bands(self) -> list[str]:
        """Bands that the table has columns for, in its order."""
        named = [field for field in self.arrow_schema if field.name.endswith(METADATA_SUFFIX)]
        return [field.name.removesuffix(METADATA_SUFFIX) for field in named if pa.types.is_struct(field.type)]

    @functools.cached_property
    def data_source(self) -> str:
        """Name of the band registry in force; "" = none."""
        if self._data_source is not None:
            return self._data_source
        stored = str((self.schema.metadata or {}).get(b"data_source", b"").decode())
        if stored or "collection" not in self.schema.names:
            return stored
        values = self._dataset.to_table(columns=["collection"], filter=self._filter)["collection"].drop_null()
        return str(values[0]) if len(values) else ""

    @functools.cached_property
    def crs(self) -> list[str]:
        """The CRSs of the records, each once, sorted."""
        texts, codes = self.crs_codes()
        return sorted(text for i in np.unique(codes) if (text := texts[i]) is not None)

    def record_crs(self) -> list[str | None]:
        """CRS text of every record, in row order."""
        texts, codes = self.crs_codes()
        return [texts[i] for i in codes]

    def crs_codes(self) -> tuple[tuple[str | None, ...], np.ndarray[Any, np.dtype[np.int64]]]:
        """The different CRS texts (None = unknown), and which of them is each record's `[N]`."""
        names = [n for n in ("proj:epsg", "crs") if n in self.arrow_schema.names]
        if not names:
            return (None,), np.zeros(len(self), np.int64)
        pairs, codes = _distinct(self.to_table(names).columns)
        rows = [dict(zip(names, pair, strict=True)) for pair in pairs]
        texts = [_crs_of(row.get("proj:epsg"), row.get("crs")) for row in rows]
        unique = tuple(dict.fromkeys(texts))
        return unique, np.array([unique.index(text) for text in texts], np.int64)[codes]

    @functools.cached_property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) in longitude/latitude, None where no record has a box."""
        boxes = self.record_bounds()
        if not len(boxes) or np.isnan(boxes).all():
            return None
        xmin, ymin = np.nanmin(boxes[:, :2], axis=0)
        xmax, ymax = np.nanmax(boxes[:, 2:], axis=0)
        return float(xmin), float(ymin), float(xmax), float(ymax)

    def record_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Boxes `[N, 4]` in longitude/latitude, NaN where unknown."""
        if "bbox" not in self.schema.names:
            return np.full((len(self), 4), np.nan)
        boxes = self.to_table(["bbox"])["bbox"].combine_chunks()
        columns = [pc.struct_field(boxes, corner) for corner in ("xmin", "ymin", "xmax", "ymax")]
        return np.column_stack([c.to_numpy(zero_copy_only=False).astype(np.float64) for c in columns])

    # Views ----------------------------------------------------------------------------------------------

    def where(self, expression: ds.Expression) -> Collection:
        """The records for which an Arrow expression is true: `c.where(pc.field("eo:cloud_cover") < 20)`."""
        if not isinstance(expression, ds.Expression):
            raise UsageError(f"where() takes an Arrow expression such as pc.field('x') < 1, not {expression!r}.")
        both = expression if self._filter is None else self._filter & expression
        try:
            self._dataset.scanner(columns=["id"], filter=both)
        except pa.ArrowException as error:
            raise UsageError(f"where(): {error}") from error
        return Collection(self._dataset, path=self._path, filter=both, data_source=self._data_source)

    def subset(
        self,
        *,
        bbox: Sequence[float] | None = None,
        date_range: Sequence[Any] | str | None = None,
        cloud_cover_lt: float | None = None,
        geometries: Any = None,
        geometry_crs: Any = None,
        split: str | None = None,
    ) -> Collection:
        """The records that fit all conditions given.

        Args:
            bbox: (xmin, ymin, xmax, ymax) in lon/lat: records whose box overlaps it.
            date_range: (start, end) as dates, datetimes or ISO text, or "start/end"; both ends belong to it, and
                an end without a time is the whole day. Undated records do not fit.
            cloud_cover_lt: Records with `eo:cloud_cover` below this percentage; unknown is not clear.
            geometries: Records whose footprint meets any of these (any kind, see `geometries_from`).
            geometry_crs: CRS of `geometries` where they do not carry one; default lon/lat.
            split: Records whose `split` column has this value.

        Raises:
            UsageError: a condition on a column that the table lacks.
        """
        view = self
        if bbox is not None:
            view = view.where(bbox_overlaps(lonlat_bounds(bbox)))
        if date_range is not None:
            view = view.where(date_overlaps(*interval(date_range)))
        if cloud_cover_lt is not None:
            view._need("eo:cloud_cover", "cloud_cover_lt")
            view = view.where(pc.field("eo:cloud_cover") < float(cloud_cover_lt))
        if split is not None:
            view._need("split", "split")
            view = view.where(pc.field("split") == split)
        return view if geometries is None else view._meeting(geometries, geometry_crs)

    def _need(self, column: str, argument: str) -> None:
        if column not in self.schema.names:
            raise UsageError(f"{argument}= needs a column {column!r}; the Collection has {self.schema.names}.")

    def _meeting(self, geometries: Any, crs: Any) -> Collection:
        found = geometries_from(geometries, crs)
        shapes = transform_geometries(found.geometries, found.crs, LONLAT)
        near = self.where(bbox_overlaps(tuple(shapely.total_bounds(shapes))))
        table = near.to_table(["id", "geometry"])
        outlines = shapely.from_wkb(table["geometry"].to_numpy())
        hits = np.unique(shapely.STRtree(outlines).query(shapes, predicate="intersects")[1])
        names = table["id"].combine_chunks()
        wanted = names.take(pa.array(hits, pa.int64()))
        if pc.sum(pc.is_in(names, wanted)).as_py() == len(hits):
            return near.where(pc.field("id").isin(wanted))
        # Ids repeat, and say too little: keep the rows themselves.
        return Collection(near.to_table().take(pa.array(hits, pa.int64())), data_source=self._data_source)

    # Rows -----------------------------------------------------------------------------------------------

    def to_table(self, columns: Sequence[str] | Mapping[str, ds.Expression] | None = None) -> pa.Table:
        """The rows as an Arrow table, all columns or those named."""
        wanted = dict(columns) if isinstance(columns, Mapping) else columns
        return self._dataset.to_table(columns=wanted, filter=self._filter)

    def column_batches(self, name: str, rows: int) -> Iterator[pa.RecordBatch]:
        """One column, at most `rows` rows at a time, little of it in memory."""
        return iter(
            self._dataset.to_batches(
                columns=[name], filter=self._filter, batch_size=rows, batch_readahead=2, fragment_readahead=1
            )
        )

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Arrow PyCapsule stream: DuckDB, Polars and GeoPandas read a Collection directly (geometry: GeoArrow WKB)."""
        table = self.to_table()
        return table.cast(geoarrow_schema(table.schema)).__arrow_c_stream__(requested_schema)

    def band_facts(self, band: str, names: Sequence[str] | None = None) -> pa.Table:
        """What is known of a band, row by row, without its tile tables; null rows lack the band.

        Args:
            band: Its name, as in `bands`.
            names: Children of its struct, by default all that are not tile tables; those that the table lacks are
                left out.
        """
        column = f"{band}{METADATA_SUFFIX}"
        light = light_band_struct(self.arrow_schema.field(column).type)
        wanted = light if names is None else [name for name in names if name in light]
        if self.pieces.on_disk:
            return self.pieces.children(column, wanted)
        children = {name: ds.field(column, name) for name in wanted}
        return self.to_table(children | {"_present": ds.field(column).is_valid()})

    def iterate_records(self) -> Iterator[RasterInfo]:
        """The rows as `RasterInfo`, in order, a batch of rows in memory at a time."""
        row = 0
        for batch in self._dataset.to_batches(filter=self._filter, batch_size=256):
            reader = RecordReader(batch)
            for i in range(batch.num_rows):
                yield reader.record(i, row)
                row += 1

    async def iterate_rasters(self) -> AsyncIterator[RasterAccessor]:
        """Readable records, in order."""
        for info in self.iterate_records():
            yield RasterAccessor(info, self.data_source)

    def with_column(self, name: str, values: Any, out: str | os.PathLike[str] | None = None) -> Collection:
        """These records with a column of one's own, such as `split` (see `subset`).

        Args:
            name: Its name; a column of this name is replaced.
            values: One for each record, in row order: a sequence, numpy, pandas or Arrow array; None = null.
            out: None = the records are in memory, tile tables and all, until `write`; else where they are written to at
                once (see `write`), which for very many of them takes far less.

        Raises:
            UsageError: a name that says what the raster is (`id`, `datetime`, `{band}_metadata` …), or another number
                of values than records.
        """
        column = column_of_values(name, values, len(self))
        if out is not None:
            return self._written(out, (name, column))
        table = placed(self.to_table(), name, column).replace_schema_metadata(self.arrow_schema.metadata)
        return Collection(table, data_source=self._data_source)

    def write(self, out: str | os.PathLike[str]) -> Collection:
        """Write this view (see `write_collection`) and open it: a `.parquet` by few rows at a time, a folder whole."""
        return self._written(out)

    def _written(self, out: str | os.PathLike[str], added: tuple[str, pa.ChunkedArray] | None = None) -> Collection:
        path = write_view(self._dataset, self._filter, self.arrow_schema.metadata, out, added)
        return Collection.open(path, data_source=self._data_source)

    def plot(self, *, aois: Any = None, color: str | None = None, ax: Any = None) -> Figure:
        """A map of the footprints in longitude/latitude, and of AOIs over them.

        Where many lie on one another, as in a time series of one place, `subset` tells them apart.

        Args:
            aois: Areas to draw over them, of any kind (see `geometries_from`), in any CRS.
            color: Column, such as "split", "datetime" or "eo:cloud_cover", of the records, the AOI table or both,
                that colours them: texts as categories, dates and numbers along a colour map.
            ax: matplotlib axes to draw on; default a new figure, which pyplot does not know.

        Raises:
            UsageError: a column that is nowhere, or whose values cannot be coloured.
        """
        from rasteret_ml.plotting.footprints import draw_footprints  # loads matplotlib

        areas = None if aois is None else geometries_from(aois)
        attributes = None if areas is None else areas.table
        of_areas = attributes[color] if attributes is not None and color in attributes.columns else None
        if color is not None and of_areas is None:
            self._need(color, "color")
        table = self.to_table([name for name in self.schema.names if name in ("geometry", color)])
        return draw_footprints(
            shapely.from_wkb(table["geometry"].to_numpy()),
            values=_plain(table[color]).to_numpy() if color in table.column_names else None,
            aois=None if areas is None else transform_geometries(areas.geometries, areas.crs, LONLAT),
            aoi_values=None if of_areas is None else of_areas.to_numpy(),
            name=color or "",
            ax=ax,
        )


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without its dictionary, whose nulls `to_numpy` would take for the last entry."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _distinct(columns: Sequence[pa.ChunkedArray]) -> tuple[list[tuple[Any, ...]], np.ndarray[Any, np.dtype[np.int64]]]:
    """The different rows of some columns as Python values, and which of them is each row."""
    codes = np.zeros(len(columns[0]), np.int64)
    values = []
    for column in columns:
        found = column.combine_chunks().dictionary_encode(null_encoding="encode")
        values.append(found.dictionary.to_pylist())
        codes = codes * len(values[-1]) + found.indices.to_numpy()
    unique, codes = np.unique(codes, return_inverse=True)
    places = [np.unravel_index(code, [len(v) for v in values]) for code in unique]
    return [tuple(v[i] for v, i in zip(values, place, strict=True)) for place in places], codes


@functools.lru_cache(maxsize=256)
def _crs_of(code: int | None, text: str | None) -> str | None:
    if code is not None:
        return crs_text(int(code))
    return crs_text(text) if text else None


def _open_dataset(name: str) -> ds.Dataset:
    if "://" not in name and not os.path.exists(name):
        raise CollectionError(f"{name}: no such file or folder; make a Collection with rasteret_ml.build.")
    if "://" not in name and os.path.isfile(name):
        return ds.dataset(name, format="parquet")
    try:
        return ds.dataset(name, format="parquet", partitioning="hive", exclude_invalid_files=False)
    except pa.ArrowInvalid:  # only undated records: no year to tell the type from
        years = ds.partitioning(pa.schema([("year", pa.int32()), ("month", pa.int32())]), flavor="hive")
        return ds.dataset(name, format="parquet", partitioning=years, exclude_invalid_files=False)


def _reopen(path: str, filter: ds.Expression | None, data_source: str | None) -> Collection:
    opened = Collection.open(path, data_source=data_source)
    return opened if filter is None else opened.where(filter)


def _from_table(table: pa.Table, data_source: str | None) -> Collection:
    return Collection(table, data_source=data_source)
