"""Pixels with their validity on a grid, and what they are worth: scale and offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.raster_info import RasterInfo

if TYPE_CHECKING:
    import torch


__all__ = ["Chip", "Scaling", "scaling_of", "to_tensors"]


@dataclass(frozen=True, slots=True)
class Scaling:
    """Scale and offset that a record states for its bands: value = stored * scale + offset."""

    scale: tuple[float | None, ...]
    """Per band; None = not stated (1)."""
    offset: tuple[float | None, ...]
    """Per band; None = not stated (0)."""

    def __str__(self) -> str:
        return f"scale {list(self.scale)}, offset {list(self.offset)}"

    @classmethod
    def none(cls, bands: int) -> Scaling:
        """Return a scaling that states nothing for `bands` bands."""
        return cls((None,) * bands, (None,) * bands)

    @property
    def numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scales and offsets, with defaults where none is stated."""
        return tuple(1.0 if v is None else v for v in self.scale), tuple(0.0 if v is None else v for v in self.offset)

    def factors(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return scale and offset `[C, 1, 1]`, with defaults where none is stated."""
        scale, offset = self.numbers
        return np.array(scale)[:, None, None], np.array(offset)[:, None, None]

    def values(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Convert stored pixels `[C, H, W]` to values."""
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
        """Convert values `[C, H, W]` to stored pixels of `like`'s type where `valid`; keep `like` elsewhere.

        Integers are rounded and clipped to the type's range; a result equal to its band's nodata moves to the next
        number, so that a valid pixel stays valid.
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
    """Return the scale and offset that a plan's record states."""
    found = [band.source.metadata for band in plan.bands]
    return Scaling(tuple(m.scale for m in found), tuple(m.offset for m in found))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chip:
    """Pixels and their validity on a grid: numpy arrays, or torch tensors after `to_tensors`."""

    data: Any
    """Pixels `[C, H, W]` of native dtype; `fill` where there are none."""
    valid: Any
    """Validity `[C, H, W]`: True = inside the scene, not nodata, not masked by the file."""
    inside: Any
    """Pixels inside the requested geometry `[H, W]`; all True for a window."""
    grid: Grid
    """Where the pixels lie."""
    bands: tuple[str, ...]
    """Names along C."""
    nodata: tuple[int | float | None, ...]
    """Declared nodata of each band."""
    covered: Any
    """Pixels inside a scene's raster `[H, W]`, valid or not."""
    clear: Any = None
    """Clear pixels `[H, W]`, by the record that supplied each; None without a quality band."""
    record: RasterInfo | None = None
    """The record that supplied the first valid pixels; None where none did."""
    scaling: Scaling = Scaling((), ())
    """Scale and offset of each band, as that record states them."""
    fill: tuple[int | float, ...] = ()
    """Value of missing pixels, per band: the first record's nodata, or 0."""

    @property
    def valid_all(self) -> npt.NDArray[np.bool_]:
        """Validity of all bands (AND) `[H, W]`."""
        valid: npt.NDArray[np.bool_] = np.all(np.asarray(self.valid), axis=0)
        return valid


def to_tensors(chip: Chip) -> Chip:
    """Return the chip with torch tensors that share the arrays' memory; native dtype, never promoted.

    torch has no dtype for big-endian or complex integer samples; every other TIFF type has one.
    """
    import torch

    def tensor(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return replace(
        chip,
        data=tensor(chip.data),
        valid=tensor(chip.valid),
        inside=tensor(chip.inside),
        covered=tensor(chip.covered),
        clear=None if chip.clear is None else tensor(chip.clear),
    )
