"""The tile table of one TIFF image: where its tiles are, how they are stored, and which of them a window needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.errors import CollectionError
from rasteret_ml.geo.grid import Window
from rasteret_ml.ranges import ByteRange

#: Default of TIFF tag 529 (ITU-R BT.601): the shares of red, green and blue in Y.
BT601_COEFFICIENTS = (0.299, 0.587, 0.114)
_LEADER_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A file next to the raster that holds its overviews or its mask."""

    suffix: str  #: Appended to the path of the raster: ".ovr", ".msk" or ".msk.ovr".
    size: int | None = None  #: Bytes of the file when it was indexed; None = unknown.
    etag: str | None = None  #: Its ETag when it was indexed.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TileTable:
    """One image of a TIFF (full resolution, overview or mask), as one band needs it."""

    width: int  #: Columns.
    height: int  #: Rows.
    tile_width: int  #: Columns of a tile; in a striped image, columns of the image.
    tile_height: int  #: Rows of a tile; in a striped image, rows per strip.
    dtype: np.dtype[Any]  #: Sample type as returned, native byte order.
    #: Byte offset of each tile, row-major; 0 with count 0 = sparse. In a planar file, of this band's plane only.
    tile_offsets: npt.NDArray[np.int64]
    tile_byte_counts: npt.NDArray[np.int64]  #: Compressed bytes of each tile.
    compression: int = 1  #: TIFF tag 259.
    predictor: int = 1  #: TIFF tag 317: 1 none, 2 horizontal, 3 floating point.
    samples_per_pixel: int = 1  #: TIFF tag 277.
    planar_configuration: int = 1  #: TIFF tag 284: 1 samples interleaved, 2 one plane per sample.
    photometric: int | None = None  #: TIFF tag 262.
    extra_samples: tuple[int, ...] = ()  #: TIFF tag 338.
    bits_per_sample: int = 0  #: TIFF tag 258; 0 = the dtype's own width.
    big_endian: bool = False  #: Whether samples wider than a byte are stored most significant byte first.
    fill_order: int = 1  #: TIFF tag 266; 2 = the bits of each byte are reversed.
    striped: bool = False  #: Whether the last row of tiles ends with the image (strips) and is not padded (tiles).
    jpeg_tables: bytes | None = None  #: TIFF tag 347.
    #: TIFF tag 530 of YCbCr pixels outside JPEG: (columns, rows) of luma per chroma sample.
    ycbcr_subsampling: tuple[int, int] = (1, 1)
    ycbcr_coefficients: tuple[float, float, float] = BT601_COEFFICIENTS  #: TIFF tag 529 of YCbCr pixels outside JPEG.
    block_leaders: bool = False  #: Whether the 4 bytes before each tile repeat its byte count (GDAL's COG layout).
    sidecar: Sidecar | None = None  #: The file that holds the tiles; None = the raster itself.

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
        """Samples interleaved in a tile: all of them, or one if planes are separate."""
        return 1 if self.planar_configuration == 2 else self.samples_per_pixel

    @property
    def extent(self) -> Window:
        """The whole image."""
        return Window(row=0, col=0, height=self.height, width=self.width)

    @property
    def tile_bytes(self) -> int:
        """Bytes of a full decoded tile."""
        return self.tile_height * self.tile_width * self.samples_per_tile * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a row of an uncompressed tile; packed samples are padded to a byte."""
        return -(-self.tile_width * self.samples_per_tile * self.bits // 8)

    def stored_rows(self, tile_row: int) -> int:
        """Return the rows stored in a tile of this row of tiles; fewer than `tile_height` only in the last strip."""
        if self.striped:
            return min(self.tile_height, self.height - tile_row * self.tile_height)
        return self.tile_height

    def to_struct(self) -> dict[str, Any]:
        """Return plain values under the names of the Parquet struct; arrays stay arrays."""
        same = ("tile_width", "tile_height", "tile_offsets", "tile_byte_counts", "jpeg_tables", *_DEFAULTS, *_FLAGS)
        return {name: getattr(self, name) for name in same} | {
            "image_width": self.width,
            "image_height": self.height,
            "dtype": _dtype_name(self.dtype),
            "extra_samples": list(self.extra_samples),
            "bits_per_sample": self.bits_per_sample or None,
            "ycbcr_subsampling": list(self.ycbcr_subsampling) if self.ycbcr_subsampling != (1, 1) else None,
            "ycbcr_coefficients": list(self.ycbcr_coefficients) if self.photometric == 6 else None,
            "sidecar": None if self.sidecar is None else asdict(self.sidecar),
        }

    @classmethod
    def from_struct(cls, struct: Mapping[str, Any]) -> TileTable:
        """Read the mapping of `to_struct`; absent or null fields of older writers take their defaults.

        Raise CollectionError if a size, the dtype or a tile array is missing.
        """
        offsets, counts = struct.get("tile_offsets"), struct.get("tile_byte_counts")
        if offsets is None or counts is None or struct.get("dtype") is None:
            raise CollectionError(
                "Band metadata lacks tile_offsets, tile_byte_counts or dtype; rebuild the Collection."
            )
        subsampling, coefficients = struct.get("ycbcr_subsampling"), struct.get("ycbcr_coefficients")
        extra_samples, sidecar = struct.get("extra_samples"), struct.get("sidecar")
        return cls(
            **_layout_fields(tuple(map(struct.get, _LAYOUT_KEYS))),
            tile_offsets=np.asarray(offsets, dtype=np.int64),
            tile_byte_counts=np.asarray(counts, dtype=np.int64),
            extra_samples=() if extra_samples is None else tuple(int(v) for v in extra_samples),
            jpeg_tables=struct.get("jpeg_tables"),
            ycbcr_subsampling=(1, 1) if subsampling is None else (int(subsampling[0]), int(subsampling[1])),
            ycbcr_coefficients=BT601_COEFFICIENTS if coefficients is None else tuple(map(float, coefficients[:3])),  # type: ignore[arg-type]
            sidecar=None if sidecar is None else Sidecar(**sidecar),
        )


_DEFAULTS = {
    "predictor": 1, "compression": 1, "samples_per_pixel": 1, "planar_configuration": 1, "bits_per_sample": 0,
    "fill_order": 1, "photometric": None,
}  # fmt: skip
_FLAGS = ("big_endian", "striped", "block_leaders")
_SIZES = ("image_width", "width", "image_height", "height", "tile_width", "tile_height")
# Keys whose values most files of a Collection share.
_LAYOUT_KEYS = (*_SIZES, "dtype", *_DEFAULTS, *_FLAGS)


@lru_cache(maxsize=1024)
def _layout_fields(values: tuple[Any, ...]) -> dict[str, Any]:
    """Fields of a table from the values of `_LAYOUT_KEYS`; cached, so do not change the result."""
    struct = dict(zip(_LAYOUT_KEYS, values, strict=True))
    integers = {key: default if struct[key] is None else int(struct[key]) for key, default in _DEFAULTS.items()}
    return {
        **integers,
        **{key: bool(struct[key]) for key in _FLAGS},
        "dtype": np.dtype(str(struct["dtype"])).newbyteorder("="),
        "width": _size(struct, "image_width", "width"),
        "height": _size(struct, "image_height", "height"),
        "tile_width": _size(struct, "tile_width"),
        "tile_height": _size(struct, "tile_height"),
    }


def _size(struct: Mapping[str, Any], *names: str) -> int:
    """The first value that is not None under these names."""
    for name in names:
        if struct[name] is not None:
            return int(struct[name])
    raise CollectionError(f"Band metadata lacks {names[0]!r}; rebuild the Collection.")


@cache
def _dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name  # numpy computes it on each access, which costs as much as parsing a directory


def slice_plane(table: TileTable, sample: int) -> TileTable:
    """Return the plane of one sample of a planar table; a table of interleaved samples is returned unchanged."""
    if table.planar_configuration != 2:
        return table
    tiles = table.tiles_across * table.tiles_down
    plane = slice(sample * tiles, (sample + 1) * tiles)
    return replace(table, tile_offsets=table.tile_offsets[plane], tile_byte_counts=table.tile_byte_counts[plane])


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRead:
    """The part of a window that one tile covers."""

    index: int  #: Position in the tile table, row-major.
    #: Bytes to fetch: the tile, and its block leader if the file has those. None = sparse, nothing is stored.
    range: ByteRange | None
    leader: int  #: Bytes of `range` before the tile itself: 4 or 0.
    source: Window  #: The required pixels, relative to the tile.
    target: Window  #: Where they go, relative to the window.
    stored_rows: int  #: Rows that the tile stores: `tile_height`, or fewer in the last strip.
    image_rows: int  #: Rows of the tile that lie in the image.
    image_cols: int  #: Columns of the tile that lie in the image.


def plan_tiles(table: TileTable, window: Window) -> tuple[TileRead, ...]:
    """Return the tiles that hold the pixels of `window`, row-major.

    Every pixel of the window that lies in the image is covered exactly once; a window outside it needs no tiles.
    """
    layout = table.height, table.width, table.tile_height, table.tile_width
    leader, reads = _LEADER_BYTES if table.block_leaders else 0, []
    for begin, overlaps in _tile_rows(layout, window.row, window.col, window.height, window.width):
        end, stored_rows = begin + len(overlaps), table.stored_rows(begin // table.tiles_across)
        offsets, counts = table.tile_offsets[begin:end].tolist(), table.tile_byte_counts[begin:end].tolist()
        for index, overlap, offset, count in zip(range(begin, end), overlaps, offsets, counts, strict=True):
            source, target, image_rows, image_cols = overlap
            reads.append(
                TileRead(
                    index=index,
                    range=ByteRange(offset - leader, leader + count) if count > 0 and offset > leader else None,
                    leader=leader,
                    source=source,
                    target=target,
                    stored_rows=stored_rows,
                    image_rows=image_rows,
                    image_cols=image_cols,
                )
            )
    return tuple(reads)


_Layout = tuple[int, int, int, int]  # Rows and columns of the image, and of a tile.
_Overlap = tuple[Window, Window, int, int]  # `source`, `target`, `image_rows` and `image_cols` of a `TileRead`.


@lru_cache(maxsize=64)  # the bands of a chip, and its mask, need the same
def _tile_rows(
    layout: _Layout, row: int, col: int, height: int, width: int
) -> tuple[tuple[int, tuple[_Overlap, ...]], ...]:
    """For each row of tiles under a window: the index of its first tile, and the overlap of each tile."""
    # Plain integers, because a batch plans thousands of tiles.
    rows, cols, tile_height, tile_width = layout
    top, left, bottom, right = max(row, 0), max(col, 0), min(row + height, rows), min(col + width, cols)
    if top >= bottom or left >= right:
        return ()
    tiles_across, tile_rows = -(-cols // tile_width), []
    first, last = left // tile_width, (right - 1) // tile_width
    for tile_row in range(top // tile_height, (bottom - 1) // tile_height + 1):
        y = tile_row * tile_height
        image_rows, y_start = min(tile_height, rows - y), max(top, y)
        overlap_height, overlaps = min(bottom, y + tile_height) - y_start, []
        for x in range(first * tile_width, (last + 1) * tile_width, tile_width):
            x_start = max(left, x)
            overlap_width = min(right, x + tile_width) - x_start
            source = Window(row=y_start - y, col=x_start - x, height=overlap_height, width=overlap_width)
            target = Window(row=y_start - row, col=x_start - col, height=overlap_height, width=overlap_width)
            overlaps.append((source, target, image_rows, min(tile_width, cols - x)))
        tile_rows.append((tile_row * tiles_across + first, tuple(overlaps)))
    return tuple(tile_rows)
