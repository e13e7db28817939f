"""The records of a Collection as a TorchGeo index, and as accessors on demand."""

from __future__ import annotations

import logging
import pickle
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from affine import Affine

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.column_arrays import (
    BandArrays,
    band_arrays,
    id_ranks,
    record_clouds,
    record_id,
    record_times,
)
from rasteret_ml.collection.rows.row_store import RowStore
from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.errors import MixedCRSError, UnknownBandError, UsageError
from rasteret_ml.geo.crs import same_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.raster_info import BandRegistry
from rasteret_ml.raster.reprojected_grid import reprojected_grid

__all__ = [
    "RecordStore",
    "SceneTable",
    "band_column",
    "choose_grid",
    "dump_compressed",
    "load_compressed",
    "pixel_sizes",
    "scene_table",
]

_log = logging.getLogger(__name__)
_NAMED = 5
"""Records that a warning names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneTable:
    """What the dataset knows of its records without their tile tables: arrays, nothing a record of its own."""

    collection: Collection
    """The records."""
    rows: npt.NDArray[np.int64]
    """Rows of the Collection that have every band `[N]`, ascending."""
    crs_texts: tuple[str, ...]
    """The different CRSs of these records, in the order that they first appear in."""
    crs_codes: npt.NDArray[np.int32]
    """Which of them is each record's `[N]`."""
    transforms: npt.NDArray[np.float64]
    """a, b, c, d, e, f of each one's first band `[N, 6]`."""
    shapes: npt.NDArray[np.int32]
    """(height, width) of each one's first band `[N, 2]`."""
    tiles: npt.NDArray[np.int32]
    """(height, width) of its tiles `[N, 2]`."""
    times: npt.NDArray[np.datetime64]
    """Acquisition `[N]`, NaT = undated."""
    clouds: npt.NDArray[np.float32]
    """Cloud cover in percent `[N]`, NaN = unknown."""
    id_ranks: npt.NDArray[np.int32]
    """Place of each one's id among all ids `[N]`."""
    dtype: np.dtype[Any]
    """The one dtype of all bands."""
    has_scale: bool
    """Whether any record states a scale or offset."""

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in values.items() if name not in arrays}
        return _restore, (rest, dump_compressed(arrays))

    def grid(self, i: int) -> Grid:
        """Grid of the first band of record `i` of these."""
        height, width = self.shapes[i].tolist()
        return Grid(crs=self.crs_of(i), transform=Affine(*self.transforms[i].tolist()), shape=(height, width))

    def crs_of(self, i: int) -> str:
        """CRS text of record `i` of these."""
        return self.crs_texts[int(self.crs_codes[i])]

    def id_of(self, i: int) -> str:
        """Id of record `i` of these, for messages (read from the table)."""
        return record_id(self.collection, int(self.rows[i]))


def _restore(rest: dict[str, Any], arrays: bytes) -> SceneTable:
    return SceneTable(**rest, **load_compressed(arrays))


def dump_compressed(value: Any) -> bytes:
    """Pickle a value that is large and repetitive, such as the arrays of many records, small for a worker."""
    return zlib.compress(pickle.dumps(value), 1)


def load_compressed(data: bytes) -> Any:
    """Load what `dump_compressed` returned."""
    return pickle.loads(zlib.decompress(data))


def scene_table(collection: Collection, bands: Sequence[str], also: Sequence[str] = ()) -> SceneTable:
    """Read the facts of all records that have every band, column by column; tile tables are left alone.

    Args:
        collection: The records.
        bands: Bands that are read together, of one type.
        also: Further bands that records must have, of any type.

    Raises:
        UsageError: no records, or bands or records of different types.
        UnknownBandError: a band that no record has.
    """
    if not len(collection):
        raise UsageError("The Collection is empty: no record fits its filters.")
    facts = [band_arrays(collection, band_column(collection, band)) for band in bands]
    others = [band_arrays(collection, band_column(collection, band)) for band in also if band not in bands]
    wanted = [*bands, *(band for band in also if band not in bands)]
    present = np.all(np.stack([f.present for f in (*facts, *others)]), axis=0)
    if not present.any():
        raise UnknownBandError(f"No record has all of the bands {wanted}.")
    rows = np.flatnonzero(present).astype(np.int64)
    if len(rows) < len(present):
        names = ", ".join(record_id(collection, int(row)) for row in np.flatnonzero(~present)[:_NAMED])
        more = " ..." if (~present).sum() > _NAMED else ""
        _log.warning(
            "%d of %d records lack one of %s and are not used: %s%s",
            (~present).sum(),
            len(present),
            wanted,
            names,
            more,
        )
    facts = [f.take(rows) for f in facts]
    texts, codes = collection.crs_codes()
    codes, transforms = codes[rows], facts[0].transforms
    lost = np.isnan(transforms).any(axis=1) | np.isin(codes, [i for i, text in enumerate(texts) if text is None])
    if lost.any():
        raise UsageError(
            f"Row {rows[np.argmax(lost)]} of the Collection is not georeferenced (no transform or CRS), so it has no "
            "place in a GeoDataset; read it with RasterAccessor.read_window."
        )
    used, first = np.unique(codes, return_index=True)
    order = used[np.argsort(first)]
    places = np.zeros(len(texts), np.int32)
    places[order] = np.arange(len(order))
    return SceneTable(
        collection=collection,
        rows=rows,
        crs_texts=tuple(str(texts[i]) for i in order),
        crs_codes=places[codes],
        transforms=transforms,
        shapes=facts[0].shapes,
        tiles=facts[0].tiles,
        times=record_times(collection)[rows],
        clouds=record_clouds(collection)[rows],
        id_ranks=id_ranks(collection)[rows],
        dtype=_one_dtype(bands, facts),
        has_scale=any(f.has_scale for f in facts),
    )


