"""What is known of one band of one file: enough to turn byte ranges into pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from affine import Affine

from rasteret_ml.errors import CollectionError
from rasteret_ml.geo.grid import Grid
from rasteret_ml.geo.window import Window

__all__ = ["CogMetadata", "TileTable", "slice_plane", "transform_from_list", "transform_to_list"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileTable:
    """One image of a TIFF (full resolution, overview or mask), as far as one band needs it."""

    width: int
    """Columns."""
    height: int
    """Rows."""
    tile_width: int
    """Columns of a tile; of a striped image, the image's width."""
    tile_height: int
    """Rows of a tile; of a striped image, rows per strip."""
    dtype: np.dtype[Any]
    """Sample type as returned, native byte order."""
    tile_offsets: npt.NDArray[np.int64]
    """Byte offset of each tile, row-major; 0 with count 0 = sparse. For planar files, this band's plane only."""
    tile_byte_counts: npt.NDArray[np.int64]
    """Compressed bytes of each tile."""
    compression: int = 1
    """TIFF tag 259."""
    predictor: int = 1
    """TIFF tag 317: 1 none, 2 horizontal, 3 floating point."""
    samples_per_pixel: int = 1
    """TIFF tag 277."""
    planar_configuration: int = 1
    """TIFF tag 284: 1 samples interleaved, 2 one plane per sample."""
    photometric: int | None = None
    """TIFF tag 262."""
    extra_samples: tuple[int, ...] = ()
    """TIFF tag 338."""
    bits_per_sample: int = 0
    """TIFF tag 258; 0 means the dtype's own width."""
    big_endian: bool = False
    """Whether samples wider than a byte are stored most significant byte first."""
    fill_order: int = 1
    """TIFF tag 266; 2 = bits of a byte reversed."""
    striped: bool = False
    """Whether the last row of tiles is cut at the image's edge (strips), not padded (tiles)."""
    jpeg_tables: bytes | None = None
    """TIFF tag 347."""

    @property
    def bits(self) -> int:
        """Stored bits per sample."""
        return self.bits_per_sample or self.dtype.itemsize * 8

    @property
    def tiles_across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_width)

    @property
    def tiles_down(self) -> int:
        """Tiles in a column."""
        return -(-self.height // self.tile_height)

    @property
    def samples_per_tile(self) -> int:
        """Samples interleaved in a tile: all of them, or one where planes are separate."""
        return 1 if self.planar_configuration == 2 else self.samples_per_pixel

    @property
    def extent(self) -> Window:
        """The whole image."""
        return Window(row=0, col=0, height=self.height, width=self.width)

    def stored_rows(self, tile_row: int) -> int:
        """Rows stored in a tile of this row: short only in the last strip."""
        if self.striped:
            return min(self.tile_height, self.height - tile_row * self.tile_height)
        return self.tile_height

    def to_struct(self) -> dict[str, Any]:
        """Plain values, named as in the Parquet contract (arrays stay arrays)."""
        return {
            "image_width": self.width,
            "image_height": self.height,
            "tile_width": self.tile_width,
            "tile_height": self.tile_height,
            "dtype": self.dtype.name,
            "predictor": self.predictor,
            "compression": self.compression,
            "tile_offsets": self.tile_offsets,
            "tile_byte_counts": self.tile_byte_counts,
            "samples_per_pixel": self.samples_per_pixel,
            "planar_configuration": self.planar_configuration,
            "photometric": self.photometric,
            "extra_samples": list(self.extra_samples),
            "bits_per_sample": self.bits_per_sample or None,
            "big_endian": self.big_endian,
            "fill_order": self.fill_order,
            "striped": self.striped,
            "jpeg_tables": self.jpeg_tables,
        }

    @classmethod
    def from_struct(cls, struct: Mapping[str, Any]) -> TileTable:
        """Read `to_struct`'s mapping, or what older writers leave of it.

        Raises:
            CollectionError: a size, the dtype or a tile array is missing.
        """

        def number(name: str, default: int | None = None, alias: str = "") -> int:
            value = struct.get(name)
            value = struct.get(alias) if value is None and alias else value
            value = default if value is None else value
            if value is None:
                raise CollectionError(f"Band metadata lacks {name!r}; rebuild the Collection.")
            return int(value)

        offsets, counts = struct.get("tile_offsets"), struct.get("tile_byte_counts")
        if offsets is None or counts is None or struct.get("dtype") is None:
            raise CollectionError(
                "Band metadata lacks tile_offsets, tile_byte_counts or dtype; rebuild the Collection."
            )
        photometric = struct.get("photometric")
        return cls(
            width=number("image_width", alias="width"),
            height=number("image_height", alias="height"),
            tile_width=number("tile_width"),
            tile_height=number("tile_height"),
            dtype=np.dtype(str(struct["dtype"])).newbyteorder("="),
            predictor=number("predictor", 1),
            compression=number("compression", 1),
            tile_offsets=np.asarray(offsets, dtype=np.int64),
            tile_byte_counts=np.asarray(counts, dtype=np.int64),
            samples_per_pixel=number("samples_per_pixel", 1),
            planar_configuration=number("planar_configuration", 1),
            photometric=None if photometric is None else int(photometric),
            extra_samples=tuple(int(v) for v in _or_empty(struct.get("extra_samples"))),
            bits_per_sample=number("bits_per_sample", 0),
            big_endian=bool(struct.get("big_endian")),
            fill_order=number("fill_order", 1),
            striped=bool(struct.get("striped")),
            jpeg_tables=struct.get("jpeg_tables"),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
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

    @property
    def grid(self) -> Grid:
        """The grid of the full resolution image; without georeferencing, plain pixel coordinates."""
        transform = Affine.identity() if self.transform is None else self.transform
        return Grid(crs=self.crs, transform=transform, shape=(self.height, self.width))

    def to_struct(self) -> dict[str, Any]:
        """The Parquet contract's `{band}_metadata` struct as plain values."""
        whole = isinstance(self.nodata, int)
        return self.image.to_struct() | {
            "transform": transform_to_list(self.transform),
            "pixel_scale": list(self.pixel_scale) or None,
            "tiepoint": list(self.tiepoint) or None,
            "nodata": None if self.nodata is None else float(self.nodata),
            "nodata_int": self.nodata if whole and abs(int(self.nodata or 0)) < 2**63 else None,
            "mask": None if self.mask is None else self.mask.to_struct(),
            "overviews": [table.to_struct() for table in self.overviews],
            "overview_masks": [table.to_struct() for table in self.overview_masks],
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
        mask = struct.get("mask")
        return cls(
            image=image,
            transform=transform_from_list(struct.get("transform")),
            crs=crs,
            nodata=_nodata(struct, image.dtype),
            mask=None if mask is None else TileTable.from_struct(mask),
            overviews=tuple(TileTable.from_struct(s) for s in _or_empty(struct.get("overviews"))),
            overview_masks=tuple(TileTable.from_struct(s) for s in _or_empty(struct.get("overview_masks"))),
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
    v = [float(x) for x in values]
    if len(v) == 4:
        return Affine(v[0], 0.0, v[1], 0.0, v[2], v[3])
    if len(v) in (6, 9):
        return Affine(*v[:6])
    raise CollectionError(f"A stored transform has 4 or 6 values, not {len(v)}.")


def _nodata(struct: Mapping[str, Any], dtype: np.dtype[Any]) -> int | float | None:
    exact, value = struct.get("nodata_int"), struct.get("nodata")
    if exact is not None and dtype.kind in "iu":
        return int(exact)
    if value is None:
        return None
    return int(value) if dtype.kind in "iu" and float(value).is_integer() else float(value)


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


def slice_plane(table: TileTable, sample: int) -> TileTable:
    """The plane of one sample out of a planar table that holds them all."""
    tiles = table.tiles_across * table.tiles_down
    part = slice(sample * tiles, (sample + 1) * tiles)
    return replace(table, tile_offsets=table.tile_offsets[part], tile_byte_counts=table.tile_byte_counts[part])


def _or_empty(values: Any) -> Any:
    return () if values is None else values
