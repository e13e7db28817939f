"""Statistics of bands and labels in one pass of bounded memory, and the YAML file that stores them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import yaml

from rasteret_ml.datasets.combine import RasteretUnion
from rasteret_ml.datasets.dataset_config import MASK_KEYS
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.samplers.ranks import uniforms
from rasteret_ml.transforms.chip_pass import ChipPass, CountedChip

_HEADER = "# Statistics over valid pixels, in stored units (or scaled: true), made by rasteret_ml.dataset_statistics.\n"
_BINS = 64
# Pixels to keep of a band that has too many values to count: the standard deviation of a percentile's rank is then at
# most 0.14 %.
_SAMPLE = 1 << 17


@dataclass(frozen=True, slots=True, kw_only=True)
class BandStatistics:
    """Statistics of one band over valid, finite pixels, of stored values unless made with `scaled`."""

    mean: float  #: Mean.
    std: float  #: Standard deviation (population).
    min: float  #: Minimum.
    max: float  #: Maximum.
    count: int  #: Number of pixels.
    percentiles: dict[float, float]  #: Value of each percentile, by numpy's default (linear) method.
    #: Pixels in 64 equal bins from `min` to `max`, the last one closed, as in `numpy.histogram`.
    histogram: tuple[int, ...]
    #: Pixels that percentiles and histogram are computed from: `count` if exact, else the size of a random sample.
    sampled: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatistics:
    """Statistics of a dataset, and how they were made."""

    bands: dict[str, BandStatistics]  #: By band, in the order of C; continuous labels by their key, `mask`.
    classes: dict[int, int]  #: Pixels of each class in `mask`; empty without categorical labels.
    #: How they were made: `seed`, `size`, `chips` (read), `chips_in_all`, `pixels` (counted, over all bands), `bounds`
    #: (of the area, by CRS), and `scaled` if they are of scaled values.
    made: dict[str, Any]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each band `[C]`."""
        return tuple(band.mean for band in self.bands.values())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each band `[C]`; 1 for a constant band, to divide by."""
        return tuple(band.std if band.std > 0 else 1.0 for band in self.bands.values())

    @property
    def class_shares(self) -> dict[int, float]:
        """Share of each class among all labelled pixels."""
        total = sum(self.classes.values())
        return {value: count / total for value, count in self.classes.items()}

    @property
    def class_weights(self) -> dict[int, float]:
        """Weights for a loss, inverse to the classes' shares; their mean over pixels is 1."""
        total, classes = sum(self.classes.values()), len(self.classes)
        return {value: total / (classes * count) for value, count in self.classes.items()}

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a YAML file atomically; return its path."""
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        bands = {name: asdict(band) | {"histogram": list(band.histogram)} for name, band in self.bands.items()}
        document = {"made": self.made, "bands": bands, "classes": dict(self.classes)}
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(_HEADER)
                yaml.safe_dump(document, file, sort_keys=False, default_flow_style=None, width=120)
            os.replace(name, target)
        finally:
            Path(name).unlink(missing_ok=True)
        return str(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DatasetStatistics:
        """Read a file that `save` wrote.

        Raises:
            DataError: not such a file.
        """
        try:
            with open(Path(path).expanduser(), encoding="utf-8") as file:
                found = yaml.safe_load(file)
            bands = {str(name): _band_from(values) for name, values in found["bands"].items()}
            classes = {int(value): int(count) for value, count in (found.get("classes") or {}).items()}
            return cls(bands=bands, classes=classes, made=dict(found.get("made") or {}))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{os.fspath(path)} is not a statistics YAML ({type(error).__name__}: {error}); delete it to "
                "measure again."
            ) from error


def _band_from(values: Mapping[str, Any]) -> BandStatistics:
    numbers = {name: float(values[name]) for name in ("mean", "std", "min", "max")}
    percentiles = {q: float(value) for q, value in values["percentiles"].items()}
    histogram = tuple(int(count) for count in values["histogram"])
    counts = {name: int(values[name]) for name in ("count", "sampled")}
    return BandStatistics(percentiles=percentiles, histogram=histogram, **numbers, **counts)  # type: ignore[arg-type]


def dataset_statistics(
    dataset: Any,
    *,
    aois: Any = None,
    size: int = 256,
    max_chips: int | None = 64,
    batch_size: int = 8,
    seed: int = 0,
    percentiles: Sequence[float] = (2, 98),
    ignore_index: int = -100,
    key: str = "mask",
    scaled: bool = False,
) -> DatasetStatistics:
    """Measure every band, and count the classes of labels, over the valid pixels of a grid of chips, in one pass.

        statistics = rm.dataset_statistics(dataset, aois=train_area)
        ready = rm.normalize(batch, statistics.mean, statistics.std)

    Memory does not grow with the number of chips. Means, deviations and extremes are of all pixels that are read. So
    are percentiles and histograms of integers of up to 16 bits; those of other types are of 131,072 random pixels per
    band. The dates of a time series `[T, C, H, W]` count together. The result depends on the arguments alone, not on
    the batch size.

    Args:
        dataset: Images, labels or a combination, whose samples have `mask_valid`.
        aois: Polygons to stay in: pixels whose centre is outside do not count, and those in several polygons count for
            each. Statistics for training should not include validation data.
        size: Chip size in pixels.
        max_chips: Maximum number of chips to read, random ones of the grid; None = all.
        batch_size: Chips to read together.
        seed: Seed of the choice of chips and of sampled pixels.
        percentiles: Between 0 and 100.
        ignore_index: Label value that is not a class.
        key: Key of the labels to count, where there are several heads.
        scaled: Measure scaled values, `x * scale + offset`, as `normalize(scaled=True)` needs; default stored values.

    Raises:
        UsageError: a band without valid pixels, an invalid percentile, or samples without `mask_valid`, without
            anything to measure, or (with `scaled`) without `scale`.
    """
    ranks = tuple(q.item() if isinstance(q, np.generic) else q for q in percentiles)
    if not all(0 <= q <= 100 for q in ranks):
        raise UsageError(f"percentiles must lie between 0 and 100, got {ranks}.")
    chips = ChipPass(dataset, aois, size, max_chips, batch_size, seed, key)
    bands: list[Accumulator] = []
    continuous: list[Accumulator] = []
    classes: Counter[int] = Counter()
    for chip in chips:
        image, labels = chip.sample.get("image"), chip.labels
        if labels is None and (image is None or key != "mask"):
            heads = [name for name in chip.sample if name.startswith("mask") and name not in MASK_KEYS]
            have = f"choose one of their labels {heads} with key=" if heads else f"they have {list(chip.sample)}"
            raise UsageError(f"The samples have no {key!r}; {have}.")
        if image is not None:
            pixels = _scaled(image.numpy(), chip.sample) if scaled else image.numpy()
            _accumulate(bands, pixels, chip.counts, chip, seed)
        if labels is not None and labels.dtype.kind == "f":
            _accumulate(continuous, labels[None], chip.labels_count[None], chip, seed)
        elif labels is not None:
            classes.update(chip.class_counts(ignore_index))
    names = _band_names(dataset, len(bands)) + [key] * len(continuous)
    found = {n: a.result(ranks) for n, a in zip(names, [*bands, *continuous], strict=True)}
    measured = {name: band for name, band in found.items() if band is not None}
    if len(measured) < len(found) or not (measured or classes):
        empty = sorted(set(found) - set(measured)) or ["labels"]
        raise UsageError(f"No valid pixel of {empty} in {len(chips)} chips; raise max_chips= or choose other AOIs.")
    count = sum(band.count for band in measured.values()) if measured else sum(classes.values())
    made = _made(chips, size, seed, count) | ({"scaled": True} if scaled else {})
    return DatasetStatistics(bands=measured, classes=dict(sorted(classes.items())), made=made)


def _scaled(image: npt.NDArray[Any], sample: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Scale stored values `[C, H, W]` or `[T, C, H, W]`, in float64."""
    if image.dtype.kind == "c":
        return image  # refused by _accumulate
    if "scale" not in sample:
        raise UsageError("scaled=True needs samples with 'scale', which records have that state one; leave it out.")
    scale, offset = (sample[key].double().numpy()[..., None, None] for key in ("scale", "offset"))
    values: npt.NDArray[Any] = image * scale + offset
    return values


