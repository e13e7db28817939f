"""Make samples of chips: dictionaries of tensors with the keys that TorchGeo and Kornia expect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torchgeo.datasets import GeoDataset

from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.geo.crs import epsg_code, pyproj_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.chip import Chip
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.buffers import batch_rows, torch_dtype
from rasteret_ml.samples.composite import Composite

Sample = dict[str, Any]  #: Tensors by key; under TorchGeo 0.8, `bounds` holds slices and `crs` a CRS.

#: Whether samples hold only tensors (TorchGeo 0.9 and later); the code of 0.8 needs slices as `bounds`, and `crs`.
TENSOR_ONLY = hasattr(GeoDataset, "_slice_to_tensor")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelRule:
    """How to turn stored labels into a mask."""

    #: Sorted stored values, and the class of each; None = stored values are classes.
    remap: tuple[npt.NDArray[Any], npt.NDArray[np.int64]] | None
    ignore_index: int  #: Class of pixels that are invalid or not in `remap`.
    continuous: bool  #: Whether labels are floats: the mask is then float32, NaN where invalid.

    @classmethod
    def make(
        cls, bands: tuple[str, ...], dtype: np.dtype[Any], remap: Mapping[int, int] | None, ignore_index: int
    ) -> LabelRule:
        """Return the rule for bands of a data type; UsageError: several, complex ones, or `remap` for floats."""
        if len(bands) != 1:
            raise UsageError(f"Labels must be one band, got {list(bands)}; join datasets with `&`, each with its key=.")
        continuous = dtype.kind == "f"
        if dtype.kind == "c" or (continuous and remap is not None):
            allowed = "integers" if remap is not None else "integers or floats"
            raise UsageError(f"Labels{' with remap=' if remap is not None else ''} must be {allowed}, got {dtype}.")
        table = None
        if remap is not None:
            classes = {int(value): int(label) for value, label in remap.items()}
            values = sorted(classes)
            table = np.array(values), np.array([classes[value] for value in values], np.int64)
        return cls(remap=table, ignore_index=int(ignore_index), continuous=continuous)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the mask."""
        return torch.float32 if self.continuous else torch.int64

    @property
    def invalid(self) -> float | int:
        """Value of invalid pixels."""
        return float("nan") if self.continuous else self.ignore_index

    def apply(self, data: npt.NDArray[Any], valid: npt.NDArray[np.bool_], out: npt.NDArray[Any]) -> None:
        """Write the mask `[H, W]` of one band `[H, W]` to `out`."""
        labels = data if self.continuous else data.astype(np.int64)
        if self.remap is not None:
            values, classes = self.remap
            index = np.searchsorted(values, labels).clip(max=len(values) - 1)
            labels = np.where(values[index] == labels, classes[index], self.ignore_index)
        out[:] = np.where(valid, labels, self.invalid)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleSpec:
    """Keys and contents of a dataset's samples."""

    key: str  #: Key of the pixels: "image", "mask", or a name that starts with either.
    rule: LabelRule | None  #: How to make labels; None = the samples are images.
    mask_aoi: bool  #: Whether to add `mask_aoi`.
    all_touched: bool  #: Whether pixels that the AOI's polygon touches are inside, not only those whose centre is.
    mask_outside: bool  #: Whether to fill pixels outside the AOI's polygon.
    valid_per_band: bool  #: Whether `mask_valid` is `[C, H, W]` instead of `[1, H, W]`, valid in all bands.
    with_scale: bool  #: Whether to add `scale` and `offset`.
    with_clear: bool  #: Whether to add `mask_clear`.
    with_epsg: bool  #: Whether to add `epsg`.
    series: bool  #: Whether samples are time series with an axis T.

    @property
    def keys(self) -> set[str]:
        """Keys that every sample has, whatever the query."""
        keys = {self.key, "mask_valid", "transform", "time", "record"}
        keys |= {"scale", "offset"} if self.with_scale and self.rule is None else set()
        keys |= {"mask_clear"} if self.with_clear else set()
        keys |= {"epsg"} if self.with_epsg else set()
        return keys | ({"time_valid", "length"} if self.series else set())

    @property
    def uses_aoi(self) -> bool:
        """Whether samples depend on the AOI's polygon."""
        return self.mask_aoi or self.mask_outside


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipSeries:
    """Chips of one query."""

    chips: tuple[Chip, ...]  #: One per date, ascending; a single one if there is no axis T.
    seconds: tuple[float, ...]  #: Time of each chip, POSIX seconds UTC; NaN = undated.
    length: int  #: T, padding included.

    @property
    def grid(self) -> Grid:
        """Grid of the chips."""
        return self.chips[0].grid

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Pixels inside the AOI's polygon `[H, W]`."""
        return np.asarray(self.chips[0].inside)


