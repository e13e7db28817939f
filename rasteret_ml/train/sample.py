"""Mosaics to samples: dictionaries of tensors, as TorchGeo and Kornia expect them."""

from __future__ import annotations

import math
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
from rasteret_ml.raster.mosaic import Mosaic
from rasteret_ml.sampling.aoi import AOI

__all__ = ["LabelRule", "Sample", "TENSOR_ONLY", "bounds_tensor", "make_sample", "snapped_slices"]

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

    def apply(self, data: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> torch.Tensor:
        """`mask` `[H, W]` from one band `[H, W]`."""
        if self.continuous:
            return torch.from_numpy(np.where(valid, data, np.nan).astype(np.float32))
        classes = data.astype(np.int64)
        if self.remap is not None:
            keys, values = self.remap
            place = np.searchsorted(keys, classes).clip(max=len(keys) - 1)
            classes = np.where(keys[place] == classes, values[place], self.ignore_index)
        return torch.from_numpy(np.where(valid, classes, self.ignore_index))


def make_sample(
    mosaic: Mosaic,
    query: Any,
    t: slice,
    *,
    rule: LabelRule | None,
    mask_aoi: bool,
    all_touched: bool,
    valid_per_band: bool,
    with_scale: bool,
) -> Sample:
    """One sample by `design` 4.3; `rule` makes it a label sample."""
    sample: Sample = {}
    valid = mosaic.valid if valid_per_band else mosaic.valid.all(axis=0, keepdims=True)
    if rule is None:
        sample["image"] = torch.from_numpy(mosaic.data)
    else:
        sample["mask"] = rule.apply(mosaic.data[0], mosaic.valid[0])
    sample["mask_valid"] = torch.from_numpy(valid)
    if mask_aoi:
        sample["mask_aoi"] = torch.from_numpy(_aoi_mask(query, mosaic.grid, all_touched)[None])
    if with_scale and rule is None:
        sample["scale"] = torch.tensor([1.0 if v is None else v for v in mosaic.scale], dtype=torch.float32)
        sample["offset"] = torch.tensor([0.0 if v is None else v for v in mosaic.offset], dtype=torch.float32)
    slices = snapped_slices(mosaic.grid, t)
    if TENSOR_ONLY:
        sample["bounds"] = bounds_tensor(slices)
    else:
        sample["bounds"] = slices
        sample["crs"] = pyproj_crs(str(mosaic.grid.crs))
    sample["transform"] = torch.tensor(tuple(mosaic.grid.transform)[:9], dtype=torch.float64)
    record = mosaic.record
    when = None if record is None else record.datetime
    seconds = math.nan if when is None else pd.Timestamp(when).tz_localize("UTC").timestamp()
    sample["time"] = torch.tensor([seconds], dtype=torch.float64)
    sample["record"] = torch.tensor([-1 if record is None else record.info.row], dtype=torch.int64)
    if isinstance(query, AOI) and query.row >= 0:
        sample["aoi"] = torch.tensor([query.row], dtype=torch.int64)
    return sample


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
    x, y, t = slices
    seconds = [pd.Timestamp(v).tz_localize("UTC").timestamp() for v in (t.start, t.stop)]
    values = [x.start, x.stop, x.step, y.start, y.stop, y.step, *seconds, 1 if t.step is None else t.step]
    return torch.tensor(values, dtype=torch.float64)
