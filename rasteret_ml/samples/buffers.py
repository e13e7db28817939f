"""One buffer a batch: samples are views of it, so that collating copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["batch_buffer", "side_by_side", "torch_dtype"]


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The torch type of a numpy one."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def batch_buffer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for a batch; in a worker shared, so that handing it over sends no bytes."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    count = int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    # With its shape at once: rows of a view would be views of the flat memory, not of the batch.
    strides = torch.empty(tuple(shape), dtype=dtype, device="meta").stride()
    return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), strides)


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
