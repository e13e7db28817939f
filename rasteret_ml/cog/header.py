"""TIFF headers from byte ranges: parse what is there, or say what is missing.

`parse_header` never reads a file. It is given a `SparseFile`, which holds the extents fetched so far and
raises `NeedBytes` where tifffile reaches past them; the caller fetches exactly that and tries again. A plain
prefix would not do: tifffile then drops tags and pages without a word.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import tifffile
from affine import Affine

from rasteret_ml.cog.codecs import check_supported
from rasteret_ml.cog.georeference import GeoTags, read_crs, read_transform
from rasteret_ml.cog.metadata import CogMetadata, TileTable, slice_plane
from rasteret_ml.cog.sparse_file import NeedBytes, SparseFile
from rasteret_ml.errors import CorruptTiffError, DataError, NotATiffError, UnsupportedTiffError

__all__ = ["BandFacts", "CogHeader", "parse_header", "parse_nodata"]

_MAGIC = {b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"}
_REDUCED, _MASK = 1, 4
_MAX_PAGES = 256
_OLD_WINDOWS = {"-1.#INF": "-inf", "1.#INF": "inf", "-1.#IND": "nan", "1.#QNAN": "nan", "-1.#QNAN": "nan"}
"""How Microsoft's C library printed what is not a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BandFacts:
    """What a file says of one of its bands."""

    description: str | None = None
    """GDAL's band description."""
    scale: float | None = None
    """GDAL's scale."""
    offset: float | None = None
    """GDAL's offset."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CogHeader:
    """The header of a whole file."""

    image: TileTable
    """Full resolution, all planes."""
    mask: TileTable | None
    """Internal mask of the full resolution."""
    overviews: tuple[TileTable, ...]
    """Largest first, all planes."""
    overview_masks: tuple[TileTable, ...]
    """Masks of overviews, largest first."""
    transform: Affine | None
    """Pixel corners to CRS coordinates."""
    crs: str | None
    """CRS text."""
    geo: GeoTags
    """Georeferencing tags as stored."""
    nodata: int | float | None
    """Declared nodata."""
    bands: tuple[BandFacts, ...]
    """One per sample."""

    @property
    def count(self) -> int:
        """Number of bands."""
        return self.image.samples_per_pixel

    def band(self, index: int, *, file_size: int | None = None, etag: str | None = None) -> CogMetadata:
        """The metadata of band `index` (from 0)."""

        def plane(table: TileTable) -> TileTable:
            return slice_plane(table, index) if table.planar_configuration == 2 else table

        return CogMetadata(
            image=plane(self.image),
            transform=self.transform,
            crs=self.crs,
            nodata=self.nodata,
            mask=self.mask,
            overviews=tuple(plane(table) for table in self.overviews),
            overview_masks=self.overview_masks,
            scale=self.bands[index].scale,
            offset=self.bands[index].offset,
            file_size=file_size,
            etag=etag,
            pixel_scale=self.geo.pixel_scale,
            tiepoint=self.geo.tiepoint,
        )


def parse_header(file: SparseFile) -> CogHeader:
    """Parse a TIFF's image directories.

    Raises:
        NeedBytes: fetch that range, `file.add` it, call again.
        NotATiffError, UnsupportedTiffError, CorruptTiffError: it cannot be read; the message says why, the
            caller knows which file.
    """
    magic = file.peek(0, 16)
    if magic[:4] not in _MAGIC:
        raise NotATiffError(f"not a TIFF: it starts with {_looks_like(magic)}")
    file.missing = None
    file.seek(0)
    try:
        with _quiet_tifffile(), tifffile.TiffFile(file, name="") as tiff:
            header = _read_pages(tiff)
    except (NeedBytes, DataError):
        raise
    except Exception as error:  # tifffile raises anything from struct.error to RecursionError on bad input
        header, problem = None, error
    if file.missing is not None:  # swallowed inside tifffile: what it made of the gap is worthless
        raise NeedBytes(file.missing)
    if header is None:
        raise CorruptTiffError(f"the TIFF header cannot be parsed: {problem}") from problem
    return header


def _read_pages(tiff: tifffile.TiffFile) -> CogHeader:
    big_endian = tiff.byteorder == ">"
    pages = []
    for page in tiff.pages:
        pages.append(page)
        if len(pages) > _MAX_PAGES:
            break
    if not pages:
        raise CorruptTiffError("the TIFF has no image directory")
    first = pages[0]
    image = _table(first, big_endian)
    check_supported(image)
    overviews, masks = [], []
    for page in pages[1:]:
        kind = _int(page, 254, 0)
        smaller = _int(page, 256, 0) <= image.width and _int(page, 257, 0) <= image.height
        if kind & _MASK and smaller:
            masks.append(_table(page, big_endian))
            check_supported(masks[-1])
        elif kind & _REDUCED and smaller:
            with suppress(UnsupportedTiffError):  # an overview is a convenience: one that is odd is not used
                table = _table(page, big_endian)
                check_supported(table)
                overviews.append(table)
    mask = next((m for m in masks if (m.width, m.height) == (image.width, image.height)), None)
    geo = _geo_tags(first)
    return CogHeader(
        image=image,
        mask=mask,
        overviews=tuple(sorted(overviews, key=lambda t: -t.width)),
        overview_masks=tuple(sorted((m for m in masks if m is not mask), key=lambda t: -t.width)),
        transform=read_transform(geo),
        crs=read_crs(geo),
        geo=geo,
        nodata=parse_nodata(_text(first, 42113), image.dtype),
        bands=_band_facts(_text(first, 42112), image.samples_per_pixel),
    )


def _table(page: Any, big_endian: bool) -> TileTable:
    width, height = _int(page, 256, 0), _int(page, 257, 0)
    if width < 1 or height < 1:
        raise CorruptTiffError(f"the image is {width} x {height} pixels")
    striped = 322 not in page.tags
    if striped:
        tile_width, tile_height = width, min(_int(page, 278, height) or height, height)
        offsets, counts = _array(page, 273), _array(page, 279)
    else:
        tile_width, tile_height = _int(page, 322, 0), _int(page, 323, 0)
        offsets, counts = _array(page, 324), _array(page, 325)
        if not len(offsets):  # some writers keep tiles under the strip tags
            offsets, counts = _array(page, 273), _array(page, 279)
    if tile_width < 1 or tile_height < 1:
        raise CorruptTiffError(f"the tiles are {tile_width} x {tile_height} pixels")
    samples = _int(page, 277, 1)
    dtype, bits = _sample_type(page, samples)
    planar = _int(page, 284, 1) if samples > 1 else 1
    table = TileTable(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        dtype=dtype,
        tile_offsets=offsets,
        tile_byte_counts=counts,
        compression=_int(page, 259, 1),
        predictor=_int(page, 317, 1),
        samples_per_pixel=samples,
        planar_configuration=planar,
        photometric=_int(page, 262, -1) if 262 in page.tags else None,
        extra_samples=tuple(int(v) for v in _array(page, 338)),
        bits_per_sample=0 if bits == dtype.itemsize * 8 else bits,
        big_endian=big_endian,
        fill_order=_int(page, 266, 1),
        striped=striped,
        jpeg_tables=bytes(page.tags[347].value) if 347 in page.tags else None,
    )
    expected = table.tiles_across * table.tiles_down * (samples if planar == 2 else 1)
    if len(offsets) == expected and not len(counts) and expected == 1:  # allowed for one uncompressed strip
        size = height * width * table.samples_per_tile * table.dtype.itemsize
        table = replace(table, tile_byte_counts=np.array([size], np.int64))
    elif not len(offsets) == len(counts) == expected:
        raise CorruptTiffError(
            f"{expected} tiles are expected, but the header lists {len(offsets)} offsets and {len(counts)} byte counts"
        )
    return table


def _sample_type(page: Any, samples: int) -> tuple[np.dtype[Any], int]:
    bits = {int(v) for v in _array(page, 258)} or {1}
    formats = {int(v) for v in _array(page, 339)} or {1}
    if len(bits) > 1 or len(formats - {4}) > 1:
        raise UnsupportedTiffError(f"bands of different types (bits {sorted(bits)}, formats {sorted(formats)})")
    width, kind = bits.pop(), (formats - {4} or {1}).pop()
    if width in (8, 16, 32, 64) and kind in (1, 2):
        return np.dtype(f"{'u' if kind == 1 else 'i'}{width // 8}"), width
    if width in (16, 32, 64) and kind == 3:
        return np.dtype(f"f{width // 8}"), width
    if width in (64, 128) and kind == 6:
        return np.dtype(f"c{width // 8}"), width
    if kind == 1 and 1 <= width < 32:
        return np.dtype(np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32), width
    names = {1: "unsigned", 2: "signed", 3: "float", 5: "complex integer", 6: "complex"}
    raise UnsupportedTiffError(f"{width}-bit {names.get(kind, f'format {kind}')} samples")


def parse_nodata(text: str | None, dtype: np.dtype[Any]) -> int | float | None:
    """The number in a GDAL_NODATA tag (42113), exact for integer types; None where it is none."""
    text = (text or "").strip(" \0\n\t")
    if not text:
        return None
    if dtype.kind in "iu":
        try:
            return int(text)
        except ValueError:
            pass
    try:
        value = float(_OLD_WINDOWS.get(text.upper(), text))
    except ValueError:
        return None
    return int(value) if dtype.kind in "iu" and value.is_integer() else value


def _band_facts(xml: str | None, count: int) -> tuple[BandFacts, ...]:
    facts = [BandFacts() for _ in range(count)]
    try:
        items = ElementTree.fromstring(xml).iter("Item") if xml else []
    except ElementTree.ParseError:
        items = []
    for item in items:
        role, sample, text = item.get("role"), item.get("sample"), (item.text or "").strip()
        if role not in ("scale", "offset", "description") or not (sample or "").isdigit():
            continue
        index = int(sample or 0)
        if index >= count:
            continue
        try:
            value: Any = text if role == "description" else float(text)
            facts[index] = replace(facts[index], **{role: value})
        except ValueError:
            continue
    return tuple(facts)


def _geo_tags(page: Any) -> GeoTags:
    return GeoTags(
        pixel_scale=tuple(float(v) for v in _array(page, 33550, float)),
        tiepoint=tuple(float(v) for v in _array(page, 33922, float)),
        transformation=tuple(float(v) for v in _array(page, 34264, float)),
        directory=tuple(int(v) for v in _array(page, 34735)),
        doubles=tuple(float(v) for v in _array(page, 34736, float)),
        ascii=_text(page, 34737) or "",
    )


def _value(page: Any, code: int) -> Any:
    tag = page.tags.get(code)
    return None if tag is None else tag.value


def _int(page: Any, code: int, default: int) -> int:
    value = _value(page, code)
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return default if value is None else int(value)


def _array(page: Any, code: int, kind: type = np.int64) -> npt.NDArray[Any]:
    value = _value(page, code)
    if value is None or isinstance(value, str):
        return np.empty(0, dtype=kind)
    if isinstance(value, bytes):
        return np.frombuffer(value, np.uint8).astype(kind)
    return np.atleast_1d(np.asarray(value, dtype=kind))


def _text(page: Any, code: int) -> str | None:
    value = _value(page, code)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _looks_like(start: bytes) -> str:
    head = start.lstrip().lower()
    if not start:
        return "nothing: the file is empty"
    if head.startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    if head.startswith((b"<?xml", b"<error", b"<code")):
        return "an XML document, perhaps an error message of the server"
    known = {b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG", b"PK\x03\x04": "a ZIP", b"\x1f\x8b": "gzip data"}
    known |= {
        b"CDF": "a NetCDF file",
        b"\x89HDF": "an HDF5 file",
        b"\0\0\0\x0cjP": "a JPEG 2000 file",
        b"{": "JSON",
    }
    return next((what for sign, what in known.items() if start.startswith(sign)), repr(start[:8]))


class _Quiet(logging.Filter):
    """Drops tifffile's log records of the threads that are parsing here."""

    def __init__(self) -> None:
        super().__init__()
        self.local = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.local, "on", False)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.local.on = True
        try:
            yield
        finally:
            self.local.on = False


# tifffile logs what it skips; everything that it could skip is checked here instead.
_quiet_tifffile = _Quiet()
logging.getLogger("tifffile").addFilter(_quiet_tifffile)
