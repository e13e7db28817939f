"""What a dataset's samples are a function of, beside the query: a part of the plan of a saved state."""

from __future__ import annotations

from typing import Any

import numpy as np
import shapely

from rasteret_ml.collection.column_arrays import records_digest
from rasteret_ml.fingerprint import digest

__all__ = ["dataset_fingerprint"]

_LISTED = 60
"""Letters of band names that are told as they are."""


def dataset_fingerprint(dataset: Any) -> list[str]:
    """A line for each dataset that is read, left to right: what it is, its records and how they are read.

    Two lines are the same where the same records (by id, time and place), of the same view and index, are read with
    the same arguments. Where their files lie does not count: they may be moved or signed anew.
    """
    return [_line(part) for part in getattr(dataset, "parts", [dataset])]


def _line(part: Any) -> str:
    index = getattr(part, "index", None)
    where = "" if index is None else f"{len(index)}:{_index_digest(index)}"
    reader = getattr(part, "_batches", None)
    if reader is None:
        return f"{type(part).__name__} {where}"
    bands = ",".join(part.bands)
    bands = bands if len(bands) <= _LISTED else f"{len(part.bands)}:{digest(bands)}"
    known = reader.rule, reader.form, reader.series, reader.composite, part._finding, part.grid.crs, part.grid.transform
    return f"{type(part).__name__} {where} {records_digest(part.collection)} {bands} {digest(*known)}"


def _index_digest(index: Any) -> str:
    """Of places, to a part in 10**9, and times."""
    bounds = shapely.bounds(np.asarray(index.geometry, dtype=object))
    step = 1e-9 * max(1.0, float(np.nanmax(np.abs(bounds), initial=1.0)))
    times = [
        np.asarray(getattr(index.index, side), dtype="datetime64[ns]").view(np.int64) for side in ("left", "right")
    ]
    return digest(np.round(bounds / step), *times)
