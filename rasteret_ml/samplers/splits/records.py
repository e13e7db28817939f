"""Splits of the records of a Collection: by place, in time, or by a column; stored as its column `split`."""

from __future__ import annotations

import datetime as dt
import itertools
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely

from rasteret_ml.collection.collection import Collection
from rasteret_ml.collection.column_arrays import outlines, record_times
from rasteret_ml.collection.select import interval
from rasteret_ml.errors import UsageError
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.regions import union_polygons
from rasteret_ml.geo.times import clamp_ns
from rasteret_ml.samplers.splits.assign import assign, checked_fractions, joined_groups
from rasteret_ml.samplers.splits.blocks import value_codes

__all__ = ["split_records"]

_log = logging.getLogger(__name__)

Integers = npt.NDArray[np.int64]
Times = npt.NDArray[np.datetime64]

_DEGREE = 111_195.0
"""Metres to a degree of latitude on a sphere of 6,371 km."""
_HAIR = 1e-7
"""Degrees (a centimetre) by which footprints may overlap and still only touch."""


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
    """Deal the records of a Collection to splits, so that `collection.subset(split="train")` finds them.

    Args:
        collection: The records.
        fractions: Share of the records of each split, as `{"train": 0.8, "val": 0.2}`; they sum to 1.
        by: "scene": records whose footprints overlap, directly or by way of others, stay together, so that no ground is
            in two splits. "time": one stretch of time for each split, in the order of `fractions`, cut between
            days (UTC). Any other name: records with the same value in this column stay together; it keeps ground
            or dates apart only where the column does.
        boundaries: For "time", instead of `fractions`: the dates of each split, "start/end" or (start, end), both
            included, as `subset(date_range=)` takes them. Records outside all of them are in no split.
        buffer: For "scene", in metres: footprints that are closer than this also stay together. For "time", a
            timedelta (or "16 days"): records are left out of their split where it is less than this from another.
        seed: Of the dealing, for "scene" and columns.
        out: None = the Collection is in memory until its `write`; else where it is written to (see `with_column`).

    Returns:
        A Collection with the column `split`, null where a record is in none (how many is logged).

    Raises:
        UsageError: all scenes hang together, records without footprint, date or value, fewer groups than splits, a
            split that is left empty, or an argument that does not go with `by`.
    """
    if not len(collection):
        raise UsageError("The Collection is empty: there is nothing to split.")
    if boundaries is not None and (by != "time" or fractions is not None):
        raise UsageError("boundaries= goes with by='time', and takes the place of fractions.")
    if by == "time":
        names, dealt = _by_time(record_times(collection), fractions, boundaries, buffer)
    else:
        if fractions is None:
            raise UsageError(f"split_records(by={by!r}) needs fractions, as {{'train': 0.8, 'val': 0.2}}.")
        shares = checked_fractions(fractions)
        groups = _scenes(collection, buffer) if by == "scene" else _values(collection, by, buffer)
        what = "places (connected footprints)" if by == "scene" else f"values of {by!r}"
        names = list(shares)
        remedy = "take fewer splits, split by time or a column, or the ground itself with split_blocks"
        dealt = assign(groups, np.ones(len(groups)), None, np.array(list(shares.values())), seed, what, remedy)
    left = int((dealt < 0).sum())
    if left:
        _log.warning("%d of %d records are in no split", left, len(dealt))
    return collection.with_column("split", np.array([*names, None], dtype=object)[dealt], out)


def _values(collection: Collection, column: str, buffer: Any) -> Integers:
    if buffer is not None:
        raise UsageError("buffer= goes with by='scene' (metres) and by='time' (a timedelta).")
    if column not in collection.arrow_schema.names:
        raise UsageError(f"by={column!r} is 'scene', 'time' or a column; there are {collection.arrow_schema.names}.")
    return value_codes(collection.to_table([column]).to_pandas(), column, "by", "Record")


