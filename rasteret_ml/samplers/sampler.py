"""What all samplers share: epochs, ranks, resuming, time windows, and AOIs made from corners."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args

import numpy as np
import pandas as pd
import shapely
from shapely.geometry.base import BaseGeometry
from torch.utils.data import DistributedSampler

from rasteret_ml.errors import ResumeError, UsageError
from rasteret_ml.fingerprint import Fingerprint, check_fingerprint, digest
from rasteret_ml.geo.regions import Floats, Geometries, Integers, dilate_by_box, union_polygons
from rasteret_ml.geo.times import clamp_ns, parse_time
from rasteret_ml.samplers.aoi.aoi import AOI, AOIDetails
from rasteret_ml.samplers.aoi.aoi_table import AOITable, is_polygon
from rasteret_ml.samplers.aoi.coverage import AOICoverage, Outside
from rasteret_ml.samplers.ranks import Ranks, Remainder, epoch_random, parse_seed

Config = TypeVar("Config")

_BLOCK = 1024  # AOIs to create at once.
_VERSION = 2  # Version of a state. Version 1 had the key `places` where the plan now has `coverage`.


class ChipSampler(DistributedSampler[AOI]):
    """Base of the samplers; subclasses set `total`, and define `_draw`, `_plan_options` and `_reach_of`.

    It is a `DistributedSampler`, so Lightning does not replace it: it distributes its epoch over the ranks of the
    process group, and `set_epoch` selects the epoch. `state_dict` returns the current position, which does not depend
    on the number of ranks and workers, in a few hundred bytes.
    """

    total: int  #: Chips in an epoch, over all ranks.

    def __init__(
        self, dataset: Any, coverage: AOICoverage, time: Any, outside: Outside, seed: int, remainder: Remainder
    ) -> None:
        # DistributedSampler.__init__ is not called: it needs the ranks now, and counts a dataset's items.
        if remainder not in get_args(Remainder):
            raise UsageError(f"remainder must be 'drop', 'pad' or 'repeat', got {remainder!r}.")
        self.seed = parse_seed(seed)
        self.epoch = 0
        self.remainder = remainder
        #: The rank to sample for; None = that of torch's process group when a pass begins.
        self.ranks: Ranks | None = None
        self._advance = False  # Whether the next pass begins another epoch.
        self._start = 0
        self._progress = (0, 0)
        self._plan: Fingerprint | None = None
        self._epoch_order: tuple[tuple[int, int], Any] | None = None
        self._time = _time_slice(dataset, time)
        #: The AOIs that chips are drawn from, on the dataset's target grids.
        self.coverage: AOICoverage = _drop_outside_time(coverage, self._time, outside)

    # Order ----------------------------------------------------------------------------------------------------

    def _draw(self, positions: range) -> list[AOI]:
        """The AOIs at positions of the current epoch, all below `total`."""
        raise NotImplementedError

    def _once_per_epoch(self, compute: Callable[[np.random.Generator], Any]) -> Any:
        """The result of a function for the current epoch, from the epoch's generator; kept until the next epoch."""
        key = self.seed, self.epoch
        if self._epoch_order is None or self._epoch_order[0] != key:
            self._epoch_order = key, compute(epoch_random(*key))
        return self._epoch_order[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epoch_order": None}

    def at(self, position: int) -> AOI:
        """Return the AOI at a position of the current epoch, counted over all ranks."""
        if not 0 <= position < self.total:
            raise IndexError(f"position must be between 0 and {self.total - 1}, got {position}.")
        return self._draw(range(position, position + 1))[0]

    def __len__(self) -> int:
        """Return the number of chips of this rank in an epoch."""
        return len(self._positions(0))

    def __iter__(self) -> Iterator[AOI]:
        start, self._start = self._start, 0
        return self._iterate(start, self._positions(start))

    def _positions(self, start: int) -> range:
        """Positions of this rank: every `ranks.count`-th one from `start` on; those >= `total` are padding.

        The next `n` chips of all ranks are thus `n * ranks.count` successive positions: the sequence of global batches
        is the same for any number of ranks. All ranks get equally many.
        """
        ranks = self.ranks or Ranks.now()
        if self.total < ranks.count and self.remainder == "drop":
            raise UsageError(
                f"An epoch of {self.total} chips is too short for {ranks.count} ranks; use more chips, or "
                "remainder='pad' or 'repeat'."
            )
        left = self.total - start
        length = left // ranks.count if self.remainder == "drop" else -(-left // ranks.count)
        first = start + ranks.rank
        return range(first, first + length * ranks.count, ranks.count)

    def _iterate(self, start: int, positions: range) -> Iterator[AOI]:
        self._progress = self.epoch, start
        for first in range(0, len(positions), _BLOCK):
            block = positions[first : first + _BLOCK]
            for position, aoi in zip(block, self._draw_padded(block), strict=True):
                # Count the chips of all ranks in this step, which they take at the same time.
                step = (position - start) // positions.step
                self._progress = self.epoch, min(start + (step + 1) * positions.step, self.total)
                yield aoi

    def _draw_padded(self, positions: range) -> list[AOI]:
        """The AOIs at positions, of which some may lie past the end of the epoch."""
        inside = len(range(positions.start, min(positions.stop, self.total), positions.step))
        aois = self._draw(positions[:inside]) if inside else []
        for position in positions[inside:]:
            aoi = self.at(position % self.total)
            if self.remainder == "pad":
                aoi = AOI(aoi, aoi.details._replace(position=position, blank=True, min_valid=0.0, spares=()))
            aois.append(aoi)
        return aois

    # Epochs and resuming --------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next pass (Lightning and `DataLoader` call this)."""
        if int(epoch) != self.epoch:
            self._start = 0
            self._progress = int(epoch), 0
        self.epoch = int(epoch)
        self._advance = False

    def start_pass(self) -> None:
        """Advance to the next epoch, unless one was set since the last pass (`DataLoader` calls this)."""
        if self._advance:
            self.epoch += 1
        self._advance = True

    @property
    def start(self) -> int:
        """Position over all ranks at which the next pass begins: 0, except after `start_at` and `load_state_dict`."""
        return self._start

    def start_at(self, position: int) -> None:
        """Let the next pass begin at a position of the current epoch, counted over all ranks.

        Raises:
            UsageError: if the position lies beyond the epoch.
        """
        if not 0 <= position <= self.total:
            raise UsageError(f"position must be between 0 and {self.total}, got {position}.")
        self._start = int(position)
        self._progress = self.epoch, self._start

    def plan(self) -> Fingerprint:
        """Return what determines the order besides the epoch: samplers with equal plans yield the same chips."""
        if self._plan is None:
            time, table = self._time, self.coverage.table
            times = [time.start, time.stop] + ([] if table is None else [table.start, table.stop, table.labels])
            self._plan = {
                "sampler": type(self).__name__,
                "chips": self.total,
                "seed": self.seed,
                **self._plan_options(),
                "coverage": f"{len(self.coverage)}:{self.coverage.digest()}",
                "times": digest(*times),
            }
        return dict(self._plan)

    def _plan_options(self) -> Fingerprint:
        """The part of the plan that depends on a subclass's arguments."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return version, plan, epoch, and position over all ranks: plain values, less than a kilobyte.

        The position counts what was taken from the sampler. A loader with workers takes chips in advance; use
        `DataLoader.state_dict` there.
        """
        epoch, position = self._progress
        return {"version": _VERSION, "plan": self.plan(), "epoch": epoch, "position": position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass continue where `state_dict` was taken, with any number of ranks and workers.

        Raises:
            ResumeError: if the state has another version or plan; the message lists each difference.
        """
        if state.get("version") != _VERSION:
            raise ResumeError(
                f"The version of a sampler state must be {_VERSION}, got {state.get('version')!r}: another release "
                "wrote it. Start the epoch from its beginning, without the state."
            )
        missing = {"plan", "epoch", "position"} - state.keys()
        if missing:
            raise ResumeError(f"The sampler state is incomplete: {', '.join(sorted(missing))} is missing.")
        check_fingerprint(state["plan"], self.plan(), f"a {type(self).__name__}")
        self.epoch = int(state["epoch"])
        self._advance = False
        self.start_at(int(state["position"]))

    # Extent ---------------------------------------------------------------------------------------------------

    @property
    def aois(self) -> AOITable | None:
        """The AOI table; `sampler.aois.row(aoi)` returns a chip's attributes. None = no AOIs."""
        return self.coverage.table

    @property
    def times(self) -> tuple[pd.Timestamp, pd.Timestamp]:
        """First and last instant of all chips' time windows."""
        windows = self.coverage.windows
        if windows is None:
            return self._time.start, self._time.stop
        # NumPy's min and max are NaT if any value is: one open window opens the whole span.
        span = _intersect(self._time, np.min(windows[0]), np.max(windows[1]))
        return span.start, span.stop

    def reach(self) -> list[tuple[str, BaseGeometry]]:
        """Return, for each CRS, the region (Polygon or MultiPolygon) that chips of any epoch may cover.

        A dataset that snaps chips to its pixels moves them by up to half a pixel more.
        """
        by_crs: dict[str, list[Geometries]] = {}
        for _, grid, pairs in self.coverage.by_grid():
            by_crs.setdefault(grid.crs, []).append(self._reach_of(pairs))
        joined = {crs: np.concatenate(polygons) for crs, polygons in by_crs.items()}
        return [(crs, found[0] if len(found) == 1 else union_polygons(found)) for crs, found in joined.items()]

    def _reach_of(self, pairs: Integers) -> Geometries:
        """Polygons `[M]`, M > 0, whose union chips of some pairs on one target grid may cover."""
        raise NotImplementedError

    def _make_aoi(
        self, corners: Floats, pair: int, position: int, size: tuple[int, int], min_valid: float = 0.0
    ) -> AOI:
        """A chip of `size` pixels (height, width) from its upper left corner, followed by its spares' `[K, 2]`."""
        height, width = size
        coverage, table = self.coverage, self.coverage.table
        grid = coverage.target_grids[coverage.grid_index[pair]]
        xres, yres = grid.res
        (xmin, ymax), *spares = corners.tolist()
        label = None if table is None or table.labels is None else table.labels[coverage.aoi_index[pair]].item()
        details = AOIDetails(
            geometry=coverage.wkb[pair],
            crs=grid.crs,
            row=int(coverage.rows[pair]),
            epoch=self.epoch,
            position=position,
            seed=self.seed,
            label=label,
            min_valid=min_valid,
            spares=tuple((x, y) for x, y in spares),
        )
        x, y = slice(xmin, xmin + width * xres, xres), slice(ymax - height * yres, ymax, yres)
        windows = coverage.windows
        t = self._time if windows is None else _intersect(self._time, windows[0][pair], windows[1][pair])
        return AOI((x, y, t), details)


def config_from(cls: type[Config], value: Any, argument: str, scalar: str | None = None) -> Config:
    """Return options from themselves, a mapping of their fields (as in YAML), or None, the defaults.

    Anything else is the value of the field `scalar`.
    """
    if value is None or isinstance(value, cls):
        return cls() if value is None else value
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    listed = ", ".join(known)
    if not isinstance(value, Mapping):
        if scalar is not None:
            return cls(**{scalar: value})
        raise UsageError(f"{argument} must be of type {cls.__name__} or a mapping of {listed}, got {value!r}.")
    unknown = sorted(str(name) for name in value if name not in known)
    if unknown:
        raise UsageError(f"{argument} must have only the fields {listed}; got {', '.join(unknown)}.")
    return cls(**value)


def parse_size(value: int | tuple[int, int], argument: str = "size") -> tuple[int, int]:
    """Return (height, width) in pixels from one or two numbers; raises UsageError unless they are integers >= 1."""
    try:
        pair = (value, value) if isinstance(value, (int, np.integer)) else tuple(value)
        if isinstance(value, (str, bool)) or any(isinstance(v, bool) or v != int(v) for v in pair):
            raise TypeError
        height, width = (int(v) for v in pair)
    except (TypeError, ValueError):
        raise UsageError(f"{argument} must be a number of pixels or (height, width), got {value!r}.") from None
    if height < 1 or width < 1:
        raise UsageError(f"{argument} must be at least one pixel, got {value!r}.")
    return height, width


def chip_boxes(corners: Floats, sizes: Floats) -> Geometries:
    """Return chips `[N]` from their upper left corners (x, y) `[N, 2]`, and widths and heights `[N, 2]`."""
    (x, y), (width, height) = corners.T, sizes.T
    boxes: Geometries = shapely.box(x, y - height, x + width, y)
    return boxes


def dilate_shapes(shapes: Geometries, width: float, height: float) -> Geometries:
    """Return polygons whose union is covered by boxes centred anywhere in the shapes."""
    polygons = is_polygon(shapes)
    merged = [shapely.multipolygons(shapely.get_parts(shapes[polygons]))] if polygons.any() else []
    return np.array([dilate_by_box(shape, width, height) for shape in [*merged, *shapes[~polygons]]], dtype=object)


def _time_slice(dataset: Any, time: Any) -> slice:
    _, _, t = dataset.bounds
    if time is None:
        return slice(t.start, t.stop, 1)
    if isinstance(time, pd.Interval):
        time = (time.left, time.right)
    ends = time.split("/") if isinstance(time, str) else time
    if not isinstance(ends, (tuple, list)) or len(ends) != 2:
        raise UsageError(f"time must be (start, end), 'start/end' or a pandas Interval, got {time!r}.")
    try:
        start, stop = parse_time(ends[0]), parse_time(ends[1], last=True)
    except UsageError as error:
        raise UsageError(f"time={time!r}: {error}") from None
    first, last = t.start if start is None else start, t.stop if stop is None else stop
    if first > last:
        raise UsageError(f"time={time!r} ends before it starts.")
    return slice(first, last, 1)


def _intersect(time: slice, start: np.datetime64, stop: np.datetime64) -> slice:
    """The part of a time slice inside a window, whose ends may be NaT (open)."""
    first = time.start if np.isnat(start) else max(time.start, pd.Timestamp(start))
    last = time.stop if np.isnat(stop) else min(time.stop, pd.Timestamp(stop))
    return slice(first, last, 1)


def _drop_outside_time(coverage: AOICoverage, time: slice, outside: Outside) -> AOICoverage:
    """Drop the AOIs whose time window does not overlap the time of interest."""
    if coverage.windows is None:
        return coverage
    start, stop = coverage.windows
    first, last = (clamp_ns(end).to_datetime64() for end in (time.start, time.stop))
    span = f"{time.start} to {time.stop}"
    outside_span = (start > last) | (stop < first)
    return coverage.drop(outside_span, outside, f"The time windows of %s lie outside {span}; extend them")
