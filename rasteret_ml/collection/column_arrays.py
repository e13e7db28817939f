"""What a Collection knows of all its records at once, as numpy arrays; never a tile table, never an object a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import CollectionError
from rasteret_ml.fingerprint import digest

__all__ = [
    "BandArrays",
    "band_arrays",
    "band_kinds",
    "id_ranks",
    "outlines",
    "record_clouds",
    "record_id",
    "record_times",
    "records_digest",
]

_NAMES = (
    "image_width",
    "width",
    "image_height",
    "height",
    "tile_width",
    "tile_height",
    "dtype",
    "transform",
    "scale",
    "offset",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandArrays:
    """A band of every record."""

    table: pa.Table
    """The band's facts, see `Collection.band_facts`."""

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """Which records have the band `[N]`."""
        found: npt.NDArray[np.bool_] = self.table["_present"].to_numpy()
        return found

    def take(self, rows: npt.NDArray[np.int64]) -> BandArrays:
        """The band of these rows."""
        return self if len(rows) == len(self.table) else BandArrays(table=self.table.take(pa.array(rows)))

    @property
    def shapes(self) -> npt.NDArray[np.int32]:
        """(height, width) of each `[N, 2]`; 0 where not stated."""
        return np.column_stack([self._first("image_height", "height"), self._first("image_width", "width")])

    @property
    def tiles(self) -> npt.NDArray[np.int32]:
        """(height, width) of each one's tiles `[N, 2]`; 0 where not stated."""
        return np.column_stack([self._first("tile_height"), self._first("tile_width")])

    @property
    def dtypes(self) -> list[str | None]:
        """Names of the sample types, each once, None for not stated."""
        found = self.table["dtype"].unique().to_pylist() if "dtype" in self.table.column_names else [None]
        return sorted(found, key=str)

    @property
    def has_scale(self) -> bool:
        """Whether any record states a scale or offset."""
        columns = [self.table[name] for name in ("scale", "offset") if name in self.table.column_names]
        return any(column.null_count < len(column) for column in columns)

    @property
    def transforms(self) -> npt.NDArray[np.float64]:
        """a, b, c, d, e, f of each one's affine `[N, 6]`; NaN where not georeferenced.

        Raises:
            CollectionError: a stored transform of another length.
        """
        out = np.full((len(self.table), 6), np.nan)
        if "transform" not in self.table.column_names:
            return out
        lists = self.table["transform"].combine_chunks()
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
        lengths = np.where(lists.is_valid().to_numpy(zero_copy_only=False), np.diff(offsets), 0)
        wrong = ~np.isin(lengths, (0, 4, 6, 9))
        if wrong.any():
            raise CollectionError(f"A stored transform has 4 or 6 values, not {lengths[wrong][0]}.")
        short, long = np.flatnonzero(lengths == 4), np.flatnonzero(lengths >= 6)
        out[short] = 0.0
        out[short[:, None], (0, 2, 4, 5)] = values[offsets[short][:, None] + np.arange(4)]
        out[long] = values[offsets[long][:, None] + np.arange(6)]
        return out

    def _first(self, *names: str) -> npt.NDArray[np.int32]:
        columns = [self.table[name] for name in names if name in self.table.column_names]
        if not columns:
            return np.zeros(len(self.table), np.int32)
        found: npt.NDArray[np.int32] = pc.fill_null(pc.coalesce(*columns), 0).to_numpy().astype(np.int32)
        return found


def band_arrays(collection: Collection, band: str) -> BandArrays:
    """A band of every record, in row order."""
    return BandArrays(table=collection.band_facts(band, _NAMES))


def band_kinds(collection: Collection, band: str) -> list[tuple[str | None, int | float | None]]:
    """The different (sample type, declared nodata) that a band has, None where not stated."""
    table = collection.band_facts(band, ("dtype", "nodata"))
    table = table.filter(table["_present"])
    lists = [table[name] if name in table.column_names else pa.nulls(len(table)) for name in ("dtype", "nodata")]
    pairs = pa.table(lists, names=["dtype", "nodata"]).group_by(["dtype", "nodata"], use_threads=False).aggregate([])
    return [(row["dtype"], row["nodata"]) for row in pairs.to_pylist()]


def record_times(collection: Collection) -> npt.NDArray[np.datetime64]:
    """Acquisition of every record `[N]`, nanoseconds, NaT = undated."""
    times: npt.NDArray[np.datetime64] = collection.to_table(["datetime"])["datetime"].to_numpy()
    return times.astype("datetime64[ns]")


def record_clouds(collection: Collection) -> npt.NDArray[np.float32]:
    """Cloud cover of every record in percent `[N]`, NaN = unknown (no column `eo:cloud_cover`, or nothing in it)."""
    if "eo:cloud_cover" not in collection.arrow_schema.names:
        return np.full(len(collection), np.nan, np.float32)
    column = collection.to_table(["eo:cloud_cover"])["eo:cloud_cover"]
    known: npt.NDArray[np.float32] = pc.cast(column, pa.float32()).to_numpy()
    return known


def id_ranks(collection: Collection) -> npt.NDArray[np.int32]:
    """Place of every record's id among the different ids in their order `[N]`."""
    ids = collection.to_table(["id"])["id"]
    ranks: npt.NDArray[np.int64] = pc.rank(ids, tiebreaker="dense").to_numpy()
    return ranks.astype(np.int32)


def record_id(collection: Collection, row: int) -> str:
    """The id of one record, for messages."""
    return str(collection.to_table(["id"])["id"][row].as_py())


def outlines(collection: Collection, rows: int) -> Iterator[npt.NDArray[np.object_]]:
    """Footprints as WKB in row order, None where unknown, about `rows` at a time."""
    if "geometry" not in collection.arrow_schema.names:
        yield np.full(len(collection), None, dtype=object)
        return
    for batch in collection.column_batches("geometry", rows):
        found: Any = batch.column(0)
        yield found.to_numpy(zero_copy_only=False)


def records_digest(collection: Collection) -> str:
    """Tells views of Collections apart: their records, by id and time, in their order."""
    ids = "\n".join(map(str, collection.to_table(["id"])["id"].to_pylist()))
    return digest(ids.encode(), record_times(collection).view(np.int64))
