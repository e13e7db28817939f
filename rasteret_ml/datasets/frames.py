"""The CRSs and pixels that chips lie on, for samplers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import geopandas as gpd
import numpy as np
import shapely

from rasteret_ml.aois.places import Frame
from rasteret_ml.geo.crs import crs_text, same_crs, transform_geometries
from rasteret_ml.geo.region import clipped, union_of
from rasteret_ml.scenes.facts import SceneFacts, pixel_sizes

__all__ = ["narrowed_frames", "native_frames"]


def native_frames(index: gpd.GeoDataFrame, facts: SceneFacts) -> list[Frame]:
    """What the scenes of each CRS and pixel size cover, and the first one's pixels, in the records' order."""
    positions = np.searchsorted(facts.rows, index["rid"].to_numpy().astype(np.int64))
    shapes = np.asarray(index.geometry, dtype=object)
    sizes = np.round(np.log(pixel_sizes(facts.transforms[positions])), 6)
    kinds = np.column_stack([facts.crs_codes[positions], sizes])
    _, first, kind = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    frames = []
    for number in np.argsort(positions[first], kind="stable"):
        here = kind.reshape(-1) == number
        grid = facts.grid(int(positions[here].min()))
        crs = str(grid.crs)
        moved = transform_geometries(shapes[here], crs_text(index.crs), crs)
        origin = float(grid.transform.c), float(grid.transform.f)
        frames.append(Frame(crs=crs, res=grid.res, origin=origin, shapes=moved))
    return frames


def narrowed_frames(frames: Sequence[Frame], index: gpd.GeoDataFrame) -> list[Frame]:
    """Frames cut to what another index covers, such as that of an `&`; those of which nothing is left are none."""
    shapes, crs = np.asarray(index.geometry, dtype=object), crs_text(index.crs)
    if len(frames) == 1 and same_crs(frames[0].crs, crs):
        return [replace(frames[0], shapes=shapes)]
    kept = []
    for frame in frames:
        covered = union_of(transform_geometries(shapes, crs, frame.crs, near=tuple(shapely.total_bounds(frame.shapes))))
        cut = clipped(frame.shapes, covered)
        cut = cut[shapely.area(cut) > 0]
        if len(cut):
            kept.append(replace(frame, shapes=cut))
    return kept
