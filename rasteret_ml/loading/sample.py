"""Mosaics to samples: dictionaries of tensors, as TorchGeo and Kornia expect them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torchgeo.datasets import GeoDataset

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, pyproj_crs, transform_geometries
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.mask import inside_mask
from rasteret_ml.loading.buffers import batch_buffer
from rasteret_ml.raster.mosaic import Mosaic
from rasteret_ml.sampling.aoi import AOI

__all__ = ["LabelRule", "Sample", "SampleForm", "TENSOR_ONLY", "bounds_tensor", "make_samples", "snapped_slices"]

Sample = dict[str, Any]
"""A sample; every value a tensor, but for `bounds` and `crs` under TorchGeo 0.8."""

TENSOR_ONLY = hasattr(GeoDataset, "_slice_to_tensor")
"""TorchGeo 0.9+ wants tensors alone; 0.8's own code needs `crs` and a slice as `bounds` in each item."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelRule:
    """How stored labels become a mask."""

    remap: tuple[npt.NDArray[Any], npt.NDArray[np.int64]] | None
    """Sorted stored values and the class of each; None = values are classes."""
    ignore_index: int
    """Class of what is invalid or not listed."""
    continuous: bool
    """Float labels: float32, NaN where invalid."""

    @classmethod
    def make(
        cls, bands: tuple[str, ...], dtype: np.dtype[Any], remap: dict[int, int] | None, ignore_index: int
    ) -> LabelRule:
        """Check and build a rule.

        Raises:
            UsageError: several label bands, or classes asked of a continuous raster.
        """
        if len(bands) != 1:
            raise UsageError(f"Labels are one band, not {list(bands)}.")
        continuous = dtype.kind == "f"
        if continuous and remap is not None:
            raise UsageError(f"remap= is for classes; these labels are {dtype}.")
        if dtype.kind == "c":
            raise UsageError(f"{dtype} labels have no meaning as classes or values.")
        table = None
        if remap is not None:
            keys = np.array(sorted(int(k) for k in remap))
            by_key = {int(k): int(v) for k, v in remap.items()}
            table = (keys, np.array([by_key[int(k)] for k in keys], np.int64))
        return cls(remap=table, ignore_index=int(ignore_index), continuous=continuous)

    @property
    def dtype(self) -> torch.dtype:
        """Type of `mask`."""
        return torch.float32 if self.continuous else torch.int64

    def apply(self, data: npt.NDArray[Any], valid: npt.NDArray[np.bool_], out: npt.NDArray[Any]) -> None:
        """Write `mask` `[H, W]` from one band `[H, W]`."""
        if self.continuous:
            out[:] = np.where(valid, data, np.nan)
            return
        classes = data.astype(np.int64)
        if self.remap is not None:
            keys, values = self.remap
            place = np.searchsorted(keys, classes).clip(max=len(keys) - 1)
            classes = np.where(keys[place] == classes, values[place], self.ignore_index)
        out[:] = np.where(valid, classes, self.ignore_index)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleForm:
    """What a dataset's samples hold."""

    rule: LabelRule | None
    """Makes them label samples; None = images."""
    mask_aoi: bool
    """Whether `mask_aoi` is in them."""
    all_touched: bool
    """For `mask_aoi`: whether pixels that the polygon touches are inside."""
    valid_per_band: bool
    """Whether `mask_valid` is `[C, H, W]` instead of its AND `[1, H, W]`."""
    with_scale: bool
    """Whether `scale` and `offset` are in them."""


