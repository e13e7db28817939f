"""YCbCr outside JPEG, as libtiff's RGBA interface (and so GDAL) turns it into RGB: bit for bit.

The same fixed-point tables as libtiff's `TIFFYCbCrToRGBInit`, with the reference black and white of full-range
samples (0, 255, 128, 255, 128, 255), which is what files of 8 bits declare.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rasteret_ml.cog.tile_table import TileTable

__all__ = ["chroma_subsampling", "to_rgb", "unpack_units"]

_YCBCR = 6


def chroma_subsampling(table: TileTable) -> tuple[int, int]:
    """Columns and rows of luma for one of chroma: (1, 1) unless the image is YCbCr."""
    return table.ycbcr_subsampling if table.photometric == _YCBCR else (1, 1)


def unpack_units(raw: npt.NDArray[np.uint8], rows: int, width: int, across: int, down: int) -> npt.NDArray[np.uint8]:
    """Data units of subsampled YCbCr (TIFF 6.0, section 21) to `[rows, width, 3]`.

    A unit is `down` x `across` samples of Y, row by row, then one of Cb and one of Cr, which hold for all of them
    (repeated, not interpolated, as GDAL does).
    """
    units_across, units_down = -(-width // across), -(-rows // down)
    units = raw.reshape(units_down, units_across, across * down + 2)
    luma = units[..., :-2].reshape(units_down, units_across, down, across).swapaxes(1, 2)
    out = np.empty((rows, width, 3), np.uint8)
    out[..., 0] = luma.reshape(units_down * down, units_across * across)[:rows, :width]
    out[..., 1:] = units[..., -2:].repeat(down, axis=0)[:rows].repeat(across, axis=1)[:, :width]
    return out


def to_rgb(pixels: npt.NDArray[np.uint8], coefficients: tuple[float, float, float]) -> npt.NDArray[np.uint8]:
    """`[h, w, 3]` of Y, Cb, Cr to red, green, blue; `coefficients` is TIFF tag 529 (YCbCrCoefficients)."""
    red_of_cr, green_of_cr, blue_of_cb, green_of_cb = _tables(coefficients)
    luma, cb, cr = pixels[..., 0].astype(np.int32), pixels[..., 1], pixels[..., 2]
    out = np.empty(pixels.shape, np.uint8)
    for band, shift in enumerate((red_of_cr[cr], (green_of_cb[cb] + green_of_cr[cr]) >> 16, blue_of_cb[cb])):
        out[..., band] = (luma + shift).clip(0, 255)
    return out


@lru_cache(maxsize=8)
def _tables(coefficients: tuple[float, float, float]) -> tuple[npt.NDArray[np.int32], ...]:
    red, green, blue = (np.float32(v) for v in coefficients)
    two, half = np.float32(2), 1 << 15

    def fixed(value: np.float32) -> int:
        return int(float(min(max(value, np.float32(0)), two)) * 65536 + 0.5)

    of_red, of_blue = two - two * red, two - two * blue
    code = np.arange(-128, 128, dtype=np.int64)
    return (
        ((fixed(of_red) * code + half) >> 16).astype(np.int32),
        (-fixed(red * of_red / green) * code).astype(np.int32),
        ((fixed(of_blue) * code + half) >> 16).astype(np.int32),
        (-fixed(blue * of_blue / green) * code + half).astype(np.int32),
    )
