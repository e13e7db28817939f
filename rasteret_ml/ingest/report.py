"""What became of a build."""

from __future__ import annotations

from dataclasses import dataclass

from rasteret_ml.errors import RasteretError

__all__ = ["BuildFailure", "BuildReport"]


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
