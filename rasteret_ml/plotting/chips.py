"""Pictures of chips and time series: images with validity, clouds and AOI; labels and predictions in class colours."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.colours import ColourTable, class_colours, class_names

PERCENTILES = (2.0, 98.0)  #: Default percentiles of the usable pixels that become black and white.

_NO_DATA = (0.93, 0.93, 0.93)  # Colour of pixels that are not valid.
# Hatch, its colour, and the background in the legend.
_HATCHES = {"not valid": ("////", (0.6, 0.6, 0.6), _NO_DATA), "not clear": ("...", (0.86, 0.15, 0.5), "white")}
_MAX_NAMES = 24  # Classes named in a legend; it counts the others.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipLayers:
    """What can be drawn of one chip; every layer is `[H, W]` except the image, None = absent."""

    #: Bands to show, `[1, H, W]` in grey or `[3, H, W]` as red, green, blue, of any real type.
    image: npt.NDArray[Any] | None = None
    valid: npt.NDArray[np.bool_] | None = None  #: Data truth; False is hatched and does not affect the stretch.
    #: Not cloud; False is dotted where valid, and does not affect the stretch.
    clear: npt.NDArray[np.bool_] | None = None
    inside: npt.NDArray[np.bool_] | None = None  #: Inside the AOI, which is outlined.
    labels: npt.NDArray[Any] | None = None  #: Classes (integers) or values (floats, NaN = none).
    prediction: npt.NDArray[Any] | None = None  #: Classes or values, as `labels`.
    aspect: float = 1.0  #: Height of a pixel over its width, on the ground.
    north_up: bool = True  #: Whether row 0 is the northernmost; else the picture is flipped to put north at the top.

    @property
    def usable(self) -> npt.NDArray[np.bool_] | None:
        """Pixels that are valid and clear, as far as either is known."""
        if self.clear is None or self.valid is None:
            return self.valid if self.clear is None else self.clear
        return self.clear & self.valid


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipStyle:
    """How chips are drawn."""

    #: Names of classes, by number or as a list from class 0 on.
    classes: Mapping[int, str] | Sequence[str] | None = None
    colours: ColourTable | None = None  #: Colours of classes; those not listed have the palette's.
    ignore_index: int = -100  #: Class that is not drawn.
    percentiles: tuple[float, float] = PERCENTILES  #: Percentiles of the usable pixels that become black and white.
    joint: bool = False  #: One stretch for all bands, which keeps their balance, instead of one for each.
    legend: bool = True  #: Whether to explain colours and hatches below the picture.


def draw_chips(
    chips: Sequence[ChipLayers],
    style: ChipStyle | None = None,
    *,
    times: Sequence[float] | None = None,
    time_valid: Sequence[bool] | None = None,
    columns: int = 3,
    title: str | None = None,
    axes: Axes | Sequence[Axes] | None = None,
) -> Figure:
    """Draw the image of each chip, then the labels and the prediction of the first, with one legend.

    The chips are of one place: a single one, or a series of dates, with `times` in POSIX seconds UTC (NaN = undated)
    and `time_valid` (False = padding, drawn as an empty panel; None = no padding). All images share one stretch, over
    what is valid and clear in any of them, so that dates can be compared; each date is titled with its shares of valid
    and clear pixels. `axes`, one per panel, replace a new figure; `title` is then the first panel's, and a series has
    none. UsageError: nothing to draw, layers of different sizes, lengths that differ, a wrong number of axes.
    """
    style = style or ChipStyle()
    kept = [True] * len(chips) if time_valid is None else [bool(v) for v in time_valid]
    _check(chips, times, kept)
    images = list(chips) if chips[0].image is not None else []
    maps = {name: values for name in ("labels", "prediction") if (values := getattr(chips[0], name)) is not None}
    size = (4.0, 4.3) if times is None else (2.5, 2.95)
    figure, panel_axes = panels(len(images) + len(maps), axes, size=size, columns=columns)
    limits = _limits([chip for chip, keep in zip(images, kept, strict=False) if keep], style)
    scale = _scale([values for values in maps.values() if values.dtype.kind == "f"])
    handles = _class_handles([values for values in maps.values() if values.dtype.kind != "f"], style)
    for ax, chip, keep in zip(panel_axes, images, kept, strict=False):
        _draw_image(ax, chip, limits if keep else None)
        if keep:
            handles |= _draw_hatches(ax, chip) | _draw_outline(ax, chip)
    for ax, values in zip(panel_axes[len(images) :], maps.values(), strict=True):
        _draw_map(ax, values, chips[0], style, scale)
        handles |= ({} if ax is not panel_axes[0] else _draw_hatches(ax, chips[0])) | _draw_outline(ax, chips[0])
    if len(panel_axes) > 1 or times is not None:
        names = ["image"] * len(images)
        if times is not None:
            dated = zip(date_texts(times), chips, kept, strict=True)
            names = [f"{d}\n{validity_text(chip)}".rstrip() if keep else "no date" for d, chip, keep in dated]
        for ax, name in zip(panel_axes, [*names, *maps], strict=True):
            ax.set_title(name, fontsize=None if times is None else 9)
    if title and axes is None:
        figure.suptitle(title)
    elif title and times is None:
        panel_axes[0].set_title(title)
    if style.legend:
        add_legend(figure, None if axes is None else panel_axes[-1], handles)
    return figure


def date_texts(times: Sequence[float]) -> list[str]:
    """Format POSIX seconds as ISO dates (UTC), with the time of day where two share a day; NaN is "undated"."""
    moments = pd.to_datetime(pd.Series(times, dtype=np.float64), unit="s", utc=True)
    days = moments.dt.strftime("%Y-%m-%d")
    texts = days.where(~days.duplicated(keep=False), moments.dt.strftime("%Y-%m-%d %H:%M")).fillna("undated")
    return [str(text) for text in texts]


def validity_text(layers: ChipLayers) -> str:
    """Format the shares of all pixels that are valid, and that are valid and clear: "97 % valid, 63 % clear"."""
    texts = [] if layers.valid is None else [f"{_percent(layers.valid)} valid"]
    if layers.clear is not None and layers.usable is not None:
        texts.append(f"{_percent(layers.usable)} clear")
    return ", ".join(texts)


def _percent(mask: npt.NDArray[np.bool_]) -> str:
    """Format the share that is True; "0 %" and "100 %" are exact."""
    share = float(mask.mean()) if mask.size else 0.0
    return "<1 %" if 0 < share < 0.01 else ">99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def _check(chips: Sequence[ChipLayers], times: Sequence[float] | None, kept: Sequence[bool]) -> None:
    counts = (len(chips), len(chips) if times is None else len(times), len(kept))
    if not chips or len(set(counts)) > 1:
        raise UsageError(
            "A series must have at least one chip, and one time and one time_valid per chip, got {} chips, {} times, "
            "{} time_valid.".format(*counts)
        )
    names = ("image", "valid", "clear", "inside", "labels", "prediction")
    for chip in chips:
        arrays = {name: array for name in names if (array := getattr(chip, name)) is not None}
        if not {"image", "labels", "prediction"} & set(arrays):
            raise UsageError("There is nothing to draw: a chip must have an image, labels or a prediction.")
        if len({array.shape[-2:] for array in arrays.values()}) > 1:
            sizes = ", ".join(f"{name} {array.shape[-2]} x {array.shape[-1]}" for name, array in arrays.items())
            raise UsageError(f"The layers of a chip must be on one grid, got {sizes}.")
        if chip.image is not None and (chip.image.ndim != 3 or len(chip.image) not in (1, 3)):
            raise UsageError(f"An image must have 1 band (grey) or 3 (red, green, blue), got shape {chip.image.shape}.")


def stretch_limits(
    image: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None = None,
    *,
    percentiles: tuple[float, float] = PERCENTILES,
    joint: bool = False,
) -> npt.NDArray[np.float64]:
    """Return the values that become black and white in each band, float64 `[C, 2]`.

    Leading axes (dates) of the pixels `[..., C, H, W]` share their bands' limits. `valid` (True = counts) broadcasts
    against `image`; NaN and infinity never count. Where both percentiles are one value, the minimum and the maximum are
    used; a band without values gets (0, 1). `joint` gives all bands one pair of limits. UsageError: complex pixels, or
    percentiles that are not 0 <= low < high <= 100.
    """
    if not 0 <= percentiles[0] < percentiles[1] <= 100:
        raise UsageError(f"percentiles must be (low, high) with 0 <= low < high <= 100, got {percentiles!r}.")
    if image.dtype.kind not in "buif":
        raise UsageError(f"Pixels must be real numbers, such as a magnitude, to be drawn, got {image.dtype}.")
    counts = np.isfinite(image) if valid is None else np.isfinite(image) & valid
    if joint:
        return np.tile(_percentiles(image[counts], percentiles), (image.shape[-3], 1))
    bands = zip(np.moveaxis(image, -3, 0), np.moveaxis(counts, -3, 0), strict=True)
    return np.array([_percentiles(band[counted], percentiles) for band, counted in bands], np.float64).reshape(-1, 2)


def stretch(image: npt.NDArray[Any], limits: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Scale each band of `image` `[..., C, H, W]` from its `limits` `[C, 2]` to 0..1, float32, clipped.

    A band whose limits are equal becomes 0.5 throughout; NaN becomes 0.
    """
    low, high = limits.T[:, :, None, None]
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = (image.astype(np.float64) - low) / np.where(high > low, high - low, 1.0)
    return np.nan_to_num(np.where(high > low, np.clip(scaled, 0.0, 1.0), 0.5)).astype(np.float32)


