"""Batch buffers: samples are views of one tensor, so that collating them copies nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

_ALIGNMENT = 64  # Alignment of tensors that share memory, in bytes; the same as torch's allocator.


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return the torch type of a numpy type."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def batch_buffer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor; in a worker in shared memory, so that sending it copies nothing."""
    return batch_buffers([(shape, dtype)])[0]


def batch_buffers(specs: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """Return uninitialised tensors of these shapes and types; in a worker in one block of shared memory.

    Torch opens a connection to the worker for each block, which takes longer than filling a small one.
    """
    if get_worker_info() is None:
        return [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in specs]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs]
    starts = [0, *accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(starts[-1])  # type: ignore[no-untyped-call]
    buffers = []
    for start, (shape, dtype) in zip(starts[:-1], specs, strict=True):
        # Set the shape directly: rows of a reshaped view would have the flat memory as their base, not the batch.
        strides = torch.empty(tuple(shape), dtype=dtype, device="meta").stride()
        empty = torch.empty(0, dtype=dtype)
        buffers.append(empty.set_(storage, start // dtype.itemsize, tuple(shape), strides))
    return buffers


def batch_rows(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Return an uninitialised tensor per sample: rows of one buffer if all shapes are equal."""
    if len(set(shapes)) == 1:
        return batch_buffer((len(shapes), *shapes[0]), dtype).unbind(0)
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def stacked_base(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the tensor `[B, …]` whose rows are exactly `values`, in order; None if there is none."""
    first = values[0]
    base = first._base
    if base is None or base.shape != (len(values), *first.shape) or not base.is_contiguous():
        return None
    step, start = first.numel(), base.storage_offset()
    for i, value in enumerate(values):
        if value._base is not base or value.storage_offset() != start + i * step or value.shape != first.shape:
            return None
        lazy = value.is_conj() or value.is_neg()  # same memory, other numbers
        if lazy or not value.is_contiguous() or value.dtype != base.dtype or type(value) is not type(base):
            return None
    return base
