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

__all__ = ["bbox_overlaps", "date_overlaps", "interval", "lonlat_bounds"]


def lonlat_bounds(bbox: Sequence[float]) -> tuple[float, float, float, float]:
    """A checked (xmin, ymin, xmax, ymax); xmin > xmax crosses the antimeridian (RFC 7946)."""
    values = [float(v) for v in bbox]
    if len(values) != 4 or not np.isfinite(values).all() or values[1] > values[3]:
        raise UsageError(f"bbox is (xmin, ymin, xmax, ymax) in longitude/latitude, not {tuple(bbox)}.")
    return values[0], values[1], values[2], values[3]


def bbox_overlaps(bounds: Sequence[float]) -> ds.Expression:
    """Records whose `bbox` overlaps the bounds."""
    xmin, ymin, xmax, ymax = (float(v) for v in bounds)
    left, right = pc.field("bbox", "xmin"), pc.field("bbox", "xmax")
    across = (left <= xmax) & (right >= xmin) if xmin <= xmax else (left <= xmax) | (right >= xmin)
    return across & (pc.field("bbox", "ymin") <= ymax) & (pc.field("bbox", "ymax") >= ymin)


def date_overlaps(start: dt.datetime, stop: dt.datetime) -> ds.Expression:
    """Records dated from `start` to `stop`, both included."""
    kind = pa.timestamp("us")
    return (pc.field("datetime") >= pa.scalar(start, kind)) & (pc.field("datetime") <= pa.scalar(stop, kind))


def interval(value: Sequence[Any] | str) -> tuple[dt.datetime, dt.datetime]:
    """(start, end) as naive UTC; an end without a time of day is the last microsecond of its day."""
    parts = value.split("/") if isinstance(value, str) else list(value)
    if len(parts) != 2:
        raise UsageError(f"A date range is (start, end) or 'start/end', not {value!r}.")
    start, stop = _moment(parts[0], dt.time.min), _moment(parts[1], dt.time.max)
    if start > stop:
        raise UsageError(f"The date range {value!r} ends before it starts.")
    return start, stop


def _moment(value: Any, time: dt.time) -> dt.datetime:
    if isinstance(value, str):
        try:
            text = value.strip()
            value = dt.date.fromisoformat(text) if len(text) <= 10 else dt.datetime.fromisoformat(text)
        except ValueError as error:
            raise UsageError(f"Not an ISO date: {value!r} ({error}).") from None
    if isinstance(value, dt.datetime):
        return value if value.tzinfo is None else value.astimezone(dt.UTC).replace(tzinfo=None)
    if isinstance(value, dt.date):
        return dt.datetime.combine(value, time)
    raise UsageError(f"Not a date: {value!r}.")
