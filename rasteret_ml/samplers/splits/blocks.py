"""Splits of places that do not leak: square blocks of what a dataset covers, and tables of AOIs."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, full_turn
from rasteret_ml.geo.geometries import geometries_from, object_array
from rasteret_ml.geo.regions import clip_polygons, polygonal, union_polygons
from rasteret_ml.samplers.aoi.aoi_columns import one_column
from rasteret_ml.samplers.aoi.target_grids import coverage_of
from rasteret_ml.samplers.grid_sampler import ChipGrid, lay_grid
from rasteret_ml.samplers.splits.assign import assign, checked_fractions, joined_groups

__all__ = ["split_aois", "split_blocks", "value_codes"]

_log = logging.getLogger(__name__)

Geometries = npt.NDArray[np.object_]
Integers = npt.NDArray[np.int64]

_NOTHING = 1e-9
"""Share of the smaller of two AOIs, or of a buffer, that counts as nothing."""


def split_blocks(
    dataset: Any, side: float, fractions: Mapping[str, float], *, buffer: float = 0.0, seed: int = 0
) -> gpd.GeoDataFrame:
    """Cut what a dataset covers into square blocks and deal them to splits.

    Blocks count from the upper left corner of the coverage. They are dealt at random, a pure function of the seed, and
    as near to `fractions` of the covered area as whole blocks allow. Where blocks of different splits meet, each side
    draws back by half the buffer, so that splits lie at least `buffer` apart; the coverage's outer edge stays.

    Args:
        dataset: Any TorchGeo dataset.
        side: Side of a block in units of the dataset's CRS; several times a chip's, or no chip fits inside. The last
            block of a row or column takes a rest of up to half a side, or is short by as much.
        fractions: Share of the covered area of each split, as `{"train": 0.7, "val": 0.15, "test": 0.15}`, sum 1.
        buffer: Least distance between two splits, in units of the dataset's CRS.
        seed: Of the dealing.

    Returns:
        A row for each contiguous part of each split: its polygon in the dataset's CRS, and `split`. Pass the rows of
        a split as `aois=` with `placement="inside"`, and no pixel centre is in two splits.

    Raises:
        UsageError: a side or buffer that cannot be, fewer blocks than splits, or a buffer that leaves a split empty.
    """
    shares = checked_fractions(fractions)
    if not (math.isfinite(side) and side > 0 and math.isfinite(buffer) and buffer >= 0):
        raise UsageError(f"side is a positive length and buffer not negative, not {side} and {buffer}.")
    coverage, crs = coverage_of(dataset), crs_text(dataset.crs)
    xmin, _, _, ymax = coverage.bounds
    square = (float(side), float(side))
    grid = ChipGrid(origin=(xmin, ymax), res=square, size=square, stride=square)
    corners, _ = lay_grid(object_array([coverage]), grid)
    blocks = clip_polygons(_whole_blocks(corners, coverage.bounds, side), coverage)
    blocks = blocks[shapely.area(blocks) > _NOTHING * side * side]
    dealt = assign(
        np.arange(len(blocks)),
        shapely.area(blocks),
        None,
        np.array(list(shares.values())),
        seed,
        "blocks",
        "take a smaller side",
    )
    regions = _drawn_back([union_polygons(blocks[dealt == split]) for split in range(len(shares))], buffer)
    names, parts = [], []
    for name, region in zip(shares, regions, strict=True):
        pieces = [part for part in shapely.get_parts(region) if part.area > 0]
        if not pieces:
            raise UsageError(
                f"A buffer of {buffer:g} leaves nothing of split {name!r} in blocks of {side:g}; take larger blocks "
                "or a smaller buffer."
            )
        names += [name] * len(pieces)
        parts += pieces
    return gpd.GeoDataFrame({"split": names}, geometry=parts, crs=crs)


def _drawn_back(regions: list[BaseGeometry], buffer: float) -> list[BaseGeometry]:
    """Each region without what lies within half the buffer of another one; all are then at least `buffer` apart."""
    if buffer == 0:
        return regions
    kept = []
    for i, region in enumerate(regions):
        others = [_grown(other, buffer / 2) for j, other in enumerate(regions) if j != i]
        kept.append(polygonal(shapely.difference(region, shapely.union_all(others))))
    # Across a gap in the coverage half the buffer on each side may be too little: the larger side gives the rest.
    order = sorted(range(len(kept)), key=lambda i: -kept[i].area)
    for place, larger in enumerate(order):
        for smaller in order[place + 1 :]:
            if shapely.distance(kept[larger], kept[smaller]) < buffer * (1 - _NOTHING):
                kept[larger] = polygonal(shapely.difference(kept[larger], _grown(kept[smaller], buffer)))
    return kept


def _grown(region: BaseGeometry, distance: float) -> BaseGeometry:
    """All within `distance` of a region, and a little more at its corners (a round one would fall short of it)."""
    return shapely.buffer(region, distance, join_style="mitre")


def split_aois(
    aois: Any,
    fractions: Mapping[str, float],
    *,
    by: str | None = None,
    side: float | None = None,
    buffer: float = 0.0,
    stratify: str | None = None,
    seed: int = 0,
    crs: Any = None,
) -> gpd.GeoDataFrame:
    """Deal AOIs to splits; those that overlap, or share a group or a block, always end in the same one.

    AOIs are dealt at random, a pure function of the seed, and as near to `fractions` of their number as whole groups
    allow. With a buffer, the largest split keeps all of its AOIs; of each smaller one, AOIs closer than `buffer` to
    what larger ones keep are left out (their split is None; how many is logged). Blocks lose fewer than single AOIs.

    Args:
        aois: A GeoDataFrame, a path, or geometries (see `geometries_from`).
        fractions: Share of the AOIs of each split; they sum to 1.
        by: None: each AOI for itself. "block": AOIs whose centroids are in one square of `side` together. Any other
            name: AOIs with the same value in this column together (a farm, a county, a year).
        side: Side of the blocks in units of the AOIs' CRS.
        buffer: Least distance between AOIs of different splits, in units of the AOIs' CRS, which has to be projected.
            Measured between the AOIs themselves: add a chip's size where chips reach out of them. The largest split
            keeps all of its AOIs, so fields that touch cost the others much: with by="block", take a side of ten
            buffers or more.
        stratify: Column of classes whose shares are to be alike in all splits.
        seed: Of the dealing.
        crs: CRS of `aois` where they do not carry one; default longitude/latitude.

    Returns:
        The table with a column `split` (replaced where there was one).

    Raises:
        UsageError: a column that is missing or has gaps, fewer groups than splits, a buffer in degrees, or one that
            leaves a split empty.
    """
    shares = checked_fractions(fractions)
    found = geometries_from(aois, crs)
    table = gpd.GeoDataFrame(geometry=list(found.geometries), crs=found.crs) if found.table is None else found.table
    shapes = found.geometries
    if not (math.isfinite(buffer) and buffer >= 0):
        raise UsageError(f"buffer is a distance, not negative, not {buffer}.")
    if buffer and full_turn(found.crs) is not None:
        raise UsageError(
            f"A buffer of {buffer:g} needs AOIs in a projected CRS, not {found.crs}: convert the table first, for "
            "example with aois.to_crs(aois.estimate_utm_crs())."
        )
    a, b = _overlapping(shapes, full_turn(found.crs))
    groups = np.arange(len(shapes)) if by is None else _groups(table, shapes, by, side)
    if by != "block" and side is not None:
        raise UsageError("side= goes with by='block'.")
    first = np.unique(groups, return_index=True)[1][groups]
    groups = joined_groups(len(shapes), np.concatenate([a, first]), np.concatenate([b, np.arange(len(shapes))]))
    classes = None if stratify is None else value_codes(table, stratify, "stratify", "AOI")
    what = "groups of AOIs that belong together" + ("" if by is None else f" (by={by!r})")
    remedy = "take fewer splits, or a finer by="
    dealt = assign(groups, np.ones(len(shapes)), classes, np.array(list(shares.values())), seed, what, remedy)
    if buffer:
        dealt = _without_near(shapes, dealt, buffer, list(shares))
    names = np.array([*shares, None], dtype=object)
    return table.assign(split=names[dealt])


def _whole_blocks(
    corners: npt.NDArray[np.float64], bounds: tuple[float, float, float, float], side: float
) -> Geometries:
    """The blocks that begin at upper left corners `[N, 2]`; a rest of less than half a side joins the block before."""
    xmin, ymin, xmax, ymax = bounds
    count = [max(1, round((stop - start) / side)) for start, stop in ((xmin, xmax), (ymin, ymax))]
    cells = np.rint(np.abs(corners - (xmin, ymax)) / side).astype(np.int64)
    column, row = np.unique(np.minimum(cells, np.array(count) - 1), axis=0).T
    right = np.where(column == count[0] - 1, max(xmax, xmin + count[0] * side), xmin + (column + 1) * side)
    bottom = np.where(row == count[1] - 1, min(ymin, ymax - count[1] * side), ymax - (row + 1) * side)
    boxes: Geometries = shapely.box(xmin + column * side, bottom, right, ymax - row * side)
    return boxes


def _overlapping(shapes: Geometries, turn: float | None) -> tuple[Integers, Integers]:
    """Pairs of geometries that share ground: an area, or, of points and lines, any point.

    Longitudes a turn apart are one place, so that AOIs on both sides of the antimeridian are found as well.
    """
    valid = shapely.make_valid(shapes)
    tree = shapely.STRtree(valid)
    a, b = tree.query(valid, predicate="intersects")
    pairs = [_sharing(valid, valid, a[a < b], b[a < b])]
    if turn is not None:
        west = np.flatnonzero(shapely.bounds(valid)[:, 0] + turn <= shapely.total_bounds(valid)[2])
        moved = valid.copy()
        moved[west] = shapely.transform(valid[west], lambda xy: xy + np.array([turn, 0.0]))
        a, b = tree.query(moved[west], predicate="intersects")
        pairs.append(_sharing(moved, valid, west[a], b))
    one, two = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    return one, two


def _sharing(first: Geometries, second: Geometries, a: Integers, b: Integers) -> tuple[Integers, Integers]:
    """Those of the pairs `a` of `first` and `b` of `second`, which meet, that do not merely touch."""
    one, two = shapely.area(first[a]), shapely.area(second[b])
    areal = (one > 0) & (two > 0)
    shared = np.zeros(len(a))
    shared[areal] = shapely.area(shapely.intersection(first[a[areal]], second[b[areal]]))
    kept = ~areal | (shared > _NOTHING * np.minimum(one, two))
    return a[kept], b[kept]


def _groups(table: pd.DataFrame, shapes: Geometries, by: str, side: float | None) -> Integers:
    if by != "block":
        return value_codes(table, by, "by", "AOI")
    if side is None or not (math.isfinite(side) and side > 0):
        raise UsageError(f"by='block' needs side=, the side of a block in units of the AOIs' CRS, not {side!r}.")
    centres = shapely.get_coordinates(shapely.centroid(shapes))
    cells = np.floor((centres - centres.min(axis=0)) / side).astype(np.int64)
    return np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)


def value_codes(table: Any, column: str, argument: str, what: str) -> npt.NDArray[np.int64]:
    """Numbers from 0 of the values of a column `[N]`.

    Raises:
        UsageError: no such column, or a row without a value.
    """
    if column not in table.columns:
        raise UsageError(f"{argument}={column!r} is no column; there are {list(table.columns)}.")
    codes: Integers = pd.factorize(one_column(table, column, argument))[0].astype(np.int64)
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise UsageError(f"{what} {row} has nothing in column {column!r}; fill it in, or drop it first.")
    return codes


def _without_near(shapes: Geometries, dealt: Integers, buffer: float, names: list[str]) -> npt.NDArray[np.int64]:
    """Splits of AOIs, -1 for those that are too near to what larger splits keep."""
    counts = np.bincount(dealt, minlength=len(names))
    order = np.argsort(-counts, kind="stable").tolist()
    tree = shapely.STRtree(shapes)
    out = dealt.copy()
    kept = dealt == order[0]
    for split in order[1:]:
        mine = np.flatnonzero(dealt == split)
        near, other = tree.query(shapes[mine], predicate="dwithin", distance=buffer * (1 - _NOTHING))
        lost = mine[np.unique(near[kept[other]])]
        out[lost] = -1
        kept[np.setdiff1d(mine, lost)] = True
        if len(lost) == len(mine):
            raise UsageError(
                f"All {len(mine)} AOIs of split {names[split]!r} lie within {buffer:g} of another split's; deal them "
                "in blocks (by='block', side= several times the buffer), or take a smaller buffer."
            )
        if len(lost):
            _log.warning(
                "%d of %d AOIs of split %r lie within %g of another split's and are in none",
                len(lost),
                len(mine),
                names[split],
                buffer,
            )
    return out
