"""What all samplers are: places, a seed, an epoch, and AOIs made of corners."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry
from torch.utils.data import DistributedSampler

from rasteret_ml.errors import ResumeError, UsageError
from rasteret_ml.fingerprint import Fingerprint, check_fingerprint, digest
from rasteret_ml.geo.regions import dilate_by_box, union_of
from rasteret_ml.geo.times import instant, nearest_ns
from rasteret_ml.samplers.aoi.aoi import AOI, AOIDetails
from rasteret_ml.samplers.aoi.aoi_table import AOITable
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside, coverage_digest, without
from rasteret_ml.samplers.ranks import Ranks, Remainder, checked_remainder, checked_seed, rank_positions

__all__ = ["ChipSampler", "Windows", "dilated", "pixel_pair"]

Floats = npt.NDArray[np.float64]
Corners = tuple[tuple[float, float], ...]

_BLOCK = 1024
"""AOIs made at once."""
_VERSION = 1
"""Of a state."""


class ChipSampler(DistributedSampler[AOI]):
    """What the samplers share; `total` and `_made` are theirs.

    It is torch's DistributedSampler to whoever asks (Lightning then leaves it as it is): it deals its epoch to the
    ranks of the process group, see `rank_positions`, and `set_epoch` chooses the epoch. `state_dict` says in a few
    hundred bytes where it stands, whatever the number of ranks and workers.
    """

    def __init__(
        self, dataset: Any, places: AOICoverage, time: Any, outside: Outside, seed: int, remainder: Remainder
    ) -> None:
        # Not by way of DistributedSampler, which wants ranks at once and counts a dataset's items.
        self.seed = checked_seed(seed)
        self.epoch = 0
        self.remainder = checked_remainder(remainder)
        self.ranks: Ranks | None = None
        """The ranks to deal to; None = those of torch's process group when a pass begins."""
        self._passes = 0
        self._epoch_was_set = False
        self._start = 0
        self._stands = (0, 0)
        self._plan: Fingerprint | None = None
        self._windows = Windows(dataset, time)
        self.places: AOICoverage = self._windows.met(places, outside)
        """The geometries that chips are made from."""

    # The order ----------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Chips in an epoch, of all ranks together."""
        raise NotImplementedError

    def _made(self, positions: range) -> list[AOI]:
        """The AOIs at some positions of the current epoch, all below `total`."""
        raise NotImplementedError

    def at(self, position: int) -> AOI:
        """The AOI at a position of the current epoch, counted over all ranks."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of an epoch of {self.total}")
        return self._made(range(position, position + 1))[0]

    def __len__(self) -> int:
        """Chips in an epoch of this rank."""
        return len(self._positions(0))

    def __iter__(self) -> Iterator[AOI]:
        start, self._start = self._start, 0
        return self._pass(start, self._positions(start))

    def _positions(self, start: int) -> range:
        ranks = self.ranks or Ranks.now()
        if self.total < ranks.count and self.remainder == "drop":
            raise UsageError(
                f"{self.total} chips cannot be dealt to {ranks.count} ranks; take more, or remainder='pad' or 'repeat'."
            )
        return rank_positions(self.total, start, ranks, self.remainder)

    def _pass(self, start: int, positions: range) -> Iterator[AOI]:
        self._stands = self.epoch, start
        for first in range(0, len(positions), _BLOCK):
            block = positions[first : first + _BLOCK]
            for position, aoi in zip(block, self._evened(block), strict=True):
                # All ranks have had their chips of this turn, or are about to.
                turn = (position - start) // positions.step
                self._stands = self.epoch, min(start + (turn + 1) * positions.step, self.total)
                yield aoi

    def _evened(self, positions: range) -> list[AOI]:
        """The AOIs at positions of which some may lie past the epoch's end."""
        inside = sum(1 for _ in itertools.takewhile(lambda p: p < self.total, positions))
        made = self._made(positions[:inside]) if inside else []
        for position in positions[inside:]:
            again = self.at(position % self.total)
            if self.remainder == "pad":
                again = AOI(again, again.details._replace(position=position, blank=True, min_valid=0.0, spares=()))
            made.append(again)
        return made

    # Epochs and resuming --------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass (Lightning and `DataLoader` do)."""
        if int(epoch) != self.epoch:
            self._start = 0
            self._stands = int(epoch), 0
        self.epoch = int(epoch)
        self._epoch_was_set = True

    def start_pass(self) -> None:
        """Called by `DataLoader` before each pass: the next epoch, unless one was set since the last one."""
        if self._passes and not self._epoch_was_set:
            self.epoch += 1
        self._passes += 1
        self._epoch_was_set = False

    @property
    def start(self) -> int:
        """Position, over all ranks, that the next pass begins at: 0 but after `start_at` and `load_state_dict`."""
        return self._start

    def start_at(self, position: int) -> None:
        """Let the next pass begin at a position of the current epoch, counted over all ranks.

        Raises:
            UsageError: a position beyond the epoch.
        """
        if not 0 <= position <= self.total:
            raise UsageError(f"An epoch of {self.total} chips cannot be taken up at position {position}.")
        self._start = int(position)
        self._stands = self.epoch, self._start

    def plan(self) -> Fingerprint:
        """What the order is a function of, beside the epoch: two samplers of one plan give the same chips."""
        if self._plan is None:
            self._plan = self._planned()
        return dict(self._plan)

    def _planned(self) -> Fingerprint:
        windows, table = self._windows.time, self.places.table
        times = [windows.start, windows.stop] + ([] if table is None else [table.start, table.stop, table.labels])
        return {
            "sampler": type(self).__name__,
            "chips": self.total,
            "seed": self.seed,
            **self._options(),
            "places": f"{len(self.places)}:{coverage_digest(self.places)}",
            "times": digest(*times),
        }

    def _options(self) -> Fingerprint:
        """What the arguments of a sampler add to its plan."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: version, plan, epoch, and position over all ranks. Plain values, less than a kilobyte.

        The position is that of what was taken from the sampler; a loader with workers takes ahead, so there ask
        `DataLoader.state_dict`.
        """
        epoch, position = self._stands
        return {"version": _VERSION, "plan": self.plan(), "epoch": epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where `state_dict` was taken, on any number of ranks and workers.

        Raises:
            ResumeError: the state is of another plan or version; the message names each difference.
        """
        if state.get("version") != _VERSION:
            raise ResumeError(f"A sampler's state has version {_VERSION}, not {state.get('version')!r}.")
        absent = {"plan", "epoch", "position"} - state.keys()
        if absent:
            raise ResumeError(f"This is not a sampler's whole state: {', '.join(sorted(absent))} is missing.")
        check_fingerprint(state["plan"], self.plan(), type(self).__name__)
        self.epoch = int(state["epoch"])
        self._epoch_was_set = True
        self.start_at(int(state["position"]))

    # What it draws from -----------------------------------------------------------------------------------------

    @property
    def aois(self) -> AOITable | None:
        """The table that chips are made from; `sampler.aois.row(aoi)` has a chip's attributes. None = no AOIs."""
        return self.places.table

    @property
    def times(self) -> tuple[pd.Timestamp, pd.Timestamp]:
        """First and last instant that any chip asks for."""
        return self._windows.span(self.places)

    def reach(self) -> list[tuple[str, BaseGeometry]]:
        """For each CRS, the region (Polygon or MultiPolygon) that chips of any epoch may cover.

        Of chips as they are asked for: a dataset that puts a chip on its own pixels moves it by half a pixel at most.
        """
        found: dict[str, list[npt.NDArray[np.object_]]] = {}
        for number, frame in enumerate(self.places.frames):
            parts = self._reached(number)
            if len(parts):
                found.setdefault(frame.crs, []).append(parts)
        joined = {crs: np.concatenate(parts) for crs, parts in found.items()}
        return [(crs, parts[0] if len(parts) == 1 else union_of(parts)) for crs, parts in joined.items()]

    def _reached(self, frame: int) -> npt.NDArray[np.object_]:
        """Polygons `[M]` that together are what chips in a frame may cover."""
        raise NotImplementedError

    def _aoi(
        self,
        corner: Floats,
        place: int,
        position: int,
        size: tuple[int, int],
        min_valid: float = 0.0,
        spares: Corners = (),
    ) -> AOI:
        """The chip of `size` pixels (height, width) whose upper left corner is `corner` (x, y)."""
        height, width = size
        places, number = self.places, int(self.places.aoi[place])
        frame = places.frames[places.frame[place]]
        xres, yres = frame.res
        xmin, ymax = float(corner[0]), float(corner[1])
        table = places.table
        label = None if table is None or table.labels is None else table.labels[number].item()
        details = AOIDetails(
            geometry=places.wkb[place],
            crs=frame.crs,
            row=int(places.rows[place]),
            epoch=self.epoch,
            position=position,
            seed=self.seed,
            label=label,
            min_valid=min_valid,
            spares=spares,
        )
        x, y = slice(xmin, xmin + width * xres, xres), slice(ymax - height * yres, ymax, yres)
        return AOI((x, y, self._windows.of(places, place)), details)


class Windows:
    """The time of interest, and the AOIs' own windows within it."""

    def __init__(self, dataset: Any, time: Any) -> None:
        self.time = _time_slice(dataset, time)

    def of(self, places: AOICoverage, place: int) -> slice:
        """The time slice of a place."""
        table = places.table
        if table is None or table.start is None or table.stop is None:
            return self.time
        start, stop = table.start[places.aoi[place]], table.stop[places.aoi[place]]
        first = self.time.start if np.isnat(start) else max(self.time.start, pd.Timestamp(start))
        last = self.time.stop if np.isnat(stop) else min(self.time.stop, pd.Timestamp(stop))
        return slice(first, last, 1)

    def met(self, places: AOICoverage, outside: Outside) -> AOICoverage:
        """The places whose windows have a time in common with the time of interest."""
        table = places.table
        if table is None or table.start is None or table.stop is None:
            return places
        first, last = (nearest_ns(end).to_datetime64() for end in (self.time.start, self.time.stop))
        missed = (table.start[places.aoi] > last) | (table.stop[places.aoi] < first)
        if not missed.any():
            return places
        span = f"{self.time.start} to {self.time.stop}"
        return without(
            places, missed, outside, lambda rows: f"The time windows of AOIs {rows} lie outside {span}; widen them"
        )

    def span(self, places: AOICoverage) -> tuple[pd.Timestamp, pd.Timestamp]:
        """First and last instant of all places."""
        table = places.table
        if table is None or table.start is None or table.stop is None:
            return self.time.start, self.time.stop
        start, stop = table.start[places.aoi], table.stop[places.aoi]
        first = self.time.start if np.isnat(start).any() else max(self.time.start, pd.Timestamp(np.sort(start)[0]))
        last = self.time.stop if np.isnat(stop).any() else min(self.time.stop, pd.Timestamp(np.sort(stop)[-1]))
        return first, last


def pixel_pair(value: int | tuple[int, int], what: str = "size") -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        UsageError: neither, or less than a pixel.
    """
    try:
        pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
        if isinstance(value, (str, bool)) or any(isinstance(v, bool) or v != int(v) for v in pair):
            raise TypeError
        height, width = (int(v) for v in pair)
    except (TypeError, ValueError):
        raise UsageError(f"{what} is a number of pixels or (height, width), not {value!r}.") from None
    if height < 1 or width < 1:
        raise UsageError(f"{what} must be at least one pixel, not {value!r}.")
    return height, width


def dilated(shapes: npt.NDArray[np.object_], width: float, height: float) -> npt.NDArray[np.object_]:
    """What boxes centred in any of the shapes cover."""
    areal = np.isin(shapely.get_type_id(shapes), (3, 6))
    merged = [shapely.multipolygons(shapely.get_parts(shapes[areal]))] if areal.any() else []
    return np.array([dilate_by_box(shape, width, height) for shape in [*merged, *shapes[~areal]]], dtype=object)


def _time_slice(dataset: Any, time: Any) -> slice:
    _, _, t = dataset.bounds
    if time is None:
        return slice(t.start, t.stop, 1)
    parts = (
        (time.left, time.right) if isinstance(time, pd.Interval) else time.split("/") if isinstance(time, str) else time
    )
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        raise UsageError(f"time= is (start, end), 'start/end' or a pandas Interval, not {time!r}.")
    try:
        start, stop = instant(parts[0]), instant(parts[1], last=True)
    except UsageError as error:
        raise UsageError(f"time= {time!r}: {error}") from None
    first, last = t.start if start is None else start, t.stop if stop is None else stop
    if first > last:
        raise UsageError(f"time= {time!r} ends before it starts.")
    return slice(first, last, 1)
