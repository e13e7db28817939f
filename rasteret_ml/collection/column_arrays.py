"""Columns of a Collection as numpy arrays: one value per record, never a tile table or a Python object per row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import CollectionError
from rasteret_ml.fingerprint import digest

# `width` and `height` are the names that older files use.
_BAND_FIELDS = (
    "image_width", "width", "image_height", "height", "tile_width", "tile_height", "dtype", "transform", "scale",
    "offset",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandArrays:
    """One band of every record."""

    table: pa.Table  #: The band's header fields, see `Collection.band_table`.

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Whether each record has the band `[N]`."""
        return np.asarray(self.table["_present"].to_numpy())

    def take(self, rows: npt.NDArray[np.int64]) -> BandArrays:
        """Select rows."""
        return self if len(rows) == len(self.table) else BandArrays(table=self.table.take(pa.array(rows)))

    @property
    def shapes(self) -> npt.NDArray[np.int32]:
        """Image (height, width) `[N, 2]` in pixels; 0 = unknown."""
        return np.column_stack([self._first("image_height", "height"), self._first("image_width", "width")])

    @property
    def tiles(self) -> npt.NDArray[np.int32]:
        """Tile (height, width) `[N, 2]` in pixels; 0 = unknown."""
        return np.column_stack([self._first("tile_height"), self._first("tile_width")])

    @property
    def dtypes(self) -> list[str | None]:
        """Distinct dtype names; None = unknown."""
        found = self.table["dtype"].unique().to_pylist() if "dtype" in self.table.column_names else [None]
        return sorted(found, key=str)

    @property
    def has_scale(self) -> bool:
        """Whether any record has a scale or offset."""
        columns = [self.table[name] for name in ("scale", "offset") if name in self.table.column_names]
        return any(column.null_count < len(column) for column in columns)

    @property
    def transforms(self) -> npt.NDArray[np.float64]:
        """Affine a, b, c, d, e, f `[N, 6]`; NaN = not georeferenced. Other lengths: `CollectionError`."""
        out = np.full((len(self.table), 6), np.nan)
        if "transform" not in self.table.column_names:
            return out
        lists = self.table["transform"].combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
        lengths = np.where(lists.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets), 0)
        wrong = ~np.isin(lengths, (0, 4, 6, 9))
        if wrong.any():
            raise CollectionError(
                f"A stored transform must have 4 or 6 values, got {lengths[wrong][0]}; build the Collection again."
            )
        short, long = np.flatnonzero(lengths == 4), np.flatnonzero(lengths >= 6)
        out[short] = 0.0
        out[short[:, None], (0, 2, 4, 5)] = values[offsets[short][:, None] + np.arange(4)]
        out[long] = values[offsets[long][:, None] + np.arange(6)]
        return out

    def _first(self, *names: str) -> npt.NDArray[np.int32]:
        columns = [self.table[name] for name in names if name in self.table.column_names]
        if not columns:
            return np.zeros(len(self.table), np.int32)
        return np.asarray(pc.fill_null(pc.coalesce(*columns), 0).to_numpy(), np.int32)


def band_arrays(collection: Collection, band: str) -> BandArrays:
    """Read one band of every record, in row order."""
    return BandArrays(table=collection.band_table(band, _BAND_FIELDS))


def dtypes_and_nodata(collection: Collection, band: str) -> list[tuple[str | None, int | float | None]]:
    """Distinct (dtype, declared nodata) pairs of a band; None = unknown."""
    table = collection.band_table(band, ("dtype", "nodata"))
    table = table.filter(table["_present"])
    lists = [table[name] if name in table.column_names else pa.nulls(len(table)) for name in ("dtype", "nodata")]
    pairs = pa.table(lists, names=["dtype", "nodata"]).group_by(["dtype", "nodata"], use_threads=False).aggregate([])
    return [(row["dtype"], row["nodata"]) for row in pairs.to_pylist()]


def record_times(collection: Collection) -> npt.NDArray[np.datetime64]:
    """Acquisition times `[N]` as datetime64[ns] in UTC; NaT = undated."""
    return np.asarray(collection.to_table(["datetime"])["datetime"].to_numpy(), "datetime64[ns]")


def record_cloud_cover(collection: Collection) -> npt.NDArray[np.float32]:
    """Cloud cover `[N]` in percent; NaN = unknown, also without a column `eo:cloud_cover`."""
    if "eo:cloud_cover" not in collection.arrow_schema.names:
        return np.full(len(collection), np.nan, np.float32)
    column = collection.to_table(["eo:cloud_cover"])["eo:cloud_cover"]
    return np.asarray(column.cast(pa.float32()).to_numpy())


def id_ranks(collection: Collection) -> npt.NDArray[np.int32]:
    """Rank of every record's id among the distinct ids in sorted order `[N]`."""
    ids = collection.to_table(["id"])["id"]
    return np.asarray(pc.rank(ids, tiebreaker="dense").to_numpy(), np.int32)


def record_id(collection: Collection, row: int) -> str:
    """The id of one record, for error messages (reads the whole column)."""
    return str(collection.to_table(["id"])["id"][row].as_py())


def iterate_footprints(collection: Collection, rows: int) -> Iterator[npt.NDArray[np.object_]]:
    """Yield footprints as WKB in row order, about `rows` at a time; None = unknown."""
    if "geometry" not in collection.arrow_schema.names:
        yield np.full(len(collection), None, dtype=object)
        return
    for batch in collection.column_batches("geometry", rows):
        yield batch.column(0).to_numpy(zero_copy_only=False)


def records_digest(collection: Collection) -> str:
    """Digest of the ids and times of all records, in order."""
    ids = "\n".join(map(str, collection.to_table(["id"])["id"].to_pylist()))
    return digest(ids.encode(), record_times(collection).view(np.int64))
