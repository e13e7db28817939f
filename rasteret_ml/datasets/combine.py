"""`&` and `|` that keep batching and validity."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torchgeo.datasets import GeoDataset, IntersectionDataset, UnionDataset

from rasteret_ml.datasets.dataset_grids import cut_target_grids, narrowed_target_grids, target_grids_beyond
from rasteret_ml.datasets.protocol import Reading
from rasteret_ml.datasets.union_defaults import (
    add_query_keys,
    fill_missing_keys,
    pixel_types,
    stated_keys,
    stock_sample,
)
from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.geo.crs import crs_text, pyproj_crs, same_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.times import INSTANT
from rasteret_ml.loader.failures import Faults
from rasteret_ml.loader.prefetch import read_batch
from rasteret_ml.raster.execute import gather_or_cancel
from rasteret_ml.raster.worker_loop import WorkerLoop
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of
from rasteret_ml.samples.merge import join_samples, merge_by_validity, with_validity
from rasteret_ml.samples.plots import plot_from
from rasteret_ml.samples.sample import Sample, snapped_slices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RasteretIntersection", "RasteretUnion", "ignored_class"]


class _Combination:
    """What `&` and `|` share: batches read as one, on the left side's grid."""

    datasets: list[Any]
    index: Any
    _stock: dict[tuple[int, str], Any]

    if TYPE_CHECKING:  # of the two that combine

        def chip_grid(self, query: Any) -> Grid: ...
        def begin(self, queries: Sequence[Any], grids: Sequence[Grid], faults: Faults | None = None) -> Reading: ...
        def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]: ...

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stock": {}}

    @property
    def grid(self) -> Grid | None:
        """The left side's grid."""
        grid: Grid | None = getattr(self.datasets[0], "grid", None)
        return grid

    def target_grids(self) -> list[TargetGrid]:
        """For samplers: the left side's CRSs and pixels, and what the combination covers in each."""
        return narrowed_target_grids(target_grids_of(self.datasets[0]), self.index)

    @property
    def parts(self) -> list[Any]:
        """The datasets that are combined, left to right, also those of combinations."""
        return [part for dataset in self.datasets for part in getattr(dataset, "parts", [dataset])]

    def plot(self, sample: Sample, **options: Any) -> Figure:
        """A picture of one of its samples; options as for `samples.plot.plot_sample`."""
        return plot_from(self.parts, sample, options)

    def __getitem__(self, query: Any) -> Sample:
        """One sample."""
        return self.__getitems__([query])[0]

    def __getitems__(self, queries: Sequence[Any]) -> list[Sample]:
        """A sample per query, each side read as one batch.

        Raises:
            NoOverlapError: a query that the combination does not have.
        """
        return read_batch(self, queries)

    def batch_bytes(self, grids: Sequence[Grid]) -> int:
        """Memory of both sides' pixels and validity while they are read."""
        return sum(dataset.batch_bytes(grids) for dataset in self.datasets if hasattr(dataset, "batch_bytes"))

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        return RasteretIntersection(self, other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        return RasteretUnion(self, other)

    def _begin(self, side: int, queries: Sequence[Any], grids: Sequence[Grid], faults: Faults | None) -> Reading:
        dataset = self.datasets[side]
        return dataset.begin(queries, grids, faults) if queries and hasattr(dataset, "begin") else _nothing

    def _finish(self, side: int, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        dataset = self.datasets[side]
        if not queries:
            return []
        if hasattr(dataset, "finish"):
            return list(dataset.finish(queries, grids, raw))
        times = [_lasting(dataset._disambiguate_slice(query)[2]) for query in queries]
        # A stock dataset gets the snapped slices, so that its pixels lie where ours do.
        return [self._in_crs_of(side, g)[snapped_slices(g, t)] for g, t in zip(grids, times, strict=True)]

    def _in_crs_of(self, side: int, grid: Grid) -> Any:
        """The dataset, for a grid in its CRS; of a stock one a copy for each other CRS (ours take any grid)."""
        dataset, crs = self.datasets[side], str(grid.crs)
        if hasattr(dataset, "begin") or same_crs(crs_text(dataset.crs), crs):
            return dataset
        if (side, crs) not in self._stock:
            self._stock[side, crs] = _own_copy(dataset)
            _set_crs(self._stock[side, crs], crs)
        return self._stock[side, crs]


class RasteretIntersection(_Combination, IntersectionDataset):
    """Samples of both sides at once, on the left side's grid.

    Images join along C, validities by AND (see `join_samples`); where, when and of which record are the left side's.
    The right side is copied first, so that it keeps its own CRS and resolution outside.
    """

    def __init__(self, left: Any, right: GeoDataset, transforms: Callable[[Sample], Sample] | None = None) -> None:
        self._stock = {}
        super().__init__(left, _own_copy(right), collate_fn=join_samples, transforms=transforms)

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""
        grid: Grid = self.datasets[0].chip_grid(query)
        return grid

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid], faults: Faults | None = None) -> Reading:
        """Both sides' work, started together; a query fails where either side does."""
        return _together([self._begin(side, queries, grids, faults) for side in (0, 1)])

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Both sides' samples, joined."""
        sides = [self._finish(side, queries, grids, part) for side, part in enumerate(raw)]
        samples = [self.collate_fn(list(pair)) for pair in zip(*sides, strict=True)]
        return samples if self.transforms is None else [self.transforms(sample) for sample in samples]

    def has(self, query: Any, grid: Grid) -> bool:
        """Whether both sides have something, and dates enough, for a chip."""
        return all(_has(self._in_crs_of(side, grid), query, grid) for side in (0, 1))