def _made(chips: ChipPass, size: int, seed: int, pixels: int) -> dict[str, Any]:
    coverage = chips.grid.coverage
    bounds = {
        str(coverage.target_grids[k].crs): shapely.total_bounds(coverage.shapes[coverage.grid_index == k]).tolist()
        for k in np.unique(coverage.grid_index).tolist()
    }
    counts = {"chips": len(chips), "chips_in_all": len(chips.grid), "pixels": int(pixels)}
    return {"seed": int(seed), "size": int(size), **counts, "bounds": bounds}


def _accumulate(
    bands: list[Accumulator], image: npt.NDArray[Any], counts: npt.NDArray[np.bool_], chip: CountedChip, seed: int
) -> None:
    """Add an image `[C, H, W]` or `[T, C, H, W]` band by band."""
    if image.dtype.kind == "c":
        raise UsageError(f"{image.dtype} pixels have no order and no percentiles; measure their magnitude.")
    keep = np.moveaxis(np.broadcast_to(counts, image.shape), -3, 0)
    pixels = np.moveaxis(image, -3, 0)
    if not bands:
        bands.extend(accumulator_for(image.dtype) for _ in pixels)
    # Keys of pixels depend on the chip alone, not on what was read with it.
    rows = -(-pixels[0].size // 4)
    keys = uniforms(seed, chip.position + 1, range(rows)).reshape(-1)[: pixels[0].size].reshape(pixels[0].shape)
    for accumulator, values, kept in zip(bands, pixels, keep, strict=True):
        accumulator.add(values[kept], keys[kept])


def _band_names(dataset: Any, count: int) -> list[str]:
    """Return the names along C, numbered if they repeat; `band_0` and so on if there are none."""
    names = [str(name) for name in _image_bands(dataset)]
    if len(names) != count:
        return [f"band_{i}" for i in range(count)]
    numbers = [names[:stop].count(name) for stop, name in enumerate(names, start=1)]
    return [f"{name}_{i}" if names.count(name) > 1 else name for name, i in zip(names, numbers, strict=True)]


def _image_bands(dataset: Any) -> list[str]:
    operands = getattr(dataset, "datasets", None)
    if operands:
        found = [_image_bands(operand) for operand in operands]
        return found[0] if isinstance(dataset, RasteretUnion) else [name for names in found for name in names]
    return list(getattr(dataset, "bands", ()) or ()) if getattr(dataset, "is_image", True) else []


class _Counts:
    """Counts each value of a small integer type, from which all statistics follow exactly."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        self._low = int(limits[0])
        self._counts = np.zeros(int(limits[1]) - self._low + 1, np.int64)

    def add(self, values: npt.NDArray[Any], keys: npt.NDArray[np.float64]) -> None:
        """Add values `[N]`; their random keys are not needed."""
        self._counts += np.bincount(values.astype(np.int64) - self._low, minlength=len(self._counts))

    def result(self, percentiles: tuple[float, ...]) -> BandStatistics | None:
        """Compute the statistics of all pixels; None if there are none."""
        present = np.flatnonzero(self._counts)
        if not len(present):
            return None
        counts, values = self._counts[present], (present + self._low).astype(np.float64)
        total = int(counts.sum())
        mean = float((values * counts).sum() / total)
        variance = float((np.square(values - mean) * counts).sum() / total)
        ends = np.cumsum(counts)
        edges = np.histogram_bin_edges([], _BINS, (values[0], values[-1]))
        return BandStatistics(
            mean=mean,
            std=variance**0.5,
            min=float(values[0]),
            max=float(values[-1]),
            count=total,
            percentiles={q: _percentile(values, ends, q) for q in percentiles},
            histogram=tuple(np.histogram(values, edges, weights=counts)[0].astype(np.int64).tolist()),
            sampled=total,
        )


def _percentile(values: npt.NDArray[np.float64], ends: npt.NDArray[np.int64], q: float) -> float:
    """Interpolate linearly between ranks, as numpy does, given sorted values and their cumulative counts.

    `numpy.percentile` takes weights with the method "inverted_cdf" only.
    """
    rank = q / 100 * (int(ends[-1]) - 1)
    low = int(rank)
    at = np.searchsorted(ends, [low, min(low + 1, int(ends[-1]) - 1)], side="right")
    return float(np.quantile(values[at], rank - low))


class _Moments:
    """Merges mean and variance chip by chip, and keeps extremes and the pixels with the smallest keys as a sample.

    The merge is that of Chan, Golub & LeVeque (1979) in float64, which stays accurate for a large offset.
    """

    def __init__(self) -> None:
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        self._min, self._max = np.inf, -np.inf
        self._keys, self._sample = np.zeros(0), np.zeros(0)

    def add(self, values: npt.NDArray[Any], keys: npt.NDArray[np.float64]) -> None:
        """Add the finite of the values `[N]`, each with a random number in [0, 1)."""
        numbers = values.astype(np.float64)
        finite = np.isfinite(numbers)
        numbers, keys = numbers[finite], keys[finite]
        if not len(numbers):
            return
        count, mean = len(numbers), float(numbers.mean())
        squares = float(np.square(numbers - mean).sum())
        total, step = self._count + count, mean - self._mean
        self._squares += squares + step * step * self._count * count / total
        self._mean += step * count / total
        self._count = total
        self._min, self._max = min(self._min, float(np.min(numbers))), max(self._max, float(np.max(numbers)))
        self._keep(numbers, keys)

    def _keep(self, values: npt.NDArray[np.float64], keys: npt.NDArray[np.float64]) -> None:
        if len(self._keys) == _SAMPLE:
            smaller = keys < np.max(self._keys)
            values, keys = values[smaller], keys[smaller]
        self._keys = np.concatenate([self._keys, keys])
        self._sample = np.concatenate([self._sample, values])
        if len(self._keys) > _SAMPLE:
            smallest = np.argpartition(self._keys, _SAMPLE)[:_SAMPLE]
            self._keys, self._sample = self._keys[smallest], self._sample[smallest]

    def result(self, percentiles: tuple[float, ...]) -> BandStatistics | None:
        """Compute the statistics, percentiles and histogram from the sample; None if there are no pixels."""
        if not self._count:
            return None
        found = np.percentile(self._sample, list(percentiles)).tolist() if percentiles else []
        try:
            bins = np.histogram(self._sample, _BINS, (self._min, self._max))[0]
        except ValueError:  # a range too narrow for bins in float64: one bin holds all
            bins = np.bincount(np.zeros(len(self._sample), np.int64), minlength=_BINS)
        return BandStatistics(
            mean=min(max(self._mean, self._min), self._max),
            std=0.0 if self._min == self._max else (self._squares / self._count) ** 0.5,  # not a rounding error
            min=self._min,
            max=self._max,
            count=self._count,
            percentiles=dict(zip(percentiles, found, strict=True)),
            histogram=tuple(bins.tolist()),
            sampled=len(self._sample),
        )


Accumulator = _Counts | _Moments


def accumulator_for(dtype: np.dtype[Any]) -> Accumulator:
    """Choose an exact accumulator for integers of up to 16 bits, a streaming one for other types."""
    return _Counts(dtype) if dtype.kind in "iub" and dtype.itemsize <= 2 else _Moments()
