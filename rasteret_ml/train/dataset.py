"""A TorchGeo dataset over a Collection: every batch is one plan, read on this process's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from torchgeo.datasets import GeoDataset

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.fetch.limits import FetchLimits
from rasteret_ml.fetch.open import SignHook, SigningReader
from rasteret_ml.fetch.reader import as_reader
from rasteret_ml.geo.crs import crs_text, full_turn, pyproj_crs, transform_geometries
from rasteret_ml.geo.grid import Grid, pixel_size
from rasteret_ml.geo.longitudes import around_the_globe
from rasteret_ml.geo.warp import Resampling
from rasteret_ml.raster.execute import Engine
from rasteret_ml.raster.explain import ReadEstimate, explain
from rasteret_ml.raster.mosaic import Mosaic, MosaicRequest, first_plans, read_mosaics
from rasteret_ml.runtime.worker_loop import WorkerLoop
from rasteret_ml.train.combine import RasteretIntersection, RasteretUnion
from rasteret_ml.train.reading import Reading, read_batch
from rasteret_ml.train.sample import LabelRule, Sample, make_sample
from rasteret_ml.train.scenes import RecordStore, choose_grid, scene_facts, scene_index

__all__ = ["RasteretDataset"]


class RasteretDataset(GeoDataset):
    """Chips of a Collection as native-dtype samples with validity, for TorchGeo, torch and Lightning.

    `ds[x, y, t]` takes slices in the dataset's CRS (any of them may be left out, or open) or an `AOI`. The chip
    lies on the dataset's grid, its origin rounded to the nearest pixel (half up), and is exactly as large as was
    asked for: what lies outside every scene is invalid, not missing. Where records overlap, the first valid
    pixel wins, in the order (newest, id).

    Args:
        collection: The records; or a path to a Collection.
        bands: Bands along C (one, for labels).
        is_image: True gives `image`; False gives `mask`: int64 classes, or float32 for a float raster.
        crs: Grid CRS (any form). Default the records' own; needed where they have several.
        res: Pixel size in CRS units, one number or (x, y). Default the first record's first band.
        resampling: Kernel for records or bands off the grid. Default nearest for labels, colour tables and bits, else
            bilinear.
        remap: For labels: stored value to class; values that are not listed become `ignore_index`.
        ignore_index: For labels: class of invalid pixels.
        nodata: Overrides the files' declared nodata.
        mask_aoi: Add `mask_aoi`, the AOI's own polygon, to each sample.
        all_touched: For `mask_aoi`: pixels touched count as inside, not only those whose centre is.
        valid_per_band: `mask_valid` as `[C, H, W]` instead of its AND `[1, H, W]`.
        transforms: Called with each sample, as in TorchGeo.
        sign: Called with each href just before it is read (must pickle, for spawned workers).
        backend: Something else to read from (see `as_reader`).
        limits: Timeouts, retries and connections.
        max_concurrent: Range requests in flight, in each process.

    Raises:
        UsageError: no records, bands of several types, a grid that cannot be.
        MixedCRSError: records in several CRSs and no `crs`.
        UnknownBandError: a band that the Collection lacks.
    """

    def __init__(
        self,
        collection: Collection | str,
        bands: Sequence[str],
        *,
        is_image: bool = True,
        crs: Any = None,
        res: float | tuple[float, float] | None = None,
        resampling: Resampling | None = None,
        remap: dict[int, int] | None = None,
        ignore_index: int = -100,
        nodata: int | float | None = None,
        mask_aoi: bool = False,
        all_touched: bool = False,
        valid_per_band: bool = False,
        transforms: Callable[[Sample], Sample] | None = None,
        sign: SignHook | None = None,
        backend: Any = None,
        limits: FetchLimits | None = None,
        max_concurrent: int = 50,
    ) -> None:
        self.collection = collection if isinstance(collection, Collection) else Collection.open(collection)
        if isinstance(bands, str) or not bands:
            raise UsageError(f"bands is a non-empty list of band names, not {bands!r}.")
        self.bands = tuple(str(band) for band in bands)
        self.is_image = is_image
        self.transforms = transforms
        self.paths: list[str] = []
        self._facts = scene_facts(self.collection, self.bands)
        self._rule = LabelRule.make(self.bands, self._facts.dtype, remap, ignore_index) if not is_image else None
        if is_image and remap is not None:
            raise UsageError("remap= is for labels: say is_image=False.")
        self._grid = choose_grid(self._facts, None if crs is None else crs_text(crs), pixel_size(res))
        self._res = self._grid.res
        self._resampling: Resampling | None = resampling or (None if is_image else "nearest")
        self._nodata = nodata
        self._mask_aoi, self._all_touched, self._valid_per_band = mask_aoi, all_touched, valid_per_band
        self._sign, self._backend = sign, backend
        self._limits = limits or FetchLimits()
        self._max_concurrent = max_concurrent
        self._store = RecordStore(self.collection, self.bands)
        self.index = scene_index(self._facts, str(self._grid.crs))
        self._lookup: _Lookup | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lookup": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> RasteretDataset:
        # TorchGeo's splitters deep-copy a dataset and give it another index; the records are shared.
        other = copy.copy(self)
        other.index = self.index.copy()
        other._lookup = None
        return other

    # The grid ---------------------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """The grid that every chip lies on (its shape is the first record's)."""
        return self._grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored pixels."""
        return self._facts.dtype

    @property
    def crs(self) -> Any:
        """CRS of the grid, a pyproj object as in TorchGeo. Setting it reprojects the grid."""
        return pyproj_crs(str(self._grid.crs))

    @crs.setter
    def crs(self, new_crs: Any) -> None:
        text = crs_text(new_crs)
        if text == self._grid.crs:
            return
        grid = choose_grid(self._facts, text, None)
        geometry = transform_geometries(np.asarray(self.index.geometry, dtype=object), str(self._grid.crs), text)
        columns = {name: self.index[name] for name in self.index.columns if name != self.index.geometry.name}
        self.index = gpd.GeoDataFrame(columns, geometry=geometry, crs=text, index=self.index.index)
        self._grid, self._res = grid, grid.res

    @property
    def res(self) -> tuple[float, float]:
        """Pixel size (x, y) in CRS units. Setting it keeps the grid's corner."""
        return self._res

    @res.setter
    def res(self, new_res: float | tuple[float, float]) -> None:
        pair = pixel_size(new_res)
        assert pair is not None
        if pair != self._res:
            self._grid = self._grid.with_res(pair)
            self._res = self._grid.res

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""
        parts = query if isinstance(query, tuple) else (query,)
        if not parts or not all(isinstance(part, slice) for part in parts):
            raise UsageError(
                f"A dataset is asked by place, as ds[x, y, t] with slices or with an AOI, not {query!r}; give the "
                "loader a sampler, such as RandomAOISampler(ds, size, length) or GridAOISampler(ds, size)."
            )
        x, y, _ = self._disambiguate_slice(query)
        grid = self._grid
        if x.step is not None and y.step is not None and not np.allclose((x.step, y.step), self._res, rtol=1e-9):
            grid = grid.with_res((float(x.step), float(y.step)))
        return grid.snap((float(x.start), float(y.start), float(x.stop), float(y.stop)))

    # Reading ------------------------------------------------------------------------------------------------

    def __getitem__(self, query: Any) -> Sample:
        """One sample; see the class.

        Raises:
            NoOverlapError: (an IndexError) no record at this place and time.
            ReadError: a tile could not be read.
        """
        return self.__getitems__([query])[0]

    def __getitems__(self, queries: Sequence[Any]) -> list[Sample]:
        """A sample per query, all read together: each tile is fetched and decoded once."""
        return self.read_on(queries, [self.chip_grid(query) for query in queries])

    def read_on(self, queries: Sequence[Any], grids: Sequence[Grid]) -> list[Sample]:
        """Samples on given chip grids, as the left operand of `&` asks them of the right one."""
        return read_batch(self, queries, grids)

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading:
        """The work that has to happen on the loop; its result is for `finish`."""
        requests = [self._request(query, grid) for query, grid in zip(queries, grids, strict=True)]
        return lambda loop: read_mosaics(requests, self._engine(loop))

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Samples from what `begin`'s work gave."""
        samples = [self._sample(query, mosaic) for query, mosaic in zip(queries, raw, strict=True)]
        return samples if self.transforms is None else [self.transforms(sample) for sample in samples]

    def explain(self, queries: Sequence[Any]) -> ReadEstimate:
        """What reading these queries as one batch would fetch, without a request.

        Exact where the best records are valid everywhere; gaps in them bring further records.
        """
        requests = [self._request(query, self.chip_grid(query)) for query in queries]
        return explain([plan for request in requests for plan in first_plans(request)])

    def _engine(self, loop: WorkerLoop) -> Engine:
        reader = loop.reader(self._limits) if self._backend is None else as_reader(self._backend)
        return Engine(
            reader=reader if self._sign is None else SigningReader(reader, self._sign),
            pool=loop.pool,
            max_concurrent=self._max_concurrent,
            meter=loop.meter,
        )

    def _request(self, query: Any, grid: Grid) -> MosaicRequest:
        rows = self._match(query, grid)
        if not len(rows):
            _, _, t = self._disambiguate_slice(query)
            raise NoOverlapError(
                f"No record at x, y = {tuple(round(v, 6) for v in grid.bounds)} ({grid.crs}) between {t.start} and "
                f"{t.stop}; the dataset spans {tuple(round(float(v), 6) for v in self.index.total_bounds)}."
            )
        return MosaicRequest(
            grid=grid,
            records=[self._store[int(row)] for row in rows],
            bands=self.bands,
            resampling=self._resampling,
            nodata=self._nodata,
            categories=self._rule is not None and not self._rule.continuous,
        )

    def _match(self, query: Any, grid: Grid) -> Any:
        """Rows that overlap the chip in space (with an area) and the query in time, best first."""
        if self._lookup is None or self._lookup.index is not self.index:
            ids = dict(zip(self._facts.rows.tolist(), self._facts.ids, strict=True))
            self._lookup = _Lookup(self.index, ids, full_turn(self._grid.crs))
        _, _, t = self._disambiguate_slice(query)
        return self._lookup.rows(grid.footprint, t)

    def _sample(self, query: Any, mosaic: Mosaic) -> Sample:
        _, _, t = self._disambiguate_slice(query)
        return make_sample(
            mosaic,
            query,
            t,
            rule=self._rule,
            mask_aoi=self._mask_aoi,
            all_touched=self._all_touched,
            valid_per_band=self._valid_per_band,
            with_scale=self._facts.has_scale,
        )

    # Combining ----------------------------------------------------------------------------------------------

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        """Both at once: batching kept, validities joined by AND, the other side on this side's grid."""
        return RasteretIntersection(self, other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        """Either: batching kept, gaps of this side filled from the other by validity."""
        return RasteretUnion(self, other)


class _Lookup:
    """Spatial and temporal search over one index, rebuilt when TorchGeo's splitters assign another."""

    def __init__(self, index: gpd.GeoDataFrame, ids: dict[int, str], turn: float | None) -> None:
        if "rid" not in index.columns:
            raise UsageError("The dataset's index lost its 'rid' column; keep it when assigning a new index.")
        self.index = index
        self._rid = index["rid"].to_numpy()
        self._left = index.index.left.to_numpy().astype("datetime64[ns]").astype(np.int64)
        self._right = index.index.right.to_numpy().astype("datetime64[ns]").astype(np.int64)
        self._shapes = np.asarray(index.geometry, dtype=object)
        self._tree = shapely.STRtree(self._shapes)
        self._turn = turn
        undated = self._left == pd.Timestamp.min.value
        newest = np.where(undated, np.iinfo(np.int64).min, self._left)
        names = np.array([ids.get(int(r), "") for r in self._rid])
        # rank: newest first, then by id; undated records last.
        self._rank = np.empty(len(names), np.int64)
        self._rank[np.lexsort((names, -newest.astype(np.float64)))] = np.arange(len(names))

    def rows(self, footprint: shapely.Polygon, t: slice) -> Any:
        found = self._overlapping(footprint)
        start, stop = pd.Timestamp(t.start).as_unit("ns").value, pd.Timestamp(t.stop).as_unit("ns").value
        found = found[(self._left[found] <= stop) & (self._right[found] >= start)]
        found = found[np.argsort(self._rank[found])]
        rows = self._rid[found][:: int(t.step or 1)]
        _, first = np.unique(rows, return_index=True)
        return rows[np.sort(first)]

    def _overlapping(self, footprint: shapely.Polygon) -> Any:
        """Positions of what shares an area with the chip; of longitudes, also a turn away."""
        hits = []
        for place in around_the_globe([footprint], self._turn):
            near = self._tree.query(place, predicate="intersects")
            hits.append(near[shapely.area(shapely.intersection(self._shapes[near], place)) > 0])
        return np.unique(np.concatenate(hits))
