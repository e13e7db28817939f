"""The part of a map that one rank has predicted, and what is saved of it beside the unfinished map."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from affine import Affine
from filelock import FileLock, Timeout

from rasteret_ml.datasets.combine import dataset_fingerprint
from rasteret_ml.errors import DataError, ResumeError, UsageError
from rasteret_ml.fingerprint import differences, digest
from rasteret_ml.predict.blend import OutputSpec
from rasteret_ml.predict.block_store import Arrays, BlockStore, block_bytes, read_block
from rasteret_ml.predict.mosaic_layout import MapExtent

_RUN_FILE = "plan.json"
_PROGRESS, _BLOCKS, _FINISHED, _LOCK = "progress.npz", "blocks.bin", "finished.bin", "lock"  # Of each shard.
_VERSION = 2  # Version of the files in `<path>.parts`; 1 had a `progress.json` for each rank.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedShard:
    """The saved state of a rank's shard, whose blocks are read one by one."""

    folder: Path  #: Where the shard is.
    spec: OutputSpec  #: What the map holds.
    done: npt.NDArray[np.bool_]  #: Which chips it has, by position `[N]`.
    finished: npt.NDArray[np.bool_]  #: Which blocks are finished and not empty `[M]`.
    slots: dict[int, int]  #: Slots of the other blocks, by number.

    def rendered(self, number: int) -> npt.NDArray[Any] | None:
        """Return the pixels `[C, H, W]` of a finished block; None if it is not finished."""
        if not self.finished[number]:
            return None
        with open(self.folder / _FINISHED, "rb") as file:
            return read_block(file, number, self.spec.rendered_layout)[0]

    def block(self, number: int) -> Arrays | None:
        """Return a block that is not finished; None if no chip was added to it."""
        if number not in self.slots:
            return None
        with open(self.folder / _BLOCKS, "rb") as file:
            return read_block(file, self.slots[number], self.spec.layout)


def shard_folder(folder: Path, rank: int) -> Path:
    """Return the folder of a rank's shard."""
    return folder / f"shard-{rank}"


def saved_shards(folder: Path) -> list[SavedShard]:
    """Return all saved shards, also those of ranks of earlier runs."""
    shards = map(load_progress, sorted(folder.glob("shard-*")))
    return [shard for shard in shards if shard is not None]


def missing_positions(folder: Path, total: int) -> npt.NDArray[np.int64]:
    """Return the positions of chips that no saved shard has."""
    done = np.zeros(total, bool)
    for shard in saved_shards(folder):
        done |= shard.done
    return np.flatnonzero(~done)


