"""Headers to rows while others are still on their way.

Records are cut into groups of `GROUP`. As soon as every header of a group is there, the group becomes Arrow columns on
another thread, its headers are forgotten, and its tile tables wait for the end where they do not fill the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from rasteret_ml.errors import RasteretError
from rasteret_ml.collection.build.draft import RecordDraft
from rasteret_ml.collection.build.row_groups import RowGroup, make_group
from rasteret_ml.collection.build.temp_store import TempStore
from rasteret_ml.collection.build.headers import OpenedFile

__all__ = ["Assembly", "GROUP"]

GROUP = 256
"""Records that become Arrow columns together."""
_MAKING_AT_ONCE = 2


class Assembly:
    """Takes headers in any order, gives the rows in the order of their drafts."""

    def __init__(self, drafts: Sequence[RecordDraft], spill: TempStore, *, strict: bool = False) -> None:
        """Prepare for `drafts`; `strict` raises the first failure instead of listing it."""
        self._drafts = drafts
        self._spill = spill
        self._strict = strict
        count = -(-len(drafts) // GROUP)
        self._waiting = [0] * count
        """Per group, addresses whose header is not there yet."""
        self._users: dict[str, int | list[int]] = {}
        """Per address the group, or groups, that need its header."""
        self._making = 0
        self._room = asyncio.Event()
        self._opened: dict[str, OpenedFile | RasteretError] = {}
        self._groups: list[tuple[RowGroup, Callable[[], Mapping[str, pa.StructArray]]] | None] = [None] * count
        """Rows, and what gives their tile tables back."""
        for number in range(count):
            self._expect(number)

    def _expect(self, number: int) -> None:
        for href in self._hrefs_of(number):
            known = self._users.get(href)
            if known is None:
                self._users[href] = number
            elif isinstance(known, int):
                self._users[href] = [known, number]
            else:
                known.append(number)
            self._waiting[number] += 1

    def _part(self, number: int) -> Sequence[RecordDraft]:
        return self._drafts[number * GROUP : (number + 1) * GROUP]

    def _hrefs_of(self, number: int) -> dict[str, None]:
        return dict.fromkeys(asset.href for draft in self._part(number) for asset in draft.assets.values())

    @property
    def hrefs(self) -> list[str]:
        """Every address once, in the order of the records."""
        return list(self._users)

    async def take(self, href: str, result: OpenedFile | RasteretError) -> None:
        """Learn what was found at an address; where that completes a group, make its rows.

        Raises:
            RasteretError: `result`, or what is wrong with a record, where the assembly is strict.
        """
        if self._strict and isinstance(result, RasteretError):
            raise result
        while self._making >= _MAKING_AT_ONCE:  # whoever reads faster than rows are made, waits
            await self._room.wait()
        self._opened[href] = result
        users = self._users[href]
        for number in [users] if isinstance(users, int) else users:
            self._waiting[number] -= 1
            if not self._waiting[number]:
                await self._make_in_turn(number)

    async def finish(self) -> list[RowGroup]:
        """The rows, once every address has been taken."""
        for number, group in enumerate(self._groups):
            if group is None:  # records without any address
                await self._make(number)
        made = [group for group in self._groups if group is not None]
        return [replace(rows, metadata=tables()) for rows, tables in made]

    async def _make_in_turn(self, number: int) -> None:
        self._making += 1
        self._room.clear()
        try:
            await self._make(number)
        finally:
            self._making -= 1
            self._room.set()

    async def _make(self, number: int) -> None:
        hrefs = self._hrefs_of(number)
        opened = {href: self._opened[href] for href in hrefs}
        for href in hrefs:
            users = self._users[href]
            if isinstance(users, list) and len(users) > 1:
                self._users[href] = [user for user in users if user != number]
            else:
                del self._opened[href]
        group = await asyncio.to_thread(self._keep, self._part(number), opened)
        if self._strict and group[0].failures:
            raise group[0].failures[0].error
        self._groups[number] = group

    def _keep(
        self, drafts: Sequence[RecordDraft], opened: Mapping[str, OpenedFile | RasteretError]
    ) -> tuple[RowGroup, Callable[[], Mapping[str, pa.StructArray]]]:
        group = make_group(drafts, opened)
        return replace(group, metadata={}), self._spill.keep(group.metadata)
