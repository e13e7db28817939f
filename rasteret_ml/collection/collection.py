"""`Collection`: the table of raster items. Open it, filter it, read its rows."""

from __future__ import annotations

import functools
import html
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import shapely

from rasteret_ml.collection.filters import bbox_overlaps, datetime_between, parse_date_range, parse_lonlat_bbox
from rasteret_ml.collection.record_reader import RecordReader
from rasteret_ml.collection.row_store import ParquetBlock, RowBlocks
from rasteret_ml.collection.schema import (
    METADATA_SUFFIX,
    check_schema,
    geoarrow_schema,
    header_fields,
    set_column,
    to_column,
)
from rasteret_ml.collection.write import FOLDERS, LOW_MEMORY_SCAN, write_view
from rasteret_ml.errors import CollectionError, UsageError, redact
from rasteret_ml.geo.crs import LONLAT, crs_text, transform_geometries
from rasteret_ml.geo.geometries import geometries_from
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.raster_info import RasterInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rasteret_ml.collection.build.build import BuildReport

MAX_SHOWN = 8  #: Bands, CRSs or classes that a summary lists; `Collection._repr_html_` lists twice as many.


class Collection:
    """An immutable view of raster items, one row per item.

    Every filter returns a new Collection and is pushed down to Parquet. Rows keep the order of the table. Open one with
    `Collection.open`, or make one with `rasteret_ml.build`.

    Example:
        >>> scenes = Collection.open("scenes.parquet")  # doctest: +SKIP
        >>> summer = scenes.subset(date_range="2023-06/2023-08", cloud_cover_lt=20)  # doctest: +SKIP
        >>> nadir = summer.where(pc.field("view:off_nadir") < 5)  # doctest: +SKIP
    """

    def __init__(
        self,
        source: ds.Dataset | pa.Table,
        *,
        path: str | None = None,
        filter: ds.Expression | None = None,
        data_source: str | None = None,
    ) -> None:
        """Wrap an Arrow table or dataset.

        Args:
            source: A table or dataset with the columns of a Collection.
            path: Path or URI that `source` was opened from.
            filter: Rows to keep; None = all.
            data_source: Band registry to use; default what the file says, else its first `collection` value.

        Raises:
            CollectionError: A column is missing or has the wrong type.
        """
        dataset = ds.InMemoryDataset(source) if isinstance(source, pa.Table) else source
        check_schema(dataset.schema, "the table" if path is None else redact(path))
        self._dataset = dataset
        self._filter = filter
        self.path = path  #: Path or URI that it was opened from; None for a table in memory.
        self._data_source = data_source
        #: The `BuildReport` of a Collection that `build` just returned; else None.
        self.report: BuildReport | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, data_source: str | None = None) -> Collection:
        """Open a Parquet file or folder (hive partitions included), or a URI that pyarrow supports (s3, gs, file).

        Args:
            path: Path or URI.
            data_source: Band registry to use; default what the file says, else its first `collection` value.

        Raises:
            CollectionError: The path does not exist or is not a Collection.
        """
        name = os.fspath(path)
        name = name if "://" in name else os.path.expanduser(name)
        try:
            return cls(_open_dataset(name), path=name, data_source=data_source)
        except (OSError, pa.ArrowException) as error:
            raise CollectionError(redact(f"{name} cannot be opened as Parquet: {error}")) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a path and a filter, or the rows of a table in memory."""
        if self.path is None:
            return functools.partial(Collection, data_source=self._data_source), (self.to_table(),)
        return _reopen, (self.path, self._filter, self._data_source)

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        path = None if self.path is None else redact(self.path)
        bands, crs = shorten(self.bands), shorten(self.crs)
        return f"Collection({len(self)} records, bands=[{bands}], crs=[{crs}], path={path!r})"

    def _repr_html_(self) -> str:
        """Summary for notebooks; reads small columns, no tile table and no footprint."""
        name = (self.arrow_schema.metadata or {}).get(b"name", b"").decode(errors="replace")
        bounds = "unknown" if self.bounds is None else "{:.4f}, {:.4f}, {:.4f}, {:.4f} (lon/lat)".format(*self.bounds)
        total = "" if self._filter is None else f" of {self._dataset.count_rows():,}"
        rows = {
            "Path": self.path or "in memory",
            "Records": f"{len(self):,}{total}",
            "Time": self._describe_times(),
            "CRS": shorten(self.crs, 2 * MAX_SHOWN) or "unknown",
            "Bands": shorten(self.bands, 2 * MAX_SHOWN, self._describe_band),
            "Bounds": bounds,
            "Stored size": self._describe_size() + (", unfiltered" if total else ""),
        }
        return summary_html("Collection", rows, f" {name}")

    def _describe_times(self) -> str:
        times = self.to_table(["datetime"])["datetime"]
        first, last = pc.min_max(times).as_py().values()
        span = [] if first is None else [f"{str(first)[:16]} to {str(last)[:16]} UTC"]
        return ", ".join(span + ([f"{times.null_count:,} undated"] if times.null_count else [])) or "none"

    def _describe_band(self, band: str) -> str:
        table = self.band_table(band, ["dtype"])
        dtypes = table["dtype"].unique().drop_null().to_pylist() if "dtype" in table.column_names else []
        return f"{band} ({'/'.join(sorted(dtypes)) or 'unknown'})"

    def _describe_size(self) -> str:
        if isinstance(self._dataset, ds.FileSystemDataset):
            infos = self._dataset.filesystem.get_file_info(self._dataset.files)
            return _format_bytes(sum(info.size or 0 for info in infos))
        if isinstance(self._dataset, ds.InMemoryDataset):
            return f"{_format_bytes(self._dataset.to_table().nbytes)} in memory"
        return "unknown"

    @functools.cached_property
    def _length(self) -> int:
        return int(self._dataset.count_rows(filter=self._filter))

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the Arrow stream: the stored one, with the geometry column tagged as GeoArrow."""
        return geoarrow_schema(self._dataset.schema)

    @property
    def arrow_schema(self) -> pa.Schema:
        """Arrow schema as stored."""
        return self._dataset.schema

    @functools.cached_property
    def row_blocks(self) -> RowBlocks:
        """Row groups that hold the rows; computed on first use."""
        return RowBlocks(self._dataset, self._filter)

    @property
    def bands(self) -> list[str]:
        """Bands that the table has a metadata column for, in its order."""
        structs = [field.name for field in self.arrow_schema if pa.types.is_struct(field.type)]
        return [name.removesuffix(METADATA_SUFFIX) for name in structs if name.endswith(METADATA_SUFFIX)]

    @functools.cached_property
    def data_source(self) -> str:
        """Name of the band registry in use; "" = none."""
        if self._data_source is not None:
            return self._data_source
        stored = str((self.arrow_schema.metadata or {}).get(b"data_source", b"").decode())
        if stored or "collection" not in self.arrow_schema.names:
            return stored
        values = self.to_table(["collection"])["collection"].drop_null()
        return str(values[0]) if len(values) else ""

    @functools.cached_property
    def crs(self) -> list[str]:
        """Distinct CRSs of the records, sorted."""
        texts, codes = self.crs_codes()
        return sorted(text for i in np.unique(codes) if (text := texts[i]) is not None)

    def crs_codes(self) -> tuple[tuple[str | None, ...], np.ndarray[Any, np.dtype[np.int64]]]:
        """Distinct CRS texts (None = unknown), and each record's index into them `[N]`."""
        names = [n for n in ("proj:epsg", "crs") if n in self.arrow_schema.names]
        if not names:
            return (None,), np.zeros(len(self), np.int64)
        table, columns = self.to_table(names), []
        if "proj:epsg" in names:
            numbers = table["proj:epsg"].cast(pa.int64()).cast(pa.string())
            columns.append(pc.binary_join_element_wise("EPSG", numbers, ":"))
        if "crs" in names:
            columns.append(table["crs"].cast(pa.string()))
        stored = pc.coalesce(*columns).combine_chunks().dictionary_encode(null_encoding="encode")
        texts = [crs_text(text) if text else None for text in stored.dictionary.to_pylist()]
        unique = tuple(dict.fromkeys(texts))
        return unique, np.array([unique.index(text) for text in texts], np.int64)[stored.indices.to_numpy()]

    @functools.cached_property
    def bounds(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) in longitude/latitude; None if no record has a bounding box."""
        boxes = self.record_bounds()
        if not len(boxes) or np.isnan(boxes).all():
            return None
        xmin, ymin = np.nanmin(boxes[:, :2], axis=0)
        xmax, ymax = np.nanmax(boxes[:, 2:], axis=0)
        return float(xmin), float(ymin), float(xmax), float(ymax)

    def record_bounds(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Bounding boxes `[N, 4]` in longitude/latitude, NaN where unknown."""
        if "bbox" not in self.arrow_schema.names:
            return np.full((len(self), 4), np.nan)
        boxes = self.to_table(["bbox"])["bbox"].combine_chunks()
        columns = [pc.struct_field(boxes, corner) for corner in ("xmin", "ymin", "xmax", "ymax")]
        return np.column_stack([c.to_numpy(zero_copy_only=False).astype(np.float64) for c in columns])

    # Views ----------------------------------------------------------------------------------------------

    def where(self, expression: ds.Expression) -> Collection:
        """Keep records for which an Arrow expression is true: `c.where(pc.field("eo:cloud_cover") < 20)`.

        Raises:
            UsageError: Not an expression, or one on a column that the table lacks.
        """
        if not isinstance(expression, ds.Expression):
            raise UsageError(f"where() needs an Arrow expression such as pc.field('x') < 1, got {expression!r}.")
        both = expression if self._filter is None else self._filter & expression
        try:
            self._dataset.scanner(columns=["id"], filter=both)
        except pa.ArrowException as error:
            raise UsageError(f"where(): {error}") from error
        return Collection(self._dataset, path=self.path, filter=both, data_source=self._data_source)

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
        """Keep records that meet all given conditions.

        Args:
            bbox: (xmin, ymin, xmax, ymax) in longitude/latitude: keep records whose box overlaps it.
            date_range: (start, end) as dates, datetimes or ISO text, or "start/end". Both ends are included; an end
                without a time of day covers the whole day. Undated records are dropped.
            cloud_cover_lt: Keep records with `eo:cloud_cover` below this percentage; unknown cover is dropped.
            geometries: Keep records whose footprint intersects any of these (any kind, see `geometries_from`).
            geometry_crs: CRS of `geometries` if they carry none; default longitude/latitude.
            split: Keep records with this value in the column `split`.

        Raises:
            UsageError: A condition on a column that the table lacks, or a value that cannot be parsed.
        """
        view = self
        if bbox is not None:
            view = view.where(bbox_overlaps(parse_lonlat_bbox(bbox)))
        if date_range is not None:
            view = view.where(datetime_between(*parse_date_range(date_range)))
        if cloud_cover_lt is not None:
            view._check_column("eo:cloud_cover", "cloud_cover_lt")
            view = view.where(pc.field("eo:cloud_cover") < float(cloud_cover_lt))
        if split is not None:
            view._check_column("split", "split")
            view = view.where(pc.field("split") == split)
        return view if geometries is None else view._intersecting(geometries, geometry_crs)

    def _check_column(self, column: str, argument: str) -> None:
        if column not in self.arrow_schema.names:
            raise UsageError(
                f"{argument}= needs a column {column!r}; the columns of the Collection are {self.arrow_schema.names}."
            )

    def _intersecting(self, geometries: Any, crs: Any) -> Collection:
        query = geometries_from(geometries, crs)
        shapes = transform_geometries(query.geometries, query.crs, LONLAT)
        near = self.where(bbox_overlaps(tuple(shapely.total_bounds(shapes))))
        table = near.to_table(["id", "geometry"])
        footprints = shapely.from_wkb(table["geometry"].to_numpy())
        rows = pa.array(np.unique(shapely.STRtree(footprints).query(shapes, predicate="intersects")[1]), pa.int64())
        all_ids = table["id"].combine_chunks()
        ids = all_ids.take(rows)
        if pc.sum(pc.is_in(all_ids, ids)).as_py() == len(rows):
            return near.where(pc.field("id").isin(ids))
        # An id occurs more than once, so a filter on ids would keep other rows too: keep the rows themselves.
        return Collection(near.to_table().take(rows), data_source=self._data_source)

    # Rows -----------------------------------------------------------------------------------------------

    def to_table(self, columns: Sequence[str] | Mapping[str, ds.Expression] | None = None) -> pa.Table:
        """Read the rows as an Arrow table.

        Args:
            columns: Names, or a mapping of new name to Arrow expression; None = all columns.
        """
        selection = dict(columns) if isinstance(columns, Mapping) else columns
        return self._dataset.to_table(columns=selection, filter=self._filter)

    def column_batches(self, name: str, rows: int) -> Iterator[pa.RecordBatch]:
        """Yield one column, at most `rows` rows at a time, with little read ahead."""
        yield from self._dataset.to_batches(columns=[name], filter=self._filter, batch_size=rows, **LOW_MEMORY_SCAN)

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Arrow PyCapsule stream: DuckDB, Polars and GeoPandas read a Collection directly (geometry: GeoArrow WKB)."""
        table = self.to_table()
        return table.cast(geoarrow_schema(table.schema)).__arrow_c_stream__(requested_schema)

    def band_table(self, band: str, fields: Sequence[str] | None = None) -> pa.Table:
        """Read a band's header fields, one row per record, without its tile tables.

        Args:
            band: Name of the band, as in `bands`.
            fields: Children of its struct; default all but the tile tables. Those that the table lacks are left out.

        Returns:
            The fields, and `_present`: whether the record has the band.
        """
        column = f"{band}{METADATA_SUFFIX}"
        available = header_fields(self.arrow_schema.field(column).type)
        names = available if fields is None else [name for name in fields if name in available]
        if all(isinstance(block, ParquetBlock) for block in self.row_blocks.blocks):
            return self.row_blocks.read_children(column, names)
        children = {name: ds.field(column, name) for name in names}
        return self.to_table(children | {"_present": ds.field(column).is_valid()})

    def iterate_records(self) -> Iterator[RasterInfo]:
        """Yield the rows as `RasterInfo`, in order; one batch of rows is in memory at a time."""
        row = 0
        for batch in self._dataset.to_batches(filter=self._filter, batch_size=256):
            reader = RecordReader(batch)
            for i in range(batch.num_rows):
                yield reader.record(i, row)
                row += 1

    async def iterate_rasters(self) -> AsyncIterator[RasterAccessor]:
        """Yield the rows as `RasterAccessor`, in order."""
        for info in self.iterate_records():
            yield RasterAccessor(info, self.data_source)

    def with_column(self, name: str, values: Any, out: str | os.PathLike[str] | None = None) -> Collection:
        """Add a column, such as `split` (see `subset`), or replace one.

        Args:
            name: Name of the column.
            values: One per record, in row order: a sequence, numpy, pandas or Arrow array; None = null.
            out: Where to write the result (see `write`), which for very many records needs far less memory. None = keep
                all rows in memory, tile tables included.

        Raises:
            UsageError: A reserved name (`id`, `datetime`, `{band}_metadata` …), or the wrong number of values.
        """
        column = to_column(name, values, len(self))
        if out is not None:
            return self._write(out, (name, column))
        table = set_column(self.to_table(), name, column).replace_schema_metadata(self.arrow_schema.metadata)
        return Collection(table, data_source=self._data_source)

    def write(self, out: str | os.PathLike[str]) -> Collection:
        """Write this view and open it.

        Args:
            out: `name.parquet` is one file, written a row group at a time; any other name a hive-partitioned folder,
                for which the whole view is read into memory. See `write_collection`.
        """
        return self._write(out)

    def _write(self, out: str | os.PathLike[str], new_column: tuple[str, pa.ChunkedArray] | None = None) -> Collection:
        path = write_view(self._dataset, self._filter, self.arrow_schema.metadata, out, new_column)
        return Collection.open(path, data_source=self._data_source)

    def plot(self, *, aois: Any = None, color: str | None = None, ax: Any = None) -> Figure:
        """Draw the footprints on a longitude/latitude map, with AOIs on top.

        If many footprints coincide, as in a time series of one place, `subset` before plotting.

        Args:
            aois: Areas to draw, of any kind (see `geometries_from`), in any CRS.
            color: Column of the records, the AOI table or both to colour by, such as "split", "datetime" or
                "eo:cloud_cover": text as categories, dates and numbers along a colour map.
            ax: matplotlib axes to draw on; default those of a new figure, which pyplot does not manage.

        Raises:
            UsageError: An unknown column, or one whose values cannot be coloured.
        """
        from rasteret_ml.plotting.footprints import draw_footprints  # loads matplotlib

        areas = None if aois is None else geometries_from(aois)
        attributes = None if areas is None else areas.table
        aoi_values = attributes[color] if attributes is not None and color in attributes.columns else None
        if color is not None and aoi_values is None:
            self._check_column(color, "color")
        table = self.to_table([name for name in self.schema.names if name in ("geometry", color)])
        return draw_footprints(
            shapely.from_wkb(table["geometry"].to_numpy()),
            values=_decode_dictionary(table[color]).to_numpy() if color in table.column_names else None,
            aois=None if areas is None else transform_geometries(areas.geometries, areas.crs, LONLAT),
            aoi_values=None if aoi_values is None else aoi_values.to_numpy(),
            name=color or "",
            ax=ax,
        )


def summary_html(title: str, rows: Mapping[str, Any], subtitle: str = "") -> str:
    """Return a table of properties by heading for notebooks; another object with such a table is shown inside it.

    Text is escaped, and secrets in addresses are removed.
    """
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in rows.items())
    return f"<div><strong>{html.escape(title)}</strong>{html.escape(redact(subtitle))}<table>{cells}</table></div>"


def _cell(value: Any) -> str:
    if hasattr(value, "_repr_html_"):
        return str(value._repr_html_())
    return html.escape(redact(value if isinstance(value, str) else type(value).__name__))


def shorten(values: Sequence[Any], limit: int = MAX_SHOWN, describe: Callable[[Any], str] = str) -> str:
    """Join the first `limit` values, each cut to a readable length (a CRS may be a page of WKT)."""
    shown = [text if len(text) <= 60 else f"{text[:59]}…" for text in map(describe, values[:limit])]
    return ", ".join(shown) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def _format_bytes(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def _decode_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decode a dictionary column, whose nulls `to_numpy` would turn into the last entry."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _open_dataset(name: str) -> ds.Dataset:
    if "://" not in name and not os.path.exists(name):
        raise CollectionError(f"{name}: no such file or folder; make a Collection with rasteret_ml.build.")
    if "://" not in name and os.path.isfile(name):
        return ds.dataset(name, format="parquet")
    try:
        return ds.dataset(name, format="parquet", partitioning="hive", exclude_invalid_files=False)
    except pa.ArrowInvalid:  # only undated records: no year from which the type could be inferred
        return ds.dataset(name, format="parquet", partitioning=FOLDERS, exclude_invalid_files=False)


def _reopen(path: str, filter: ds.Expression | None, data_source: str | None) -> Collection:
    opened = Collection.open(path, data_source=data_source)
    return opened if filter is None else opened.where(filter)
