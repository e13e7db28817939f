"""Spatial splits: square blocks of what a dataset covers, and tables of AOIs."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, full_turn
from rasteret_ml.geo.geometries import geometries_from, object_array
from rasteret_ml.geo.regions import Floats, Geometries, Integers, clip_polygons, polygonal, union_polygons
from rasteret_ml.samplers.aoi.aoi_table import get_column
from rasteret_ml.samplers.aoi.target_grids import coverage_of
from rasteret_ml.samplers.grid_sampler import grid_chips
from rasteret_ml.samplers.ranks import epoch_random

_log = logging.getLogger(__name__)

_TOLERANCE = 1e-9  # Share of the smaller of two AOIs, of a block, or of a buffer, that rounding errors may reach.


def split_blocks(
    dataset: Any, side: float, fractions: Mapping[str, float], *, buffer: float = 0.0, seed: int = 0
) -> gpd.GeoDataFrame:
    """Cut what a dataset covers into square blocks and assign them to splits.

    Blocks start at the upper left corner of the coverage. They are assigned at random, as a pure function of the seed,
    and as close to `fractions` of the covered area as whole blocks allow. Where blocks of different splits meet, each
    side is trimmed by half the buffer, so that splits are at least `buffer` apart; the outer edge stays.

    Args:
        dataset: Any TorchGeo dataset.
        side: Side of a block in units of the dataset's CRS, several times a chip's. The last block of a row or column
            is up to half a side larger or smaller.
        fractions: Share of the covered area of each split, as `{"train": 0.7, "val": 0.15, "test": 0.15}`; their sum
            must be 1.
        buffer: Minimum distance between splits, in units of the dataset's CRS.
        seed: Seed of the assignment.

    Returns:
        A row for each contiguous part of each split: its polygon in the dataset's CRS, and `split`. If the rows of a
        split are passed as `aois=` with `placement="inside"`, no pixel centre is in two splits.

    Raises:
        UsageError: if side or buffer is not valid, there are fewer blocks than splits, or the buffer leaves a split
            empty.

    Example:
        >>> blocks = split_blocks(dataset, 5000, {"train": 0.8, "val": 0.2}, buffer=500)
        >>> train = RandomAOISampler(dataset, 128, 1000, blocks[blocks["split"] == "train"], placement="inside")
    """
    shares = parse_fractions(fractions)
    if not (math.isfinite(side) and side > 0):
        raise UsageError(f"side must be a finite length > 0, got {side}.")
    _check_buffer(buffer)
    coverage, crs = coverage_of(dataset), crs_text(dataset.crs)
    xmin, _, _, ymax = coverage.bounds
    square = (float(side), float(side))
    corners, _ = grid_chips(object_array([coverage]), (xmin, ymax), square, square, square)
    blocks = clip_polygons(_block_boxes(corners, coverage.bounds, side), coverage)
    areas = shapely.area(blocks)
    blocks, areas = blocks[areas > _TOLERANCE * side * side], areas[areas > _TOLERANCE * side * side]
    index = assign(np.arange(len(blocks)), areas, None, shares, seed, "blocks", "use a smaller side")
    regions = _trim([union_polygons(blocks[index == split]) for split in range(len(shares))], buffer)
    names, polygons = [], []
    for name, region in zip(shares, regions, strict=True):
        parts = [part for part in shapely.get_parts(region) if part.area > 0]
        if not parts:
            raise UsageError(
                f"A buffer of {buffer:g} leaves nothing of split {name!r} in blocks of {side:g}; use larger blocks or "
                "a smaller buffer."
            )
        names += [name] * len(parts)
        polygons += parts
    return gpd.GeoDataFrame({"split": names}, geometry=polygons, crs=crs)


def _block_boxes(corners: Floats, bounds: tuple[float, float, float, float], side: float) -> Geometries:
    """Blocks by their upper left corners `[N, 2]`; less than half a block at the end joins the block before."""
    xmin, ymin, xmax, ymax = bounds
    count = [max(1, round((stop - start) / side)) for start, stop in ((xmin, xmax), (ymin, ymax))]
    cells = np.rint(np.abs(corners - (xmin, ymax)) / side).astype(np.int64)
    column, row = np.unique(np.minimum(cells, np.array(count) - 1), axis=0).T
    right = np.where(column == count[0] - 1, max(xmax, xmin + count[0] * side), xmin + (column + 1) * side)
    bottom = np.where(row == count[1] - 1, min(ymin, ymax - count[1] * side), ymax - (row + 1) * side)
    boxes: Geometries = shapely.box(xmin + column * side, bottom, right, ymax - row * side)
    return boxes


def _trim(regions: list[BaseGeometry], buffer: float) -> list[BaseGeometry]:
    """Regions without what lies within half the buffer of another one, so that all are `buffer` apart."""
    if buffer == 0:
        return regions
    kept = []
    for i, region in enumerate(regions):
        others = [_grow(other, buffer / 2) for j, other in enumerate(regions) if j != i]
        kept.append(polygonal(shapely.difference(region, shapely.union_all(others))))
    # Across a gap in the coverage, half the buffer on each side may be too little: trim the larger region further.
    order = sorted(range(len(kept)), key=lambda i: -kept[i].area)
    for rank, larger in enumerate(order):
        for smaller in order[rank + 1 :]:
            if shapely.distance(kept[larger], kept[smaller]) < buffer * (1 - _TOLERANCE):
                kept[larger] = polygonal(shapely.difference(kept[larger], _grow(kept[smaller], buffer)))
    return kept


def _grow(region: BaseGeometry, distance: float) -> BaseGeometry:
    # Mitred: chords in place of arcs would fall short of the distance.
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
    """Assign AOIs to splits; those that overlap, or share a group or a block, are always in the same one.

    AOIs are assigned at random, as a pure function of the seed, and as close to `fractions` of their number as whole
    groups allow. With a buffer, the largest split keeps all its AOIs; AOIs of smaller splits that are closer than
    `buffer` to those of larger ones are left out (their split is None; their number is logged).

    Args:
        aois: A GeoDataFrame, a path, or geometries (see `geometries_from`).
        fractions: Share of the AOIs of each split; their sum must be 1.
        by: None: each AOI separately. "block": AOIs whose centroids lie in the same square of `side` together. Any
            other name: AOIs with the same value in this column together (a farm, a county, a year).
        side: Side of the blocks in units of the AOIs' CRS.
        buffer: Minimum distance between AOIs of different splits, in units of the AOIs' CRS, which must be projected.
            It is measured between the AOIs: add a chip's size if chips extend past them. Adjacent fields lose many AOIs
            to a buffer; blocks lose fewer, with a side of ten buffers or more.
        stratify: Column of classes that should have the same shares in all splits.
        seed: Seed of the assignment.
        crs: CRS of `aois` if they do not state it; default longitude/latitude.

    Returns:
        The table with a column `split`, which replaces an existing one.

    Raises:
        UsageError: if a column is missing or has gaps, there are fewer groups than splits, a buffer is in degrees, or
            it leaves a split empty.

    Example:
        >>> fields = split_aois("fields.gpkg", {"train": 0.8, "val": 0.2}, by="farm", stratify="crop")
    """
    shares = parse_fractions(fractions)
    found = geometries_from(aois, crs)
    table = gpd.GeoDataFrame(geometry=list(found.geometries), crs=found.crs) if found.table is None else found.table
    shapes, turn = found.geometries, full_turn(found.crs)
    _check_buffer(buffer)
    if buffer and turn is not None:
        raise UsageError(
            f"A buffer of {buffer:g} needs AOIs in a projected CRS, got {found.crs}: convert the table first, for "
            "example with aois.to_crs(aois.estimate_utm_crs())."
        )
    if by != "block" and side is not None:
        raise UsageError("side= needs by='block'.")
    groups = np.arange(len(shapes)) if by is None else _groups(table, shapes, by, side)
    first = np.unique(groups, return_index=True)[1][groups]
    a, b = _overlapping(shapes, turn)
    groups = connected_components(len(shapes), np.append(a, first), np.append(b, np.arange(len(shapes))))
    classes = None if stratify is None else value_codes(table, stratify, "stratify", "AOI")
    unit = "groups of AOIs that belong together" + ("" if by is None else f" (by={by!r})")
    index = assign(groups, np.ones(len(shapes)), classes, shares, seed, unit, "use fewer splits, or a finer by=")
    if buffer:
        index = _drop_near(shapes, index, buffer, list(shares))
    return table.assign(split=np.array([*shares, None], dtype=object)[index])


def _check_buffer(buffer: float) -> None:
    if not (math.isfinite(buffer) and buffer >= 0):
        raise UsageError(f"buffer must be a finite distance >= 0, got {buffer}.")


def _overlapping(shapes: Geometries, turn: float | None) -> tuple[Integers, Integers]:
    """Pairs of geometries that share an area or, if one is a point or line, any point.

    Longitudes a full turn apart are the same place, which finds pairs across the antimeridian.
    """
    valid = shapely.make_valid(shapes)
    tree = shapely.STRtree(valid)
    a, b = tree.query(valid, predicate="intersects")
    pairs = [_sharing_area(valid, valid, a[a < b], b[a < b])]
    if turn is not None:
        west = np.flatnonzero(shapely.bounds(valid)[:, 0] + turn <= shapely.total_bounds(valid)[2])
        moved = valid.copy()
        moved[west] = shapely.transform(valid[west], lambda xy: xy + np.array([turn, 0.0]))
        a, b = tree.query(moved[west], predicate="intersects")
        pairs.append(_sharing_area(moved, valid, west[a], b))
    first, second = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    return first, second


def _sharing_area(first: Geometries, second: Geometries, a: Integers, b: Integers) -> tuple[Integers, Integers]:
    """Those of the intersecting pairs `a` of `first` and `b` of `second` that do not only touch."""
    area_a, area_b = shapely.area(first[a]), shapely.area(second[b])
    polygons = (area_a > 0) & (area_b > 0)
    shared = np.zeros(len(a))
    shared[polygons] = shapely.area(shapely.intersection(first[a[polygons]], second[b[polygons]]))
    kept = ~polygons | (shared > _TOLERANCE * np.minimum(area_a, area_b))
    return a[kept], b[kept]


def _groups(table: pd.DataFrame, shapes: Geometries, by: str, side: float | None) -> Integers:
    if by != "block":
        return value_codes(table, by, "by", "AOI")
    if side is None or not (math.isfinite(side) and side > 0):
        raise UsageError(f"by='block' needs side=, the side of a block > 0 in units of the AOIs' CRS, got {side!r}.")
    centres = shapely.get_coordinates(shapely.centroid(shapes))
    cells = np.floor((centres - centres.min(axis=0)) / side).astype(np.int64)
    return np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)


def value_codes(table: Any, column: str, argument: str, row_name: str) -> Integers:
    """Return a number from 0 for the value of each row in a column `[N]`; raises UsageError if one is missing."""
    codes: Integers = pd.factorize(get_column(table, column, argument))[0].astype(np.int64)
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise UsageError(f"{row_name} {row} has no value in column {column!r}; fill it in, or drop the row first.")
    return codes


def _drop_near(shapes: Geometries, index: Integers, buffer: float, names: list[str]) -> Integers:
    """The split of each AOI, -1 for those that are too close to AOIs of larger splits."""
    order = np.argsort(-np.bincount(index, minlength=len(names)), kind="stable").tolist()
    tree = shapely.STRtree(shapes)
    out = index.copy()
    kept = index == order[0]
    for split in order[1:]:
        own = np.flatnonzero(index == split)
        near, other = tree.query(shapes[own], predicate="dwithin", distance=buffer * (1 - _TOLERANCE))
        lost = own[np.unique(near[kept[other]])]
        out[lost] = -1
        kept[np.setdiff1d(own, lost)] = True
        if len(lost) == len(own):
            raise UsageError(
                f"All {len(own)} AOIs of split {names[split]!r} lie within {buffer:g} of another split's; assign them "
                "in blocks (by='block', side= several times the buffer), or use a smaller buffer."
            )
        if len(lost):
            text = "Leaving out %d of %d AOIs of split %r that lie within %g of another split's"
            _log.warning(text, len(lost), len(own), names[split], buffer)
    return out


# Assignment -----------------------------------------------------------------------------------------------


def parse_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    """Return names of splits and their shares: two or more that are > 0 and sum to 1, else a `UsageError`."""
    example = "{'train': 0.8, 'val': 0.2}"
    if not isinstance(fractions, Mapping) or len(fractions) < 2:
        raise UsageError(f"fractions must name two or more splits, as {example}, got {fractions!r}.")
    try:
        shares = {str(name): float(share) for name, share in fractions.items()}
    except (TypeError, ValueError):
        raise UsageError(f"fractions must map split names to numbers, as {example}, got {dict(fractions)!r}.") from None
    if not all(share > 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        raise UsageError(f"fractions must be > 0 and sum to 1, got {shares} (sum {sum(shares.values()):g}).")
    return shares


def assign(
    groups: Integers,
    weights: Floats,
    classes: Integers | None,
    fractions: Mapping[str, float],
    seed: int,
    unit: str,
    remedy: str,
) -> Integers:
    """Return the split of each item `[N]` as an index into `fractions`, with whole groups assigned at random.

    This is the iterative stratification of Sechidis et al. (2011) with weights. Groups with the rarest classes come
    first, heavier ones before lighter ones. Each goes to a random split in which it fits, in proportion to what the
    split still lacks of the group's rarest class; if it fits in none, to the one that lacks most overall among those
    that lack some of this class. A split without any group gets the lightest group of the split with the largest
    surplus.

    Groups and classes of items are numbers from 0 `[N]`; classes, if given, get the same shares in all splits.
    Raises UsageError, which calls groups `unit` and ends with `remedy`, if there are fewer groups than splits.
    """
    count, shares = int(np.max(groups)) + 1, np.array(list(fractions.values()))
    if count < len(shares):
        raise UsageError(f"There are {count} {unit} for {len(shares)} splits, which need at least one each: {remedy}.")
    item_class = np.zeros(len(groups), np.int64) if classes is None else classes
    totals: Floats = np.bincount(item_class, weights).astype(np.float64)
    # One entry for each class in each group.
    pair, entry = np.unique(groups * len(totals) + item_class, return_inverse=True)
    amounts: Floats = np.bincount(entry.reshape(-1), weights).astype(np.float64)
    owner, entry_class = pair // len(totals), pair % len(totals)
    starts: Integers = np.searchsorted(owner, np.arange(count + 1)).astype(np.int64)
    rarest = entry_class[np.lexsort((totals[entry_class], owner))][starts[:-1]]
    group_weights: Floats = np.bincount(groups, weights, count).astype(np.float64)
    random = epoch_random(seed, 0)
    order = np.lexsort((random.random(count), -group_weights, totals[rarest]))
    entries = starts.tolist(), entry_class.tolist(), amounts.tolist()
    index = _assign_groups(order, rarest, entries, np.outer(totals, shares), random.random(count))
    for split in np.setdiff1d(np.arange(len(shares)), index):
        surplus = np.bincount(index, group_weights, len(shares)) - shares * group_weights.sum()
        giver = int(np.argmax(np.where(np.bincount(index, minlength=len(shares)) > 1, surplus, -np.inf)))
        candidates = np.flatnonzero(index == giver)
        index[candidates[np.argmin(group_weights[candidates])]] = split
    return index[groups]


def _assign_groups(
    order: Integers, rarest: Integers, entries: tuple[list[int], list[int], list[float]], quotas: Floats, draws: Floats
) -> Integers:
    """The split of each group, one group after the other; lists, because a group is too small for array operations."""
    starts, entry_class, amounts = entries
    lacks, total = quotas.tolist(), quotas.sum(axis=0).tolist()
    slack = 1e-9 * sum(total)
    index = np.zeros(len(order), np.int64)
    for group, draw, rare in zip(order.tolist(), draws.tolist(), rarest[order].tolist(), strict=True):
        own = range(starts[group], starts[group + 1])
        amount = next(amounts[i] for i in own if entry_class[i] == rare)
        lack = lacks[rare]
        split = _choose([value if value + slack >= amount else 0.0 for value in lack], draw)
        if split is None:
            candidates = [s for s, value in enumerate(lack) if value > slack] or range(len(lack))
            split = max(candidates, key=lambda s: (total[s], lack[s]))
        index[group] = split
        for i in own:
            lacks[entry_class[i]][split] -= amounts[i]
            total[split] -= amounts[i]
    return index


def _choose(weights: list[float], draw: float) -> int | None:
    """The index that a uniform number in [0, 1) selects in proportion to weights; None if no weight is positive."""
    ends = list(itertools.accumulate(weights))
    return bisect.bisect_right(ends, draw * ends[-1], hi=len(ends) - 1) if ends[-1] > 0 else None


def connected_components(count: int, a: Integers, b: Integers) -> Integers:
    """Return the component `[count]` of items that `a` and `b` `[M]` connect, from 0 in the order of first items."""
    label = np.arange(count)
    while True:
        low, ends = label.copy(), (label[a], label[b])
        np.minimum.at(low, ends[0], ends[1])
        np.minimum.at(low, ends[1], ends[0])
        while not np.array_equal(low, low[low]):  # labels point at items: follow them to the end
            low = low[low]
        if np.array_equal(low, label):
            return np.unique(label, return_inverse=True)[1].reshape(-1)
        label = low
