"""A time series as a strip: one panel a date, the same stretch throughout, so that dates can be compared."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.chips import (
    PAPER,
    ChipLayers,
    ChipStyle,
    class_keys,
    draw_image,
    draw_labels,
    legend,
    share_text,
)
from rasteret_ml.plotting.figure import panels
from rasteret_ml.plotting.stretch import stretch_limits

__all__ = ["date_texts", "draw_series", "facts_text"]


def draw_series(
    chips: Sequence[ChipLayers],
    times: Sequence[float],
    *,
    held: Sequence[bool] | None = None,
    ground: ChipLayers | None = None,
    style: ChipStyle | None = None,
    columns: int = 5,
    title: str | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """A panel for each date, in the order given, with its date and how much of it is valid and clear.

    All panels share one stretch, over what is valid and clear on any date; its clouds may be all white.

    Args:
        chips: The dates' layers `[T]`, `image` in each.
        times: POSIX seconds UTC `[T]`, NaN = undated.
        held: False = padding, drawn as an empty panel that says so; default all hold a date.
        ground: Labels and prediction of the place, drawn as further panels.
        style: How.
        columns: Panels in a row.
        title: Above it all (not where `axes` are given).
        axes: One for each panel; new ones in a new figure by default.

    Raises:
        UsageError: no dates, lengths that differ, too few or many axes.
    """
    style = style or ChipStyle()
    kept = [True] * len(chips) if held is None else [bool(h) for h in held]
    if not chips or not len(chips) == len(times) == len(kept):
        raise UsageError(
            f"A series has as many chips as times and at least one; got {len(chips)}, {len(times)}, {len(kept)}."
        )
    extra = [kind for kind in ("labels", "prediction") if ground is not None and getattr(ground, kind) is not None]
    figure, made = panels(len(chips) + len(extra), axes, size=(2.5, 2.95), columns=columns)
    limits = _common_limits([chip for chip, keep in zip(chips, kept, strict=True) if keep], style)
    keys: dict[str, Artist] = {}
    for ax, chip, date, keep in zip(made, chips, date_texts(times), kept, strict=False):
        if keep:
            keys |= draw_image(ax, chip, style, limits)
            ax.set_title(f"{date}\n{facts_text(chip)}".rstrip(), fontsize=9)
        else:
            _draw_padding(ax, chip)
    for ax, kind in zip(made[len(chips) :], extra, strict=True):
        assert ground is not None
        keys |= draw_labels(ax, getattr(ground, kind), ground, style)
        ax.set_title(kind, fontsize=9)
    maps = [getattr(ground, kind) for kind in extra]
    keys = class_keys([m for m in maps if m.dtype.kind != "f"], style) | keys
    if style.legend:
        legend(figure, made[-1] if axes is not None else None, keys)
    if title and axes is None:
        figure.suptitle(title)
    return figure


def date_texts(times: Sequence[float]) -> list[str]:
    """ISO dates (UTC) of POSIX seconds, with the time of day where two of them share a day; NaN = "undated"."""
    moments = [None if math.isnan(t) else dt.datetime.fromtimestamp(float(t), dt.UTC) for t in times]
    days = [m.date() for m in moments if m is not None]
    return [
        "undated" if m is None else f"{m:%Y-%m-%d}" if days.count(m.date()) == 1 else f"{m:%Y-%m-%d %H:%M}"
        for m in moments
    ]


def facts_text(chip: ChipLayers) -> str:
    """The shares of all pixels that are valid, and that are valid and clear: "97 % valid, 63 % clear"."""
    facts = [] if chip.valid is None else [f"{share_text(chip.valid)} valid"]
    if chip.clear is not None:
        assert chip.usable is not None
        facts.append(f"{share_text(chip.usable)} clear")
    return ", ".join(facts)


def _common_limits(chips: Sequence[ChipLayers], style: ChipStyle) -> npt.NDArray[np.float64] | None:
    images = [chip.image for chip in chips if chip.image is not None]
    if not images:
        return None
    everywhere = np.ones(images[0].shape[-2:], bool)
    counted = np.stack([everywhere if chip.usable is None else chip.usable for chip in chips])
    if not counted.any():
        counted = np.stack([everywhere if chip.valid is None else chip.valid for chip in chips])
    return stretch_limits(np.stack(images), counted[:, None], percentiles=style.percentiles, joint=style.joint)


def _draw_padding(ax: Axes, chip: ChipLayers) -> None:
    """An empty panel of the chip's shape."""
    assert chip.image is not None
    height, width = chip.image.shape[-2:]
    ax.imshow(np.full((height, width, 3), PAPER), aspect=chip.aspect)
    ax.text(0.5, 0.5, "padding", transform=ax.transAxes, ha="center", va="center", color="0.45", fontsize=9)
    ax.set_title("no date", fontsize=9, color="0.45")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(color="0.6", linewidth=0.6, linestyle=":")
