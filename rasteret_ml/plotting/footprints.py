"""Maps of footprints and AOIs, coloured by a column.

The geometries become matplotlib collections here rather than by `GeoSeries.plot`, which makes an artist per polygon:
3.3 s for 10,000 boxes, 0.2 s here.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.colours import ColumnScale, column_scale
from rasteret_ml.plotting.figure import panels

Geometries = npt.NDArray[np.object_]

_BLUE = (0.2, 0.35, 0.6, 1.0)
_RED = (0.75, 0.1, 0.35, 1.0)
_FILL = 0.22  # Opacity of a footprint's fill.
_MANY = 2000  # From this many geometries on, lines are thin and fills faint.


def draw_footprints(
    footprints: Geometries,
    *,
    values: npt.NDArray[Any] | None = None,
    aois: Geometries | None = None,
    aoi_values: npt.NDArray[Any] | None = None,
    name: str = "",
    lonlat: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw footprints, filled faintly, and the outlines of AOIs over them; north is up, distances are true.

    Args:
        footprints: Shapely geometries `[N]`; missing and empty ones are counted in the title.
        values: The column `[N]` that colours them (see `column_scale`).
        aois: Shapely geometries `[M]` in the same CRS.
        aoi_values: The column `[M]` that colours the AOIs, on one scale with `values`.
        name: The column's name, for legend and errors.
        lonlat: Whether coordinates are degrees; else units of a projected CRS.
        title: Replaces the counts of records and AOIs.
        ax: Axes to draw on; None makes a new figure.

    Raises:
        UsageError: values that cannot be coloured, or not one per geometry.
    """
    areas = np.empty(0, object) if aois is None else aois
    for argument, geometries, column in (("values", footprints, values), ("aoi_values", areas, aoi_values)):
        if column is not None and len(column) != len(geometries):
            raise UsageError(f"{argument} must have one entry per geometry, got {len(column)} for {len(geometries)}.")
    colours = [np.tile(_BLUE, (len(footprints), 1)), np.tile(_RED, (len(areas), 1))]
    columns = {i: column for i, column in enumerate((values, aoi_values)) if column is not None}
    scale = column_scale(list(columns.values()), name) if columns else None
    if scale is not None:
        cuts = np.cumsum([len(column) for column in columns.values()])[:-1]
        for i, found in zip(columns, np.split(scale.colours, cuts), strict=True):
            colours[i] = found
    drawable = ~(shapely.is_missing(footprints) | shapely.is_empty(footprints))
    drawn = np.concatenate([footprints[drawable], areas])
    bounds = shapely.total_bounds(drawn) if len(drawn) else np.full(4, np.nan)
    aspect = _aspect(bounds, lonlat)
    figure, (ax,) = panels(1, ax, size=_size(bounds, aspect), columns=1)
    _draw(ax, footprints, colours[0], gid="footprints", linewidth=0.8, fill=_FILL, zorder=2)
    _draw(ax, areas, colours[1], gid="AOIs", linewidth=1.6, fill=0.0, zorder=3, rim=True)
    ax.set_title(_counts(drawable, len(areas)) if title is None else title)
    _set_axes(ax, bounds, aspect, lonlat)
    handles: dict[str, Artist] = {}
    if scale is not None:
        handles = {text: Patch(facecolor=(*c[:3], 0.35), edgecolor=c) for text, c in scale.legend.items()}
    if values is None and len(areas):
        handles["footprints"] = Patch(facecolor=(*_BLUE[:3], _FILL), edgecolor=_BLUE)
    if aoi_values is None and len(areas):
        handles["AOIs"] = Line2D([], [], color=_RED, linewidth=1.6)
    _add_keys(figure, ax, scale, name, handles)
    return figure


def _draw(
    ax: Axes,
    geometries: Geometries,
    colours: npt.NDArray[np.float64],
    *,
    gid: str,
    linewidth: float,
    fill: float,
    zorder: int,
    rim: bool = False,
) -> None:
    """Draw areas, lines and points, each kind as one collection; `fill` is the opacity of areas."""
    drawable = ~(shapely.is_missing(geometries) | shapely.is_empty(geometries))
    if drawable.sum() >= _MANY:
        linewidth, fill = linewidth / 4, fill / 2
    style: dict[str, Any] = {"gid": gid, "zorder": zorder, "linewidths": linewidth}
    if rim:  # pale outlines are lost on pale fills
        style["path_effects"] = [withStroke(linewidth=linewidth + 1.2, foreground="0.2")]
    areas, lines, points = (np.flatnonzero(drawable & (shapely.get_dimensions(geometries) == d)) for d in (2, 1, 0))
    if len(areas):
        edges = colours[areas]
        look = style | {"edgecolors": edges, "facecolors": edges * (1, 1, 1, fill)}
        ax.add_collection(PathCollection(_paths(geometries[areas]), **look), autolim=False)
    if len(lines):
        parts, owners = shapely.get_parts(geometries[lines], return_index=True)
        segments = [shapely.get_coordinates(part) for part in parts]
        ax.add_collection(LineCollection(segments, colors=colours[lines][owners], **style), autolim=False)
    if len(points):
        xy, owners = shapely.get_coordinates(geometries[points], return_index=True)
        ax.scatter(*xy.T, c=colours[points][owners], s=14, **(style | {"linewidths": 0}))


