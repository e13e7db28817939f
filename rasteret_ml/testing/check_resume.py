"""The resume law, as a check for any loader: taken up at any step, the rest is the same, byte for byte."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = ["batch_digest", "check_resume"]

_MOST_BYTES = 1024
"""Of a state as JSON."""


def batch_digest(batch: Mapping[str, Any]) -> str:
    """A digest of all keys of a batch, and of the type, shape and bytes of their tensors."""
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
    restored: Callable[[], Any] | None = None,
    epochs: int = 2,
    stops: Iterable[int] | None = None,
) -> int:
    """Stop a loader, restore its state in a fresh one, and compare the rest with a run that was never stopped.

    Args:
        make: Makes the loader that is stopped; each call a fresh one, all alike.
        restored: Makes the one that goes on, which may have other workers, or gives the same one each time; default
            `make`.
        epochs: Passes of the whole run.
        stops: After how many batches, counted over all passes; default after each, and before the first.

    Returns:
        The number of stops.

    Raises:
        AssertionError: a rest that differs, a pass of another length, or a state of 1 kB and more.
    """
    whole, states = _whole_run(make(), epochs)
    flat = [digest for part in whole for digest in part]
    wanted = sorted(set(range(len(flat) + 1) if stops is None else stops))
    for seen in wanted:
        text = json.dumps(states[seen])
        assert len(text) < _MOST_BYTES, f"a state of {len(text)} bytes: {text}"
        loader = (restored or make)()
        loader.load_state_dict(json.loads(text))
        rest: list[str] = []
        while len(rest) < len(flat) - seen:
            before = len(rest)
            rest += [batch_digest(batch) for batch in loader]
            assert len(rest) > before or seen + before in _ends(whole), "a pass without a batch"
        assert rest == flat[seen:], f"taken up after batch {seen}, the rest differs (state {text})"
    return len(wanted)


def _whole_run(loader: Any, epochs: int) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Digests of the batches of each pass, and the states before the first batch and after each."""
    passes: list[list[str]] = []
    states = [loader.state_dict()]
    for _ in range(epochs):
        passes.append([])
        for batch in loader:
            passes[-1].append(batch_digest(batch))
            states.append(loader.state_dict())
    return passes, states


def _ends(whole: list[list[str]]) -> set[int]:
    """Batches seen at the end of each pass: there a pass that is taken up has none left."""
    ends, seen = set(), 0
    for part in whole:
        seen += len(part)
        ends.add(seen)
    return ends
