"""Descriptions of datasets for `repr` and for notebooks. They read nothing; `print` keeps TorchGeo's `__str__`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rasteret_ml.errors import redact
from rasteret_ml.geo.crs import crs_text

_MAX_SHOWN = 8  # Bands or classes that a table lists.


def summary_html(title: str, rows: Mapping[str, Any]) -> str:
    """Return a table of a dataset's properties; text is escaped, and secrets in addresses are removed.

    Args:
        title: Name of its class.
        rows: Text by heading; a dataset is shown as a table inside the table.
    """
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{_cell(value)}</td></tr>" for name, value in rows.items())
    return f"<div><strong>{html.escape(title)}</strong><table>{cells}</table></div>"


def _cell(value: Any) -> str:
    if hasattr(value, "_repr_html_"):
        return str(value._repr_html_())
    text = value if isinstance(value, str) else type(value).__name__
    return html.escape(redact(text))


def describe_grid(dataset: Any) -> str:
    """Describe the pixels that chips lie on, such as "EPSG:32633, 10 x 10 per pixel"."""
    crs = shorten([crs_text(dataset.crs)])
    if getattr(dataset, "is_native", False):
        return f"native (index in {crs})"
    xres, yres = dataset.res
    return f"{crs}, {xres:g} x {yres:g} per pixel" if xres and yres else f"{crs}, no pixels of its own"


def describe_times(index: Any) -> str:
    """Describe the time span of a TorchGeo index, such as "2023-05-01 00:00 to 2023-05-05 00:00 UTC".

    An end that is open in all rows is ".."; rows that are open at both ends are counted as undated.
    """
    left, right = pd.DatetimeIndex(index.index.left), pd.DatetimeIndex(index.index.right)
    starts, stops = left > pd.Timestamp.min, right < pd.Timestamp.max
    always = int(np.sum(~starts & ~stops))
    first = f"{left[starts].min():%Y-%m-%d %H:%M}" if starts.any() else ".."
    last = f"{right[stops].max():%Y-%m-%d %H:%M}" if stops.any() else ".."
    span = [] if first == last == ".." else [f"{first} to {last} UTC"]
    return ", ".join(span + ([f"{always:,} undated"] if always else [])) or "none"


def shorten(values: Sequence[Any], limit: int = _MAX_SHOWN) -> str:
    """Join the first `limit` values, each cut to a readable length (a CRS may be a page of WKT)."""
    texts = [text if len(text) <= 60 else f"{text[:59]}…" for text in map(str, values[:limit])]
    return ", ".join(texts) + (f" and {len(values) - limit} more" if len(values) > limit else "")
