"""`&` and `|` of datasets: batches of both sides are read as one, and validity decides what is kept."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import geopandas as gpd
import numpy as np
import shapely
import torch
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import GeoDataset, IntersectionDataset, UnionDataset

from rasteret_ml.collection.collection import summary_html
from rasteret_ml.datasets.batches import BatchRequest, ReadableDataset, SampleBatch, is_readable, read_batch
from rasteret_ml.datasets.dataset_config import describe_grid
from rasteret_ml.datasets.index.scene_index import describe_times
from rasteret_ml.datasets.index.search import interval_ns
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.fingerprint import digest
from rasteret_ml.geo.crs import Geometries, crs_text, pyproj_crs, same_crs, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.regions import clip_polygons, polygonal_each, union_polygons
from rasteret_ml.geo.times import INSTANT
from rasteret_ml.raster.read import ReadResult
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of
from rasteret_ml.samples.collate import blank_padding
from rasteret_ml.samples.merge import (
    add_query_keys,
    fill_missing_keys,
    join_samples,
    merge_by_validity,
    scale_name,
    stock_sample,
    with_validity,
)
from rasteret_ml.samples.min_valid import resample_low_valid
from rasteret_ml.samples.plots import plot_from
from rasteret_ml.samples.sample import Sample, snapped_slices

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _CombinedBatch(BatchRequest):
    """A batch of a combination: what its left and its right side read."""

    positions: tuple[Sequence[int], Sequence[int]]  # Positions of each side's queries in the batch.
    sides: tuple[BatchRequest, BatchRequest]  # Without reads for a stock dataset, which reads in `samples`.


class BatchedDataset:
    """A `ReadableDataset` as TorchGeo and torch use it: by one query, by a batch of queries, and with `&` and `|`."""

    transforms: Callable[[Sample], Sample] | None

    def __getitem__(self, query: Any) -> Sample:
        """Read one sample; see the class.

        Raises:
            NoOverlapError: (an IndexError) nothing at this place and time.
            ReadError: a tile could not be read.
        """
        return self.__getitems__([query])[0]

    def __getitems__(self, queries: Sequence[Any]) -> list[Sample]:
        """Read a sample per query, all together: each tile is fetched and decoded once.

        Samples below their AOI's `min_valid` are read again from its spare places, and padding samples are blanked.
        """
        dataset = cast(ReadableDataset, self)
        reader = getattr(queries, "reader", None)
        if reader is not None:  # of the `DataLoader` whose queries come by way of a wrapping dataset; it prefetches
            found: list[Sample] = reader.read(dataset, queries)
            return found
        samples = read_batch(dataset, queries).samples
        kept = resample_low_valid(queries, samples, lambda _, spares: read_batch(dataset, spares).samples)
        return blank_padding(queries, [sample for sample in kept if sample is not None], dataset.ignored_classes)

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        """Both at once: batching kept, validities joined by AND, the other side on this side's grid."""
        return RasteretIntersection(self, other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        """Either: batching kept, gaps of this side filled from the other by validity."""
        return RasteretUnion(self, other)

    def _transformed(self, samples: list[Sample]) -> list[Sample]:
        return samples if self.transforms is None else [self.transforms(sample) for sample in samples]


class _Combination(BatchedDataset):
    """What `&` and `|` share: one batch for both sides, on the left side's grid."""

    datasets: list[Any]
    index: Any
    _stock: dict[tuple[int, str], Any]

    if TYPE_CHECKING:  # defined by the two combinations

        def chip_grid(self, query: Any) -> Grid: ...
        def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch: ...

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stock": {}}

    def __repr__(self) -> str:
        left, right = (repr(side) if is_readable(side) else type(side).__name__ for side in self.datasets)
        return f"({left} {'&' if isinstance(self, IntersectionDataset) else '|'} {right})"

    def _repr_html_(self) -> str:
        """Summary for notebooks, with a table for each side."""
        rows = {"Grid": describe_grid(self), "Time": describe_times(self.index)}
        rows |= dict(zip(("Left", "Right"), self.datasets, strict=True))
        return summary_html(type(self).__name__, rows)

    @property
    def grid(self) -> Grid | None:
        """The left side's grid."""
        grid: Grid | None = getattr(self.datasets[0], "grid", None)
        return grid

    @property
    def is_native(self) -> bool:
        """Whether chips lie on the grids of their own scenes: as the left side's do."""
        return bool(getattr(self.datasets[0], "is_native", False))

    def target_grids(self) -> list[TargetGrid]:
        """Return the left side's CRSs and pixels, and what the combination covers in each; for samplers."""
        grids, index = target_grids_of(self.datasets[0]), self.index
        if len(grids) == 1 and same_crs(grids[0].crs, crs_text(index.crs)):
            return [replace(grids[0], shapes=np.asarray(index.geometry, dtype=object))]
        return _cut_target_grids(grids, index)

    @property
    def parts(self) -> list[Any]:
        """The datasets that are combined, left to right, including those of nested combinations."""
        return [part for dataset in self.datasets for part in getattr(dataset, "parts", [dataset])]

    @property
    def version(self) -> tuple[Any, ...]:
        """See `ReadableDataset`; as in TorchGeo, the combined index does not follow those of its sides."""
        return self.index, *(item for side in self.datasets if is_readable(side) for item in side.version[1:])

    @property
    def ignored_classes(self) -> dict[str, int]:
        """See `ReadableDataset`; of a key that both sides have, the left side's."""
        ignored: dict[str, int] = {}
        for part in reversed(_leaves(self)):
            ignored |= part.ignored_classes if is_readable(part) else {}
        return ignored

    def plot(self, sample: Sample, **options: Any) -> Figure:
        """Plot one of its samples; options as for `samples.plots.plot_sample`."""
        return plot_from(self.parts, sample, options)

    def requests(self, queries: Sequence[Any], grids: Sequence[Grid] | None = None) -> BatchRequest:
        """Plan the read of a batch (pure); see `ReadableDataset`."""
        if grids is None:
            grids = [self.chip_grid(query) for query in queries]
        positions = self._positions(queries, grids)
        left, right = (self._side(side, positions[side], queries, grids) for side in (0, 1))
        return _CombinedBatch(
            queries=queries,
            grids=grids,
            reads=[*left.reads, *right.reads],
            nbytes=left.nbytes + right.nbytes,
            positions=positions,
            sides=(left, right),
        )

    def _positions(self, queries: Sequence[Any], grids: Sequence[Grid]) -> tuple[Sequence[int], Sequence[int]]:
        """Return, per side, the positions of the queries that it reads."""
        return range(len(queries)), range(len(queries))

    def _side(self, side: int, positions: Sequence[int], queries: Sequence[Any], grids: Sequence[Grid]) -> BatchRequest:
        queries, grids = [queries[i] for i in positions], [grids[i] for i in positions]
        dataset = self.datasets[side]
        if queries and is_readable(dataset):
            return dataset.requests(queries, grids)
        return BatchRequest(queries=queries, grids=grids)

    def _side_samples(self, batch: _CombinedBatch, results: Sequence[ReadResult]) -> list[SampleBatch]:
        """Return the samples of both sides, left and right, each of its own queries."""
        split, samples = len(batch.sides[0].reads), []
        for side, own_results in enumerate((results[:split], results[split:])):
            own, dataset = batch.sides[side], self.datasets[side]
            if not own.queries:
                samples.append(SampleBatch(samples=[]))
            elif is_readable(dataset):
                samples.append(dataset.samples(own, own_results))
            else:
                samples.append(SampleBatch(samples=self._stock_samples(side, own)))
        return samples

    def _stock_samples(self, side: int, batch: BatchRequest) -> list[Sample]:
        """Read a stock dataset, at the snapped slices, so that its pixels lie where ours do."""
        samples = []
        for query, grid in zip(batch.queries, batch.grids, strict=True):
            t = self.datasets[side]._disambiguate_slice(query)[2]
            if t.start == t.stop:  # in pandas an instant overlaps no interval, not even an open one
                t = slice(t.start, t.stop + INSTANT, t.step)
            samples.append(self._in_crs_of(side, grid)[snapped_slices(grid, t)])
        return samples

    def _side_has(self, side: int, query: Any, grid: Grid) -> bool:
        """Return whether a side has data, and enough dates, for a chip."""
        dataset = self._in_crs_of(side, grid)
        if hasattr(dataset, "has"):
            return bool(dataset.has(query, grid))
        t, index = dataset._disambiguate_slice(query)[2], dataset.index
        current = index[(index.index.left <= t.stop) & (index.index.right >= t.start)]
        return bool(current.geometry.intersects(grid.footprint).any())

    def _in_crs_of(self, side: int, grid: Grid) -> Any:
        """Return a side's dataset for a grid in any CRS: of a stock dataset a copy per CRS (ours take any grid)."""
        dataset, crs = self.datasets[side], str(grid.crs)
        if is_readable(dataset) or same_crs(crs_text(dataset.crs), crs):
            return dataset
        if (side, crs) not in self._stock:
            self._stock[side, crs] = _own_copy(dataset)
            with contextlib.redirect_stdout(io.StringIO()):  # TorchGeo's setter prints a line
                self._stock[side, crs].crs = pyproj_crs(crs)
        return self._stock[side, crs]


class RasteretIntersection(_Combination, IntersectionDataset):
    """Samples of both sides at once, on the left side's grid.

    Images join along C and validities by AND (see `join_samples`); place, time and record are the left side's. The
    right side is copied first, so that the original keeps its CRS and resolution.

    With a stock dataset on the left, TorchGeo's own `&` runs instead (and its `|`, which takes the maximum): without
    validity, and one sample at a time.
    """

    def __init__(self, left: Any, right: GeoDataset, transforms: Callable[[Sample], Sample] | None = None) -> None:
        self._stock = {}
        super().__init__(left, _own_copy(right), collate_fn=join_samples, transforms=transforms)

    @property
    def sample_keys(self) -> set[str]:
        """Keys of every sample, whatever the query; none of a stock dataset, which does not state them."""
        sides = [_sample_keys(side) for side in self.datasets]
        return set().union(*({scale_name(key, sorted(side)) for key in side} for side in sides))

    @property
    def pixel_types(self) -> dict[str, torch.dtype]:
        """Types of the pixels by key; not known before reading."""
        return {}

    def chip_grid(self, query: Any) -> Grid:
        """Return the grid of a query's chip."""
        grid: Grid = self.datasets[0].chip_grid(query)
        return grid

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Join both sides' samples; a query fails where either side does."""
        assert isinstance(batch, _CombinedBatch)
        left, right = self._side_samples(batch, results)
        samples = [self.collate_fn(list(pair)) for pair in zip(left.samples, right.samples, strict=True)]
        errors = {i: [*left.errors.get(i, ()), *right.errors.get(i, ())] for i in {*left.errors, *right.errors}}
        return SampleBatch(samples=self._transformed(samples), errors=errors)

    def has(self, query: Any, grid: Grid) -> bool:
        """Return whether both sides have data, and enough dates, for a chip."""
        return all(self._side_has(side, query, grid) for side in (0, 1))


class RasteretUnion(_Combination, UnionDataset):
    """Samples of the left side, its invalid pixels filled from the right side where that is valid.

    See `merge_by_validity`. A stock dataset has no validity: as in TorchGeo, pixels that are 0 in all channels are
    empty. A chip that only one side covers, or that has too few dates on the other, is that side's; its sample has the
    keys of both sides, with neutral values for what it does not know (see `fill_missing_keys`).
    """

    def __init__(self, left: Any, right: GeoDataset, transforms: Callable[[Sample], Sample] | None = None) -> None:
        self._stock = {}
        super().__init__(left, _own_copy(right), collate_fn=merge_by_validity, transforms=transforms)

    @property
    def sample_keys(self) -> set[str]:
        """Keys of every sample, whatever the query; none of a stock dataset, which does not state them."""
        return set().union(*(_sample_keys(side) for side in self.datasets))

    @property
    def pixel_types(self) -> dict[str, torch.dtype]:
        """Types of the pixels by key, where they are known before reading: the left side's."""
        return {} if self.transforms is not None else dict(getattr(self.datasets[0], "pixel_types", {}))

    def chip_grid(self, query: Any) -> Grid:
        """Return the grid of a query's chip: the left side's, or the right's where only that has one.

        On native grids, NoOverlapError where the left side has no record and the right side no grid.
        """
        slices = self._disambiguate_slice(query)
        query = AOI(slices, query.details) if isinstance(query, AOI) else slices
        left, right = self.datasets
        try:
            grid: Grid = left.chip_grid(query)
        except NoOverlapError as error:
            if not is_readable(right):
                raise NoOverlapError(
                    f"{error} The right side of the `|` is a {type(right).__name__}, which has no pixel grid of its "
                    "own; give the left side a common grid (crs=, res=)."
                ) from error
            try:
                grid = right.chip_grid(query)
            except UsageError as other:
                raise NoOverlapError(
                    f"{error} The right side of the `|` cannot be read there either: {other}"
                ) from other
        return grid

    def target_grids(self) -> list[TargetGrid]:
        """Return, on native grids, the left side's pixels, and the right's where the left has none; for samplers."""
        left, right = self.datasets
        if not self.is_native or not len(left.index):
            return super().target_grids()
        own = target_grids_of(left)
        others = target_grids_of(right) if is_readable(right) and len(right.index) else []
        return _cut_target_grids(own + _target_grids_beyond(others, own), self.index)

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Merge both sides' samples by validity, with the keys of both; a query fails where either side does."""
        assert isinstance(batch, _CombinedBatch)
        found: list[list[Sample]] = [[] for _ in batch.queries]
        errors: dict[int, list[Any]] = {}
        keys, types, ignored = self.sample_keys, getattr(self.datasets[0], "pixel_types", {}), ignored_class(self)
        sides = zip(self._side_samples(batch, results), batch.positions, self.datasets, strict=True)
        for own, positions, dataset in sides:
            for k, (i, sample) in enumerate(zip(positions, own.samples, strict=True)):
                grid, sample = batch.grids[i], with_validity(sample)
                if not is_readable(dataset):
                    sample = stock_sample(sample, grid, self._disambiguate_slice(batch.queries[i])[2], ignored)
                found[i].append(fill_missing_keys(sample, keys, types, grid))
                if k in own.errors:
                    errors.setdefault(i, []).extend(own.errors[k])
        for i, samples in enumerate(found):
            if not samples:
                raise NoOverlapError(f"Neither dataset has data at {batch.queries[i]}.")
            if i in errors:
                del samples[1:]  # a failed sample fills nothing, and states nothing that could contradict
        merged = [self.collate_fn(samples) for samples in found]
        add_query_keys(merged, batch.queries)
        return SampleBatch(samples=self._transformed(merged), errors=errors)

    def has(self, query: Any, grid: Grid) -> bool:
        """Return whether either side has data, and enough dates, for a chip."""
        return any(self._side_has(side, query, grid) for side in (0, 1))

    def _positions(self, queries: Sequence[Any], grids: Sequence[Grid]) -> tuple[Sequence[int], Sequence[int]]:
        pairs = list(enumerate(zip(queries, grids, strict=True)))
        left, right = ([i for i, pair in pairs if self._side_has(side, *pair)] for side in (0, 1))
        return left, right


def ignored_class(dataset: Any) -> int | None:
    """Return `ignore_index` of a dataset, or of the first part of a combination that has one; None without labels."""
    classes = (getattr(part, "ignore_index", None) for part in _leaves(dataset))
    return next((number for number in classes if isinstance(number, int)), None)


def _leaves(dataset: Any) -> list[Any]:
    """Return the datasets that are combined, left to right, also by TorchGeo's own `&` and `|`."""
    if isinstance(dataset, (IntersectionDataset, UnionDataset)):
        return [leaf for part in dataset.datasets for leaf in _leaves(part)]
    return [dataset]


def dataset_fingerprint(dataset: Any) -> list[str]:
    """Return a line for each dataset that is read, left to right.

    Lines are equal for the same records (by id, time and place), index and options. The addresses of the files do not
    count: they may be moved or signed anew.
    """
    lines = []
    for part in getattr(dataset, "parts", [dataset]):
        index = getattr(part, "index", None)
        extent = "" if index is None else f"{len(index)}:{_index_digest(index)}"
        content = part.fingerprint() if hasattr(part, "fingerprint") else ""
        lines.append(f"{type(part).__name__} {extent} {content}".rstrip())
    return lines


def _index_digest(index: Any) -> str:
    """Return a digest of an index's bounds, to a part in 10**9, and times."""
    bounds = shapely.bounds(np.asarray(index.geometry, dtype=object))
    step = 1e-9 * max(1.0, float(np.nanmax(np.abs(bounds), initial=1.0)))
    return digest(np.round(bounds / step), *interval_ns(index.index))


def _sample_keys(dataset: Any) -> set[str]:
    if isinstance(dataset, (IntersectionDataset, UnionDataset)) and not isinstance(dataset, _Combination):
        return set().union(*(_sample_keys(side) for side in dataset.datasets))
    return set(getattr(dataset, "sample_keys", ()))


def _own_copy(dataset: Any) -> Any:
    """Return a copy whose CRS and resolution TorchGeo may set in place without changing the original."""
    other = copy.copy(dataset)
    if isinstance(dataset, (IntersectionDataset, UnionDataset)):
        other.datasets = [_own_copy(part) for part in dataset.datasets]
    if isinstance(dataset, _Combination):
        other._stock = {}
    if not is_readable(dataset) or isinstance(dataset, _Combination):
        other.index = dataset.index.copy()
    return other


def _cut_target_grids(grids: Sequence[TargetGrid], index: gpd.GeoDataFrame) -> list[TargetGrid]:
    """Cut grids to what an index covers; grids without any area left are dropped."""
    shapes, crs = np.asarray(index.geometry, dtype=object), crs_text(index.crs)
    return _with_shapes(grids, [clip_polygons(grid.shapes, _union(shapes, crs, grid)) for grid in grids], inset=0)


def _target_grids_beyond(grids: Sequence[TargetGrid], others: Sequence[TargetGrid]) -> list[TargetGrid]:
    """Cut grids to what others do not cover.

    Shapes narrower than two pixels are dropped: reprojected edges of the others leave such slivers.
    """
    cut = [grid.shapes for grid in grids]
    for k, grid in enumerate(grids):
        for other in others:
            cut[k] = polygonal_each(shapely.difference(cut[k], _union(other.shapes, other.crs, grid)))
    return _with_shapes(grids, cut, inset=1)


def _union(shapes: Geometries, crs: str, grid: TargetGrid) -> BaseGeometry:
    """Return the union of shapes in a grid's CRS."""
    return union_polygons(transform_geometries(shapes, crs, grid.crs, near=tuple(shapely.total_bounds(grid.shapes))))


def _with_shapes(grids: Sequence[TargetGrid], cut: Sequence[Geometries], inset: float) -> list[TargetGrid]:
    """Return grids with these shapes, without shapes that have no area `inset` pixels inside their edge."""
    kept = []
    for grid, shapes in zip(grids, cut, strict=True):
        large = shapely.area(shapely.buffer(shapes, -inset * min(grid.res)) if inset else shapes) > 0
        if large.any():
            kept.append(replace(grid, shapes=shapes[large]))
    return kept
