"""A check for any loader: resumed at any step, it gives the same remaining batches, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["batch_digest", "check_resume"]

_MAX_STATE_BYTES = 1024
"""Of a state as JSON."""


def batch_digest(batch: Mapping[str, Any]) -> str:
    """Return a digest of the keys of a batch, and of the dtype, shape and bytes of its tensors."""
    sha = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        sha.update(key.encode())
        if isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous().numpy()
            sha.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()


def check_resume(
    make: Callable[[], Any],
    *,
    make_resumed: Callable[[], Any] | None = None,
    epochs: int = 2,
    stops: Iterable[int] | None = None,
) -> int:
    """Stop a loader, restore its state in another, and compare the rest with an uninterrupted run.

    Args:
        make: Makes the loader that is stopped; all that it makes must be alike.
        make_resumed: Makes the loader that resumes, which may have other workers; default `make`.
        epochs: Epochs of the whole run.
        stops: Numbers of batches, counted over all epochs, after which to stop; default all, 0 included.

    Returns:
        The number of stops.

    Raises:
        AssertionError: the rest differs, an epoch has no batches, or a state takes 1 kB or more.
    """
    digests, states, ends = _whole_run(make(), epochs)
    positions = sorted(set(range(len(digests) + 1) if stops is None else stops))
    for position in positions:
        text = json.dumps(states[position])
        assert len(text) < _MAX_STATE_BYTES, f"a state of {len(text)} bytes: {text}"
        loader = (make_resumed or make)()
        loader.load_state_dict(json.loads(text))
        rest: list[str] = []
        while len(rest) < len(digests) - position:
            before = len(rest)
            rest += [batch_digest(batch) for batch in loader]
            # Resumed at the end of an epoch, a loader has no batches left in it.
            assert len(rest) > before or position + before in ends, "an epoch without a batch"
        assert rest == digests[position:], f"resumed after batch {position}, the rest differs (state {text})"
    return len(positions)


def _whole_run(loader: Any, epochs: int) -> tuple[list[str], list[dict[str, Any]], set[int]]:
    """Return digests of all batches, the states before the first and after each, and the positions of epoch ends."""
    digests: list[str] = []
    states, ends = [loader.state_dict()], set()
    for _ in range(epochs):
        for batch in loader:
            digests.append(batch_digest(batch))
            states.append(loader.state_dict())
        ends.add(len(digests))
    return digests, states, ends
