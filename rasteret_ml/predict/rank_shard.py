"""What one rank has predicted of a map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.distributed
from affine import Affine

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.window import Window
from rasteret_ml.predict.blend import Arrays
from rasteret_ml.predict.block_store import BlockStore, block_bytes, read_block
from rasteret_ml.predict.mosaic_layout import MapExtent
from rasteret_ml.predict.output_spec import OutputSpec
from rasteret_ml.predict.progress import Progress, load_progress, save_progress
from rasteret_ml.samplers.ranks import Ranks

__all__ = ["DistributedGroup", "RankShard", "SavedShard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedGroup(Ranks):
    """The ranks, and two ways to speak; each is called by all of them at the same time."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found


fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows: two writers of one map are then not noticed
    fcntl = None

_BLOCKS, _FINISHED, _LOCK = "blocks.bin", "finished.bin", "lock"


class RankShard:
    """A rank's chips, put on blocks as they come; `save` makes what came so far last.

    Args:
        folder: Where it lies; a saved part there is taken up.
        sheets: The maps.
        form: What they hold.
        memory_bytes: Memory for blocks.

    Raises:
        UsageError: another process is writing it, or it is of another form.
    """

    def __init__(self, folder: Path, sheets: Sequence[MapExtent], form: OutputSpec, memory_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._sheets, self.form = folder, sheets, form
        self._lock = open(folder / _LOCK, "wb")  # noqa: SIM115
        self._claim()
        saved = load_progress(folder)
        if saved is not None and not _same(saved.form, form):
            self._lock.close()
            raise UsageError(
                f"What is kept in {folder} was predicted as {saved.form}, the model now gives {form}; choose another "
                f"path, or begin anew with resume=False."
            )
        total, blocks = sum(len(s.positions) for s in sheets), sum(s.blocks for s in sheets)
        self.done = np.zeros(total, bool) if saved is None else saved.done
        """Which chips are in it, by position `[N]`."""
        self._finished = np.zeros(blocks, bool) if saved is None else saved.finished
        self._generation = 0 if saved is None else saved.generation
        self._merging = form.merging
        slots = None if saved is None else saved.slots
        self._store = BlockStore(folder / _BLOCKS, form.layout, self._empty, memory_bytes, slots)
        path = folder / _FINISHED
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
        self._finished_bytes = block_bytes(form.finished)
        self._waited = self._chips_to_come()
        self._torn = False

    def _claim(self) -> None:
        """Only one process at a time; the system gives the claim back when a process ends, however it does."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UsageError(
                f"Another process is writing to {self._folder}; wait for it, or choose another path."
            ) from error

    def _empty(self) -> Arrays:
        return self._merging.empty(self.form.planes, self.form.block)

    def _chips_to_come(self) -> npt.NDArray[np.int64]:
        """For each block, how many chips may still change it: those of other ranks, which never come here, as well."""
        return np.concatenate([sheet.chips_on_blocks(~self.done[sheet.positions]) for sheet in self._sheets])

    def add(
        self,
        position: int,
        values: npt.NDArray[Any],
        valid: npt.NDArray[np.bool_],
        transform: Affine | None = None,
    ) -> None:
        """Put a chip, `values [K, H, W]` and `valid [H, W]`, on the map; one that is there already is left out.

        Args:
            position: Its place in the sampler's order.
            values: See `OutputSpec.values`.
            valid: True = counts.
            transform: Of its pixels, where it knows them.
        """
        if self.done[position]:
            return
        self._torn = True
        sheet = next(s for s in reversed(self._sheets) if s.positions[0] <= position)
        at = int(np.searchsorted(sheet.positions, position))
        height, width = sheet.size
        row, col = sheet.corners[at].tolist()
        window = Window(row=row, col=col, height=height, width=width)
        if transform is not None:
            window = sheet.place(at, transform)
            turned = slice(None, None, 1 if transform.e < 0 else -1), slice(None, None, 1 if transform.a > 0 else -1)
            values, valid = values[:, turned[0], turned[1]], valid[turned]
        self._put(sheet, position, window, values, valid)
        top, bottom, left, right = sheet.touched(at).tolist()
        for block_row in range(top, bottom + 1):
            for block_col in range(left, right + 1):
                self._count_down(sheet.first + block_row * sheet.shape[1] + block_col)
        self.done[position] = True
        self._torn = False

    def _put(
        self, sheet: MapExtent, position: int, window: Window, values: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
    ) -> None:
        whole = Window(row=0, col=0, height=sheet.grid.height, width=sheet.grid.width)
        inside, block = window.intersection(whole), sheet.block
        if inside is None:
            return
        weights = self._merging.weigh(window.shape, position)
        for row in range(inside.row // block, (inside.row_stop - 1) // block + 1):
            for col in range(inside.col // block, (inside.col_stop - 1) // block + 1):
                square = Window(row=row * block, col=col * block, height=block, width=block)
                met = inside.intersection(square)
                assert met is not None
                here, there = met.relative_to(square).slices, met.relative_to(window).slices
                if not valid[there].any():
                    continue
                arrays = self._store.change(sheet.first + row * sheet.shape[1] + col)
                part = tuple(array[..., here[0], here[1]] for array in arrays)
                self._merging.add(part, values[:, there[0], there[1]], weights[there], valid[there])

    def _count_down(self, number: int) -> None:
        self._waited[number] -= 1
        if self._waited[number]:
            return
        block = self._store.take(number)
        if block is not None:
            self._file.seek(number * self._finished_bytes)
            self._file.write(self.form.render(block).data)
            self._finished[number] = True

    def save(self) -> None:
        """Make all chips that are here last. After an `add` that was broken off, what was saved before it counts."""
        if self._torn:
            return
        slots = self._store.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._generation += 1
        progress = Progress(
            form=self.form, generation=self._generation, done=self.done, finished=self._finished, slots=slots
        )
        save_progress(self._folder, progress)
        self._store.saved()

    def close(self) -> None:
        """Close its files; what was not saved is predicted again."""
        self._store.close()
        self._file.close()
        self._lock.close()


class SavedShard:
    """A part to be read block by block."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.done, self.form = progress.done, progress.form
        self._slots = {int(number): int(slot) for number, slot in progress.slots}
        self._is_finished = progress.finished
        self._blocks = open(folder / _BLOCKS, "rb", buffering=0)  # noqa: SIM115
        self._finished = open(folder / _FINISHED, "rb", buffering=0)  # noqa: SIM115

    def finished(self, number: int) -> npt.NDArray[Any] | None:
        """The pixels of a finished block; None where it is not."""
        return read_block(self._finished, number, self.form.finished)[0] if self._is_finished[number] else None

    def block(self, number: int) -> Arrays | None:
        """What there is of a block that is not finished; None = nothing."""
        slot = self._slots.get(number)
        return None if slot is None else read_block(self._blocks, slot, self.form.layout)

    def close(self) -> None:
        """Close its files."""
        self._blocks.close()
        self._finished.close()


def _same(one: OutputSpec, other: OutputSpec) -> bool:
    """NaN is NaN here."""
    return repr(one) == repr(other)