class RasteretUnion(_Combination, UnionDataset):
    """Samples of the left side, its invalid pixels filled from the right side where that is valid.

    See `merge_by_validity`. A stock dataset has no validity: with TorchGeo, what is 0 in all channels is empty. A chip
    that only one side has, or that has too few dates on the other, is that side's; its sample has the keys of both
    sides, with neutral values for what it does not know (see `fill_missing_keys`).
    """

    def __init__(self, left: Any, right: GeoDataset, transforms: Callable[[Sample], Sample] | None = None) -> None:
        self._stock = {}
        super().__init__(left, _own_copy(right), collate_fn=merge_by_validity, transforms=transforms)

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for: the left side's, or the right's where only that has one.

        Raises:
            NoOverlapError: on native grids: no record of the left side there, and the right gives no grid.
        """
        whole = self._disambiguate_slice(query)
        asked = AOI(whole, query.details) if isinstance(query, AOI) else whole
        left, right = self.datasets
        try:
            grid: Grid = left.chip_grid(asked)
        except NoOverlapError as error:
            if not hasattr(right, "chip_grid"):
                raise NoOverlapError(
                    f"{error} The right side of the `|` is a {type(right).__name__}, which has no pixels of its own "
                    "to read on; give the left side a common grid (crs=, res=)."
                ) from error
            try:
                grid = right.chip_grid(asked)
            except UsageError as other:
                raise NoOverlapError(
                    f"{error} The right side of the `|` cannot be read there either: {other}"
                ) from other
        return grid

    def target_grids(self) -> list[TargetGrid]:
        """For samplers: on native grids the left side's pixels, and the right's where the left has none."""
        left, right = self.datasets
        if not _is_native(left) or not len(left.index):
            return super().target_grids()
        own = target_grids_of(left)
        others = target_grids_of(right) if hasattr(right, "chip_grid") and len(right.index) else []
        return cut_target_grids(own + target_grids_beyond(others, own), self.index)

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid], faults: Faults | None = None) -> Reading:
        """The work of each side for the queries that it has, started together; a query fails where either side does."""
        sides = self._sides(queries, grids)
        parts = [None if faults is None else faults.within(having) for having in sides]
        both = _together(
            [self._begin(side, *_pick(having, queries, grids), parts[side]) for side, having in enumerate(sides)]
        )

        async def read(loop: WorkerLoop) -> Any:
            return sides, await both(loop), faults

        return read

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """The sides' samples, filled by validity, all with the keys of both sides (see `fill_missing_keys`)."""
        found: list[list[Sample]] = [[] for _ in queries]
        keys = stated_keys(self.datasets[0]) | stated_keys(self.datasets[1])
        types, ignored = pixel_types(self.datasets[0]), ignored_class(self)
        sides, parts, faults = raw
        for side, (having, part) in enumerate(zip(sides, parts, strict=True)):
            stock = not hasattr(self.datasets[side], "begin")
            samples = self._finish(side, *_pick(having, queries, grids), part)
            for i, sample in zip(having, samples, strict=True):
                sample = with_validity(sample)
                if stock:
                    sample = stock_sample(sample, grids[i], self._disambiguate_slice(queries[i])[2], ignored)
                found[i].append(fill_missing_keys(sample, keys, types, grids[i]))
        for query, samples in zip(queries, found, strict=True):
            if not samples:
                raise NoOverlapError(f"Neither dataset has anything at {query}.")
        for i, samples in enumerate(found):
            if faults is not None and faults.has(i):
                del samples[1:]  # what failed fills nothing, and states nothing that could contradict
        merged = [self.collate_fn(samples) for samples in found]
        add_query_keys(merged, queries)
        return merged if self.transforms is None else [self.transforms(sample) for sample in merged]

    def has(self, query: Any, grid: Grid) -> bool:
        """Whether either side has something, and dates enough, for a chip."""
        return any(_has(self._in_crs_of(side, grid), query, grid) for side in (0, 1))

    def _sides(self, queries: Sequence[Any], grids: Sequence[Grid]) -> list[list[int]]:
        """Per side, which of the queries it has."""
        pairs = list(enumerate(zip(queries, grids, strict=True)))
        return [[i for i, (query, grid) in pairs if _has(self._in_crs_of(side, grid), query, grid)] for side in (0, 1)]


