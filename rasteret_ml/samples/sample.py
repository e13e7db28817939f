"""Chips to samples: dictionaries of tensors, as TorchGeo and Kornia expect them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torchgeo.datasets import GeoDataset

from rasteret_ml.errors import DataError
from rasteret_ml.geo.crs import epsg_code, pyproj_crs
from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.chip import Chip
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.buffers import batch_rows, torch_dtype
from rasteret_ml.samples.composite import Composite
from rasteret_ml.samples.labels import LabelRule

__all__ = [
    "TENSOR_ONLY",
    "ChipSeries",
    "Sample",
    "SampleSpec",
    "apply_composite",
    "bounds_tensor",
    "draw_columns",
    "make_samples",
    "seconds_of",
    "snapped_slices",
]

Sample = dict[str, Any]
"""A sample; every value a tensor, but for `bounds` and `crs` under TorchGeo 0.8."""

TENSOR_ONLY = hasattr(GeoDataset, "_slice_to_tensor")
"""TorchGeo 0.9+ wants tensors alone; 0.8's own code needs `crs` and a slice as `bounds` in each item."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleSpec:
    """What a dataset's samples hold."""

    key: str
    """Name of the pixels: "image", "mask", or a longer name that begins so."""
    rule: LabelRule | None
    """Makes them label samples; None = images."""
    mask_aoi: bool
    """Whether `mask_aoi` is in them."""
    all_touched: bool
    """For the AOI's polygon: whether pixels that it touches are inside."""
    mask_outside: bool
    """Whether pixels outside the AOI's polygon are filled."""
    valid_per_band: bool
    """Whether `mask_valid` is `[C, H, W]` instead of its AND `[1, H, W]`."""
    with_scale: bool
    """Whether `scale` and `offset` are in them."""
    with_clear: bool
    """Whether `mask_clear` is in them."""
    with_epsg: bool
    """Whether `epsg` is in them."""
    series: bool
    """Whether they have an axis T."""

    @property
    def keys(self) -> set[str]:
        """Keys that every sample has, whatever the query."""
        groups = (
            (True, {self.key, "mask_valid", "transform", "time", "record"}),
            (self.with_scale and self.rule is None, {"scale", "offset"}),
            (self.with_clear, {"mask_clear"}),
            (self.with_epsg, {"epsg"}),
            (self.series, {"time_valid", "length"}),
        )
        return set().union(*(keys for present, keys in groups if present))

    @property
    def uses_aoi(self) -> bool:
        """Whether samples depend on the AOI's polygon."""
        return self.mask_aoi or self.mask_outside


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChipSeries:
    """What was read for one query."""

    chips: tuple[Chip, ...]
    """One a date, ascending; just one where there is no axis T."""
    seconds: tuple[float, ...]
    """Time of each, POSIX seconds UTC, NaN = undated."""
    length: int
    """T with padding."""

    @property
    def grid(self) -> Grid:
        """Where the pixels lie."""
        return self.chips[0].grid

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """Pixels inside the AOI's polygon `[H, W]`."""
        inside: npt.NDArray[np.bool_] = self.chips[0].inside
        return inside


def apply_composite(composite: Composite, reading: ChipSeries, harmonize: bool) -> ChipSeries:
    """The dates of a reading as one; its time is the mean of theirs.

    Raises:
        DataError: dates of different scale or offset, which `harmonize` brings to the first one's.
    """
    chips = reading.chips
    first = next((m for m in chips if m.record is not None), chips[0])
    own, images = first.scaling, []
    for chip in chips:
        data, its = chip.data, chip.scaling
        if chip.record is not None and its.numbers != own.numbers:
            if not harmonize:
                raise DataError(
                    f"Record {chip.record.id} meets others in a composite, but states a different scale or offset "
                    f"({its}; {own}); bring them to one with harmonize=True, or split the "
                    "Collection by them, for example with where()."
                )
            data = own.restore(its.values(data), data, chip.valid, first.fill)
        images.append(data)
    valid = np.stack([m.valid for m in chips])
    clear = None if chips[0].clear is None else np.stack([np.asarray(m.clear) for m in chips])
    data, valid, clear = composite.apply(np.stack(images), valid, clear, own)
    one = replace(first, data=data, valid=valid, clear=clear, inside=chips[0].inside, record=None)
    return ChipSeries(chips=(one,), seconds=(float(np.mean(reading.seconds)),), length=1)


