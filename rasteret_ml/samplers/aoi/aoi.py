"""The query that a sampler yields: three slices, which every TorchGeo dataset understands, with their origin."""

from __future__ import annotations

from typing import Any, NamedTuple

import shapely


class AOIDetails(NamedTuple):
    """What an AOI carries besides its slices."""

    geometry: bytes | None = None  #: Geometry it was drawn from, as WKB in `crs`; None = no geometry.
    #: CRS text of the slices and the geometry: the dataset's, or its target grid's if there are several.
    crs: str | None = None
    row: int = -1  #: Row in the source AOI table; -1 = no table.
    epoch: int = 0  #: Epoch it was drawn in.
    position: int = -1  #: Position in the epoch's order, over all ranks.
    seed: int = 0  #: Seed of the order.
    label: int | float | None = None  #: The AOI's class or value, if its table has labels.
    #: Share of valid pixels, 0 to 1, below which a reader tries the spares; 0 = accept any chip.
    min_valid: float = 0.0
    #: Upper left corners (x, y) of alternative chips in the same polygon, in the order to try.
    spares: tuple[tuple[float, float], ...] = ()
    blank: bool = False  #: Whether it only pads ranks to equal length: its sample has no valid pixel and no label.


class AOI(tuple[slice, slice, slice]):
    """A place and time to read: `(x, y, t)` slices with identity.

    x and y are `slice(start, stop, pixel size)` in CRS units, t is `slice(start, stop, 1)` of pandas timestamps.
    Code that knows nothing of AOIs sees a plain tuple of three slices. Fields of `AOIDetails` can be read from the AOI
    itself, as `aoi.row`.
    """

    details: AOIDetails

    def __new__(cls, slices: tuple[slice, slice, slice], details: AOIDetails = AOIDetails()) -> AOI:  # noqa: B008
        """Create an AOI from its slices and details."""
        self = super().__new__(cls, slices)
        self.details = details
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return AOI, (tuple(self), self.details)

    def __getattr__(self, name: str) -> Any:
        if name in AOIDetails._fields and name != "geometry":
            return getattr(self.details, name)
        raise AttributeError(f"AOI has no attribute {name!r}")

    @property
    def geometry(self) -> shapely.Geometry | None:
        """The geometry it was drawn from, in `crs`."""
        return None if self.details.geometry is None else shapely.from_wkb(self.details.geometry)

    @property
    def draw(self) -> tuple[int, int, int] | None:
        """(seed, epoch, position), which determine the AOI; None if no sampler drew it."""
        details = self.details
        return None if details.position < 0 else (details.seed, details.epoch, details.position)

    def spare(self, k: int) -> AOI:
        """Return the k-th alternative, from 0: same identity, time and size at another place, without spares.

        Raises:
            IndexError: if there are `k` spares or fewer.
        """
        spares = self.details.spares
        if not 0 <= k < len(spares):
            raise IndexError(f"k must be >= 0 and less than the number of spares, {len(spares)}, got {k}.")
        (xmin, ymax), (x, y, t) = spares[k], self
        width, height = round((x.stop - x.start) / x.step), round((y.stop - y.start) / y.step)
        slices = slice(xmin, xmin + width * x.step, x.step), slice(ymax - height * y.step, ymax, y.step), t
        return AOI(slices, self.details._replace(spares=()))

    def __repr__(self) -> str:
        x, y, t = self
        return f"AOI(x={x.start}:{x.stop}, y={y.start}:{y.stop}, t={t.start}:{t.stop}, row={self.row})"