def load_progress(folder: Path) -> SavedShard | None:
    """Load the state that was saved last; None if there is none. Raises DataError if it is unreadable."""
    path = folder / _PROGRESS
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            fields = json.loads(str(file["fields"]))
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']}, not {_VERSION}")
            return SavedShard(
                folder=folder,
                spec=OutputSpec(**fields["spec"]),
                done=file["done"],
                finished=file["finished"],
                slots=dict(file["slots"].tolist()),
            )
    except (KeyError, TypeError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and predict its chips again.") from error


def _write_atomically(path: Path, data: bytes) -> None:
    """Write a file that exists as a whole or not at all, also after a crash."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def run_fingerprint(sampler: Any, extents: Sequence[MapExtent], **options: Any) -> dict[str, str]:
    """Return what must not change between runs that make one map: its chips, pixels and options, by name."""
    first, last = sampler.times
    grids = [(extent.grid.crs, tuple(extent.grid.transform), extent.grid.shape) for extent in extents]
    height, width = sampler.size
    return {
        "chips": f"{sum(len(extent.positions) for extent in extents)} of {height} x {width} pixels",
        "places": digest(grids, *(np.column_stack([extent.positions, extent.corners]) for extent in extents)),
        "times": f"{first} to {last}",
        "format": str(_VERSION),
    } | {name: str(value) for name, value in options.items()}


def start_or_resume(folder: Path, fingerprint: Mapping[str, str]) -> None:
    """Save the fingerprint of a run in `folder`; if another one is saved there, raise a `ResumeError`."""
    path = folder / _RUN_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, json.dumps(dict(fingerprint), indent=1).encode())
        return
    if found := differences(json.loads(path.read_text(encoding="utf-8")), fingerprint):
        raise ResumeError(
            f"{folder} holds an unfinished map of another run: {'; '.join(found)}. Use the same arguments, choose "
            "another path, or start over with resume=False."
        )


def data_digest(dataset: Any) -> str:
    """Return a digest of a dataset (see `dataset_fingerprint`), empty for None."""
    return "" if dataset is None else digest(*dataset_fingerprint(dataset))


def weights_digest(model: Any) -> str:
    """Return a digest of a module's weights and buffers, empty for anything else."""
    if not isinstance(model, torch.nn.Module):
        return ""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


class RankShard:
    """One rank's chips, merged into blocks as they come; `save` makes them durable.

    A shard saved in the folder is continued. Another process that writes there, and a saved shard of another spec, are
    a `UsageError`.
    """

    def __init__(self, folder: Path, extents: Sequence[MapExtent], spec: OutputSpec, memory_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._extents, self.spec = folder, extents, spec
        self._lock = FileLock(folder / _LOCK, thread_local=False)
        try:
            self._lock.acquire(timeout=0)  # the system releases it if this process dies
        except Timeout as error:
            raise UsageError(
                f"Another process is writing to {folder}; wait for it to end, or choose another path."
            ) from error
        total, blocks = sum(len(e.positions) for e in extents), sum(e.block_count for e in extents)
        done, finished = np.zeros(total, bool), np.zeros(blocks, bool)
        empty = SavedShard(folder=folder, spec=spec, done=done, finished=finished, slots={})
        saved = load_progress(folder) or empty
        if repr(saved.spec) != repr(spec):  # NaN equals NaN in a repr
            self._lock.release()
            raise UsageError(
                f"The chips saved in {folder} were predicted as {saved.spec}, the model now returns {spec}; choose "
                "another path, or start over with resume=False."
            )
        self.done = saved.done  #: Which chips it has, by position `[N]`.
        self._finished = saved.finished
        self._store = BlockStore(folder / _BLOCKS, spec.layout, memory_bytes, saved.slots)
        path = folder / _FINISHED
        self._finished_file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        # Chips of other ranks are counted too: their blocks are never finished here.
        self._pending = np.concatenate([e.chips_per_block(~self.done[e.positions]) for e in extents])
        self._is_inconsistent = False

    def add(self, position: int, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], transform: Affine) -> None:
        """Merge a chip, at a position in the sampler's order, into the map; one that the shard already has is ignored.

        `values` are the pixels `[K, H, W]` (see `OutputSpec.chip_values`), `valid` `[H, W]` tells which of them count,
        and `transform` where they lie.
        """
        if self.done[position]:
            return
        extent = next(e for e in reversed(self._extents) if e.positions[0] <= position)
        index = int(np.searchsorted(extent.positions, position))
        window = extent.chip_window(index, transform)
        north_up = slice(None, None, 1 if transform.e < 0 else -1), slice(None, None, 1 if transform.a > 0 else -1)
        values, valid = values[:, *north_up], valid[north_up]
        weights = self.spec.merging.weights(window.shape, position)
        self._is_inconsistent = True
        top, bottom, left, right = extent.block_ranges(index).tolist()
        for block_row, block_col in itertools.product(range(top, bottom + 1), range(left, right + 1)):
            number = extent.block_number(block_row, block_col)
            square = extent.block_window(number)
            shared = window.intersection(square)
            if shared is not None:
                in_block, in_chip = shared.relative_to(square).slices, shared.relative_to(window).slices
                if valid[in_chip].any():
                    part = tuple(array[..., *in_block] for array in self._store.modify(number))
                    self.spec.merging.add(part, values[:, *in_chip], weights[in_chip], valid[in_chip])
            self._finish_if_complete(number)
        self.done[position] = True
        self._is_inconsistent = False

    def _finish_if_complete(self, number: int) -> None:
        """Render a block when the last chip that may change it has been added."""
        self._pending[number] -= 1
        if self._pending[number]:
            return
        block = self._store.pop(number)
        if block is not None:
            self._finished_file.seek(number * block_bytes(self.spec.rendered_layout))
            self._finished_file.write(self.spec.render(block).data)
            self._finished[number] = True

    def save(self) -> None:
        """Make all added chips durable. After an interrupted `add` nothing is saved: the earlier state remains."""
        if self._is_inconsistent:
            return
        slots = np.array(list(self._store.flush().items()), np.int64).reshape(-1, 2)
        self._finished_file.flush()
        os.fsync(self._finished_file.fileno())
        fields = json.dumps({"version": _VERSION, "spec": dataclasses.asdict(self.spec)})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, fields=fields, done=self.done, finished=self._finished, slots=slots)
        # The blocks are on disk; until this file is, the state saved before remains valid.
        _write_atomically(self._folder / _PROGRESS, buffer.getvalue())
        self._store.commit()

    def close(self) -> None:
        """Close the files; chips that were not saved are lost."""
        self._store.close()
        self._finished_file.close()
        self._lock.release()
