"""Splits of a Collection's records, by place, time or a column, stored in its column `split`."""

from __future__ import annotations

import datetime as dt
import itertools
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import shapely

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.column_arrays import iterate_footprints, record_times
from rasteret_ml.collection.filters import parse_date_range
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.regions import Floats, Geometries, Integers, union_polygons
from rasteret_ml.geo.times import Times, clamp_ns
from rasteret_ml.samplers.splits.blocks import assign, connected_components, parse_fractions, value_codes

_log = logging.getLogger(__name__)

_DEGREE = 111_195.0  # Metres per degree of latitude on a sphere with a radius of 6,371 km.
_TOUCHING = 1e-7  # Overlap of footprints in degrees (a centimetre) that counts as touching only.


def split_records(
    collection: Collection,
    fractions: Mapping[str, float] | None = None,
    *,
    by: str = "scene",
    boundaries: Mapping[str, Any] | None = None,
    buffer: float | dt.timedelta | str | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
) -> Collection:
    """Assign the records of a Collection to splits, to select with `collection.subset(split="train")`.

    Args:
        collection: The records.
        fractions: Share of the records of each split, as `{"train": 0.8, "val": 0.2}`; their sum must be 1.
        by: "scene": records whose footprints overlap, directly or through others, stay together, so that no place is
            in two splits. "time": one period for each split, in the order of `fractions`, cut between days (UTC). Any
            other name: records with the same value in this column stay together; places or dates are only separated
            if the column separates them.
        boundaries: For "time", instead of `fractions`: the dates of each split, "start/end" or (start, end), both
            inclusive, as in `subset(date_range=)`. Records outside all periods are in no split.
        buffer: For "scene", in metres: footprints that are closer than this also stay together. For "time", a
            timedelta (or "16 days"): records that are closer than this to another split's period are left out.
        seed: Seed of the assignment, for "scene" and columns.
        out: None = the Collection stays in memory until its `write`; else the path to write it to (see `with_column`).

    Returns:
        A Collection with the column `split`, null for records in no split (their number is logged).

    Raises:
        UsageError: if all scenes are connected, records have no footprint, date or value, there are fewer groups than
            splits, a split would be empty, or an argument does not fit `by`.

    Example:
        >>> scenes = split_records(scenes, {"train": 0.8, "val": 0.2}, by="scene")
        >>> train = scenes.subset(split="train")
    """
    if not len(collection):
        raise UsageError("The Collection is empty: there is nothing to split.")
    if boundaries is not None and (by != "time" or fractions is not None):
        raise UsageError("boundaries= needs by='time', and replaces fractions.")
    if by == "time":
        names, index = _by_time(record_times(collection), fractions, boundaries, buffer)
    else:
        if fractions is None:
            raise UsageError(f"split_records(by={by!r}) needs fractions, as {{'train': 0.8, 'val': 0.2}}.")
        shares = parse_fractions(fractions)
        groups = _places(collection, buffer) if by == "scene" else _values(collection, by, buffer)
        unit = "places (connected footprints)" if by == "scene" else f"values of {by!r}"
        remedy = "use fewer splits, split by time or a column, or split the area with split_blocks"
        names, index = list(shares), assign(groups, np.ones(len(groups)), None, shares, seed, unit, remedy)
    left_out = int((index < 0).sum())
    if left_out:
        _log.warning("%d of %d records are in no split", left_out, len(index))
    return collection.with_column("split", np.array([*names, None], dtype=object)[index], out)


def _values(collection: Collection, column: str, buffer: Any) -> Integers:
    if buffer is not None:
        raise UsageError("buffer= needs by='scene' (metres) or by='time' (a timedelta).")
    columns = collection.arrow_schema.names
    if column not in columns:
        raise UsageError(f"by must be 'scene', 'time' or a column, got {column!r}; the columns are {columns}.")
    return value_codes(collection.to_table([column]).to_pandas(), column, "by", "Record")


# Places ---------------------------------------------------------------------------------------------------


def _places(collection: Collection, buffer: Any) -> Integers:
    """The place of each record: footprints that overlap, or are closer than the buffer, belong to one place."""
    try:
        metres = 0.0 if buffer is None else float(buffer)
    except (TypeError, ValueError):
        raise UsageError(f"by='scene' needs buffer= in metres, got {buffer!r}.") from None
    if not (np.isfinite(metres) and metres >= 0):
        raise UsageError(f"buffer must be a finite distance >= 0 in metres, got {buffer!r}.")
    wkb = np.concatenate(list(iterate_footprints(collection, 65536)))
    missing = pd.isna(wkb)
    if missing.any():
        raise UsageError(f"Record {int(np.argmax(missing))} has no footprint; split by time or by a column instead.")
    codes, distinct = pd.factorize(wkb)
    shapes = _buffer(shapely.make_valid(shapely.from_wkb(np.asarray(distinct, dtype=object))), metres)
    parts = shapely.get_parts(union_polygons(shapes))
    # A footprint that is cut at the antimeridian lies in several parts: it connects them.
    shape, part = shapely.STRtree(parts).query(shapes, predicate="intersects")
    first = np.zeros(len(shapes), np.int64)
    first[shape[::-1]] = part[::-1]
    a, b = _across_the_antimeridian(parts)
    places = connected_components(len(parts), np.append(part, a), np.append(first[shape], b))[first]
    if np.max(places) == 0 and len(codes) > 1:
        raise UsageError(
            f"The footprints of all {len(codes)} records are connected, so splits of scenes cannot separate places; "
            "split the area with split_blocks, or the records with by='time'."
        )
    grouped: Integers = np.unique(places[codes], return_inverse=True)[1].reshape(-1)
    return grouped


