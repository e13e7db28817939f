"""Locality: what a sampler's order gains in speed and loses in mixing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from bench import SIZE, Bench
from readers import Row, locality_of
from report import Section, middle, number, spread
from scenes import BANDS, TILE, Layout
from speed import AHEAD_ROW, method

import rasteret_ml as rm

Chips = npt.NDArray[np.int64]
"""`[N, 3]`: scene, row and column."""

_CELL = 64
"""Side of the cells that coverage is counted in, pixels."""
_LONGER = 4
"""Times as many batches as usual are timed: an epoch begins with all blocks new, so that its first batches share fewer
tiles than the rest, and a block lasts for a hundred of them."""


def locality(bench: Bench) -> list[Section]:
    """The knob against speed at 30 ms and against mixing."""
    heads = ["locality", "chips/s", "times uniform", "tiles a chip", "tiles a chip, 16 batches", "scenes", "blocks"]
    section = Section("Locality, 30 ms", method(bench, _LONGER), [*heads, "chi²/dof", "coverage"])
    section.notes.append(
        "tiles a chip: distinct tiles that a batch (or 16) touches; scenes, blocks: distinct ones in a batch, relative "
        f"to uniform's (a block: {bench.args.block} x {bench.args.block} tiles); chi²/dof of the chips' places over an "
        f"epoch of {bench.args.epoch}, 1 = independent uniform draws, below 1 = more even; coverage: how unevenly an "
        "epoch covers the area (coefficient of variation), relative to uniform's."
    )
    uniform = Row(label="uniform", reader="ours", options={"workers": 2, "lookahead": True})
    cached = {**uniform.options, "cache_bytes": bench.args.cache_mb * 2**20}
    rows = [uniform, Row(label="uniform, cache", reader="ours", options=cached)]
    values = list(bench.args.knob)
    values += [] if bench.locality in values else [bench.locality]
    rows += [Row(label=f"{v}", reader="ours", options={**cached, "locality": v}) for v in values]
    rows = bench.available(rows, section)
    bench.check(rows, 0)
    found = bench.paired(rows, lambda row: bench.rate(row, 30, longer=_LONGER))
    base = batch_diversity(draw(bench, None), bench)
    for row in rows:
        mixed = batch_diversity(draw(bench, row.options.get("locality")), bench)
        times = middle(found[row.label]) / middle(found["uniform"])
        section.rows.append([row.label, spread(found[row.label]), number(times), *_against(mixed, base)])
        if row.options.get("locality") == bench.locality:
            section.target(f"locality {row.label}, times uniform", times, 3)
            section.target("scenes of uniform's", mixed["scenes"] / base["scenes"], 0.9)
            section.target("blocks of uniform's", mixed["blocks"] / base["blocks"], 0.5)
    section.notes.append(f"the uniform row is what other tables call {AHEAD_ROW!r}")
    section.notes.append(
        "more batches than in other tables: an epoch begins with all blocks new, so that its first batches share fewer "
        "tiles than the rest"
    )
    return [section]


def _against(mixed: dict[str, float], base: dict[str, float]) -> list[str]:
    return [
        number(mixed["tiles"]),
        number(mixed["tiles_16"]),
        *(number(mixed[key] / base[key]) for key in ("scenes", "blocks")),
        number(mixed["chi2"]),
        number(mixed["coverage"] / base["coverage"]),
    ]


def draw(bench: Bench, value: Any) -> Chips:
    """An epoch of chips."""
    dataset = rm.RasteretDataset(bench.collection(None), list(BANDS))
    local = locality_of(value, bench.batch)
    sampler = rm.RandomAOISampler(dataset, SIZE, bench.args.epoch, seed=bench.args.seed, locality=local)
    return np.array([bench.place(dataset, aoi) for aoi in sampler], np.int64)


def batch_diversity(chips: Chips, bench: Bench) -> dict[str, float]:
    """How well an order mixes, and what it has to read."""
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
    """Distinct tiles that chips touch in one band."""
    touched: set[tuple[int, int, int]] = set()
    for scene, row, col in chips.tolist():
        rows = range(row // TILE, (row + SIZE - 1) // TILE + 1)
        touched |= {(scene, r, c) for r in rows for c in range(col // TILE, (col + SIZE - 1) // TILE + 1)}
    return len(touched)


def chi_squared(chips: Chips, layout: Layout) -> float:
    """Pearson's statistic of the chips' corners over equal bins, per degree of freedom."""
    across = int(np.clip(np.sqrt(len(chips) / 20 / layout.scenes), 1, 12))
    room = layout.size - SIZE + 1
    bins = np.zeros((layout.scenes, across, across))
    row, col = (np.minimum(chips[:, i] * across // room, across - 1) for i in (1, 2))
    np.add.at(bins, (chips[:, 0], row, col), 1)
    expected = len(chips) / bins.size
    return float(((bins - expected) ** 2 / expected).sum() / max(1, bins.size - 1))


def unevenness(chips: Chips, layout: Layout) -> float:
    """Coefficient of variation of how often a cell away from the edges is covered."""
    cells, reach = layout.size // _CELL, SIZE // _CELL
    steps = np.zeros((layout.scenes, cells + reach + 1, cells + reach + 1))
    scene, row, col = chips[:, 0], chips[:, 1] // _CELL, chips[:, 2] // _CELL
    corners: Sequence[tuple[int, int, int]] = ((0, 0, 1), (reach, 0, -1), (0, reach, -1), (reach, reach, 1))
    for down, right, sign in corners:
        np.add.at(steps, (scene, row + down, col + right), sign)
    covered = steps.cumsum(1).cumsum(2)[:, reach : cells - reach, reach : cells - reach]
    return float(covered.std() / covered.mean())