def make_samples(
    form: SampleForm,
    queries: Sequence[Any],
    times: Sequence[slice],
    mosaics: Sequence[Mosaic],
    images: torch.Tensor | None,
) -> list[Sample]:
    """Samples by `design` 4.3, their tensors rows of one buffer a key where all chips are of one size.

    Args:
        form: What they hold.
        queries: What was asked for.
        times: Its time slices.
        mosaics: What was read.
        images: The buffer `[B, C, H, W]` that the mosaics' pixels are in, where there is one.
    """
    columns: dict[str, Sequence[Any]] = {}
    shapes = [mosaic.grid.shape for mosaic in mosaics]
    rule = form.rule
    if rule is not None:
        rows = columns["mask"] = _rows(shapes, rule.dtype)
        for row, mosaic in zip(rows, mosaics, strict=True):
            rule.apply(mosaic.data[0], mosaic.valid[0], row.numpy())
    else:
        columns["image"] = [torch.from_numpy(m.data) for m in mosaics] if images is None else images.unbind(0)
    valids = [len(m.valid) if form.valid_per_band else 1 for m in mosaics]
    rows = columns["mask_valid"] = _rows([(n, *s) for n, s in zip(valids, shapes, strict=True)], torch.bool)
    for row, mosaic in zip(rows, mosaics, strict=True):
        if form.valid_per_band:
            row.numpy()[:] = mosaic.valid
        else:
            np.all(mosaic.valid, axis=0, out=row.numpy()[0])
    if form.mask_aoi:
        columns["mask_aoi"] = [
            torch.from_numpy(_aoi_mask(query, mosaic.grid, form.all_touched)[None])
            for query, mosaic in zip(queries, mosaics, strict=True)
        ]
    if form.with_scale and rule is None:
        columns["scale"] = _floats([[1.0 if v is None else v for v in m.scale] for m in mosaics], torch.float32)
        columns["offset"] = _floats([[0.0 if v is None else v for v in m.offset] for m in mosaics], torch.float32)
    columns |= _identity(queries, times, mosaics)
    return [{name: column[i] for name, column in columns.items()} for i in range(len(mosaics))]


def _identity(queries: Sequence[Any], times: Sequence[slice], mosaics: Sequence[Mosaic]) -> dict[str, Sequence[Any]]:
    """Where, when and from which record."""
    slices = [snapped_slices(mosaic.grid, t) for mosaic, t in zip(mosaics, times, strict=True)]
    columns: dict[str, Sequence[Any]] = {}
    if TENSOR_ONLY:
        columns["bounds"] = _floats([_bounds(part) for part in slices])
    else:
        columns["bounds"] = slices
        columns["crs"] = [pyproj_crs(str(mosaic.grid.crs)) for mosaic in mosaics]
    columns["transform"] = _floats([tuple(mosaic.grid.transform)[:9] for mosaic in mosaics])
    columns["time"] = _floats([[_seconds(mosaic)] for mosaic in mosaics])
    rows = [[-1 if mosaic.record is None else mosaic.record.info.row] for mosaic in mosaics]
    columns["record"] = torch.tensor(rows, dtype=torch.int64).unbind(0)
    aois = [[query.row] if isinstance(query, AOI) and query.row >= 0 else None for query in queries]
    if None not in aois:
        columns["aoi"] = torch.tensor(aois, dtype=torch.int64).unbind(0)
    return columns


def _rows(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Memory for a tensor per sample, side by side where they are of one shape."""
    if len(set(shapes)) == 1:
        return batch_buffer((len(shapes), *shapes[0]), dtype).unbind(0)
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def _floats(values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> Sequence[torch.Tensor]:
    return torch.tensor(values, dtype=dtype).unbind(0)


def _seconds(mosaic: Mosaic) -> float:
    when = None if mosaic.record is None else mosaic.record.datetime
    return math.nan if when is None else pd.Timestamp(when).tz_localize("UTC").timestamp()


def _aoi_mask(query: Any, grid: Grid, all_touched: bool) -> npt.NDArray[np.bool_]:
    geometry = query.geometry if isinstance(query, AOI) else None
    if geometry is None:
        return np.ones(grid.shape, bool)
    if query.crs is not None and query.crs != grid.crs:
        geometry = transform_geometries(np.array([geometry], dtype=object), query.crs, crs_text(grid.crs))[0]
    return inside_mask(geometry, grid, all_touched=all_touched)


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
    seconds = [pd.Timestamp(v).tz_localize("UTC").timestamp() for v in (t.start, t.stop)]
    return [x.start, x.stop, x.step, y.start, y.stop, y.step, *seconds, 1 if t.step is None else t.step]
