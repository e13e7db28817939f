"""Metadata of one band of one file: everything needed to turn byte ranges into pixels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from affine import Affine

from rasteret_ml.cog.tile_table import TileTable, slice_plane
from rasteret_ml.errors import CollectionError
from rasteret_ml.geo.grid import Grid


def _image_field(name: str) -> Any:
    return property(operator.attrgetter(f"image.{name}"), doc=f"`TileTable.{name}` of the full resolution image.")


# Fields that a struct holds under the same names, as they are.
_PLAIN = ("overview_resampling", "scale", "offset", "file_size", "etag")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Level:
    """A resolution at which a band can be read."""

    number: int  #: 0 = full resolution, 1 = the first overview …
    image: TileTable  #: Its pixels.
    #: Its validity mask (non-zero = valid); None if the file has neither a mask nor an alpha band.
    mask: TileTable | None
    grid: Grid  #: The full extent divided into this level's columns and rows.


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: cached properties need a __dict__
class CogMetadata:
    """One band's tile tables and georeferencing, as a row of a Collection stores them in `{band}_metadata`.

    >>> metadata, url, band_index = record.try_get_band_cog_metadata("B04")
    >>> metadata.width, metadata.dtype, len(metadata.levels)
    (10980, dtype('uint16'), 5)
    """

    image: TileTable  #: Full resolution.
    #: (column, row) of pixel corners to (x, y), PixelIsArea; None = the file is not georeferenced.
    transform: Affine | None
    crs: str | None = None  #: CRS text of the record; None = unknown.
    nodata: int | float | None = None  #: Declared nodata value, exact for integers; None = none declared.
    mask: TileTable | None = None  #: Validity mask of the full resolution image (non-zero = valid).
    overviews: tuple[TileTable, ...] = ()  #: Reduced images, largest first.
    overview_masks: tuple[TileTable, ...] = ()  #: Masks of the overviews, matched to them by size.
    mask_sample: int = 0  #: Sample of the mask that applies to this band, if its tiles interleave several.
    #: Whether the masks are an alpha band; a declared nodata value then takes precedence over them.
    mask_is_alpha: bool = False
    #: Resampling method of the overviews (GDAL's name, lower case); None = not stored in the file.
    overview_resampling: str | None = None
    scale: float | None = None  #: Factor from stored to physical values; never applied here.
    offset: float | None = None  #: Added after `scale`; never applied here.
    file_size: int | None = None  #: Bytes of the file when it was indexed; None = unknown.
    etag: str | None = None  #: The server's ETag when it was indexed.
    pixel_scale: tuple[float, ...] = ()  #: TIFF tag 33550 as stored.
    tiepoint: tuple[float, ...] = ()  #: TIFF tag 33922 as stored.

    # Fields of the full resolution image, under the names that rasteret's `CogMetadata` has too.
    width, height = map(_image_field, ("width", "height"))
    tile_width, tile_height = map(_image_field, ("tile_width", "tile_height"))
    tile_offsets, tile_byte_counts = map(_image_field, ("tile_offsets", "tile_byte_counts"))
    compression, predictor, photometric = map(_image_field, ("compression", "predictor", "photometric"))
    samples_per_pixel, extra_samples = map(_image_field, ("samples_per_pixel", "extra_samples"))
    planar_configuration = _image_field("planar_configuration")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Sample type."""
        return self.image.dtype

    @functools.cached_property
    def full(self) -> Level:
        """The full resolution."""
        return Level(number=0, image=self.image, mask=self.mask, grid=self.grid)

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """The readable resolutions, finest first; an overview that lacks its mask is left out."""
        levels = [self.full]
        masks = {(table.height, table.width): table for table in self.overview_masks}
        for table in self.overviews:
            mask = masks.get((table.height, table.width))
            if self.mask is not None and mask is None:
                continue
            scale = Affine.scale(self.width / table.width, self.height / table.height)
            grid = Grid(crs=self.crs, transform=self.grid.transform @ scale, shape=(table.height, table.width))
            levels.append(Level(number=len(levels), image=table, mask=mask, grid=grid))
        return tuple(levels)

    @functools.cached_property
    def grid(self) -> Grid:
        """The grid of the full resolution; plain pixel coordinates if the file is not georeferenced."""
        transform = Affine.identity() if self.transform is None else self.transform
        return Grid(crs=self.crs, transform=transform, shape=(self.height, self.width))

    def to_struct(self) -> dict[str, Any]:
        """Return the `{band}_metadata` struct of a Collection as plain values."""
        # The tiles of an interleaved alpha band are the band's own; they are not stored twice.
        own_alpha = self.mask is self.image and all(map(operator.is_, self.overview_masks, self.overviews))
        return self.image.to_struct() | {
            "transform": transform_to_list(self.transform),
            "pixel_scale": list(self.pixel_scale) or None,
            "tiepoint": list(self.tiepoint) or None,
            "nodata": None if self.nodata is None else float(self.nodata),
            "nodata_int": _as_int64(self.nodata) if isinstance(self.nodata, int) else None,
            "mask": None if self.mask is None or own_alpha else self.mask.to_struct(),
            "overviews": [table.to_struct() for table in self.overviews],
            "overview_masks": [] if own_alpha else [table.to_struct() for table in self.overview_masks],
            "mask_sample": self.mask_sample,
            "mask_is_alpha": self.mask_is_alpha,
            **{name: getattr(self, name) for name in _PLAIN},
        }

    @classmethod
    def from_struct(cls, struct: Mapping[str, Any], *, crs: str | None, band_index: int | None = None) -> CogMetadata:
        """Read a `{band}_metadata` struct that this library or rasteret 0.3/0.4 has written.

        Absent or null fields that rasteret does not write take their defaults. `band_index`, the index in the file,
        selects the band's plane of a planar table that was stored whole. Raise CollectionError if required fields are
        missing or the number of tiles does not match the image.
        """
        image = _band_plane(TileTable.from_struct(struct), band_index)
        mask = None if struct.get("mask") is None else TileTable.from_struct(struct["mask"])
        overviews, overview_masks = _tables(struct.get("overviews")), _tables(struct.get("overview_masks"))
        if mask is None and struct.get("mask_is_alpha"):
            mask, overview_masks = image, overviews
        return cls(
            image=image,
            transform=transform_from_list(struct.get("transform")),
            crs=crs,
            nodata=_nodata(struct, image.dtype),
            mask=mask,
            overviews=overviews,
            overview_masks=overview_masks,
            mask_sample=int(struct.get("mask_sample") or 0),
            mask_is_alpha=bool(struct.get("mask_is_alpha")),
            pixel_scale=tuple(_or_empty(struct.get("pixel_scale"))),
            tiepoint=tuple(_or_empty(struct.get("tiepoint"))),
            **{name: struct.get(name) for name in _PLAIN},
        )


