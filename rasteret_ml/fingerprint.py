"""Fingerprints: what decides an order of samples or a map, in short values that a saved state keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rasteret_ml.errors import ResumeError

Fingerprint = dict[str, Any]  #: Values by name: numbers, short text, and digests of what is long. Survives JSON.

_DIGITS = 12  # Hexadecimal digits of a digest: 48 bits tell things apart, but do not prevent forgery.


def digest(*values: Any) -> str:
    """Return the digest of arrays, text and bytes; any other value counts by its `repr`."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            array = np.ascontiguousarray(value)
            data = array.astype("S").tobytes() if array.dtype.kind == "U" else array.tobytes()
            sha.update(f"{array.dtype.kind}{array.shape}".encode())
        else:
            data = value if isinstance(value, bytes) else repr(value).encode()
        sha.update(len(data).to_bytes(8, "little"))
        sha.update(data)
    return sha.hexdigest()[:_DIGITS]


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Describe each value that differs between two fingerprints.

    >>> differences({"seed": 1, "size": [64, 64]}, {"seed": 2, "size": [64, 64]})
    ['seed: 1 then, 2 now']
    """
    return [
        f"{name}: {saved.get(name, 'not there')} then, {current.get(name, 'not there')} now"
        for name in dict.fromkeys([*current, *saved])
        if saved.get(name) != current.get(name)
    ]


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any], owner: str) -> None:
    """Check that a saved state belongs to the loader or sampler that is to resume from it.

    Args:
        saved: The fingerprint in the state.
        current: The fingerprint of the object that resumes.
        owner: What that object is, for the message.

    Raises:
        ResumeError: they differ; the message names each difference.
    """
    if found := differences(saved, current):
        raise ResumeError(
            f"The saved state must be of this {owner}, which differs in {'; '.join(found)}. Create the same {owner}, "
            "or start again without the state."
        )
