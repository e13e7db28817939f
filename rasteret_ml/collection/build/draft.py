"""A record before its headers are read."""


from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
import pandas as pd
from rasteret_ml.errors import UsageError
from dataclasses import dataclass
from rasteret_ml.errors import RasteretError

__all__ = ["AssetDraft", "BuildFailure", "BuildReport", "RecordDraft", "naive_utc"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFailure:
    """One file that could not be used."""

    record: str
    """Record id."""
    band: str
    """Band, `*` for a file of several."""
    href: str
    """Address without secrets."""
    error: RasteretError
    """Why."""

    def __str__(self) -> str:
        return f"{self.record}, band {self.band}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """Counts and failures of a build."""

    records: int
    """Rows written."""
    files: int
    """Files whose header was asked for."""
    requests: int
    """Requests made for headers."""
    seconds: float
    """Wall time of reading headers."""
    failures: tuple[BuildFailure, ...]
    """Files left out; a record loses that band, or is left out where no band remains."""

    def __str__(self) -> str:
        lines = [
            f"{self.records} records from {self.files} files ({self.requests} requests, {self.seconds:.1f} s), "
            f"{len(self.failures)} failures"
        ]
        return "\n".join([*lines, *(f"  {failure}" for failure in self.failures)])




@dataclass(frozen=True, slots=True, kw_only=True)
class AssetDraft:
    """Where one band, or all bands of a file, are to be found."""

    href: str
    """Address, unsigned."""
    band_index: int | None = None
    """Which sample of the file (from 0); None = the only one."""
    scale: float | None = None
    """Stated by the source (STAC `raster:bands`); wins over the file's."""
    offset: float | None = None
    """Likewise."""
    nodata: float | None = None
    """Stated by the source; used where the file declares none."""
    band_names: tuple[str, ...] = ()
    """What the source calls the bands of a file of several; each becomes a band of the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordDraft:
    """What a source says of one raster item."""

    id: str
    """Identifier."""
    assets: Mapping[str, AssetDraft]
    """By band name. The one key `*` stands for every band of a file, named once its header is read."""
    band_names: tuple[str, ...] = ()
    """Names for `*`; empty = the file's descriptions, else B1, B2, …"""
    datetime: dt.datetime | None = None
    """Acquisition, naive UTC; None = undated."""
    geometry: bytes | None = None
    """Footprint as WKB in lon/lat; None = the raster's own outline."""
    crs: str | None = None
    """CRS text, used where the file has none."""
    collection: str = ""
    """STAC collection."""
    properties: Mapping[str, Any] = field(default_factory=dict)
    """Further columns."""
    problems: tuple[tuple[str, str], ...] = ()
    """(band, reason) of what the source itself lacks."""


def naive_utc(value: Any) -> dt.datetime | None:
    """A datetime of any kind as naive UTC.

    Raises:
        UsageError: it is not a time.
    """
    if value is None or value is pd.NaT or value == "":
        return None
    try:
        stamp = pd.Timestamp(value)
    except (ValueError, TypeError) as error:
        raise UsageError(f"Not a time: {value!r} ({error}).") from None
    if stamp is pd.NaT:
        return None
    stamp = stamp.tz_convert(None) if stamp.tzinfo is not None else stamp
    naive: dt.datetime = stamp.floor("us").to_pydatetime()
    return naive