def transform_to_list(transform: Affine | None) -> list[float] | None:
    """Return `[scale_x, translate_x, scale_y, translate_y]`, or all six coefficients of a rotated affine."""
    if transform is None:
        return None
    a, b, c, d, e, f = tuple(transform)[:6]
    return [a, c, e, f] if b == 0 and d == 0 else [a, b, c, d, e, f]


def transform_from_list(values: Any) -> Affine | None:
    """Return the affine of a list from `transform_to_list`; six values are a, b, c, d, e, f."""
    return None if values is None or len(values) == 0 else _affine(tuple(map(float, values)))


@functools.lru_cache(maxsize=1024)  # the bands of a record share a transform
def _affine(v: tuple[float, ...]) -> Affine:
    if len(v) == 4:
        return Affine(v[0], 0.0, v[1], 0.0, v[2], v[3])
    if len(v) in (6, 9):
        return Affine(*v[:6])
    raise CollectionError(f"A stored transform must have 4 or 6 values, got {len(v)}; rebuild the Collection.")


def _nodata(struct: Mapping[str, Any], dtype: np.dtype[Any]) -> int | float | None:
    exact, value = struct.get("nodata_int"), struct.get("nodata")
    if exact is not None and dtype.kind in "iu":
        return int(exact) % 2**64 if dtype.kind == "u" and exact < 0 else int(exact)
    if value is None:
        return None
    return int(value) if dtype.kind in "iu" and float(value).is_integer() else float(value)


def _as_int64(value: int) -> int | None:
    """An integer as Parquet's int64 stores it: large unsigned values in two's complement, None if it does not fit."""
    if not -(2**63) <= value < 2**64:
        return None
    return value - 2**64 if value >= 2**63 else value


def _band_plane(table: TileTable, band_index: int | None) -> TileTable:
    """The tiles of one band, from a table that may hold all planes of a planar file."""
    tiles = table.tiles_across * table.tiles_down
    offsets, counts = len(table.tile_offsets), len(table.tile_byte_counts)
    if offsets != counts:
        raise CollectionError(f"Band metadata has {offsets} tile offsets but {counts} counts; rebuild the Collection.")
    if offsets == tiles:
        return table
    if table.planar_configuration == 2 and offsets == tiles * table.samples_per_pixel:
        return slice_plane(table, band_index or 0)
    raise CollectionError(f"Band metadata has {offsets} tile offsets for {tiles} tiles; rebuild the Collection.")


def _tables(structs: Any) -> tuple[TileTable, ...]:
    return tuple(map(TileTable.from_struct, _or_empty(structs)))


def _or_empty(values: Any) -> Any:
    return () if values is None else values