# Places ---------------------------------------------------------------------------------------------------


def _scenes(collection: Collection, buffer: Any) -> Integers:
    """The place of each record: footprints that overlap, or are closer than the buffer, are one."""
    try:
        metres = 0.0 if buffer is None else float(buffer)
    except (TypeError, ValueError):
        raise UsageError(f"by='scene' takes buffer= in metres, not {buffer!r}.") from None
    if not (np.isfinite(metres) and metres >= 0):
        raise UsageError(f"buffer is a distance in metres, not negative, not {buffer!r}.")
    wkb = np.concatenate(list(outlines(collection, 65536)))
    bare = pd.isna(wkb)
    if bare.any():
        raise UsageError(f"Record {int(np.argmax(bare))} has no footprint; split by time or by a column instead.")
    codes, distinct = pd.factorize(wkb)
    shapes = _spread(shapely.make_valid(shapely.from_wkb(np.asarray(distinct, dtype=object))), metres)
    parts = shapely.get_parts(union_polygons(shapes))
    # A footprint cut at the antimeridian is in several parts: it joins them.
    shape, part = shapely.STRtree(parts).query(shapes, predicate="intersects")
    first = np.zeros(len(shapes), np.int64)
    first[shape[::-1]] = part[::-1]
    a, b = _across_the_antimeridian(parts)
    places = joined_groups(len(parts), np.concatenate([part, a]), np.concatenate([first[shape], b]))[first]
    if np.max(places) == 0 and len(codes) > 1:
        raise UsageError(
            f"The footprints of all {len(codes)} records hang together, so that no split of scenes keeps ground "
            "apart; split the ground itself with split_blocks, or the records with by='time'."
        )
    grouped: Integers = np.unique(places[codes], return_inverse=True)[1].reshape(-1)
    return grouped


def _spread(shapes: npt.NDArray[np.object_], metres: float) -> npt.NDArray[np.object_]:
    """Footprints grown by half the buffer, or made smaller by a hair: neighbours that only touch are two places."""
    if metres == 0:
        smaller = shapely.buffer(shapes, -_HAIR, join_style="mitre")
        return np.where(shapely.is_empty(smaller), shapes, smaller)
    south, north = shapely.bounds(shapes).T[[1, 3]]
    # Degrees of longitude are shortest, and so most of them go into a metre, at the end nearer to a pole.
    squeeze = np.cos(np.radians(np.minimum(np.maximum(abs(south), abs(north)) + metres / _DEGREE, 89.9)))
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    flat = shapely.set_coordinates(shapes.copy(), xy * np.column_stack([squeeze[owner], np.ones(len(owner))]))
    grown = shapely.buffer(flat, metres / 2 / _DEGREE, join_style="mitre")
    xy, owner = shapely.get_coordinates(grown, return_index=True)
    wide: npt.NDArray[np.object_] = shapely.set_coordinates(
        grown, xy / np.column_stack([squeeze[owner], np.ones(len(owner))])
    )
    return wide


def _across_the_antimeridian(parts: npt.NDArray[np.object_]) -> tuple[Integers, Integers]:
    """Pairs of parts that meet where one is moved by a full turn."""
    moved = np.array(repeat_turns(list(parts), 360.0)[len(parts) :], dtype=object)
    one, two = shapely.STRtree(parts).query(moved, predicate="intersects")
    shared = shapely.area(shapely.intersection(moved[one], parts[two])) > 0
    return one[shared] % len(parts), two[shared]


# Time -----------------------------------------------------------------------------------------------------


