"""Polygons as labels: classes or values, rasterised to the chip that is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import shapely
import torch
from affine import Affine
from shapely.geometry.base import BaseGeometry
from torchgeo.datasets import GeoDataset

from rasteret_ml.datasets.batches import get_samples
from rasteret_ml.datasets.combine import RasteretIntersection, RasteretUnion
from rasteret_ml.datasets.config import label_key
from rasteret_ml.datasets.index.scene_index import pack_index, restore_index, unpack_index
from rasteret_ml.datasets.index.search import IndexBounds
from rasteret_ml.datasets.polygon_table import label_values, polygon_table
from rasteret_ml.datasets.protocol import BatchRequest, SampleBatch
from rasteret_ml.datasets.rasterize import PolygonLookup, moved_polygons, paint
from rasteret_ml.datasets.summary import describe_grid, describe_times, shorten, summary_html
from rasteret_ml.errors import NoOverlapError, UsageError, redact
from rasteret_ml.geo.crs import crs_text, pyproj_crs, same_crs, transform_geometries
from rasteret_ml.geo.geometries import polygons_from
from rasteret_ml.geo.grid import Grid, pixel_size, round_half_up
from rasteret_ml.geo.regions import polygonal_each
from rasteret_ml.raster.read import ReadResult
from rasteret_ml.samplers.aoi.aoi import AOI
from rasteret_ml.samples.buffers import batch_rows
from rasteret_ml.samples.sample import TENSOR_ONLY, Sample, bounds_tensor, draw_columns, snapped_slices

__all__ = ["PolygonDataset"]


class PolygonDataset(GeoDataset):
    """Label samples `mask [H, W]` and `mask_valid [1, H, W]`, painted from polygons onto the chip that is asked for.

    Made for the right side of an `&` (`images & polygons`): the chip's grid is then the images', whatever their CRS.
    Polygons have no pixels of their own. On the left of an `&` or `|` without `res` they take CRS, resolution and
    pixel corners of the other side; alone they need `res`, and a chip lies exactly where it was asked for.

    Where labels are known is what the index says. Without `background` and `extent` that is one row a polygon: a chip
    that meets none raises NoOverlapError, as it would of a raster, and samplers draw only where polygons are. With one
    of them it is the extent, one row for each time that polygons are for: a chip there without any polygon is a sample
    like others, all background (or, without one, nothing known). TorchGeo's splitters cut this index, and what they cut
    away is not painted.

    Args:
        polygons: Any table of polygons (see `geometries_from`). Invalid ones are mended; a point or line is refused.
        label: Column of the classes (text or whole numbers) or values; None = every polygon is class 1.
        classes: Column value to class: a list (the place in it is the class) or a mapping. Default the sorted distinct
            values: 0, 1, 2 …, leaving out the number of the `background`. A polygon of another value, or of none,
            covers those below it, and is unknown: `ignore_index`, and False in `mask_valid`.
        continuous: The column holds numbers: float32, NaN where unknown.
        background: Class (or value) of what is outside all polygons; None = nothing is known there.
        order: Which of overlapping polygons is on top: None = the later one in the table; "area" = the smaller one;
            a column = the larger value.
        all_touched: Pixels that a polygon touches are its own, not only those whose centre is inside.
        ignore_index: Class of what is not known.
        extent: Where labels are known: a polygon or bounding box in the polygons' CRS, or a table. With `background`
            the default is the box around all polygons.
        time: Column of times or of ISO intervals ("2021-05-01/2021-08-31"), or two: (start, end), both ends included,
            as UTC. Text or dates that name a day, month or year mean all of it; missing = open to that side. None =
            the polygons are for all time.
        crs: CRS of chips where nothing else says it; default the polygons' own.
        res: Pixel size in its units, one number or (x, y).
        polygons_crs: CRS of polygons that do not carry one; default longitude/latitude.
        key: Name of the labels, beginning with "mask"; another one for each of several heads.
        transforms: Called with each sample, as in TorchGeo.

    Raises:
        UsageError: a column that is not there or does not fit, classes that contradict each other, or a wrong key.
        GeometryError: a geometry that is missing, empty or no polygon (its row is named).
    """

    def __init__(
        self,
        polygons: Any,
        label: str | None = None,
        *,
        classes: Sequence[Any] | Mapping[Any, int] | None = None,
        continuous: bool = False,
        background: Any = None,
        order: Literal["area"] | str | None = None,
        all_touched: bool = False,
        ignore_index: int = -100,
        extent: Any = None,
        time: str | tuple[str, str] | None = None,
        crs: Any = None,
        res: float | tuple[float, float] | None = None,
        polygons_crs: Any = None,
        key: str = "mask",
        transforms: Callable[[Sample], Sample] | None = None,
    ) -> None:
        found = polygons_from(polygons, polygons_crs)
        self.ignore_index = int(ignore_index)
        self._labels = label_values(found, label, classes, continuous, background, self.ignore_index)
        self._table = polygon_table(found, order, time)
        self._extent = _extent(extent, found.crs, self._table) if extent is not None or background is not None else None
        self.key, self.transforms = label_key(key, "mask"), transforms
        self.paths: list[str] = []
        self._all_touched = bool(all_touched)
        self._own_crs, self._crs = found.crs, found.crs if crs is None else crs_text(crs)
        self._res = pixel_size(res) or (0.0, 0.0)
        self._corner: tuple[float, float] | None = None
        self._index = self._made = self._make_index()
        self._lookup: PolygonLookup | None = None
        self._span: IndexBounds | None = None

    def __getstate__(self) -> dict[str, Any]:
        index = None if self._index is self._made else pack_index(self._index)
        table = pack_index(self._table)
        return self.__dict__ | {"_index": index, "_made": None, "_table": table, "_lookup": None, "_span": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_table": unpack_index(state["_table"])})
        packed = state["_index"]
        self._index = self._make_index() if packed is None else unpack_index(packed)
        self._made = self._index if packed is None else None

    def __copy__(self) -> PolygonDataset:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> PolygonDataset:
        # TorchGeo's splitters deep-copy a dataset, then assign its index or write into it; the polygons are shared.
        other = copy.copy(self)
        other._index, other._made = self._index.copy(), None
        other._lookup, other._span = None, None
        return other

    def __repr__(self) -> str:
        classes = f"classes=[{redact(shorten(list(self.classes)))}]" if self.classes else "values"
        return f"PolygonDataset({len(self._table):,} polygons, {classes}, [{describe_grid(self)}])"

    def _repr_html_(self) -> str:
        """Summary for notebooks. Samples are plain dicts; the last row says what they hold."""
        classes = [f"{number} = {value}" for value, number in self.classes.items()]
        dtype = "int64" if classes else "float32"
        rows = {
            "Polygons": f"{len(self._table):,}",
            "Classes": shorten(classes) or "none: values",
            "Grid": describe_grid(self),
            "Time": describe_times(self.index),
            "Samples": ", ".join([f"{self.key} [H, W] {dtype}", *sorted(self.sample_keys - {self.key})]),
        }
        return summary_html("PolygonDataset", rows)

    # Where and when -------------------------------------------------------------------------------------------

    @property
    def classes(self) -> dict[Any, int]:
        """Value in the column to class; empty for continuous labels."""
        return dict(self._labels.classes)

    @property
    def index(self) -> gpd.GeoDataFrame:
        """TorchGeo's index: where and when labels are known."""
        return self._index

    @index.setter
    def index(self, new: gpd.GeoDataFrame) -> None:
        self._index = restore_index(new, self._index)

    @property
    def grid(self) -> Grid | None:
        """The grid that chips lie on; None = they lie where they are asked for."""
        if self._corner is None or 0 in self._res:
            return None
        transform = Affine(self._res[0], 0.0, self._corner[0], 0.0, -self._res[1], self._corner[1])
        return Grid(crs=self._crs, transform=transform, shape=(1, 1))

    @property
    def crs(self) -> Any:
        """CRS of chips, a pyproj object as in TorchGeo. Setting it reprojects the index."""
        return pyproj_crs(self._crs)

    @crs.setter
    def crs(self, new_crs: Any) -> None:
        text = crs_text(new_crs)
        if text == self._crs:
            return
        if self._index is self._made:
            self._crs = text
            self._index = self._made = self._make_index()
        else:
            old = self._index
            shapes = transform_geometries(np.asarray(old.geometry, dtype=object), self._crs, text)
            columns = {name: old[name] for name in old.columns if name != old.geometry.name}
            self._index = gpd.GeoDataFrame(columns, geometry=polygonal_each(shapes), crs=text, index=old.index)
            self._crs = text
        self._corner = None

    @property
    def res(self) -> tuple[float, float]:
        """Pixel size (x, y) of chips in CRS units; zeros where none was chosen, as in TorchGeo."""
        return self._res

    @res.setter
    def res(self, new_res: float | tuple[float, float]) -> None:
        self._res = pixel_size(new_res) or self._res

    @property
    def bounds(self) -> tuple[slice, slice, slice]:
        """(x, y, t) of the whole index, as in TorchGeo; worked out once for each index."""
        if self._span is None or self._span.index is not self._index:
            self._span = IndexBounds(self._index)
        return self._span.slices(self._res)

    def _make_index(self) -> gpd.GeoDataFrame:
        table = self._table
        if self._extent is None:
            shapes = moved_polygons(np.asarray(table.geometry, dtype=object), self._own_crs, self._crs)
            times = table.index
            columns = {"polygon": np.arange(len(table))}
        else:
            times = table.index.unique()
            extent = np.array([self._extent], dtype=object)
            if not same_crs(self._own_crs, self._crs):
                extent = polygonal_each(transform_geometries(extent, self._own_crs, self._crs))
            shapes, columns = np.repeat(extent, len(times)), {}
        lost = ~np.isfinite(shapely.bounds(shapes)).all(axis=1)
        if lost.any():
            what = "The extent" if self._extent is not None else f"Polygon {int(np.argmax(lost))}"
            raise UsageError(f"{what} has no place in {self._crs}; choose another crs=, or cut it to your area first.")
        return gpd.GeoDataFrame(columns, geometry=shapes, crs=self._crs, index=times)

    def chip_grid(self, query: Any) -> Grid:
        """The grid of the chip that `query` asks for."""
        parts = query if isinstance(query, tuple) else (query,)
        if not parts or not all(isinstance(part, slice) for part in parts):
            raise UsageError(
                f"A dataset is asked by place, as ds[x, y, t] with slices or with an AOI, not {query!r}; give the "
                "loader a sampler, such as RandomAOISampler(ds, size, length) or GridAOISampler(ds, size)."
            )
        x, y, _ = self._disambiguate_slice(query)
        if not x.step or not y.step:
            raise UsageError(
                "Polygons have no pixels: give res=, steps of the slices, or join them to images with `&`."
            )
        xres, yres = pixel_size((x.step, y.step)) or self._res
        extent = (float(x.start), float(y.start), float(x.stop), float(y.stop))
        crs = query.crs if isinstance(query, AOI) and query.crs is not None else self._crs
        grid = self.grid if crs == self._crs else None
        if grid is not None and _near(xres, self._res[0]) and _near(yres, self._res[1]):
            return grid.snap(extent)
        xmin, ymin, xmax, ymax = extent
        if not (xmax > xmin and ymax > ymin and np.isfinite(extent).all()):
            raise UsageError(f"Bounds must be finite with xmin < xmax and ymin < ymax, not {extent}.")
        width, height = round_half_up((xmax - xmin) / xres), round_half_up((ymax - ymin) / yres)
        transform = Affine(xres, 0.0, xmin, 0.0, -yres, ymax)
        return Grid(crs=crs, transform=transform, shape=(max(1, height), max(1, width)))

    # Painting -------------------------------------------------------------------------------------------------

    def __getitem__(self, query: Any) -> Sample:
        """One sample; see the class.

        Raises:
            NoOverlapError: (an IndexError) nothing is known at this place and time.
        """
        return self.__getitems__([query])[0]

    def __getitems__(self, queries: Sequence[Any]) -> list[Sample]:
        """Rasterize a sample per query."""
        return get_samples(self, queries)

    @property
    def version(self) -> tuple[Any, ...]:
        """See `ReadableDataset`."""
        return self._index, self._crs, self._res, self._corner

    @property
    def ignored_classes(self) -> dict[str, int]:
        """See `ReadableDataset`."""
        return {self.key: self.ignore_index}

    @property
    def sample_keys(self) -> set[str]:
        """Keys of every sample, whatever the query."""
        return {self.key, "mask_valid", "transform"}

    def requests(self, queries: Sequence[Any], grids: Sequence[Grid] | None = None) -> BatchRequest:
        """Plan a batch (pure); polygons are in memory, so it reads nothing and cannot fail."""
        if grids is None:
            grids = [self.chip_grid(query) for query in queries]
        nbytes = sum(grid.height * grid.width for grid in grids) * 16
        return BatchRequest(queries=queries, grids=grids, nbytes=nbytes)

    def samples(self, batch: BatchRequest, results: Sequence[ReadResult]) -> SampleBatch:
        """Rasterize the samples of a batch, on grids in any CRS."""
        queries, grids = batch.queries, batch.grids
        if not queries:
            return SampleBatch(samples=[])
        dtype = torch.float32 if self._labels.values.dtype.kind == "f" else torch.int64
        shapes = [grid.shape for grid in grids]
        masks, valids = batch_rows(shapes, dtype), batch_rows([(1, *shape) for shape in shapes], torch.bool)
        times = [self._disambiguate_slice(query)[2] for query in queries]
        for query, grid, t, mask, valid in zip(queries, grids, times, masks, valids, strict=True):
            self._paint(query, grid, t, mask.numpy(), valid.numpy()[0])
        columns: dict[str, Sequence[Any]] = {self.key: masks, "mask_valid": valids}
        columns |= _identity(queries, grids, times)
        samples = [{name: column[i] for name, column in columns.items()} for i in range(len(queries))]
        if self.transforms is not None:
            samples = [self.transforms(sample) for sample in samples]
        return SampleBatch(samples=samples)

    def _paint(self, query: Any, grid: Grid, t: slice, mask: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> None:
        """Write `[H, W]` labels and where they are known."""
        lookup, labels = self._found(), self._labels
        positions, shapes = lookup.polygons.near(grid, t)
        outlines = shapes if lookup.known is None else lookup.known.near(grid, t)[1]
        if not len(outlines):
            place = f"x, y = {tuple(round(v, 6) for v in grid.bounds)} ({grid.crs}) between {t.start} and {t.stop}"
            raise NoOverlapError(
                f"No polygon at {place}; with background= or extent= places without one are samples too."
                if lookup.known is None
                else f"Nothing is known of {place}: it is outside the extent of the labels, {self._index.total_bounds}."
            )
        rows = lookup.rows[positions]
        upwards = np.argsort(lookup.rank[rows], kind="stable")
        top = paint(shapes[upwards], grid, all_touched=self._all_touched)
        outside = labels.nothing if labels.background is None else labels.background
        values = np.concatenate([[outside], labels.values[rows[upwards]]]).astype(mask.dtype)
        known = np.isfinite(values) if values.dtype.kind == "f" else values != labels.nothing
        np.take(values, top, out=mask)
        np.take(known, top, out=valid)
        if lookup.known is not None:
            beyond = paint(outlines, grid) == 0
            mask[beyond], valid[beyond] = labels.nothing, False

    def _found(self) -> PolygonLookup:
        if self._lookup is None or self._lookup.index is not self._index:
            whole = self._index is self._made
            self._lookup = PolygonLookup(self._index, self._table, bounded=self._extent is not None, whole=whole)
        return self._lookup

    def has(self, query: Any, grid: Grid) -> bool:
        """Whether anything is known at a chip."""
        lookup = self._found()
        return len((lookup.known or lookup.polygons).near(grid, self._disambiguate_slice(query)[2])[0]) > 0

    # Combining ------------------------------------------------------------------------------------------------

    def __and__(self, other: GeoDataset) -> RasteretIntersection:
        """Both at once; without a `res` of their own, polygons take the other side's grid."""
        return RasteretIntersection(self._on_grid_of(other), other)

    def __or__(self, other: GeoDataset) -> RasteretUnion:
        """Either: what no polygon says is filled from the other side by validity."""
        return RasteretUnion(self._on_grid_of(other), other)

    def _on_grid_of(self, other: Any) -> PolygonDataset:
        if self._res != (0.0, 0.0) or not isinstance(other, GeoDataset) or 0 in other.res:
            return self
        joined = copy.copy(self)
        joined.crs, joined.res = other.crs, other.res
        grid = getattr(other, "grid", None)
        x, y, _ = other.bounds
        joined._corner = (x.start, y.stop) if grid is None else (grid.transform.c, grid.transform.f)
        return joined


def _extent(extent: Any, crs: str, table: gpd.GeoDataFrame) -> BaseGeometry:
    """Where labels are known, in the polygons' CRS."""
    if extent is None:
        return shapely.box(*table.total_bounds)
    given = getattr(extent, "crs", None)
    found = polygons_from(extent, crs if given is None else None)
    shapes = transform_geometries(found.geometries, found.crs, crs)
    return shapely.union_all(polygonal_each(shapes))


def _identity(queries: Sequence[Any], grids: Sequence[Grid], times: Sequence[slice]) -> dict[str, Sequence[Any]]:
    """Where, and for which AOI."""
    slices = [snapped_slices(grid, t) for grid, t in zip(grids, times, strict=True)]
    columns: dict[str, Sequence[Any]] = {}
    if TENSOR_ONLY:
        columns["bounds"] = torch.stack([bounds_tensor(part) for part in slices]).unbind(0)
    else:
        columns["bounds"] = slices
        columns["crs"] = [pyproj_crs(str(grid.crs)) for grid in grids]
    places = [tuple(grid.transform)[:9] for grid in grids]
    columns["transform"] = torch.tensor(places, dtype=torch.float64).unbind(0)
    columns |= draw_columns(queries)
    rows = [query.row if isinstance(query, AOI) else -1 for query in queries]
    if min(rows) >= 0:
        columns["aoi"] = torch.tensor(rows, dtype=torch.int64)[:, None].unbind(0)
    return columns


def _near(step: float, res: float) -> bool:
    return abs(step - res) <= 1e-9 * res