def _percentiles(values: npt.NDArray[Any], percentiles: tuple[float, float]) -> tuple[float, float]:
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values.astype(np.float64), percentiles)
    return (float(low), float(high)) if low < high else (float(values.min()), float(values.max()))


def _limits(chips: Sequence[ChipLayers], style: ChipStyle) -> npt.NDArray[np.float64]:
    """Return the stretch over the usable pixels of all chips; where none is usable, over the valid ones."""
    images = [chip.image for chip in chips if chip.image is not None]
    if not images:
        return np.empty((0, 2))
    everywhere = np.ones(images[0].shape[-2:], bool)
    counted = np.stack([everywhere if chip.usable is None else chip.usable for chip in chips])
    if not counted.any():
        counted = np.stack([everywhere if chip.valid is None else chip.valid for chip in chips])
    return stretch_limits(np.stack(images), counted[:, None], percentiles=style.percentiles, joint=style.joint)


def _scale(maps: Sequence[npt.NDArray[Any]]) -> Normalize:
    """Return one scale for all maps of values."""
    values = np.concatenate([np.empty(0), *(m[np.isfinite(m)] for m in maps)])
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return Normalize(low, high) if low < high else Normalize(low - 0.5, high + 0.5)


def _draw_image(ax: Axes, layers: ChipLayers, limits: npt.NDArray[np.float64] | None) -> None:
    """Draw an image, or without `limits` an empty panel for padding."""
    assert layers.image is not None
    pixels = np.full((*layers.image.shape[-2:], 3), _NO_DATA, np.float32)
    if limits is None:
        ax.text(0.5, 0.5, "padding", transform=ax.transAxes, ha="center", va="center", color="0.45", fontsize=9)
    else:
        where = True if layers.valid is None else layers.valid[..., None]
        np.copyto(pixels, np.moveaxis(stretch(layers.image, limits), 0, -1), where=where)
    _show(ax, pixels, layers)


