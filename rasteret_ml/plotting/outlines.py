"""Boolean masks and polygons as vertices: exact to the pixel's edge, no drawing yet."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from matplotlib.path import Path

__all__ = ["mask_edges", "mask_path", "polygon_paths"]


def mask_path(mask: npt.NDArray[np.bool_]) -> Path:
    """One path of rectangles that together cover exactly the True pixels of `[H, W]`, as `imshow` places them.

    Pixel (row, col) spans col - 0.5 .. col + 0.5 and row - 0.5 .. row + 0.5. Equal runs of consecutive rows are one
    rectangle.
    """
    rows, starts, stops = _runs(mask)
    order = np.lexsort((rows, stops, starts))
    rows, starts, stops = rows[order], starts[order], stops[order]
    new = np.ones(len(rows), bool)
    new[1:] = (np.diff(rows) != 1) | (np.diff(starts) != 0) | (np.diff(stops) != 0)
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(rows)) - 1 if len(first) else first
    top, bottom, left, right = rows[first], rows[last] + 1, starts[first], stops[first]
    corners = np.stack([left, top, right, top, right, bottom, left, bottom, left, top], axis=1).reshape(-1, 2) - 0.5
    codes = np.tile(np.array([Path.MOVETO, *(Path.LINETO,) * 3, Path.CLOSEPOLY], Path.code_type), len(first))
    return Path(corners.reshape(-1, 2), codes)


def mask_edges(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The lines between True and False pixels of `[H, W]`, as segments `[N, 2, 2]` of (col, row) as `imshow` has them.

    The picture's border is no edge: what lies beyond it is not known.
    """
    rows, starts, stops = _runs(mask[1:] != mask[:-1])
    lying = np.stack([starts, rows + 1, stops, rows + 1], axis=1).reshape(-1, 2, 2)
    cols, starts, stops = _runs((mask[:, 1:] != mask[:, :-1]).T)
    standing = np.stack([cols + 1, starts, cols + 1, stops], axis=1).reshape(-1, 2, 2)
    return np.concatenate([lying, standing]) - 0.5


def polygon_paths(geometries: npt.NDArray[np.object_]) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """A path for each geometry `[N]` that has an area, holes left open, and the geometry that each belongs to."""
    parts, part_of = shapely.get_parts(geometries, return_index=True)
    polygons = np.flatnonzero(shapely.get_type_id(parts) == shapely.GeometryType.POLYGON)
    # Opposite turns of shell and holes: what winds round zero times is not filled.
    rings, ring_of = shapely.get_rings(shapely.orient_polygons(parts[polygons]), return_index=True)
    xy, vertex_of = shapely.get_coordinates(rings, return_index=True)
    edges = np.flatnonzero(np.diff(vertex_of)) + 1
    codes = np.full(len(xy), Path.LINETO, Path.code_type)
    codes[np.append(edges - 1, len(xy) - 1)[: len(rings)]] = Path.CLOSEPOLY
    codes[np.insert(edges, 0, 0)[: len(rings)]] = Path.MOVETO
    owner = part_of[polygons][ring_of][vertex_of]
    owners, begins = np.unique(owner, return_index=True)
    ends = np.append(begins, len(xy))[1:]
    paths = [Path(xy[a:b], codes[a:b]) for a, b in zip(begins, ends, strict=True)]
    return paths, np.asarray(owners, np.int64)


def _runs(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """(row, start, stop) of every run of True along the rows."""
    padded = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    return rows, starts, np.nonzero(steps == -1)[1]
