"""Where the chips of a grid lie on the maps that they make: one map for each frame of the dataset."""

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
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.window import Window
from rasteret_ml.samplers.aoi.aoi import AOI

__all__ = ["SLACK", "MapExtent", "SubsetSampler", "sheet_paths", "sheets_of"]


class SubsetSampler(DistributedSampler[AOI]):
    """The chips of a `GridAOISampler` at given positions `[N]`, for one rank.

    It is torch's DistributedSampler to whoever asks: Lightning then deals it to no other ranks.

    Args:
        sampler: Where chips come from.
        positions: Their places in its order.
    """

    def __init__(self, sampler: Any, positions: npt.NDArray[np.int64]) -> None:
        self._sampler = sampler
        self.positions = positions
        """Places in the sampler's order."""
        super().__init__(range(len(positions)), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[AOI]:
        return (self._sampler.at(int(position)) for position in self.positions)


Integers = npt.NDArray[np.int64]

SLACK = 1
"""Pixels by which a chip may lie beside its place: on native grids it keeps its own scene's pixels, which may be a part
of a pixel off the map's."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapExtent:
    """One map, and the chips that it is made of."""

    grid: Grid
    """The map's pixels."""
    block: int
    """Side of its square blocks, in pixels; the last ones of a row or column reach past it."""
    first: int
    """Number of its first block; blocks are counted through all sheets, row by row."""
    size: tuple[int, int]
    """Height and width of chips."""
    positions: Integers
    """Places of its chips in the sampler's order `[N]`."""
    corners: Integers
    """Row and column of each chip's upper left pixel on the map `[N, 2]`; may lie outside it."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.grid.height // self.block), -(-self.grid.width // self.block)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.shape[0] * self.shape[1]

    def touched(self, at: Any) -> Integers:
        """First and last rows, first and last columns (inclusive) of blocks that chips may change `[..., 4]`.

        A chip beside the map has a first one after its last.
        """
        top_left = np.maximum(self.corners[at] - SLACK, 0)
        last = np.minimum(self.corners[at] + self.size + (SLACK - 1), np.array(self.grid.shape) - 1)
        low = top_left // self.block
        high = np.where(top_left > last, low - 1, last // self.block)
        return np.stack([low[..., 0], high[..., 0], low[..., 1], high[..., 1]], axis=-1)

    def chips_on_blocks(self, at: Any) -> Integers:
        """How many of some chips may change each block `[blocks]`."""
        rows, cols = self.shape
        top, bottom, left, right = self.touched(at).T
        met = (top <= bottom) & (left <= right)
        steps = np.zeros((rows + 1, cols + 1), np.int64)
        for row, col, sign in (
            (top, left, 1),
            (bottom + 1, left, -1),
            (top, right + 1, -1),
            (bottom + 1, right + 1, 1),
        ):
            np.add.at(steps, (row[met], col[met]), sign)
        return steps.cumsum(0).cumsum(1)[:-1, :-1].reshape(-1)

    def window_of_block(self, number: int) -> Window:
        """A block's pixels, the part of it that lies on the map."""
        row, col = (part * self.block for part in divmod(number - self.first, self.shape[1]))
        height, width = min(self.block, self.grid.height - row), min(self.block, self.grid.width - col)
        return Window(row=row, col=col, height=height, width=width)

    def place(self, at: int, transform: Affine) -> Window:
        """The nearest pixels of the map to those of a chip.

        Raises:
            UsageError: they are not where the plan says.
        """
        own = self.grid.transform
        if (
            transform.b
            or transform.d
            or not np.allclose((abs(transform.a), abs(transform.e)), (own.a, -own.e), rtol=1e-5, atol=0)
        ):
            raise UsageError(
                f"Chip {self.positions[at]} has pixels {tuple(transform)[:6]}, turned or of another size than "
                f"the map's {tuple(own)[:6]}; give the dataset a common grid with crs= and res=."
            )
        height, width = self.size
        left = transform.c + min(transform.a, 0.0) * width
        top = transform.f + max(transform.e, 0.0) * height
        row, col = _nearest((top - own.f) / own.e), _nearest((left - own.c) / own.a)
        if np.abs(self.corners[at] - (row, col)).max() > SLACK:
            raise UsageError(
                f"Chip {self.positions[at]} lies at row {row} and column {col} of the map, but the sampler puts it "
                f"at {tuple(self.corners[at].tolist())}; make the map with the sampler that the loader has."
            )
        return Window(row=row, col=col, height=height, width=width)


def _nearest(pixel: float) -> int:
    """Halves go up, those that are a little less as well: chips of one scene all move the same way."""
    return math.floor(pixel + 0.5 + 1e-6)


def sheets_of(sampler: Any, block: int) -> list[MapExtent]:
    """The maps that a `GridAOISampler`'s chips make: for each frame that has chips, all that its chips are to cover.

    Raises:
        UsageError: another sampler.
    """
    if not all(hasattr(sampler, name) for name in ("corners", "grid_index", "coverage", "size")):
        raise UsageError(f"A map is made of the chips of a GridAOISampler, not of a {type(sampler).__name__}.")
    coverage, sheets, first = sampler.coverage, [], 0
    for number, frame in enumerate(coverage.target_grids):
        here = np.flatnonzero(sampler.grid_index == number)
        if not len(here):
            continue
        (x, y), (xres, yres) = frame.origin, frame.res
        lattice = Grid(crs=frame.crs, transform=Affine(xres, 0.0, x, 0.0, -yres, y), shape=(1, 1))
        xmin, ymin, xmax, ymax = shapely.total_bounds(coverage.shapes[coverage.grid_index == number]).tolist()
        grid = lattice.window(lattice.window_around((xmin, ymin, xmax, ymax)))
        corners = (sampler.corners[here] - (grid.transform.c, grid.transform.f)) / (xres, -yres)
        sheet = MapExtent(
            grid=grid,
            block=block,
            first=first,
            size=sampler.size,
            positions=here,
            corners=np.rint(corners[:, ::-1]).astype(np.int64),
        )
        sheets.append(sheet)
        first += sheet.blocks
    return sheets


def sheet_paths(path: str | os.PathLike[str], sheets: list[MapExtent]) -> list[str]:
    """A file for each map: `path`, or where there are several, `path` with each one's EPSG code before the suffix."""
    whole = Path(path)
    if len(sheets) == 1:
        return [os.fspath(whole)]
    names: list[str] = []
    for number, sheet in enumerate(sheets, start=1):
        name = f"{whole.stem}_{epsg_code(str(sheet.grid.crs)) or number}"
        names.append(f"{name}_{number}" if name in names else name)
    return [os.fspath(whole.with_name(name + whole.suffix)) for name in names]
