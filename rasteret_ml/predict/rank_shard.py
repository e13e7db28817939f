"""The part of a map that one rank has predicted, and what is saved of it beside the unfinished map."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch
from affine import Affine

from rasteret_ml.datasets.combine import dataset_fingerprint
from rasteret_ml.errors import DataError, ResumeError, UsageError
from rasteret_ml.fingerprint import digest
from rasteret_ml.geo.grid import Window
from rasteret_ml.predict.blend import OutputSpec
from rasteret_ml.predict.block_store import Arrays, BlockStore, block_bytes, read_block
from rasteret_ml.predict.mosaic_layout import MapExtent

_RUN_FILE, _PROGRESS_FILE = "plan.json", "progress.npz"
_VERSION = 2  # Version of the files in `<path>.parts`; 1 had a `progress.json` for each rank.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Progress:
    """The saved state of a rank's shard."""

    spec: OutputSpec  #: What the map holds.
    done: npt.NDArray[np.bool_]  #: Which chips it has, by position `[N]`.
    finished: npt.NDArray[np.bool_]  #: Which blocks are finished and not empty `[M]`.
    slots: npt.NDArray[np.int64]  #: Numbers and slots of the other blocks `[K, 2]`.


def shard_folder(folder: Path, rank: int) -> Path:
    """Return the folder of a rank's shard."""
    return folder / f"shard-{rank}"


def saved_shards(folder: Path) -> list[tuple[Path, Progress]]:
    """Return folder and progress of all saved shards, also of ranks of earlier runs."""
    paths = sorted(folder.glob("shard-*"))
    return [(path, progress) for path in paths if (progress := load_progress(path)) is not None]


def missing_positions(folder: Path, total: int) -> npt.NDArray[np.int64]:
    """Return the positions of chips that no saved shard has."""
    done = np.zeros(total, bool)
    for _, progress in saved_shards(folder):
        done |= progress.done
    return np.flatnonzero(~done)


