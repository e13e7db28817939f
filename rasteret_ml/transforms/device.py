"""Batches to a device while it works at the ones before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from rasteret_ml.samples.sample import Sample

__all__ = ["device_batches", "to_device"]

_ON_HOST = ("bounds", "draw", "transform")
"""What the host reads: on the device it would have to wait for it. Some devices also have no float64."""


def device_batches(
    loader: Iterable[Sample],
    device: torch.device | str,
    normalize: Callable[[Sample], Sample] | None = None,
) -> Iterator[Sample]:
    """The loader's batches on a device, prepared there.

    Native pixels cross the bus (uint16 is half of float32), from pinned memory; `normalize` converts them on the
    device. On CUDA both run on a stream of their own, beside the steps that the device still works at when the next
    batch is asked for, and the caller's stream waits for them, not the host. So a loop should not itself wait for the
    device in each step (`loss.item()`), or there is nothing to work beside. Elsewhere this is `to_device` and
    `normalize`, batch by batch.

    Nothing is taken from the loader before it is asked for: what the loader says of its state after a batch is true.
    Give the loader `pin_memory=True`, so that a thread of its own pins; else it is done here. Lightning moves batches
    by itself, pinned and without blocking, and needs none of this.

    Args:
        loader: Of batches, dictionaries with tensors.
        device: Where to.
        normalize: What to do with each batch there: `functools.partial(rasteret_ml.normalize, mean=..., std=...)`, or a
            function that also augments.

    Yields:
        A batch, its tensors on the device, but for `draw`, `bounds` and `transform`, which are for the host.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    side = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]
    for batch in loader:
        if side is None:
            moved = to_device(batch, device)
            yield moved if normalize is None else normalize(moved)
            continue
        with torch.cuda.stream(side):
            moved = to_device(batch, device)
            moved = moved if normalize is None else normalize(moved)
        using = torch.cuda.current_stream(device)
        using.wait_stream(side)
        for value in moved.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                # Its memory came from the side stream, which must not have it again before the caller's is through.
                value.record_stream(using)
        yield moved


def to_device(batch: Sample, device: torch.device | str) -> Sample:
    """A batch with its tensors on a device, in their types; `draw`, `bounds` and `transform` stay on the host.

    The host does not wait: from memory that is not pinned, what goes to CUDA is pinned first. For a datamodule's
    `transfer_batch_to_device`.
    """
    device = torch.device(device)
    return {key: value if key in _ON_HOST else _moved(value, device) for key, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)
    return value.to(device)