def _buffer(shapes: Geometries, metres: float) -> Geometries:
    """Footprints grown by half the buffer; without one, shrunk so that neighbours which only touch are separate."""
    if metres == 0:
        smaller = shapely.buffer(shapes, -_TOUCHING, join_style="mitre")
        return np.where(shapely.is_empty(smaller), shapes, smaller)
    south, north = shapely.bounds(shapes).T[[1, 3]]
    # A metre is most degrees of longitude at the end nearer to a pole.
    scale = np.cos(np.radians(np.minimum(np.maximum(abs(south), abs(north)) + metres / _DEGREE, 89.9)))
    grown = shapely.buffer(_scale_x(shapes.copy(), scale), metres / 2 / _DEGREE, join_style="mitre")
    return _scale_x(grown, 1 / scale)


def _scale_x(shapes: Geometries, scale: Floats) -> Geometries:
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    xy[:, 0] *= scale[owner]
    scaled: Geometries = shapely.set_coordinates(shapes, xy)
    return scaled


def _across_the_antimeridian(parts: Geometries) -> tuple[Integers, Integers]:
    """Pairs of parts that overlap if one is moved by 360 degrees."""
    moved = np.array(repeat_turns(list(parts), 360.0)[len(parts) :], dtype=object)
    a, b = shapely.STRtree(parts).query(moved, predicate="intersects")
    shared = shapely.area(shapely.intersection(moved[a], parts[b])) > 0
    return a[shared] % len(parts), b[shared]


# Time -----------------------------------------------------------------------------------------------------


def _by_time(
    times: Times, fractions: Mapping[str, float] | None, boundaries: Mapping[str, Any] | None, buffer: Any
) -> tuple[list[str], Integers]:
    """Names of the splits, and the index of each record's split, -1 = none `[N]`."""
    undated = np.isnat(times)
    if undated.any():
        raise UsageError(
            f"Record {int(np.argmax(undated))} has no date, so it cannot be split by time; leave such records out with "
            "where(pc.field('datetime').is_valid())."
        )
    gap = _timedelta(buffer)
    if boundaries is not None:
        names, start, stop = _parse_boundaries(boundaries)
    elif fractions is not None:
        names, start, stop = _cut(times, parse_fractions(fractions))
    else:
        raise UsageError("by='time' needs fractions or boundaries.")
    start, stop = _separate(start, stop, gap)
    index = np.full(len(times), -1, np.int64)
    for split, (first, last) in enumerate(zip(start, stop, strict=True)):
        inside = (times >= first) & (times <= last)
        if not inside.any():
            raise UsageError(
                f"Split {names[split]!r} has no record between {first} and {last}; use other boundaries or fractions, "
                "or a shorter buffer."
            )
        index[inside] = split
    return names, index


def _timedelta(buffer: Any) -> np.timedelta64:
    if buffer is None:
        return np.timedelta64(0, "ns")
    # pandas would read a plain number as nanoseconds.
    found = pd.NaT if isinstance(buffer, (int, float)) else pd.to_timedelta(buffer, errors="coerce")
    if pd.isna(found) or found < pd.Timedelta(0):
        raise UsageError(f"by='time' needs buffer= as a timedelta or text like '16 days', got {buffer!r}.")
    return np.timedelta64(pd.Timedelta(found).as_unit("ns").value, "ns")


def _parse_boundaries(boundaries: Mapping[str, Any]) -> tuple[list[str], Times, Times]:
    """Names, first and last instants of periods, sorted."""
    if len(boundaries) < 2:
        raise UsageError(f"boundaries must name two or more splits and their dates, got {boundaries!r}.")
    periods = {str(name): parse_date_range(value) for name, value in boundaries.items()}
    names = sorted(periods, key=lambda name: periods[name])
    for first, second in itertools.pairwise(names):
        if periods[second][0] <= periods[first][1]:
            raise UsageError(
                f"The dates of splits {first!r} and {second!r} overlap: {boundaries[first]!r}, {boundaries[second]!r}."
            )
    start, stop = (np.array([clamp_ns(periods[name][end]).to_datetime64() for name in names]) for end in (0, 1))
    return names, start, stop


def _cut(times: Times, shares: Mapping[str, float]) -> tuple[list[str], Times, Times]:
    """Periods of whole days whose numbers of records are as close to the shares as possible."""
    days, counts = np.unique(times.astype("datetime64[D]"), return_counts=True)
    if len(days) < len(shares):
        raise UsageError(f"{len(shares)} splits in time need records of at least as many days, got {len(days)}.")
    before = np.concatenate([[0], np.cumsum(counts)])
    targets = np.cumsum(list(shares.values()))[:-1] * before[-1]
    at = np.array([int(np.argmin(abs(before - target))) for target in targets])
    # Each split gets at least one day: make room for those before and after it.
    for k in range(len(at)):
        at[k] = max(at[k], (at[k - 1] if k else 0) + 1)
    for k in reversed(range(len(at))):
        at[k] = min(at[k], (at[k + 1] if k + 1 < len(at) else len(days)) - 1)
    cuts = days[at].astype("datetime64[ns]")
    start = np.concatenate([[np.min(times)], cuts])
    stop = np.concatenate([cuts - np.timedelta64(1, "ns"), [np.max(times)]])
    return list(shares), start, stop


def _separate(start: Times, stop: Times, gap: np.timedelta64) -> tuple[Times, Times]:
    """Successive periods, shortened so that any two are at least `gap` apart."""
    first, last = start.copy(), stop.copy()
    for i, j in itertools.combinations(range(len(start)), 2):
        missing = gap - (start[j] - stop[i])
        if missing > np.timedelta64(0, "ns"):
            last[i] = min(last[i], stop[i] - missing // 2)
            first[j] = max(first[j], start[j] + (missing - missing // 2))
    return first, last
