"""What a figure looks like: its pixels, as Agg draws them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg

__all__ = ["artists", "colour_at", "legend_texts", "panel", "rendered"]


def rendered(figure: Any) -> npt.NDArray[np.uint8]:
    """The figure as `[H, W, 4]`, row 0 at the top."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def colour_at(figure: Any, ax: Any, x: float, y: float) -> tuple[int, ...]:
    """Red, green, blue that are drawn at a place in the data coordinates of `ax`."""
    pixels = rendered(figure)
    right, up = ax.transData.transform((x, y))
    return tuple(int(v) for v in pixels[len(pixels) - 1 - int(up), int(right), :3])


def panel(figure: Any, ax: Any) -> npt.NDArray[np.uint8]:
    """The part of the figure within the axes, `[H, W, 3]`, without its frame."""
    pixels = rendered(figure)
    box = ax.get_window_extent()
    top = len(pixels)
    return pixels[top - int(box.y1) + 2 : top - int(box.y0) - 2, int(box.x0) + 2 : int(box.x1) - 2, :3]


def artists(ax: Any, gid: str) -> list[Any]:
    """What is on `ax` under that name."""
    return ax.findobj(lambda artist: artist.get_gid() == gid)


def legend_texts(figure: Any) -> list[str]:
    """All texts of the figure's and its axes' legends."""
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend() is not None)]
    return [text.get_text() for found in legends for text in found.get_texts()]
