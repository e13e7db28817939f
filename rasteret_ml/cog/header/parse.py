"""TIFF headers from byte ranges: parse what is there, or say what is missing.

`parse_header` never reads a file. It is given a `SparseFile`, which holds the extents fetched so far; where they do
not suffice it raises `NeedBytes` with every range that is known to be needed, and the caller fetches those and tries
again. A COG takes one round, a TIFF whose directory lies at the end two or three.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from affine import Affine

from rasteret_ml.cog.codecs.decode import check_supported
from rasteret_ml.cog.header.gdal_tags import BandTags, has_block_leaders, parse_metadata, parse_nodata
from rasteret_ml.cog.header.georeference import GeoTags, read_crs, read_transform
from rasteret_ml.cog.header.ifd import Directory, read_directories
from rasteret_ml.cog.header.sparse_file import NeedBytes, SparseFile
from rasteret_ml.cog.header.tile_layout import read_table, unknown_bytes
from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.cog.tile_table import Sidecar, TileTable, slice_plane
from rasteret_ml.errors import CorruptTiffError, DataError, UnsupportedTiffError

__all__ = ["CogHeader", "parse_header"]

_SUBFILE, _WIDTH, _HEIGHT = 254, 256, 257
_REDUCED, _MASK = 1, 4
_PIXEL_SCALE, _TIEPOINT, _TRANSFORMATION, _GEO_KEYS, _GEO_DOUBLES, _GEO_ASCII = 33550, 33922, 34264, 34735, 34736, 34737
_GEO = (_PIXEL_SCALE, _TIEPOINT, _TRANSFORMATION, _GEO_KEYS, _GEO_DOUBLES, _GEO_ASCII)
_METADATA, _NODATA = 42112, 42113
_PER_DATASET = 2
_ALPHA = (1, 2)
"""Values of ExtraSamples: associated and unassociated alpha."""


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
    bands: tuple[BandTags, ...]
    """One per sample."""
    overview_resampling: str | None = None
    """The kernel that made the overviews, where the file tells."""
    mask_flags: Mapping[int, int] | None = None
    """GDAL's flags of the mask by band, where a `.msk` file states them; None = an internal mask."""

    @property
    def count(self) -> int:
        """Number of bands."""
        return self.image.samples_per_pixel

    def band(self, index: int, *, file_size: int | None = None, etag: str | None = None) -> CogMetadata:
        """The metadata of band `index` (from 0)."""

        def plane(table: TileTable, sample: int = index) -> TileTable:
            return slice_plane(table, sample) if table.planar_configuration == 2 else table

        image, overviews = plane(self.image), tuple(plane(table) for table in self.overviews)
        mask, masks, alpha = self.mask, self.overview_masks, self.alpha
        own = self._mask_band(index)
        if mask is not None and own is not None:
            mask, masks, sample = plane(mask, own), tuple(plane(t, own) for t in masks), own
        elif alpha is None or alpha == index:
            mask, masks, sample = None, (), 0
        else:
            mask, masks, sample = plane(self.image, alpha), tuple(plane(t, alpha) for t in self.overviews), alpha
        return CogMetadata(
            image=image,
            transform=self.transform,
            crs=self.crs,
            nodata=self.nodata,
            mask=mask,
            overviews=overviews,
            overview_masks=masks,
            mask_sample=sample,
            mask_is_alpha=own is None and mask is not None,
            overview_resampling=self.overview_resampling,
            scale=self.bands[index].scale,
            offset=self.bands[index].offset,
            file_size=file_size,
            etag=etag,
            pixel_scale=self.geo.pixel_scale,
            tiepoint=self.geo.tiepoint,
        )

    def _mask_band(self, index: int) -> int | None:
        """Which band of the mask speaks for band `index`, None where none does (GDALDefaultOverviews)."""
        if self.mask is None:
            return None
        samples = self.mask.samples_per_pixel
        if self.mask.sidecar is None or self.mask_flags is None:
            return index if samples == self.count else 0
        flags = self.mask_flags.get(index)
        own = 0 if flags is not None and flags & _PER_DATASET else index
        return own if flags is not None and own < samples else None

    def with_overviews(self, other: CogHeader, sidecar: Sidecar) -> CogHeader:
        """This header with the overviews (and their masks) of a `.ovr` file, each of its images being one."""
        tables = [table for table in (other.image, *other.overviews) if _could_be_overview(table, self.image)]
        masks = [table for table in (other.mask, *other.overview_masks) if table is not None]
        return replace(
            self,
            overviews=_largest_first(_beside(tables, sidecar)),
            overview_masks=_largest_first([*self.overview_masks, *_beside(masks, sidecar)]),
        )

    def with_mask(self, other: CogHeader, sidecar: Sidecar) -> CogHeader:
        """This header with the mask in a `.msk` file, and with that mask's own overviews.

        Raises:
            CorruptTiffError: the mask is not as large as the image.
        """
        if (other.image.width, other.image.height) != (self.image.width, self.image.height):
            raise CorruptTiffError(
                f"its mask {sidecar.suffix} is {other.image.width} x {other.image.height} pixels, "
                f"the image {self.image.width} x {self.image.height}"
            )
        (mask,) = _beside([other.image], sidecar)
        masks = _beside(other.overviews, sidecar)
        return replace(
            self,
            mask=mask,
            mask_flags=other.mask_flags or {},
            overview_masks=_largest_first([*self.overview_masks, *masks]),
        )

    def with_mask_overviews(self, other: CogHeader, sidecar: Sidecar) -> CogHeader:
        """This header with the mask's overviews of a `.msk.ovr` file."""
        return replace(self, overview_masks=_largest_first(_beside([other.image, *other.overviews], sidecar)))

    @property
    def alpha(self) -> int | None:
        """The sample that says which pixels are valid, by GDAL's rule: the last of two or four, 8- or 16-bit."""
        image, last = self.image, self.count - 1
        if self.count not in (2, 4) or image.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
            return None
        if self.bands[last].colour is not None:
            return last if self.bands[last].colour == "alpha" else None
        return last if image.extra_samples[-1:] and image.extra_samples[-1] in _ALPHA else None


