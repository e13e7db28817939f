"""torch's DataLoader with the right defaults: it looks ahead, can be taken up anywhere, and says where time went."""

from __future__ import annotations

import functools
import uuid
import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch.utils.data

from rasteret_ml.datasets.combine import ignored_class
from rasteret_ml.datasets.dataset_fingerprint import dataset_fingerprint
from rasteret_ml.errors import ResumeError, UsageError
from rasteret_ml.fingerprint import check_fingerprint
from rasteret_ml.loader.bottleneck import knobs_of
from rasteret_ml.loader.error_policy import ErrorPolicy
from rasteret_ml.loader.failures import CollateWithErrors, FailureBudget, FailureReport
from rasteret_ml.loader.prefetch import BatchIndices, Hints, end_lookahead
from rasteret_ml.loader.stats import LoaderStats, StatsBoard, TimedCollate, samples_in
from rasteret_ml.samplers.ranks import Ranks
from rasteret_ml.samples.collate import collate

__all__ = ["DataLoader"]

_VERSION = 1
"""Of a state."""


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
        errors: What is done about samples whose data cannot be read: an `ErrorPolicy`, its action ("raise", "retry",
            "replace" or "fill"), or a mapping of its fields.
        **options: As torch's.

    Raises:
        UsageError: options that cannot be; errors= other than "raise" without batches, "replace" with batches of one.
        ErrorBudgetError: (in a pass) more samples failed than `errors` allows.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        *,
        lookahead: int = 4,
        lookahead_bytes: int = 1024 * 1024 * 1024,
        errors: ErrorPolicy | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if lookahead < 0 or lookahead_bytes < 0:
            raise UsageError(f"lookahead and lookahead_bytes are not negative, but {lookahead}, {lookahead_bytes}.")
        if "collate_fn" not in options:
            ignored = ignored_class(dataset)
            options["collate_fn"] = collate if ignored is None else functools.partial(collate, ignore_index=ignored)
        options.setdefault("persistent_workers", options.get("num_workers", 0) > 0)
        self.lookahead, self.lookahead_bytes = int(lookahead), int(lookahead_bytes)
        self.errors = ErrorPolicy.of(errors)
        # By keyword: Lightning rebuilds a loader from the names of its arguments.
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, **options)
        self._board = StatsBoard(self.num_workers)
        self._ledger = FailureBudget(self.errors)
        tolerant = self.errors.action != "raise"
        if tolerant and not self._auto_collation:
            raise UsageError("errors= is for batches: give batch_size=, or leave errors= at 'raise'.")
        if self.errors.action == "replace" and self.batch_size == 1:
            raise UsageError(
                "errors='replace' puts another sample of the same batch in the place of one that failed, and "
                "batch_size=1 has no other; choose 'fill', or larger batches."
            )
        self._began = 0, 0
        self._stood: tuple[int, int] | None = None
        self._data: tuple[list[Any], list[str]] | None = None
        workers = max(1, self.num_workers)
        self._telling = _PrefetchHints(
            loader=uuid.uuid4().hex,
            workers=workers,
            lookahead=self.lookahead,
            limit=self.lookahead_bytes // workers,
            errors=self.errors if tolerant else None,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _EpochIterator(self)

    def _begin(self) -> Iterator[Any]:
        """A pass of torch's, over the epoch that was chosen by now."""
        sampler = self._own_sampler
        if hasattr(sampler, "start_pass"):
            sampler.start_pass()
        self._telling.epoch += 1
        self._telling.ends.clear()
        self._stood = None
        self._began = (getattr(sampler, "epoch", 0), getattr(sampler, "start", 0))
        return super().__iter__()

    # Resuming -----------------------------------------------------------------------------------------------

    @property
    def _own_sampler(self) -> Any:
        """The sampler that says where an epoch stands."""
        found = [self.sampler, getattr(self.batch_sampler, "sampler", None), self.batch_sampler]
        return next((sampler for sampler in found if hasattr(sampler, "start_pass")), None)

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: version, plan, epoch, and the position behind the last batch handed over.

        Plain values, less than a kilobyte. The position counts the chips of all ranks: it is the same on every rank and
        with any number of workers, however far they have read ahead. With a sampler that is not ours the state says
        only that a pass cannot be taken up.
        """
        sampler = self._own_sampler
        if sampler is None:
            return {"version": _VERSION, "sampler": type(self.sampler).__name__}
        if self._stood is not None:
            epoch, position = self._stood
        else:
            epoch, position = sampler.epoch, sampler.start
        state = sampler.state_dict() | {"epoch": epoch, "position": position}
        state["plan"] |= {"data": self._data_plan()}
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where `state_dict` was taken.

        Workers, the size of batches and, as a state is always at the end of a global batch, ranks may be others. An
        epoch that is set to another one afterwards (`sampler.set_epoch`) begins at its beginning.

        Raises:
            ResumeError: the state is of another plan (Collection, filters, AOIs, sizes, seed …), each difference is
                named; or it is none.
        """
        if not isinstance(state, Mapping) or not {"plan", "sampler"} & state.keys():
            raise ResumeError("This is not a state of a loader; load what `state_dict()` gave.")
        sampler = self._own_sampler
        if sampler is None or "plan" not in state:
            warnings.warn(
                f"A pass over a {type(self.sampler).__name__} cannot be taken up in its middle; the epoch begins anew. "
                "Use a sampler of rasteret_ml.",
                stacklevel=2,
            )
            return
        plan = dict(state["plan"])
        check_fingerprint({"data": plan.pop("data", None)}, {"data": self._data_plan()}, "loader")
        sampler.load_state_dict({**state, "plan": plan})
        self._stood = None

    def _data_plan(self) -> list[str]:
        """The dataset's part of the plan: made once for an index, since it reads the ids of all records."""
        indexes = [getattr(part, "index", None) for part in getattr(self.dataset, "parts", [self.dataset])]
        held = self._data
        if held is None or any(a is not b for a, b in zip(held[0], indexes, strict=True)):
            held = self._data = indexes, dataset_fingerprint(self.dataset)
        return held[1]

    def _handed(self, batches: int) -> None:
        """So many batches of the pass were handed over."""
        sampler = self._own_sampler
        if sampler is not None:
            epoch, start = self._began
            ranks = (sampler.ranks or Ranks.now()).count
            self._stood = epoch, min(start + self._telling.ends[batches - 1] * ranks, sampler.total)

    def _ended(self) -> None:
        """The pass has no more batches: what comes next is the next epoch."""
        if self._own_sampler is not None:
            self._stood = self._began[0] + 1, 0

    @property
    def _index_sampler(self) -> Any:
        """What torch takes batches of indices from; each tells of later ones."""
        batches = super()._index_sampler
        return _HintedBatches(self._telling, batches) if self._auto_collation else _Counting(self._telling, batches)

    def _get_iterator(self) -> Any:
        asked, collate_fn = self.worker_init_fn, self.collate_fn
        self.worker_init_fn = self._board.reporting(asked)
        self.collate_fn = TimedCollate(collate_fn)
        if self._telling.errors is not None:
            self.collate_fn = CollateWithErrors(self.collate_fn, self._telling.loader)
        try:
            return super()._get_iterator()
        finally:
            self.worker_init_fn, self.collate_fn = asked, collate_fn

    def close(self) -> None:
        """End the workers that are kept between passes; another pass starts new ones."""
        iterator, self._iterator = self._iterator, None
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def stats(self) -> LoaderStats:
        """Where the time of the present pass went, or of the last one; `stats().bottleneck` says it in a sentence."""
        return self._board.snapshot(knobs_of(self), self._ledger.report.failed)

    @property
    def failures(self) -> FailureReport:
        """What could not be read in the present pass so far, or in the last one, and what was done about it."""
        return self._ledger.report


@dataclass(slots=True, kw_only=True, eq=False)
class _PrefetchHints:
    """What hints say of a loader; it does not hold the loader, whose workers must end when it is dropped."""

    loader: str
    workers: int
    lookahead: int
    limit: int
    errors: ErrorPolicy | None
    epoch: int = -1
    ends: list[int] = field(default_factory=list)
    """Samples of the pass up to the end of each batch of indices."""


class _Counting:
    """Indices that are read one by one, counted."""

    def __init__(self, telling: _PrefetchHints, indices: Iterable[Any]) -> None:
        self._telling = telling
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for number, index in enumerate(self._indices, 1):
            self._telling.ends.append(number)
            yield index


class _HintedBatches:
    """Batches of indices, each with those that its worker will be asked for next."""

    def __init__(self, telling: _PrefetchHints, batches: Iterable[Any]) -> None:
        self._telling = telling
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[Any]]:
        telling, epoch = self._telling, self._telling.epoch
        reach = telling.lookahead * telling.workers
        numbered = ((number, list(batch)) for number, batch in enumerate(self._batches))
        window = deque(islice(numbered, reach + 1))
        samples = 0
        while window:
            number, batch = window[0]
            samples += len(batch)
            telling.ends.append(samples)
            if reach or telling.errors is not None:
                yield BatchIndices(batch, self._hints(epoch, number, window))
            else:
                yield batch
            window.popleft()
            window.extend(islice(numbered, 1))

    def _hints(self, epoch: int, number: int, window: Iterable[tuple[int, list[Any]]]) -> Hints:
        """What a batch tells, given it and the batches within reach of it."""
        telling, workers = self._telling, self._telling.workers
        # torch deals batches to its workers in turn: after number n a worker gets n + workers, n + 2 * workers …
        # A worker's first batch tells of all of these, each later one of the one that came into reach.
        first = workers if number < workers else max(1, telling.lookahead * workers)
        ahead = tuple(islice(window, first, None, workers))
        return Hints(
            loader=telling.loader,
            epoch=epoch,
            number=number,
            ahead=ahead,
            limit=telling.limit,
            errors=telling.errors,
        )


class _EpochIterator:
    """One pass: torch's iterator, timed, and counted for `state_dict`.

    It begins with its first batch: an epoch or a state may be chosen until then (Lightning asks for the iterator before
    it chooses the epoch).
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._count = 0
        self._ledger = loader._ledger

    def __iter__(self) -> _EpochIterator:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        loader = self._loader
        if self._batches is None:
            loader._board.begin()
            loader._board.asked()
            self._ledger = loader._ledger = FailureBudget(loader.errors)
            weakref.finalize(self, self._ledger.sum_up)
            self._batches = loader._begin()
            # A pass may be left before its end: what this process reads ahead for it is then cancelled.
            weakref.finalize(self, end_lookahead, loader._telling.loader, loader._telling.epoch).atexit = False
            weakref.finalize(self, loader._board.left, loader._board.passes).atexit = False
        else:
            loader._board.asked()
        try:
            batch = self._ledger.received(next(self._batches))
        except StopIteration:
            loader._ended()
            self._ledger.ended()
            raise
        self._count += 1
        loader._handed(self._count)
        loader._board.handed(samples_in(batch) if loader._auto_collation else 1)
        return batch
