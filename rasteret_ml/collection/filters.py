"""Filters on records, as Arrow expressions that are pushed down to Parquet."""

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


def parse_lonlat_bbox(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """Validate (xmin, ymin, xmax, ymax) in degrees; xmin > xmax crosses the antimeridian (RFC 7946, section 5.2).

    Longitudes run from -180 to 180, or from 0 to 360 (then xmin > xmax is an error). Raises UsageError for others.
    """
    error = UsageError(f"bbox must be (xmin, ymin, xmax, ymax) in longitude/latitude, got {tuple(bbox)}.")
    try:
        xmin, ymin, xmax, ymax = (float(v) for v in bbox)
    except (TypeError, ValueError):
        raise error from None
    if not np.isfinite((xmin, ymin, xmax, ymax)).all():
        raise error
    # Global rasters are often registered to pixel centres: their edges lie up to a pixel beyond the poles.
    if ymin > ymax or max(abs(ymin), abs(ymax)) > 91 or max(abs(xmin), abs(xmax)) > (361 if xmin <= xmax else 180):
        raise error
    return xmin, ymin, xmax, ymax


def bbox_overlaps(bounds: Sequence[float]) -> ds.Expression:
    """Match records whose `bbox` overlaps (xmin, ymin, xmax, ymax); xmin > xmax crosses the antimeridian.

    Longitudes 360 degrees apart are equal: records in 0..360 match bounds in -180..180 and vice versa.
    """
    xmin, ymin, xmax, ymax = (float(v) for v in bounds)
    if xmin > xmax:
        xmax += 360
    left, right = pc.field("bbox", "xmin"), pc.field("bbox", "xmax")
    in_longitude = (left <= xmax) & (right >= xmin)
    for shift in (-360, 360):
        if xmax + shift >= -180 and xmin + shift <= 360:
            in_longitude = in_longitude | ((left <= xmax + shift) & (right >= xmin + shift))
    return in_longitude & (pc.field("bbox", "ymin") <= ymax) & (pc.field("bbox", "ymax") >= ymin)


def datetime_between(start: dt.datetime, end: dt.datetime) -> ds.Expression:
    """Match records with `start <= datetime <= end` (naive UTC)."""
    column, kind = pc.field("datetime"), pa.timestamp("us")
    return (column >= pa.scalar(start, kind)) & (column <= pa.scalar(end, kind))


def parse_date_range(value: Sequence[Any] | str) -> tuple[dt.datetime, dt.datetime]:
    """Parse (start, end) or "start/end" to naive UTC, both ends inclusive, in this order or a `UsageError`.

    A day, month or year covers all of it; None and ".." are open.
    """
    ends = value.split("/") if isinstance(value, str) else list(value)
    if len(ends) != 2:
        raise UsageError(f"A date range must be (start, end) or 'start/end', got {value!r}.")
    start, end = parse_time(ends[0]), parse_time(ends[1], last=True)
    first = dt.datetime.min if start is None else start.to_pydatetime(warn=False)
    last = dt.datetime.max if end is None else end.to_pydatetime(warn=False)
    if first > last:
        raise UsageError(f"The date range {value!r} ends before it starts; swap its ends.")
    return first, last
