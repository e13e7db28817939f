"""Decide which pixels are clear of clouds from a quality band."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityMask:
    """A quality band and the rule for its clear pixels.

    Give exactly one rule: `clear` or `cloudy` classes, `bits` and `fields` of a bit mask, or `below`. Pixels without a
    valid quality value (nodata, outside the raster) are not clear.

    Raises:
        UsageError: no rule, several rules, or bits and values out of range.

    Example:
        >>> clouds = QualityMask(band="SCL", cloudy=(3, 8, 9, 10))
    """

    band: str  #: Name of the band; it is resampled with nearest neighbour.
    clear: tuple[int, ...] = ()  #: Clear classes; all others are not clear.
    cloudy: tuple[int, ...] = ()  #: Classes that are not clear; all others are.
    bits: tuple[int, ...] = ()  #: Bit numbers, from 0 = lowest; a pixel with any of these bits set is not clear.
    #: Values by bit range (first, last), both inclusive; a pixel with one of these values is not clear.
    fields: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    below: float | None = None  #: For probabilities and percentages: pixels below this value are clear.
    #: Value of unknown quality. None = the nodata value of the file, as in Sentinel-2's SCL (0) and Landsat's QA_PIXEL
    #: (1); a number overrides it; "ignore" = no value is nodata. Required for bit masks whose file declares 0 as nodata
    #: although 0 means "no flag is set": they are refused otherwise, because no pixel would be clear.
    nodata: int | float | Literal["ignore"] | None = None

    def __post_init__(self) -> None:
        rules = [bool(self.clear), bool(self.cloudy), bool(self.bits or self.fields), self.below is not None]
        if sum(rules) != 1:
            raise UsageError(
                f"QualityMask must have one of clear=, cloudy=, bits= (with fields=) and below=, got {sum(rules)}."
            )
        numbers = [*self.bits, *(bit for ends in self.fields for bit in ends)]
        if any(not 0 <= int(bit) < 64 for bit in numbers) or any(first > last for first, last in self.fields):
            raise UsageError(f"bits must be from 0 to 63 and ranges of fields (first, last), got {numbers}.")
        for (first, last), values in self.fields.items():
            limit = 1 << (last - first + 1)
            if any(not 0 <= value < limit for value in values):
                raise UsageError(f"Values of bits {first} to {last} must be from 0 to {limit - 1}, got {values}.")
        if isinstance(self.nodata, str) and self.nodata != "ignore":
            raise UsageError(f"nodata must be a number, 'ignore' or None, got {self.nodata!r}.")

    @property
    def stored_nodata(self) -> int | float | None:
        """Override of the file's nodata; NaN for "ignore": integers cannot hold it, and float NaN is invalid anyway."""
        return float("nan") if isinstance(self.nodata, str) else self.nodata

    def check(self, dtype: np.dtype[Any] | None, nodata: int | float | None = None) -> None:
        """Check that the band's values can be read by the rule.

        Args:
            dtype: Data type of the band; None = unknown.
            nodata: Nodata value that the file declares.

        Raises:
            UsageError: the type does not fit, or nodata would make every clear pixel invalid.
        """
        if self.below is not None:
            return
        zero_is_clear = (self.bits or self.fields) and not any(0 in values for values in self.fields.values())
        if zero_is_clear and nodata == 0 and self.nodata is None:
            raise UsageError(
                f"Quality band {self.band!r}: the file declares 0 as nodata, but 0 is clear by these bits. Set "
                "nodata='ignore' in the QualityMask if 0 means that no flag is set, or nodata=0 if it means unknown."
            )
        if dtype is None:
            return
        if dtype.kind not in "iub":
            raise UsageError(f"Quality band {self.band!r} must hold integer classes or bits, got {dtype}; use below=.")
        width = 8 * dtype.itemsize
        too_high = sorted({bit for bit in (*self.bits, *(last for _, last in self.fields)) if bit >= width})
        if too_high:
            raise UsageError(
                f"Quality band {self.band!r} is {dtype}: bits must be from 0 to {width - 1}, got {too_high}."
            )
        limits = np.iinfo(np.uint8 if dtype.kind == "b" else dtype)
        outside = [value for value in self.clear or self.cloudy if not limits.min <= value <= limits.max]
        if outside:
            raise UsageError(
                f"Quality band {self.band!r} is {dtype}: classes must be from {limits.min} to {limits.max}, "
                f"got {outside}."
            )

    @classmethod
    def parse(cls, quality: QualityMask | str | Mapping[str, Any]) -> QualityMask:
        """Return a mask from a mask, the name of a preset, or a mapping of fields.

        In a mapping, as read from YAML, the bit ranges of `fields` may be text: `fields: {"8-9": [3]}`.

        Raises:
            UsageError: unknown preset or field.
        """
        if isinstance(quality, QualityMask):
            return quality
        if isinstance(quality, str):
            if quality not in QUALITY_PRESETS:
                presets = ", ".join(QUALITY_PRESETS)
                raise UsageError(f"quality must be one of {presets}, or a QualityMask, got {quality!r}.")
            return QUALITY_PRESETS[quality]
        fields: dict[str, Any] = {str(k): tuple(v) if isinstance(v, (list, tuple)) else v for k, v in quality.items()}
        if "fields" in fields:
            fields["fields"] = {_bit_range(key): tuple(values) for key, values in dict(fields["fields"]).items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise UsageError(f"quality= {dict(quality)}: {error}.") from None

    def apply(self, data: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return clear pixels `[H, W]` from the band's values and validity `[H, W]`.

        Raises:
            UsageError: the data type does not fit the rule.
        """
        if self.below is not None:
            with np.errstate(invalid="ignore"):
                return np.asarray(valid & (data < self.below))
        self.check(data.dtype)
        if self.clear or self.cloudy:
            listed = np.isin(data, np.array(self.clear or self.cloudy))
            return np.asarray(valid & (listed if self.clear else ~listed))
        flags = data.astype(np.uint64) if data.dtype.kind != "i" else data.astype(np.int64).view(np.uint64)
        bad = (flags & np.uint64(sum(1 << int(bit) for bit in set(self.bits)))) != 0
        for (first, last), values in self.fields.items():
            value = (flags >> np.uint64(first)) & np.uint64((1 << (last - first + 1)) - 1)
            bad |= np.isin(value, np.array(values, np.uint64))
        return np.asarray(valid & ~bad)


def _bit_range(bits: Any) -> tuple[int, int]:
    """Parse (first, last), "8-9", or a single bit."""
    try:
        ends = bits.split("-") if isinstance(bits, str) else bits if isinstance(bits, (tuple, list)) else [bits]
        first, last = int(ends[0]), int(ends[-1])
        if len(ends) > 2:
            raise ValueError
    except (TypeError, ValueError, IndexError):
        raise UsageError(f"Keys of fields must be bit ranges such as (8, 9) or '8-9', got {bits!r}.") from None
    return first, last


#: Masks by name. sentinel-2-scl: dark areas (2), vegetation (4), bare soil (5), water (6), unclassified (7) and snow
#: (11) are clear; no data (0), saturated (1), cloud shadow (3), cloud (8, 9) and cirrus (10) are not (Sentinel-2
#: Products Specification, L2A SCL). landsat-qa-pixel: fill (bit 0), dilated cloud (1), cirrus (2), cloud (3) and cloud
#: shadow (4) are not clear (Landsat 8-9 Collection 2 Level 2 Science Product Guide, table 6-2).
QUALITY_PRESETS = {
    "sentinel-2-scl": QualityMask(band="SCL", clear=(2, 4, 5, 6, 7, 11)),
    "landsat-qa-pixel": QualityMask(band="QA_PIXEL", bits=(0, 1, 2, 3, 4)),
}
