"""Statistics of bands and labels in one bounded pass, and the YAML they are kept in."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import yaml

from rasteret_ml.datasets.config import MASK_KEYS
from rasteret_ml.errors import DataError, UsageError
from rasteret_ml.samplers.ranks import uniforms
from rasteret_ml.transforms.statistics.chip_pass import ChipPass, CountedChip
from rasteret_ml.transforms.statistics.moments import Accumulator, BandStatistics, accumulator_for

__all__ = ["DatasetStatistics", "dataset_statistics"]

_HEADER = "# Statistics over valid pixels, in stored units (or scaled: true), made by rasteret_ml.dataset_statistics.\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetStatistics:
    """Statistics of a dataset, and how they were made."""

    bands: dict[str, BandStatistics]
    """By band, in the order of C; of continuous labels their key, `mask`."""
    classes: dict[int, int]
    """Pixels of each class in `mask`, by class; empty without categorical labels."""
    made: dict[str, Any]
    """How: `seed`, `size`, `chips` (read), `chips_in_all`, `pixels` (counted, of all bands), `bounds` (of the area, by
    CRS), and `scaled` where they are of scaled values."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each band `[C]`."""
        return tuple(band.mean for band in self.bands.values())

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each band `[C]`; 1 for a constant band, so that it can be divided by."""
        return tuple(band.std if band.std > 0 else 1.0 for band in self.bands.values())

    @property
    def class_shares(self) -> dict[int, float]:
        """Share of each class among all labelled pixels."""
        total = sum(self.classes.values())
        return {value: count / total for value, count in self.classes.items()}

    @property
    def class_weights(self) -> dict[int, float]:
        """Weights for a loss, inverse to the classes' shares, 1 on average over pixels."""
        total, kinds = sum(self.classes.values()), len(self.classes)
        return {value: total / (kinds * count) for value, count in self.classes.items()}

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write a YAML for people and for `load`, whole or not at all; returns its path."""
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        bands = {name: _listed(asdict(band)) for name, band in self.bands.items()}
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
        """Read what `save` wrote.

        Raises:
            DataError: not such a file.
        """
        try:
            with open(Path(path).expanduser(), encoding="utf-8") as file:
                found = yaml.safe_load(file)
            bands = {str(name): _band(facts) for name, facts in found["bands"].items()}
            classes = {int(value): int(count) for value, count in (found.get("classes") or {}).items()}
            return cls(bands=bands, classes=classes, made=dict(found.get("made") or {}))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{os.fspath(path)} is no statistics YAML ({type(error).__name__}: {error}); drop it, and it is "
                "measured again."
            ) from error


def _listed(facts: dict[str, Any]) -> dict[str, Any]:
    return facts | {"histogram": list(facts["histogram"])}


def _band(facts: Mapping[str, Any]) -> BandStatistics:
    return BandStatistics(
        mean=float(facts["mean"]),
        std=float(facts["std"]),
        min=float(facts["min"]),
        max=float(facts["max"]),
        count=int(facts["count"]),
        percentiles={q: float(value) for q, value in facts["percentiles"].items()},
        histogram=tuple(int(count) for count in facts["histogram"]),
        sampled=int(facts["sampled"]),
    )


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
    """Statistics of every band, and the classes of labels, over the valid pixels of a grid of chips, in one pass.

    Memory does not grow with the number of chips. Means, deviations and extremes are of all pixels read. So are
    percentiles and histograms of integers of up to 16 bits; of other types they are of 131,072 random pixels a band.
    The dates of a time series `[T, C, H, W]` count together. The result is a function of the arguments, and the
    batch size does not matter.

    Args:
        dataset: Images, labels or a combination, whose samples have `mask_valid`.
        aois: Polygons to stay in: pixels whose centre is outside do not count, and those in several count for each.
            Statistics for training should not look at validation data.
        size: Chip size in pixels.
        max_chips: Chips read at most, random ones of the grid; None = all.
        batch_size: Chips read together.
        seed: Which chips, where not all, and which pixels of large types.
        percentiles: Between 0 and 100.
        ignore_index: Value of the labels that is no class.
        key: Key of the labels: of several heads the one that is counted.
        scaled: Of what stored values stand for, `x * scale + offset`, as `normalize(scaled=True)` needs them; default:
            stored values.

    Raises:
        UsageError: no valid pixel of a band was found, a percentile that is none, samples without `mask_valid` or
            without anything to measure, or without `scale` where `scaled` values are asked for.
    """
    wanted = tuple(q.item() if isinstance(q, np.generic) else q for q in percentiles)
    if not all(0 <= q <= 100 for q in wanted):
        raise UsageError(f"percentiles lie between 0 and 100, not {wanted}.")
    chips = ChipPass(dataset, aois, size, max_chips, batch_size, seed, key)
    bands: list[Accumulator] = []
    continuous: list[Accumulator] = []
    classes: dict[int, int] = {}
    for chip in chips:
        image, labels = chip.sample.get("image"), chip.labels
        if labels is None and (image is None or key != "mask"):
            heads = [name for name in chip.sample if name.startswith("mask") and name not in MASK_KEYS]
            have = f"say key=, which of their labels to count: {heads}" if heads else f"they have {list(chip.sample)}"
            raise UsageError(f"The samples have no {key!r}; {have}.")
        if image is not None:
            pixels = _scaled(image.numpy(), chip.sample) if scaled else image.numpy()
            _accumulate(bands, pixels, chip.counts, chip, seed)
        if labels is not None and labels.dtype.kind == "f":
            _accumulate(continuous, labels[None], chip.labels_count[None], chip, seed)
        elif labels is not None:
            _count(classes, labels[chip.labels_count], ignore_index)
    names = _band_names(dataset, len(bands)) + [key] * len(continuous)
    found = {n: t.result(wanted) for n, t in zip(names, [*bands, *continuous], strict=True)}
    measured = {name: band for name, band in found.items() if band is not None}
    if len(measured) < len(found) or not (measured or classes):
        empty = sorted(set(found) - set(measured)) or ["labels"]
        raise UsageError(
            f"No valid pixel of {empty} is in the {len(chips)} chips looked at; take more (max_chips=) or other AOIs."
        )
    count = sum(band.count for band in measured.values()) if measured else sum(classes.values())
    made = _made(chips, size, seed, count) | ({"scaled": True} if scaled else {})
    return DatasetStatistics(bands=measured, classes=dict(sorted(classes.items())), made=made)


def _scaled(image: npt.NDArray[Any], sample: Mapping[str, Any]) -> npt.NDArray[Any]:
    """What stored values `[C, H, W]` or `[T, C, H, W]` stand for, in float64."""
    if image.dtype.kind == "c":
        return image  # refused by _tally
    if "scale" not in sample:
        raise UsageError("scaled=True needs samples with 'scale', which records that state one have; leave it out.")
    scale, offset = (sample[key].double().numpy()[..., None, None] for key in ("scale", "offset"))
    values: npt.NDArray[Any] = image * scale + offset
    return values


def _made(chips: ChipPass, size: int, seed: int, pixels: int) -> dict[str, Any]:
    coverage = chips.grid.coverage
    by_grid = {
        number: shapely.total_bounds(coverage.shapes[coverage.grid_index == number])
        for number in np.unique(coverage.grid_index).tolist()
    }
    return {
        "seed": int(seed),
        "size": int(size),
        "chips": len(chips),
        "chips_in_all": len(chips.grid),
        "pixels": int(pixels),
        "bounds": {coverage.target_grids[number].crs: bounds.tolist() for number, bounds in by_grid.items()},
    }


def _accumulate(
    tallies: list[Accumulator], image: npt.NDArray[Any], counts: npt.NDArray[np.bool_], chip: CountedChip, seed: int
) -> None:
    """Add an image `[C, H, W]` or `[T, C, H, W]` band by band."""
    if image.dtype.kind == "c":
        raise UsageError(f"{image.dtype} pixels have no order, and so no percentiles; measure their magnitude.")
    keep = np.moveaxis(np.broadcast_to(counts, image.shape), -3, 0)
    pixels = np.moveaxis(image, -3, 0)
    if not tallies:
        tallies.extend(accumulator_for(image.dtype) for _ in pixels)
    # Keys of a pixel depend on the chip alone, not on what was read with it.
    rows = -(-pixels[0].size // 4)
    keys = uniforms(seed, chip.position + 1, range(rows)).reshape(-1)[: pixels[0].size].reshape(pixels[0].shape)
    for tally, values, kept in zip(tallies, pixels, keep, strict=True):
        tally.add(values[kept], keys[kept])


def _count(classes: dict[int, int], labels: npt.NDArray[Any], ignore_index: int) -> None:
    for value, count in zip(*np.unique(labels[labels != ignore_index], return_counts=True), strict=True):
        classes[int(value)] = classes.get(int(value), 0) + int(count)


def _band_names(dataset: Any, count: int) -> list[str]:
    """Names along C, of a combination its image parts' in turn; of what has none, or twice the same, numbered."""
    names = [str(name) for name in _names(dataset)]
    if len(names) != count:
        return [f"band_{i}" for i in range(count)]
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    again: dict[str, int] = {}
    out = []
    for name in names:
        again[name] = again.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}_{again[name]}")
    return out


def _names(dataset: Any) -> list[str]:
    parts = getattr(dataset, "datasets", None)
    if parts:
        found = [_names(part) for part in parts]
        joined = [name for names in found for name in names]
        return found[0] if hasattr(dataset, "_sides") else joined
    if not getattr(dataset, "is_image", True):
        return []
    return list(getattr(dataset, "bands", ()) or ())
