"""The records of a Collection as a TorchGeo index, and as accessors on demand."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, overload

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from affine import Affine

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.facts import BandArrays, band_arrays, id_ranks, outlines, record_id, record_times
from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.collection.store import RowStore
from rasteret_ml.errors import MixedCRSError, UnknownBandError, UsageError
from rasteret_ml.geo.crs import same_crs, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.target import warped_grid
from rasteret_ml.record import BandRegistry
from rasteret_ml.scenes.extents import cut_to_footprints, follows_the_edge, grid_outlines
from rasteret_ml.scenes.packing import pack_array, unpack_array

__all__ = ["RecordStore", "SceneFacts", "TileLayout", "choose_grid", "scene_facts", "scene_index", "tile_layout"]

_log = logging.getLogger(__name__)
_CHUNK = 8192
"""Records whose outlines are cut together, by one thread."""
_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneFacts:
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
        arrays = {name: pack_array(value) for name, value in values.items() if isinstance(value, np.ndarray)}
        return _unpacked, (values | arrays, tuple(arrays))

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileLayout:
    """Where the tiles of scenes lie, in the dataset's CRS; arrays `[N]` in the order of `rows`."""

    rows: npt.NDArray[np.int64]
    """Rows of the Collection, ascending."""
    x0: npt.NDArray[np.float64]
    """Left edge of the first tile."""
    y0: npt.NDArray[np.float64]
    """Upper edge of the first tile."""
    tile_width: npt.NDArray[np.float64]
    """Width of a tile in CRS units."""
    tile_height: npt.NDArray[np.float64]
    """Height of a tile in CRS units."""


def _unpacked(values: dict[str, Any], arrays: Sequence[str]) -> SceneFacts:
    whole: dict[str, Any] = {name: unpack_array(v) if name in arrays else v for name, v in values.items()}
    return SceneFacts(**whole)


def scene_facts(collection: Collection, bands: Sequence[str]) -> SceneFacts:
    """Read the facts of all records, column by column; tile tables are left alone.

    Raises:
        UsageError: no records, or bands or records of different types.
        UnknownBandError: a band that no record has.
    """
    if not len(collection):
        raise UsageError("The Collection is empty: no record fits its filters.")
    facts = [band_arrays(collection, _column(collection, band)) for band in bands]
    present = np.all(np.stack([f.present for f in facts]), axis=0)
    if not present.any():
        raise UnknownBandError(f"No record has all of the bands {list(bands)}.")
    rows = np.flatnonzero(present).astype(np.int64)
    if len(rows) < len(present):
        _log.warning("%d of %d records lack one of %s and are not used", sum(~present), len(present), list(bands))
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
    return SceneFacts(
        collection=collection,
        rows=rows,
        crs_texts=tuple(str(texts[i]) for i in order),
        crs_codes=places[codes],
        transforms=transforms,
        shapes=facts[0].shapes,
        tiles=facts[0].tiles,
        times=record_times(collection)[rows],
        id_ranks=id_ranks(collection)[rows],
        dtype=_one_dtype(bands, facts),
        has_scale=any(f.has_scale for f in facts),
    )


def _column(collection: Collection, band: str) -> str:
    have = collection.bands
    found = next((name for name in BandRegistry.names(band, collection.data_source) if name in have), None)
    if found is None:
        raise UnknownBandError(f"The Collection has no band {band!r}; it has: {', '.join(have)}.")
    return found


def _one_dtype(bands: Sequence[str], facts: Sequence[BandArrays]) -> np.dtype[Any]:
    found = {band: f.dtypes for band, f in zip(bands, facts, strict=True)}
    kinds = {kind for names in found.values() for kind in names}
    if len(kinds) > 1:
        raise UsageError(
            f"The bands do not share one type: {found}. Read them as several datasets joined with `&`, or narrow "
            "the Collection."
        )
    (kind,) = kinds
    dtype: np.dtype[Any] = np.dtype(kind)
    return dtype


def choose_grid(facts: SceneFacts, crs: str | None, res: tuple[float, float] | None) -> Grid:
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
    first = facts.grid(int(np.argmax(own))) if own.any() else warped_grid(facts.grid(0), str(crs))
    if first.is_axis_aligned:
        return first if res is None else first.with_res(res)
    if crs is None and res is None:
        raise UsageError(
            f"Record {facts.id_of(0)} is rotated, so it has no grid of x and y slices; choose crs= or res= to read it "
            "north up (resampled), or read it on its own grid with RasterAccessor.read_window."
        )
    return first.with_res(first.res if res is None else res)


