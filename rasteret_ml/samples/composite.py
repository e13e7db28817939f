"""Reduce many dates to one image, from valid and clear pixels only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError
from rasteret_ml.raster.chip import Scaling

#: Median or mean of each band, or the pixel of the date with the largest (a - b) / (a + b) of two bands.
CompositeKind = Literal["median", "mean", "max_index"]

_NIR, _RED = ("B08", "B8", "nir", "NIR"), ("B04", "B4", "red", "RED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """How to reduce the dates of a pixel to one value.

    Example:
        >>> Composite.parse("max_ndvi", ["B04", "B08"])
        Composite(kind='max_index', bands=(1, 0))
    """

    kind: CompositeKind  #: The reduction.
    bands: tuple[int, int] = (0, 0)  #: For `max_index`: indices along C of a and b.

    @classmethod
    def parse(cls, composite: Composite | str | Mapping[str, Any] | None, bands: Sequence[str]) -> Composite | None:
        """Return a composite from "median", "mean", "max_ndvi" or {"max_index": (band a, band b)}, for these bands.

        UsageError: unknown composite, or a band that is not in `bands`.
        """
        if composite is None or isinstance(composite, Composite):
            return composite
        if isinstance(composite, Mapping) and list(composite) == ["max_index"] and len(composite["max_index"]) == 2:
            a, b = (str(band) for band in composite["max_index"])
            return cls(kind="max_index", bands=(_band_index(bands, (a,)), _band_index(bands, (b,))))
        if composite == "max_ndvi":
            return cls(kind="max_index", bands=(_band_index(bands, _NIR), _band_index(bands, _RED)))
        if composite in get_args(CompositeKind) and composite != "max_index":
            return cls(kind=composite)  # type: ignore[arg-type]
        raise UsageError(
            f"composite must be 'median', 'mean', 'max_ndvi' or {{'max_index': (band, band)}}, got {composite!r}."
        )

    def dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """Return the type of the result: `stored` for `max_index` and floats, else float32 (float64 for 8 bytes)."""
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
        """Reduce stored values `[T, C, H, W]`, all of one scale and offset, to values and validity `[C, H, W]`.

        Also returns which pixels are made of clear values `[H, W]`: `clear` is `[T, H, W]`, and pixels that are clear
        at no date use their valid values. Invalid pixels hold the values of the first date. The index is computed with
        `scaling` (None = of stored values). UsageError: complex pixels.
        """
        if data.dtype.kind == "c":
            raise UsageError(f"A composite must be made of real numbers, got {data.dtype}; read single dates instead.")
        used = valid
        if clear is not None:
            is_clear = clear & valid.all(axis=1)
            any_clear = np.asarray(is_clear.any(axis=0))
            used = np.where(any_clear, valid & is_clear[:, None], valid)
            clear = any_clear
        out = data[0].astype(self.dtype(data.dtype))
        if self.kind == "max_index":
            return *self._max_index(data, used, out, scaling or Scaling.none(data.shape[1])), clear
        known = np.asarray(used.any(axis=0))
        if self.kind == "median":
            result = _median(data, used)
        else:
            result = np.where(used, data, 0).astype(np.float64).sum(axis=0) / np.maximum(used.sum(axis=0), 1)
        out[known] = result[known]
        return out, known, clear

    def _max_index(
        self, data: npt.NDArray[Any], used: npt.NDArray[np.bool_], out: npt.NDArray[Any], scaling: Scaling
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        complete = used.all(axis=1)
        scale, offset = scaling.numbers
        a, b = (data[:, i] * scale[i] + offset[i] for i in self.bands)
        with np.errstate(divide="ignore", invalid="ignore"):
            index = np.where(a + b == 0, 0.0, (a - b) / (a + b))
        # Any complete date is better than an incomplete one, also without an index.
        index = np.where(complete, np.where(np.isfinite(index), index, np.finfo(np.float64).min), -np.inf)
        best = index.argmax(axis=0)
        known = np.broadcast_to(complete.any(axis=0), out.shape).copy()
        np.copyto(out, np.take_along_axis(data, best[None, None], axis=0)[0], where=known)
        return out, known


def _band_index(bands: Sequence[str], names: Sequence[str]) -> int:
    index = next((i for i, band in enumerate(bands) if band in names), None)
    if index is None:
        raise UsageError(
            f"bands must include one of {', '.join(names)} for this composite, got {', '.join(bands)}; add it, or name "
            "two bands: composite={'max_index': (band, band)}."
        )
    return index


def _median(data: npt.NDArray[Any], used: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the median along T; sorting as infinity puts unused values last."""
    values = np.sort(np.where(used, data.astype(np.float64), np.inf), axis=0)
    count = used.sum(axis=0)
    low = np.take_along_axis(values, np.maximum((count - 1) // 2, 0)[None], axis=0)[0]
    high = np.take_along_axis(values, np.minimum(count // 2, len(values) - 1)[None], axis=0)[0]
    with np.errstate(invalid="ignore"):
        median: npt.NDArray[np.float64] = (low + high) / 2
    return median
