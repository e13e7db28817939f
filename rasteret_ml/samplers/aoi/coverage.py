"""Where chips may come from: AOIs cut to what a dataset covers, in the CRS of each of its frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyproj
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.fingerprint import digest
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.crs import full_turn, pyproj_crs, same_crs, transform_bounds, transform_geometries
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.regions import clip_polygons, map_in_threads, polygonal_each, union_polygons
from rasteret_ml.samplers.aoi.aoi_columns import named_rows
from rasteret_ml.samplers.aoi.aoi_table import AOITable
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of

__all__ = ["AOICoverage", "Outside", "coverage_digest", "coverage_from", "ground_area", "ground_scale", "without"]

Outside = Literal["raise", "drop"]
"""What becomes of an AOI that no chip can come from."""

_EARTH_RADIUS = 6_371_008.8
"""Mean radius in metres (Moritz 2000)."""
_FEW = 1000
_STRAIGHT = (0.01, 1000.0)
"""Extents in degrees and metres below which, among many, an AOI's edges are taken to stay straight in any CRS (a
kilometre bows by L^2 tan(latitude) / 8R, some centimetres)."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AOICoverage:
    """Pairs of an AOI and a frame that it meets: frame by frame, the AOIs in the table's order."""

    frames: tuple[TargetGrid, ...]
    """All frames of the dataset."""
    coverages: tuple[BaseGeometry, ...]
    """All that each frame covers; of longitudes, also a turn away."""
    table: AOITable | None
    """The AOIs; None = no AOIs, but everywhere."""
    shapes: npt.NDArray[np.object_]
    """Each AOI in its frame's CRS, valid, cut to the coverage, and shrunk where that was asked for `[P]`."""
    whole: npt.NDArray[np.object_]
    """The same as it was, neither cut nor shrunk; None where there was no AOI `[P]`."""
    wkb: npt.NDArray[np.object_]
    """`whole` as WKB; None where there was no AOI `[P]`."""
    frame: npt.NDArray[np.int64]
    """Number of the frame of each `[P]`."""
    aoi: npt.NDArray[np.int64]
    """Position in `table` of each; -1 = no AOI `[P]`."""
    rows: npt.NDArray[np.int64]
    """Row of the AOI's source table of each; -1 = no AOI `[P]`."""

    def __len__(self) -> int:
        return len(self.shapes)

    def kept(self, chosen: npt.NDArray[Any]) -> AOICoverage:
        """Some of the places, by a mask or their numbers."""
        names = [f.name for f in fields(self) if f.name not in ("frames", "coverages", "table")]
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    @property
    def res(self) -> npt.NDArray[np.float64]:
        """Pixel size (x, y) of each `[P, 2]`."""
        return np.array([frame.res for frame in self.frames], dtype=np.float64)[self.frame]


def coverage_from(
    dataset: Any, aois: Any, aois_crs: Any = None, *, inset: float = 0.0, outside: Outside = "raise", area: bool = True
) -> AOICoverage:
    """The places of `aois`, or everywhere, a place a frame, where `aois` is None.

    Args:
        dataset: Any TorchGeo dataset.
        aois: What `AOITable.of` takes.
        aois_crs: CRS of `aois` where they do not say it.
        inset: By how much polygons are shrunk, in CRS units.
        outside: Whether AOIs that no chip can come from are an error, or dropped (logged).
        area: Whether points and lines are refused.

    Raises:
        GeometryError: an AOI without an area, one that does not meet the dataset, or one that is gone when shrunk;
            rows are named.
    """
    if outside not in ("raise", "drop"):
        raise UsageError(f"outside is 'raise' or 'drop', not {outside!r}.")
    if not (inset >= 0 and np.isfinite(inset)):
        raise UsageError(f"edge is a distance of at least 0 in CRS units, not {inset!r}.")
    frames = tuple(target_grids_of(dataset))
    coverages = [union_polygons(frame.shapes) for frame in frames]
    if aois is None:
        return _everywhere(frames, coverages, inset)
    table = AOITable.of(aois, crs=aois_crs)
    if area:
        _need_area(table)
    covered = [
        shapely.union_all(repeat_turns([coverage], full_turn(frame.crs)))
        for frame, coverage in zip(frames, coverages, strict=True)
    ]
    found = [
        _in_frame(table, frame, bounds.bounds, len(frames) > 1) for frame, bounds in zip(frames, coverages, strict=True)
    ]
    aoi = np.concatenate([at for at, _ in found])
    whole = np.concatenate([shapes for _, shapes in found])
    frame = np.repeat(np.arange(len(frames)), [len(at) for at, _ in found])
    places = AOICoverage(
        frames=frames,
        coverages=tuple(covered),
        table=table,
        shapes=_shrunk(whole, inset),
        whole=whole,
        wkb=np.asarray(shapely.to_wkb(whole), dtype=object),
        frame=frame,
        aoi=aoi,
        rows=table.rows[aoi],
    )
    absent = np.setdiff1d(np.arange(len(table)), aoi)
    gone = shapely.is_empty(places.shapes) & ~shapely.is_empty(whole)
    if gone.any():
        places = without(
            places,
            gone,
            outside,
            lambda rows: f"Nothing is left of AOIs {rows} when inset={inset} is taken off; take less",
        )
    cut = _cut(places)
    missed = shapely.is_empty(cut) | ((shapely.get_dimensions(places.whole) == 2) & ~(shapely.area(cut) > 0))
    return _met(replace(places, shapes=cut), missed, absent, outside, coverages)


