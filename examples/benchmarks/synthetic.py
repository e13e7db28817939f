"""Collections of many records, made as Arrow tables; their files need not exist."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from pyproj import Transformer

from rasteret_ml.collection.schema import BAND_STRUCT, METADATA_SUFFIX, bbox_array, geo_metadata
from rasteret_ml.collection.write import write_collection

EPSG = 32633
ORIGIN = (220_000.0, 5_600_000.0)
TILE = 512
_ASSET = pa.struct([("href", pa.string()), ("band_index", pa.int32())])


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Records at a square array of locations in a UTM zone, with several dates each and pixels of 1 m."""

    records: int
    """Number of records."""
    bands: int
    """Number of bands."""
    side: int
    """Number of rows, and of columns, of tiles of a record."""
    dates: int = 10
    """Number of records of a location."""

    @property
    def locations(self) -> int:
        """Number of locations."""
        return -(-self.records // self.dates)

    @property
    def across(self) -> int:
        """Number of locations in a row."""
        return int(np.ceil(np.sqrt(self.locations)))

    @property
    def pixels(self) -> int:
        """Rows and columns of a record."""
        return self.side * TILE

    def corners(self) -> Any:
        """Return the upper left corner (x, y) of each record `[N, 2]` in the CRS."""
        row, column = np.divmod(np.arange(self.records) % self.locations, self.across)
        x = ORIGIN[0] + column * float(self.pixels)
        y = ORIGIN[1] - row * float(self.pixels)
        return np.column_stack([x, y])

    def times(self) -> Any:
        """Return the time of each record."""
        day = np.arange(self.records) // self.locations
        return np.datetime64("2023-01-01", "us") + day * np.timedelta64(5, "D")

    def write(self, path: Path) -> Path:
        """Write the Collection if it does not exist."""
        if not path.exists():
            write_collection(self.table(), path)
        return path

    def table(self) -> pa.Table:
        """Return the table of the Collection, with the columns that `build` writes."""
        count, corners = self.records, self.corners()
        outlines = shapely.box(corners[:, 0], corners[:, 1] - self.pixels, corners[:, 0] + self.pixels, corners[:, 1])
        outlines = shapely.transform(outlines, _to_lonlat)
        names = [f"B{i + 1}" for i in range(self.bands)]
        numbers = [f"{i:07d}" for i in range(count)]
        hrefs = [[f"https://example.org/scenes/S{n}_{band}.tif" for n in numbers] for band in names]
        band_index = pa.nulls(count, pa.int32())
        assets = [pa.StructArray.from_arrays([pa.array(h), band_index], fields=list(_ASSET)) for h in hrefs]
        struct = self._band(corners)
        columns: dict[str, Any] = {
            "id": pa.array([f"S{n}" for n in numbers]),
            "datetime": pa.array(self.times(), pa.timestamp("us")),
            "geometry": pa.array(shapely.to_wkb(outlines), pa.binary()),
            "assets": pa.StructArray.from_arrays(assets, names=names),
            "eo:cloud_cover": pa.array(np.random.default_rng(0).random(count) * 100),
            "proj:epsg": pa.array(np.full(count, EPSG, np.int32)),
            "crs": pa.repeat(f"EPSG:{EPSG}", count),
            **{f"{name}{METADATA_SUFFIX}": struct for name in names},
            "bbox": bbox_array(shapely.bounds(outlines)),
        }
        metadata = {b"name": b"synthetic", b"created": dt.datetime(2023, 1, 1).isoformat().encode()}
        return pa.table(columns).replace_schema_metadata(metadata | dict(geo_metadata({"Polygon"})))

    def _band(self, corners: Any) -> pa.StructArray:
        """Return tile tables with random byte counts in the range of real ones."""
        count, tiles = self.records, self.side**2
        sizes = np.random.default_rng(1).integers(250_000, 420_000, (count, tiles))
        offsets = np.zeros_like(sizes)
        np.cumsum(sizes[:, :-1], axis=1, out=offsets[:, 1:])
        offsets += 4096
        ones = np.ones(count)
        transform = np.column_stack([ones, corners[:, 0], -ones, corners[:, 1]])
        tiepoint = np.column_stack([0 * ones, 0 * ones, 0 * ones, corners, 0 * ones])
        values: dict[str, Any] = {
            "image_width": self.pixels,
            "image_height": self.pixels,
            "tile_width": TILE,
            "tile_height": TILE,
            "dtype": "uint16",
            "transform": _lists(transform),
            "predictor": 2,
            "compression": 8,
            "tile_offsets": _lists(offsets),
            "tile_byte_counts": _lists(sizes),
            "pixel_scale": _lists(np.column_stack([ones, ones, 0 * ones])),
            "tiepoint": _lists(tiepoint),
            "samples_per_pixel": 1,
            "planar_configuration": 1,
            "photometric": 1,
            "big_endian": False,
            "fill_order": 1,
            "striped": False,
            "block_leaders": False,
            "mask_sample": 0,
            "mask_is_alpha": False,
            "file_size": pa.array(offsets[:, -1] + sizes[:, -1]),
        }
        children = [_column(values.get(child.name), child.type, count) for child in BAND_STRUCT]
        return pa.StructArray.from_arrays(children, fields=list(BAND_STRUCT))


def _column(value: Any, kind: pa.DataType, count: int) -> pa.Array:
    if value is None:
        return pa.nulls(count, kind)
    return value.cast(kind) if isinstance(value, pa.Array) else pa.repeat(pa.scalar(value, kind), count)


def _lists(rows: Any) -> pa.ListArray:
    """Return rows as lists of equal length."""
    ends = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.ascontiguousarray(rows).ravel()))


def _to_lonlat(points: Any) -> Any:
    transformer = Transformer.from_crs(EPSG, 4326, always_xy=True)
    return np.column_stack(transformer.transform(points[:, 0], points[:, 1]))
