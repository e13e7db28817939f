"""Locate the bands of a record: file, sample in the file, and tile table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasteret_ml.cog.codecs.decode import check_supported
from rasteret_ml.cog.metadata import CogMetadata
from rasteret_ml.errors import CollectionError, UnknownBandError, UnsupportedTiffError, UsageError, redact
from rasteret_ml.geo.crs import crs_text
from rasteret_ml.raster.raster_info import BandRegistry, RasterInfo, asset_href


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BandSource:
    """One band of one record."""

    record: str  #: Record id, for error messages.
    band: str  #: Band name as the caller gave it.
    href: str  #: Unsigned address of its file.
    metadata: CogMetadata  #: Its tile table.
    sample: int  #: Index of the band in the file, from 0: its sample in pixel-interleaved tiles.
    nodata: int | float | None  #: Nodata value: the caller's, else the file's.
    nodata_given: bool = False  #: Whether `nodata` is the caller's; it then applies in addition to a mask.

    @property
    def uses_mask(self) -> bool:
        """Whether the file's mask or alpha applies. GDAL's order of precedence is mask, nodata, alpha."""
        return self.nodata is None or self.nodata_given or not self.metadata.mask_is_alpha


def locate_band(
    info: RasterInfo, data_source: str, band_code: str
) -> tuple[CogMetadata | None, str | None, int | None]:
    """Return metadata, href and band index of a band, or three Nones if the metadata or href is missing."""
    asset_key, asset = _asset(info, data_source, band_code)
    href = asset_href(asset)
    if href is None:
        return None, None, None
    keys = (f"{band_code}_metadata", f"{asset_key}_metadata")
    struct = next((info.band_metadata[k] for k in keys if info.band_metadata.get(k) is not None), None)
    if struct is None:
        return None, None, None
    index = asset.get("band_index") if isinstance(asset, Mapping) else None
    index = None if index is None else int(index)
    crs = None if info.crs is None else crs_text(info.crs)
    return CogMetadata.from_struct(struct, crs=crs, band_index=index), href, index


def _asset(info: RasterInfo, data_source: str, band_code: str) -> tuple[str | None, Any]:
    names = BandRegistry.names(band_code, data_source)
    key = next((name for name in names if info.assets.get(name) is not None), None)
    return key, None if key is None else info.assets[key]


def available_bands(info: RasterInfo, data_source: str) -> list[str]:
    """Return the sorted names of bands that have metadata and an href, without parsing tile tables."""
    names = (key.removesuffix("_metadata") for key in info.stored_bands)
    return sorted(name for name in names if asset_href(_asset(info, data_source, name)[1]) is not None)


def find_source(info: RasterInfo, data_source: str, band_code: str) -> BandSource:
    """Locate a band and check that it can be decoded.

    UnknownBandError if there is none, UnsupportedTiffError if its tiles cannot be decoded, CollectionError if the file
    interleaves several samples and the asset has no `band_index`.
    """
    metadata, href, index = locate_band(info, data_source, band_code)
    if metadata is None or href is None:
        available = ", ".join(available_bands(info, data_source)) or "none"
        raise UnknownBandError(f"Record {info.id} has no band {band_code!r}; it has: {available}.")
    try:
        check_supported(metadata.image)
    except UnsupportedTiffError as error:
        raise UnsupportedTiffError(f"Record {info.id}, band {band_code}, {redact(href)}: {error}") from None
    samples = metadata.samples_per_pixel
    if metadata.planar_configuration == 1 and samples > 1 and index is None:
        raise CollectionError(
            f"Record {info.id}, band {band_code}, {redact(href)}: the file interleaves {samples} samples, so the asset "
            "must have a band_index."
        )
    nodata = metadata.nodata
    return BandSource(record=info.id, band=band_code, href=href, metadata=metadata, sample=index or 0, nodata=nodata)


def validate_bands(bands: Sequence[str]) -> Sequence[str]:
    """Return `bands`; UsageError if it is a string or empty."""
    if isinstance(bands, str) or not len(bands):
        raise UsageError(f"bands must be a non-empty list of band names, got {bands!r}.")
    return bands
