"""Where chips may lie: AOIs clipped to what a dataset covers, in the CRS of each of its target grids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import shapely
from shapely.geometry.base import BaseGeometry

from rasteret_ml.errors import GeometryError, UsageError
from rasteret_ml.fingerprint import digest
from rasteret_ml.geo.antimeridian import repeat_turns
from rasteret_ml.geo.crs import full_turn, pyproj_crs, same_crs, transform_bounds, transform_geometries
from rasteret_ml.geo.geometries import object_array
from rasteret_ml.geo.regions import Geometries, Integers, clip_polygons, map_in_threads, polygonal_each, union_polygons
from rasteret_ml.geo.times import Times
from rasteret_ml.samplers.aoi.aoi_table import AOITable, format_rows, is_polygon, parse_weights
from rasteret_ml.samplers.aoi.target_grids import TargetGrid, target_grids_of

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Bounds = tuple[float, float, float, float]

Outside = Literal["raise", "drop"]  #: What to do with an AOI that no chip can be drawn from.
#: Relative frequency of each AOI: a column, numbers `[N]`, or a callable that returns them for the table's rows.
Weight = str | Sequence[float] | npt.NDArray[Any] | Callable[[gpd.GeoDataFrame], Any]
#: Classes to draw equally often: True = the table's labels, a column, or values `[N]`.
Balance = bool | str | Sequence[Any] | npt.NDArray[Any]

_EARTH_RADIUS = 6_371_008.8  # Mean radius in metres (Moritz 2000).
_FEW = 1000  # Up to this many AOIs, all edges are densified before they are projected.
#: Extent below which, among many AOIs, edges are taken to stay straight in any CRS (over a length L they bend by L^2
#: tan(latitude) / 8R, some centimetres).
_STRAIGHT_METRES, _STRAIGHT_DEGREES = 1000.0, 0.01
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AOICoverage:
    """Pairs of a target grid and an AOI that it intersects: grid by grid, AOIs in the table's order."""

    target_grids: tuple[TargetGrid, ...]  #: All target grids of the dataset.
    extents: tuple[BaseGeometry, ...]  #: What each grid covers; with AOIs in degrees, also shifted by 360.
    table: AOITable | None  #: The AOIs; None = everything that the grids cover.
    shapes: Geometries  #: Each AOI in its grid's CRS, valid, shrunk by the inset and clipped to the extent `[P]`.
    full_shapes: Geometries  #: The same, neither shrunk nor clipped `[P]`.
    wkb: Geometries  #: `full_shapes` as WKB; None without AOIs `[P]`.
    grid_index: Integers  #: Index into `target_grids` of each pair `[P]`.
    aoi_index: Integers  #: Position in `table` of each pair's AOI; -1 = no AOI `[P]`.
    rows: Integers  #: Row in the source table of each pair's AOI; -1 = no AOI `[P]`.
    #: First and last instant of each pair's AOI, NaT = open `[P]`; None = no time windows.
    windows: tuple[Times, Times] | None

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def res(self) -> Floats:
        """Pixel size (x, y) of each pair `[P, 2]`."""
        return np.array([grid.res for grid in self.target_grids], dtype=np.float64)[self.grid_index]

    def chip_sizes(self, size: tuple[int, int]) -> Floats:
        """Width and height in CRS units of a chip of `size` pixels (height, width) for each pair `[P, 2]`."""
        sizes: Floats = self.res * (size[1], size[0])
        return sizes

    def by_grid(self) -> Iterator[tuple[int, TargetGrid, Integers]]:
        """Yield each target grid that has pairs: its number, the grid, and its pairs `[M]`."""
        for number, grid in enumerate(self.target_grids):
            pairs = np.flatnonzero(self.grid_index == number)
            if len(pairs):
                yield number, grid, pairs

    def select(self, selection: npt.NDArray[Any]) -> AOICoverage:
        """Return some of the pairs, by a mask or their indices."""
        names = [f.name for f in fields(self) if f.name not in ("target_grids", "extents", "table", "windows")]
        windows = self.windows and (self.windows[0][selection], self.windows[1][selection])
        return replace(self, **{name: getattr(self, name)[selection] for name in names}, windows=windows)

    def drop(self, mask: Mask, outside: Outside, reason: str, error: type[UsageError] = GeometryError) -> AOICoverage:
        """Return the pairs that are not in `mask` `[P]`; log the AOIs that lose all their pairs.

        If there are any and `outside` is not "drop", or no pair is left, raise `error`. `%s` in the reason stands for
        these AOIs (or for what the dataset covers).
        """
        if not mask.any():
            return self
        lost = np.setdiff1d(self.rows[mask], self.rows[~mask])
        if len(lost):
            if self.table is None:
                raise error(reason % "what the dataset covers (of an `&`, both sides)" + ".")
            text = reason % f"AOIs {format_rows(lost)}"
            if outside == "raise" or mask.all():
                raise error(f"{text}, or drop them (outside='drop').")
            _log.warning("%s. Dropping %d AOIs.", text, len(lost))
        return self.select(~mask)

    def digest(self) -> str:
        """Return a digest of the grids, AOIs and outlines, to a thousandth of a pixel."""
        coordinates, owner = shapely.get_coordinates(self.shapes, return_index=True)
        grids = [(grid.crs, grid.res, grid.origin) for grid in self.target_grids]
        return digest(grids, self.grid_index, self.rows, owner, np.round(coordinates / self.res[owner], 3))

    def m2_per_unit(self, shapes: Geometries) -> Floats:
        """Return square metres per square CRS unit at the centroids of shapes, one for each pair `[P]`.

        Degrees are measured on a sphere; projected units by their conversion factor.
        """
        scale = np.ones(len(self))
        for _, grid, here in self.by_grid():
            turn = full_turn(grid.crs)
            if turn is None:
                axes = pyproj_crs(grid.crs).axis_info
                scale[here] = float(axes[0].unit_conversion_factor) ** 2 if axes else 1.0
            else:
                radians = 2 * np.pi / turn
                latitude = np.nan_to_num(shapely.get_y(shapely.centroid(shapes[here]))) * radians
                scale[here] = np.cos(latitude) * (radians * _EARTH_RADIUS) ** 2
        return scale


