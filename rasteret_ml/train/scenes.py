"""The records of a Collection as a TorchGeo index, and as accessors on demand."""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.cog.metadata import transform_from_list
from rasteret_ml.collection.collection import Collection, record_info
from rasteret_ml.collection.schema import METADATA_SUFFIX
from rasteret_ml.errors import MixedCRSError, UnknownBandError, UsageError
from rasteret_ml.geo.crs import LONLAT, same_crs, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.accessor import RasterAccessor
from rasteret_ml.raster.target import warped_grid
from rasteret_ml.record import BandRegistry

__all__ = ["RecordStore", "SceneFacts", "choose_grid", "scene_facts", "scene_index"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SceneFacts:
    """What the dataset knows of its records without their tile tables."""

    rows: npt.NDArray[np.int64]
    """Rows of the Collection that have every band `[N]`."""
    crs: tuple[str | None, ...]
    """CRS text of each."""
    grids: tuple[Grid, ...]
    """Grid of the first band of each."""
    times: npt.NDArray[np.datetime64]
    """Acquisition `[N]`, NaT = undated."""
    ids: tuple[str, ...]
    """Record ids."""
    footprints: npt.NDArray[np.object_]
    """Footprints in lon/lat, None where unknown `[N]`."""
    dtype: np.dtype[Any]
    """The one dtype of all bands."""
    has_scale: bool
    """Whether any record states a scale or offset."""


def scene_facts(collection: Collection, bands: Sequence[str]) -> SceneFacts:
    """Read the facts of all records.

    Raises:
        UsageError: no records, or bands or records of different types.
        UnknownBandError: a band that no record has.
    """
    if not len(collection):
        raise UsageError("The Collection is empty: no record fits its filters.")
    columns = [_column(collection, band) for band in bands]
    facts = [collection.band_facts(column) for column in columns]
    present = np.all(np.stack([f["_present"].to_numpy() for f in facts]), axis=0)
    if not present.any():
        raise UnknownBandError(f"No record has all of the bands {list(bands)}.")
    rows = np.flatnonzero(present)
    if len(rows) < len(present):
        _log.warning("%d of %d records lack one of %s and are not used", sum(~present), len(present), list(bands))
    crs = collection.record_crs()
    first = facts[0].take(rows)
    width = first["image_width" if "image_width" in first.column_names else "width"].to_pylist()
    height = first["image_height" if "image_height" in first.column_names else "height"].to_pylist()
    grids = []
    for row, values, shape in zip(rows, first["transform"].to_pylist(), zip(height, width, strict=True), strict=True):
        transform = transform_from_list(values)
        if transform is None or crs[row] is None:
            raise UsageError(
                f"Row {row} of the Collection is not georeferenced (no transform or CRS), so it has no place in a "
                "GeoDataset; read it with RasterAccessor.read_window."
            )
        grids.append(Grid(crs=crs[row], transform=transform, shape=shape))
    light = collection.to_table([n for n in ("id", "datetime", "geometry") if n in collection.schema.names]).take(rows)
    return SceneFacts(
        rows=rows,
        crs=tuple(crs[row] for row in rows),
        grids=tuple(grids),
        times=light["datetime"].to_numpy().astype("datetime64[ns]"),
        ids=tuple(str(v) for v in light["id"].to_pylist()),
        footprints=_footprints(light),
        dtype=_one_dtype(bands, [f.take(rows) for f in facts]),
        has_scale=any(
            f[name].null_count < len(f) for f in facts for name in ("scale", "offset") if name in f.column_names
        ),
    )


def _column(collection: Collection, band: str) -> str:
    have = collection.bands
    found = next((name for name in BandRegistry.names(band, collection.data_source) if name in have), None)
    if found is None:
        raise UnknownBandError(f"The Collection has no band {band!r}; it has: {', '.join(have)}.")
    return found


def _footprints(light: Any) -> npt.NDArray[np.object_]:
    if "geometry" not in light.column_names:
        return np.full(len(light), None, dtype=object)
    return np.asarray(shapely.from_wkb(light["geometry"].to_numpy()), dtype=object)


def _one_dtype(bands: Sequence[str], facts: Sequence[Any]) -> np.dtype[Any]:
    found = {band: sorted(set(f["dtype"].to_pylist())) for band, f in zip(bands, facts, strict=True)}
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
    counts = Counter(facts.crs)
    if crs is None and len(counts) > 1:
        listing = ", ".join(f"{name} ({n} records)" for name, n in counts.most_common())
        raise MixedCRSError(
            f"The records are in several CRSs: {listing}. Choose one with crs=, or narrow the Collection."
        )
    # A record that is in the chosen CRS already keeps its pixels; only where none is does the grid come from a warp.
    own = [grid for grid in facts.grids if crs is None or same_crs(grid.crs, crs)]
    first = own[0] if own else warped_grid(facts.grids[0], str(crs))
    if first.is_axis_aligned:
        return first if res is None else first.with_res(res)
    if crs is None and res is None:
        raise UsageError(
            f"Record {facts.ids[0]} is rotated, so it has no grid of x and y slices; choose crs= or res= to read it "
            "north up (resampled), or read it on its own grid with RasterAccessor.read_window."
        )
    return first.with_res(first.res if res is None else res)


def scene_index(facts: SceneFacts, crs: str) -> gpd.GeoDataFrame:
    """TorchGeo's index: geometry in `crs`, closed time intervals named `datetime`, and `rid` = row.

    The geometry is the raster's own extent cut to the footprint; undated records span all time.
    """
    outlines = np.array([grid.footprint for grid in facts.grids], dtype=object)
    geometry = np.empty(len(outlines), dtype=object)
    own = np.array(facts.crs, dtype=object)
    for name in dict.fromkeys(facts.crs):
        assert name is not None
        here = own == name
        geometry[here] = shapely.make_valid(transform_geometries(outlines[here], name, crs))
    lost = ~np.isfinite(shapely.bounds(geometry)).all(axis=1)
    if lost.any():
        raise UsageError(
            f"Record {facts.ids[int(np.argmax(lost))]} has no place in {crs}; choose another crs=, or leave it out."
        )
    known = np.array([f is not None and not f.is_empty for f in facts.footprints])
    if known.any():
        prints = shapely.make_valid(transform_geometries(facts.footprints[known], LONLAT, crs))
        own_extent = geometry[known]
        cut = shapely.intersection(own_extent, prints)
        # A footprint that follows the raster's edge within a pixel is that edge, rounded: cutting by it would
        # open hairline gaps between neighbours. One that misses the raster is wrong and cuts nothing.
        pixel = max(facts.grids[0].res) if facts.crs[0] == crs else max(warped_grid(facts.grids[0], crs).res)
        whole = shapely.covers(shapely.buffer(prints, pixel), own_extent) | (shapely.area(cut) == 0)
        geometry[known] = np.where(whole, own_extent, cut)
    undated = np.isnat(facts.times)
    left = np.where(undated, pd.Timestamp.min.to_datetime64(), facts.times)
    right = np.where(undated, pd.Timestamp.max.to_datetime64(), facts.times)
    intervals = pd.IntervalIndex.from_arrays(
        pd.DatetimeIndex(left), pd.DatetimeIndex(right), closed="both", name="datetime"
    )
    return gpd.GeoDataFrame({"rid": facts.rows}, geometry=geometry, crs=crs, index=intervals)


class RecordStore:
    """Accessors by row, from a table that each process loads once, when it first needs it.

    Only the bands' own columns are read; tile tables stay in Arrow memory. Pickles as the Collection.
    """

    def __init__(self, collection: Collection, bands: Sequence[str], keep: int = 4096) -> None:
        self._collection = collection
        self._bands = tuple(bands)
        self._keep = keep
        self._forget()

    def _forget(self) -> None:
        self._table: Any = None
        self._held: OrderedDict[int, RasterAccessor] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_collection": self._collection, "_bands": self._bands, "_keep": self._keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, row: int) -> RasterAccessor:
        """The record at `row` of the Collection."""
        with self._lock:
            if row in self._held:
                self._held.move_to_end(row)
                return self._held[row]
            if self._table is None:
                self._table = self._load()
            accessor = RasterAccessor(record_info(self._table, row, row), self._collection.data_source)
            self._held[row] = accessor
            if len(self._held) > self._keep:
                self._held.popitem(last=False)
            return accessor

    def _load(self) -> Any:
        wanted = {"id", "datetime", "bbox", "assets", "proj:epsg", "crs", "collection"}
        wanted |= {f"{_column(self._collection, band)}{METADATA_SUFFIX}" for band in self._bands}
        names = [name for name in self._collection.schema.names if name in wanted]
        return self._collection.to_table(names).combine_chunks()
