"""Minimal datasets for samplers, and shapes to sample."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import pandas as pd
import shapely

from rasteret_ml.geo.crs import transform_geometries
from rasteret_ml.samplers.aoi.target_grids import TargetGrid

CRS = "EPSG:32633"
SQUARE = shapely.box(0, 0, 10000, 10000)
L_SHAPE = shapely.Polygon([(0, 0), (9000, 0), (9000, 800), (800, 800), (800, 9000), (0, 9000)])
HOLED = shapely.box(1000, 1000, 6000, 6000) - shapely.box(2000, 1500, 5500, 5600)
PARTS = shapely.MultiPolygon([shapely.box(7000, 7000, 7400, 9500), shapely.box(2000, 8000, 5000, 8100)])


class Plane:
    """Boxes with a time span, on one grid."""

    def __init__(self, *shapes, crs=CRS, res=(10.0, 10.0), first="2023-01-01", last="2023-12-31"):
        times = pd.IntervalIndex.from_arrays(
            pd.DatetimeIndex([first] * len(shapes)), pd.DatetimeIndex([last] * len(shapes)), "both", name="datetime"
        )
        self.index = gpd.GeoDataFrame(geometry=list(shapes), crs=crs, index=times)
        self.crs, self.res = self.index.crs, res

    @property
    def bounds(self):
        xmin, ymin, xmax, ymax = self.index.total_bounds
        times = self.index.index
        x, y = slice(xmin, xmax, self.res[0]), slice(ymin, ymax, self.res[1])
        return x, y, slice(times.left.min(), times.right.max(), 1)


class TwoZones(Plane):
    """Scenes in UTM zones 32 and 33 on both sides of 12 degrees east, which overlap by some kilometres."""

    west = shapely.box(680000, 5000000, 740000, 5030000)
    east = shapely.box(260000, 5000000, 320000, 5030000)

    def __init__(self):
        moved = transform_geometries(np.array([self.west], dtype=object), "EPSG:32632", CRS)[0]
        super().__init__(moved, self.east)

    def target_grids(self):
        one = np.array([self.west], dtype=object)
        two = np.array([self.east], dtype=object)
        return [
            TargetGrid(crs="EPSG:32632", res=(10.0, 10.0), origin=(680000.0, 5030000.0), shapes=one),
            TargetGrid(crs=CRS, res=(20.0, 20.0), origin=(260000.0, 5030000.0), shapes=two),
        ]


def box_of(aoi):
    x, y, _ = aoi
    return shapely.box(x.start, y.start, x.stop, y.stop)


def boxes(aois):
    return np.array([box_of(aoi) for aoi in aois], dtype=object)


def centres(aois):
    return np.array([((x.start + x.stop) / 2, (y.start + y.stop) / 2) for x, y, _ in aois])


def chi_squared(counts, expected):
    """Return the statistic and the 99.99 % quantile of its distribution (Wilson and Hilferty 1931)."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    free = len(counts) - 1
    spread = 2 / (9 * free)
    return ((counts - expected) ** 2 / expected).sum(), free * (1 - spread + 3.719 * np.sqrt(spread)) ** 3
