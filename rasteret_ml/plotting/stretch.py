"""Pixels of any type to 0..1 for the eye: a percentile stretch over what is valid."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError

__all__ = ["PERCENTILES", "stretch_limits", "stretched"]

PERCENTILES = (2.0, 98.0)
"""Percentiles of the valid pixels that become black and white."""

_FLAT = 0.5


def stretch_limits(
    image: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None = None,
    *,
    percentiles: tuple[float, float] = PERCENTILES,
    joint: bool = False,
) -> npt.NDArray[np.float64]:
    """What becomes black and what white in each band, float64 `[C, 2]`.

    Args:
        image: Pixels `[..., C, H, W]` of any real type; leading axes (dates) share their bands' limits.
        valid: True = counts; broadcasts against `image`. NaN and infinity never count.
        percentiles: Of the values that count, as `numpy.percentile` has them (linear). Where both are one value,
            the least and the greatest value serve.
        joint: One pair of limits for all bands, which keeps their balance.

    A band in which nothing counts gets (0, 1).

    Raises:
        UsageError: percentiles that are not 0 <= low < high <= 100, or complex pixels.
    """
    low, high = percentiles
    if not 0 <= low < high <= 100:
        raise UsageError(f"percentiles are (low, high) with 0 <= low < high <= 100, not {percentiles!r}.")
    if image.dtype.kind not in "buif":
        raise UsageError(f"{image.dtype} pixels have no brightness; give real numbers, such as their magnitude.")
    counts = np.ones(image.shape, bool) if valid is None else np.broadcast_to(valid, image.shape)
    if image.dtype.kind == "f":
        counts = counts & np.isfinite(image)
    if joint:
        return np.tile(_limits(image[counts], percentiles), (image.shape[-3], 1))
    pairs = [_limits(image[..., c, :, :][counts[..., c, :, :]], percentiles) for c in range(image.shape[-3])]
    return np.array(pairs, np.float64).reshape(-1, 2)


def stretched(image: npt.NDArray[Any], limits: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """`image` `[..., C, H, W]` with each band's `limits` `[C, 2]` brought to 0 and 1, float32, clipped.

    A band whose limits are one value becomes 0.5 throughout; NaN becomes 0.
    """
    low, high = (limits[:, i, None, None] for i in (0, 1))
    with np.errstate(invalid="ignore", over="ignore"):
        span = high - low
        scaled = (image.astype(np.float64) - low) / np.where(span > 0, span, 1.0)
        shown = np.where(span > 0, np.clip(scaled, 0.0, 1.0), _FLAT)
    return np.nan_to_num(shown).astype(np.float32)


def _limits(values: npt.NDArray[Any], percentiles: tuple[float, float]) -> tuple[float, float]:
    if not values.size:
        return 0.0, 1.0
    values = values.astype(np.float64)
    low, high = np.percentile(values, percentiles)
    if low == high:
        low, high = values.min(), values.max()
    return float(low), float(high)
