"""`&` and `|` that keep batching and validity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torchgeo.datasets import GeoDataset, IntersectionDataset, UnionDataset

from rasteret_ml.errors import NoOverlapError, UsageError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.loading.lookahead import read_batch
from rasteret_ml.loading.reading import Reading
from rasteret_ml.loading.sample import Sample, snapped_slices
from rasteret_ml.raster.together import together
from rasteret_ml.runtime.worker_loop import WorkerLoop

__all__ = ["RasteretIntersection", "RasteretUnion", "join_samples", "merge_by_validity"]


class _Combination:
    """What `&` and `|` share: batches read as one, on the left side's grid."""

    datasets: list[Any]
    index: Any

    if TYPE_CHECKING:  # of the two that combine

        def chip_grid(self, query: Any) -> Grid: ...
        def begin(self, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading: ...
        def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]: ...

    @property
    def grid(self) -> Grid:
        """The left side's grid."""
        grid: Grid = self.datasets[0].grid
        return grid

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


class RasteretIntersection(_Combination, IntersectionDataset):
    """Samples of both sides at once, on the left side's grid.

    Images join along C, validities by AND; `bounds`, `transform`, `time` and `record` are the left side's. The
    right side is copied first, so that it keeps its own CRS and resolution outside.
    """

    def __init__(self, left: Any, right: GeoDataset, transforms: Callable[[Sample], Sample] | None = None) -> None:
        super().__init__(left, copy.copy(right), collate_fn=join_samples, transforms=transforms)

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""
        grid: Grid = self.datasets[0].chip_grid(query)
        return grid

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading:
        """Both sides' work, started together."""
        return _together([_begin(dataset, queries, grids) for dataset in self.datasets])

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """Both sides' samples, joined."""
        sides = [_finish(d, queries, grids, part) for d, part in zip(self.datasets, raw, strict=True)]
        samples = [self.collate_fn(list(pair)) for pair in zip(*sides, strict=True)]
        return samples if self.transforms is None else [self.transforms(sample) for sample in samples]


class RasteretUnion(_Combination, UnionDataset):
    """Samples of the left side, its invalid pixels filled from the right side where that is valid."""

    def __init__(self, left: Any, right: GeoDataset, transforms: Callable[[Sample], Sample] | None = None) -> None:
        super().__init__(left, copy.copy(right), collate_fn=merge_by_validity, transforms=transforms)

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""
        grid: Grid = self.datasets[0].chip_grid(self._disambiguate_slice(query))
        return grid

    def begin(self, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading:
        """The work of each side for the queries that it has, started together."""
        return _together([_begin(d, *_pick(having, queries, grids)) for d, having in self._sides(queries, grids)])

    def finish(self, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
        """The sides' samples, filled by validity."""
        found: list[list[Sample]] = [[] for _ in queries]
        for (dataset, having), part in zip(self._sides(queries, grids), raw, strict=True):
            samples = _finish(dataset, *_pick(having, queries, grids), part)
            for i, sample in zip(having, samples, strict=True):
                found[i].append(sample)
        for query, samples in zip(queries, found, strict=True):
            if not samples:
                raise NoOverlapError(f"Neither dataset has anything at {query}.")
        merged = [self.collate_fn(samples) for samples in found]
        return merged if self.transforms is None else [self.transforms(sample) for sample in merged]

    def _sides(self, queries: Sequence[Any], grids: Sequence[Grid]) -> list[tuple[Any, list[int]]]:
        pairs = list(enumerate(zip(queries, grids, strict=True)))
        return [(d, [i for i, (query, grid) in pairs if _has(d, query, grid)]) for d in self.datasets]


def _begin(dataset: Any, queries: Sequence[Any], grids: Sequence[Grid]) -> Reading:
    return dataset.begin(queries, grids) if hasattr(dataset, "begin") else _nothing


async def _nothing(loop: WorkerLoop) -> None:
    """A stock dataset reads in the caller's thread, in `_finish`."""


def _together(readings: Sequence[Reading]) -> Reading:
    return lambda loop: together([reading(loop) for reading in readings])


def _finish(dataset: Any, queries: Sequence[Any], grids: Sequence[Grid], raw: Any) -> list[Sample]:
    if hasattr(dataset, "finish"):
        return list(dataset.finish(queries, grids, raw))
    # A stock dataset gets the snapped slices, so that its pixels lie where ours do.
    return [dataset[snapped_slices(g, dataset._disambiguate_slice(q)[2])] for q, g in zip(queries, grids, strict=True)]


def _pick(chosen: Sequence[int], queries: Sequence[Any], grids: Sequence[Grid]) -> tuple[list[Any], list[Grid]]:
    return [queries[i] for i in chosen], [grids[i] for i in chosen]


def _has(dataset: Any, query: Any, grid: Grid) -> bool:
    if hasattr(dataset, "_match"):
        return len(dataset._match(query, grid)) > 0
    if isinstance(dataset, RasteretIntersection):
        return all(_has(part, query, grid) for part in dataset.datasets)
    if isinstance(dataset, RasteretUnion):
        return any(_has(part, query, grid) for part in dataset.datasets)
    _, _, t = dataset._disambiguate_slice(query)
    index = dataset.index
    here = index[(index.index.left <= t.stop) & (index.index.right >= t.start)]
    return bool(here.geometry.intersects(grid.footprint).any())


_LEFT_FIRST = ("bounds", "crs", "transform", "time", "record", "aoi", "label", "mask_aoi")


def join_samples(samples: Sequence[Sample]) -> Sample:
    """One sample of several of the same chip: images along C, validities by AND, places of the first.

    Raises:
        UsageError: two label masks, or images of different types.
    """
    joined = dict(samples[0])
    for other in samples[1:]:
        for key, value in other.items():
            if key not in joined:
                joined[key] = value
            elif key == "image":
                joined[key] = _cat(joined[key], value, -3)
            elif key in ("scale", "offset"):
                joined[key] = _cat(joined[key], value, -1)
            elif key == "mask_valid":
                joined[key] = joined[key].all(-3, keepdim=True) & value.all(-3, keepdim=True)
            elif key not in _LEFT_FIRST:
                raise UsageError(f"Both datasets of an `&` give {key!r}; use transforms= to rename it in one of them.")
    return joined


def _cat(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
    if a.dtype != b.dtype:
        raise UsageError(
            f"The images of an `&` are {a.dtype} and {b.dtype}; convert one of them with transforms=, or name its "
            "key differently."
        )
    return torch.cat([a, b], dim=dim)


def merge_by_validity(samples: Sequence[Sample]) -> Sample:
    """The first sample, its invalid pixels taken from the next where those are valid."""
    merged = dict(samples[0])
    for other in samples[1:]:
        if "mask_valid" not in merged or "mask_valid" not in other:
            raise UsageError(
                "`|` fills by mask_valid, which a stock dataset does not give; use `&`, or put it on the left."
            )
        fill = other["mask_valid"].all(-3, keepdim=True) & ~merged["mask_valid"].all(-3, keepdim=True)
        for key in ("image", "mask", "mask_valid"):
            if key in merged and key in other:
                where = fill[..., 0, :, :] if merged[key].ndim == fill.ndim - 1 else fill
                merged[key] = torch.where(where, other[key], merged[key])
    return merged
