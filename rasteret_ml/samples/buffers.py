"""One buffer a batch: samples are views of it, so that collating copies nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["batch_buffer", "batch_buffers", "batch_rows", "side_by_side", "torch_dtype"]

_ALIGNED = 64
"""Bytes that tensors in one piece of memory begin at multiples of, as torch's own do."""


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch type of a numpy one."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def batch_buffer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for a batch; in a worker shared, so that handing it over sends no bytes."""
    return batch_buffers([(shape, dtype)])[0]


def batch_buffers(kinds: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[torch.Tensor]:
    """The same for several tensors, of these shapes and types; in a worker they lie in one piece of shared memory.

    Torch opens a connection to the worker for each piece that it is handed, which costs more than filling a small one.
    """
    if get_worker_info() is None:
        return [torch.empty(tuple(shape), dtype=dtype) for shape, dtype in kinds]
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    starts = [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(starts[-1])  # type: ignore[no-untyped-call]
    return [
        _placed(storage, start, tuple(shape), dtype) for start, (shape, dtype) in zip(starts[:-1], kinds, strict=True)
    ]


def batch_rows(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Memory for a tensor per sample, side by side where they are of one shape."""
    if len(set(shapes)) == 1:
        return batch_buffer((len(shapes), *shapes[0]), dtype).unbind(0)
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def _placed(storage: torch.UntypedStorage, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # With its shape at once: rows of a view would be views of the flat memory, not of the batch.
    strides = torch.empty(shape, dtype=dtype, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, start // dtype.itemsize, shape, strides)


def side_by_side(values: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor `[B, …]` whose rows `values` are, in order; None where they are not."""
    first = values[0]
    whole = first._base
    if whole is None or whole.shape != (len(values), *first.shape) or not whole.is_contiguous():
        return None
    step = first.numel()
    start = whole.storage_offset()
    for i, value in enumerate(values):
        if value._base is not whole or value.storage_offset() != start + i * step or value.shape != first.shape:
            return None
        lazy = value.is_conj() or value.is_neg()  # views of the same memory that mean other numbers
        if lazy or not value.is_contiguous() or value.dtype != whole.dtype or type(value) is not type(whole):
            return None
    return whole