def _by_time(
    times: Times, fractions: Mapping[str, float] | None, boundaries: Mapping[str, Any] | None, buffer: Any
) -> tuple[list[str], Integers]:
    """Names of the splits, and which of them each record is in, -1 = none `[N]`."""
    undated = np.isnat(times)
    if undated.any():
        raise UsageError(
            f"Record {int(np.argmax(undated))} is undated, and has no place in a split by time; leave such records "
            "out with where(pc.field('datetime').is_valid())."
        )
    gap = _timedelta(buffer)
    if boundaries is not None:
        names, start, stop = _given(boundaries)
    elif fractions is not None:
        names, start, stop = _cut(times, checked_fractions(fractions))
    else:
        raise UsageError("A split by time needs fractions or boundaries.")
    start, stop = _apart(start, stop, gap)
    dealt = np.full(len(times), -1, np.int64)
    for split, (first, last) in enumerate(zip(start, stop, strict=True)):
        inside = (times >= first) & (times <= last)
        if not inside.any():
            raise UsageError(
                f"Split {names[split]!r} is left without a record between {first} and {last}; choose other "
                "boundaries or fractions, or a shorter buffer."
            )
        dealt[inside] = split
    return names, dealt


def _timedelta(buffer: Any) -> np.timedelta64:
    if buffer is None:
        return np.timedelta64(0, "ns")
    # pandas would take a bare number for nanoseconds.
    found = pd.NaT if isinstance(buffer, (int, float)) else pd.to_timedelta(buffer, errors="coerce")
    if pd.isna(found) or found < pd.Timedelta(0):
        raise UsageError(f"by='time' takes buffer= as a timedelta, or as text like '16 days', not {buffer!r}.")
    return np.timedelta64(pd.Timedelta(found).as_unit("ns").value, "ns")


def _given(boundaries: Mapping[str, Any]) -> tuple[list[str], Times, Times]:
    if len(boundaries) < 2:
        raise UsageError("boundaries names two or more splits and their dates.")
    ranges = {str(name): interval(value) for name, value in boundaries.items()}
    names = sorted(ranges, key=lambda name: ranges[name])
    for one, two in itertools.pairwise(names):
        if ranges[two][0] <= ranges[one][1]:
            raise UsageError(
                f"The dates of splits {one!r} and {two!r} overlap: {boundaries[one]!r}, {boundaries[two]!r}."
            )
    start, stop = (np.array([clamp_ns(ranges[name][k]).to_datetime64() for name in names]) for k in (0, 1))
    return names, start, stop


def _cut(times: Times, shares: Mapping[str, float]) -> tuple[list[str], Times, Times]:
    """Stretches of whole days whose records are as near to the shares as days allow."""
    days, counts = np.unique(times.astype("datetime64[D]"), return_counts=True)
    if len(days) < len(shares):
        raise UsageError(f"The records are of {len(days)} days, too few for {len(shares)} splits in time.")
    before = np.concatenate([[0], np.cumsum(counts)])
    wanted = np.cumsum(list(shares.values()))[:-1] * before[-1]
    at = np.array([int(np.argmin(abs(before - share))) for share in wanted])
    # Each split has a day at least: those before and after leave it room.
    for k in range(len(at)):
        at[k] = max(at[k], (at[k - 1] if k else 0) + 1)
    for k in reversed(range(len(at))):
        at[k] = min(at[k], (at[k + 1] if k + 1 < len(at) else len(days)) - 1)
    cuts = days[at].astype("datetime64[ns]")
    start = np.concatenate([[np.min(times)], cuts])
    stop = np.concatenate([cuts - np.timedelta64(1, "ns"), [np.max(times)]])
    return list(shares), start, stop


def _apart(start: Times, stop: Times, gap: np.timedelta64) -> tuple[Times, Times]:
    """Stretches of time, in order, made shorter where less than `gap` lies between two of them."""
    first, last = start.copy(), stop.copy()
    for i in range(len(start)):
        for j in range(i + 1, len(start)):
            lack = gap - (start[j] - stop[i])
            if lack > np.timedelta64(0, "ns"):
                last[i] = min(last[i], stop[i] - lack // 2)
                first[j] = max(first[j], start[j] + (lack - lack // 2))
    return first, last
