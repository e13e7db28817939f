"""What datasets promise to whoever reads them: two pure halves, requests of queries and samples of chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

from rasteret_ml.errors import RasteretError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.execute import TileError
from rasteret_ml.raster.read import ReadResult
from rasteret_ml.raster.worker_loop import Reads
from rasteret_ml.samples.sample import Sample

__all__ = ["BatchRequest", "ReadableDataset", "SampleBatch", "is_readable"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchRequest:
    """Everything that a batch needs to read; datasets subclass it with what their `samples` needs to know."""

    queries: Sequence[Any]
    """The queries."""
    grids: Sequence[Grid]
    """The grid of each query's chip."""
    reads: Reads = ()
    """Chip requests, and how they are read."""
    nbytes: int = 0
    """Memory that the batch takes while it is read, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleBatch:
    """The samples of a batch, and which of them could not be read."""

    samples: list[Sample]
    """One per query; those with errors have correct keys and shapes, but placeholder values."""
    errors: dict[int, list[TileError | RasteretError]] = field(default_factory=dict)
    """Why samples could not be read, by position; empty unless the read allowed errors."""


class ReadableDataset(Protocol):
    """A dataset whose batches can be planned, read and assembled apart, by a loader or a combination of datasets."""

    index: Any
    """TorchGeo's index."""

    @property
    def version(self) -> tuple[Any, ...]:
        """The index, then what decides the grid: objects that are replaced when queries come to mean other pixels."""

    @property
    def ignored_classes(self) -> Mapping[str, int]:
        """Class of label pixels that do not count, by key of the labels."""

    def chip_grid(self, query: Any) -> Grid:
        """Return the grid of a query's chip."""

    def requests(self, queries: Sequence[Any], grids: Sequence[Grid] | None = None) -> BatchRequest:
        """Plan the read of a batch (pure).

        Args:
            queries: Slices or AOIs.
            grids: Grids of the chips, in any CRS; None = the dataset's own.

        Raises:
            NoOverlapError: a query that matches nothing.
            UsageError: something that is not a query.
        """

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Turn the chips of a batch into samples (pure).

        Args:
            batch: What `requests` returned.
            results: The chips of each of its `reads`.
        """


def is_readable(dataset: Any) -> TypeGuard[ReadableDataset]:
    """Return whether a dataset is a `ReadableDataset`; a stock TorchGeo dataset is not."""
    return hasattr(dataset, "requests") and hasattr(dataset, "samples")
