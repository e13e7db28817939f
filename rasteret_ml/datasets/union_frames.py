"""Frames of an `|` on native grids: the left side's pixels, and the right's beyond them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.aois.places import Frame
from rasteret_ml.geo.crs import crs_text, transform_geometries
from rasteret_ml.geo.region import clipped, polygonal_each, union_of

__all__ = ["cut_frames", "frames_beyond"]

Geometries = npt.NDArray[np.object_]


def cut_frames(frames: Sequence[Frame], index: gpd.GeoDataFrame) -> list[Frame]:
    """Frames cut to what an index covers, each to its own part of it; those of which nothing is left are none."""
    shapes, crs = np.asarray(index.geometry, dtype=object), crs_text(index.crs)
    return _remade(frames, lambda frame: clipped(frame.shapes, _region(shapes, crs, frame)), least=0)


def frames_beyond(frames: Sequence[Frame], first: Sequence[Frame]) -> list[Frame]:
    """What frames cover that others do not.

    What is narrower than two pixels is left out: edges of the others, moved to another CRS, leave such slivers.
    """

    def rest(frame: Frame) -> Geometries:
        shapes = frame.shapes
        for other in first:
            shapes = polygonal_each(shapely.difference(shapes, _region(other.shapes, other.crs, frame)))
        return shapes

    return _remade(frames, rest, least=1)


def _region(shapes: Geometries, crs: str, frame: Frame) -> BaseGeometry:
    """What shapes cover, in a frame's CRS."""
    return union_of(transform_geometries(shapes, crs, frame.crs, near=tuple(shapely.total_bounds(frame.shapes))))


def _remade(frames: Sequence[Frame], of: Callable[[Frame], Geometries], least: float) -> list[Frame]:
    """Frames with other shapes, of those that a box of `least` pixels to each side fits into."""
    kept = []
    for frame in frames:
        shapes = of(frame)
        there = shapely.area(shapely.buffer(shapes, -least * min(frame.res)) if least else shapes) > 0
        if there.any():
            kept.append(replace(frame, shapes=shapes[there]))
    return kept
