"""Pictures of samples: tensors to the arrays that `rasteret_ml.plotting` draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.errors import UnknownBandError, UsageError
from rasteret_ml.geo.crs import crs_text, pyproj_crs
from rasteret_ml.plotting.chips import ChipLayers, ChipStyle, date_texts, draw_chips, validity_text
from rasteret_ml.plotting.colours import class_names
from rasteret_ml.samples.sample import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Band names that are shown in colour: plain, Sentinel-2 (and HLS), Landsat 8 and 9, one letter.
_RED_GREEN_BLUE = (("red", "green", "blue"), ("b04", "b03", "b02"), ("b4", "b3", "b2"), ("r", "g", "b"))
# Largest number of axes of a key in one sample; a batch, which would be taken for a time series, has more.
_ITEM_AXES = {"image": 4, "transform": 1, "bounds": 1, "time": 1}

_KEYS = (
    "image", "mask_valid", "mask_clear", "mask_aoi", "prediction", "label", "time", "time_valid", "transform", "crs",
)  # fmt: skip
_TENSORS = (torch.Tensor, np.ndarray)

Bands = str | int | Sequence[str | int]
Arrays = dict[str, npt.NDArray[Any]]


def plot_from(datasets: Sequence[Any], sample: Sample, options: Mapping[str, Any]) -> Figure:
    """Call `plot_sample` with the band names and the ignored class that the datasets of a sample know."""
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
    labels: str = "mask",
    columns: int = 5,
    title: str | None = None,
    axes: Any = None,
    **style: Any,
) -> Figure:
    """Plot one sample, or one item of a batch: the image, labels and prediction that there are, side by side.

    Invalid pixels (`mask_valid`) are hatched and cloudy ones (`mask_clear`) dotted; neither affects the stretch. The
    edge of `mask_aoi` is drawn. The image may be of any real type, normalized floats included. A time series
    `[T, C, H, W]` has a panel per date, with the date and the shares that are valid and clear, on one stretch; padding
    (`time_valid` False) is drawn as such.

    Args:
        sample: Tensors by key; `prediction` is classes or values `[H, W]`, or scores `[K, H, W]`.
        bands: Names of the bands along C.
        rgb: Three of them (names or positions) as red, green and blue, or one in grey. By default those with the names
            of colours (red, green, blue; B04, B03, B02; B4, B3, B2; r, g, b), else the first three, else the first.
        labels: Key of the labels to draw.
        columns: Panels per row of a series.
        title: Title in place of date, shares and label.
        axes: matplotlib axes, one per panel (T of a series, and one each for labels and prediction); by default a new
            figure that pyplot does not manage.
        style: Fields of `ChipStyle`: `classes` (their names) and `colours`, by number or as a list from 0 on,
            `ignore_index`, `percentiles`, `joint`, `legend`.

    Raises:
        UsageError: a whole batch, layers of different sizes, nothing to draw.
        UnknownBandError: `rgb` has a band that the image does not have.

    Example:
        >>> figure = plot_sample(dataset[aoi], classes=["water", "forest"])  # doctest: +SKIP
        >>> figure.savefig("sample.png")  # doctest: +SKIP
    """
    chip_style = ChipStyle(**style)
    for key, limit in _ITEM_AXES.items():
        number = getattr(sample.get(key), "ndim", 0)
        if number > limit:
            raise UsageError(
                f"A single sample must be plotted, got a batch ({key!r} has {number} axes): take one of its items, "
                "{key: value[0] for key, value in batch.items()}."
            )
    arrays = {key: _array(sample[key]) for key in {*_KEYS, labels} if isinstance(sample.get(key), _TENSORS)}
    image = arrays.get("image")
    shown: dict[str, Any] = {"labels": _map(arrays, labels), "prediction": _map(arrays, "prediction")}
    grids = [values for values in (image, *shown.values()) if values is not None]
    if not grids:
        raise UsageError(
            f"There is nothing to draw: a sample must have an image, labels or a prediction, got {sorted(sample)}."
        )
    shown |= _pixel_shape(sample, arrays, grids[0].shape[-2:])
    picks = () if image is None else shown_bands(image.shape[-3], bands, rgb)
    times = [float(t) for t in arrays["time"].ravel()] if "time" in arrays else []
    label = _label_text(arrays, chip_style)
    text, series = label, dict[str, Any]()
    if image is not None and image.ndim == 4:
        chips = [_layers(arrays, picks, chip, date, **shown) for date, chip in enumerate(image)]
        held = None if "time_valid" not in arrays else arrays["time_valid"].ravel().tolist()
        series = {"times": times or [math.nan] * len(image), "time_valid": held, "columns": columns}
    else:
        chips = [_layers(arrays, picks, image, **shown)]
        days = sorted({day[:10] for day in date_texts([t for t in times if not math.isnan(t)])})
        when = f"{days[0]} to {days[-1]} ({len(days)} days)" if len(days) > 1 else "".join(days)
        text = "   ".join(part for part in (when, validity_text(chips[0]), label) if part)
    return draw_chips(chips, chip_style, title=text if title is None else title, axes=axes, **series)


def shown_bands(count: int, bands: Sequence[str] | None = None, rgb: Bands | None = None) -> tuple[int, ...]:
    """Return the positions of the one or three bands to show, of `count`; errors as for `plot_sample`."""
    if bands is not None and len(bands) != count:
        raise UsageError(f"bands must name the image's {count} bands, got {len(bands)} names.")
    names = [] if bands is None else [str(band) for band in bands]
    if rgb is not None:
        picks = [rgb] if isinstance(rgb, (str, int)) else list(rgb)
        if len(picks) not in (1, 3):
            raise UsageError(f"rgb must be three bands, or one for grey, got {picks}.")
        return tuple(_position(band, names, count) for band in picks)
    lower = [name.lower() for name in names]
    for colours in _RED_GREEN_BLUE:
        if set(colours) <= set(lower):
            return tuple(lower.index(colour) for colour in colours)
    return (0, 1, 2) if count >= 3 else (0,)


def _position(band: str | int, names: list[str], count: int) -> int:
    if isinstance(band, str):
        if band in names:
            return names.index(band)
        remedy = f"one of {names}" if names else "a number, or bands= must name the image's bands"
        raise UnknownBandError(f"A band in rgb must be {remedy}, got {band!r}.")
    if not 0 <= int(band) < count:
        raise UnknownBandError(f"A band number in rgb must be in 0..{count - 1}, got {band}.")
    return int(band)


def _layers(
    arrays: Arrays, picks: Sequence[int], image: npt.NDArray[Any] | None, date: int = 0, **shown: Any
) -> ChipLayers:
    """Return the layers of one date: its `image` `[C, H, W]`, its masks, and what all dates share."""
    valid = _plane(arrays, "mask_valid", date, picks)
    bands = None if image is None else image[list(picks)]
    if bands is not None and bands.dtype.kind == "f":
        finite = np.isfinite(bands).all(axis=0)
        valid = valid & finite if valid is not None else None if finite.all() else finite
    clear, inside = _plane(arrays, "mask_clear", date), _plane(arrays, "mask_aoi", date)
    return ChipLayers(image=bands, valid=valid, clear=clear, inside=inside, **shown)


def _plane(arrays: Arrays, key: str, date: int, picks: Sequence[int] = ()) -> npt.NDArray[np.bool_] | None:
    """Return a mask of one date as `[H, W]`, True where all its bands are (those shown, if it has one per band)."""
    if key not in arrays:
        return None
    mask = arrays[key].astype(bool)
    if mask.ndim == 4:
        mask = mask[0 if len(mask) == 1 else date]
    mask = mask.reshape(-1, *mask.shape[-2:])
    if picks and len(mask) > max(*picks, 1):
        mask = mask[list(picks)]
    return np.asarray(mask.all(axis=0))


def _map(arrays: Arrays, key: str) -> npt.NDArray[Any] | None:
    """Return labels or a prediction as `[H, W]`; of scores `[K, H, W]` the class with the highest."""
    values = arrays.get(key)
    if values is None:
        return None
    if key == "prediction" and values.ndim == 3 and len(values) > 1 and values.dtype.kind == "f":
        values = values.argmax(axis=0)
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    if values.ndim != 2:
        raise UsageError(f"{key!r} must be a map [H, W] to be drawn, got shape {tuple(values.shape)}.")
    return values.astype(np.int64) if values.dtype.kind == "b" else values


def _pixel_shape(sample: Sample, arrays: Arrays, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return `aspect` and `north_up` of the pixels, from `transform` and `crs`."""
    if "transform" not in arrays or arrays["transform"].size < 6:
        return {}
    a, b, _, d, e, f = (float(v) for v in arrays["transform"].ravel()[:6])
    width, height = math.hypot(a, d), math.hypot(b, e)
    crs = int(arrays["crs"].ravel()[0]) if "crs" in arrays else sample.get("crs")
    if crs and pyproj_crs(crs_text(crs)).is_geographic:
        width *= max(math.cos(math.radians(f + d * shape[1] / 2 + e * shape[0] / 2)), 0.05)
    return {"aspect": height / width if width and height else 1.0, "north_up": e <= 0}


def _label_text(arrays: Arrays, style: ChipStyle) -> str:
    label = arrays.get("label")
    if label is None or label.size != 1:
        return ""
    value = label.ravel()[0]
    return f"label {value:.4g}" if label.dtype.kind == "f" else f"label {class_names([value], style.classes)[value]}"


def _array(value: torch.Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a tensor as an array on the host, of a type that numpy has."""
    tensor = torch.as_tensor(value).detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())