def load_progress(folder: Path) -> Progress | None:
    """Load the state that was saved last; None if there is none.

    Raises:
        DataError: A file has another version or cannot be read.
    """
    path = folder / _PROGRESS_FILE
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            fields = json.loads(str(file["fields"]))
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']}, not {_VERSION}")
            arrays = {name: file[name] for name in ("done", "finished", "slots")}
            return Progress(spec=OutputSpec(**fields["spec"]), **arrays)
    except (KeyError, TypeError, ValueError, OSError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and predict its chips again.") from error


def save_progress(folder: Path, progress: Progress) -> None:
    """Save a state whose blocks are on disk; until then the one saved before remains valid."""
    fields = json.dumps({"version": _VERSION, "spec": dataclasses.asdict(progress.spec)})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, fields=fields, done=progress.done, finished=progress.finished, slots=progress.slots)
    _write_atomically(folder / _PROGRESS_FILE, buffer.getvalue())


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
    """Save the fingerprint of a run in `folder`, or compare it with the one that is saved there.

    Raises:
        ResumeError: They differ; the message names each difference.
    """
    path = folder / _RUN_FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, json.dumps(dict(fingerprint), indent=1).encode())
        return
    saved: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"{name}: {saved.get(name, 'missing')} then, {fingerprint.get(name, 'missing')} now"
        for name in dict.fromkeys([*fingerprint, *saved])
        if saved.get(name) != fingerprint.get(name)
    ]
    if differences:
        raise ResumeError(
            f"{folder} holds an unfinished map of another run: {'; '.join(differences)}. Use the same arguments, "
            "choose another path, or start over with resume=False."
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
            if math.prod(value.shape):
                sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: two writers of one map are not noticed
    fcntl = None

_BLOCKS, _FINISHED, _LOCK = "blocks.bin", "finished.bin", "lock"


class RankShard:
    """One rank's chips, merged into blocks as they come; `save` makes them durable.

    Args:
        folder: Folder of the shard; a saved shard in it is continued.
        extents: The maps.
        spec: What they hold.
        memory_bytes: Memory for blocks.

    Raises:
        UsageError: Another process is writing to `folder`, or the saved shard has another spec.
    """

    def __init__(self, folder: Path, extents: Sequence[MapExtent], spec: OutputSpec, memory_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._extents, self.spec = folder, extents, spec
        self._lock = open(folder / _LOCK, "wb")  # noqa: SIM115
        self._acquire_lock()
        saved = load_progress(folder)
        if saved is not None and repr(saved.spec) != repr(spec):  # NaN equals NaN in a repr
            self._lock.close()
            raise UsageError(
                f"The chips saved in {folder} were predicted as {saved.spec}, the model now returns {spec}; choose "
                "another path, or start over with resume=False."
            )
        total, blocks = sum(len(e.positions) for e in extents), sum(e.block_count for e in extents)
        self.done = np.zeros(total, bool) if saved is None else saved.done  #: Which chips it has, by position `[N]`.
        self._finished = np.zeros(blocks, bool) if saved is None else saved.finished
        self._merging = spec.merging
        slots, empty = None if saved is None else saved.slots, partial(spec.merging.empty, spec.channels, spec.block)
        self._store = BlockStore(folder / _BLOCKS, spec.layout, empty, memory_bytes, slots)
        path = folder / _FINISHED
        self._finished_file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        # Chips of other ranks are counted too: their blocks are never finished here.
        self._pending = np.concatenate([e.chips_per_block(~self.done[e.positions]) for e in extents])
        self._is_inconsistent = False

    def _acquire_lock(self) -> None:
        """Allow one process at a time; the system releases the lock however the process ends."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UsageError(
                f"Another process is writing to {self._folder}; wait for it to end, or choose another path."
            ) from error

    def add(
        self, position: int, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], transform: Affine | None = None
    ) -> None:
        """Merge a chip into the map; a chip that the shard already has is ignored.

        Args:
            position: Its position in the sampler's order.
            values: Pixels `[K, H, W]`, see `OutputSpec.chip_values`.
            valid: Which pixels count `[H, W]`.
            transform: Where its pixels lie, if known.
        """
        if self.done[position]:
            return
        self._is_inconsistent = True
        extent = next(e for e in reversed(self._extents) if e.positions[0] <= position)
        index = int(np.searchsorted(extent.positions, position))
        height, width = extent.chip_size
        row, col = extent.corners[index].tolist()
        window = Window(row=row, col=col, height=height, width=width)
        if transform is not None:
            window = extent.chip_window(index, transform)
            north_up = slice(None, None, 1 if transform.e < 0 else -1), slice(None, None, 1 if transform.a > 0 else -1)
            values, valid = values[:, north_up[0], north_up[1]], valid[north_up]
        self._merge(extent, position, window, values, valid)
        top, bottom, left, right = extent.block_ranges(index).tolist()
        for block_row in range(top, bottom + 1):
            for block_col in range(left, right + 1):
                self._finish_if_complete(extent.block_number(block_row, block_col))
        self.done[position] = True
        self._is_inconsistent = False

    def _merge(
        self, extent: MapExtent, position: int, window: Window, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
    ) -> None:
        block = extent.block
        on_map = window.intersection(Window(row=0, col=0, height=extent.grid.height, width=extent.grid.width))
        if on_map is None:
            return
        weights = self._merging.weights(window.shape, position)
        for row in range(on_map.row // block, (on_map.row_stop - 1) // block + 1):
            for col in range(on_map.col // block, (on_map.col_stop - 1) // block + 1):
                square = Window(row=row * block, col=col * block, height=block, width=block)
                shared = on_map.intersection(square)
                assert shared is not None
                in_block, in_chip = shared.relative_to(square).slices, shared.relative_to(window).slices
                if valid[in_chip].any():
                    arrays = self._store.modify(extent.block_number(row, col))
                    part = tuple(array[..., in_block[0], in_block[1]] for array in arrays)
                    self._merging.add(part, values[:, in_chip[0], in_chip[1]], weights[in_chip], valid[in_chip])

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
        slots = self._store.flush()
        self._finished_file.flush()
        os.fsync(self._finished_file.fileno())
        progress = Progress(spec=self.spec, done=self.done, finished=self._finished, slots=slots)
        save_progress(self._folder, progress)
        self._store.commit()

    def close(self) -> None:
        """Close the files; chips that were not saved are lost."""
        self._store.close()
        self._finished_file.close()
        self._lock.close()


class SavedShard:
    """A saved shard, read block by block."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self._spec, self._is_finished = progress.spec, progress.finished
        self._slots = {int(number): int(slot) for number, slot in progress.slots}
        self._blocks_file = open(folder / _BLOCKS, "rb")  # noqa: SIM115
        self._finished_file = open(folder / _FINISHED, "rb")  # noqa: SIM115

    def rendered(self, number: int) -> npt.NDArray[Any] | None:
        """Return the pixels `[C, H, W]` of a finished block; None if it is not finished."""
        if not self._is_finished[number]:
            return None
        return read_block(self._finished_file, number, self._spec.rendered_layout)[0]

    def block(self, number: int) -> Arrays | None:
        """Return a block that is not finished; None if no chip was added to it."""
        slot = self._slots.get(number)
        return None if slot is None else read_block(self._blocks_file, slot, self._spec.layout)

    def close(self) -> None:
        """Close the files."""
        self._blocks_file.close()
        self._finished_file.close()