def clip_aois(
    dataset: Any,
    aois: Any,
    aois_crs: Any = None,
    *,
    inset: float = 0.0,
    outside: Outside = "raise",
    polygons_only: bool = True,
) -> AOICoverage:
    """Clip AOIs (see `AOITable.of`) to what a dataset covers; without AOIs, return one pair for each target grid.

    Polygons are first shrunk by `inset` in CRS units. Raises GeometryError with the rows of AOIs that have no area (if
    `polygons_only`), lie outside the dataset or vanish by shrinking; with `outside="drop"` the latter two are logged.
    """
    if outside not in ("raise", "drop"):
        raise UsageError(f"outside must be 'raise' or 'drop', got {outside!r}.")
    if not (inset >= 0 and np.isfinite(inset)):
        raise UsageError(f"inset must be a finite distance >= 0 in CRS units, got {inset!r}.")
    grids = tuple(target_grids_of(dataset))
    extents = [union_polygons(grid.shapes) for grid in grids]
    table = None if aois is None else AOITable.of(aois, crs=aois_crs)
    turned, windows = extents, None
    if table is None:
        projected = [(np.array([-1]), object_array([extent])) for extent in extents]
    else:
        if polygons_only:
            _require_polygons(table)
        pairs = list(zip(grids, extents, strict=True))
        turned = [shapely.union_all(repeat_turns([extent], full_turn(grid.crs))) for grid, extent in pairs]
        projected = [_project(table, grid, extent.bounds, prefilter=len(grids) > 1) for grid, extent in pairs]
    aoi_index = np.concatenate([index for index, _ in projected])
    full_shapes = np.concatenate([shapes for _, shapes in projected])
    if table is not None and table.start is not None and table.stop is not None:
        windows = table.start[aoi_index], table.stop[aoi_index]
    shapes = _shrink(full_shapes, inset)
    coverage = AOICoverage(
        target_grids=grids,
        extents=tuple(turned),
        table=table,
        shapes=shapes,
        full_shapes=full_shapes,
        wkb=object_array([None] * len(grids)) if table is None else shapely.to_wkb(full_shapes).astype(object),
        grid_index=np.repeat(np.arange(len(grids)), [len(index) for index, _ in projected]),
        aoi_index=aoi_index,
        rows=aoi_index if table is None else table.rows[aoi_index],
        windows=windows,
    )
    # An AOI that is already empty lies outside the grid.
    vanished = shapely.is_empty(shapes) & ((aoi_index < 0) | ~shapely.is_empty(full_shapes))
    coverage = coverage.drop(vanished, outside, f"inset={inset} leaves nothing of %s; use a smaller inset")
    if table is None:
        return coverage
    return _clip(coverage, np.setdiff1d(np.arange(len(table)), aoi_index), outside, extents)


