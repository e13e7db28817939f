"""Where the chips of a grid lie on the maps that they make: one map for each target grid of the dataset."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from torch.utils.data import DistributedSampler

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import epsg_code
from rasteret_ml.geo.grid import Grid, Window, round_half_up
from rasteret_ml.samplers.aoi.aoi import AOI

Integers = npt.NDArray[np.int64]

#: Pixels by which a chip may lie beside its planned place: on native grids it keeps the pixels of its own scene, which
#: may be a fraction of a pixel off the map's.
MAX_SHIFT = 1


class SubsetSampler(DistributedSampler[AOI]):
    """The chips of a `GridAOISampler` at given positions, for one rank.

    It is a `DistributedSampler` so that Lightning does not split it among the ranks again.
    """

    def __init__(self, sampler: Any, positions: Integers) -> None:
        self._sampler = sampler
        self.positions = positions  #: Positions in the sampler's order `[N]`.
        super().__init__(range(len(positions)), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[AOI]:
        return (self._sampler.at(int(position)) for position in self.positions)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapExtent:
    """One map, its blocks, and the chips that it is made of."""

    grid: Grid  #: The map's pixels.
    block: int  #: Side of its square blocks in pixels; the last ones of a row or column reach past the map.
    first_block: int  #: Number of its first block; blocks are numbered through all maps, row by row.
    chip_size: tuple[int, int]  #: Height and width of chips in pixels.
    positions: Integers  #: Positions of its chips in the sampler's order `[N]`, ascending.
    corners: Integers  #: Row and column of each chip's upper left pixel on the map `[N, 2]`; may lie outside it.

    @property
    def block_grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.grid.height // self.block), -(-self.grid.width // self.block)

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return math.prod(self.block_grid)

    def block_number(self, row: int, col: int) -> int:
        """Return the number of the block at a row and column of blocks."""
        return self.first_block + row * self.block_grid[1] + col

    def block_window(self, number: int) -> Window:
        """Return the pixels of a block that lie on the map."""
        row, col = (index * self.block for index in divmod(number - self.first_block, self.block_grid[1]))
        height, width = min(self.block, self.grid.height - row), min(self.block, self.grid.width - col)
        return Window(row=row, col=col, height=height, width=width)

    def block_ranges(self, index: Any) -> Integers:
        """Return the blocks that chips may change: first and last row, first and last column, inclusive `[..., 4]`.

        `index` is one into `positions`. For a chip beside the map the first is after the last.
        """
        top_left = np.maximum(self.corners[index] - MAX_SHIFT, 0)
        last = np.minimum(self.corners[index] + self.chip_size + (MAX_SHIFT - 1), np.array(self.grid.shape) - 1)
        low = top_left // self.block
        high = np.where(top_left > last, low - 1, last // self.block)
        return np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], axis=-1)

    def chips_per_block(self, index: Any) -> Integers:
        """Return how many of the chips at `index` may change each block `[block_count]`."""
        counts = np.zeros(self.block_grid, np.int64)
        for top, bottom, left, right in self.block_ranges(index).tolist():
            counts[top : bottom + 1, left : right + 1] += 1
        return counts.reshape(-1)

    def chip_window(self, index: int, transform: Affine) -> Window:
        """Return the pixels of the map nearest to those of a chip, whose own pixels lie at `transform`.

        Raises UsageError if the chip is not where the layout says.
        """
        own = self.grid.transform
        same_size = np.allclose((abs(transform.a), abs(transform.e)), (own.a, -own.e), rtol=1e-5, atol=0)
        if transform.b or transform.d or not same_size:
            raise UsageError(
                f"Chip {self.positions[index]} must have the pixels of the map, {tuple(own)[:6]}, got "
                f"{tuple(transform)[:6]}; give the dataset a common grid with crs= and res=."
            )
        height, width = self.chip_size
        left = transform.c + min(transform.a, 0.0) * width
        top = transform.f + max(transform.e, 0.0) * height
        # Halves that noise makes a little less go up too, so that all chips of one scene move the same way.
        row, col = round_half_up((top - own.f) / own.e + 1e-6), round_half_up((left - own.c) / own.a + 1e-6)
        if np.abs(self.corners[index] - (row, col)).max() > MAX_SHIFT:
            raise UsageError(
                f"Chip {self.positions[index]} must lie at {tuple(self.corners[index].tolist())} of the map, got row "
                f"{row} and column {col}; load the batches with this map's sampler."
            )
        return Window(row=row, col=col, height=height, width=width)


def map_extents(sampler: Any, block: int) -> list[MapExtent]:
    """Return the maps that the chips of a `GridAOISampler` make, one for each target grid that has chips."""
    if not all(hasattr(sampler, name) for name in ("corners", "grid_index", "coverage", "size")):
        raise UsageError(f"A map needs the chips of a GridAOISampler, got a {type(sampler).__name__}.")
    coverage, extents, first = sampler.coverage, [], 0
    for number, frame in enumerate(coverage.target_grids):
        here = np.flatnonzero(sampler.grid_index == number)
        if not len(here):
            continue
        (x, y), (xres, yres) = frame.origin, frame.res
        lattice = Grid(crs=frame.crs, transform=Affine(xres, 0.0, x, 0.0, -yres, y), shape=(1, 1))
        xmin, ymin, xmax, ymax = shapely.total_bounds(coverage.shapes[coverage.grid_index == number]).tolist()
        grid = lattice.window(lattice.window_around((xmin, ymin, xmax, ymax)))
        corners = (sampler.corners[here] - (grid.transform.c, grid.transform.f)) / (xres, -yres)
        extent = MapExtent(
            grid=grid,
            block=block,
            first_block=first,
            chip_size=sampler.size,
            positions=here,
            corners=np.rint(corners[:, ::-1]).astype(np.int64),
        )
        extents.append(extent)
        first += extent.block_count
    return extents


def map_paths(path: str | os.PathLike[str], extents: list[MapExtent]) -> list[str]:
    """Return a file for each map: `path`, or if there are several, `path` with the EPSG code before the suffix."""
    base = Path(path)
    if len(extents) == 1:
        return [os.fspath(base)]
    names: list[str] = []
    for number, extent in enumerate(extents, start=1):
        name = f"{base.stem}_{epsg_code(str(extent.grid.crs)) or number}"
        names.append(f"{name}_{number}" if name in names else name)
    return [os.fspath(base.with_name(name + base.suffix)) for name in names]
