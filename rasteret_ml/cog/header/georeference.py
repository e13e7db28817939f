"""GeoTIFF tags to a transform and a CRS (OGC 19-008r4)."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tifffile
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, epsg_code, pyproj_crs

__all__ = ["GeoTags", "read_crs", "read_transform"]

_MODEL_TYPE, _RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1024, 1025, 2048, 3072
_LINEAR_UNITS, _METRE = 3076, 9001
_OVERRULING = {3073, 3074, 4096}
"""Keys whose presence changes what a code means: a citation, a projection of its own, a vertical CRS."""
_PIXEL_IS_POINT = 2
_NOISE = 1e-3
"""In pixels."""
_EPSG_CODES = range(1024, 32767)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeoTags:
    """The georeferencing tags of an image, as stored."""

    pixel_scale: tuple[float, ...] = ()
    """Tag 33550: (x, y, z) size of a pixel."""
    tiepoint: tuple[float, ...] = ()
    """Tag 33922: groups of (i, j, k, x, y, z)."""
    transformation: tuple[float, ...] = ()
    """Tag 34264: a 4 x 4 matrix, row-major."""
    directory: tuple[int, ...] = ()
    """Tag 34735: the GeoKey directory."""
    doubles: tuple[float, ...] = ()
    """Tag 34736."""
    ascii: str = ""
    """Tag 34737."""

    def short_key(self, key: int) -> int | None:
        """The value of a GeoKey that is stored in the directory itself."""
        for i in range(4, len(self.directory) - 3, 4):
            code, location, _, value = self.directory[i : i + 4]
            if code == key and location == 0:
                return value
        return None


def read_transform(tags: GeoTags) -> Affine | None:
    """The affine of pixel corners (PixelIsPoint moved by half a pixel), None where there is none.

    As GDAL: pixel scale with the first tiepoint before ModelTransformation; ground control points alone
    (several tiepoints, no scale) are no transform; a negative y scale is taken as positive.
    """
    if len(tags.pixel_scale) >= 2 and len(tags.tiepoint) >= 6 and tags.pixel_scale[0] != 0:
        scale_x, scale_y = tags.pixel_scale[0], abs(tags.pixel_scale[1])
        i, j, _, x, y, _ = tags.tiepoint[:6]
        transform = Affine(scale_x, 0.0, x - i * scale_x, 0.0, -scale_y, y + j * scale_y)
    elif len(tags.transformation) == 16:
        m = tags.transformation
        transform = Affine(m[0], m[1], m[3], m[4], m[5], m[7])
    else:
        return None
    if not _tells_pixels_apart(transform):
        return None
    if tags.short_key(_RASTER_TYPE) == _PIXEL_IS_POINT:
        transform = transform @ Affine.translation(-0.5, -0.5)
    return transform


def _tells_pixels_apart(transform: Affine) -> bool:
    """Whether double precision finds pixels back from their coordinates, to a thousandth."""
    a, b, c, d, e, f = tuple(transform)[:6]  # plain numbers: an Affine for each step is slow
    determinant = a * e - b * d
    if determinant == 0:
        return False
    scale = 1.0 / determinant
    ia, ib, id_, ie = e * scale, -b * scale, -d * scale, a * scale
    ic, if_ = -c * ia - f * ib, -c * id_ - f * ie
    for pixel in (0.0, 1.0, 1e5):
        x, y = pixel * a + pixel * b + c, pixel * d + pixel * e + f
        column, row = x * ia + y * ib + ic, x * id_ + y * ie + if_
        if not (abs(column - pixel) < _NOISE and abs(row - pixel) < _NOISE):  # false for NaN
            return False
    return True


def read_crs(tags: GeoTags) -> str | None:
    """The CRS text, None where the file names none that can be understood.

    A file with a plain EPSG code is read here; anything else (user-defined parameters, citations) goes
    through GDAL, on a one-pixel TIFF that carries the same keys.
    """
    if len(tags.directory) < 4:
        return None
    code = _plain_code(tags)
    if code is not None:
        try:
            return crs_text(code)
        except UsageError:
            pass
    return _gdal_crs(tags.directory, tags.doubles, tags.ascii)


def _plain_code(tags: GeoTags) -> int | None:
    """The EPSG code of a file that states nothing which overrules it."""
    if any(word in tags.ascii for word in ("ESRI PE", "IMAGINE", "Units")):
        return None
    keys = {tags.directory[i] for i in range(4, len(tags.directory) - 3, 4)}
    projected, geographic = tags.short_key(_PROJECTED), tags.short_key(_GEOGRAPHIC)
    if keys & _OVERRULING:
        return None
    if projected in _EPSG_CODES:
        unit = tags.short_key(_LINEAR_UNITS)
        plain = unit in (None, _METRE) and geographic in (None, _base(projected)) and _is_metric(projected)
        return projected if plain else None
    plain = projected is None and tags.short_key(_MODEL_TYPE) in (None, 2) and _LINEAR_UNITS not in keys
    return geographic if plain and geographic in _EPSG_CODES else None


@functools.lru_cache(maxsize=256)
def _base(code: int | None) -> int | None:
    """The geographic CRS that a projected one is built on."""
    try:
        return epsg_code(crs_text(pyproj_crs(f"EPSG:{code}").geodetic_crs))
    except UsageError:
        return None


@functools.lru_cache(maxsize=256)
def _is_metric(code: int | None) -> bool:
    try:
        axes = pyproj_crs(f"EPSG:{code}").axis_info
    except UsageError:
        return False
    return bool(axes) and all(axis.unit_conversion_factor == 1.0 for axis in axes)


@functools.lru_cache(maxsize=64)
def _gdal_crs(directory: Sequence[int], doubles: Sequence[float], ascii_params: str) -> str | None:
    extra = [(34735, "H", len(directory), tuple(directory), False)]
    if doubles:
        extra.append((34736, "d", len(doubles), tuple(doubles), False))  # type: ignore[arg-type]
    if ascii_params:
        extra.append((34737, "s", 0, ascii_params.encode("ascii", "replace").decode(), False))  # type: ignore[arg-type]
    stub = io.BytesIO()
    tifffile.imwrite(stub, np.zeros((1, 1), np.uint8), extratags=extra, metadata=None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with MemoryFile(stub.getvalue()) as memory, memory.open() as dataset:
                return crs_text(dataset.crs.to_wkt()) if dataset.crs else None
    except (RasterioError, UsageError):
        return None
