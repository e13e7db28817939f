"""Which pixels are clear of cloud, by what a quality band says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError

__all__ = ["QUALITY_PRESETS", "QualityMask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityMask:
    """A band that tells clear pixels from others, and how to read it.

    Exactly one way of reading: `clear` or `cloudy` classes, `bits` and `fields` of a bit mask, or `below`. A pixel
    whose quality is unknown (nodata, outside) is not clear.

    Raises:
        UsageError: none or several of them, or bits and values that cannot be.

    Example:
        >>> QualityMask(band="SCL", clear=(4, 5, 6)).band  # the preset "sentinel-2-scl" has more classes
        'SCL'
        >>> QualityMask(band="CLD", below=40).below  # a cloud probability in percent
        40
    """

    band: str
    """Name of the band; it is read at its own resolution, its nearest value."""
    clear: tuple[int, ...] = ()
    """Classes that are clear; all others are not."""
    cloudy: tuple[int, ...] = ()
    """Classes that are not clear; all others are."""
    bits: tuple[int, ...] = ()
    """Bits, from 0 for the lowest: a pixel with any of them set is not clear."""
    fields: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """Runs of bits (first, last): a pixel with one of these values there is not clear."""
    below: float | None = None
    """Of a probability or percentage: pixels below it are clear."""
    nodata: int | float | Literal["ignore"] | None = None
    """Which value of the band stands for an unknown quality. None = the one that its file declares, as in Sentinel-2's
    SCL (0) and Landsat's QA_PIXEL (1). A number instead of it; "ignore" = none does. Bit masks whose file declares 0
    although 0 means "nothing found" need one of the two, or no pixel would ever be clear: they are refused."""

    def __post_init__(self) -> None:
        """Check."""
        ways = [bool(self.clear), bool(self.cloudy), bool(self.bits or self.fields), self.below is not None]
        if sum(ways) != 1:
            raise UsageError("A QualityMask needs one of clear=, cloudy=, bits= (with fields=) and below=.")
        numbers = [*self.bits, *(bit for run in self.fields for bit in run)]
        if any(not 0 <= int(bit) < 64 for bit in numbers) or any(first > last for first, last in self.fields):
            raise UsageError(f"Bits are counted from 0 to 63, and runs are (first, last), not {numbers}.")
        for (first, last), values in self.fields.items():
            if any(not 0 <= value < 1 << (last - first + 1) for value in values):
                raise UsageError(f"Bits {first} to {last} hold values below {1 << (last - first + 1)}, not {values}.")
        if isinstance(self.nodata, str) and self.nodata != "ignore":
            raise UsageError(f"nodata= is a number, 'ignore' or None, not {self.nodata!r}.")

    @property
    def stored_nodata(self) -> int | float | None:
        """What overrides the file's nodata; NaN is no integer, and unknown in floats anyway."""
        return float("nan") if isinstance(self.nodata, str) else self.nodata

    def check(self, dtype: np.dtype[Any] | None, nodata: int | float | None = None) -> None:
        """Refuse a band whose values cannot say what is asked of them.

        Args:
            dtype: Of the band; None = not known.
            nodata: What its file declares.

        Raises:
            UsageError: the message names the band and what would do.
        """
        if self.below is not None:
            return
        clear_of_flags = (self.bits or self.fields) and not any(0 in values for values in self.fields.values())
        if clear_of_flags and nodata == 0 and self.nodata is None:
            raise UsageError(
                f"Quality band {self.band!r}: the file declares 0 as nodata, and by these bits 0 is clear, so that no "
                "pixel without a flag would be. Say nodata='ignore' if 0 means that nothing was found, or nodata=0 if "
                "it means that nothing is known, in a QualityMask."
            )
        if dtype is None:
            return
        if dtype.kind not in "iub":
            raise UsageError(f"Quality band {self.band!r} holds {dtype}, not classes or bits; use below=.")
        width = 8 * dtype.itemsize
        beyond = sorted({bit for bit in (*self.bits, *(last for _, last in self.fields)) if bit >= width})
        if beyond:
            raise UsageError(f"Quality band {self.band!r} is {dtype}: its bits are 0 to {width - 1}, not {beyond}.")
        limits = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
        strange = [value for value in self.clear or self.cloudy if not limits.min <= value <= limits.max]
        if strange:
            raise UsageError(f"Quality band {self.band!r} is {dtype}, which holds no class {strange}.")

    @classmethod
    def of(cls, quality: QualityMask | str | Mapping[str, Any]) -> QualityMask:
        """One from itself, the name of a preset, or a mapping of its fields (from YAML: `fields: {"8-9": [3]}`).

        Raises:
            UsageError: no such preset, or no such field.
        """
        if isinstance(quality, QualityMask):
            return quality
        if isinstance(quality, str):
            if quality not in QUALITY_PRESETS:
                raise UsageError(f"quality= knows {', '.join(QUALITY_PRESETS)}, not {quality!r}; give a QualityMask.")
            return QUALITY_PRESETS[quality]
        given: dict[str, Any] = {str(k): tuple(v) if isinstance(v, (list, tuple)) else v for k, v in quality.items()}
        if "fields" in given:
            given["fields"] = {_run(key): tuple(values) for key, values in dict(given["fields"]).items()}
        try:
            return cls(**given)
        except TypeError as error:
            raise UsageError(f"quality= {dict(quality)}: {error}.") from None

    def apply(self, data: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Clear pixels `[H, W]` from the band's values and validity `[H, W]`.

        Raises:
            UsageError: bits or classes are asked of a band that cannot hold them.
        """
        if self.below is not None:
            with np.errstate(invalid="ignore"):
                return np.asarray(valid & (data < self.below))
        self.check(data.dtype)
        if self.clear or self.cloudy:
            listed = np.isin(data, np.array(self.clear or self.cloudy))
            return np.asarray(valid & (listed if self.clear else ~listed))
        value = data.astype(np.uint64) if data.dtype.kind != "i" else data.astype(np.int64).view(np.uint64)
        bad = (value & np.uint64(sum(1 << int(bit) for bit in set(self.bits)))) != 0
        for (first, last), values in self.fields.items():
            part = (value >> np.uint64(first)) & np.uint64((1 << (last - first + 1)) - 1)
            bad |= np.isin(part, np.array(values, np.uint64))
        return np.asarray(valid & ~bad)


def _run(bits: Any) -> tuple[int, int]:
    """(first, last) from itself, from "8-9", or from one bit."""
    try:
        ends = bits.split("-") if isinstance(bits, str) else bits if isinstance(bits, (tuple, list)) else [bits]
        first, last = int(ends[0]), int(ends[-1])
        if len(ends) > 2:
            raise ValueError
    except (TypeError, ValueError, IndexError):
        raise UsageError(f"fields= maps runs of bits, as (8, 9) or '8-9', to values; not {bits!r}.") from None
    return first, last


QUALITY_PRESETS = {
    "sentinel-2-scl": QualityMask(band="SCL", clear=(2, 4, 5, 6, 7, 11)),
    "landsat-qa-pixel": QualityMask(band="QA_PIXEL", bits=(0, 1, 2, 3, 4)),
}
"""Sentinel-2's scene classification: clear are dark areas (2), vegetation (4), bare soil (5), water (6), unclassified
(7) and snow (11); not no data (0), saturated (1), cloud shadow (3), cloud (8, 9) and cirrus (10) (Sentinel-2 Products
Specification, L2A SCL). Landsat Collection 2's QA_PIXEL: not fill (bit 0), dilated cloud (1), cirrus (2), cloud (3)
and cloud shadow (4) (Landsat 8-9 Collection 2 Level 2 Science Product Guide, table 6-2)."""