def _draw_map(ax: Axes, values: npt.NDArray[Any], layers: ChipLayers, style: ChipStyle, scale: Normalize) -> None:
    """Draw classes in their colours, or values along a colour map with its bar."""
    if values.dtype.kind == "f":
        _show(ax, np.ma.masked_invalid(values), layers, cmap="viridis", norm=scale, interpolation="nearest")
        ax.figure.colorbar(ax.images[0], ax=ax, shrink=0.8, pad=0.02).outline.set_visible(False)
        return
    classes, positions = np.unique(values, return_inverse=True)
    colours = class_colours(classes, style.colours) | {style.ignore_index: (0.0, 0.0, 0.0, 0.0)}
    table = to_rgba_array([colours[int(c)] for c in classes])
    _show(ax, table[positions.reshape(values.shape)], layers, interpolation="nearest")  # no colours between classes


def _class_handles(maps: Sequence[npt.NDArray[Any]], style: ChipStyle) -> dict[str, Artist]:
    """Return legend handles of the classes that are drawn, by number; of too many, the most frequent."""
    flat = np.concatenate([np.empty(0, np.int64), *(m.ravel().astype(np.int64) for m in maps)])
    found, counts = np.unique(flat[flat != style.ignore_index], return_counts=True)
    shown = np.sort(found[np.argsort(-counts, kind="stable")][:_MAX_NAMES]).tolist()
    names, colours = class_names(shown, style.classes), class_colours(shown, style.colours)
    texts = [names[c] if list(names.values()).count(names[c]) == 1 else f"{names[c]} ({c})" for c in shown]
    handles: dict[str, Artist] = {
        text: Patch(facecolor=colours[c], edgecolor="0.5", linewidth=0.5) for text, c in zip(texts, shown, strict=True)
    }
    if len(found) > len(shown):
        handles[f"and {len(found) - len(shown)} more"] = Patch(facecolor="none")
    return handles


