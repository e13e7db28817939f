"""The tile table of one image of a TIFF: where its tiles are, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import CollectionError
from rasteret_ml.geo.window import Window

__all__ = ["BT601_COEFFICIENTS", "Sidecar", "TileTable", "slice_plane"]

BT601_COEFFICIENTS = (0.299, 0.587, 0.114)
"""TIFF 6.0's default of tag 529 (ITU-R BT.601): the shares of red, green and blue in Y."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A file beside the raster that holds its overviews or its mask."""

    suffix: str
    """What follows the raster's own path: ".ovr", ".msk" or ".msk.ovr"."""
    size: int | None = None
    """Bytes of the file when it was indexed; None = not known."""
    etag: str | None = None
    """Its version tag when it was indexed."""


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
    ycbcr_subsampling: tuple[int, int] = (1, 1)
    """TIFF tag 530 (columns, rows of luma to one of chroma), of YCbCr pixels outside JPEG."""
    ycbcr_coefficients: tuple[float, float, float] = BT601_COEFFICIENTS
    """TIFF tag 529, likewise."""
    block_leaders: bool = False
    """Whether the 4 bytes before each tile repeat its byte count (GDAL's COG layout)."""
    sidecar: Sidecar | None = None
    """The file that holds the tiles, where it is not the raster's own."""

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

    @property
    def tile_bytes(self) -> int:
        """Bytes of a whole decoded tile."""
        return self.tile_height * self.tile_width * self.samples_per_tile * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of an uncompressed tile, as stored: packed samples are padded to a byte."""
        return -(-self.tile_width * self.samples_per_tile * self.bits // 8)

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
            "dtype": _name(self.dtype),
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
            "ycbcr_subsampling": list(self.ycbcr_subsampling) if self.ycbcr_subsampling != (1, 1) else None,
            "ycbcr_coefficients": list(self.ycbcr_coefficients) if self.photometric == 6 else None,
            "block_leaders": self.block_leaders,
            "sidecar": None if self.sidecar is None else asdict(self.sidecar),
        }

    @classmethod
    def from_struct(cls, struct: Mapping[str, Any]) -> TileTable:
        """Read `to_struct`'s mapping, or what older writers leave of it.

        Raises:
            CollectionError: a size, the dtype or a tile array is missing.
        """
        offsets, counts = struct.get("tile_offsets"), struct.get("tile_byte_counts")
        if offsets is None or counts is None or struct.get("dtype") is None:
            raise CollectionError(
                "Band metadata lacks tile_offsets, tile_byte_counts or dtype; rebuild the Collection."
            )
        return cls(
            **_form(tuple(map(struct.get, _FORM))),
            tile_offsets=np.asarray(offsets, dtype=np.int64),
            tile_byte_counts=np.asarray(counts, dtype=np.int64),
            extra_samples=_integers(struct.get("extra_samples")),
            jpeg_tables=struct.get("jpeg_tables"),
            ycbcr_subsampling=_pair(struct.get("ycbcr_subsampling")),
            ycbcr_coefficients=_coefficients(struct.get("ycbcr_coefficients")),
            sidecar=None if struct.get("sidecar") is None else Sidecar(**struct["sidecar"]),
        )


_FORM = (
    "image_width", "width", "image_height", "height", "tile_width", "tile_height", "dtype", "predictor", "compression",
    "samples_per_pixel", "planar_configuration", "photometric", "bits_per_sample", "big_endian", "fill_order",
    "striped", "block_leaders",
)  # fmt: skip
"""What most files of a Collection have in common."""


@lru_cache(maxsize=1024)
def _form(values: tuple[Any, ...]) -> dict[str, Any]:
    """Fields of a table out of the values of `_FORM`; shared, so not to be changed."""
    struct = dict(zip(_FORM, values, strict=True))
    photometric = struct["photometric"]
    return {
        "width": _size(struct, "image_width", "width"),
        "height": _size(struct, "image_height", "height"),
        "tile_width": _size(struct, "tile_width"),
        "tile_height": _size(struct, "tile_height"),
        "dtype": _dtype(str(struct["dtype"])),
        "predictor": _or(struct["predictor"], 1),
        "compression": _or(struct["compression"], 1),
        "samples_per_pixel": _or(struct["samples_per_pixel"], 1),
        "planar_configuration": _or(struct["planar_configuration"], 1),
        "photometric": None if photometric is None else int(photometric),
        "bits_per_sample": _or(struct["bits_per_sample"], 0),
        "big_endian": bool(struct["big_endian"]),
        "fill_order": _or(struct["fill_order"], 1),
        "striped": bool(struct["striped"]),
        "block_leaders": bool(struct["block_leaders"]),
    }


def slice_plane(table: TileTable, sample: int) -> TileTable:
    """The plane of one sample out of a planar table that holds them all."""
    tiles = table.tiles_across * table.tiles_down
    part = slice(sample * tiles, (sample + 1) * tiles)
    return replace(table, tile_offsets=table.tile_offsets[part], tile_byte_counts=table.tile_byte_counts[part])


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # worked out by numpy each time, at the cost of parsing a directory


@cache
def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("=")


def _size(struct: Mapping[str, Any], *names: str) -> int:
    """The value under the first of the names that has one."""
    for name in names:
        value = struct.get(name)
        if value is not None:
            return int(value)
    raise CollectionError(f"Band metadata lacks {names[0]!r}; rebuild the Collection.")


def _or(value: Any, default: int) -> int:
    return default if value is None else int(value)


def _integers(values: Any) -> tuple[int, ...]:
    return () if values is None else tuple(int(v) for v in values)


def _pair(values: Any) -> tuple[int, int]:
    return (1, 1) if values is None else (int(values[0]), int(values[1]))


def _coefficients(values: Any) -> tuple[float, float, float]:
    return BT601_COEFFICIENTS if values is None else (float(values[0]), float(values[1]), float(values[2]))
