"""Locality: how much speed a local order of chips gains, and how much diversity its batches lose.

`batch_diversity(sampler, dataset, batch_size)` measures the diversity of the batches of any sampler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from bench import SIZE, Bench
from readers import Row, parse_locality
from report import Section, middle, number, spread
from scenes import BANDS, TILE, Layout
from speed import LOOKAHEAD_ROW, method

import rasteret_ml as rm
from rasteret_ml.errors import UsageError
from rasteret_ml.samplers.aoi.target_grids import target_grids_of
from rasteret_ml.samplers.locality import GridTileLookup

Chips = npt.NDArray[np.int64]
"""`[N, 3]`: scene, row and column."""

_CELL = 64
"""Side of the cells in which coverage is counted, in pixels."""
_LONGER = 4
"""Factor on the number of timed batches: all blocks are new when an epoch starts, so its first batches share fewer
tiles than later ones, and a block lasts for a hundred batches."""


def locality(bench: Bench) -> list[Section]:
    """Measure speed at 30 ms and diversity of batches for several localities."""
    columns = ["locality", "chips/s", "/ uniform", "tiles per chip", "tiles per chip, 16 batches", "scenes", "blocks"]
    section = Section("Locality, 30 ms", method(bench, _LONGER), [*columns, "chi²/dof", "coverage"])
    section.notes.append(
        "tiles per chip: distinct tiles that a batch (or 16 batches) touches, per chip; scenes, blocks: distinct "
        f"scenes and blocks of {bench.args.block} x {bench.args.block} tiles in a batch, relative to uniform; "
        f"chi²/dof: of the chips' positions over an epoch of {bench.args.epoch}, 1 = independent uniform draws, "
        "below 1 = more even; coverage: coefficient of variation of how often an epoch covers a cell, relative to "
        "uniform."
    )
    uniform = Row(label="uniform", reader="ours", options={"workers": 2, "lookahead": True})
    cached = {**uniform.options, "cache_bytes": bench.args.cache_mb * 2**20}
    rows = [uniform, Row(label="uniform, cache", reader="ours", options=cached)]
    values = list(bench.args.localities)
    values += [] if bench.locality in values else [bench.locality]
    rows += [Row(label=f"{v}", reader="ours", options={**cached, "locality": v}) for v in values]
    rows = bench.available(rows, section)
    bench.check(rows, 0)
    rates = bench.paired(rows, lambda row: bench.rate(row, 30, longer=_LONGER))
    uniform_diversity = epoch_statistics(draw(bench, None), bench)
    for row in rows:
        diversity = epoch_statistics(draw(bench, row.options.get("locality")), bench)
        speedup = middle(rates[row.label]) / middle(rates["uniform"])
        cells = [number(speedup), *_cells(diversity, uniform_diversity)]
        section.rows.append([row.label, spread(rates[row.label]), *cells])
        if row.options.get("locality") == bench.locality:
            section.target(f"locality {row.label}, speed relative to uniform", speedup, 3)
            for key, target in (("scenes", 0.9), ("blocks", 0.5)):
                section.target(f"{key} relative to uniform", diversity[key] / uniform_diversity[key], target)
    section.notes.append(f"other tables call the uniform row {LOOKAHEAD_ROW!r}")
    section.notes.append(
        "more batches are timed than in other tables: all blocks are new when an epoch starts, so its first batches "
        "share fewer tiles than later ones"
    )
    return [section]


def _cells(diversity: dict[str, float], uniform: dict[str, float]) -> list[str]:
    """Format the columns from tiles per chip to coverage."""
    ratios = {key: diversity[key] / uniform[key] for key in ("scenes", "blocks", "coverage")}
    return [number((diversity | ratios)[key]) for key in ("tiles", "tiles_16", "scenes", "blocks", "chi2", "coverage")]


def draw(bench: Bench, value: Any) -> Chips:
    """Draw an epoch of chips with a locality, or uniformly (None)."""
    dataset = rm.RasteretDataset(bench.collection(None), list(BANDS))
    local = parse_locality(value, bench.batch)
    sampler = rm.RandomAOISampler(dataset, SIZE, bench.args.epoch, seed=bench.args.seed, locality=local)
    return np.array([bench.locate(dataset, aoi) for aoi in sampler], np.int64)


def epoch_statistics(chips: Chips, bench: Bench) -> dict[str, float]:
    """Measure how diverse the batches of an order are and how many tiles they touch."""
    side = bench.args.block * TILE
    batches = [chips[i : i + bench.batch] for i in range(0, len(chips) - bench.batch + 1, bench.batch)]
    windows = [chips[i : i + 16 * bench.batch] for i in range(0, len(chips), 16 * bench.batch)]
    return {
        "scenes": float(np.mean([len(np.unique(b[:, 0])) for b in batches])),
        "blocks": float(np.mean([len(_blocks(b, side)) for b in batches])),
        "tiles": float(np.mean([_tiles(b) / len(b) for b in batches])) * len(BANDS),
        "tiles_16": float(np.mean([_tiles(w) / len(w) for w in windows])) * len(BANDS),
        "chi2": chi_squared(chips, bench.layout),
        "coverage": unevenness(chips, bench.layout),
    }


def _blocks(chips: Chips, side: int) -> set[tuple[int, ...]]:
    centres = np.column_stack([chips[:, 0], (chips[:, 1:] + SIZE // 2) // side])
    return set(map(tuple, centres.tolist()))


def _tiles(chips: Chips) -> int:
    """Count the distinct tiles that chips touch in one band."""
    touched: set[tuple[int, int, int]] = set()
    for scene, row, col in chips.tolist():
        rows = range(row // TILE, (row + SIZE - 1) // TILE + 1)
        touched |= {(scene, r, c) for r in rows for c in range(col // TILE, (col + SIZE - 1) // TILE + 1)}
    return len(touched)


def chi_squared(chips: Chips, layout: Layout) -> float:
    """Compute Pearson's statistic of the chips' corners over equal bins, per degree of freedom."""
    across = int(np.clip(np.sqrt(len(chips) / 20 / layout.scenes), 1, 12))
    span = layout.size - SIZE + 1
    bins = np.zeros((layout.scenes, across, across))
    row, col = (np.minimum(chips[:, i] * across // span, across - 1) for i in (1, 2))
    np.add.at(bins, (chips[:, 0], row, col), 1)
    expected = len(chips) / bins.size
    return float(((bins - expected) ** 2 / expected).sum() / max(1, bins.size - 1))


def unevenness(chips: Chips, layout: Layout) -> float:
    """Compute the coefficient of variation of how often cells away from the edges are covered."""
    cells, reach = layout.size // _CELL, SIZE // _CELL
    steps = np.zeros((layout.scenes, cells + reach + 1, cells + reach + 1))
    scene, row, col = chips[:, 0], chips[:, 1] // _CELL, chips[:, 2] // _CELL
    corners: Sequence[tuple[int, int, int]] = ((0, 0, 1), (reach, 0, -1), (0, reach, -1), (reach, reach, 1))
    for down, right, sign in corners:
        np.add.at(steps, (scene, row + down, col + right), sign)
    covered = steps.cumsum(1).cumsum(2)[:, reach : cells - reach, reach : cells - reach]
    return float(covered.std() / covered.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDiversity:
    """Distinct scenes and tiles in a batch, and the expected numbers for a random order of the same chips."""

    scenes: float  #: Mean number of distinct scenes in a batch (a chip's scene holds its centre).
    scenes_uniform: float  #: Expected number of distinct scenes in a batch drawn uniformly from the same chips.
    tiles: float  #: Mean number of distinct tiles in a batch (a chip's tile holds its upper left corner).
    tiles_uniform: float  #: Expected number of distinct tiles in a batch drawn uniformly from the same chips.

    @property
    def scene_ratio(self) -> float:
        """Scenes relative to uniform draws: 1 = as diverse; above 1 = more evenly spread."""
        return self.scenes / self.scenes_uniform

    @property
    def tile_ratio(self) -> float:
        """Tiles relative to uniform draws."""
        return self.tiles / self.tiles_uniform


def batch_diversity(aois: Iterable[Any], dataset: Any, batch_size: int) -> BatchDiversity:
    """Measure how many different scenes and tiles the batches of an order hold.

    The expectation is Hurlbert's (1971) for distinct classes in a sample without replacement: the sum over classes of
    1 - C(N - n, k) / C(N, k).

    Args:
        aois: A sampler or a list of queries `(x, y, t)` for chips of one size; one epoch is iterated.
        dataset: The dataset that they query.
        batch_size: Chips in a batch. A multiple of it measures several successive batches together.

    Raises:
        UsageError: if there are fewer chips than `batch_size`.
    """
    queries = list(aois)
    if not 1 <= batch_size <= len(queries):
        raise UsageError(f"A batch of {batch_size} chips must fit in the epoch, which has {len(queries)}.")
    grids = target_grids_of(dataset)
    numbers = {grid.crs: number for number, grid in enumerate(grids)}
    # With a single target grid, queries may be plain slices without a CRS.
    grid_index = np.array([0 if len(grids) == 1 else numbers[query.crs] for query in queries])
    (x, y, _), res = queries[0], grids[grid_index[0]].res
    size = (round((y.stop - y.start) / res[1]), round((x.stop - x.start) / res[0]))
    corners = np.array([(x.start, y.stop) for x, y, _ in queries], dtype=np.float64)
    when = slice(min(t.start for _, _, t in queries), max(t.stop for _, _, t in queries))
    found = GridTileLookup(dataset, grids, size, when).locate(corners, grid_index)
    tiles, scenes = found.blocks(1), found.scene + 1
    return BatchDiversity(
        scenes=_mean_distinct(scenes, batch_size),
        scenes_uniform=_expected_distinct(scenes, batch_size),
        tiles=_mean_distinct(tiles, batch_size),
        tiles_uniform=_expected_distinct(tiles, batch_size),
    )


def _mean_distinct(values: npt.NDArray[np.int64], batch_size: int) -> float:
    """Mean number of distinct values in the full batches."""
    batches = np.sort(values[: len(values) // batch_size * batch_size].reshape(-1, batch_size), axis=1)
    return float(1 + (np.diff(batches, axis=1) != 0).sum(axis=1).mean())


def _expected_distinct(values: npt.NDArray[np.int64], batch_size: int) -> float:
    """Expected number of distinct values in a batch drawn without replacement."""
    total, counts = len(values), np.bincount(values)
    others = total - counts[counts > 0, None] - np.arange(batch_size)
    missed = np.prod(np.maximum(others, 0) / (total - np.arange(batch_size)), axis=1)
    return float((1 - missed).sum())
