"""A TorchGeo dataset over a Collection: every batch is one plan, read on this process's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rasteret_ml.collection.collection import Collection, shorten, summary_html
from rasteret_ml.collection.column_arrays import records_digest
from rasteret_ml.datasets.batches import BatchRequest, SampleBatch
from rasteret_ml.datasets.chip_dataset import ChipDataset, same_res
from rasteret_ml.datasets.chip_reader import ChipReader, RasterBatch
from rasteret_ml.datasets.dataset_config import (
    GridKind,
    LabelConfig,
    MosaicConfig,
    SampleConfig,
    check_grid,
    check_quality,
    describe_grid,
    label_key,
    resolve_series,
)
from rasteret_ml.datasets.index.dates import TimeSeries
from rasteret_ml.datasets.index.scene_index import (
    TileLayout,
    describe_times,
    native_target_grids,
    reproject_index,
    scene_index,
    tile_layout,
)
from rasteret_ml.datasets.index.scene_table import RecordStore, choose_grid, scene_table
from rasteret_ml.datasets.index.search import QuerySpec, RecordQuery, parse_order
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.fingerprint import digest
from rasteret_ml.geo.crs import LONLAT, crs_text, pyproj_crs
from rasteret_ml.geo.grid import Grid, pixel_size
from rasteret_ml.raster.engine import ReadConfig
from rasteret_ml.raster.jobs import ReadEstimate, explain
from rasteret_ml.raster.quality import QualityMask
from rasteret_ml.raster.read import ReadResult
from rasteret_ml.raster.requests import ChipRules
from rasteret_ml.raster.source import validate_bands
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.target_grids import TargetGrid
from rasteret_ml.samplers.sampler import config_from
from rasteret_ml.samples.buffers import torch_dtype
from rasteret_ml.samples.composite import Composite
from rasteret_ml.samples.plots import plot_from
from rasteret_ml.samples.sample import LabelRule, Sample, SampleSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RasteretDataset(ChipDataset):
    """Chips of a Collection as native-dtype samples with validity, for TorchGeo, torch and Lightning.

    `ds[x, y, t]` takes slices in the dataset's CRS (any of them may be left out, or open) or an `AOI`. The chip lies on
    the dataset's grid, its origin rounded to the nearest pixel (half up), and has exactly the requested size: pixels
    outside every scene are invalid, not missing. Where records overlap, the first valid pixel wins, in the order
    (`mosaic.order`, id).

    Args:
        collection: The records; or a path to a Collection.
        bands: Bands along C (one, for labels).
        is_image: True gives `image`; False gives `mask`: int64 classes, or float32 for a float raster.
        grid: "common": every chip on one grid (`crs`, `res`), records on other grids resampled. "native": each chip on
            the grid of its own scene, nothing resampled; records in several CRSs mix freely in a batch, and `epsg` in
            the sample says which. Where the records have several CRSs, the dataset's own CRS is longitude/latitude.
            Records with other pixels than the best one's are not part of its chip or its series.
        crs: CRS of the grid (any form). Default the records' own; required on a common grid where they have several.
        res: Pixel size in CRS units, one number or (x, y). Default that of the first record's first band.
        mosaic: How overlapping records fill a chip: a `MosaicConfig`, or a mapping of its fields.
        quality: A band that says which pixels are clear, as a `QualityMask` or the name of a preset ("sentinel-2-scl",
            "landsat-qa-pixel"): adds `mask_clear`, which is never mixed into `mask_valid`.
        series: A `TimeSeries`, or its length: samples `[T, C, H, W]` with `time [T]`.
        composite: "median", "mean", "max_ndvi" or {"max_index": (band, band)}: the dates of `series` (default all) as
            one image, of clear pixels where there are any.
        labels: How stored values become classes: a `LabelConfig`, or a mapping of its fields.
        sample: What samples hold: a `SampleConfig`, or a mapping of its fields.
        transforms: Called with each sample, as in TorchGeo.
        reading: How bytes are read: a `ReadConfig`, or a mapping of its fields.

    Raises:
        UsageError: no records, bands of several types, an invalid grid, options that contradict each other.
        MixedCRSError: records in several CRSs, a common grid and no `crs`.
        UnknownBandError: a band that the Collection lacks.

    Example:
        >>> images = rm.RasteretDataset("scenes.parquet", ["B04", "B08"], quality="sentinel-2-scl")  # doctest: +SKIP
        >>> sample = images[500000:502560, 4997440:5000000]  # doctest: +SKIP
        >>> sample["image"].shape  # doctest: +SKIP
        torch.Size([2, 256, 256])
    """

    def __init__(
        self,
        collection: Collection | str,
        bands: Sequence[str],
        *,
        is_image: bool = True,
        grid: GridKind = "common",
        crs: Any = None,
        res: float | tuple[float, float] | None = None,
        mosaic: MosaicConfig | Mapping[str, Any] | None = None,
        quality: QualityMask | str | Mapping[str, Any] | None = None,
        series: TimeSeries | int | Mapping[str, Any] | None = None,
        composite: Composite | str | Mapping[str, Any] | None = None,
        labels: LabelConfig | Mapping[str, Any] | None = None,
        sample: SampleConfig | Mapping[str, Any] | None = None,
        transforms: Callable[[Sample], Sample] | None = None,
        reading: ReadConfig | Mapping[str, Any] | None = None,
    ) -> None:
        self.collection = collection if isinstance(collection, Collection) else Collection.open(collection)
        self.bands = tuple(str(band) for band in validate_bands(bands))
        self.is_image = is_image
        self.transforms = transforms
        self.paths: list[str] = []
        if not is_image and (series or composite or quality is not None):
            raise UsageError("series=, composite= and quality= are for images: labels are read as they are.")
        if is_image and labels is not None:
            raise UsageError("labels= is for label rasters: add is_image=False.")
        check_grid(grid, crs, res)
        config = config_from(MosaicConfig, mosaic, "mosaic")
        clear = None if quality is None else QualityMask.parse(quality)
        stored = self.bands if clear is None else tuple(dict.fromkeys((*self.bands, clear.band)))
        self._scenes = scene_table(self.collection, self.bands, stored)
        check_quality(self.collection, clear, config)
        dates = resolve_series(series, composite, self._scenes)
        self._query = QuerySpec(order=parse_order(config.order), series=dates, native=grid == "native")
        several = len(self._scenes.crs_texts) > 1 or not self._scenes.grid(0).is_axis_aligned
        chosen = LONLAT if self._query.native and several else None if crs is None else crs_text(crs)
        self._grid = choose_grid(self._scenes, chosen, pixel_size(res))
        self._reader = ChipReader(
            store=RecordStore(self.collection, stored),
            rules=self._rules(config, clear),
            series=dates,
            composite=Composite.parse(composite, self.bands),
            spec=self._spec(sample, labels, clear is not None, dates is not None and composite is None),
            reading=config_from(ReadConfig, reading, "reading"),
            dtype=self._scenes.dtype,
        )
        self._index = scene_index(self._scenes, str(self._grid.crs))
        self._records: RecordQuery | None = None

    def _rules(self, config: MosaicConfig, quality: QualityMask | None) -> ChipRules:
        return ChipRules(
            bands=self.bands,
            resampling=config.resampling or (None if self.is_image else "nearest"),
            nodata=config.nodata,
            categories=not self.is_image and self._scenes.dtype.kind != "f",
            quality=quality,
            clear_first=config.clear_first,
            harmonize=config.harmonize,
        )

    def _spec(self, sample: Any, labels: Any, clear: bool, series: bool) -> SampleSpec:
        config, classes = config_from(SampleConfig, sample, "sample"), config_from(LabelConfig, labels, "labels")
        rule = None
        if not self.is_image:
            rule = LabelRule.make(self.bands, self._scenes.dtype, classes.remap, classes.ignore_index)
        return SampleSpec(
            key=label_key(config.key, "image" if self.is_image else "mask"),
            rule=rule,
            mask_aoi=config.mask_aoi,
            all_touched=config.all_touched,
            mask_outside=config.mask_outside,
            valid_per_band=config.valid_per_band,
            with_scale=self._scenes.has_scale,
            with_clear=clear,
            with_epsg=self._query.native,
            series=series,
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_records": None}

    def __repr__(self) -> str:
        bands = shorten(self.bands)
        return f"RasteretDataset({len(self.index):,} records, bands=[{bands}], {self.dtype}, [{describe_grid(self)}])"

    def _repr_html_(self) -> str:
        """Summary for notebooks. Samples are plain dicts; the last row says what they hold."""
        spec, types = self._reader.spec, self.pixel_types
        axes = ["H", "W"] if spec.rule is not None else [str(len(self.bands)), "H", "W"]
        pixels = f"{spec.key} [{', '.join(['T'] * spec.series + axes)}]"
        dtype = str(types[spec.key]).removeprefix("torch.") if types else ""
        extra = {"mask_aoi"} if spec.mask_aoi else set()
        rows = {
            "Records": f"{len(self.index):,}",
            "Bands": shorten(self.bands),
            "Stored as": str(self.dtype),
            "Grid": describe_grid(self),
            "Time": describe_times(self.index),
            "Samples": ", ".join([f"{pixels} {dtype}".rstrip(), *sorted((spec.keys | extra) - {spec.key})]),
        }
        return summary_html("RasteretDataset", rows)

    # The grid ---------------------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """The grid that every chip lies on; its shape is the first record's."""
        return self._grid

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored pixels."""
        return self._scenes.dtype

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
        self._grid = choose_grid(self._scenes, text, None)
        self._index = reproject_index(self._index, text)

    @property
    def res(self) -> tuple[float, float]:
        """Pixel size (x, y) in CRS units. Setting it keeps the grid's corner."""
        return self._grid.res

    @res.setter
    def res(self, new_res: float | tuple[float, float]) -> None:
        pair = pixel_size(new_res)
        assert pair is not None
        if pair != self._grid.res:
            self._refuse_another_grid()
            self._grid = self._grid.with_res(pair)

    def _refuse_another_grid(self) -> None:
        if self._query.native:
            raise UsageError(
                "A dataset on native grids keeps their own CRS and pixels; put it on the left of `&` and `|`, or use "
                "grid='common'."
            )

    def tile_layout(self) -> TileLayout:
        """Return where the tiles of the scenes lie, in the dataset's CRS."""
        return tile_layout(self._scenes, str(self._grid.crs))

    def target_grids(self) -> list[TargetGrid]:
        """Return the CRSs and pixels that chips lie on, and what is covered in each; for samplers."""
        if self._query.native:
            return native_target_grids(self._index, self._scenes)
        t = self._grid.transform
        shapes = np.asarray(self._index.geometry, dtype=object)
        return [TargetGrid(crs=str(self._grid.crs), res=self._grid.res, origin=(t.c, t.f), shapes=shapes)]

    def chip_grid(self, query: Any) -> Grid:
        """Return the grid of a query's chip.

        Raises:
            UsageError: not a spatial query, or one in another CRS than the grid's.
            NoOverlapError: on native grids: no record there.
        """
        x, y, t = self._slices(query)
        own = str(self._grid.crs)
        crs = own if not isinstance(query, AOI) or query.crs is None else query.crs
        if self._query.native:
            return self._record_query().native_grid((x, y, t), crs, self._grid.res)
        if crs != own:
            raise UsageError(f"The AOI is in {crs}, the dataset in {own}; make the sampler from this dataset.")
        grid = self._grid
        steps = float(x.step), float(y.step)
        if not same_res(steps, grid.res):
            grid = grid.with_res(steps)
        return grid.snap((float(x.start), float(y.start), float(x.stop), float(y.stop)))

    # Reading ------------------------------------------------------------------------------------------------

    @property
    def version(self) -> tuple[Any, ...]:
        """See `ReadableDataset`."""
        return self._index, self._grid

    def requests(self, queries: Sequence[Any], grids: Sequence[Grid] | None = None) -> RasterBatch:
        """Plan the read of a batch; see `ReadableDataset`."""
        if grids is None:
            grids = [self.chip_grid(query) for query in queries]
        times = [self._disambiguate_slice(query)[2] for query in queries]
        return self._reader.requests(self._record_query(), queries, grids, times)

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Turn the chips of a batch into samples; see `ReadableDataset`."""
        assert isinstance(batch, RasterBatch)
        (result,) = results
        read = self._reader.samples(batch, result)
        return SampleBatch(samples=self._transformed(read.samples), errors=read.errors)

    def explain(self, queries: Sequence[Any]) -> ReadEstimate:
        """Estimate what reading these queries as one batch would fetch, without a request.

        Exact where the best records are valid everywhere; gaps in them need further records.
        """
        ((_, requests),) = self.requests(queries).reads
        return explain([plan for request in requests for plan in request.plans])

    def _record_query(self) -> RecordQuery:
        if self._records is None or self._records.index is not self._index:
            self._records = RecordQuery(self._index, self._scenes, self._query)
        return self._records

    def has(self, query: Any, grid: Grid) -> bool:
        """Return whether there are records, and enough dates, for a chip."""
        try:
            return bool(self._record_query().dates(grid, query, self._disambiguate_slice(query)[2]))
        except NoOverlapError:
            return False

    # What samples hold --------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        """Key of the pixels in samples."""
        return self._reader.spec.key

    @property
    def ignore_index(self) -> int | None:
        """Class of invalid pixels; None for images."""
        rule = self._reader.spec.rule
        return None if rule is None else rule.ignore_index

    @property
    def ignored_classes(self) -> dict[str, int]:
        """See `ReadableDataset`."""
        return {} if self.ignore_index is None else {self.key: self.ignore_index}

    @property
    def sample_keys(self) -> set[str]:
        """Keys of every sample, whatever the query."""
        return self._reader.spec.keys

    @property
    def pixel_types(self) -> dict[str, torch.dtype]:
        """Types of the pixels by key, where they are known before reading."""
        if self.transforms is not None or self._reader.composite is not None:
            return {}
        rule = self._reader.spec.rule
        return {self.key: torch_dtype(self.dtype) if rule is None else rule.dtype}

    @property
    def reading(self) -> ReadConfig:
        """How bytes are read."""
        return self._reader.reading

    @property
    def is_native(self) -> bool:
        """Whether chips lie on the grids of their own scenes."""
        return self._query.native

    def fingerprint(self) -> str:
        """Return a digest of the records and how they are read; the addresses of the files do not count."""
        reader = self._reader
        bands = ",".join(self.bands)
        bands = bands if len(bands) <= 60 else f"{len(self.bands)}:{digest(bands)}"
        options = reader.rules, reader.spec, reader.series, reader.composite, self._query
        grid = self._grid.crs, self._grid.transform
        return f"{records_digest(self.collection)} {bands} {digest(*options, *grid)}"

    def plot(self, sample: Sample, **options: Any) -> Figure:
        """Plot one of its samples; options as for `samples.plots.plot_sample`."""
        return plot_from([self], sample, options)
