"""Stored labels to a mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rasteret_ml.errors import UsageError

__all__ = ["LabelRule"]


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
        cls, bands: tuple[str, ...], dtype: np.dtype[Any], remap: Mapping[int, int] | None, ignore_index: int
    ) -> LabelRule:
        """Check and build a rule.

        Raises:
            UsageError: several label bands, or classes asked of a continuous raster.
        """
        if len(bands) != 1:
            raise UsageError(
                f"Labels are one band, not {list(bands)}; join several heads with `&`, each with its key=."
            )
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

    @property
    def invalid(self) -> float | int:
        """What stands where there is no label."""
        return float("nan") if self.continuous else self.ignore_index
