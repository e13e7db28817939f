"""Where the records and the AOIs lie: outlines on a map, coloured by a column."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rasteret_ml.errors import UsageError
from rasteret_ml.plotting.figure import panels
from rasteret_ml.plotting.outlines import polygon_paths
from rasteret_ml.plotting.scale import ColumnScale, column_scale

__all__ = ["draw_footprints"]

Geometries = npt.NDArray[np.object_]

_BLUE = (0.2, 0.35, 0.6, 1.0)
_AOI = (0.75, 0.1, 0.35, 1.0)
_MANY = 2000


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
    """Footprints filled faintly, AOIs outlined over them; north up, a kilometre as long one way as the other.

    The fills of footprints that lie on one another mix, and the last one's edge is seen.

    Args:
        footprints: Shapely geometries `[N]`; None or empty ones are counted in the title.
        values: `[N]`, their colour: texts and truth values as categories, dates and numbers along a colour map.
        aois: Shapely geometries `[M]` in the same CRS.
        aoi_values: `[M]`, of the same kind as `values` and on one scale with them.
        name: What the values are, for the legend.
        lonlat: Whether coordinates are degrees; else units of a projected CRS.
        title: In place of the counts.
        ax: Axes to draw on; new ones in a new figure by default.

    Raises:
        UsageError: values that cannot be coloured, or not as many as there are geometries.
    """
    areas = np.empty(0, object) if aois is None else aois
    for what, shapes, column in (("values", footprints, values), ("aoi_values", areas, aoi_values)):
        if column is not None and len(column) != len(shapes):
            raise UsageError(f"{what}= has {len(column)} entries for {len(shapes)} geometries.")
    there = ~(shapely.is_missing(footprints) | shapely.is_empty(footprints))
    drawn, scale = _colours(len(footprints), len(areas), values, aoi_values, name)
    shown = np.concatenate([footprints[there], areas])
    seen = shapely.total_bounds(shown) if len(shown) else np.full(4, np.nan)
    figure, (ax,) = panels(1, ax, size=_size(seen, lonlat), columns=1)
    _draw(ax, footprints, drawn[: len(footprints)], there, aoi=False)
    _draw(ax, areas, drawn[len(footprints) :], ~shapely.is_missing(areas), aoi=True)
    ax.set_title(title if title is not None else _counts(there, areas))
    _frame(ax, seen, lonlat)
    _explain(figure, ax, scale, name, with_aois=len(areas) > 0 and aoi_values is None, bare=values is None)
    return figure


def _colours(
    count: int, areas: int, values: npt.NDArray[Any] | None, aoi_values: npt.NDArray[Any] | None, name: str
) -> tuple[npt.NDArray[np.float64], ColumnScale | None]:
    """Colours `[count + areas, 4]`, and the scale of those that have values."""
    colours = np.concatenate([np.tile(_BLUE, (count, 1)), np.tile(_AOI, (areas, 1))])
    columns = [column for column in (values, aoi_values) if column is not None]
    if not columns:
        return colours, None
    scale = column_scale(columns, name)
    start, stop = (0 if values is not None else count), (count + areas if aoi_values is not None else count)
    colours[start:stop] = scale.colours
    return colours, scale


def _draw(
    ax: Axes, shapes: Geometries, colours: npt.NDArray[np.float64], there: npt.NDArray[np.bool_], *, aoi: bool
) -> None:
    """Areas as one collection, lines as another, points as a third."""
    rows = np.flatnonzero(there)
    if not len(rows):
        return
    kind, order, gid = shapely.get_dimensions(shapes[rows]), 3 if aoi else 2, "AOIs" if aoi else "footprints"
    width = 1.6 if aoi else 0.8
    width = width if len(rows) < _MANY else width / 4
    # A dark rim: pale colours are lost on pale footprints.
    look: dict[str, Any] = {"zorder": order, "gid": gid}
    look |= {"path_effects": [withStroke(linewidth=width + 1.2, foreground="0.2")]} if aoi else {}
    surfaces = rows[kind == 2]
    if len(surfaces):
        paths, owners = polygon_paths(shapes[surfaces])
        edges = colours[surfaces][owners]
        faces = edges * (1, 1, 1, 0.0 if aoi else 0.22 if len(rows) < _MANY else 0.1)
        ax.add_collection(
            PathCollection(paths, facecolors=faces, edgecolors=edges, linewidths=width, **look), autolim=False
        )
    lines = rows[kind == 1]
    if len(lines):
        parts, part_of = shapely.get_parts(shapes[lines], return_index=True)
        ax.add_collection(
            LineCollection(
                [shapely.get_coordinates(part) for part in parts],
                colors=colours[lines][part_of],
                linewidths=width,
                **look,
            ),
            autolim=False,
        )
    points = rows[kind == 0]
    if len(points):
        xy, point_of = shapely.get_coordinates(shapes[points], return_index=True)
        ax.scatter(xy[:, 0], xy[:, 1], c=colours[points][point_of], s=14, linewidths=0, **look)


def _aspect(bounds: npt.NDArray[np.float64], lonlat: bool) -> float:
    """Length of a unit of y over one of x: a degree of longitude is cos(latitude) as long as one of latitude."""
    middle = (bounds[1] + bounds[3]) / 2
    return 1 / max(math.cos(math.radians(middle)), 0.05) if lonlat and np.isfinite(middle) else 1.0


def _size(bounds: npt.NDArray[np.float64], lonlat: bool) -> tuple[float, float]:
    """Inches for a figure whose map is as wide and high as what it shows, with room for a legend."""
    width, height = bounds[2:] - bounds[:2]
    known = np.isfinite(width) and width > 0 and height > 0
    ratio = float(height / width) * _aspect(bounds, lonlat) if known else 1.0
    return float(np.clip(5.5 / ratio, 2.6, 5.8)) + 2.0, float(np.clip(5.8 * ratio, 2.2, 5.5)) + 0.8


def _frame(ax: Axes, bounds: npt.NDArray[np.float64], lonlat: bool) -> None:
    """Limits with a margin, the right aspect, and ticks that say what they are."""
    if np.isfinite(bounds).all():
        xmin, ymin, xmax, ymax = (float(v) for v in bounds)
        around = 0.05 * max(xmax - xmin, ymax - ymin) or 0.01
        ax.set(xlim=(xmin - around, xmax + around), ylim=(ymin - around, ymax + around))
    ax.set_aspect(_aspect(bounds, lonlat))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(6))
    if lonlat:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _degrees(v, "EW")))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _degrees(v, "NS")))
    else:
        ax.ticklabel_format(style="plain", useOffset=False)
        ax.set(xlabel="easting", ylabel="northing")
    ax.tick_params(labelsize=8)
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)


def _explain(figure: Figure, ax: Axes, scale: ColumnScale | None, name: str, *, with_aois: bool, bare: bool) -> None:
    """The legend and the colour bar, beside the map."""
    keys: dict[str, Artist] = {}
    if scale is not None:
        keys = {text: Patch(facecolor=(*c[:3], 0.35), edgecolor=c) for text, c in scale.keys.items()}
    if bare and (with_aois or scale is not None):
        keys["footprints"] = Patch(facecolor=(*_BLUE[:3], 0.22), edgecolor=_BLUE)
    if with_aois:
        keys["AOIs"] = Line2D([], [], color=_AOI, linewidth=1.6)
    if scale is not None and scale.bar is not None:
        bar = figure.colorbar(scale.bar, ax=ax, shrink=0.8, pad=0.02, label=name)
        bar.outline.set_visible(False)
        if scale.dates:
            bar.ax.yaxis.set_major_locator(AutoDateLocator(tz="UTC", maxticks=7))
            bar.ax.yaxis.set_major_formatter(DateFormatter("%Y-%m-%d", tz="UTC"))
        else:
            bar.formatter.set_useOffset(False)
    if keys:
        below = scale is not None and scale.bar is not None
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
        if below:
            place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.07), "ncols": len(keys)}
        title = name if scale is not None and not below else None
        ax.legend(handles=list(keys.values()), labels=list(keys), title=title, frameon=False, fontsize=9, **place)


def _counts(there: npt.NDArray[np.bool_], aois: Sequence[Any] | Geometries) -> str:
    absent = int((~there).sum())
    parts = [f"{len(there):,} record{'' if len(there) == 1 else 's'}"]
    parts += [f"{absent:,} without a geometry"] if absent else []
    parts += [f"{len(aois):,} AOI{'' if len(aois) == 1 else 's'}"] if len(aois) else []
    return ", ".join(parts)


def _degrees(value: float, ends: str) -> str:
    size = f"{abs(value):.6f}".rstrip("0").rstrip(".")
    return f"{size}°{'' if size == '0' else ends[0] if value > 0 else ends[1]}"
