"""Figures outside pyplot, and the axes to draw on."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rasteret_ml.errors import UsageError

__all__ = ["Picture", "panels", "root_figure"]


class Picture(Figure):  # type: ignore[misc]
    """A figure that pyplot does not know: it goes when it is forgotten, and a notebook still shows it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        """The picture as a notebook asks for it."""
        stream = io.BytesIO()
        self.savefig(stream, format="png")
        return stream.getvalue()


def panels(
    count: int, axes: Axes | Sequence[Axes] | None, *, size: tuple[float, float], columns: int
) -> tuple[Figure, list[Axes]]:
    """`count` axes, those given or new ones in rows of `columns`, `size` (width, height) inches each.

    Raises:
        UsageError: not as many axes as there are panels.
    """
    if axes is not None:
        given = [axes] if isinstance(axes, Axes) else list(np.asarray(axes, dtype=object).ravel())
        if len(given) != count:
            raise UsageError(f"axes= has {len(given)} axes and this picture {count} panels; give one for each.")
        return root_figure(given[0]), given
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Picture(figsize=(size[0] * across, size[1] * down), layout="constrained")
    made = list(figure.subplots(down, across, squeeze=False).ravel())
    for spare in made[count:]:
        spare.remove()
    return figure, made[:count]


def root_figure(ax: Axes) -> Figure:
    """The whole figure that an axes lies on, also within a subfigure."""
    figure: Any = ax.figure
    while figure is not figure.figure:
        figure = figure.figure
    return figure
