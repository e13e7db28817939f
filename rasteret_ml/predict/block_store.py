"""Blocks by number: the latest in memory, the rest in a file, and a saved state that nothing written later can harm."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.predict.blend import Arrays

__all__ = ["BlockStore", "Layout", "block_bytes", "read_block"]

Integers = npt.NDArray[np.int64]
Layout = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and type of each array of a block."""


class BlockStore:
    """Blocks of arrays; those that do not fit in memory lie in slots of a file.

    A slot that a saved state refers to is never written again until the next state is on disk (shadow paging, Lorie
    1977): whoever is killed finds the blocks as they were when they were last saved.

    Args:
        path: The file.
        layout: What a block holds.
        empty: Makes a block.
        memory_bytes: Memory for blocks; one is held in any case.
        saved: Numbers and slots `[N, 2]` of a saved state.
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
        self._room = max(1, memory_bytes // self._bytes)
        self._file = open(path, "r+b" if os.path.exists(path) else "w+b", buffering=0)  # noqa: SIM115
        self._slots: dict[int, int] = {} if saved is None else {int(n): int(slot) for n, slot in saved}
        self._durable = set(self._slots.values())
        self._end = max(self._durable, default=-1) + 1
        self._free = sorted(set(range(self._end)) - self._durable, reverse=True)
        self._left: list[int] = []
        self._held: OrderedDict[int, Arrays] = OrderedDict()
        self._changed: set[int] = set()

    def __contains__(self, number: int) -> bool:
        return number in self._held or number in self._slots

    def change(self, number: int) -> Arrays:
        """A block to be changed in place, until another one is asked for; an empty one where there is none."""
        block = self._held.get(number)
        if block is None:
            while len(self._held) >= self._room:
                self._put_away(*self._held.popitem(last=False))
            block = self._read(number) if number in self._slots else self._empty()
            self._held[number] = block
        self._held.move_to_end(number)
        self._changed.add(number)
        return block

    def take(self, number: int) -> Arrays | None:
        """A block that the store is to forget; None where there is none."""
        block = self._held.pop(number, None)
        if block is None and number in self._slots:
            block = self._read(number)
        self._changed.discard(number)
        self._release(self._slots.pop(number, None))
        return block

    def flush(self) -> Integers:
        """Write what has changed, to the disk; gives numbers and slots `[N, 2]` to be kept as the state."""
        for number, block in self._held.items():
            self._put_away(number, block)
        os.fsync(self._file.fileno())
        return np.array(list(self._slots.items()), np.int64).reshape(-1, 2)

    def saved(self) -> None:
        """What `flush` gave last is on disk: slots that only earlier states refer to may be used again."""
        self._durable = set(self._slots.values())
        self._free += self._left
        self._left = []

    def close(self) -> None:
        """Close the file; what was not flushed is lost."""
        self._file.close()

    def _put_away(self, number: int, block: Arrays) -> None:
        if number not in self._changed:
            return
        slot = self._slots.get(number)
        if slot is None or slot in self._durable:
            old, slot = slot, self._free.pop() if self._free else self._end
            self._end = max(self._end, slot + 1)
            self._slots[number] = slot
            self._release(old)
        self._file.seek(slot * self._bytes)
        for array in block:
            _write_all(self._file, array)
        self._changed.discard(number)

    def _release(self, slot: int | None) -> None:
        if slot is not None:
            (self._left if slot in self._durable else self._free).append(slot)

    def _read(self, number: int) -> Arrays:
        return read_block(self._file, self._slots[number], self._layout)


def block_bytes(layout: Layout) -> int:
    """Size of a block."""
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in layout)


def read_block(file: Any, slot: int, layout: Layout) -> Arrays:
    """The block in a slot of a file."""
    file.seek(slot * block_bytes(layout))
    block = []
    for shape, dtype in layout:
        array = np.empty(shape, dtype)
        view, done = array.data.cast("B"), 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise EOFError(f"{file.name} ends before block {slot}.")
            done += count
        block.append(array)
    return tuple(block)


def _write_all(file: Any, array: npt.NDArray[Any]) -> None:
    view, done = np.ascontiguousarray(array).data.cast("B"), 0
    while done < len(view):
        done += file.write(view[done:])
