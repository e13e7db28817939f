"""A TorchGeo dataset over a Collection: every batch is one plan, read on this process's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import geopandas as gpd
import numpy as np
import torch
from torchgeo.datasets import GeoDataset

from rasteret_ml.collection.collection import Collection
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.fetch.limits import FetchLimits
from rasteret_ml.fetch.open import SignHook, SigningReader
from rasteret_ml.fetch.reader import as_reader
from rasteret_ml.geo.crs import crs_text, full_turn, pyproj_crs, transform_geometries
from rasteret_ml.geo.grid import Grid, pixel_size
from rasteret_ml.geo.warp import Resampling
from rasteret_ml.loading.buffers import batch_buffer, torch_dtype
from rasteret_ml.loading.combine import RasteretIntersection, RasteretUnion
from rasteret_ml.loading.lookahead import read_batch
from rasteret_ml.loading.reading import Reading
from rasteret_ml.loading.sample import LabelRule, Sample, SampleForm, make_samples
from rasteret_ml.raster.execute import Engine
from rasteret_ml.raster.explain import ReadEstimate, explain
from rasteret_ml.raster.mosaic import Mosaic, MosaicBatch, MosaicRequest
from rasteret_ml.runtime.worker_loop import WorkerLoop
from rasteret_ml.scenes.facts import RecordStore, TileLayout, choose_grid, scene_facts, scene_index, tile_layout
from rasteret_ml.scenes.lookup import Lookup, Span
from rasteret_ml.scenes.packing import pack_index, unpack_index

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
        cache_bytes: Decoded tiles kept in each process, in bytes; 0 = none. Worth it where chips of nearby batches
            share tiles: see `Locality`, and `DataLoader.stats()` for the hits.

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
        cache_bytes: int = 0,
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
        self._form = SampleForm(
            rule=self._rule,
            mask_aoi=mask_aoi,
            all_touched=all_touched,
            valid_per_band=valid_per_band,
            with_scale=self._facts.has_scale,
        )
        self._sign, self._backend = sign, backend
        self._limits = limits or FetchLimits()
        if max_concurrent < 1 or cache_bytes < 0:
            raise UsageError(f"max_concurrent is at least 1 and cache_bytes 0, not {max_concurrent}, {cache_bytes}.")
        self._max_concurrent, self._cache_bytes = int(max_concurrent), int(cache_bytes)
        self._store = RecordStore(self.collection, self.bands)
        self.index = scene_index(self._facts, str(self._grid.crs))
        self._lookup: Lookup | None = None
        self._span: Span | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lookup": None, "_span": None, "index": pack_index(self.index)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"index": unpack_index(state["index"])})

    def __copy__(self) -> RasteretDataset:
        other = object.__new__(type(self))  # not by way of __getstate__, which packs the index
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RasteretDataset:
        # TorchGeo's splitters deep-copy a dataset and give it another index; the records are shared.
        other = copy.copy(self)
        other.index = self.index.copy()
        other._lookup, other._span = None, None
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
    def bounds(self) -> tuple[slice, slice, slice]:
        """(x, y, t) of the whole index, as in TorchGeo; worked out once for each index."""
        if self._span is None or self._span.index is not self.index:
            self._span = Span(self.index)
        return self._span.slices(self.res)

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

    def tile_layout(self) -> TileLayout:
        """Where the tiles of the scenes lie, in the dataset's CRS."""
        return tile_layout(self._facts, str(self._grid.crs))

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
        if (
            x.step is not None
            and y.step is not None
            and not (_near(x.step, self._res[0]) and _near(y.step, self._res[1]))
        ):
            grid = grid.with_res((float(x.step), float(y.step)))
        return grid.snap((float(x.start), float(y.start), float(x.stop), float(y.stop)))

    def _disambiguate_slice(self, query: Any) -> tuple[slice, slice, slice]:
        """(x, y, t) with nothing left open; what is open takes TorchGeo's way, over the bounds of the whole index."""
        if isinstance(query, tuple) and len(query) == 3 and not any(_is_open(part) for part in query):
            return query[0], query[1], query[2]
        slices: tuple[slice, slice, slice] = super()._disambiguate_slice(query)
        return slices

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
        return read_batch(self, queries)

    def batch_bytes(self, grids: Sequence[Grid]) -> int:
        """Memory of a batch's pixels and validity while it is read."""
        pixels = sum(grid.height * grid.width for grid in grids)
        return pixels * len(self.bands) * (self.dtype.itemsize + 1)

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading:
        """Plan; the work that is left has to happen on the loop, and its result is for `finish`."""
        images = None
        if self._rule is None and len({grid.shape for grid in grids}) == 1:
            shape = (len(grids), len(self.bands), *grids[0].shape)
            images = batch_buffer(shape, torch_dtype(self.dtype))
        targets = [None] * len(grids) if images is None else list(images.numpy())
        batch = MosaicBatch([self._request(*parts) for parts in zip(queries, grids, targets, strict=True)])

        async def read(loop: WorkerLoop) -> tuple[torch.Tensor | None, list[Mosaic]]:
            return images, await batch.read(self._engine(loop))

        return read

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Samples from what `begin`'s work gave."""
        images, mosaics = raw
        times = [self._disambiguate_slice(query)[2] for query in queries]
        samples = make_samples(self._form, queries, times, mosaics, images)
        return samples if self.transforms is None else [self.transforms(sample) for sample in samples]

    def explain(self, queries: Sequence[Any]) -> ReadEstimate:
        """What reading these queries as one batch would fetch, without a request.

        Exact where the best records are valid everywhere; gaps in them bring further records.
        """
        return explain(MosaicBatch([self._request(query, self.chip_grid(query)) for query in queries]).plans)

    def _engine(self, loop: WorkerLoop) -> Engine:
        own = self._backend is None
        reader = loop.reader(self._limits) if own else as_reader(self._backend)
        return Engine(
            reader=reader if self._sign is None else SigningReader(reader, self._sign),
            pool=loop.pool,
            stop_early=True,
            slots=loop.slots(self._max_concurrent),
            tiles=loop.tiles(self._cache_bytes, reader if own else self._backend),
            meter=loop.meter,
        )

    def _request(self, query: Any, grid: Grid, into: Any = None) -> MosaicRequest:
        rows = self._match(query, grid)
        if not len(rows):
            _, _, t = self._disambiguate_slice(query)
            raise NoOverlapError(
                f"No record at x, y = {tuple(round(v, 6) for v in grid.bounds)} ({grid.crs}) between {t.start} and "
                f"{t.stop}; the dataset spans {tuple(round(float(v), 6) for v in self.index.total_bounds)}."
            )
        return MosaicRequest(
            grid=grid,
            records=self._store.records(rows),
            bands=self.bands,
            resampling=self._resampling,
            nodata=self._nodata,
            categories=self._rule is not None and not self._rule.continuous,
            into=into,
        )

    def _match(self, query: Any, grid: Grid) -> Any:
        """Rows that overlap the chip in space (with an area) and the query in time, best first."""
        if self._lookup is None or self._lookup.index is not self.index:
            self._lookup = Lookup(self.index, self._facts, full_turn(self._grid.crs))
        _, _, t = self._disambiguate_slice(query)
        return self._lookup.rows(grid.footprint, t)

    # Combining ----------------------------------------------------------------------------------------------

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        """Both at once: batching kept, validities joined by AND, the other side on this side's grid."""
        return RasteretIntersection(self, other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        """Either: batching kept, gaps of this side filled from the other by validity."""
        return RasteretUnion(self, other)


def _is_open(part: Any) -> bool:
    return not isinstance(part, slice) or part.start is None or part.stop is None or part.step is None


def _near(step: float, res: float) -> bool:
    return abs(step - res) <= 1e-9 * res
