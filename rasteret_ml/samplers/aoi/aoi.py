"""What a sampler yields: three slices, which every TorchGeo dataset understands, that know where they come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import shapely

__all__ = ["AOI", "AOIDetails"]


class AOIDetails(NamedTuple):
    """What an AOI knows beyond its slices."""

    geometry: bytes | None = None
    """Geometry that it was drawn from as WKB, in `crs`; None = none."""
    crs: str | None = None
    """CRS text of the slices and the geometry: the dataset's, or its frame's where the dataset has several."""
    row: int = -1
    """Row of the AOI's source table; -1 = none."""
    epoch: int = 0
    """Epoch that it was drawn in."""
    position: int = -1
    """Place in the epoch's order."""
    seed: int = 0
    """Seed of the order."""
    label: int | float | None = None
    """The AOI's own class or value, where its table has labels."""
    min_valid: float = 0.0
    """Share of valid pixels, 0 to 1, below which a reader is to try the spares; 0 = none is asked for."""
    spares: tuple[tuple[float, float], ...] = ()
    """Upper left corners (x, y) of further draws for this position, from the same polygon, in the order to try."""
    blank: bool = False
    """Whether it is there to even out ranks alone: its sample is to have no valid pixel and no label."""


class AOI(tuple[slice, slice, slice]):
    """A place and time to read: `(x, y, t)` slices with identity.

    x and y are `slice(start, stop, pixel size)` in CRS units, t is `slice(start, stop, 1)` of pandas
    timestamps. It is a plain tuple of three to whoever does not know better.
    """

    details: AOIDetails

    def __new__(cls, slices: tuple[slice, slice, slice], details: AOIDetails = AOIDetails()) -> AOI:  # noqa: B008
        """Make one from its slices and details."""
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
        """The geometry that it was drawn from, in `crs`."""
        return None if self.details.geometry is None else shapely.from_wkb(self.details.geometry)

    @property
    def draw(self) -> tuple[int, int, int] | None:
        """(seed, epoch, position) that it is a function of; None where no sampler drew it."""
        known = self.details
        return None if known.position < 0 else (known.seed, known.epoch, known.position)

    def spare(self, k: int) -> AOI:
        """The k-th alternative, from 0: the same AOI, time and size elsewhere; it has no spares itself.

        Raises:
            IndexError: there are not so many.
        """
        spares = self.details.spares
        if not 0 <= k < len(spares):
            raise IndexError(f"spare {k} of {len(spares)}")
        (xmin, ymax), (x, y, t) = spares[k], self
        width, height = round((x.stop - x.start) / x.step), round((y.stop - y.start) / y.step)
        slices = slice(xmin, xmin + width * x.step, x.step), slice(ymax - height * y.step, ymax, y.step), t
        return AOI(slices, self.details._replace(spares=()))

    def __repr__(self) -> str:
        x, y, t = self
        return f"AOI(x={x.start}:{x.stop}, y={y.start}:{y.stop}, t={t.start}:{t.stop}, row={self.row})"