def _paths(areas: Geometries) -> list[Path]:
    """Return one path per geometry, of all rings of its polygons."""
    # A hole stays open where its ring winds the other way round than the shell.
    parts, owners = shapely.get_parts(shapely.orient_polygons(areas), return_index=True)
    rings, part_of = shapely.get_rings(parts, return_index=True)
    xy, ring_of = shapely.get_coordinates(rings, return_index=True)
    starts = np.flatnonzero(np.diff(ring_of, prepend=-1))
    codes = np.full(len(xy), Path.LINETO, Path.code_type)
    codes[starts] = Path.MOVETO
    codes[np.append(starts[1:], len(xy)) - 1] = Path.CLOSEPOLY
    cuts = np.searchsorted(owners[part_of][ring_of], np.arange(len(areas) + 1))
    return [Path(xy[a:b], codes[a:b]) for a, b in pairwise(cuts)]


def _aspect(bounds: npt.NDArray[np.float64], lonlat: bool) -> float:
    """Length of a unit of y over one of x: a degree of longitude is cos(latitude) as long as one of latitude."""
    middle = (bounds[1] + bounds[3]) / 2
    return 1 / max(math.cos(math.radians(middle)), 0.05) if lonlat and np.isfinite(middle) else 1.0


def _size(bounds: npt.NDArray[np.float64], aspect: float) -> tuple[float, float]:
    """Return the inches (width, height) of a figure shaped like its map, with room for a legend."""
    width, height = bounds[2:] - bounds[:2]
    ratio = float(height / width) * aspect if width > 0 and height > 0 else 1.0
    return float(np.clip(5.5 / ratio, 2.6, 5.8)) + 2.0, float(np.clip(5.8 * ratio, 2.2, 5.5)) + 0.8


def _set_axes(ax: Axes, bounds: npt.NDArray[np.float64], aspect: float, lonlat: bool) -> None:
    if np.isfinite(bounds).all():
        xmin, ymin, xmax, ymax = (float(v) for v in bounds)
        margin = 0.05 * max(xmax - xmin, ymax - ymin) or 0.01
        ax.set(xlim=(xmin - margin, xmax + margin), ylim=(ymin - margin, ymax + margin))
    ax.set_aspect(aspect)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    if lonlat:
        for axis, ends in ((ax.xaxis, ("W", "", "E")), (ax.yaxis, ("S", "", "N"))):
            axis.set_major_formatter(FuncFormatter(lambda v, _, ends=ends: f"{abs(v):.9g}°{ends[int(np.sign(v)) + 1]}"))
    else:
        ax.ticklabel_format(style="plain", useOffset=False)
        ax.set(xlabel="easting", ylabel="northing")
    ax.tick_params(labelsize=8)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _add_keys(figure: Figure, ax: Axes, scale: ColumnScale | None, name: str, handles: dict[str, Artist]) -> None:
    """Add the colour bar and the legend, beside the map; with both, the legend is below it."""
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "title": name if scale else None}
    if scale is not None and scale.bar is not None:
        ticks: dict[str, Any] = {}
        if scale.dates:
            ticks = {"ticks": AutoDateLocator(maxticks=7), "format": DateFormatter("%Y-%m-%d")}
        bar = figure.colorbar(scale.bar, ax=ax, shrink=0.8, pad=0.02, label=name, **ticks)
        bar.outline.set_visible(False)
        if not scale.dates:
            bar.formatter.set_useOffset(False)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": len(handles)}
    if handles:
        ax.legend(handles=list(handles.values()), labels=list(handles), frameon=False, fontsize=9, **place)


def _counts(drawable: npt.NDArray[np.bool_], aois: int) -> str:
    missing = int((~drawable).sum())
    texts = [f"{len(drawable):,} record{'' if len(drawable) == 1 else 's'}"]
    texts += [f"{missing:,} without a geometry"] if missing else []
    texts += [f"{aois:,} AOI{'' if aois == 1 else 's'}"] if aois else []
    return ", ".join(texts)