def apply_composite(composite: Composite, series: ChipSeries, harmonize: bool) -> ChipSeries:
    """Reduce the dates of a series to one; its time is their mean.

    DataError: dates differ in scale or offset, and `harmonize` is False.
    """
    chips = series.chips
    first = next((chip for chip in chips if chip.record is not None), chips[0])
    images = []
    for chip in chips:
        data = chip.data
        if chip.record is not None and chip.scaling.numbers != first.scaling.numbers:
            if not harmonize:
                raise DataError(
                    f"Record {chip.record.id}: all records of a composite must have one scale and offset, got "
                    f"{first.scaling} and {chip.scaling}; convert them with harmonize=True, or split the Collection by "
                    "them, for example with where()."
                )
            data = first.scaling.restore(chip.scaling.values(data), data, chip.valid, first.fill)
        images.append(data)
    valid = np.stack([chip.valid for chip in chips])
    clear = None if chips[0].clear is None else np.stack([np.asarray(chip.clear) for chip in chips])
    data, valid, clear = composite.apply(np.stack(images), valid, clear, first.scaling)
    chip = replace(first, data=data, valid=valid, clear=clear, inside=chips[0].inside, record=None)
    return ChipSeries(chips=(chip,), seconds=(float(np.mean(series.seconds)),), length=1)


def make_samples(
    spec: SampleSpec,
    queries: Sequence[Any],
    times: Sequence[slice],
    batch: Sequence[ChipSeries],
    images: torch.Tensor | None,
) -> list[Sample]:
    """Make the samples of a batch; if all chips have one size, their tensors are rows of one buffer per key.

    `images` is the buffer `[B, C, H, W]` or `[B, T, C, H, W]` that the chips were read to, if any.
    """
    columns: dict[str, Sequence[Any]] = {spec.key: _pixels(spec, batch, images)}
    if spec.valid_per_band:
        columns["mask_valid"] = _masks(spec, batch, len(batch[0].chips[0].valid), lambda chip: chip.valid)
    else:
        columns["mask_valid"] = _masks(spec, batch, 1, lambda chip: chip.valid.all(axis=0, keepdims=True))
    if spec.with_clear:
        columns["mask_clear"] = _masks(spec, batch, 1, lambda chip: np.asarray(chip.clear)[None])
    if spec.mask_aoi:
        masks = [torch.from_numpy(series.inside[None]) for series in batch]
        if spec.series:
            masks = [mask.repeat(series.length, 1, 1, 1) for mask, series in zip(masks, batch, strict=True)]
        columns["mask_aoi"] = masks
    if spec.mask_outside:
        for pixels, series in zip(columns[spec.key], batch, strict=True):
            fill = _fill(series) if spec.rule is None else spec.rule.invalid
            np.copyto(pixels.numpy(), fill, where=~series.inside)
    if spec.with_scale and spec.rule is None:
        columns["scale"], columns["offset"] = _scales(spec, batch, 0, 1.0), _scales(spec, batch, 1, 0.0)
    columns |= _metadata(spec, queries, times, batch)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(batch))]


def _pixels(spec: SampleSpec, batch: Sequence[ChipSeries], images: torch.Tensor | None) -> Sequence[torch.Tensor]:
    if spec.rule is not None:
        rows = batch_rows([series.grid.shape for series in batch], spec.rule.dtype)
        for row, series in zip(rows, batch, strict=True):
            spec.rule.apply(series.chips[0].data[0], series.chips[0].valid[0], row.numpy())
        return rows
    if images is None and not spec.series:
        return [torch.from_numpy(series.chips[0].data) for series in batch]
    if images is None:
        first = batch[0].chips[0].data
        rows = batch_rows([(s.length, len(first), *s.grid.shape) for s in batch], torch_dtype(first.dtype))
        for row, series in zip(rows, batch, strict=True):
            for t, chip in enumerate(series.chips):
                row[t].numpy()[:] = chip.data
    else:
        rows = images.unbind(0)
    if spec.series:
        for row, series in zip(rows, batch, strict=True):
            for t in range(len(series.chips), series.length):  # padding
                row[t].numpy()[:] = _fill(series)
    return rows


def _fill(series: ChipSeries) -> npt.NDArray[Any]:
    """Return the value of missing pixels, `[C, 1, 1]`."""
    return np.array(series.chips[0].fill, series.chips[0].data.dtype)[:, None, None]


def _masks(
    spec: SampleSpec, batch: Sequence[ChipSeries], channels: int, mask_of: Callable[[Chip], Any]
) -> Sequence[torch.Tensor]:
    """Return a bool tensor `[channels, H, W]` or `[T, channels, H, W]` per sample; padding is False."""
    shapes = [(*((s.length,) if spec.series else ()), channels, *s.grid.shape) for s in batch]
    rows = batch_rows(shapes, torch.bool)
    for row, series in zip(rows, batch, strict=True):
        dates = row if spec.series else row[None]
        for t, chip in enumerate(series.chips):
            dates[t].numpy()[:] = mask_of(chip)
        dates[len(series.chips) :] = False
    return rows


