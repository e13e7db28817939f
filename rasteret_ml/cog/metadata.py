"""What is known of one band of one file: enough to turn byte ranges into pixels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from affine import Affine

from rasteret_ml.cog.tile_table import TileTable, slice_plane
from rasteret_ml.errors import CollectionError
from rasteret_ml.geo.grid import Grid

__all__ = ["CogMetadata", "Level", "transform_from_list", "transform_to_list"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Level:
    """A resolution that a band can be read at."""

    number: int
    """0 = full resolution, 1 = the first overview …"""
    image: TileTable
    """Its pixels."""
    mask: TileTable | None
    """Its validity (non-zero = valid), None where no mask and no alpha say anything."""
    grid: Grid
    """Where the pixels lie: the full extent divided by this level's columns and rows."""


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: what follows from the fields is worked out once and kept
class CogMetadata:
    """One band's tile table with its georeferencing: what a row of a Collection stores per band."""

    image: TileTable
    """Full resolution."""
    transform: Affine | None
    """(column, row) of pixel corners to (x, y), PixelIsArea; None where the file is not georeferenced."""
    crs: str | None = None
    """CRS text of the record, None where unknown."""
    nodata: int | float | None = None
    """Declared nodata value, exact for integers; None = none declared."""
    mask: TileTable | None = None
    """The internal validity mask of the full resolution image (non-zero = valid)."""
    overviews: tuple[TileTable, ...] = ()
    """Reduced images, largest first."""
    overview_masks: tuple[TileTable, ...] = ()
    """Masks of the overviews, matched to them by size."""
    mask_sample: int = 0
    """Which sample of the mask speaks for this band, where its tiles interleave several."""
    mask_is_alpha: bool = False
    """Whether the masks are an alpha band: then a declared nodata value comes before them."""
    overview_resampling: str | None = None
    """The kernel that made the overviews (GDAL's name, lower case), None where the file does not tell."""
    scale: float | None = None
    """Factor from stored to physical values; a fact, never applied here."""
    offset: float | None = None
    """Added after `scale`; a fact, never applied here."""
    file_size: int | None = None
    """Bytes of the file when it was indexed; None = not known."""
    etag: str | None = None
    """The server's ETag when it was indexed."""
    pixel_scale: tuple[float, ...] = field(default=())
    """TIFF tag 33550 as stored."""
    tiepoint: tuple[float, ...] = field(default=())
    """TIFF tag 33922 as stored."""

    # The names of the tile table's facts that readers of the Parquet contract know this class by.
    @property
    def width(self) -> int:
        """Columns at full resolution."""
        return self.image.width

    @property
    def height(self) -> int:
        """Rows at full resolution."""
        return self.image.height

    @property
    def tile_width(self) -> int:
        """Columns of a tile."""
        return self.image.tile_width

    @property
    def tile_height(self) -> int:
        """Rows of a tile."""
        return self.image.tile_height

    @property
    def dtype(self) -> np.dtype[Any]:
        """Sample type."""
        return self.image.dtype

    @property
    def compression(self) -> int:
        """TIFF tag 259."""
        return self.image.compression

    @property
    def predictor(self) -> int:
        """TIFF tag 317."""
        return self.image.predictor

    @property
    def tile_offsets(self) -> npt.NDArray[np.int64]:
        """Byte offset of each tile."""
        return self.image.tile_offsets

    @property
    def tile_byte_counts(self) -> npt.NDArray[np.int64]:
        """Bytes of each tile."""
        return self.image.tile_byte_counts

    @property
    def samples_per_pixel(self) -> int:
        """TIFF tag 277."""
        return self.image.samples_per_pixel

    @property
    def planar_configuration(self) -> int:
        """TIFF tag 284."""
        return self.image.planar_configuration

    @property
    def photometric(self) -> int | None:
        """TIFF tag 262."""
        return self.image.photometric

    @property
    def extra_samples(self) -> tuple[int, ...]:
        """TIFF tag 338."""
        return self.image.extra_samples

    @functools.cached_property
    def full(self) -> Level:
        """Full resolution."""
        return Level(number=0, image=self.image, mask=self.mask, grid=self.grid)

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        """The resolutions that can be read, finest first: an overview without the mask that it needs is none."""
        found = [self.full]
        masks = {(table.height, table.width): table for table in self.overview_masks}
        for table in self.overviews:
            mask = masks.get((table.height, table.width))
            if self.mask is not None and mask is None:
                continue
            step = Affine.scale(self.width / table.width, self.height / table.height)
            grid = Grid(crs=self.crs, transform=self.grid.transform @ step, shape=(table.height, table.width))
            found.append(Level(number=len(found), image=table, mask=mask, grid=grid))
        return tuple(found)

    @functools.cached_property
    def grid(self) -> Grid:
        """The grid of the full resolution image; without georeferencing, plain pixel coordinates."""
        transform = Affine.identity() if self.transform is None else self.transform
        return Grid(crs=self.crs, transform=transform, shape=(self.height, self.width))

    def to_struct(self) -> dict[str, Any]:
        """The Parquet contract's `{band}_metadata` struct as plain values."""
        whole = isinstance(self.nodata, int)
        # Interleaved alpha: the same tiles as the band's, not stored twice.
        own_alpha = self.mask is self.image and all(map(operator.is_, self.overview_masks, self.overviews))
        return self.image.to_struct() | {
            "transform": transform_to_list(self.transform),
            "pixel_scale": list(self.pixel_scale) or None,
            "tiepoint": list(self.tiepoint) or None,
            "nodata": None if self.nodata is None else float(self.nodata),
            "nodata_int": _as_int64(int(self.nodata or 0)) if whole else None,
            "mask": None if self.mask is None or own_alpha else self.mask.to_struct(),
            "overviews": [table.to_struct() for table in self.overviews],
            "overview_masks": [] if own_alpha else [table.to_struct() for table in self.overview_masks],
            "mask_sample": self.mask_sample,
            "mask_is_alpha": self.mask_is_alpha,
            "overview_resampling": self.overview_resampling,
            "scale": self.scale,
            "offset": self.offset,
            "file_size": self.file_size,
            "etag": self.etag,
        }

    @classmethod
    def from_struct(cls, struct: Mapping[str, Any], *, crs: str | None, band_index: int | None = None) -> CogMetadata:
        """Read a `{band}_metadata` struct as this library or rasteret 0.3/0.4 writes it.

        Args:
            struct: The mapping; absent or null extra children take their defaults.
            crs: CRS text of the record.
            band_index: Which sample of the file; slices a planar table that was stored whole.
        """
        image = _own_plane(TileTable.from_struct(struct), band_index)
        masks = struct.get("mask"), _or_empty(struct.get("overview_masks"))
        overviews = tuple(TileTable.from_struct(s) for s in _or_empty(struct.get("overviews")))
        mask = None if masks[0] is None else TileTable.from_struct(masks[0])
        overview_masks = tuple(TileTable.from_struct(s) for s in masks[1])
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
            overview_resampling=struct.get("overview_resampling"),
            scale=struct.get("scale"),
            offset=struct.get("offset"),
            file_size=struct.get("file_size"),
            etag=struct.get("etag"),
            pixel_scale=tuple(_or_empty(struct.get("pixel_scale"))),
            tiepoint=tuple(_or_empty(struct.get("tiepoint"))),
        )


