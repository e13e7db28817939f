"""A TorchGeo dataset over a Collection: every batch is one plan, read on this process's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import geopandas as gpd
import numpy as np
from torchgeo.datasets import GeoDataset

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.column_arrays import band_kinds
from rasteret_ml.datasets.batches import BatchReader, ReadConfig
from rasteret_ml.datasets.combine import RasteretIntersection, RasteretUnion
from rasteret_ml.datasets.dataset_grids import native_target_grids
from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.datasets.index.order import RecordOrder, checked_order
from rasteret_ml.datasets.index.query import QuerySpec, RecordQuery
from rasteret_ml.datasets.index.scene_index import (
    TileLayout,
    moved_index,
    pack_index,
    restore_index,
    scene_index,
    tile_layout,
    unpack_index,
)
from rasteret_ml.datasets.index.scene_table import RecordStore, SceneTable, band_column, choose_grid, scene_table
from rasteret_ml.datasets.index.search import Span
from rasteret_ml.datasets.protocol import Reading
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.geo.crs import LONLAT, crs_text, pyproj_crs
from rasteret_ml.geo.grid import Grid, pixel_size
from rasteret_ml.geo.resample.warp import Resampling
from rasteret_ml.loader.failures import Faults
from rasteret_ml.loader.prefetch import read_batch
from rasteret_ml.raster.explain import ReadEstimate, explain
from rasteret_ml.raster.mosaic import MosaicRule
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.target_grids import TargetGrid
from rasteret_ml.samples.composite import Composite
from rasteret_ml.samples.labels import LabelRule
from rasteret_ml.samples.plots import plot_from
from rasteret_ml.samples.sample import Sample, SampleSpec
from rasteret_ml.storage.limits import FetchLimits
from rasteret_ml.storage.open import SignHook

if TYPE_CHECKING:
    from matplotlib.figure import Figure


__all__ = ["RESERVED", "RasteretDataset", "check_together", "checked_dates", "checked_key", "is_native"]

RESERVED = ("mask_valid", "mask_aoi", "mask_clear")
"""Keys of masks that are no labels."""


def checked_key(key: str | None, is_image: bool) -> str:
    """The name of a sample's pixels.

    Raises:
        UsageError: it does not begin as its kind does, by which Kornia and `collate` know it, or is another's.
    """
    kind = "image" if is_image else "mask"
    if key is None:
        return kind
    if not key.startswith(kind) or key in RESERVED:
        raise UsageError(f"key= begins with {kind!r} and is none of {', '.join(RESERVED)}, not {key!r}.")
    return key


def is_native(grid: str, crs: Any, res: Any) -> bool:
    """Whether chips lie on their own scenes' grids.

    Raises:
        UsageError: no such kind of grid, or a CRS or pixel size for grids that have their own.
    """
    if grid not in ("common", "native"):
        raise UsageError(f"grid= is 'common' or 'native', not {grid!r}.")
    if grid == "native" and (crs is not None or res is not None):
        raise UsageError("grid='native' keeps each scene's own CRS and pixels: leave out crs= and res=.")
    return grid == "native"


def check_together(
    collection: Collection,
    is_image: bool,
    dates: bool,
    quality: QualityMask | None,
    clear_first: bool,
    remap: Mapping[int, int] | None,
) -> None:
    """Refuse options that contradict each other, or what the files say of their quality band.

    Raises:
        UsageError: the message says which.
    """
    if not is_image and (dates or quality is not None):
        raise UsageError("series=, composite= and quality= are for images: labels are read as they are.")
    if is_image and remap is not None:
        raise UsageError("remap= is for labels: say is_image=False.")
    if clear_first and quality is None:
        raise UsageError("clear_first= needs quality=, the band that tells what is clear.")
    if quality is not None:
        for kind, nodata in band_kinds(collection, band_column(collection, quality.band)):
            quality.check(None if kind is None else np.dtype(kind), nodata)


def checked_dates(series: Any, composite: Any, facts: SceneTable) -> TimeSeries | None:
    """How dates are chosen; None = records are not told apart by date.

    Raises:
        UsageError: a record without a date.
    """
    dates = TimeSeries.of(series) or (None if composite is None else TimeSeries())
    undated = np.isnat(facts.times)
    if dates is not None and undated.any():
        raise UsageError(
            f"Record {facts.id_of(int(np.argmax(undated)))} has no date, so it has no place in a series "
            f"({int(undated.sum())} have none); leave such records out, for example with where()."
        )
    return dates


class RasteretDataset(GeoDataset):
    """Chips of a Collection as native-dtype samples with validity, for TorchGeo, torch and Lightning.

    `ds[x, y, t]` takes slices in the dataset's CRS (any of them may be left out, or open) or an `AOI`. The chip
    lies on the dataset's grid, its origin rounded to the nearest pixel (half up), and is exactly as large as was
    asked for: what lies outside every scene is invalid, not missing. Where records overlap, the first valid
    pixel wins, in the order (`order`, id).

    Args:
        collection: The records; or a path to a Collection.
        bands: Bands along C (one, for labels).
        is_image: True gives `image`; False gives `mask`: int64 classes, or float32 for a float raster.
        key: Another name for these pixels, which begins with "image" or "mask": for several label heads in an `&`.
        grid: "common": every chip on one grid (`crs`, `res`), records off it resampled. "native": each chip on the
            grid of its own scene, nothing resampled; records in several CRSs mix freely in a batch, and `epsg` in
            the sample says which. Where they are in several, the dataset's own CRS is longitude/latitude. Records on
            other pixels than the best one's are no part of its chip, nor of its series.
        crs: Grid CRS (any form). Default the records' own; needed on a common grid where they have several.
        res: Pixel size in CRS units, one number or (x, y). Default the first record's first band.
        resampling: Kernel for records or bands off the grid. Default nearest for labels, colour tables and bits, else
            bilinear.
        order: Which of overlapping records comes first: "newest", "oldest", "clearest" (least cloud), "nearest" (to
            the middle of the time asked for), or a date: nearest to it.
        harmonize: Bring records of another scale or offset to the first one's; else such records in one chip are
            refused.
        quality: A band that tells clear pixels, as a `QualityMask` or the name of a preset ("sentinel-2-scl",
            "landsat-qa-pixel"): adds `mask_clear`. It is never mixed into `mask_valid`.
        clear_first: With `quality`: clear pixels of later records replace pixels that are valid, but not clear.
        series: A `TimeSeries`, or its length: samples `[T, C, H, W]` with `time [T]`.
        composite: "median", "mean", "max_ndvi" or {"max_index": (band, band)}: the dates of `series` (default all) as
            one image, of clear pixels where there are any.
        remap: For labels: stored value to class; values that are not listed become `ignore_index`.
        ignore_index: For labels: class of invalid pixels.
        nodata: Overrides the files' declared nodata.
        mask_aoi: Add `mask_aoi`, the AOI's own polygon, to each sample.
        all_touched: For the polygon: pixels touched count as inside, not only those whose centre is.
        mask_outside: Fill what lies outside the polygon: with nodata or 0, of labels with `ignore_index` or NaN.
        valid_per_band: `mask_valid` as `[C, H, W]` instead of its AND `[1, H, W]`.
        transforms: Called with each sample, as in TorchGeo.
        sign: Called with each href just before it is read (must pickle, for spawned workers).
        backend: Something else to read from (see `as_reader`).
        limits: Timeouts, retries and connections.
        max_concurrent: Range requests in flight, in each process.
        cache_bytes: Decoded tiles kept in each process, in bytes; 0 = none. Worth it where chips of nearby batches
            share tiles: see `Locality`, and `DataLoader.stats()` for the hits.

    Raises:
        UsageError: no records, bands of several types, a grid that cannot be, options that contradict each other.
        MixedCRSError: records in several CRSs, a common grid and no `crs`.
        UnknownBandError: a band that the Collection lacks.
    """

    def __init__(
        self,
        collection: Collection | str,
        bands: Sequence[str],
        *,
        is_image: bool = True,
        key: str | None = None,
        grid: Literal["common", "native"] = "common",
        crs: Any = None,
        res: float | tuple[float, float] | None = None,
        resampling: Resampling | None = None,
        order: RecordOrder = "newest",
        harmonize: bool = False,
        quality: QualityMask | str | Mapping[str, Any] | None = None,
        clear_first: bool = False,
        series: TimeSeries | int | Mapping[str, Any] | None = None,
        composite: Composite | str | Mapping[str, Any] | None = None,
        remap: dict[int, int] | None = None,
        ignore_index: int = -100,
        nodata: int | float | None = None,
        mask_aoi: bool = False,
        all_touched: bool = False,
        mask_outside: bool = False,
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
        clear = None if quality is None else QualityMask.of(quality)
        stored = self.bands if clear is None else tuple(dict.fromkeys((*self.bands, clear.band)))
        self._facts = scene_table(self.collection, self.bands, stored)
        check_together(self.collection, is_image, bool(series or composite), clear, clear_first, remap)
        dates = checked_dates(series, composite, self._facts)
        rule = None if is_image else LabelRule.make(self.bands, self._facts.dtype, remap, ignore_index)
        self._finding = QuerySpec(order=checked_order(order), series=dates, native=is_native(grid, crs, res))
        several = len(self._facts.crs_texts) > 1 or not self._facts.grid(0).is_axis_aligned
        lonlat = self._finding.native and several
        chosen = LONLAT if lonlat else None if crs is None else crs_text(crs)
        self._grid = choose_grid(self._facts, chosen, pixel_size(res))
        self._res = self._grid.res
        filling = MosaicRule(
            bands=self.bands,
            resampling=resampling or (None if is_image else "nearest"),
            nodata=nodata,
            categories=rule is not None and not rule.continuous,
            quality=clear,
            clear_first=clear_first,
            harmonize=harmonize,
        )
        form = SampleSpec(
            key=checked_key(key, is_image),
            rule=rule,
            mask_aoi=mask_aoi,
            all_touched=all_touched,
            mask_outside=mask_outside,
            valid_per_band=valid_per_band,
            with_scale=self._facts.has_scale,
            with_clear=clear is not None,
            with_epsg=self._finding.native,
            series=dates is not None and composite is None,
        )
        self._batches = BatchReader(
            store=RecordStore(self.collection, stored),
            rule=filling,
            series=dates,
            composite=Composite.of(composite, self.bands),
            form=form,
            origin=ReadConfig(
                sign=sign,
                backend=backend,
                limits=limits or FetchLimits(),
                max_concurrent=int(max_concurrent),
                cache_bytes=int(cache_bytes),
            ),
            dtype=self._facts.dtype,
        )
        self._index = scene_index(self._facts, str(self._grid.crs))
        self._found: RecordQuery | None = None
        self._span: Span | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None, "_span": None, "_index": pack_index(self._index)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_index": unpack_index(state["_index"])})

    def __copy__(self) -> RasteretDataset:
        other = object.__new__(type(self))  # not by way of __getstate__, which packs the index
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RasteretDataset:
        # TorchGeo's splitters deep-copy a dataset and give it another index; the records are shared.
        other = copy.copy(self)
        other._index = self._index.copy()
        other._found, other._span = None, None
        return other

    @property
    def index(self) -> gpd.GeoDataFrame:
        """TorchGeo's index: geometries, closed time intervals and `rid`, rows of the Collection. May be assigned."""
        return self._index

    @index.setter
    def index(self, new: gpd.GeoDataFrame) -> None:
        self._index = restore_index(new, self._index)

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
        self._refuse_another_grid()
        grid = choose_grid(self._facts, text, None)
        self._index = moved_index(self._index, text)
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
            self._refuse_another_grid()
            self._grid = self._grid.with_res(pair)
            self._res = self._grid.res

    def _refuse_another_grid(self) -> None:
        if self._finding.native:
            raise UsageError(
                "A dataset on native grids keeps their own CRS and pixels; put it on the left of `&` and `|`, or give "
                "it a common grid."
            )

    def tile_layout(self) -> TileLayout:
        """Where the tiles of the scenes lie, in the dataset's CRS."""
        return tile_layout(self._facts, str(self._grid.crs))

    def target_grids(self) -> list[TargetGrid]:
        """For samplers: the CRSs and pixels that chips lie on, and what is covered in each."""
        if self._finding.native:
            return native_target_grids(self.index, self._facts)
        t = self._grid.transform
        shapes = np.asarray(self.index.geometry, dtype=object)
        return [TargetGrid(crs=str(self._grid.crs), res=self._res, origin=(t.c, t.f), shapes=shapes)]

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for.

        Raises:
            UsageError: no query by place, or one in another CRS than the grid's.
            NoOverlapError: on native grids: no record there.
        """
        parts = query if isinstance(query, tuple) else (query,)
        if not parts or not all(isinstance(part, slice) for part in parts):
            raise UsageError(
                f"A dataset is asked by place, as ds[x, y, t] with slices or with an AOI, not {query!r}; give the "
                "loader a sampler, such as RandomAOISampler(ds, size, length) or GridAOISampler(ds, size)."
            )
        x, y, t = self._disambiguate_slice(query)
        own = str(self._grid.crs)
        crs = own if not isinstance(query, AOI) or query.crs is None else query.crs
        if self._finding.native:
            return self._finder.native_grid((x, y, t), crs, self._res)
        if crs != own:
            raise UsageError(f"The AOI is in {crs}, the dataset in {own}; make the sampler from this dataset.")
        grid = self._grid
        if x.step is not None and y.step is not None and not self._is_own_res(float(x.step), float(y.step)):
            grid = grid.with_res((float(x.step), float(y.step)))
        return grid.snap((float(x.start), float(y.start), float(x.stop), float(y.stop)))

    def _is_own_res(self, x: float, y: float) -> bool:
        return all(abs(step - res) <= 1e-9 * res for step, res in zip((x, y), self._res, strict=True))

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
        return self._batches.bytes(grids)

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid], faults: Faults | None = None) -> Reading:
        """Plan; the work that is left has to happen on the loop, and its result is for `finish`."""
        return self._batches.begin(self._finder, queries, grids, self._times(queries), faults)

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Samples from what `begin`'s work gave."""
        samples = self._batches.finish(queries, self._times(queries), raw)
        return samples if self.transforms is None else [self.transforms(sample) for sample in samples]

    def explain(self, queries: Sequence[Any]) -> ReadEstimate:
        """What reading these queries as one batch would fetch, without a request.

        Exact where the best records are valid everywhere; gaps in them bring further records.
        """
        grids = [self.chip_grid(query) for query in queries]
        dates = [self._finder.dates(*asked) for asked in zip(grids, queries, self._times(queries), strict=True)]
        return explain(self._batches.batch(grids, dates, None).plans)

    @property
    def _finder(self) -> RecordQuery:
        if self._found is None or self._found.index is not self.index:
            self._found = RecordQuery(self.index, self._facts, self._finding)
        return self._found

    def _times(self, queries: Sequence[Any]) -> list[slice]:
        return [self._disambiguate_slice(query)[2] for query in queries]

    def has(self, query: Any, grid: Grid) -> bool:
        """Whether there are records, and dates enough, for a chip."""
        try:
            return bool(self._finder.dates(grid, query, self._disambiguate_slice(query)[2]))
        except NoOverlapError:
            return False

    @property
    def ignore_index(self) -> int | None:
        """Class of invalid pixels; None where its samples are images."""
        rule = self._batches.form.rule
        return None if rule is None else rule.ignore_index

    def plot(self, sample: Sample, **options: Any) -> Figure:
        """A picture of one of its samples; options as for `samples.plot.plot_sample`."""
        return plot_from([self], sample, options)

    # Combining ----------------------------------------------------------------------------------------------

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        """Both at once: batching kept, validities joined by AND, the other side on this side's grid."""
        return RasteretIntersection(self, other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        """Either: batching kept, gaps of this side filled from the other by validity."""
        return RasteretUnion(self, other)


def _is_open(part: Any) -> bool:
    return not isinstance(part, slice) or part.start is None or part.stop is None or part.step is None
