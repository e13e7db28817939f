"""Samples to pictures: tensors to the arrays that the plotting room draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.errors import UnknownBandError, UsageError
from rasteret_ml.geo.crs import crs_text, pyproj_crs
from rasteret_ml.plotting.chips import ChipLayers, ChipStyle, draw_chip
from rasteret_ml.plotting.colours import ColourTable, class_names
from rasteret_ml.plotting.series import date_texts, draw_series, facts_text
from rasteret_ml.plotting.stretch import PERCENTILES
from rasteret_ml.samples.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_from", "plot_sample", "plot_series", "shown_bands"]

_RED_GREEN_BLUE = (("red", "green", "blue"), ("b04", "b03", "b02"), ("b4", "b3", "b2"), ("r", "g", "b"))
"""Names of colours: plain, Sentinel-2 (and HLS), Landsat 8 and 9, one letter."""

Bands = str | int | Sequence[str | int]


def plot_from(datasets: Sequence[Any], sample: Sample, options: Mapping[str, Any]) -> Figure:
    """`plot_sample` with the names of the bands and the ignored class that the datasets of a sample know."""
    known: dict[str, Any] = {}
    images = [dataset for dataset in datasets if getattr(dataset, "is_image", False)]
    if images and all(hasattr(dataset, "bands") for dataset in images):
        names = [str(band) for dataset in images for band in dataset.bands]
        known["bands"] = names if "image" in sample and len(names) == sample["image"].shape[-3] else None
    ignored = (getattr(dataset, "ignore_index", None) for dataset in datasets)
    known["ignore_index"] = next((index for index in ignored if index is not None), -100)
    return plot_sample(sample, **(known | dict(options)))


def plot_sample(
    sample: Sample,
    *,
    bands: Sequence[str] | None = None,
    rgb: Bands | None = None,
    classes: Mapping[int, str] | Sequence[str] | None = None,
    colours: ColourTable | None = None,
    ignore_index: int = -100,
    percentiles: tuple[float, float] = PERCENTILES,
    joint: bool = False,
    labels: str = "mask",
    legend: bool = True,
    title: str | None = None,
    axes: Any = None,
) -> Figure:
    """One sample, or one item of a batch, as a picture: image, labels and prediction, those that are there.

    Invalid pixels (`mask_valid`) are hatched and have no say in the stretch, cloudy ones (`mask_clear`) are dotted,
    the edge of `mask_aoi` is drawn. The image may be of any real type, normalised floats included; a time series
    `[T, C, H, W]` is drawn by `plot_series`.

    Args:
        sample: By `design` 4.3; `prediction` is classes or values `[H, W]`, or scores `[K, H, W]`.
        bands: Names of the bands along C.
        rgb: Three of them (names or positions) as red, green and blue, or one in grey. Default those that are named
            like colours (red, green, blue; B04, B03, B02; B4, B3, B2; r, g, b), else the first three, else the first.
        classes: Names of the classes, by number or a list from 0 on.
        colours: Their colours, by number or a list from 0 on: a name, a hex text, numbers in 0..1 or 0..255. The
            others have one of a palette that all eyes tell apart, always the same for a number.
        ignore_index: Class that is not drawn.
        percentiles: Of the valid and clear pixels, what becomes black and white.
        joint: One stretch for all bands, which keeps their balance, instead of one for each.
        labels: Key of the labels that are drawn.
        legend: Whether what is seen is explained below.
        title: In place of date, shares and label.
        axes: matplotlib axes, one for each panel; default a new figure, which pyplot does not know.

    Raises:
        UsageError: a whole batch, layers of different sizes, nothing to draw.
        UnknownBandError: an `rgb` band that is not there.
    """
    style = ChipStyle(
        classes=classes, colours=colours, ignore_index=ignore_index, percentiles=percentiles, joint=joint, legend=legend
    )
    _refuse_batch(sample)
    image = _array(sample.get("image"))
    if image is not None and image.ndim == 4:
        return _series(sample, image, bands, rgb, style, labels=labels, columns=5, title=title, axes=axes)
    shape = _shape(sample, image)
    picks = () if image is None else shown_bands(len(image), bands, rgb)
    drawn, prediction = _ground(sample, labels)
    layers = _layers(sample, shape, image, picks, labels=drawn, prediction=prediction)
    return draw_chip(layers, style, title=_title(sample, layers, style) if title is None else title, axes=axes)


def plot_series(
    sample: Sample,
    *,
    bands: Sequence[str] | None = None,
    rgb: Bands | None = None,
    classes: Mapping[int, str] | Sequence[str] | None = None,
    colours: ColourTable | None = None,
    ignore_index: int = -100,
    percentiles: tuple[float, float] = PERCENTILES,
    joint: bool = False,
    columns: int = 5,
    title: str | None = None,
    axes: Any = None,
) -> Figure:
    """A time series `[T, C, H, W]` as a strip: a panel for each date, with the date and how much is valid and clear.

    All dates share one stretch. Padding (`time_valid` False) is drawn as such; labels and a prediction follow as
    further panels.

    Args:
        sample: With `image` `[T, C, H, W]`, `time` `[T]` and, where there is padding, `time_valid` `[T]`.
        bands: As in `plot_sample`, as are the other arguments that it has.
        rgb: See there.
        classes: See there.
        colours: See there.
        ignore_index: See there.
        percentiles: See there.
        joint: See there.
        columns: Panels in a row.
        title: Above it all.
        axes: matplotlib axes, one for each panel (T, and one each for labels and prediction).

    Raises:
        UsageError: not a time series, a whole batch.
        UnknownBandError: an `rgb` band that is not there.
    """
    style = ChipStyle(classes=classes, colours=colours, ignore_index=ignore_index, percentiles=percentiles, joint=joint)
    _refuse_batch(sample)
    image = _array(sample.get("image"))
    if image is None or image.ndim != 4:
        what = "no image" if image is None else f"an image {tuple(image.shape)}"
        raise UsageError(f"A time series has an image [T, C, H, W]; this sample has {what}: use plot_sample.")
    return _series(sample, image, bands, rgb, style, labels="mask", columns=columns, title=title, axes=axes)


def shown_bands(count: int, bands: Sequence[str] | None = None, rgb: Bands | None = None) -> tuple[int, ...]:
    """Positions of the one or three bands to show, of `count`; see `plot_sample`.

    Raises:
        UsageError: `bands` that are not `count`, or neither one nor three in `rgb`.
        UnknownBandError: an `rgb` band that is not there.
    """
    if bands is not None and len(bands) != count:
        raise UsageError(f"bands= names {len(bands)} bands, and the image has {count}.")
    names = [] if bands is None else [str(band) for band in bands]
    if rgb is not None:
        wanted = [rgb] if isinstance(rgb, (str, int)) else list(rgb)
        if len(wanted) not in (1, 3):
            raise UsageError(f"rgb= is three bands, or one for grey, not {wanted}.")
        return tuple(_position(band, names, count) for band in wanted)
    lower = [name.lower() for name in names]
    for colours in _RED_GREEN_BLUE:
        if all(colour in lower for colour in colours):
            return tuple(lower.index(colour) for colour in colours)
    return (0, 1, 2) if count >= 3 else (0,)


def _position(band: str | int, names: list[str], count: int) -> int:
    if isinstance(band, str):
        if band in names:
            return names.index(band)
        raise UnknownBandError(
            f"rgb= asks for band {band!r}; "
            + (f"the image has {names}." if names else "say with bands= what the image's bands are called.")
        )
    if not 0 <= int(band) < count:
        raise UnknownBandError(f"rgb= asks for band number {band}; the image has {count}, counted from 0.")
    return int(band)


def _series(
    sample: Sample,
    image: npt.NDArray[Any],
    bands: Sequence[str] | None,
    rgb: Bands | None,
    style: ChipStyle,
    *,
    labels: str,
    columns: int,
    title: str | None,
    axes: Any,
) -> Figure:
    dates = len(image)
    picks = shown_bands(image.shape[1], bands, rgb)
    times = _times(sample)
    held = _array(sample.get("time_valid"))
    chips = [_layers(sample, image.shape[-2:], image[t], picks, date=t) for t in range(dates)]
    drawn, prediction = _ground(sample, labels)
    return draw_series(
        chips,
        times or [math.nan] * dates,
        held=None if held is None else [bool(h) for h in held.ravel()],
        ground=_layers(sample, image.shape[-2:], None, (), date=0, labels=drawn, prediction=prediction),
        style=style,
        columns=columns,
        title=_label_text(sample, style) if title is None else title,
        axes=axes,
    )


def _layers(
    sample: Sample,
    shape: tuple[int, ...],
    image: npt.NDArray[Any] | None,
    picks: Sequence[int],
    *,
    date: int | None = None,
    labels: npt.NDArray[Any] | None = None,
    prediction: npt.NDArray[Any] | None = None,
) -> ChipLayers:
    valid = _plane(sample, "mask_valid", date, picks)
    shown = None if image is None else image[list(picks)]
    if shown is not None and shown.dtype.kind == "f":
        finite = np.isfinite(shown).all(axis=0)
        valid = finite if valid is None and not finite.all() else None if valid is None else valid & finite
    aspect, north_up = _lie(sample, shape)
    return ChipLayers(
        image=shown,
        valid=valid,
        clear=_plane(sample, "mask_clear", date),
        inside=_plane(sample, "mask_aoi", date),
        labels=labels,
        prediction=prediction,
        aspect=aspect,
        north_up=north_up,
    )


def _plane(sample: Sample, key: str, date: int | None, picks: Sequence[int] = ()) -> npt.NDArray[np.bool_] | None:
    """A mask as `[H, W]`: of one date, True where all its bands (those shown, where it has as many) are."""
    mask = _array(sample.get(key))
    if mask is None:
        return None
    mask = mask.astype(bool)
    if mask.ndim == 4:
        mask = mask[0 if date is None or len(mask) == 1 else date]
    if mask.ndim == 2:
        return np.asarray(mask)
    if len(mask) > max(picks, default=0) and len(mask) > 1 and picks:
        mask = mask[list(picks)]
    return np.asarray(mask.all(axis=0))


def _ground(sample: Sample, key: str = "mask") -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
    """Labels and prediction as `[H, W]`, where they are there."""
    labels, prediction = _array(sample.get(key)), _array(sample.get("prediction"))
    if prediction is not None and prediction.ndim == 3 and len(prediction) > 1 and prediction.dtype.kind == "f":
        prediction = prediction.argmax(axis=0)
    return _map(labels, key), _map(prediction, "prediction")


def _map(values: npt.NDArray[Any] | None, key: str) -> npt.NDArray[Any] | None:
    if values is None:
        return None
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2:
        raise UsageError(f"{key!r} is drawn as a map [H, W], not {tuple(values.shape)}.")
    return values.astype(np.int64) if values.dtype.kind == "b" else values


def _shape(sample: Sample, image: npt.NDArray[Any] | None) -> tuple[int, ...]:
    for value in (image, sample.get("mask"), sample.get("prediction")):
        if value is not None:
            return tuple(value.shape[-2:])
    raise UsageError(f"There is nothing to draw: no image, mask or prediction among {sorted(sample)}.")


def _lie(sample: Sample, shape: tuple[int, ...]) -> tuple[float, bool]:
    """(height of a pixel over its width on the ground, whether row 0 is north) from `transform` and `crs`."""
    numbers = _array(sample.get("transform"))
    if numbers is None or numbers.size < 6:
        return 1.0, True
    a, b, _, d, e, f = (float(v) for v in numbers.ravel()[:6])
    width, height = math.hypot(a, d), math.hypot(b, e)
    crs = sample.get("crs")
    if isinstance(crs, torch.Tensor):
        crs = int(crs.ravel()[0]) or None
    if crs is not None and pyproj_crs(crs_text(crs)).is_geographic:
        width *= max(math.cos(math.radians(f + d * shape[1] / 2 + e * shape[0] / 2)), 0.05)
    return (height / width if width and height else 1.0), e <= 0


def _title(sample: Sample, layers: ChipLayers, style: ChipStyle) -> str:
    """Date or span of dates, shares, label: what is known of them."""
    times = [t for t in _times(sample) or [] if not math.isnan(t)]
    days = sorted({day[:10] for day in date_texts(times)})
    when = "" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]} ({len(days)} days)"
    return "   ".join(part for part in (when, facts_text(layers), _label_text(sample, style)) if part)


def _label_text(sample: Sample, style: ChipStyle) -> str:
    label = _array(sample.get("label"))
    if label is None or label.size != 1:
        return ""
    value = label.ravel()[0]
    if label.dtype.kind == "f":
        return f"label {value:.4g}"
    return f"label {class_names([int(value)], style.classes)[int(value)]}"


def _times(sample: Sample) -> list[float] | None:
    times = _array(sample.get("time"))
    return None if times is None else [float(t) for t in times.ravel()]


def _refuse_batch(sample: Sample) -> None:
    """A batch would be taken for a time series."""
    ranks = {"image": 4, "transform": 1, "bounds": 1, "time": 1}
    for key, most in ranks.items():
        rank = getattr(sample.get(key), "ndim", 0)
        if rank > most:
            raise UsageError(
                f"This is a batch ({key!r} has {rank} axes); plot one of its samples: "
                "{key: value[0] for key, value in batch.items()}."
            )


def _array(value: Any) -> npt.NDArray[Any] | None:
    """A tensor as an array, on the host, of a type that numpy has."""
    if value is None or isinstance(value, np.ndarray):
        return value
    tensor = torch.as_tensor(value).detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())