def make_samples(
    spec: SampleSpec,
    queries: Sequence[Any],
    times: Sequence[slice],
    readings: Sequence[ChipSeries],
    images: torch.Tensor | None,
) -> list[Sample]:
    """Make the samples of a batch; where all chips have one size, their tensors are rows of one buffer per key.

    Args:
        spec: What they hold.
        queries: What was asked for.
        times: Its time slices.
        readings: What was read.
        images: The buffer `[B, C, H, W]` or `[B, T, C, H, W]` that the pixels of all dates are in, where there is one.
    """
    columns: dict[str, Sequence[Any]] = {spec.key: _pixels(spec, readings, images)}
    columns["mask_valid"] = _validity(spec, readings)
    if spec.with_clear:
        columns["mask_clear"] = _flags(spec, readings, 1, lambda chip: np.asarray(chip.clear)[None])
    if spec.mask_aoi:
        columns["mask_aoi"] = [_repeated(spec, r.inside[None], r.length) for r in readings]
    if spec.mask_outside:
        for pixels, reading in zip(columns[spec.key], readings, strict=True):
            _fill_outside(spec, pixels, reading)
    if spec.with_scale and spec.rule is None:
        columns["scale"] = _scales(spec, readings, "scale", 1.0)
        columns["offset"] = _scales(spec, readings, "offset", 0.0)
    columns |= _identity(spec, queries, times, readings)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(readings))]


def _pixels(spec: SampleSpec, readings: Sequence[ChipSeries], images: torch.Tensor | None) -> Sequence[torch.Tensor]:
    shapes = [reading.grid.shape for reading in readings]
    if spec.rule is not None:
        rows = batch_rows(shapes, spec.rule.dtype)
        for row, reading in zip(rows, readings, strict=True):
            spec.rule.apply(reading.chips[0].data[0], reading.chips[0].valid[0], row.numpy())
        return rows
    if images is None and not spec.series:
        return [torch.from_numpy(reading.chips[0].data) for reading in readings]
    if images is None:
        first = readings[0].chips[0].data
        rows = batch_rows([(r.length, len(first), *r.grid.shape) for r in readings], torch_dtype(first.dtype))
        for row, reading in zip(rows, readings, strict=True):
            for t, chip in enumerate(reading.chips):
                row[t].numpy()[:] = chip.data
    else:
        rows = images.unbind(0)
    if spec.series:
        for row, reading in zip(rows, readings, strict=True):
            for t in range(len(reading.chips), reading.length):  # padding
                row[t].numpy()[:] = np.array(reading.chips[0].fill, reading.chips[0].data.dtype)[:, None, None]
    return rows


def _validity(spec: SampleSpec, readings: Sequence[ChipSeries]) -> Sequence[torch.Tensor]:
    if spec.valid_per_band:
        return _flags(spec, readings, len(readings[0].chips[0].valid), lambda chip: chip.valid)
    return _flags(spec, readings, 1, lambda chip: chip.valid.all(axis=0, keepdims=True))


def _flags(spec: SampleSpec, readings: Sequence[ChipSeries], count: int, of: Any) -> Sequence[torch.Tensor]:
    """A boolean `[count, H, W]` or `[T, count, H, W]` a sample, False where it is padded."""
    lead = [(r.length,) if spec.series else () for r in readings]
    rows = batch_rows([(*t, count, *r.grid.shape) for t, r in zip(lead, readings, strict=True)], torch.bool)
    for row, reading in zip(rows, readings, strict=True):
        dates = row if spec.series else row[None]
        for t, chip in enumerate(reading.chips):
            dates[t].numpy()[:] = of(chip)
        dates[len(reading.chips) :] = False
    return rows


def _repeated(spec: SampleSpec, mask: npt.NDArray[np.bool_], length: int) -> torch.Tensor:
    return torch.from_numpy(np.repeat(mask[None], length, axis=0) if spec.series else mask)


def _fill_outside(spec: SampleSpec, pixels: torch.Tensor, reading: ChipSeries) -> None:
    if spec.rule is not None:
        pixels.numpy()[~reading.inside] = spec.rule.invalid
        return
    fill = np.array(reading.chips[0].fill, pixels.numpy().dtype)
    np.copyto(pixels.numpy(), fill[:, None, None], where=~reading.inside)


def _scales(spec: SampleSpec, readings: Sequence[ChipSeries], name: str, unknown: float) -> Sequence[torch.Tensor]:
    found = []
    for reading in readings:
        stated = [[unknown if v is None else v for v in getattr(m.scaling, name)] for m in reading.chips]
        stated += [[unknown] * len(stated[0])] * (reading.length - len(stated))
        found.append(stated if spec.series else stated[0])
    return _floats(found, torch.float32)