def _met(
    places: AOICoverage,
    missed: npt.NDArray[np.bool_],
    absent: npt.NDArray[np.int64],
    outside: Outside,
    coverages: Sequence[BaseGeometry],
) -> AOICoverage:
    """Without the AOIs that meet no frame, `absent` those that came nowhere near one."""
    assert places.table is not None
    table = places.table
    lost = np.union1d(np.setdiff1d(places.aoi[missed], places.aoi[~missed]), absent)
    if len(lost):
        first, crs = table.geometries[lost[0]], table.crs
        here = np.flatnonzero(missed & (places.aoi == lost[0]))
        if len(here) and not shapely.is_empty(places.whole[here[0]]):
            first, crs = places.whole[here[0]], places.frames[places.frame[here[0]]].crs
        cover = "; ".join(
            f"{tuple(round(v, 3) for v in coverage.bounds)} in {frame.crs}"
            for frame, coverage in zip(places.frames, coverages, strict=True)
        )
        rows = table.rows[lost]
        others = "" if len(rows) == 1 else f", as {len(rows) - 1} more do: {named_rows(rows)}"
        text = (
            f"AOI {rows[0]} (bounds {tuple(round(v, 3) for v in first.bounds)} in {crs}) lies outside every scene"
            f"{others}; they cover {cover}."
        )
        if outside == "raise" or len(lost) == len(table):
            raise GeometryError(f"{text} Drop it (outside='drop'), or check its CRS.")
        _log.warning("%d AOIs lie outside every scene and are dropped: %s", len(rows), named_rows(rows))
    return places.kept(~missed)


def without(
    places: AOICoverage,
    bad: npt.NDArray[np.bool_],
    outside: Outside,
    why: Callable[[str], str],
    error: type[UsageError] = GeometryError,
) -> AOICoverage:
    """The places that are not `bad` `[P]`.

    Raises:
        GeometryError: (or `error`) an AOI is left without a place, and `outside` is not "drop"; or all are.
    """
    lost = np.setdiff1d(places.rows[bad], places.rows[~bad])
    if len(lost):
        text = why(named_rows(lost))
        if outside == "raise" or bad.all():
            raise error(f"{text}." if places.table is None else f"{text}, or drop them (outside='drop').")
        _log.warning("%s. %d AOIs are dropped.", text, len(lost))
    return places.kept(~bad)


def coverage_digest(places: AOICoverage) -> str:
    """Tells places apart: by frames, AOIs and outlines, to a thousandth of a pixel."""
    coordinates, owner = shapely.get_coordinates(places.shapes, return_index=True)
    frames = [(frame.crs, frame.res, frame.origin) for frame in places.frames]
    return digest(frames, places.frame, places.rows, owner, np.round(coordinates / places.res[owner], 3))


def ground_area(places: AOICoverage, shapes: npt.NDArray[np.object_]) -> npt.NDArray[np.float64]:
    """Areas of polygons, one a place `[P]`, in square metres, whatever the units of their CRSs."""
    areas: npt.NDArray[np.float64] = shapely.area(shapes) * ground_scale(places, shapes)
    return areas


def ground_scale(places: AOICoverage, shapes: npt.NDArray[np.object_]) -> npt.NDArray[np.float64]:
    """Square metres to a square unit of the CRS, at the centroids of geometries, one a place `[P]`.

    A degree is as long as it is there on a sphere; a projected unit is as long as the CRS says.
    """
    scale = np.ones(len(places))
    for number, frame in enumerate(places.frames):
        here = places.frame == number
        turn = full_turn(frame.crs)
        if turn is None:
            axes = pyproj_crs(frame.crs).axis_info
            scale[here] = float(axes[0].unit_conversion_factor) ** 2 if axes else 1.0
        else:
            unit = 2 * np.pi / turn
            latitude = np.nan_to_num(shapely.get_y(shapely.centroid(shapes[here]))) * unit
            scale[here] = np.cos(latitude) * (unit * _EARTH_RADIUS) ** 2
    return scale


