"""What a sampler yields: three slices, which every TorchGeo dataset understands, that know where they come from."""

from __future__ import annotations

from typing import Any, NamedTuple

import shapely

__all__ = ["AOI", "AOIDetails"]


class AOIDetails(NamedTuple):
    """What an AOI knows beyond its slices."""

    geometry: bytes | None = None
    """Polygon that it was drawn from as WKB, in the dataset's CRS; None = no polygon."""
    crs: str | None = None
    """CRS text of the slices and the geometry."""
    row: int = -1
    """Row of the AOI table; -1 = none."""
    epoch: int = 0
    """Epoch that it was drawn in."""
    position: int = -1
    """Place in the epoch's order."""
    seed: int = 0
    """Seed of the order."""


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
        """The polygon that it was drawn from, in the dataset's CRS."""
        return None if self.details.geometry is None else shapely.from_wkb(self.details.geometry)

    def __repr__(self) -> str:
        x, y, t = self
        return f"AOI(x={x.start}:{x.stop}, y={y.start}:{y.stop}, t={t.start}:{t.stop}, row={self.row})"
