"""Many dates to one picture, from valid and clear pixels alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.raster.chip import Scaling

__all__ = ["Composite"]

CompositeKind = Literal["median", "mean", "max_index"]
"""The median or mean of each pixel's values, or the date at which (a - b) / (a + b) of two bands is largest."""

_NIR, _RED = ("B08", "B8", "nir", "NIR"), ("B04", "B4", "red", "RED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """How the dates of a pixel become one value."""

    kind: CompositeKind
    """What is taken."""
    bands: tuple[int, int] = (0, 0)
    """For `max_index`: places along C of a and b."""

    @classmethod
    def of(cls, composite: Composite | str | Mapping[str, Any] | None, bands: Sequence[str]) -> Composite | None:
        """From a name ("median", "mean", "max_ndvi") or {"max_index": (band a, band b)}, for these bands.

        Raises:
            UsageError: no such composite, or a band that is not among `bands`.
        """
        if composite is None or isinstance(composite, Composite):
            return composite
        if isinstance(composite, Mapping) and list(composite) == ["max_index"] and len(composite["max_index"]) == 2:
            a, b = (str(band) for band in composite["max_index"])
            return cls(kind="max_index", bands=(_place(bands, (a,)), _place(bands, (b,))))
        if composite == "max_ndvi":
            return cls(kind="max_index", bands=(_place(bands, _NIR), _place(bands, _RED)))
        if composite in get_args(CompositeKind) and composite != "max_index":
            return cls(kind=composite)  # type: ignore[arg-type]
        raise UsageError(
            f"composite= is 'median', 'mean', 'max_ndvi' or {{'max_index': (band, band)}}, not {composite!r}."
        )

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """Type of the result: the stored one of chosen pixels and floats, else float32 (float64 of 8-byte integers)."""
        if self.kind == "max_index" or stored.kind == "f":
            return stored
        return np.dtype(np.float64 if stored.itemsize > 4 else np.float32)

    def apply(
        self,
        data: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        clear: npt.NDArray[np.bool_] | None,
        scaling: Scaling | None = None,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_] | None]:
        """The composite of `[T, C, H, W]`.

        Args:
            data: Stored values of one scale and offset.
            valid: Validity of the same shape.
            clear: Clear pixels `[T, H, W]`, or None. A pixel that is clear at no date is made of its valid ones.
            scaling: What stored values stand for, of which an index is made; None = themselves.

        Returns:
            Values and validity `[C, H, W]`, and which pixels are made of clear ones `[H, W]`; invalid pixels hold
            what the first date holds.

        Raises:
            UsageError: complex pixels.
        """
        if data.dtype.kind == "c":
            raise UsageError(f"{data.dtype} pixels have no order and no median; take a composite of real bands.")
        used = valid
        if clear is not None:
            whole = clear & valid.all(axis=1)
            some = np.asarray(whole.any(axis=0))
            used = np.where(some, valid & whole[:, None], valid)
            clear = some
        out = data[0].astype(self.dtype(data.dtype))
        if self.kind == "max_index":
            return *self._chosen(data, used, out, scaling or Scaling.none(data.shape[1])), clear
        known = np.asarray(used.any(axis=0))
        found = _median(data, used) if self.kind == "median" else _mean(data, used)
        out[known] = found[known]
        return out, known, clear

    def _chosen(
        self, data: npt.NDArray[Any], used: npt.NDArray[np.bool_], out: npt.NDArray[Any], scaling: Scaling
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        whole = used.all(axis=1)
        scale, offset = scaling.numbers
        a, b = (data[:, i] * scale[i] + offset[i] for i in self.bands)
        with np.errstate(divide="ignore", invalid="ignore"):
            index = np.where(a + b == 0, 0.0, (a - b) / (a + b))
        index = np.where(whole & np.isfinite(index), index, -np.inf)
        best = np.where(whole.any(axis=0), np.where(whole, index, -np.inf).argmax(axis=0), 0)
        # Where all that is whole has an index of minus infinity, argmax may point at what is not.
        best = np.where(np.take_along_axis(whole, best[None], axis=0)[0], best, whole.argmax(axis=0))
        picked = np.take_along_axis(data, best[None, None], axis=0)[0]
        known = np.broadcast_to(whole.any(axis=0), out.shape).copy()
        np.copyto(out, picked, where=known)
        return out, known


def _place(bands: Sequence[str], names: Sequence[str]) -> int:
    found = next((i for i, band in enumerate(bands) if band in names), None)
    if found is None:
        raise UsageError(
            f"The composite needs one of the bands {', '.join(names)}, but there are {', '.join(bands)}; add it, or "
            "name two bands: composite={'max_index': (band, band)}."
        )
    return found


def _mean(data: npt.NDArray[Any], used: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    total = np.where(used, data, 0).astype(np.float64).sum(axis=0)
    mean: npt.NDArray[np.float64] = total / np.maximum(used.sum(axis=0), 1)
    return mean


def _median(data: npt.NDArray[Any], used: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The median of the values used; of an even number the mean of the middle two. Sorting puts the others last."""
    values = np.sort(np.where(used, data.astype(np.float64), np.inf), axis=0)
    count = used.sum(axis=0)
    low = np.take_along_axis(values, np.maximum((count - 1) // 2, 0)[None], axis=0)[0]
    high = np.take_along_axis(values, np.minimum(count // 2, len(values) - 1)[None], axis=0)[0]
    with np.errstate(invalid="ignore"):
        middle: npt.NDArray[np.float64] = (low + high) / 2
    return middle
