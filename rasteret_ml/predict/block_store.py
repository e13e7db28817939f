"""Keep blocks of arrays in memory and in a file, with a saved state that survives a kill."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = tuple[npt.NDArray[Any], ...]  #: Arrays of a block.
Layout = tuple[tuple[tuple[int, ...], str], ...]  #: Shape and dtype of each array of a block.


class BlockStore:
    """Blocks of arrays; those that do not fit in memory are kept in slots of a file.

    A slot of a saved state is not written again until the next state is on disk (shadow paging, Lorie 1977): after a
    kill, the blocks are as they were when they were last saved. `saved` has the slot of each block of a saved state; at
    least one block is kept in memory.
    """

    def __init__(
        self, path: str | os.PathLike[str], layout: Layout, memory_bytes: int, saved: Mapping[int, int]
    ) -> None:
        self._layout, self._bytes = layout, block_bytes(layout)
        self._capacity = max(1, memory_bytes // self._bytes)
        self._file = open(path, "r+b" if os.path.exists(path) else "w+b")  # noqa: SIM115
        self._slots = dict(saved)
        self._slot_count = max(self._slots.values(), default=-1) + 1
        self._cache: OrderedDict[int, Arrays] = OrderedDict()
        self._changed: set[int] = set()
        self.commit()

    def modify(self, number: int) -> Arrays:
        """Return a block (zeros if it is new) to change in place until the next call."""
        block = self._cache.get(number)
        if block is None:
            while len(self._cache) >= self._capacity:
                self._write(*self._cache.popitem(last=False))
            slot = self._slots.get(number)
            if slot is None:
                block = tuple(np.zeros(shape, dtype) for shape, dtype in self._layout)
            else:
                block = read_block(self._file, slot, self._layout)
            self._cache[number] = block
        self._cache.move_to_end(number)
        self._changed.add(number)
        return block

    def pop(self, number: int) -> Arrays | None:
        """Remove and return a block; None if there is none."""
        block, slot = self._cache.pop(number, None), self._slots.pop(number, None)
        if block is None and slot is not None:
            block = read_block(self._file, slot, self._layout)
        self._changed.discard(number)
        self._release(slot)
        return block

    def flush(self) -> dict[int, int]:
        """Write all changed blocks to disk; return the slot of each block, the state to save."""
        for number, block in self._cache.items():
            self._write(number, block)
        self._file.flush()
        os.fsync(self._file.fileno())
        return dict(self._slots)

    def commit(self) -> None:
        """Free the slots of earlier states; call it when the state from `flush` is on disk."""
        self._saved_slots = set(self._slots.values())
        self._free = sorted(set(range(self._slot_count)) - self._saved_slots, reverse=True)

    def close(self) -> None:
        """Close the file; blocks that were not flushed are lost."""
        self._file.close()

    def _write(self, number: int, block: Arrays) -> None:
        if number not in self._changed:
            return
        slot = self._slots.get(number)
        if slot is None or slot in self._saved_slots:
            old, slot = slot, self._free.pop() if self._free else self._slot_count
            self._slot_count = max(self._slot_count, slot + 1)
            self._slots[number] = slot
            self._release(old)
        self._file.seek(slot * self._bytes)
        for array in block:
            self._file.write(array.data)
        self._changed.discard(number)

    def _release(self, slot: int | None) -> None:
        if slot is not None and slot not in self._saved_slots:
            self._free.append(slot)


def block_bytes(layout: Layout) -> int:
    """Return the size of a block in bytes."""
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout)


def read_block(file: Any, slot: int, layout: Layout) -> Arrays:
    """Read the block in a slot of a file; raises EOFError if the file ends before it."""
    file.seek(slot * block_bytes(layout))
    block = tuple(np.empty(shape, dtype) for shape, dtype in layout)
    for array in block:
        if file.readinto(array.data.cast("B")) < array.nbytes:
            raise EOFError(f"{file.name} ends before block {slot}.")
    return block
