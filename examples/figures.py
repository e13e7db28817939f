"""Figures of the examples: colours of classes, stretched images, and a run's image, labels and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = [
    (38, 110, 180), (34, 120, 60), (225, 200, 90), (170, 110, 70), (200, 60, 60),
    (140, 90, 170), (120, 120, 120), (250, 150, 40), (90, 200, 200), (240, 160, 200),
]  # fmt: skip


def colour(index: int) -> tuple[int, int, int]:
    """Return the colour (r, g, b in 0..255) of a class number."""
    return COLOURS[index % len(COLOURS)]


def stretch(image: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Scale each band of `[3, H, W]` from its 2nd to 98th percentile of valid pixels to 0..1, as `[H, W, 3]`."""
    stretched = np.zeros((*image.shape[1:], 3))
    for i, band in enumerate(image):
        low, high = np.percentile(band[valid], (2, 98)) if valid.any() else (0, 1)
        stretched[..., i] = np.clip((band - low) / max(high - low, 1e-9), 0, 1)
    stretched[~valid] = 1
    return stretched


def save_picture(
    path: Path,
    image: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_],
    labels: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.uint8],
    names: list[str],
    extent: tuple[float, float, float, float],
    held_out: Any,
    title: str,
) -> None:
    """Save image, labels and prediction side by side; rings `held_out` outline the validation area on the last two."""
    figure = Figure(figsize=(15, 5.8), layout="constrained")
    axes = figure.subplots(1, 3, sharex=True, sharey=True)
    table = ListedColormap([tuple(v / 255 for v in colour(i)) for i in range(len(names))])
    axes[0].imshow(stretch(image, valid), extent=extent)
    for axis, classes in ((axes[1], labels), (axes[2], predicted.astype(np.int64))):
        masked = np.ma.masked_outside(classes, 0, len(names) - 1)
        axis.imshow(masked, cmap=table, vmin=-0.5, vmax=len(names) - 0.5, extent=extent, interpolation="nearest")
        for ring in held_out:
            axis.plot(*ring.xy, color="white", linewidth=2.2)
            axis.plot(*ring.xy, color="black", linewidth=0.9, linestyle="--")
    for axis, text in zip(axes, ("image", "labels (held out: dashed)", "prediction"), strict=True):
        axis.set_title(text)
        axis.ticklabel_format(style="plain")
        axis.tick_params(labelsize=7)
    handles = [Patch(color=table(i), label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(names)), frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
