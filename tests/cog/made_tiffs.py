"""TIFFs and tile tables made for tests."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from whole_file import header_of, read_band, read_bands

from rasteret_ml.cog.tile_table import TileTable

TRANSFORM = Affine(10, 0, 500000, 0, -10, 5000000)
INTEGERS = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
LAYOUTS = {
    "tiled": {"tiled": True, "blockxsize": 16, "blockysize": 16},
    "striped": {"tiled": False, "blockysize": 8},
}


def pixels(dtype: str, count: int = 3, shape: tuple[int, int] = (37, 45), seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth with noise, over the type's whole range, so that predictors wrap around."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype).kind
    if kind in "iu":
        limits = np.iinfo(dtype)
        noise = rng.integers(limits.min, limits.max, (count, *shape), dtype=dtype, endpoint=True)
        ramp = np.broadcast_to(np.arange(shape[1]), noise.shape).astype(dtype)
        return np.where(rng.random(noise.shape) < 0.5, noise, ramp)
    values = rng.normal(0, 1e3, (count, *shape)).astype(dtype)
    return values + 1j * values[:, ::-1].astype(dtype) if kind == "c" else values


def gtiff(data: np.ndarray[Any, Any], **creation: Any) -> tuple[bytes, np.ndarray[Any, Any]]:
    """A GeoTIFF of `data` as GDAL writes it, and GDAL's pixels of it `[h, w, bands]`."""
    profile = {"driver": "GTiff", "count": len(data), "height": data.shape[1], "width": data.shape[2]}
    profile |= {"dtype": data.dtype.name, "crs": "EPSG:32633", "transform": TRANSFORM}
    with MemoryFile() as memory:
        with memory.open(**(profile | creation)) as dataset:
            dataset.write(data)
        with memory.open() as dataset:
            return memory.read(), np.moveaxis(dataset.read(), 0, -1)


def assert_same(content: bytes, expected: np.ndarray[Any, Any]) -> None:
    """All bands at once, and each band by its own metadata, equal `expected`."""
    found = read_bands(content)
    assert found.stored.all()
    assert found.values.dtype == expected.dtype
    assert np.array_equal(found.values, expected, equal_nan=expected.dtype.kind in "fc")
    header = header_of(content)
    assert header.count == expected.shape[-1]
    last = read_band(content, header, header.count - 1).values[..., 0]
    assert np.array_equal(last, expected[..., -1], equal_nan=expected.dtype.kind in "fc")


def photo(count: int) -> np.ndarray[Any, Any]:
    """Smooth colours, so that lossy codecs lose little."""
    y, x = np.mgrid[0:70, 0:90]
    bands = [127 + 90 * np.sin(x / (9 + 3 * k)) * np.cos(y / (11 + 2 * k)) for k in range(count)]
    return np.stack(bands).astype(np.uint8)


def make_table(dtype: str, shape: tuple[int, int], samples: int = 1, **facts: Any) -> TileTable:
    one = np.array([8], np.int64)
    return TileTable(
        width=shape[1], height=shape[0], tile_width=shape[1], tile_height=shape[0], dtype=np.dtype(dtype),
        tile_offsets=one, tile_byte_counts=one, samples_per_pixel=samples, **facts,
    )  # fmt: skip


def raw_tiff(
    strips: Sequence[bytes], shape: tuple[int, int], *, big_endian: bool = False, tags: dict[int, Any] | None = None
) -> bytes:
    """A TIFF of given strips (tiles if `tags` holds 322 and 323); `tags` by number, ints or bytes."""
    order = ">" if big_endian else "<"
    fields = {256: shape[1], 257: shape[0], 258: 8, 259: 1, 262: 1, 277: 1, 278: shape[0]} | (tags or {})
    where, counts = (324, 325) if 322 in fields else (273, 279)
    fields |= {where: [0] * len(strips), counts: [len(strip) for strip in strips]}

    def packed(code: int) -> tuple[int, int, bytes]:
        value = fields[code]
        if isinstance(value, bytes):
            return 7, len(value), value
        values = [value] if isinstance(value, int) else list(value)
        long = code in (where, counts) or max(values) >= 2**16
        return (4 if long else 3), len(values), struct.pack(f"{order}{len(values)}{'I' if long else 'H'}", *values)

    place = 8 + 2 + 12 * len(fields) + 4
    outside = [raw for code in sorted(fields) if len(raw := packed(code)[2]) > 4]
    starts = place + sum(len(raw) + len(raw) % 2 for raw in outside) + np.cumsum([0, *map(len, strips)])
    fields[where] = starts[:-1].tolist()
    entries, extra = b"", b""
    for code in sorted(fields):
        kind, count, raw = packed(code)
        inline = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(order + "I", place + len(extra))
        extra += b"" if len(raw) <= 4 else raw + b"\0" * (len(raw) % 2)
        entries += struct.pack(order + "HHI", code, kind, count) + inline
    magic = struct.pack(order + "2sHIH", b"MM" if big_endian else b"II", 42, 8, len(fields))
    return magic + entries + b"\0" * 4 + extra + b"".join(strips)


def gdal_pixels(content: bytes) -> np.ndarray[Any, Any]:
    """GDAL's pixels `[h, w, bands]`."""
    with warnings.catch_warnings(), MemoryFile(content) as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open() as dataset:
            return np.moveaxis(dataset.read(), 0, -1)
