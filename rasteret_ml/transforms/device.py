"""Batches moved to a device while it works on earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from rasteret_ml.samples.sample import Sample

# Keys that the host reads: on the device it would have to wait for them. Some devices also lack float64.
_ON_HOST = ("bounds", "draw", "transform")


def device_batches(
    loader: Iterable[Sample], device: torch.device | str, normalize: Callable[[Sample], Sample] | None = None
) -> Iterator[Sample]:
    """Iterate over a loader's batches, moved to a device and normalised there.

        normalize = functools.partial(rm.normalize, mean=mean, std=std)
        for batch in rm.device_batches(loader, "cuda", normalize):
            loss(model(batch["image"]), batch["mask"]).backward()

    Stored pixels cross the bus (uint16 is half of float32) from pinned memory, and `normalize` converts them on the
    device. On CUDA both run on a separate stream, beside the steps that are still running when the next batch is
    requested; the caller's stream waits for them, the host does not. A loop that itself waits for the device in each
    step (`loss.item()`) gains nothing. On other devices this is `to_device` and `normalize`, batch by batch.

    No batch is taken from the loader ahead of time, so the loader's state after a batch is exact. Give the loader
    `pin_memory=True` to pin in a thread; otherwise it is done here. Lightning moves batches the same way and does not
    need this.

    Args:
        loader: Batches, dictionaries with tensors.
        device: Target device.
        normalize: Called with each batch on the device; it may also augment.

    Yields:
        Batches with their tensors on the device; `draw`, `bounds` and `transform` stay on the host.
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
        current = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for value in moved.values():
            if isinstance(value, torch.Tensor) and value.is_cuda:
                # The side stream owns the memory and must not reuse it before the caller's stream is done with it.
                value.record_stream(current)
        yield moved


def to_device(batch: Sample, device: torch.device | str) -> Sample:
    """Move a batch's tensors to a device in their dtypes; `draw`, `bounds` and `transform` stay on the host.

    The host does not wait: tensors in unpinned memory are pinned first. Meant for `transfer_batch_to_device`.
    """
    device = torch.device(device)
    return {key: value if key in _ON_HOST else _moved(value, device) for key, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor) or value.device == device:
        return value
    if device.type == "cuda" and value.device.type == "cpu":
        return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)
    return value.to(device)
