"""Which pixels are valid: GDAL's rules (RFC 15), and one more: NaN never is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["equals_nodata", "valid_pixels"]

_NEAR = 2 * float(np.finfo(np.float32).eps)


def valid_pixels(
    data: npt.NDArray[Any],
    masked: npt.NDArray[np.bool_] | None,
    nodata: int | float | None,
) -> npt.NDArray[np.bool_]:
    """Validity of pixels `[h, w]`.

    Args:
        data: Stored values.
        masked: What the file's mask or alpha says (True = valid), None where it says nothing.
        nodata: The value that stands for no data, None where the mask decides alone.
    """
    valid = np.ones(data.shape, bool) if masked is None else masked.copy()
    if nodata is not None:
        valid &= ~equals_nodata(data, nodata)
    if data.dtype.kind in "fc":
        valid &= ~np.isnan(data)
    return valid


def equals_nodata(data: npt.NDArray[Any], nodata: int | float) -> npt.NDArray[np.bool_]:
    """Where `data` is `nodata`.

    Integers are compared exactly. Floats as GDAL's nodata mask does (`ARE_REAL_EQUAL` in gdal_priv_templates.hpp):
    equal, or closer than 2 * FLT_EPSILON * |a + b|, also for doubles; of complex numbers the real part.
    """
    if data.dtype.kind in "iu":
        same: npt.NDArray[np.bool_] = data == nodata
        return same
    values = data.real if data.dtype.kind == "c" else data
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = values.dtype.type(nodata)
        same = values == wanted
        if wanted == 0 or not np.isfinite(wanted):
            return same
        # Few pixels are near without being equal: the exact rule is worked out for those alone. Where a + b
        # overflows, everything of the same sign is near.
        limits = np.finfo(values.dtype)
        huge = abs(wanted) >= limits.max * limits.eps / 4  # the sum with a large value of the same sign overflows
        reach = np.inf if huge else abs(wanted) * values.dtype.type(3 * _NEAR)
        near = (values * np.sign(wanted) > 0) & ~same if huge else (abs(values - wanted) <= reach) & ~same
        if near.any():
            close = values[near]
            limit = np.float32(_NEAR / 2) * abs(close + wanted) * values.dtype.type(2)
            same[near] = abs(close - wanted) < limit
    return same
