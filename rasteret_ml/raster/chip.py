"""Pixels with their validity on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.plan import ChipPlan

if TYPE_CHECKING:
    import torch


__all__ = ["Chip", "Scaling", "scaling_of", "to_tensors"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """What a record states of its bands."""

    scale: tuple[float | None, ...]
    """Of each band; None = not stated (1)."""
    offset: tuple[float | None, ...]
    """Of each band; None = not stated (0)."""

    def __str__(self) -> str:
        return f"scale {list(self.scale)}, offset {list(self.offset)}"

    @classmethod
    def none(cls, bands: int) -> Scaling:
        """Nothing stated."""
        return cls((None,) * bands, (None,) * bands)

    @property
    def numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scales and offsets, what is not stated filled in."""
        return tuple(1.0 if v is None else v for v in self.scale), tuple(0.0 if v is None else v for v in self.offset)

    def factors(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Scale and offset `[C, 1, 1]`, what is not stated filled in."""
        scale, offset = self.numbers
        return np.array(scale)[:, None, None], np.array(offset)[:, None, None]

    def values(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Stored pixels `[C, H, W]` as values."""
        scale, offset = self.factors()
        values: npt.NDArray[np.float64] = stored * scale + offset
        return values

    def restore(
        self,
        values: npt.NDArray[np.float64],
        like: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        nodata: Sequence[int | float | None] = (),
    ) -> npt.NDArray[Any]:
        """Values `[C, H, W]` as stored pixels of `like`'s type where `valid`, and `like` elsewhere.

        Integers are rounded and kept within the type's range; one that would be its band's nodata becomes the next
        number beside it, so that what is valid goes on looking so.
        """
        scale, offset = self.factors()
        stored = (values - offset) / scale
        if like.dtype.kind in "iu":
            limits = np.iinfo(like.dtype)
            stored = np.clip(np.rint(stored), limits.min, limits.max)
            for band, reserved in zip(stored, nodata, strict=False):
                if reserved is not None:
                    band[band == reserved] += 1 if reserved < limits.max else -1
        out = like.copy()
        out[valid] = stored[valid].astype(like.dtype)
        return out


def scaling_of(plan: ChipPlan) -> Scaling:
    """What a plan's record states."""
    found = [band.source.metadata for band in plan.bands]
    return Scaling(tuple(m.scale for m in found), tuple(m.offset for m in found))


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
