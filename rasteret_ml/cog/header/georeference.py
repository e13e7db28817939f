"""GeoTIFF tags to a transform and a CRS (GeoTIFF 1.1, OGC 19-008r4)."""

from __future__ import annotations

import functools
import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass

from affine import Affine
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import MemoryFile

from rasteret_ml.errors import UsageError
from rasteret_ml.geo.crs import crs_text, epsg_code, pyproj_crs

_MODEL_TYPE, _RASTER_TYPE, _GEOGRAPHIC, _PROJECTED, _LINEAR_UNITS = 1024, 1025, 2048, 3072, 3076
# Keys that change what an EPSG code means: a citation, a custom projection, a vertical CRS.
_OVERRIDING_KEYS = {3073, 3074, 4096}
_GEOGRAPHIC_MODEL, _PIXEL_IS_POINT, _METRE = 2, 2, 9001
_EPSG_CODES = range(1024, 32767)
_TOLERANCE = 1e-3  # Largest error, in pixels, of a coordinate transformed to the CRS and back.


@dataclass(frozen=True, slots=True, kw_only=True)
class GeoTags:
    """The georeferencing tags of an image, as stored."""

    pixel_scale: tuple[float, ...] = ()  #: Tag 33550: (x, y, z) size of a pixel.
    tiepoint: tuple[float, ...] = ()  #: Tag 33922: groups of (i, j, k, x, y, z).
    transformation: tuple[float, ...] = ()  #: Tag 34264: a 4 x 4 matrix, row-major.
    directory: tuple[int, ...] = ()  #: Tag 34735: the GeoKey directory.
    doubles: tuple[float, ...] = ()  #: Tag 34736.
    ascii: str = ""  #: Tag 34737.

    def short_key(self, key: int) -> int | None:
        """Return the value of a GeoKey that is stored in the directory itself, None if there is none."""
        for i in range(4, len(self.directory) - 3, 4):
            code, location, _, value = self.directory[i : i + 4]
            if code == key and location == 0:
                return value
        return None


def read_transform(tags: GeoTags) -> Affine | None:
    """Return the affine of pixel corners (PixelIsPoint is shifted by half a pixel), None if there is none.

    As GDAL: the pixel scale with the first tiepoint takes precedence over ModelTransformation; ground control points
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
    if not _is_invertible(transform):
        return None
    if tags.short_key(_RASTER_TYPE) == _PIXEL_IS_POINT:
        transform = transform @ Affine.translation(-0.5, -0.5)
    return transform


def _is_invertible(transform: Affine) -> bool:
    """Whether pixels are recovered from their coordinates in double precision, to a thousandth."""
    a, b, c, d, e, f = tuple(transform)[:6]  # plain floats: an Affine for each step is slow
    determinant = a * e - b * d
    if determinant == 0:
        return False
    scale = 1.0 / determinant
    ia, ib, id_, ie = e * scale, -b * scale, -d * scale, a * scale
    ic, if_ = -c * ia - f * ib, -c * id_ - f * ie
    for pixel in (0.0, 1.0, 1e5):
        x, y = pixel * a + pixel * b + c, pixel * d + pixel * e + f
        column, row = x * ia + y * ib + ic, x * id_ + y * ie + if_
        if not (abs(column - pixel) < _TOLERANCE and abs(row - pixel) < _TOLERANCE):  # also for NaN
            return False
    return True


def read_crs(tags: GeoTags) -> str | None:
    """Return the CRS text, None if the file declares none or one that is not understood.

    A plain EPSG code is read here. Anything else (custom parameters, citations) is left to GDAL, which reads it from
    a one-pixel TIFF with the same keys.
    """
    if len(tags.directory) < 4:
        return None
    code = _epsg_code(tags)
    if code is not None:
        with suppress(UsageError):
            return crs_text(code)
    return _crs_by_gdal(tags.directory, tags.doubles, tags.ascii)


def _epsg_code(tags: GeoTags) -> int | None:
    """The EPSG code, None if other keys override it."""
    keys = {tags.directory[i] for i in range(4, len(tags.directory) - 3, 4)}
    projected, geographic = tags.short_key(_PROJECTED), tags.short_key(_GEOGRAPHIC)
    if keys & _OVERRIDING_KEYS or any(word in tags.ascii for word in ("ESRI PE", "IMAGINE", "Units")):
        return None
    if projected in _EPSG_CODES:
        unit = tags.short_key(_LINEAR_UNITS)
        is_metric, base = _axes_and_base(projected)
        return projected if is_metric and unit in (None, _METRE) and geographic in (None, base) else None
    plain = (
        projected is None
        and tags.short_key(_MODEL_TYPE) in (None, _GEOGRAPHIC_MODEL)
        and _LINEAR_UNITS not in keys
        and geographic in _EPSG_CODES
    )
    return geographic if plain else None


@functools.lru_cache(maxsize=256)
def _axes_and_base(projected: int) -> tuple[bool, int | None]:
    """Whether all axes are in metres, and the EPSG code of the geographic CRS that this one is based on."""
    try:
        crs = pyproj_crs(f"EPSG:{projected}")
    except UsageError:
        return False, None
    is_metric = bool(crs.axis_info) and all(axis.unit_conversion_factor == 1.0 for axis in crs.axis_info)
    return is_metric, None if crs.geodetic_crs is None else epsg_code(crs_text(crs.geodetic_crs))


@functools.lru_cache(maxsize=64)
def _crs_by_gdal(directory: tuple[int, ...], doubles: tuple[float, ...], ascii_params: str) -> str | None:
    stub = _one_pixel_tiff(directory, doubles, ascii_params.encode("ascii", "replace"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with MemoryFile(stub) as memory, memory.open() as dataset:
                return crs_text(dataset.crs.to_wkt()) if dataset.crs else None
    except (RasterioError, UsageError):
        return None


def _one_pixel_tiff(directory: tuple[int, ...], doubles: tuple[float, ...], ascii_params: bytes) -> bytes:
    """A little-endian TIFF of one 8-bit pixel with these GeoTIFF tags (TIFF 6.0, section 2)."""
    # Width, height, bits, compression, photometric, strip offset (the pixel is a byte of the file's own header),
    # samples, rows per strip and strip byte count: one SHORT each.
    shorts = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 4, 277: 1, 278: 1, 279: 1}
    entries = [(code, 3, 1, struct.pack("<H", value)) for code, value in shorts.items()]
    entries.append((34735, 3, len(directory), struct.pack(f"<{len(directory)}H", *directory)))
    if doubles:
        entries.append((34736, 12, len(doubles), struct.pack(f"<{len(doubles)}d", *doubles)))
    if ascii_params:
        entries.append((34737, 2, len(ascii_params) + 1, ascii_params + b"\0"))
    table = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    values, start = b"", len(table) + 12 * len(entries) + 4
    for code, kind, count, data in entries:
        inline = len(data) <= 4
        table += struct.pack("<HHI", code, kind, count)
        table += data.ljust(4, b"\0") if inline else struct.pack("<I", start + len(values))
        values += b"" if inline else data + bytes(len(data) % 2)
    return table + bytes(4) + values