def _require_polygons(table: AOITable) -> None:
    others = np.flatnonzero(~is_polygon(table.geometries))
    if len(others):
        raise GeometryError(
            f"AOIs {format_rows(table.rows[others])} have no area (the first is a "
            f"{table.geometries[others[0]].geom_type}); a Polygon or MultiPolygon is needed. Give points and lines an "
            "area, for example with `.buffer(distance)`, or use PerAOISampler with a size."
        )


def _project(table: AOITable, grid: TargetGrid, bounds: Bounds, prefilter: bool) -> tuple[Integers, Geometries]:
    """Positions of the AOIs that may intersect a grid with these bounds, and their geometries in its CRS."""
    index = np.arange(len(table))
    if prefilter:
        index = np.flatnonzero(_may_intersect(shapely.bounds(table.geometries), table.crs, grid.crs, bounds))
    if not len(index):
        return index, np.zeros(0, dtype=object)
    source = table.geometries[index]
    small = np.zeros(len(index), bool)
    if len(index) > _FEW:
        xmin, ymin, xmax, ymax = shapely.bounds(source).T
        small = np.hypot(xmax - xmin, ymax - ymin) < (
            _STRAIGHT_METRES if full_turn(table.crs) is None else _STRAIGHT_DEGREES
        )
    shapes = np.empty(len(index), dtype=object)
    for mask, segments in ((small, 1), (~small, 32)):
        if mask.any():
            shapes[mask] = transform_geometries(source[mask], table.crs, grid.crs, near=bounds, segments=segments)
    if not same_crs(table.crs, grid.crs):
        polygons = shapely.get_dimensions(shapes) == 2
        shapes[polygons] = polygonal_each(shapes[polygons])
    return index, shapes


def _may_intersect(boxes: Floats, boxes_crs: str, crs: str, bounds: Bounds) -> Mask:
    """Which boxes `[N, 4]` may intersect bounds in `crs`; True if that cannot be known."""
    everything = np.ones(len(boxes), bool)
    try:
        xmin, ymin, xmax, ymax = transform_bounds(bounds, crs, boxes_crs)
    except pyproj.exceptions.ProjError:
        return everything
    turn = full_turn(boxes_crs)
    if xmin > xmax and turn is not None:
        xmax += turn
    if not np.isfinite([xmin, ymin, xmax, ymax]).all():
        return everything
    margin = 0.02 * max(xmax - xmin, ymax - ymin)
    found = ~everything
    for shift in (0.0,) if turn is None else (0.0, -turn, turn):
        found |= (boxes[:, 0] + shift <= xmax + margin) & (boxes[:, 2] + shift >= xmin - margin)
    found &= (boxes[:, 1] <= ymax + margin) & (boxes[:, 3] >= ymin - margin)
    return found


def _shrink(shapes: Geometries, inset: float) -> Geometries:
    if not inset:
        return shapes
    # Mitred: chords in place of arcs would leave points nearer to the edge than `inset`.
    return polygonal_each(map_in_threads(lambda part: shapely.buffer(part, -inset, join_style="mitre"), shapes))


def _clip(coverage: AOICoverage, unmatched: Integers, outside: Outside, extents: list[BaseGeometry]) -> AOICoverage:
    """Clip shapes to their grids' extents; drop or refuse AOIs outside all of them, `unmatched` among them."""
    shapes, polygons = coverage.shapes.copy(), is_polygon(coverage.shapes)
    for number, _, here in coverage.by_grid():
        extent, areas, others = coverage.extents[number], here[polygons[here]], here[~polygons[here]]
        shapes[areas] = clip_polygons(shapes[areas], extent)
        shapes[others] = shapely.intersection(shapes[others], extent)
    missed = shapely.is_empty(shapes)
    missed |= (shapely.get_dimensions(coverage.full_shapes) == 2) & ~(shapely.area(shapes) > 0)
    lost = np.setdiff1d(coverage.aoi_index[missed], coverage.aoi_index[~missed])
    _report_outside(coverage, np.union1d(lost, unmatched), outside, extents)
    return replace(coverage, shapes=shapes).select(~missed)


