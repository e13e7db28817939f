"""Metadata of all records of a Collection as arrays, and records as accessors on demand."""

from __future__ import annotations

import functools
import logging
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from affine import Affine

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.column_arrays import (
    BandArrays,
    band_arrays,
    id_ranks,
    record_cloud_cover,
    record_id,
    record_times,
)
from rasteret_ml.collection.row_store import RowStore
from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.errors import MixedCRSError, UnknownBandError, UsageError
from rasteret_ml.geo.crs import same_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.raster_info import BandRegistry
from rasteret_ml.raster.reprojected_grid import reprojected_grid

_log = logging.getLogger(__name__)
_MAX_NAMED = 5  # Records named in a warning.
_KEPT = 4096  # Accessors that are kept.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneTable:
    """Metadata of a dataset's records without their tile tables: arrays, no object per record."""

    collection: Collection  #: The records.
    rows: npt.NDArray[np.int64]  #: Rows of the Collection that have every band `[N]`, ascending.
    crs_texts: tuple[str, ...]  #: The distinct CRSs of these records, in order of first appearance.
    crs_codes: npt.NDArray[np.int32]  #: Index of each record's CRS in `crs_texts` `[N]`.
    transforms: npt.NDArray[np.float64]  #: a, b, c, d, e, f of each record's first band `[N, 6]`.
    shapes: npt.NDArray[np.int32]  #: (height, width) of each record's first band `[N, 2]`.
    tiles: npt.NDArray[np.int32]  #: (height, width) of its tiles `[N, 2]`.
    times: npt.NDArray[np.datetime64]  #: Acquisition `[N]`, NaT = undated.
    clouds: npt.NDArray[np.float32]  #: Cloud cover in percent `[N]`, NaN = unknown.
    id_ranks: npt.NDArray[np.int32]  #: Rank of each record's id among all ids `[N]`.
    dtype: np.dtype[Any]  #: The one dtype of all bands.
    has_scale: bool  #: Whether any record states a scale or offset.

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in values.items() if name not in arrays}
        return _restore, (rest, dump_compressed(arrays))

    def grid(self, i: int) -> Grid:
        """Return the grid of the first band of record `i`."""
        height, width = self.shapes[i].tolist()
        return Grid(crs=self.crs_of(i), transform=Affine(*self.transforms[i].tolist()), shape=(height, width))

    def crs_of(self, i: int) -> str:
        """Return the CRS text of record `i`."""
        return self.crs_texts[int(self.crs_codes[i])]

    def id_of(self, i: int) -> str:
        """Return the id of record `i`, for messages (read from the table)."""
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
    """Read the metadata of all records that have every band, column by column, without their tile tables.

    `also` are further bands that records must have, such as a quality band. Raises UsageError if `bands` are of several
    types, UnknownBandError if no record has all bands.
    """
    if not len(collection):
        raise UsageError("The Collection is empty: no record matches its filters.")
    columns = {band: band_arrays(collection, band_column(collection, band)) for band in (*bands, *also)}
    present = np.all([column.present for column in columns.values()], axis=0)
    if not present.any():
        raise UnknownBandError(f"No record has all of the bands {list(columns)}.")
    rows = np.flatnonzero(present).astype(np.int64)
    if len(rows) < len(present):
        missing = np.flatnonzero(~present)
        names = ", ".join(record_id(collection, int(row)) for row in missing[:_MAX_NAMED])
        names += " ..." if len(missing) > _MAX_NAMED else ""
        message = "%d of %d records lack one of %s and are not used: %s"
        _log.warning(message, len(missing), len(present), list(columns), names)
    arrays = [columns[band].take(rows) for band in bands]
    texts, codes = collection.crs_codes()
    codes, transforms = codes[rows], arrays[0].transforms
    unplaced = np.isnan(transforms).any(axis=1) | np.isin(codes, [i for i, text in enumerate(texts) if text is None])
    if unplaced.any():
        raise UsageError(
            f"Row {rows[np.argmax(unplaced)]} of the Collection is not georeferenced (no transform or CRS), so it "
            "cannot be in a GeoDataset; read it with RasterAccessor.read_window."
        )
    codes, used = pd.factorize(codes)
    return SceneTable(
        collection=collection,
        rows=rows,
        crs_texts=tuple(str(texts[i]) for i in used),
        crs_codes=codes.astype(np.int32),
        transforms=transforms,
        shapes=arrays[0].shapes,
        tiles=arrays[0].tiles,
        times=record_times(collection)[rows],
        clouds=record_cloud_cover(collection)[rows],
        id_ranks=id_ranks(collection)[rows],
        dtype=_one_dtype(bands, arrays),
        has_scale=any(band.has_scale for band in arrays),
    )


