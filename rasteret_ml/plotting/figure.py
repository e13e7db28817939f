"""Figures outside pyplot, their axes and the legend below them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rasteret_ml.errors import UsageError


class Picture(Figure):  # type: ignore[misc]
    """A figure that pyplot does not manage: it is freed with its last reference, and notebooks still display it."""

    def _repr_png_(self) -> bytes:
        """Render the figure for a notebook."""
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


def panels(
    count: int, axes: Axes | Sequence[Axes] | None, *, size: tuple[float, float], columns: int
) -> tuple[Figure, list[Axes]]:
    """Return `count` axes and their figure: the axes given, or new ones.

    Args:
        count: Number of panels.
        axes: The axes to use, one per panel; None makes a new figure.
        size: (width, height) of a new panel in inches.
        columns: New panels per row.

    Raises:
        UsageError: the number of axes is not `count`.
    """
    if axes is not None:
        given = [axes] if isinstance(axes, Axes) else list(np.asarray(axes, dtype=object).ravel())
        if len(given) != count:
            raise UsageError(f"axes must be {count} axes, one per panel, got {len(given)}.")
        return given[0].figure.figure, given  # of a subfigure, the figure that it is in
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Picture(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    created = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for spare in created[count:]:
        spare.remove()
    return figure, created[:count]


def add_legend(figure: Figure, ax: Axes | None, handles: Mapping[str, Artist]) -> None:
    """Put a legend below the whole figure, or below `ax` in a figure that the caller owns."""
    if not handles:
        return
    # A row as wide as the figure where all fits, else columns as wide as the longest text: about 0.075 inches a letter.
    inches = 0.72 + 0.075 * np.array([len(text) for text in handles])
    width = figure.get_figwidth() if ax is None else 4.0
    columns = len(handles) if inches.sum() <= width else int(np.clip(width / inches.max(), 1, len(handles)))
    options = {"handles": list(handles.values()), "labels": list(handles), "frameon": False, "ncols": columns}
    if ax is None:
        figure.legend(loc="outside lower center", **options)
    else:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), **options)