def ignored_class(dataset: Any) -> int | None:
    """`ignore_index` of a dataset, of a combination the first that a part states; None = no part has labels."""
    if isinstance(dataset, (IntersectionDataset, UnionDataset)):
        return next((found for part in dataset.datasets if (found := ignored_class(part)) is not None), None)
    found = getattr(dataset, "ignore_index", None)
    return found if isinstance(found, int) else None


def _is_native(dataset: Any) -> bool:
    """Whether chips lie on their scenes' own grids; a combination is what its left side is."""
    if isinstance(dataset, _Combination):
        return _is_native(dataset.datasets[0])
    rule = getattr(dataset, "_finding", None)
    return rule is not None and bool(rule.native)


def _own_copy(dataset: Any) -> Any:
    """A copy whose CRS and resolution TorchGeo may set: in place, in a frame that a shallow copy would share."""
    other = copy.copy(dataset)
    if isinstance(dataset, (IntersectionDataset, UnionDataset)):
        other.datasets = [_own_copy(part) for part in dataset.datasets]
    if isinstance(dataset, _Combination):
        other._stock = {}
    if not hasattr(dataset, "begin") or isinstance(dataset, _Combination):
        other.index = dataset.index.copy()
    return other


def _lasting(t: slice) -> slice:
    """A time that a stock dataset finds: an instant overlaps nothing in pandas, not even what lasts for ever."""
    return slice(t.start, t.stop + INSTANT, t.step) if t.start == t.stop else t


def _set_crs(dataset: Any, crs: str) -> None:
    """TorchGeo's setter, without the line that it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        dataset.crs = pyproj_crs(crs)


async def _nothing(loop: WorkerLoop) -> None:
    """A stock dataset reads in the caller's thread, in `_finish`."""


def _together(readings: Sequence[Reading]) -> Reading:
    return lambda loop: gather_or_cancel([reading(loop) for reading in readings])


def _pick(chosen: Sequence[int], queries: Sequence[Any], grids: Sequence[Grid]) -> tuple[list[Any], list[Grid]]:
    return [queries[i] for i in chosen], [grids[i] for i in chosen]


def _has(dataset: Any, query: Any, grid: Grid) -> bool:
    if hasattr(dataset, "has"):
        return bool(dataset.has(query, grid))
    t = dataset._disambiguate_slice(query)[2]
    index = dataset.index
    here = index[(index.index.left <= t.stop) & (index.index.right >= t.start)]
    return bool(here.geometry.intersects(grid.footprint).any())