def parse_header(file: SparseFile) -> CogHeader:
    """Parse a TIFF's image directories.

    Raises:
        NeedBytes: fetch those ranges, `file.add` them, call again.
        NotATiffError, UnsupportedTiffError, CorruptTiffError: it cannot be read; the message says why, the
            caller knows which file.
    """
    directories, further = read_directories(file)
    try:
        pages = [directories[0], *(page for page in directories[1:] if _belongs(page, directories[0]))]
        missing = [] if further is None else list(further.ranges)
        for page in pages:
            missing += unknown_bytes(page)
        missing += directories[0].missing((*_GEO, _METADATA, _NODATA))
        if missing:
            raise NeedBytes(missing)
        return _read_pages(pages, has_block_leaders(file.peek(0, min(file.size, 1024))))
    except (NeedBytes, DataError):
        raise
    except (ArithmeticError, LookupError, MemoryError, ValueError, struct.error) as error:
        raise CorruptTiffError(f"the TIFF header cannot be parsed: {type(error).__name__}: {error}") from error


def _belongs(page: Directory, first: Directory) -> bool:
    """Whether a page is an overview or a mask of the first one, by its subfile type and size."""
    width, height = page.number(_WIDTH, 0), page.number(_HEIGHT, 0)
    fits = width <= first.number(_WIDTH, 0) and height <= first.number(_HEIGHT, 0)
    return fits and bool(page.number(_SUBFILE, 0) & (_REDUCED | _MASK))


def _read_pages(pages: list[Directory], block_leaders: bool) -> CogHeader:
    first = pages[0]
    image = read_table(first, block_leaders=block_leaders)
    check_supported(image)
    overviews, masks = [], []
    for page in pages[1:]:
        if page.number(_SUBFILE, 0) & _MASK:
            masks.append(read_table(page, block_leaders=block_leaders))
            check_supported(masks[-1])
            continue
        with suppress(UnsupportedTiffError):  # an overview is a convenience: one that is odd is not used
            table = read_table(page, block_leaders=block_leaders)
            check_supported(table)
            if _could_be_overview(table, image):
                overviews.append(table)
    mask = next((m for m in masks if (m.width, m.height) == (image.width, image.height)), None)
    geo = _geo_tags(first)
    facts = parse_metadata(first.text(_METADATA), image.samples_per_pixel)
    return CogHeader(
        image=image,
        mask=mask,
        overviews=_largest_first(overviews),
        overview_masks=_largest_first([table for table in masks if table is not mask]),
        transform=read_transform(geo),
        crs=read_crs(geo),
        geo=geo,
        nodata=parse_nodata(first.text(_NODATA), image.dtype),
        bands=facts.bands,
        overview_resampling=facts.overview_resampling,
        mask_flags=facts.mask_flags or None,
    )


def _could_be_overview(table: TileTable, image: TileTable) -> bool:
    alike = (table.dtype, table.samples_per_pixel) == (image.dtype, image.samples_per_pixel)
    return alike and table.width <= image.width and table.height <= image.height


def _largest_first(tables: Sequence[TileTable]) -> tuple[TileTable, ...]:
    return tuple(sorted(tables, key=lambda table: -table.width * table.height))


def _beside(tables: Sequence[TileTable], sidecar: Sidecar) -> list[TileTable]:
    return [replace(table, sidecar=sidecar) for table in tables]


def _geo_tags(page: Directory) -> GeoTags:
    def floats(code: int) -> tuple[float, ...]:
        return tuple(map(float, page.numbers(code).tolist())) if code in page else ()

    return GeoTags(
        pixel_scale=floats(_PIXEL_SCALE),
        tiepoint=floats(_TIEPOINT),
        transformation=floats(_TRANSFORMATION),
        directory=tuple(page.integers(_GEO_KEYS).tolist()),
        doubles=floats(_GEO_DOUBLES),
        ascii=page.text(_GEO_ASCII) or "",
    )
