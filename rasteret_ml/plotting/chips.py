"""One chip as a picture: the image with its validity, labels and prediction in the colours of their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.colours import ColourTable, class_colours, class_names, painted
from rasteret_ml.plotting.figure import panels
from rasteret_ml.plotting.outlines import mask_edges, mask_path
from rasteret_ml.plotting.stretch import PERCENTILES, stretch_limits, stretched

__all__ = [
    "PAPER",
    "ChipLayers",
    "ChipStyle",
    "class_keys",
    "draw_chip",
    "draw_image",
    "draw_labels",
    "draw_masks",
    "legend",
    "share_text",
]

PAPER = (0.93, 0.93, 0.93)
"""What is shown where there are no pixels."""
_INVALID = {"hatch": "////", "edgecolor": (0.6, 0.6, 0.6)}
_CLOUD = {"hatch": "...", "edgecolor": (0.86, 0.15, 0.5)}
_MOST_NAMES = 24
"""Classes in a legend; more are counted."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipLayers:
    """What there is to draw of one chip; every layer `[H, W]` but the image, None = not there."""

    image: npt.NDArray[Any] | None = None
    """Bands to show, `[1, H, W]` in grey or `[3, H, W]` as red, green, blue, of any real type."""
    valid: npt.NDArray[np.bool_] | None = None
    """Data truth; False is hatched and has no say in the stretch."""
    clear: npt.NDArray[np.bool_] | None = None
    """Not cloud; False is dotted where valid, and has no say in the stretch."""
    inside: npt.NDArray[np.bool_] | None = None
    """Inside the AOI; its edge is drawn."""
    labels: npt.NDArray[Any] | None = None
    """Classes (integers) or values (floats, NaN = none)."""
    prediction: npt.NDArray[Any] | None = None
    """Classes or values, as `labels`."""
    aspect: float = 1.0
    """Height of a pixel over its width, on the ground."""
    north_up: bool = True
    """Whether row 0 is the northernmost; else the picture is turned so that north is up."""

    @property
    def usable(self) -> npt.NDArray[np.bool_] | None:
        """Pixels that are valid and clear, as far as either is known."""
        if self.clear is None or self.valid is None:
            return self.valid if self.clear is None else self.clear
        return self.clear & self.valid

    @property
    def counted(self) -> npt.NDArray[np.bool_] | None:
        """Pixels that set the stretch: the usable ones, or where there are none the valid ones."""
        usable = self.usable
        return usable if usable is not None and usable.any() else self.valid


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipStyle:
    """How chips are drawn."""

    classes: Mapping[int, str] | Sequence[str] | None = None
    """Names of classes, by number or from 0 on."""
    colours: ColourTable | None = None
    """Colours of classes; those that are not listed have the palette's."""
    ignore_index: int = -100
    """Class that is not drawn."""
    percentiles: tuple[float, float] = PERCENTILES
    """Of the pixels that count, what becomes black and white."""
    joint: bool = False
    """One stretch for all bands, which keeps their balance, instead of one for each."""
    legend: bool = True
    """Whether what is seen is explained below."""