def _report_outside(coverage: AOICoverage, lost: Integers, outside: Outside, extents: list[BaseGeometry]) -> None:
    table = coverage.table
    if table is None or not len(lost):
        return
    rows = table.rows[lost]
    if outside == "drop" and len(lost) < len(table):
        _log.warning("Dropping %d AOIs outside every scene: %s", len(rows), format_rows(rows))
        return
    first, crs = table.geometries[lost[0]], table.crs
    pairs = np.flatnonzero(coverage.aoi_index == lost[0])
    if len(pairs) and not shapely.is_empty(coverage.full_shapes[pairs[0]]):
        first, crs = coverage.full_shapes[pairs[0]], coverage.target_grids[coverage.grid_index[pairs[0]]].crs
    covered = "; ".join(
        f"{_rounded(extent.bounds)} in {grid.crs}" for grid, extent in zip(coverage.target_grids, extents, strict=True)
    )
    others = "" if len(rows) == 1 else f", and so do {len(rows) - 1} more (all: {format_rows(rows)})"
    raise GeometryError(
        f"AOI {rows[0]} (bounds {_rounded(first.bounds)} in {crs}) lies outside every scene{others}. The scenes cover "
        f"{covered}. Drop it (outside='drop'), or check its CRS."
    )


def _rounded(bounds: Bounds) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in bounds)


# Weights --------------------------------------------------------------------------------------------------


def sampling_weights(
    coverage: AOICoverage, regions: Geometries, weight: Weight | None, balance: Balance | None
) -> Floats | None:
    """Return the relative frequency of each pair `[P]`; None = by the area of its region in CRS units.

    `regions` are where a chip's centre may lie in each pair `[P]`. Without `weight`, the table's own weights count, or
    areas in square metres. Weights that are not valid, continuous values to balance, and missing AOIs are a
    `UsageError`.
    """
    table, balanced = coverage.table, balance is not None and balance is not False
    single_grid = len(coverage.target_grids) == 1
    if table is None:
        if weight is not None or balanced:
            raise UsageError("weight= and balance= choose between AOIs; pass aois=.")
        return None if single_grid else _areas(coverage, regions)
    given = table.weights if weight is None else parse_weights(table.column(weight, "weight"), table.rows)
    if given is None and not balanced and single_grid:
        return None
    weights = _areas(coverage, regions)
    if given is not None:
        # Each pair gets its AOI's weight times its share of the AOI's area; scaled, so that products do not overflow.
        share = weights / np.bincount(coverage.aoi_index, weights, minlength=len(given))[coverage.aoi_index]
        weights = (given / np.max(given))[coverage.aoi_index] * share
    if balanced:
        classes = _class_codes(table, balance)[coverage.aoi_index]
        totals: Floats = np.bincount(classes, weights).astype(np.float64)
        empty = np.isin(classes, np.flatnonzero(totals <= 0))
        if empty.any():
            rows = format_rows(np.unique(coverage.rows[empty]))
            raise UsageError(f"All AOIs of a class have the weight 0, so it cannot be balanced: {rows}.")
        weights = weights / totals[classes]
    if not weights.any():
        raise UsageError("All AOIs inside the scenes have the weight 0: no chip could be drawn.")
    return weights


def _areas(coverage: AOICoverage, regions: Geometries) -> Floats:
    """Areas in square metres; a region that is only a point or line gets the smallest positive number."""
    areas = shapely.area(regions) * coverage.m2_per_unit(regions)
    return np.where(areas > 0, areas, np.finfo(np.float64).tiny)


def _class_codes(table: AOITable, balance: Any) -> Integers:
    """A number from 0 for the class of each AOI `[N]`."""
    if balance is True:
        if table.labels is None:
            raise UsageError(
                "balance=True needs labels: create the table with AOITable.of(…, label=), or pass a column."
            )
        column = pd.Series(table.labels)
    else:
        column = table.column(balance, "balance")
    if column.isna().any():
        raise UsageError(f"AOIs {format_rows(table.rows[column.isna().to_numpy()])} have no class to balance by.")
    if pd.api.types.is_float_dtype(column.dtype):
        raise UsageError("Continuous values cannot be balanced; bin them into classes, for example with pandas.cut.")
    codes: Integers = pd.factorize(column)[0].astype(np.int64)
    return codes
