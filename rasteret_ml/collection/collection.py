"""The table of raster items: open it, narrow it, read its rows."""

from __future__ import annotations

import datetime as dt
import functools
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import shapely

from rasteret_ml.collection.schema import (
    METADATA_SUFFIX,
    check_schema,
    geoarrow_schema,
    light_band_struct,
    struct_to_python,
)
from rasteret_ml.collection.select import bbox_overlaps, date_overlaps, interval, lonlat_bounds
from rasteret_ml.collection.write import write_collection
from rasteret_ml.errors import CollectionError, UsageError
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.geo.geometries import geometries_from
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.record import RasterInfo

__all__ = ["Collection", "record_info"]


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
    def bands(self) -> list[str]:
        """Bands that the table has columns for, in its order."""
        return [n.removesuffix(METADATA_SUFFIX) for n in self.schema.names if self._is_band(n)]

    def _is_band(self, name: str) -> bool:
        return name.endswith(METADATA_SUFFIX) and pa.types.is_struct(self.schema.field(name).type)

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
        return sorted({text for text in self.record_crs() if text is not None})

    def record_crs(self) -> list[str | None]:
        """CRS text of every record, in row order."""
        names = [n for n in ("proj:epsg", "crs") if n in self.schema.names]
        table = self.to_table(names) if names else pa.table({})
        codes = table["proj:epsg"].to_pylist() if "proj:epsg" in names else [None] * len(self)
        texts = table["crs"].to_pylist() if "crs" in names else [None] * len(self)
        return [_crs_of(code, text) for code, text in zip(codes, texts, strict=True)]

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

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Arrow PyCapsule stream: DuckDB, Polars and GeoPandas read a Collection directly (geometry: GeoArrow WKB)."""
        table = self.to_table()
        return table.cast(geoarrow_schema(table.schema)).__arrow_c_stream__(requested_schema)

    def band_facts(self, band: str) -> pa.Table:
        """What is known of a band, row by row, without its tile tables; null rows lack the band."""
        column = f"{band}{METADATA_SUFFIX}"
        names = light_band_struct(self.schema.field(column).type)
        return self.to_table(
            {name: ds.field(column, name) for name in names} | {"_present": ds.field(column).is_valid()}
        )

    def iterate_records(self) -> Iterator[RasterInfo]:
        """The rows as `RasterInfo`, in order, a batch of rows in memory at a time."""
        row = 0
        for batch in self._dataset.to_batches(filter=self._filter, batch_size=256):
            for i in range(batch.num_rows):
                yield record_info(batch, i, row)
                row += 1

    async def iterate_rasters(self) -> AsyncIterator[RasterAccessor]:
        """Readable records, in order."""
        for info in self.iterate_records():
            yield RasterAccessor(info, self.data_source)

    def write(self, out: str | os.PathLike[str]) -> Collection:
        """Write this view (see `write_collection`) and open what was written."""
        table = self.to_table()
        table = table.drop_columns([n for n in ("year", "month") if n in table.column_names])
        return Collection.open(write_collection(table, out), data_source=self._data_source)


def record_info(batch: pa.RecordBatch | pa.Table, i: int, row: int) -> RasterInfo:
    """Row `i` of a batch as a record; `row` is its place in the Collection."""
    names = set(batch.schema.names)

    def value(name: str) -> Any:
        return struct_to_python(batch[name][i]) if name in names else None

    box, when = value("bbox"), value("datetime")
    if isinstance(when, dt.datetime) and when.tzinfo is not None:
        when = when.astimezone(dt.UTC).replace(tzinfo=None)
    epsg, text = value("proj:epsg"), value("crs")
    return RasterInfo(
        id=str(value("id")),
        datetime=when.to_pydatetime() if hasattr(when, "to_pydatetime") else when,
        bbox=None if box is None else tuple(float(box[k]) for k in ("xmin", "ymin", "xmax", "ymax")),  # type: ignore[arg-type]
        footprint=value("geometry"),
        crs=epsg if epsg is not None else text or None,
        cloud_cover=value("eo:cloud_cover"),
        assets=value("assets") or {},
        band_metadata={n: value(n) for n in batch.schema.names if n.endswith(METADATA_SUFFIX)},
        collection=value("collection") or "",
        row=row,
    )


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
