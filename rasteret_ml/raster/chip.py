"""Pixels with their validity on a grid, and their scale and offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.geo.grid import Grid
from rasteret_ml.raster.plan import ChipPlan
from rasteret_ml.raster.raster_info import RasterInfo


@dataclass(frozen=True, slots=True)
class Scaling:
    """Scale and offset of a record's bands: value = stored * scale + offset."""

    scale: tuple[float | None, ...]  #: Per band; None = unknown, applied as 1.
    offset: tuple[float | None, ...]  #: Per band; None = unknown, applied as 0.

    def __str__(self) -> str:
        return f"scale {list(self.scale)}, offset {list(self.offset)}"

    @classmethod
    def none(cls, bands: int) -> Scaling:
        """Return a scaling of unknown scales and offsets for a number of bands."""
        return cls((None,) * bands, (None,) * bands)

    @property
    def numbers(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scales and offsets, with 1 and 0 for unknown ones."""
        return tuple(1.0 if v is None else v for v in self.scale), tuple(0.0 if v is None else v for v in self.offset)

    def values(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Convert stored pixels `[C, H, W]` to values."""
        scale, offset = np.array(self.numbers)[..., None, None]  # [C, 1, 1] each
        values: npt.NDArray[np.float64] = stored * scale + offset
        return values

    def restore(
        self,
        values: npt.NDArray[np.float64],
        like: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        nodata: Sequence[int | float | None] = (),
    ) -> npt.NDArray[Any]:
        """Convert values `[C, H, W]` to stored pixels of `like`'s type where `valid`; copy `like` elsewhere.

        Integers are rounded and clipped to the range of the type. A result that equals the nodata value of its band
        becomes the next integer, so that valid pixels stay valid.
        """
        scale, offset = np.array(self.numbers)[..., None, None]  # [C, 1, 1] each
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
    """Return the scale and offset of a plan's bands."""
    metadata = [band.source.metadata for band in plan.bands]
    return Scaling(tuple(m.scale for m in metadata), tuple(m.offset for m in metadata))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chip:
    """Pixels and their validity on a grid: numpy arrays, or torch tensors after `to_tensors`."""

    data: Any  #: Pixels `[C, H, W]` in the stored type; `fill` where there are none.
    valid: Any  #: Validity `[C, H, W]`: True = inside the raster, not nodata, not masked by the file.
    inside: Any  #: Pixels inside the geometry that was read `[H, W]`; all True for a window.
    grid: Grid  #: Grid of the pixels.
    bands: tuple[str, ...]  #: Band names along C.
    nodata: tuple[int | float | None, ...]  #: Nodata value of each band.
    covered: Any  #: Pixels inside a raster `[H, W]`, valid or not.
    #: Clear pixels `[H, W]`, according to the record that supplied each; None without a quality band.
    clear: Any = None
    record: RasterInfo | None = None  #: Record that supplied the first valid pixels; None if none did.
    scaling: Scaling = Scaling((), ())  #: Scale and offset of each band of that record.
    fill: tuple[int | float, ...] = ()  #: Value of missing pixels of each band: the first record's nodata, or 0.

    @property
    def valid_all(self) -> npt.NDArray[np.bool_]:
        """Pixels that are valid in all bands `[H, W]`."""
        valid: npt.NDArray[np.bool_] = np.all(np.asarray(self.valid), axis=0)
        return valid


def to_tensors(chip: Chip) -> Chip:
    """Return the chip with torch tensors of the same type, which share memory with the arrays.

    torch has no type for complex integers and big-endian arrays; it supports all other TIFF types.
    """
    import torch

    arrays = {name: getattr(chip, name) for name in ("data", "valid", "inside", "covered", "clear")}
    present = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in present.items()}
    return replace(chip, **tensors)
