"""What a box leaves of very many polygons when it is swept along their edges; GEOS by whole arrays, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import shapely

__all__ = ["in_threads", "without_swept"]

Geometries = npt.NDArray[np.object_]

_EACH = 2048
"""Geometries in one piece of work: enough that Python's share of it is nothing."""
_HULLS = 1 << 17
"""Swept edges in one piece of work."""


def in_threads(function: Callable[[Geometries], Geometries], geometries: Geometries) -> Geometries:
    """A function of geometries `[N]`, each for itself, by parts of them at a time (shapely works without the GIL)."""
    count = -(-len(geometries) // _EACH)
    if count < 2:
        return function(geometries)
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        return np.concatenate(list(pool.map(function, np.array_split(geometries, count))))


def without_swept(parts: Geometries, corners: npt.NDArray[np.float64]) -> Geometries:
    """Each polygon `[N]` without what a convex shape with these `corners` `[K, 2]` covers, moved along its edges.

    Polygons of like numbers of edges are done together, so that the table of their edges is full.
    """
    size = shapely.get_num_coordinates(parts)
    order = np.argsort(size, kind="stable")
    out = parts.copy()
    start, pieces = 0, []
    while start < len(parts):
        # The last one of a piece has the most edges, and with it the table is as wide.
        rows = max(1, min(_EACH, _HULLS // int(size[order[min(start + _EACH, len(parts)) - 1]])))
        pieces.append(order[start : start + rows])
        start += rows
    with ThreadPoolExecutor(min(len(pieces), os.cpu_count() or 1) or 1) as pool:
        for piece, left in zip(pieces, pool.map(lambda p: _left_of(parts[p], corners), pieces), strict=True):
            out[piece] = left
    return out


def _left_of(parts: Geometries, corners: npt.NDArray[np.float64]) -> Geometries:
    rings, part = shapely.get_rings(parts, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    first = np.flatnonzero(ring[1:] == ring[:-1])
    ends = np.concatenate([xy[first, None] + corners, xy[first + 1, None] + corners], axis=1)
    owner = part[ring[first]]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    table = np.full((len(parts), int(np.max(place)) + 1), None, dtype=object)
    table[owner, place] = shapely.convex_hull(shapely.linestrings(ends))
    left: Geometries = shapely.difference(parts, shapely.union_all(table, axis=1))
    return left
