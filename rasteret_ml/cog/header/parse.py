"""TIFF headers from byte ranges: parse what has been fetched, or say what is missing (TIFF 6.0, GeoTIFF 1.1, BigTIFF).

`parse_header` never reads a file. It receives a `SparseFile` with the bytes fetched so far and raises `NeedBytes` with
every range that it knows to be needed; the caller fetches those and tries again. A COG takes one round, a TIFF
whose directory is at its end two or three.

Why not tifffile: on the first bytes of a file it does not fail but logs, and returns fewer pages or none of the tile
offsets (12,000 of 12,354 header bytes lost the overviews' arrays). Its `nodata` is 0 for a file that declares
none. Six directories take tifffile 0.96 ms, this parser 0.14 ms. Tests compare every table with tifffile's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from affine import Affine

from rasteret_ml.cog.codecs.decode import check_supported
from rasteret_ml.cog.header.gdal_tags import GdalBandMetadata, has_block_leaders, parse_metadata, parse_nodata
from rasteret_ml.cog.header.georeference import GeoTags, read_crs, read_transform
from rasteret_ml.cog.header.ifd import Directory, NeedBytes, SparseFile, read_directories
from rasteret_ml.cog.header.tile_layout import missing_ranges, read_tile_table
from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.cog.tile_table import Sidecar, TileTable, slice_plane
from rasteret_ml.errors import CorruptTiffError, DataError, UnsupportedTiffError

_SUBFILE_TYPE, _WIDTH, _HEIGHT = 254, 256, 257
_REDUCED, _MASK = 1, 4  #: Bits of NewSubfileType.
_GEO_FLOATS = {"pixel_scale": 33550, "tiepoint": 33922, "transformation": 34264, "doubles": 34736}
_GEO_KEYS, _GEO_ASCII, _GDAL_METADATA, _GDAL_NODATA = 34735, 34737, 42112, 42113
_FIRST_PAGE_TAGS = (*_GEO_FLOATS.values(), _GEO_KEYS, _GEO_ASCII, _GDAL_METADATA, _GDAL_NODATA)
_PER_DATASET = 2  # GDAL's mask flag GMF_PER_DATASET: one mask for all bands.
_ALPHA = (1, 2)  # ExtraSamples values of associated and unassociated alpha.
_ALPHA_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CogHeader:
    """The header of a whole file."""

    image: TileTable  #: Full resolution, all planes.
    mask: TileTable | None  #: Mask of the full resolution image, None if there is none.
    overviews: tuple[TileTable, ...]  #: Largest first, all planes.
    overview_masks: tuple[TileTable, ...]  #: Masks of overviews, largest first.
    transform: Affine | None  #: (column, row) of pixel corners to CRS coordinates.
    crs: str | None  #: CRS text.
    geo: GeoTags  #: Georeferencing tags as stored.
    nodata: int | float | None  #: Declared nodata value.
    bands: tuple[GdalBandMetadata, ...]  #: One per sample.
    overview_resampling: str | None  #: Resampling method of the overviews, None if not stored.
    mask_flags: Mapping[int, int]  #: GDAL's mask flags by band, from a `.msk` file; unused for an internal mask.

    @property
    def count(self) -> int:
        """Number of bands."""
        return self.image.samples_per_pixel

    @property
    def alpha(self) -> int | None:
        """Index of the alpha band by GDAL's rule: the last of two or four bands, 8- or 16-bit."""
        last = self.count - 1
        if self.count not in (2, 4) or self.image.dtype not in _ALPHA_DTYPES:
            return None
        color_interp = self.bands[last].color_interp
        if color_interp is not None:
            return last if color_interp == "alpha" else None
        extra = self.image.extra_samples
        return last if extra and extra[-1] in _ALPHA else None

    def band(self, index: int, *, file_size: int | None = None, etag: str | None = None) -> CogMetadata:
        """Return the metadata of band `index` (from 0)."""
        mask, overview_masks, mask_sample = self.mask, self.overview_masks, self._mask_sample(index)
        is_alpha = mask_sample is None and self.alpha not in (None, index)
        if is_alpha:
            mask, overview_masks, mask_sample = self.image, self.overviews, self.alpha
        elif mask_sample is None:
            mask, overview_masks = None, ()
        mask_sample = mask_sample or 0
        return CogMetadata(
            image=slice_plane(self.image, index),
            transform=self.transform,
            crs=self.crs,
            nodata=self.nodata,
            mask=None if mask is None else slice_plane(mask, mask_sample),
            overviews=tuple(slice_plane(table, index) for table in self.overviews),
            overview_masks=tuple(slice_plane(table, mask_sample) for table in overview_masks),
            mask_sample=mask_sample,
            mask_is_alpha=is_alpha,
            overview_resampling=self.overview_resampling,
            scale=self.bands[index].scale,
            offset=self.bands[index].offset,
            file_size=file_size,
            etag=etag,
            pixel_scale=self.geo.pixel_scale,
            tiepoint=self.geo.tiepoint,
        )

    def _mask_sample(self, index: int) -> int | None:
        """Which sample of the mask applies to band `index`, None if none does (as GDALDefaultOverviews)."""
        if self.mask is None:
            return None
        samples = self.mask.samples_per_pixel
        if self.mask.sidecar is None:
            return index if samples == self.count else 0
        flags = self.mask_flags.get(index)
        if flags is None:
            return None
        sample = 0 if flags & _PER_DATASET else index
        return sample if sample < samples else None

    def with_overviews(self, other: CogHeader, sidecar: Sidecar) -> CogHeader:
        """Return this header with the images of a `.ovr` file as its overviews, and their masks."""
        overviews = [table for table in (other.image, *other.overviews) if _could_be_overview(table, self.image)]
        masks = [table for table in (other.mask, *other.overview_masks) if table is not None]
        return replace(
            self,
            overviews=_largest_first(_in_sidecar(overviews, sidecar)),
            overview_masks=_largest_first([*self.overview_masks, *_in_sidecar(masks, sidecar)]),
        )

    def with_mask(self, other: CogHeader, sidecar: Sidecar) -> CogHeader:
        """Return this header with the mask in a `.msk` file, and the overviews of that mask.

        Raise CorruptTiffError if the mask differs from the image in size.
        """
        if (other.image.width, other.image.height) != (self.image.width, self.image.height):
            raise CorruptTiffError(
                f"its mask {sidecar.suffix} is {other.image.width} x {other.image.height} pixels, "
                f"the image {self.image.width} x {self.image.height}"
            )
        (mask,) = _in_sidecar([other.image], sidecar)
        overview_masks = [*self.overview_masks, *_in_sidecar(other.overviews, sidecar)]
        return replace(self, mask=mask, mask_flags=other.mask_flags, overview_masks=_largest_first(overview_masks))

    def with_mask_overviews(self, other: CogHeader, sidecar: Sidecar) -> CogHeader:
        """Return this header with the images of a `.msk.ovr` file as the overviews of its mask."""
        return replace(self, overview_masks=_largest_first(_in_sidecar([other.image, *other.overviews], sidecar)))


