"""What makes two orders the same: small facts by name, that a saved state is held against."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rasteret_ml.errors import ResumeError

__all__ = ["Plan", "check_same_plan", "digest"]

Plan = dict[str, Any]
"""Facts by name: numbers and short text, digests of what is long. Survives JSON."""

_DIGITS = 12
"""Hexadecimal digits of a digest: 48 bits, for telling apart, not for security."""


def digest(*parts: Any) -> str:
    """A digest of arrays, text and bytes; of anything else its `repr`."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part)
            data = array.astype("S").tobytes() if array.dtype.kind == "U" else array.tobytes()
            sha.update(f"{array.dtype.kind}{array.shape}".encode())
        else:
            data = part if isinstance(part, bytes) else repr(part).encode()
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:_DIGITS]


def check_same_plan(saved: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    """Hold the plan of a saved state against the one that is to go on.

    Raises:
        ResumeError: they differ; the message names each difference.
    """
    names = [*own, *(name for name in saved if name not in own)]
    differences = [name for name in names if saved.get(name) != own.get(name)]
    if differences:
        told = "; ".join(
            f"{n}: {saved.get(n, 'not there')!r} then, {own.get(n, 'not there')!r} now" for n in differences
        )
        raise ResumeError(
            f"The saved state of {what} is of another plan, so its position means nothing here: {told}. Make the "
            "same one, or begin anew without the state."
        )