def transform_to_list(transform: Affine | None) -> list[float] | None:
    """`[scale_x, translate_x, scale_y, translate_y]`, or the six of an affine where it is rotated."""
    if transform is None:
        return None
    t = transform
    return [t.a, t.c, t.e, t.f] if t.b == 0 and t.d == 0 else [t.a, t.b, t.c, t.d, t.e, t.f]


def transform_from_list(values: Any) -> Affine | None:
    """The inverse of `transform_to_list`; six values are an affine's a, b, c, d, e, f."""
    if values is None or len(values) == 0:
        return None
    return _affine(tuple(map(float, values)))


@functools.lru_cache(maxsize=1024)
def _affine(v: tuple[float, ...]) -> Affine:
    # The bands of a record have one in common.
    if len(v) == 4:
        return Affine(v[0], 0.0, v[1], 0.0, v[2], v[3])
    if len(v) in (6, 9):
        return Affine(*v[:6])
    raise CollectionError(f"A stored transform has 4 or 6 values, not {len(v)}.")


def _nodata(struct: Mapping[str, Any], dtype: np.dtype[Any]) -> int | float | None:
    exact, value = struct.get("nodata_int"), struct.get("nodata")
    if exact is not None and dtype.kind in "iu":
        return int(exact) % 2**64 if dtype.kind == "u" and exact < 0 else int(exact)
    if value is None:
        return None
    return int(value) if dtype.kind in "iu" and float(value).is_integer() else float(value)


def _as_int64(value: int) -> int | None:
    """An integer of up to 64 bits as Parquet's int64 holds it: large unsigned ones in two's complement."""
    if not -(2**63) <= value < 2**64:
        return None
    return value - 2**64 if value >= 2**63 else value


def _own_plane(table: TileTable, band_index: int | None) -> TileTable:
    tiles = table.tiles_across * table.tiles_down
    stored = len(table.tile_offsets)
    if stored != len(table.tile_byte_counts):
        raise CollectionError(f"Band metadata has {stored} tile offsets but {len(table.tile_byte_counts)} counts.")
    if stored == tiles:
        return table
    if table.planar_configuration == 2 and stored == tiles * table.samples_per_pixel:
        return slice_plane(table, band_index or 0)
    raise CollectionError(f"Band metadata has {stored} tile offsets for {tiles} tiles.")


def _or_empty(values: Any) -> Any:
    return () if values is None else values
