"""torch's DataLoader with the right defaults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.utils.data

from rasteret_ml.train.collate import collate

__all__ = ["DataLoader"]


class DataLoader(torch.utils.data.DataLoader[Any]):
    """A `torch.utils.data.DataLoader` that collates natively, keeps its workers and counts epochs.

    Takes torch's arguments. Differences: `collate_fn` defaults to `rasteret_ml.collate`; `persistent_workers`
    to True where there are workers; and each pass over it is another epoch of its sampler (0, 1, 2 …), unless
    `sampler.set_epoch` chose one, as Lightning does.
    """

    def __init__(self, dataset: Any, batch_size: int | None = 1, shuffle: bool | None = None, **options: Any) -> None:
        options.setdefault("collate_fn", collate)
        options.setdefault("persistent_workers", options.get("num_workers", 0) > 0)
        # By keyword: Lightning rebuilds a loader from the names of its arguments.
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start_pass = getattr(self.sampler, "start_pass", None)
        if start_pass is not None:
            start_pass()
        return super().__iter__()