def pixel_sizes(transforms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Pixel size (x, y), positive, of transforms `[N, 6]` (as `Grid.res`) `[N, 2]`."""
    a, b, _, d, e, _ = transforms.T
    return np.column_stack([np.hypot(a, d), np.hypot(b, e)])


def band_column(collection: Collection, band: str) -> str:
    """What a Collection calls a band.

    Raises:
        UnknownBandError: it has none such.
    """
    have = collection.bands
    found = next((name for name in BandRegistry.names(band, collection.data_source) if name in have), None)
    if found is None:
        raise UnknownBandError(f"The Collection has no band {band!r}; it has: {', '.join(have)}.")
    return found


def _one_dtype(bands: Sequence[str], facts: Sequence[BandArrays]) -> np.dtype[Any]:
    found = {band: f.dtypes for band, f in zip(bands, facts, strict=True)}
    kinds = {kind for names in found.values() for kind in names}
    if len(kinds) > 1:
        several = next((band for band, names in found.items() if len(names) > 1), None)
        raise UsageError(
            f"The bands do not share one type: {found}. "
            + (
                "Read them as several datasets joined with `&`."
                if several is None
                else "Take the records of one type, for example with "
                f"where(pc.field('{several}{METADATA_SUFFIX}', 'dtype') == '{found[several][0]}')."
            )
        )
    (kind,) = kinds
    dtype: np.dtype[Any] = np.dtype(kind)
    return dtype


def choose_grid(facts: SceneTable, crs: str | None, res: tuple[float, float] | None) -> Grid:
    """The dataset's grid: that of the first record in the CRS chosen, else the first record's grid warped to it.

    Raises:
        MixedCRSError: records in several CRSs and none chosen.
        UsageError: the first record is rotated and neither CRS nor resolution is chosen.
    """
    if crs is None and len(facts.crs_texts) > 1:
        counts = np.bincount(facts.crs_codes)
        order = np.argsort(-counts, kind="stable")
        listing = ", ".join(f"{facts.crs_texts[i]} ({counts[i]} records)" for i in order)
        raise MixedCRSError(
            f"The records are in several CRSs: {listing}. Choose one with crs=, or narrow the Collection."
        )
    # A record that is in the chosen CRS already keeps its pixels; only where none is does the grid come from a warp.
    own = np.array([crs is None or same_crs(text, crs) for text in facts.crs_texts])[facts.crs_codes]
    first = facts.grid(int(np.argmax(own))) if own.any() else reprojected_grid(facts.grid(0), str(crs))
    if first.is_axis_aligned:
        return first if res is None else first.with_res(res)
    if crs is None and res is None:
        raise UsageError(
            f"Record {facts.id_of(0)} is rotated, so it has no grid of x and y slices; choose crs= or res= to read it "
            "north up (resampled), or read it on its own grid with RasterAccessor.read_window."
        )
    return first.with_res(first.res if res is None else res)


class RecordStore:
    """Accessors by row; each is read when it is first asked for, and the latest are kept.

    Only the bands' own columns are read, a row at a time, from copies that all processes share (see `RowStore`).
    Pickles as the Collection.
    """

    def __init__(self, collection: Collection, bands: Sequence[str], keep: int = 4096) -> None:
        columns = ["id", "datetime", "bbox", "assets", "proj:epsg", "crs", "collection"]
        columns += dict.fromkeys(f"{band_column(collection, band)}{METADATA_SUFFIX}" for band in bands)
        self._rows = RowStore(collection, columns)
        self._data_source = collection.data_source
        self._keep = keep
        self._forget()

    def _forget(self) -> None:
        self._held: OrderedDict[int, RasterAccessor] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_rows": self._rows, "_data_source": self._data_source, "_keep": self._keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, row: int) -> RasterAccessor:
        """The record at `row` of the Collection."""
        with self._lock:
            if row in self._held:
                self._held.move_to_end(row)
                return self._held[row]
            accessor = self._held[row] = RasterAccessor(self._rows[row], self._data_source)
            if len(self._held) > self._keep:
                self._held.popitem(last=False)
            return accessor

    def records(self, rows: npt.NDArray[np.int64]) -> Sequence[RasterAccessor]:
        """The records at these rows, each read when it is first looked at."""
        return _Records(self, rows)


class _Records(Sequence[RasterAccessor]):
    """A mosaic seldom needs more than the first of the records that overlap a chip."""

    def __init__(self, store: RecordStore, rows: npt.NDArray[np.int64]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> RasterAccessor: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[RasterAccessor]: ...
    def __getitem__(self, i: int | slice) -> RasterAccessor | Sequence[RasterAccessor]:
        return _Records(self._store, self._rows[i]) if isinstance(i, slice) else self._store[int(self._rows[i])]
