"""What `RasteretDataset` and `PolygonDataset` share: an index that TorchGeo may replace, and queries by slices."""

from __future__ import annotations

import copy
from typing import Any, Self

import geopandas as gpd
from torchgeo.datasets import GeoDataset

from rasteret_ml.datasets.combine import BatchedDataset
from rasteret_ml.datasets.index.scene_index import pack_index, restore_index, unpack_index
from rasteret_ml.errors import UsageError

Slices = tuple[slice, slice, slice]


class ChipDataset(BatchedDataset, GeoDataset):
    """A `ReadableDataset` with an index of its own; subclasses set `_index` and `transforms`, and plan and read.

    Whatever they compute from the index they compute again once another index is assigned.
    """

    _index: gpd.GeoDataFrame
    _known_bounds: tuple[gpd.GeoDataFrame, tuple[float, float], Slices] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known_bounds": None, "_index": pack_index(self._index)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_index": unpack_index(state["_index"])})

    def __copy__(self) -> Self:
        other = object.__new__(type(self))  # not by way of __getstate__, which packs the index
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # TorchGeo's splitters deep-copy a dataset, then replace its index or write into it; all else is shared.
        other = copy.copy(self)
        other._index = self._index.copy()
        return other

    @property
    def index(self) -> gpd.GeoDataFrame:
        """TorchGeo's index: geometries and closed time intervals; may be assigned.

        Rasters have a column `rid`, the row of the Collection; polygons a column `polygon`, the row of their table,
        unless the index is an extent around them.
        """
        return self._index

    @index.setter
    def index(self, new: gpd.GeoDataFrame) -> None:
        self._index = restore_index(new, self._index)

    @property
    def bounds(self) -> Slices:
        """(x, y, t) of the whole index, as in TorchGeo; computed once per index, whose every row TorchGeo reads."""
        known, index, res = self._known_bounds, self._index, self.res
        if known is None or known[0] is not index or known[1] != res:
            known = self._known_bounds = index, res, super().bounds
        return known[2]

    def _slices(self, query: Any) -> Slices:
        """Return (x, y, t) of a query, open slices filled; a UsageError for what is no spatial query."""
        parts = query if isinstance(query, tuple) else (query,)
        if not parts or not all(isinstance(part, slice) for part in parts):
            raise UsageError(
                f"A dataset is indexed by place, as ds[x, y, t] with slices or with an AOI, got {query!r}; give the "
                "loader a sampler, such as RandomAOISampler(ds, size, length) or GridAOISampler(ds, size)."
            )
        return self._disambiguate_slice(query)

    def _disambiguate_slice(self, query: Any) -> Slices:
        """Return (x, y, t) with open slices filled from the bounds of the whole index, as in TorchGeo."""
        if isinstance(query, tuple) and len(query) == 3 and not any(_is_open(part) for part in query):
            return query[0], query[1], query[2]
        return super()._disambiguate_slice(query)  # type: ignore[no-any-return]


def same_res(steps: tuple[float, float], res: tuple[float, float]) -> bool:
    """Return whether the steps of (x, y) slices are a pixel size, up to rounding."""
    return all(abs(step - size) <= 1e-9 * size for step, size in zip(steps, res, strict=True))


def _is_open(part: Any) -> bool:
    return not isinstance(part, slice) or part.start is None or part.stop is None or part.step is None
