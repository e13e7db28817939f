"""torch's DataLoader with the right defaults: it prefetches, resumes anywhere, and reports where time went."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch.utils.data

from rasteret_ml.datasets.combine import dataset_fingerprint, ignored_class
from rasteret_ml.errors import ResumeError, UsageError
from rasteret_ml.fingerprint import check_fingerprint
from rasteret_ml.loader.bottleneck import loader_settings
from rasteret_ml.loader.failures import ErrorPolicy, FailureBudget, FailureReport, collate_with_errors
from rasteret_ml.loader.prefetch import BatchIndices, Hints, PrefetchingDataset
from rasteret_ml.loader.stats import LoaderStats, StatsBoard, TimedCollate, samples_in
from rasteret_ml.raster.worker_loop import relax_gc
from rasteret_ml.samplers.ranks import Ranks
from rasteret_ml.samples.collate import collate

_VERSION = 2  # Version of a state; 1 had other fingerprints of datasets.


class DataLoader(torch.utils.data.DataLoader[Any]):
    """A `torch.utils.data.DataLoader` that prefetches, resumes in mid-epoch and reports where time went.

    Takes torch's arguments. Differences: `collate_fn` defaults to `rasteret_ml.collate`, which pads labels with the
    dataset's own `ignore_index` (of several heads the first one's); `persistent_workers` defaults to True where there
    are workers; and each pass is the next epoch of its sampler (0, 1, 2 …), unless `sampler.set_epoch` chose one, as
    Lightning does.

    Args:
        dataset: A dataset of this library, or any other (which is not prefetched).
        batch_size: As torch's.
        shuffle: As torch's.
        lookahead: Batches that each worker (or the main process, if there are none) reads in advance; 0 = none.
        lookahead_bytes: Memory that all workers together may fill with prefetched batches; each prefetches one batch in
            any case.
        errors: What is done about samples that cannot be read: an `ErrorPolicy`, its action ("raise", "retry",
            "replace" or "fill"), or a mapping of its fields.
        **options: As torch's.

    Raises:
        UsageError: invalid options; `errors` other than "raise" without batches, or "replace" with batches of one.
        ErrorBudgetError: (in a pass) more samples failed than `errors` allows.

    Example:
        >>> sampler = rm.RandomAOISampler(images, size=256, length=1000)  # doctest: +SKIP
        >>> for batch in rm.DataLoader(images, batch_size=16, sampler=sampler, num_workers=2):  # doctest: +SKIP
        ...     batch["image"].shape  # [16, C, 256, 256]
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
            raise UsageError(f"lookahead and lookahead_bytes must be >= 0, got {lookahead} and {lookahead_bytes}.")
        if "collate_fn" not in options:
            ignored = ignored_class(dataset)
            options["collate_fn"] = collate if ignored is None else functools.partial(collate, ignore_index=ignored)
        options.setdefault("persistent_workers", options.get("num_workers", 0) > 0)
        self.lookahead, self.lookahead_bytes = int(lookahead), int(lookahead_bytes)
        self.errors = ErrorPolicy.of(errors)
        # By keyword: Lightning rebuilds a loader from the names of its arguments.
        super().__init__(dataset, batch_size=batch_size, shuffle=shuffle, **options)
        if self.errors.action != "raise" and not self._auto_collation:
            raise UsageError("errors= needs batches: give batch_size=, or leave errors= at 'raise'.")
        if self.errors.action == "replace" and self.batch_size == 1:
            raise UsageError(
                "errors='replace' replaces a failed sample with another from its batch, but batch_size=1 has none; "
                "choose 'fill', or larger batches."
            )
        self._board = StatsBoard(self.num_workers)
        self._budget = FailureBudget(self.errors)
        self._began = 0, 0
        self._position: tuple[int, int] | None = None
        self._fingerprint: tuple[list[Any], list[str]] | None = None
        self._batches = _BatchSamplerWithHints(super()._index_sampler, max(1, self.num_workers), self.lookahead)
        self._prefetching: PrefetchingDataset | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _EpochIterator(self)

    def _begin(self) -> Iterator[Any]:
        """Begin a pass of torch's over the current epoch."""
        sampler = self._own_sampler
        if hasattr(sampler, "start_pass"):
            sampler.start_pass()
        self._batches.epoch += 1
        self._batches.ends.clear()
        self._position = None
        self._began = (getattr(sampler, "epoch", 0), getattr(sampler, "start", 0))
        return super().__iter__()

    # Resuming -----------------------------------------------------------------------------------------------

    @property
    def _own_sampler(self) -> Any:
        """The sampler that knows where an epoch stands."""
        found = [self.sampler, getattr(self.batch_sampler, "sampler", None), self.batch_sampler]
        return next((sampler for sampler in found if hasattr(sampler, "start_pass")), None)

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands: version, plan, epoch, and the position after the last batch handed over.

        Plain values, less than a kilobyte. The position counts the chips of all ranks: it is the same on every rank and
        with any number of workers, however far they have read ahead. With a sampler of another library, the state says
        only that a pass cannot be resumed.
        """
        sampler = self._own_sampler
        if sampler is None:
            return {"version": _VERSION, "sampler": type(self.sampler).__name__}
        epoch, position = self._position or (sampler.epoch, sampler.start)
        state = sampler.state_dict() | {"epoch": epoch, "position": position, "loader": _VERSION}
        state["plan"] |= {"data": self._data_fingerprint()}
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where `state_dict` was taken.

        The number of workers, the batch size and, since a state is always at the end of a global batch, the ranks may
        differ. An epoch set afterwards (`sampler.set_epoch`) begins at its beginning.

        Raises:
            ResumeError: not a state of a loader, one of an older version, or one with another plan (Collection,
                filters, AOIs, sizes, seed …); the message names each difference.
        """
        if not isinstance(state, Mapping) or not {"plan", "sampler"} & state.keys():
            raise ResumeError("state must be what `DataLoader.state_dict()` returned.")
        sampler = self._own_sampler
        if sampler is None or "plan" not in state:
            warnings.warn(
                f"A pass over a {type(self.sampler).__name__} cannot be resumed in mid-epoch; the epoch starts anew. "
                "Use a sampler of rasteret_ml.",
                stacklevel=2,
            )
            return
        if state.get("loader") != _VERSION:
            raise ResumeError(
                f"This state has version {state.get('loader', 1)}, and this version of rasteret_ml reads version "
                f"{_VERSION}; start the epoch anew without it."
            )
        plan = dict(state["plan"])
        check_fingerprint({"data": plan.pop("data", None)}, {"data": self._data_fingerprint()}, "a loader")
        sampler.load_state_dict({k: v for k, v in state.items() if k != "loader"} | {"plan": plan})
        self._position = None

    def _data_fingerprint(self) -> list[str]:
        """Return a line per dataset that is read; computed once per index, since it reads the ids of all records."""
        indexes = [getattr(part, "index", None) for part in getattr(self.dataset, "parts", [self.dataset])]
        known = self._fingerprint
        if known is None or any(a is not b for a, b in zip(known[0], indexes, strict=True)):
            known = self._fingerprint = indexes, dataset_fingerprint(self.dataset)
        return known[1]

    def _handed_over(self, batches: int) -> None:
        """Note that so many batches of the pass were handed over."""
        sampler = self._own_sampler
        if sampler is not None:
            epoch, start = self._began
            ranks = (sampler.ranks or Ranks.now()).count
            samples = self._batches.ends[batches - 1] if self._auto_collation else batches
            self._position = epoch, min(start + samples * ranks, sampler.total)

    # torch's hooks ------------------------------------------------------------------------------------------

    @property
    def _index_sampler(self) -> Any:
        """Batches of indices with hints about later ones, or single indices."""
        return self._batches if self._auto_collation else super()._index_sampler

    def _get_iterator(self) -> Any:
        # torch's iterators take these from the loader when they are made, and send them to the workers.
        init, collate_fn, dataset = self.worker_init_fn, self.collate_fn, self.dataset
        self.worker_init_fn = functools.partial(_init_worker, init)
        self.collate_fn = TimedCollate(collate_fn, self._board.new_rows())
        if not isinstance(dataset, torch.utils.data.IterableDataset):
            policy = None if self.errors.action == "raise" else self.errors
            self._prefetching = PrefetchingDataset(dataset, self.lookahead_bytes // max(1, self.num_workers), policy)
            self.__dict__["dataset"] = self._prefetching
            if policy is not None:
                take_errors = self._prefetching.take_errors
                self.collate_fn = functools.partial(collate_with_errors, self.collate_fn, take_errors)
        try:
            return super()._get_iterator()
        finally:
            self.worker_init_fn, self.collate_fn, self.__dict__["dataset"] = init, collate_fn, dataset

    def close(self) -> None:
        """End the workers that are kept between passes; another pass starts new ones."""
        iterator, self._iterator = self._iterator, None
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def stats(self) -> LoaderStats:
        """Return where the time of the current or last pass went; `stats().bottleneck` puts it in a sentence."""
        return replace(self._board.snapshot(), settings=loader_settings(self), failures=self.failures.failed)

    @property
    def failures(self) -> FailureReport:
        """What could not be read in the current or last pass, and what was done about it."""
        return self._budget.report


def _init_worker(init: Callable[[int], Any] | None, worker: int) -> None:
    """Let `get_worker_info().dataset` be the loader's dataset, which a `worker_init_fn` may configure; then call it."""
    relax_gc()
    info = torch.utils.data.get_worker_info()
    if info is not None and isinstance(info.dataset, PrefetchingDataset):
        object.__setattr__(info, "dataset", info.dataset.dataset)  # read-only to others
    if init is not None:
        init(worker)


class _BatchSamplerWithHints:
    """Batches of indices, each with the next ones of the same worker.

    It does not hold the loader, whose workers must end when it is dropped.
    """

    def __init__(self, batches: Any, workers: int, lookahead: int) -> None:
        self._batches = batches
        self._workers = workers
        self._lookahead = lookahead
        self.epoch = -1  # Number of the loader's pass.
        self.ends: list[int] = []  # Samples of the pass up to the end of each batch.

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[BatchIndices]:
        epoch, samples = self.epoch, 0
        numbered = ((number, list(batch)) for number, batch in enumerate(self._batches))
        window = deque(islice(numbered, self._lookahead * self._workers + 1))
        while window:
            number, batch = window[0]
            samples += len(batch)
            self.ends.append(samples)
            yield BatchIndices(batch, Hints(epoch=epoch, number=number, ahead=self._ahead(number, window)))
            window.popleft()
            window.extend(islice(numbered, 1))

    def _ahead(self, number: int, window: Iterable[tuple[int, list[Any]]]) -> tuple[tuple[int, list[Any]], ...]:
        """Return the batches that a batch announces, given it and the batches within reach of it."""
        # torch hands batches to its workers in turn: after number n a worker gets n + workers, n + 2 * workers …
        # A worker's first batch announces all of these, each later one the batch that came into reach.
        first = self._workers if number < self._workers else max(1, self._lookahead * self._workers)
        return tuple(islice(window, first, None, self._workers))


class _EpochIterator:
    """One pass: torch's iterator, timed, and counted for `state_dict`.

    It begins with its first batch: an epoch or a state may be chosen until then (Lightning asks for the iterator before
    it chooses the epoch).
    """

    def __init__(self, loader: DataLoader) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._count = 0
        self._budget = loader._budget

    def __iter__(self) -> _EpochIterator:
        return self

    def __len__(self) -> int:
        return len(self._loader)

    def __next__(self) -> Any:
        loader = self._loader
        if self._batches is None:
            number = loader._board.start_pass()
            self._budget = loader._budget = FailureBudget(loader.errors)
            weakref.finalize(self, self._budget.log_summary)
            self._batches = loader._begin()
            # A pass may be left before its end: what this process prefetches for it is then cancelled.
            if loader._prefetching is not None:
                weakref.finalize(self, loader._prefetching.close, loader._batches.epoch).atexit = False
            weakref.finalize(self, loader._board.abandon, number).atexit = False
        else:
            loader._board.start_wait()
        try:
            batch = self._budget.receive(next(self._batches))
        except StopIteration:
            loader._position = loader._began[0] + 1, 0
            self._budget.end()
            raise
        self._count += 1
        loader._handed_over(self._count)
        loader._board.end_wait(samples_in(batch) if loader._auto_collation else 1)
        return batch