def _scales(spec: SampleSpec, batch: Sequence[ChipSeries], which: int, padding: float) -> Sequence[torch.Tensor]:
    """Return the scales (0) or offsets (1) of `Scaling.numbers`."""
    values: list[Sequence[Any]] = []
    for series in batch:
        dates = [chip.scaling.numbers[which] for chip in series.chips]
        values.append(_pad(dates, series.length, (padding,) * len(dates[0])) if spec.series else dates[0])
    return _tensors(values, torch.float32)


def _metadata(
    spec: SampleSpec, queries: Sequence[Any], times: Sequence[slice], batch: Sequence[ChipSeries]
) -> dict[str, Sequence[Any]]:
    """Return everything but pixels and masks: place, time, record and AOI."""
    slices = [snapped_slices(series.grid, t) for series, t in zip(batch, times, strict=True)]
    columns: dict[str, Sequence[Any]] = {}
    if TENSOR_ONLY:
        columns["bounds"] = _tensors([_bounds(xyt) for xyt in slices])
    else:
        columns["bounds"] = slices
        columns["crs"] = [pyproj_crs(str(series.grid.crs)) for series in batch]
    if spec.with_epsg:
        columns["epsg"] = _tensors([[epsg_code(series.grid.crs) or 0] for series in batch], torch.int64)
    columns["transform"] = _tensors([tuple(series.grid.transform)[:9] for series in batch])
    columns["time"] = _tensors([_pad(series.seconds, series.length, math.nan) for series in batch])
    rows = [[-1 if chip.record is None else chip.record.row for chip in series.chips] for series in batch]
    padded = [_pad(row, series.length, -1) for row, series in zip(rows, batch, strict=True)]
    columns["record"] = _tensors(padded, torch.int64)
    if spec.series:
        flags = [_pad([True] * len(series.chips), series.length, False) for series in batch]
        columns["time_valid"] = _tensors(flags, torch.bool)
        columns["length"] = _tensors([[len(series.chips)] for series in batch], torch.int64)
    return columns | aoi_columns(queries)


def aoi_columns(queries: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Return `draw` (seed, epoch, position), `aoi` and `label` of samples, each only if every query has it."""
    columns: dict[str, Sequence[Any]] = {}
    draws = [query.draw if isinstance(query, AOI) else None for query in queries]
    if None not in draws:
        columns["draw"] = _tensors(draws, torch.int64)
    rows = [query.row if isinstance(query, AOI) else -1 for query in queries]
    if min(rows, default=-1) >= 0:
        columns["aoi"] = _tensors([[row] for row in rows], torch.int64)
    labels = [query.label if isinstance(query, AOI) else None for query in queries]
    if None not in labels:
        is_class = all(isinstance(label, (int, np.integer)) for label in labels)
        columns["label"] = _tensors([[label] for label in labels], torch.int64 if is_class else torch.float32)
    return columns


def _pad(values: Sequence[Any], length: int, fill: Any) -> list[Any]:
    return [*values, *[fill] * (length - len(values))]


def _tensors(values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Sequence[torch.Tensor]:
    """Return a tensor per value: rows of one buffer, unless series differ in length."""
    if len({len(value) for value in values}) > 1:
        return [torch.tensor(value, dtype=dtype) for value in values]
    return torch.tensor(values, dtype=dtype).unbind(0)


def seconds_of(chip: Chip) -> float:
    """Return the time of the record that supplied the first pixels, POSIX seconds UTC; NaN = undated."""
    time = None if chip.record is None else chip.record.datetime
    return math.nan if time is None else float(pd.Timestamp(time).timestamp())  # of pandas: UTC without a zone


def snapped_slices(grid: Grid, t: slice) -> tuple[slice, slice, slice]:
    """Return the (x, y, t) slices of a chip's grid, which is snapped to the dataset's pixels."""
    xmin, ymin, xmax, ymax = grid.bounds
    xres, yres = grid.res
    return slice(xmin, xmax, xres), slice(ymin, ymax, yres), t


def bounds_tensor(slices: tuple[slice, slice, slice]) -> torch.Tensor:
    """Return float64 `[9]`: start, stop and step of x, y and t (POSIX seconds), the layout of TorchGeo 0.9.

    float32 would lose half a metre of a UTM northing, and minutes of a time.
    """
    return torch.tensor(_bounds(slices), dtype=torch.float64)


def _bounds(slices: tuple[slice, slice, slice]) -> list[float]:
    x, y, t = slices
    seconds = [float(pd.Timestamp(v).timestamp()) for v in (t.start, t.stop)]
    return [x.start, x.stop, x.step, y.start, y.stop, y.step, *seconds, 1 if t.step is None else t.step]
