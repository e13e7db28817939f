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
from rasteret_ml.plotting.chips import panels
from rasteret_ml.plotting.colours import ColumnScale, column_scale

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
    ax: Axes | None = None,
) -> Figure:
    """Draw footprints `[N]`, filled faintly, and the outlines of AOIs `[M]` over them, all in longitude and latitude.

    The column `name` colours footprints (`values` `[N]`) and AOIs (`aoi_values` `[M]`) on one scale, see
    `column_scale`. The title counts records, those without a geometry (missing or empty) and AOIs. UsageError: values
    that cannot be coloured, or not one per geometry.
    """
    areas = np.empty(0, object) if aois is None else aois
    for argument, geometries, column in (("values", footprints, values), ("aoi_values", areas, aoi_values)):
        if column is not None and len(column) != len(geometries):
            raise UsageError(f"{argument} must have one entry per geometry, got {len(column)} for {len(geometries)}.")
    columns = [column for column in (values, aoi_values) if column is not None]
    scale = column_scale(columns, name) if columns else None
    blue, red = np.tile(_BLUE, (len(footprints), 1)), np.tile(_RED, (len(areas), 1))
    if scale is not None and values is not None:
        blue = scale.colours[: len(values)]
    if scale is not None and aoi_values is not None:
        red = scale.colours[len(scale.colours) - len(areas) :]
    bounds = shapely.total_bounds(np.concatenate([[None], footprints, areas]))  # NaN if there is nothing
    # A degree of longitude is cos(latitude) as long as one of latitude.
    middle = (bounds[1] + bounds[3]) / 2
    aspect = 1 / max(math.cos(math.radians(middle)), 0.05) if np.isfinite(middle) else 1.0
    figure, (ax,) = panels(1, ax, size=_size(bounds, aspect), columns=1)
    _draw(ax, footprints, blue, gid="footprints", linewidth=0.8, fill=_FILL, zorder=2)
    _draw(ax, areas, red, gid="AOIs", linewidth=1.6, fill=0.0, zorder=3)
    ax.set_title(_counts(footprints, len(areas)))
    _set_axes(ax, bounds, aspect)
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
) -> None:
    """Draw areas, lines and points, each kind as one collection; `fill` is the opacity of areas, 0 for outlines."""
    drawable = _drawable(geometries)
    if drawable.sum() >= _MANY:
        linewidth, fill = linewidth / 4, fill / 2
    style: dict[str, Any] = {"gid": gid, "zorder": zorder, "linewidths": linewidth}
    if not fill:  # pale outlines are lost on pale fills
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


def _size(bounds: npt.NDArray[np.float64], aspect: float) -> tuple[float, float]:
    """Return the inches (width, height) of a figure shaped like its map, with room for a legend."""
    width, height = bounds[2:] - bounds[:2]
    ratio = float(height / width) * aspect if width > 0 and height > 0 else 1.0
    return float(np.clip(5.5 / ratio, 2.6, 5.8)) + 2.0, float(np.clip(5.8 * ratio, 2.2, 5.5)) + 0.8


def _set_axes(ax: Axes, bounds: npt.NDArray[np.float64], aspect: float) -> None:
    if np.isfinite(bounds).all():
        xmin, ymin, xmax, ymax = (float(v) for v in bounds)
        margin = 0.05 * max(xmax - xmin, ymax - ymin) or 0.01
        ax.set(xlim=(xmin - margin, xmax + margin), ylim=(ymin - margin, ymax + margin))
    ax.set_aspect(aspect)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    for axis, ends in ((ax.xaxis, ("W", "", "E")), (ax.yaxis, ("S", "", "N"))):
        axis.set_major_formatter(FuncFormatter(lambda v, _, ends=ends: f"{abs(v):.9g}°{ends[int(np.sign(v)) + 1]}"))
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


def _drawable(geometries: Geometries) -> npt.NDArray[np.bool_]:
    return np.asarray(~(shapely.is_missing(geometries) | shapely.is_empty(geometries)))


def _counts(footprints: Geometries, aois: int) -> str:
    missing = int((~_drawable(footprints)).sum())
    texts = [f"{len(footprints):,} record{'' if len(footprints) == 1 else 's'}"]
    texts += [f"{missing:,} without a geometry"] if missing else []
    texts += [f"{aois:,} AOI{'' if aois == 1 else 's'}"] if aois else []
    return ", ".join(texts)