def _identity(
    spec: SampleSpec, queries: Sequence[Any], times: Sequence[slice], readings: Sequence[ChipSeries]
) -> dict[str, Sequence[Any]]:
    """Where, when, from which record and for whom."""
    slices = [snapped_slices(reading.grid, t) for reading, t in zip(readings, times, strict=True)]
    columns: dict[str, Sequence[Any]] = {}
    if TENSOR_ONLY:
        columns["bounds"] = _floats([_bounds(part) for part in slices])
    else:
        columns["bounds"] = slices
        columns["crs"] = [pyproj_crs(str(reading.grid.crs)) for reading in readings]
    if spec.with_epsg:
        columns["epsg"] = _integers([[epsg_code(reading.grid.crs) or 0] for reading in readings])
    columns["transform"] = _floats([tuple(reading.grid.transform)[:9] for reading in readings])
    padding = [r.length - len(r.chips) for r in readings]
    columns["time"] = _floats([[*r.seconds, *[math.nan] * pad] for r, pad in zip(readings, padding, strict=True)])
    rows = [[-1 if m.record is None else m.record.row for m in r.chips] for r in readings]
    columns["record"] = _integers([[*row, *[-1] * pad] for row, pad in zip(rows, padding, strict=True)])
    if spec.series:
        there = [[True] * len(r.chips) + [False] * pad for r, pad in zip(readings, padding, strict=True)]
        columns["time_valid"] = [torch.tensor(flags) for flags in there]
        columns["length"] = _integers([[len(r.chips)] for r in readings])
    return columns | _of_aois(queries)


def _of_aois(queries: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Which AOI, its label, and its draw; only where every query has them."""
    columns = draw_columns(queries)
    rows = [query.row if isinstance(query, AOI) else -1 for query in queries]
    if min(rows) >= 0:
        columns["aoi"] = _integers([[row] for row in rows])
    labels = [query.label if isinstance(query, AOI) else None for query in queries]
    if None not in labels:
        whole = all(isinstance(label, (int, np.integer)) for label in labels)
        columns["label"] = _integers([[v] for v in labels]) if whole else _floats([[v] for v in labels], torch.float32)
    return columns


def draw_columns(queries: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """`draw` int64 `[3]` of each query: the seed, epoch and position that its chip is a function of.

    Nothing where a query was not drawn by a sampler.
    """
    draws = [query.draw if isinstance(query, AOI) else None for query in queries]
    return {} if None in draws else {"draw": _integers(draws)}


def _floats(values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Sequence[torch.Tensor]:
    return _tensors(values, dtype)


def _integers(values: Sequence[Any]) -> Sequence[torch.Tensor]:
    return _tensors(values, torch.int64)


def _tensors(values: Sequence[Any], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    if len({len(value) for value in values}) > 1:  # series of different lengths
        return [torch.tensor(value, dtype=dtype) for value in values]
    return torch.tensor(values, dtype=dtype).unbind(0)


def seconds_of(chip: Chip) -> float:
    """When a chip's first pixels were taken, POSIX seconds UTC; NaN = undated."""
    when = None if chip.record is None else chip.record.datetime
    return math.nan if when is None else _posix(when)


def _posix(when: Any) -> float:
    stamp = pd.Timestamp(when)
    return float((stamp.tz_localize("UTC") if stamp.tz is None else stamp).timestamp())


def snapped_slices(grid: Grid, t: slice) -> tuple[slice, slice, slice]:
    """The (x, y, t) slices of a chip's own grid."""
    xmin, ymin, xmax, ymax = grid.bounds
    xres, yres = grid.res
    return slice(xmin, xmax, xres), slice(ymin, ymax, yres), t


def bounds_tensor(slices: tuple[slice, slice, slice]) -> torch.Tensor:
    """float64 `[9]`: start, stop and step of x, y and t (POSIX seconds), TorchGeo 0.9's layout.

    float64, because float32 loses half a metre of a UTM northing and minutes of a time.
    """
    return torch.tensor(_bounds(slices), dtype=torch.float64)


def _bounds(slices: tuple[slice, slice, slice]) -> list[float]:
    x, y, t = slices
    seconds = [_posix(v) for v in (t.start, t.stop)]
    return [x.start, x.stop, x.step, y.start, y.stop, y.step, *seconds, 1 if t.step is None else t.step]
