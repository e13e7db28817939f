"""Pixels with their validity on a grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.grid import Grid

if TYPE_CHECKING:
    import torch

__all__ = ["Chip", "to_tensors"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chip:
    """What a read gives; arrays, or torch tensors after `to_tensors`."""

    data: Any
    """Pixels `[C, H, W]`, native dtype: as the file holds them, and the fill value where there are none."""
    valid: Any
    """Data truth `[C, H, W]`, True = inside the scene, not nodata, not masked by the file."""
    inside: Any
    """Inside the geometry that was asked for `[H, W]`; all True for a window."""
    grid: Grid
    """Where the pixels lie."""
    bands: tuple[str, ...]
    """Names along C."""
    nodata: tuple[int | float | None, ...]
    """Declared nodata of each band."""
    covered: Any
    """Inside the scene's raster `[H, W]`, whatever its pixels say."""

    @property
    def valid_all(self) -> npt.NDArray[np.bool_]:
        """Validity over all bands (AND) `[H, W]`."""
        valid: npt.NDArray[np.bool_] = np.all(np.asarray(self.valid), axis=0)
        return valid


def to_tensors(chip: Chip) -> Chip:
    """The same chip with torch tensors that share the arrays' memory; native dtype, never promoted.

    torch has no dtype for big-endian or complex integer samples; every other TIFF type has one.
    """
    import torch

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return Chip(
        data=tensor(chip.data),
        valid=tensor(chip.valid),
        inside=tensor(chip.inside),
        grid=chip.grid,
        bands=chip.bands,
        nodata=chip.nodata,
        covered=tensor(chip.covered),
    )
