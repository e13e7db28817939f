"""Tags that GDAL adds to TIFF: nodata, scale and offset, overview resampling, mask flags, the layout of a COG.

Source: https://gdal.org/en/stable/drivers/raster/gtiff.html (GDAL_METADATA 42112, GDAL_NODATA 42113) and
https://gdal.org/en/stable/drivers/raster/cog.html (header ghost area).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any
from xml.etree import ElementTree

import numpy as np

# How Microsoft's C library printed infinity and NaN.
_OLD_WINDOWS = {"-1.#INF": "-inf", "1.#INF": "inf", "-1.#IND": "nan", "1.#QNAN": "nan", "-1.#QNAN": "nan"}
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")
_MASK_FLAGS = re.compile(r"INTERNAL_MASK_FLAGS_([1-9][0-9]{0,4})")
_GHOST_AREA = b"GDAL_STRUCTURAL_METADATA_SIZE="
# Field and type of each role of an item of a band.
_ROLES: dict[str | None, tuple[str, Callable[[str], Any]]] = {
    "description": ("description", str),
    "colorinterp": ("color_interp", str.lower),
    "scale": ("scale", float),
    "offset": ("offset", float),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GdalBandMetadata:
    """Metadata of one band."""

    description: str | None = None  #: Band description.
    scale: float | None = None  #: Factor from stored to physical values.
    offset: float | None = None  #: Added after `scale`.
    color_interp: str | None = None  #: Colour interpretation in lower case (such as `alpha`), None if not stored.


def parse_nodata(text: str | None, dtype: np.dtype[Any]) -> int | float | None:
    """Return the nodata value of a GDAL_NODATA tag (42113), None if `dtype` cannot hold it.

    As GDAL reads it: text after the number is ignored, a fraction is truncated for integer types, and a value outside
    an integer type's range is ignored. Integers are exact up to 64 bits, in exponent form too (where GDAL stops
    at the exponent).
    """
    text = (text or "").strip(" \0\n\t")
    text = _OLD_WINDOWS.get(text.upper(), text)
    number = _NUMBER.match(text)
    digits = "" if number is None else number.group().replace(",", ".")
    if dtype.kind not in "iu":
        with suppress(ValueError):
            return float(text)
        return float(digits) if digits else None
    try:
        exact = Decimal(digits)
    except InvalidOperation:
        return None
    limits = np.iinfo(dtype)
    return int(exact) if limits.min <= exact <= limits.max else None


def parse_metadata(xml: str | None, count: int) -> tuple[tuple[GdalBandMetadata, ...], str | None, dict[int, int]]:
    """Parse a GDAL_METADATA tag (42112): `count` bands, the overviews' resampling method, mask flags.

    The method is in lower case, None if not stored. A `.msk` file has GDAL's mask flags by band of the raster (from 0);
    flag 2 = one mask for all bands. Invalid entries are ignored.
    """
    bands: list[dict[str, Any]] = [{} for _ in range(count)]
    resampling, mask_flags = None, {}
    try:
        items = ElementTree.fromstring(xml).iter("Item") if xml else []
    except ElementTree.ParseError:
        items = []
    for item in items:
        name, text, sample = item.get("name") or "", (item.text or "").strip(), item.get("sample") or ""
        if name == "OVERVIEW_RESAMPLING":
            resampling = text.lower() or None
        flags = _MASK_FLAGS.fullmatch(name)
        if flags is not None and text.isascii() and text.isdigit():
            mask_flags[int(flags[1]) - 1] = int(text)
        index = int(sample) if sample.isascii() and sample.isdigit() else -1
        if 0 <= index < count and item.get("role") in _ROLES:
            name, convert = _ROLES[item.get("role")]
            with suppress(ValueError):
                bands[index][name] = convert(text)
    return tuple(GdalBandMetadata(**fields) for fields in bands), resampling, mask_flags


def has_block_leaders(start: bytes) -> bool:
    """Whether the 4 bytes before each tile hold its byte count, from the first bytes of a file.

    GDAL declares this after the TIFF header (at byte 8, BigTIFF 16) and withdraws it
    (KNOWN_INCOMPATIBLE_EDITION=YES) when the file is edited.
    """
    position = 16 if start[2:3] == b"+" or start[3:4] == b"+" else 8
    if not start.startswith(_GHOST_AREA, position):
        return False
    text = start[position : position + 1024]
    return b"BLOCK_LEADER=SIZE_AS_UINT4\n" in text and b"KNOWN_INCOMPATIBLE_EDITION=NO\n" in text