def pixel_sizes(transforms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the positive pixel sizes (x, y) `[N, 2]` of transforms `[N, 6]`, as `Grid.res` does."""
    a, b, _, d, e, _ = transforms.T
    return np.column_stack([np.hypot(a, d), np.hypot(b, e)])


def band_column(collection: Collection, band: str) -> str:
    """Return the name under which a Collection stores a band; UnknownBandError if it has none."""
    have = collection.bands
    found = next((name for name in BandRegistry.names(band, collection.data_source) if name in have), None)
    if found is None:
        raise UnknownBandError(f"The Collection has no band {band!r}; it has: {', '.join(have)}.")
    return found


def _one_dtype(bands: Sequence[str], scenes: Sequence[BandArrays]) -> np.dtype[Any]:
    found = {band: f.dtypes for band, f in zip(bands, scenes, strict=True)}
    kinds = {kind for names in found.values() for kind in names}
    if len(kinds) > 1:
        several = next((band for band, names in found.items() if len(names) > 1), None)
        advice = "Read them as several datasets joined with `&`."
        if several is not None:
            one = f"where(pc.field('{several}{METADATA_SUFFIX}', 'dtype') == '{found[several][0]}')"
            advice = f"Take the records of one type, for example with {one}."
        raise UsageError(f"The bands do not share one type: {found}. {advice}")
    (kind,) = kinds
    return np.dtype(kind)


def choose_grid(scenes: SceneTable, crs: str | None, res: tuple[float, float] | None) -> Grid:
    """Return the dataset's grid: that of the first record in the chosen CRS, else the first record's grid reprojected.

    Raises MixedCRSError if records are in several CRSs and none is chosen, UsageError if the first record is rotated
    and no CRS and pixel size are chosen.
    """
    if crs is None and len(scenes.crs_texts) > 1:
        counts = np.bincount(scenes.crs_codes)
        order = np.argsort(-counts, kind="stable")
        listing = ", ".join(f"{scenes.crs_texts[i]} ({counts[i]} records)" for i in order)
        raise MixedCRSError(
            f"The records are in several CRSs: {listing}. Choose one with crs=, or narrow the Collection."
        )
    # A record in the chosen CRS keeps its pixels; the grid is reprojected only if there is none.
    own = np.array([crs is None or same_crs(text, crs) for text in scenes.crs_texts])[scenes.crs_codes]
    first = scenes.grid(int(np.argmax(own))) if own.any() else reprojected_grid(scenes.grid(0), str(crs))
    if first.is_axis_aligned:
        return first if res is None else first.with_res(res)
    if crs is None and res is None:
        raise UsageError(
            f"Record {scenes.id_of(0)} is rotated, so x and y slices cannot address its pixels; choose crs= or res= to "
            "read it north up (resampled), or read it on its own grid with RasterAccessor.read_window."
        )
    return first.with_res(first.res if res is None else res)


class RecordStore:
    """Accessors by row, read on first use; the most recently used are kept.

    Only the bands' own columns are read, a row at a time, from copies that all processes share (see `RowStore`).
    Pickles as the Collection.
    """

    def __init__(self, collection: Collection, bands: Sequence[str]) -> None:
        columns = ["id", "datetime", "bbox", "assets", "proj:epsg", "crs", "collection"]
        columns += dict.fromkeys(f"{band_column(collection, band)}{METADATA_SUFFIX}" for band in bands)
        self.__setstate__((RowStore(collection, columns), collection.data_source))

    def __getstate__(self) -> tuple[RowStore, str]:
        return self._rows, self._data_source

    def __setstate__(self, state: tuple[RowStore, str]) -> None:
        self._rows, self._data_source = state
        self._accessor = functools.lru_cache(_KEPT)(self._read)

    def _read(self, row: int) -> RasterAccessor:
        return RasterAccessor(self._rows[row], self._data_source)

    def __getitem__(self, row: int) -> RasterAccessor:
        """Return the record at `row` of the Collection."""
        return self._accessor(row)

    def records(self, rows: npt.NDArray[np.int64]) -> Sequence[RasterAccessor]:
        """Return the records at these rows as a lazy sequence."""
        return _Records(self, rows)


class _Records(Sequence[RasterAccessor]):
    """A lazy sequence: a mosaic seldom needs more than the first of the records that overlap a chip."""

    def __init__(self, store: RecordStore, rows: npt.NDArray[np.int64]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        return _Records(self._store, self._rows[i]) if isinstance(i, slice) else self._store[int(self._rows[i])]