def _draw_hatches(ax: Axes, layers: ChipLayers) -> dict[str, Artist]:
    """Hatch what is not valid, dot what is not clear; return legend handles by text."""
    handles: dict[str, Artist] = {}
    clear, valid = layers.clear, layers.valid
    cloudy = None if clear is None else ~clear if valid is None else ~clear & valid
    for text, mask in (("not valid", None if valid is None else ~valid), ("not clear", cloudy)):
        if mask is None or not mask.any():
            continue
        hatch, colour, face = _HATCHES[text]
        area = ax.contourf(*_pixel_edges(mask), levels=[0.5, 1.5], colors="none", hatches=[hatch])
        area.set(gid=text, edgecolor=colour, linewidth=0)
        handles[text] = Patch(facecolor=face, linewidth=0, hatch=hatch, edgecolor=colour)
    return handles


def _draw_outline(ax: Axes, layers: ChipLayers) -> dict[str, Artist]:
    if layers.inside is None or layers.inside.all() or not layers.inside.any():
        return {}
    for colour, width in (("black", 2.6), ("white", 1.2)):
        ax.contour(*_pixel_edges(layers.inside), levels=[0.5], colors=colour, linewidths=width).set_gid("AOI")
    return {"AOI": Patch(facecolor="white", edgecolor="black", linewidth=1.2)}


def _pixel_edges(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], ...]:
    """Return x, y and z whose contour at 0.5 runs along the edges of the True pixels of `[H, W]`.

    Each pixel has its value at both of its edges, so that neighbours differ between two points of one place.
    """
    y, x = (np.repeat(np.arange(n + 1) - 0.5, 2)[1:-1] for n in mask.shape)
    return x, y, mask.repeat(2, axis=0).repeat(2, axis=1).astype(np.float64)


def _show(ax: Axes, pixels: Any, layers: ChipLayers, **options: Any) -> None:
    ax.set_facecolor("white")
    ax.imshow(pixels, aspect=layers.aspect, origin="upper" if layers.north_up else "lower", **options)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color="0.6", linewidth=0.6)


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
    """Return `count` axes and their figure: those given (UsageError: another number), or new ones of `size` inches."""
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
