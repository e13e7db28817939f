"""One pass over a dataset's chips, one batch in memory at a time: pixels, labels, and which of them count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from affine import Affine

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, same_crs, transform_geometries
from rasteret_ml.geo.geometries import polygon_mask
from rasteret_ml.geo.grid import Grid
from rasteret_ml.samplers.grid_sampler import GridAOISampler
from rasteret_ml.samplers.ranks import epoch_random
from rasteret_ml.samples.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CountedChip:
    """A chip with the pixels that count."""

    position: int  #: Its position in the grid of chips.
    sample: Sample  #: The dataset's sample.
    labels: npt.NDArray[Any] | None  #: Labels `[H, W]`; None if the sample has none.
    #: True where pixels are valid and inside the AOI, `[1 or C, H, W]` or `[T, 1 or C, H, W]`.
    counts: npt.NDArray[np.bool_]

    @property
    def labels_count(self) -> npt.NDArray[np.bool_]:
        """Where labels count, `[H, W]`; in a time series, where any date does."""
        all_bands: npt.NDArray[np.bool_] = np.asarray(self.counts.all(axis=-3))
        return all_bands if all_bands.ndim == 2 else np.asarray(all_bands.any(axis=0))

    def class_counts(self, ignore_index: int) -> dict[int, int]:
        """Return the number of pixels of each class, in order, among the labels that count."""
        assert self.labels is not None
        counted = self.labels[self.labels_count & (self.labels != ignore_index)]
        values, counts = np.unique(counted, return_counts=True)
        return dict(zip(values.tolist(), counts.tolist(), strict=True))


class ChipPass:
    """A grid of chips over a dataset or AOIs, all of them or `max_chips` random ones, in the grid's order.

    Pixels whose centre is outside `aois` do not count; `batch_size` chips are read together. Raises UsageError
    if samples have no `mask_valid`.
    """

    def __init__(
        self, dataset: Any, aois: Any, size: int, max_chips: int | None, batch_size: int, seed: int, key: str = "mask"
    ) -> None:
        if batch_size < 1 or (max_chips is not None and max_chips < 1):
            raise UsageError(f"batch_size and max_chips must be > 0, got {batch_size} and {max_chips}.")
        self._dataset, self._batch_size, self._key = dataset, int(batch_size), key
        self._has_aois = aois is not None
        self.grid = GridAOISampler(dataset, size, aois=aois)  #: All chips.
        self.positions: Sequence[int] = range(self.grid.total)  #: Positions of the chips to read.
        if max_chips is not None and self.grid.total > max_chips:
            drawn = np.argsort(epoch_random(seed, 0).random(self.grid.total), kind="stable")[:max_chips]
            self.positions = np.sort(drawn).tolist()

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[CountedChip]:
        read = getattr(self._dataset, "__getitems__", None)
        for start in range(0, len(self.positions), self._batch_size):
            positions = self.positions[start : start + self._batch_size]
            queries = [self.grid.at(position) for position in positions]
            samples = read(queries) if read is not None else [self._dataset[query] for query in queries]
            for position, query, sample in zip(positions, queries, samples, strict=True):
                mask = sample.get(self._key)
                labels = None if mask is None else mask.numpy()
                counts = self._counts(query, sample)
                yield CountedChip(position=position, sample=sample, labels=labels, counts=counts)

    def _counts(self, query: Any, sample: Sample) -> npt.NDArray[np.bool_]:
        if "mask_valid" not in sample:
            raise UsageError(
                "The samples have no 'mask_valid' to tell data from fill values; put a RasteretDataset on the left of "
                "`&`, or measure that one."
            )
        valid: npt.NDArray[np.bool_] = sample["mask_valid"].numpy()
        if not self._has_aois or query.geometry is None:
            return valid
        return valid & _inside(query, sample, crs_text(self._dataset.crs))


def _inside(query: Any, sample: Sample, dataset_crs: str) -> npt.NDArray[np.bool_]:
    """Return `[H, W]`, True where a pixel's centre is in the AOI's polygon."""
    height, width = sample["mask_valid"].shape[-2:]
    stated = sample.get("crs", sample.get("epsg"))
    if isinstance(stated, torch.Tensor):
        stated = int(stated) or None  # 0 = a CRS without EPSG code
    crs = dataset_crs if stated is None else crs_text(stated)
    grid = Grid(crs=crs, transform=Affine(*sample["transform"].flatten().tolist()[:6]), shape=(height, width))
    shape = np.array([query.geometry], dtype=object)
    if not same_crs(query.crs or dataset_crs, crs):  # else it is where the sampler put it, also past the antimeridian
        shape = transform_geometries(shape, query.crs or dataset_crs, crs, near=grid.bounds)
    return polygon_mask(shape[0], grid)
