"""Conditions on records as Arrow expressions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.times import parse_time

__all__ = ["bbox_overlaps", "date_overlaps", "interval", "lonlat_bounds"]


def lonlat_bounds(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """A checked (xmin, ymin, xmax, ymax) in degrees; xmin > xmax crosses the antimeridian (RFC 7946, section 5.2).

    Longitudes run from -180 to 180, or from 0 to 360 (then xmin > xmax is an error).

    Raises:
        UsageError: not four finite numbers, south above north, or no degrees at all.
    """
    check_tile = UsageError(f"bbox is (xmin, ymin, xmax, ymax) in longitude/latitude, not {tuple(bbox)}.")
    try:
        values = [float(v) for v in bbox]
    except (TypeError, ValueError):
        raise check_tile from None
    if len(values) != 4 or not np.isfinite(values).all():
        raise check_tile
    xmin, ymin, xmax, ymax = values
    # Rasters of the globe are often registered to pixel centres: their edges lie up to a pixel past the poles.
    if ymin > ymax or max(abs(ymin), abs(ymax)) > 91 or max(abs(xmin), abs(xmax)) > 361:
        raise check_tile
    if xmin > xmax and max(abs(xmin), abs(xmax)) > 180:
        raise check_tile
    return xmin, ymin, xmax, ymax


def bbox_overlaps(bounds: Sequence[float]) -> ds.Expression:
    """Records whose `bbox` overlaps the bounds (xmin > xmax: across the antimeridian).

    Longitudes a turn apart are the same place: records of 0..360 are found by bounds of -180..180 and vice versa.
    """
    xmin, ymin, xmax, ymax = (float(v) for v in bounds)
    if xmin > xmax:
        xmax += 360
    left, right = pc.field("bbox", "xmin"), pc.field("bbox", "xmax")
    turns = [k * 360 for k in (-1, 1) if xmax + k * 360 >= -180 and xmin + k * 360 <= 360]
    across = (left <= xmax) & (right >= xmin)
    for turn in turns:
        across = across | ((left <= xmax + turn) & (right >= xmin + turn))
    return across & (pc.field("bbox", "ymin") <= ymax) & (pc.field("bbox", "ymax") >= ymin)


def date_overlaps(start: dt.datetime, stop: dt.datetime) -> ds.Expression:
    """Records dated from `start` to `stop`, both included."""
    kind = pa.timestamp("us")
    return (pc.field("datetime") >= pa.scalar(start, kind)) & (pc.field("datetime") <= pa.scalar(stop, kind))


def interval(value: Sequence[Any] | str) -> tuple[dt.datetime, dt.datetime]:
    """(start, end) as naive UTC; a day, month or year is all of it; None and ".." are open."""
    parts = value.split("/") if isinstance(value, str) else list(value)
    if len(parts) != 2:
        raise UsageError(f"A date range is (start, end) or 'start/end', not {value!r}.")
    start, stop = parse_time(parts[0]), parse_time(parts[1], last=True)
    first = dt.datetime.min if start is None else start.to_pydatetime(warn=False)
    last = dt.datetime.max if stop is None else stop.to_pydatetime(warn=False)
    if first > last:
        raise UsageError(f"The date range {value!r} ends before it starts.")
    return first, last
