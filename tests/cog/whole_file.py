"""Read every pixel of a TIFF with the cog room alone: header, tile plan, decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.codecs.decode import decode_tile
from rasteret_ml.cog.header.ifd import SparseFile
from rasteret_ml.cog.header.parse import CogHeader, parse_header
from rasteret_ml.cog.tile_table import TileTable, plan_tiles
from rasteret_ml.errors import CorruptTiffError, UnsupportedTiffError

MOST_PIXELS = 2**26


def header_of(data: bytes) -> CogHeader:
    """Parse the header of a file in memory."""
    file = SparseFile(len(data))
    file.add(0, data)
    return parse_header(file)


@dataclass(frozen=True)
class Pixels:
    """The pixels of an image."""

    values: npt.NDArray[Any]
    """`[h, w, samples]`, zero where nothing is stored."""
    stored: npt.NDArray[np.bool_]
    """`[h, w]`: false in sparse tiles."""
    valid: npt.NDArray[np.bool_]
    """`[h, w, samples]`: false where the codec has no valid value (LERC)."""


def read_image(data: bytes, table: TileTable) -> Pixels:
    """Read all pixels of one table (one plane of a planar file)."""
    values = np.zeros((table.height, table.width, table.samples_per_tile), table.dtype)
    stored = np.zeros((table.height, table.width), bool)
    valid = np.ones(values.shape, bool)
    for read in plan_tiles(table, table.extent):
        if read.range is None:
            continue
        if read.range.stop > len(data):
            raise CorruptTiffError(f"{read.range} of {len(data)} bytes")
        payload = data[read.range.start + read.leader : read.range.stop]
        pixels, codec_valid = decode_tile(payload, table, read.stored_rows, read.image_rows, read.image_cols)
        values[read.target.slices] = pixels[read.source.slices]
        stored[read.target.slices] = True
        if codec_valid is not None:
            by_sample = codec_valid if codec_valid.ndim == 3 else codec_valid[:, :, None]
            valid[read.target.slices] = by_sample[read.source.slices]
    return Pixels(values, stored, valid)


def read_band(data: bytes, header: CogHeader, index: int) -> Pixels:
    """Read one band `[h, w, 1]` of a file, by the metadata that a Collection stores."""
    table = header.band(index).image
    found = read_image(data, table)
    if table.samples_per_tile == 1:
        return found
    one = slice(index, index + 1)
    return Pixels(found.values[:, :, one], found.stored, found.valid[:, :, one])


def read_bands(data: bytes) -> Pixels:
    """Read all bands `[h, w, count]` of a file."""
    header = header_of(data)
    if header.image.width * header.image.height > MOST_PIXELS:
        raise UnsupportedTiffError("too large for a test to hold whole")
    if header.image.planar_configuration == 1:
        return read_image(data, header.image)
    planes = [read_band(data, header, i) for i in range(header.count)]
    values = np.concatenate([plane.values for plane in planes], axis=-1)
    stored = np.logical_and.reduce([plane.stored for plane in planes])
    return Pixels(values, stored, np.concatenate([plane.valid for plane in planes], axis=-1))


def bytes_of(path: str | Path) -> bytes:
    """The file's bytes."""
    return Path(path).read_bytes()
