"""Keep blocks of arrays in memory and in a file, with a saved state that survives a kill."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Arrays = tuple[npt.NDArray[Any], ...]  #: Arrays of a block.
Layout = tuple[tuple[tuple[int, ...], str], ...]  #: Shape and dtype of each array of a block.


class BlockStore:
    """Blocks of arrays; those that do not fit in memory are kept in slots of a file.

    A slot of a saved state is not written again until the next state is on disk (shadow paging, Lorie 1977): after a
    kill, the blocks are as they were when they were last saved.

    Args:
        path: The file.
        layout: Layout of a block.
        empty: Creates a block.
        memory_bytes: Memory for blocks; at least one is kept.
        saved: Block numbers and slots `[N, 2]` of a saved state.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Layout,
        empty: Callable[[], Arrays],
        memory_bytes: int,
        saved: Integers | None = None,
    ) -> None:
        self._layout, self._empty = layout, empty
        self._bytes = block_bytes(layout)
        self._capacity = max(1, memory_bytes // self._bytes)
        self._file = open(path, "r+b" if os.path.exists(path) else "w+b")  # noqa: SIM115
        self._slots: dict[int, int] = {} if saved is None else {int(n): int(slot) for n, slot in saved}
        self._saved_slots = set(self._slots.values())
        self._slot_count = max(self._saved_slots, default=-1) + 1
        self._free = sorted(set(range(self._slot_count)) - self._saved_slots, reverse=True)
        self._free_after_commit: list[int] = []
        self._cache: OrderedDict[int, Arrays] = OrderedDict()
        self._changed: set[int] = set()

    def __contains__(self, number: int) -> bool:
        return number in self._cache or number in self._slots

    def modify(self, number: int) -> Arrays:
        """Return a block (an empty one if it is new) to change in place until the next call."""
        block = self._cache.get(number)
        if block is None:
            while len(self._cache) >= self._capacity:
                self._write(*self._cache.popitem(last=False))
            block = self._read(number) if number in self._slots else self._empty()
            self._cache[number] = block
        self._cache.move_to_end(number)
        self._changed.add(number)
        return block

    def pop(self, number: int) -> Arrays | None:
        """Remove and return a block; None if there is none."""
        block = self._cache.pop(number, None)
        if block is None and number in self._slots:
            block = self._read(number)
        self._changed.discard(number)
        self._release(self._slots.pop(number, None))
        return block

    def flush(self) -> Integers:
        """Write all changed blocks to disk; return block numbers and slots `[N, 2]`, the state to save."""
        for number, block in self._cache.items():
            self._write(number, block)
        self._file.flush()
        os.fsync(self._file.fileno())
        return np.array(list(self._slots.items()), np.int64).reshape(-1, 2)

    def commit(self) -> None:
        """Free the slots of earlier states; call it when the state from `flush` is on disk."""
        self._saved_slots = set(self._slots.values())
        self._free += self._free_after_commit
        self._free_after_commit = []

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
        if slot is not None:
            (self._free_after_commit if slot in self._saved_slots else self._free).append(slot)

    def _read(self, number: int) -> Arrays:
        return read_block(self._file, self._slots[number], self._layout)


def block_bytes(layout: Layout) -> int:
    """Return the size of a block in bytes."""
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout)


def read_block(file: Any, slot: int, layout: Layout) -> Arrays:
    """Read the block in a slot of a file.

    Raises:
        EOFError: The file is too short.
    """
    file.seek(slot * block_bytes(layout))
    block = tuple(np.empty(shape, dtype) for shape, dtype in layout)
    for array in block:
        if file.readinto(array.data.cast("B")) < array.nbytes:
            raise EOFError(f"{file.name} ends before block {slot}.")
    return block
