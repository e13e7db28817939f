"""torch's DataLoader with the right defaults: it looks ahead, and says where time went."""

from __future__ import annotations

import functools
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch.utils.data

from rasteret_ml.errors import UsageError
from rasteret_ml.loading.bottleneck import knobs_of
from rasteret_ml.loading.collate import collate
from rasteret_ml.loading.combine import ignored_class
from rasteret_ml.loading.lookahead import HintedBatch, Hints, end_lookahead
from rasteret_ml.loading.stats import LoaderStats, StatsBoard, TimedCollate, samples_in

__all__ = ["DataLoader"]


class DataLoader(torch.utils.data.DataLoader[Any]):
    """A `torch.utils.data.DataLoader` that looks ahead, collates natively, keeps its workers and counts epochs.

    Takes torch's arguments. Differences: `collate_fn` defaults to `rasteret_ml.collate`, which pads labels
    with the dataset's own `ignore_index` (of several heads the first one's); `persistent_workers` to True where there
    are workers; and each pass over it is another epoch of its sampler (0, 1, 2 …), unless
    `sampler.set_epoch` chose one, as Lightning does.

    Args:
        dataset: Ours, or any other (which then is not read ahead).
        batch_size: As torch's.
        shuffle: As torch's.
        lookahead: Batches beyond the one asked for that each worker (or the main process, where there are none) is
            told of and reads meanwhile; 0 = none.
        lookahead_bytes: Memory that all workers together may fill with batches read ahead; each reads one ahead
            in any case.
        **options: As torch's.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        *,
        lookahead: int = 4,
        lookahead_bytes: int = 1024 * 1024 * 1024,
        **options: Any,
    ) -> None:
        if lookahead < 0 or lookahead_bytes < 0:
            raise UsageError(f"lookahead and lookahead_bytes are not negative, but {lookahead}, {lookahead_bytes}.")
        if "collate_fn" not in options:
            ignored = ignored_class(dataset)
            options["collate_fn"] = collate if ignored is None else functools.partial(collate, ignore_index=ignored)
        options.setdefault("persistent_workers", options.get("num_workers", 0) > 0)
        self.lookahead, self.lookahead_bytes = int(lookahead), int(lookahead_bytes)
        # By keyword: Lightning rebuilds a loader from the names of its arguments.
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, **options)
        self._board = StatsBoard(self.num_workers)
        workers = max(1, self.num_workers)
        self._telling = _Telling(
            loader=uuid.uuid4().hex,
            workers=workers,
            lookahead=self.lookahead,
            limit=self.lookahead_bytes // workers,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for sampler in (self.sampler, getattr(self.batch_sampler, "sampler", None)):
            start_pass = getattr(sampler, "start_pass", None)
            if start_pass is not None:
                start_pass()
                break
        self._telling.epoch += 1
        return _Pass(self, super().__iter__())

    @property
    def _index_sampler(self) -> Any:
        """What torch takes batches of indices from; each tells of later ones."""
        batches = super()._index_sampler
        if not self.lookahead or not self._auto_collation:
            return batches
        return _Hinting(self._telling, batches)

    def _get_iterator(self) -> Any:
        asked, collating = self.worker_init_fn, self.collate_fn
        self.worker_init_fn = self._board.reporting(asked)
        self.collate_fn = TimedCollate(collating)
        try:
            return super()._get_iterator()
        finally:
            self.worker_init_fn, self.collate_fn = asked, collating

    def stats(self) -> LoaderStats:
        """Where the time of the present pass went, or of the last one; `stats().bottleneck` says it in a sentence."""
        return self._board.snapshot(knobs_of(self))


@dataclass(slots=True, kw_only=True, eq=False)
class _Telling:
    """What hints say of a loader; it does not hold the loader, whose workers must end when it is dropped."""

    loader: str
    workers: int
    lookahead: int
    limit: int
    epoch: int = -1


class _Hinting:
    """Batches of indices, each with those that its worker will be asked for next."""

    def __init__(self, telling: _Telling, batches: Iterable[Any]) -> None:
        self._telling = telling
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[HintedBatch]:
        telling, epoch = self._telling, self._telling.epoch
        workers, reach = telling.workers, telling.lookahead * telling.workers
        numbered = ((number, list(batch)) for number, batch in enumerate(self._batches))
        window = deque(islice(numbered, reach + 1))
        while window:
            number, batch = window[0]
            # torch deals batches to its workers in turn: after number n a worker gets n + workers, n + 2 * workers …
            # A worker's first batch tells of all of these, each later one of the one that came into reach.
            ahead = islice(window, workers if number < workers else reach, None, workers)
            hints = Hints(loader=telling.loader, epoch=epoch, number=number, ahead=tuple(ahead), limit=telling.limit)
            yield HintedBatch(batch, hints)
            window.popleft()
            window.extend(islice(numbered, 1))


class _Pass:
    """One pass: torch's iterator, timed."""

    def __init__(self, loader: DataLoader, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._board = loader._board
        self._board.begin()
        self._batched = loader._auto_collation
        weakref.finalize(self, self._board.left, self._board.passes).atexit = False
        # A pass may be left before its end: what this process reads ahead for it is then cancelled.
        weakref.finalize(self, end_lookahead, loader._telling.loader, loader._telling.epoch).atexit = False

    def __iter__(self) -> _Pass:
        return self

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __next__(self) -> Any:
        self._board.asked()
        batch = next(self._batches)
        self._board.handed(samples_in(batch) if self._batched else 1)
        return batch