def parse_header(file: SparseFile) -> CogHeader:
    """Parse the image directories of a TIFF.

    Raise NeedBytes for ranges to fetch, to `file.add` and to try again; NotATiffError, UnsupportedTiffError or
    CorruptTiffError if it cannot be read. The message gives the reason; the caller adds the file.
    """
    directories, further = read_directories(file)
    try:
        first = directories[0]
        pages = [first, *(page for page in directories[1:] if _belongs_to(page, first))]
        missing = [] if further is None else list(further.ranges)
        for page in pages:
            missing += missing_ranges(page)
        missing += first.missing(_FIRST_PAGE_TAGS)
        if missing:
            raise NeedBytes(missing)
        return _read_pages(pages, has_block_leaders(file.peek(0, min(file.size, 1024))))
    except (NeedBytes, DataError):
        raise
    except (ArithmeticError, LookupError, MemoryError, ValueError, struct.error) as error:
        raise CorruptTiffError(f"the TIFF header cannot be parsed: {type(error).__name__}: {error}") from error


def _belongs_to(page: Directory, first: Directory) -> bool:
    """Whether a page is an overview or a mask of the first one, by its subfile type and size."""
    fits = page.integer(_WIDTH, 0) <= first.integer(_WIDTH, 0) and page.integer(_HEIGHT, 0) <= first.integer(_HEIGHT, 0)
    return fits and bool(page.integer(_SUBFILE_TYPE, 0) & (_REDUCED | _MASK))


def _read_pages(pages: list[Directory], block_leaders: bool) -> CogHeader:
    first = pages[0]
    image = _read_supported(first, block_leaders)
    overviews, masks = [], []
    for page in pages[1:]:
        if page.integer(_SUBFILE_TYPE, 0) & _MASK:
            masks.append(_read_supported(page, block_leaders))
            continue
        with suppress(UnsupportedTiffError):  # pixels can be read without this overview
            table = _read_supported(page, block_leaders)
            if _could_be_overview(table, image):
                overviews.append(table)
    mask = next((m for m in masks if (m.width, m.height) == (image.width, image.height)), None)
    geo = _read_geo_tags(first)
    bands, resampling, mask_flags = parse_metadata(first.text(_GDAL_METADATA), image.samples_per_pixel)
    return CogHeader(
        image=image,
        mask=mask,
        overviews=_largest_first(overviews),
        overview_masks=_largest_first(table for table in masks if table is not mask),
        transform=read_transform(geo),
        crs=read_crs(geo),
        geo=geo,
        nodata=parse_nodata(first.text(_GDAL_NODATA), image.dtype),
        bands=bands,
        overview_resampling=resampling,
        mask_flags=mask_flags,
    )


def _read_supported(page: Directory, block_leaders: bool) -> TileTable:
    table = read_tile_table(page, block_leaders=block_leaders)
    check_supported(table)
    return table


def _could_be_overview(table: TileTable, image: TileTable) -> bool:
    same_bands = (table.dtype, table.samples_per_pixel) == (image.dtype, image.samples_per_pixel)
    return same_bands and table.width <= image.width and table.height <= image.height


def _largest_first(tables: Iterable[TileTable]) -> tuple[TileTable, ...]:
    return tuple(sorted(tables, key=lambda table: -table.width * table.height))


def _in_sidecar(tables: Iterable[TileTable], sidecar: Sidecar) -> list[TileTable]:
    return [replace(table, sidecar=sidecar) for table in tables]


def _read_geo_tags(page: Directory) -> GeoTags:
    return GeoTags(
        **{name: tuple(map(float, page.numbers(code).tolist())) for name, code in _GEO_FLOATS.items()},
        directory=tuple(page.integers(_GEO_KEYS).tolist()),
        ascii=page.text(_GEO_ASCII) or "",
    )