def scene_index(facts: SceneFacts, crs: str) -> gpd.GeoDataFrame:
    """TorchGeo's index: geometry in `crs`, closed time intervals named `datetime`, and `rid` = row.

    The geometry is the raster's own extent cut to the footprint; undated records span all time.
    """
    geometry = _extents(facts, crs)
    lost = ~np.isfinite(shapely.bounds(geometry)).all(axis=1)
    if lost.any():
        raise UsageError(
            f"Record {facts.id_of(int(np.argmax(lost)))} has no place in {crs}; choose another crs=, or leave it out."
        )
    first = facts.grid(0)
    pixel = max(first.res if first.crs == crs else warped_grid(first, crs).res)

    def cut(part: tuple[slice, npt.NDArray[np.object_]]) -> None:
        geometry[part[0]] = _cut(facts, part[0], geometry[part[0]], part[1], crs, pixel)

    with ThreadPoolExecutor(_THREADS) as pool:  # shapely and pyproj let go of the GIL
        for _ in pool.map(cut, _footprints(facts)):
            pass
    undated = np.isnat(facts.times)
    left = np.where(undated, pd.Timestamp.min.to_datetime64(), facts.times)
    right = np.where(undated, pd.Timestamp.max.to_datetime64(), facts.times)
    intervals = pd.IntervalIndex.from_arrays(
        pd.DatetimeIndex(left), pd.DatetimeIndex(right), closed="both", name="datetime"
    )
    return gpd.GeoDataFrame({"rid": facts.rows}, geometry=geometry, crs=crs, index=intervals)


def _extents(facts: SceneFacts, crs: str) -> npt.NDArray[np.object_]:
    """The whole rasters in `crs`."""
    geometry = grid_outlines(facts.transforms, facts.shapes)
    for code, name in enumerate(facts.crs_texts):
        here = facts.crs_codes == code
        moved = transform_geometries(geometry[here], name, crs)
        wrong = ~shapely.is_valid(moved)
        moved[wrong] = shapely.make_valid(moved[wrong])
        geometry[here] = moved
    return geometry


def _footprints(facts: SceneFacts) -> Iterator[tuple[slice, npt.NDArray[np.object_]]]:
    """Footprints in longitude/latitude, some at a time, and whose they are."""
    start = row = 0
    for wkb in outlines(facts.collection, _CHUNK):
        stop = int(np.searchsorted(facts.rows, row + len(wkb)))
        if stop > start:
            yield slice(start, stop), np.asarray(shapely.from_wkb(wkb[facts.rows[start:stop] - row]), dtype=object)
        start, row = stop, row + len(wkb)


def _cut(
    facts: SceneFacts,
    part: slice,
    extents: npt.NDArray[np.object_],
    footprints: npt.NDArray[np.object_],
    crs: str,
    pixel: float,
) -> npt.NDArray[np.object_]:
    cutting = ~(shapely.is_missing(footprints) | shapely.is_empty(footprints))
    codes = facts.crs_codes[part]
    for code in np.unique(codes[cutting]):
        here = np.flatnonzero(cutting & (codes == code))
        cutting[here] = ~follows_the_edge(
            footprints[here], facts.transforms[part][here], facts.shapes[part][here], facts.crs_texts[code]
        )
    if cutting.any():
        extents[cutting] = cut_to_footprints(extents[cutting], footprints[cutting], crs, pixel)
    return extents


def tile_layout(facts: SceneFacts, crs: str) -> TileLayout:
    """Where the first bands' tiles lie in `crs`; of records in another CRS, or rotated, about where.

    Those lie on no lattice of `crs`: their tiles are taken to start at the upper left corner of their bounds, and
    to be as large as the raster's bounds divided by its tiles.
    """
    sizes = np.where(facts.tiles > 0, facts.tiles, facts.shapes).astype(np.float64)
    a, b, c, d, e, f = facts.transforms.T
    height, width = facts.shapes.T.astype(np.float64)
    x0, y0 = np.minimum(c, c + a * width), np.maximum(f, f + e * height)
    # Tiles are counted from the raster's first corner: of one that runs from right to left or upwards, the first tile
    # seen from the upper left is the last, which may be cut.
    x0 = np.where(a < 0, c + a * np.ceil(width / sizes[:, 1]) * sizes[:, 1], x0)
    y0 = np.where(e > 0, f + e * np.ceil(height / sizes[:, 0]) * sizes[:, 0], y0)
    tile_width, tile_height = abs(a) * sizes[:, 1], abs(e) * sizes[:, 0]
    own = np.array([same_crs(text, crs) for text in facts.crs_texts])[facts.crs_codes] & (b == 0) & (d == 0)
    if not own.all():
        bounds = shapely.bounds(_extents(facts, crs)[~own])
        x0[~own], y0[~own] = bounds[:, 0], bounds[:, 3]
        tile_width[~own] = (bounds[:, 2] - bounds[:, 0]) * (sizes[:, 1] / width)[~own]
        tile_height[~own] = (bounds[:, 3] - bounds[:, 1]) * (sizes[:, 0] / height)[~own]
    return TileLayout(rows=facts.rows, x0=x0, y0=y0, tile_width=tile_width, tile_height=tile_height)


class RecordStore:
    """Accessors by row; each is read when it is first asked for, and the latest are kept.

    Only the bands' own columns are read, a row at a time, from copies that all processes share (see `RowStore`).
    Pickles as the Collection.
    """

    def __init__(self, collection: Collection, bands: Sequence[str], keep: int = 4096) -> None:
        columns = ["id", "datetime", "bbox", "assets", "proj:epsg", "crs", "collection"]
        columns += dict.fromkeys(f"{_column(collection, band)}{METADATA_SUFFIX}" for band in bands)
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
