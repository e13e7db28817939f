"""What GDAL writes into TIFFs beside the standard: nodata, band facts, the layout of a COG."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any
from xml.etree import ElementTree

import numpy as np

__all__ = ["BandTags", "ImageTags", "has_block_leaders", "parse_metadata", "parse_nodata"]

_OLD_WINDOWS = {"-1.#INF": "-inf", "1.#INF": "inf", "-1.#IND": "nan", "1.#QNAN": "nan", "-1.#QNAN": "nan"}
"""How Microsoft's C library printed what is not a number."""
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?")
_MASK_FLAGS = re.compile(r"INTERNAL_MASK_FLAGS_([1-9][0-9]{0,4})")
_STRUCTURE = b"GDAL_STRUCTURAL_METADATA_SIZE="


@dataclass(frozen=True, slots=True, kw_only=True)
class BandTags:
    """What a file says of one of its bands."""

    description: str | None = None
    """GDAL's band description."""
    scale: float | None = None
    """GDAL's scale."""
    offset: float | None = None
    """GDAL's offset."""
    colour: str | None = None
    """GDAL's colour interpretation where the file spells it, lower case (`alpha`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTags:
    """What a file says of all of its bands."""

    bands: tuple[BandTags, ...]
    """One per sample."""
    overview_resampling: str | None = None
    """The kernel that made the overviews, lower case, where the file tells."""
    mask_flags: Mapping[int, int] = field(default_factory=dict)
    """In a `.msk` file, by band of the raster (from 0): GDAL's flags of its mask (2 = one mask for all bands)."""


def parse_nodata(text: str | None, dtype: np.dtype[Any]) -> int | float | None:
    """The nodata value in a GDAL_NODATA tag (42113), None where it is none that `dtype` could hold.

    As GDAL reads it: what follows the number is ignored, a fraction is cut off for integer types, a value
    outside an integer type's range means nothing. Integers are exact up to 64 bits, also in exponent form (where
    GDAL stops at the exponent).
    """
    text = (text or "").strip(" \0\n\t")
    text = _OLD_WINDOWS.get(text.upper(), text)
    if dtype.kind not in "iu":
        return _as_float(text)
    number = _NUMBER.match(text)
    if number is None:
        return None
    try:
        exact = Decimal(number.group().replace(",", "."))
    except InvalidOperation:
        return None
    limits = np.iinfo(dtype)
    return int(exact) if limits.min <= exact <= limits.max else None


def _as_float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        number = _NUMBER.match(text)
        return None if number is None else float(number.group().replace(",", "."))


def parse_metadata(xml: str | None, count: int) -> ImageTags:
    """The facts in a GDAL_METADATA tag (42112), for `count` bands; what cannot be understood is left out."""
    bands = [BandTags() for _ in range(count)]
    kernel, flags = None, {}
    try:
        items = ElementTree.fromstring(xml).iter("Item") if xml else []
    except ElementTree.ParseError:
        items = []
    for item in items:
        text, sample = (item.text or "").strip(), item.get("sample") or ""
        if item.get("name") == "OVERVIEW_RESAMPLING":
            kernel = text.lower() or None
        flagged = _MASK_FLAGS.fullmatch(item.get("name") or "")
        if flagged is not None and text.isascii() and text.isdigit():
            flags[int(flagged[1]) - 1] = int(text)
        index = int(sample) if sample.isascii() and sample.isdigit() else -1
        if 0 <= index < count:
            bands[index] = _with_fact(bands[index], item.get("role"), text)
    return ImageTags(bands=tuple(bands), overview_resampling=kernel, mask_flags=flags)


def _with_fact(band: BandTags, role: str | None, text: str) -> BandTags:
    if role == "description":
        return replace(band, description=text)
    if role == "colorinterp":
        return replace(band, colour=text.lower())
    try:
        if role == "scale":
            return replace(band, scale=float(text))
        if role == "offset":
            return replace(band, offset=float(text))
    except ValueError:
        pass
    return band


def has_block_leaders(start: bytes) -> bool:
    """Whether the 4 bytes before each tile hold its size, from the first bytes of a file.

    GDAL writes this promise behind the TIFF header (at byte 8, BigTIFF 16) and takes it back
    (KNOWN_INCOMPATIBLE_EDITION=YES) when the file is edited.
    """
    place = 16 if start[2:3] == b"+" or start[3:4] == b"+" else 8
    if not start.startswith(_STRUCTURE, place):
        return False
    text = start[place : place + 1024]
    return b"BLOCK_LEADER=SIZE_AS_UINT4\n" in text and b"KNOWN_INCOMPATIBLE_EDITION=NO\n" in text