def _everywhere(frames: tuple[TargetGrid, ...], coverages: list[BaseGeometry], inset: float) -> AOICoverage:
    shapes = _shrunk(object_array(coverages), inset)
    kept = ~shapely.is_empty(shapes)
    if not kept.any():
        raise GeometryError(f"Nothing is left of the scenes when inset={inset} is taken off; take less.")
    none = np.full(len(frames), -1, dtype=np.int64)
    places = AOICoverage(
        frames=frames,
        coverages=tuple(coverages),
        table=None,
        shapes=shapes,
        whole=object_array([None] * len(frames)),
        wkb=object_array([None] * len(frames)),
        frame=np.arange(len(frames)),
        aoi=none,
        rows=none,
    )
    return places if kept.all() else places.kept(kept)


def _need_area(table: AOITable) -> None:
    flat = np.flatnonzero(~np.isin(shapely.get_type_id(table.geometries), (3, 6)))
    if len(flat):
        kind = table.geometries[flat[0]].geom_type
        raise GeometryError(
            f"AOIs {named_rows(table.rows[flat])} have no area (the first is a {kind}); a Polygon or MultiPolygon is "
            "needed. Give points and lines an area first, for example with `.buffer(distance)`, or take "
            "EachAOISampler with a size."
        )


def _in_frame(
    table: AOITable, frame: TargetGrid, near: tuple[float, float, float, float], one_of_many: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.object_]]:
    """AOIs that may meet a frame with these bounds, and their geometries in its CRS."""
    at = np.arange(len(table))
    if one_of_many:
        at = np.flatnonzero(_may_meet(shapely.bounds(table.geometries), table.crs, frame.crs, near))
    if not len(at):
        return at, np.zeros(0, dtype=object)
    given = table.geometries[at]
    extents = shapely.bounds(given)
    small = (
        np.hypot(extents[:, 2] - extents[:, 0], extents[:, 3] - extents[:, 1]) < _STRAIGHT[full_turn(table.crs) is None]
    )
    if len(at) <= _FEW:
        small[:] = False
    shapes = np.empty(len(at), dtype=object)
    for chosen, segments in ((small, 1), (~small, 32)):
        if chosen.any():
            shapes[chosen] = transform_geometries(given[chosen], table.crs, frame.crs, near=near, segments=segments)
    if not same_crs(table.crs, frame.crs):
        areal = shapely.get_dimensions(shapes) == 2
        shapes[areal] = polygonal_each(shapes[areal])
    return at, shapes


def _may_meet(
    boxes: npt.NDArray[np.float64], own: str, crs: str, near: tuple[float, float, float, float]
) -> npt.NDArray[np.bool_]:
    """Which boxes in `own` may meet bounds in `crs`; True where there is no telling."""
    try:
        xmin, ymin, xmax, ymax = transform_bounds(near, crs, own)
    except pyproj.exceptions.ProjError:
        return np.ones(len(boxes), bool)
    turn = full_turn(own)
    if xmin > xmax and turn is not None:
        xmax += turn
    if not np.isfinite([xmin, ymin, xmax, ymax]).all():
        return np.ones(len(boxes), bool)
    rim = 0.02 * max(xmax - xmin, ymax - ymin)
    met = np.zeros(len(boxes), bool)
    for shift in (0.0,) if turn is None else (0.0, -turn, turn):
        met |= (boxes[:, 0] + shift <= xmax + rim) & (boxes[:, 2] + shift >= xmin - rim)
    met &= (boxes[:, 1] <= ymax + rim) & (boxes[:, 3] >= ymin - rim)
    return met


def _shrunk(shapes: npt.NDArray[np.object_], inset: float) -> npt.NDArray[np.object_]:
    # Mitred, so that no chord cuts an arc: nothing is left nearer than `inset`.
    if not inset:
        return shapes
    return polygonal_each(map_in_threads(lambda part: shapely.buffer(part, -inset, join_style="mitre"), shapes))


def _cut(places: AOICoverage) -> npt.NDArray[np.object_]:
    """Shapes cut to the coverage of their frames."""
    out = places.shapes.copy()
    areal = np.isin(shapely.get_type_id(out), (3, 6))
    for number, covered in enumerate(places.coverages):
        here = places.frame == number
        out[here & areal] = clip_polygons(out[here & areal], covered)
        out[here & ~areal] = shapely.intersection(out[here & ~areal], covered)
    return out
