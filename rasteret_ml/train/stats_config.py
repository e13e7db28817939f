"""What a datamodule measures of its training area, and the YAML in which it is kept."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from rasteret_ml.errors import UsageError
from rasteret_ml.transforms.normalize import per_band_numbers
from rasteret_ml.transforms.statistics.statistics import DatasetStatistics, dataset_statistics

__all__ = ["ChannelStats", "StatsConfig"]

_CLASS_CHIPS = 256
"""Chips looked at for classes: more than for means, so that rare ones are found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStats:
    """What images are normalised by, as far as it is known."""

    mean: tuple[float, ...] | None
    """Of each band `[C]`."""
    std: tuple[float, ...] | None
    """Of each band `[C]`."""

    @classmethod
    def of(cls, mean: Sequence[float] | None, std: Sequence[float] | None) -> ChannelStats:
        """From numbers of any kind.

        Raises:
            UsageError: a number alone, a std that nothing can be divided by.
        """
        return cls(
            mean=None if mean is None else per_band_numbers("mean", mean),
            std=None if std is None else per_band_numbers("std", std),
        )

    def check(self, bands: tuple[str, ...]) -> None:
        """Raise UsageError where there is not a number for each band."""
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None and len(numbers) != len(bands):
                raise UsageError(f"{name} has {len(numbers)} numbers, the images have the bands {list(bands)}.")

    def filled(self, other: ChannelStats | DatasetStatistics | None) -> ChannelStats:
        """What is not known here, from there."""
        return self if other is None else ChannelStats(mean=self.mean or other.mean, std=self.std or other.std)

    @property
    def is_whole(self) -> bool:
        """Whether both are known."""
        return self.mean is not None and self.std is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsConfig:
    """How statistics come about: read from a YAML, or measured (and written there)."""

    path: str | None
    """The YAML; None = measured each time."""
    chips: int | None
    """Chips read; None = all."""
    size: int
    """Their size in pixels."""
    seed: int
    """Which ones."""
    scaled: bool
    """Whether they are of stored * scale + offset, instead of stored pixels."""

    def known(self, bands: tuple[str, ...]) -> DatasetStatistics | None:
        """Those of the YAML, where there is one.

        Raises:
            UsageError: it is of other bands or units.
        """
        path = None if self.path is None else Path(self.path).expanduser()
        if path is None or not path.exists():
            return None
        found = DatasetStatistics.load(path)
        remedy = "delete it, and it is measured again, or choose another path with statistics=."
        if tuple(found.bands) != bands:
            raise UsageError(f"{path} is of bands {list(found.bands)}, the data are of {list(bands)}; {remedy}")
        scaled = bool(found.made.get("scaled", False))
        if scaled != self.scaled:
            raise UsageError(f"{path} was measured with scaled={scaled}, and here is scaled={self.scaled}; {remedy}")
        return found

    def bands(self, dataset: Any, area: Any) -> DatasetStatistics:
        """Statistics of images inside `area`, from the YAML where it exists; else measured, and kept."""
        with self._alone():
            found = self.known(dataset.bands)
            if found is None:
                found = self._measured(dataset, area, self.chips, scaled=self.scaled)
                self._keep(found)
        return found

    def classes(self, labelled: Any, bands: tuple[str, ...], area: Any) -> dict[int, int]:
        """Pixels of each stored label value inside `area`: as `bands`, of a combination of images and labels."""
        with self._alone():
            known = self.known(bands)
            if known is not None and known.classes:
                return dict(known.classes)
            counts = dict(self._measured(labelled, area, _CLASS_CHIPS).classes)
            if known is not None:
                self._keep(dataclasses.replace(known, classes=counts))
        return counts

    def _measured(self, dataset: Any, area: Any, chips: int | None, *, scaled: bool = False) -> DatasetStatistics:
        options: dict[str, Any] = {"size": self.size, "seed": self.seed, "max_chips": chips, "scaled": scaled}
        return dataset_statistics(dataset, aois=area, **options)

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """Of several processes (ranks) at once, one measures and the others read what it wrote."""
        if self.path is None:
            return contextlib.nullcontext()
        path = Path(self.path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_name(f".{path.name}.lock"))

    def _keep(self, found: DatasetStatistics) -> None:
        if self.path is not None:
            found.save(self.path)