def draw_chip(
    layers: ChipLayers,
    style: ChipStyle | None = None,
    *,
    title: str | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Image, labels and prediction side by side, those that are there, with a legend of what is seen.

    Args:
        layers: What to draw.
        style: How.
        title: Above it all (above the first panel, where `axes` are given).
        axes: One for each panel; new ones in a new figure by default.

    Raises:
        UsageError: nothing to draw, layers of different sizes, too few or many axes.
    """
    style = style or ChipStyle()
    _check(layers)
    kinds = [kind for kind in ("image", "labels", "prediction") if getattr(layers, kind) is not None]
    figure, made = panels(len(kinds), axes, size=(4.0, 4.3), columns=3)
    maps = [getattr(layers, kind) for kind in kinds if kind != "image"]
    values = [v for v in maps if v.dtype.kind == "f"]
    limits = None if not values else stretch_limits(np.stack(values)[:, None], percentiles=(0, 100))[0]
    keys: dict[str, Artist] = {}
    for kind, ax in zip(kinds, made, strict=True):
        if kind == "image":
            keys |= draw_image(ax, layers, style)
        else:
            keys |= draw_labels(ax, getattr(layers, kind), layers, style, limits)
            if kind == kinds[0]:
                keys |= draw_masks(ax, layers)
        if len(kinds) > 1:
            ax.set_title(kind)
    classes = [v for v in maps if v.dtype.kind != "f"]
    keys = class_keys(classes, style) | keys
    if style.legend:
        legend(figure, made[-1] if axes is not None else None, keys)
    if title and axes is None:
        figure.suptitle(title)
    elif title:
        made[0].set_title(title)
    return figure


def draw_image(
    ax: Axes, layers: ChipLayers, style: ChipStyle, limits: npt.NDArray[np.float64] | None = None
) -> dict[str, Artist]:
    """The image with its hatches and outline on `ax`; gives legend keys by text.

    Args:
        ax: Where.
        layers: What; `image` is there.
        style: How.
        limits: Stretch `[C, 2]`; by default that of this chip.
    """
    image = layers.image
    assert image is not None
    if limits is None:
        limits = stretch_limits(image, layers.counted, percentiles=style.percentiles, joint=style.joint)
    shown = np.moveaxis(stretched(image, limits), 0, -1)
    shown = np.repeat(shown, 3, axis=-1) if shown.shape[-1] == 1 else shown
    if layers.valid is not None:
        shown = np.where(layers.valid[..., None], shown, np.array(PAPER, np.float32))
    _show(ax, shown, layers)
    return draw_masks(ax, layers)


def draw_labels(
    ax: Axes,
    labels: npt.NDArray[Any],
    layers: ChipLayers,
    style: ChipStyle,
    limits: npt.NDArray[np.float64] | None = None,
) -> dict[str, Artist]:
    """Classes `[H, W]` in their colours, or values with a colour bar, on `ax`; gives legend keys of its outline."""
    if labels.dtype.kind == "f":
        limits = stretch_limits(labels[None], percentiles=(0, 100))[0] if limits is None else limits
        low, high = (float(v) for v in limits)
        scale = Normalize(low, high) if low < high else Normalize(low - 0.5, high + 0.5)
        _show(ax, np.ma.masked_invalid(labels), layers, cmap="viridis", norm=scale, interpolation="nearest")
        bar = ax.figure.colorbar(ScalarMappable(scale, "viridis"), ax=ax, shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
    else:
        colours = class_colours(_present([labels], style), style.colours)
        _show(ax, painted(labels, colours), layers, interpolation="nearest")  # no colours between classes
    return _draw_outline(ax, layers)


def draw_masks(ax: Axes, layers: ChipLayers) -> dict[str, Artist]:
    """Hatches where not valid, dots where not clear, the AOI's edge; gives legend keys by text."""
    keys: dict[str, Artist] = {}
    clear, valid = layers.clear, layers.valid
    cloudy = None if clear is None else ~clear if valid is None else ~clear & valid
    for text, where, look in (
        ("not valid", None if valid is None else ~valid, _INVALID),
        ("not clear", cloudy, _CLOUD),
    ):
        if where is not None and where.any():
            ax.add_patch(PathPatch(mask_path(where), facecolor="none", linewidth=0, gid=text, **look))
            keys[text] = Patch(facecolor=PAPER if look is _INVALID else "white", linewidth=0, **look)
    return keys | _draw_outline(ax, layers)


def class_keys(maps: Sequence[npt.NDArray[Any]], style: ChipStyle) -> dict[str, Artist]:
    """Legend keys of the classes that are seen, in their order; the most frequent where they are many."""
    present = _present(maps, style)
    chosen = present
    if len(present) > _MOST_NAMES:
        flat = np.concatenate([m.ravel() for m in maps])
        found, counts = np.unique(flat[flat != style.ignore_index], return_counts=True)
        chosen = sorted(int(c) for c in found[np.argsort(-counts, kind="stable")][:_MOST_NAMES])
    names, colours = class_names(chosen, style.classes), class_colours(chosen, style.colours)
    texts = [names[c] if list(names.values()).count(names[c]) == 1 else f"{names[c]} ({c})" for c in chosen]
    keys: dict[str, Artist] = {
        text: Patch(facecolor=colours[c], edgecolor="0.5", linewidth=0.5) for text, c in zip(texts, chosen, strict=True)
    }
    if len(chosen) < len(present):
        keys[f"and {len(present) - len(chosen)} more"] = Patch(facecolor="none")
    return keys


def legend(figure: Figure, ax: Axes | None, keys: Mapping[str, Artist]) -> None:
    """The legend under the whole figure, or under `ax` where the figure is someone else's."""
    if not keys:
        return
    options = {"handles": list(keys.values()), "labels": list(keys), "frameon": False}
    width = figure.get_figwidth() if ax is None else 4.0
    inches = 0.72 + 0.075 * np.array([len(key) for key in keys])
    columns = len(keys) if inches.sum() <= width else int(np.clip(width / np.max(inches), 1, len(keys)))
    if ax is None:
        figure.legend(loc="outside lower center", ncols=columns, **options)
    else:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=columns, **options)


def share_text(mask: npt.NDArray[np.bool_]) -> str:
    """How much of a mask is True, "37 %"; all and nothing are said only where they are so."""
    share = float(mask.mean()) if mask.size else 0.0
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{share:.0%}".replace("%", " %")


def _present(maps: Sequence[npt.NDArray[Any]], style: ChipStyle) -> list[int]:
    found = [np.unique(m).astype(np.int64) for m in maps]
    return sorted({int(c) for part in found for c in part} - {style.ignore_index})


def _show(ax: Axes, pixels: Any, layers: ChipLayers, **options: Any) -> None:
    ax.set_facecolor("white")
    ax.imshow(
        pixels,
        aspect=layers.aspect,
        origin="upper" if layers.north_up else "lower",
        **options,
    )
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(color="0.6", linewidth=0.6)


def _draw_outline(ax: Axes, layers: ChipLayers) -> dict[str, Artist]:
    if layers.inside is None or layers.inside.all():
        return {}
    edges = mask_edges(layers.inside)
    for colour, width in (("black", 2.6), ("white", 1.2)):
        ax.add_collection(LineCollection(list(edges), colors=colour, linewidths=width, gid="AOI"), autolim=False)
    return {"AOI": Patch(facecolor="white", edgecolor="black", linewidth=1.2)}


def _check(layers: ChipLayers) -> None:
    named = {name: getattr(layers, name) for name in ("image", "valid", "clear", "inside", "labels", "prediction")}
    there = {name: array for name, array in named.items() if array is not None}
    if not {"image", "labels", "prediction"} & set(there):
        raise UsageError("There is nothing to draw: no image, no labels and no prediction.")
    if len({array.shape[-2:] for array in there.values()}) > 1:
        sizes = ", ".join(f"{name} {array.shape[-2]} x {array.shape[-1]}" for name, array in there.items())
        raise UsageError(f"The layers of a chip differ in size: {sizes}; give them on one grid.")
    if layers.image is not None and (layers.image.ndim != 3 or len(layers.image) not in (1, 3)):
        raise UsageError(f"An image is drawn from 1 band (grey) or 3 (red, green, blue), not {layers.image.shape}.")
