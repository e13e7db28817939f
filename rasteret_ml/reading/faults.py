"""What could not be read of a batch, noted by the datasets that read it."""

from __future__ import annotations

from collections.abc import Sequence

from rasteret_ml.errors import RasteretError
from rasteret_ml.raster.execute import ReadFailure

__all__ = ["Faults"]


class Faults:
    """Why queries of a batch could not be read, by their place in it.

    A dataset that is given one (see `BatchReadable.begin`) notes what fails here and goes on with the others; the
    samples of failed queries then have the form of all, and no meaning.
    """

    def __init__(self) -> None:
        self._found: dict[int, list[ReadFailure | RasteretError]] = {}
        self._places: Sequence[int] | None = None

    def note(self, place: int, why: ReadFailure | RasteretError) -> None:
        """A query could not be read."""
        self._found.setdefault(place if self._places is None else self._places[place], []).append(why)

    def within(self, places: Sequence[int]) -> Faults:
        """For a side that reads only the queries at these places: what it notes is noted here."""
        part = Faults()
        part._found = self._found
        part._places = places if self._places is None else [self._places[place] for place in places]
        return part

    @property
    def by_place(self) -> dict[int, tuple[ReadFailure | RasteretError, ...]]:
        """What was found, by place in the whole batch, ascending."""
        return {place: tuple(self._found[place]) for place in sorted(self._found)}

    def has(self, place: int) -> bool:
        """Whether this query failed."""
        return (place if self._places is None else self._places[place]) in self._found
